// The `Lanes` of divergence_math.h for one CUDA thread, and powers and logarithms on the special function unit.
#pragma once

#include <string.h>

#include "cuda/device.cuh"

#define RBFAST_INLINE static __device__ __forceinline__

namespace rbfast {

constexpr double kLn2 = 0.6931471805599453;

typedef float Lanes;
typedef int LaneInts;

RBFAST_INLINE float splat(float value) { return value; }
RBFAST_INLINE float fmadd(float a, float b, float c) { return fmaf(a, b, c); }
RBFAST_INLINE float as_lanes(int bits) { return __int_as_float(bits); }
RBFAST_INLINE int as_ints(float value) { return __float_as_int(value); }
RBFAST_INLINE float to_lanes(int value) { return static_cast<float>(value); }
RBFAST_INLINE float larger(float a, float b) { return b > a ? b : a; }
RBFAST_INLINE float smaller(float a, float b) { return b < a ? b : a; }
RBFAST_INLINE float nearest_whole(float v) { return rintf(v); }
RBFAST_INLINE float times_power(float v, float n) { return v * __int_as_float((static_cast<int>(n) + 127) << 23); }

// 2^x to a relative error of 2^-22; 0 below the smallest normal number.
RBFAST_INLINE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// log2(x) to an absolute or a relative error of 2^-22, whichever is larger.
RBFAST_INLINE float log2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

// log2(x) of a normal x > 0 as a whole number, which is exact, and the rest in [0, 1), to within 2^-24.
struct Log2Parts {
  float whole, rest;
};
RBFAST_INLINE Log2Parts log2_parts(float x) {
  const int bits = __float_as_int(x);
  return {static_cast<float>((bits >> 23) - 127), log2f(__int_as_float((bits & 0x007fffff) | 0x3f800000))};
}

// a / b within 2 ulp, for 2^-126 < |b| < 2^126.
RBFAST_INLINE float divide_fast(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// a / b within 1 ulp, and 1 if they are equal, for 2^-126 < |b| < 2^126. There is no branch for other b.
RBFAST_INLINE float divide(float a, float b) {
  const float inverse = divide_fast(1.0f, b), quotient = a * inverse;
  return fmaf(fmaf(-quotient, b, a), inverse, quotient);
}

// The larger of two, NaN if either is.
RBFAST_INLINE float max_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

// The same value, but computed even if a later `?:` does not select it: the compiler would otherwise branch around it,
// and the warp diverge.
RBFAST_INLINE float unconditional(float value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(value));
#endif
  return value;
}

// Two values rounded to bf16, the first in the low half.
RBFAST_INLINE unsigned pack_bf16(float low, float high) {
#ifdef __CUDA_ARCH__
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  const __nv_bfloat16 pair[2] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
  unsigned packed;
  memcpy(&packed, pair, sizeof(packed));
  return packed;
#endif
}

}  // namespace rbfast

#include "buckets.h"
#include "divergence_math.h"
