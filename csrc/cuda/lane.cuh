// One CUDA thread as the `Lanes` of divergence_math.h, and the GPU's own exp.
#pragma once

#define RBFAST_INLINE static __device__ __forceinline__
#define RBFAST_OWN_EXP_NEGATIVE

namespace rbfast {

typedef float Lanes;
typedef int LaneInts;

RBFAST_INLINE float splat(float value) { return value; }
RBFAST_INLINE float fmadd(float a, float b, float c) { return fmaf(a, b, c); }
RBFAST_INLINE float as_lanes(int bits) { return __int_as_float(bits); }
RBFAST_INLINE int as_ints(float value) { return __float_as_int(value); }
RBFAST_INLINE float to_lanes(int value) { return static_cast<float>(value); }
RBFAST_INLINE float larger(float a, float b) { return b > a ? b : a; }
RBFAST_INLINE float smaller(float a, float b) { return b < a ? b : a; }
RBFAST_INLINE float times_power(float v, float n) {
  return n < -126.0f ? 0.0f : v * __int_as_float((static_cast<int>(n) + 127) << 23);
}

// 2^x by the special function unit, within 2^-22 of itself; 0 below the smallest normal number.
RBFAST_INLINE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// exp(x) for x <= 0; 0 below -87. What rounding x * log2(e) loses is put back to first order.
RBFAST_INLINE float exp_negative(float x) {
  constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596303e-8f, kLn2 = 0.693147181f;
  const float bounded = x < -127.0f ? -127.0f : x;
  const float scaled = bounded * kLog2e;
  const float lost = fmaf(bounded, kLog2eRest, fmaf(bounded, kLog2e, -scaled));
  const float value = exp2_fast(scaled);
  return fmaf(value, lost * kLn2, value);
}

}  // namespace rbfast

#include "buckets.h"
#include "divergence_math.h"
