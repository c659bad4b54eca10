// The three storage types, and a vector of fp32 values as wide as the including file's instruction set.
//
// Included by ISA files: no STL and no torch header in here, and everything is static, so that no symbol compiled for
// AVX-512 can be picked by the linker for an older CPU. Lanes is a GCC vector: + - * / and comparisons work on it.
// A file's width follows the ISA it defines: GCC 12 sets no __AVX512F__ after `#pragma GCC target` in C++.
// The build passes -ffp-contract=off, so a * b + c rounds twice on every CPU; fmadd(a, b, c) is the fused one.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#if __GNUC__ < 11  // true of clang too, which ignores #pragma GCC target
#error "on x86-64 rbfast needs GCC 11 or later: set CXX to its g++"
#endif
#pragma GCC diagnostic push  // GCC 12 warns about its own header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define RBFAST_LANES_scalar 4
#define RBFAST_LANES_avx2 8
#define RBFAST_LANES_avx512 16
#define RBFAST_LANES_avx512_bf16 16
#define RBFAST_LANES_amx 16
#define RBFAST_LANES_OF(isa) RBFAST_LANES_##isa
#define RBFAST_LANES_OF_EXPANDED(isa) RBFAST_LANES_OF(isa)
#if defined(ISA)
#define RBFAST_LANES RBFAST_LANES_OF_EXPANDED(ISA)
#else
#define RBFAST_LANES RBFAST_LANES_scalar
#endif

namespace rbfast {

struct F32 {
  float bits;
};
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float load(const F32* p) { return p->bits; }
static inline float load(const BF16* p) { return float_of(static_cast<uint32_t>(p->bits) << 16); }
static inline float load(const F16* p) {
#if RBFAST_LANES > 4
  return _cvtsh_ss(p->bits);
#elif defined(__aarch64__)
  __fp16 half;
  memcpy(&half, p, 2);
  return half;
#else  // no _Float16: GCC 11 has it in C only
  const uint32_t size = p->bits & 0x7fff, sign = (p->bits & 0x8000u) << 16;
  // The ulp of 0.5 is 2^-24, as that of an fp16 subnormal.
  if (size < 0x400) return float_of(sign | bits_of(float_of(size | 0x3f000000) - 0.5f));
  return float_of(sign | (size < 0x7c00 ? (size << 13) + 0x38000000 : size << 13 | 0x7f800000));
#endif
}

// All round to nearest even.
static inline void store(F32* p, float value) { p->bits = value; }
static inline void store(BF16* p, float value) {
  const uint32_t wide = bits_of(value);
  // A NaN keeps its sign and becomes quiet.
  p->bits = value != value ? static_cast<uint16_t>((wide >> 16) | 0x40)
                           : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}
static inline void store(F16* p, float value) {
#if RBFAST_LANES > 4
  p->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const __fp16 half = static_cast<__fp16>(value);
  memcpy(p, &half, 2);
#else
  const uint32_t wide = bits_of(value), sign = wide >> 16 & 0x8000, size = wide & 0x7fffffff;
  uint32_t half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  if (size < 0x38800000) half = bits_of(float_of(size) + 0.5f) - 0x3f000000;
  if (size >= 0x477ff000) half = size > 0x7f800000 ? 0x7e00 : 0x7c00;
  p->bits = static_cast<uint16_t>(sign | half);
#endif
}

static constexpr int kLanes = RBFAST_LANES;

typedef float Lanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t LaneBits __attribute__((vector_size(kLanes * 4)));
typedef int32_t LaneInts __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));

static inline Lanes splat(float value) { return value - Lanes{}; }
static inline Lanes as_lanes(LaneInts bits) { return reinterpret_cast<Lanes>(bits); }
static inline LaneInts as_ints(Lanes v) { return reinterpret_cast<LaneInts>(v); }
static inline Lanes to_lanes(LaneInts v) { return __builtin_convertvector(v, Lanes); }

// a * b + c, rounded once if the instruction set can (scalar rounds twice).
static inline Lanes fmadd(Lanes a, Lanes b, Lanes c) {
#if RBFAST_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif RBFAST_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// b if it is greater than a, else a: a NaN in a stays.
static inline Lanes larger(Lanes a, Lanes b) {
#if RBFAST_LANES == 16
  return _mm512_max_ps(b, a);
#elif RBFAST_LANES == 8
  return _mm256_max_ps(b, a);
#else
  return b > a ? b : a;
#endif
}

// b if it is less than a, else a: a NaN in a stays.
static inline Lanes smaller(Lanes a, Lanes b) {
#if RBFAST_LANES == 16
  return _mm512_min_ps(b, a);
#elif RBFAST_LANES == 8
  return _mm256_min_ps(b, a);
#else
  return b < a ? b : a;
#endif
}

// The nearest whole number, for magnitudes below 2^22.
static inline Lanes nearest_whole(Lanes v) { return (v + 12582912.0f) - 12582912.0f; }

// v * 2^n for whole n from -126 to 0.
static inline Lanes times_power(Lanes v, Lanes n) {
#if RBFAST_LANES == 16
  return _mm512_scalef_ps(v, n);
#else
  const LaneInts exponent = as_ints(n + 12582912.0f) << 23;  // n is in the low bits of the sum
  return v * as_lanes(exponent + 0x3f800000);
#endif
}

// The sum of the lanes, always in the same order: halves are added until one value is left.
static inline float sum(Lanes v) {
#if RBFAST_LANES == 16
  const __m256 low = _mm512_castps512_ps256(v), high = _mm512_extractf32x8_ps(v, 1);
  const __m256 eight = _mm256_add_ps(low, high);
#elif RBFAST_LANES == 8
  const __m256 eight = v;
#endif
#if RBFAST_LANES >= 8
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// kLanes values from p, which may be unaligned.
static inline Lanes load_lanes(const float* p) {
  Lanes v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline Lanes load_lanes(const F32* p) { return load_lanes(&p->bits); }
static inline Lanes load_lanes(const BF16* p) {
#if RBFAST_LANES == 16
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Lanes>(reinterpret_cast<LaneBits>(wide) << 16);
#elif RBFAST_LANES == 8
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Lanes>(reinterpret_cast<LaneBits>(wide) << 16);
#else
  HalfBits half;
  memcpy(&half, p, sizeof half);
  return reinterpret_cast<Lanes>(__builtin_convertvector(half, LaneBits) << 16);
#endif
}
static inline Lanes load_lanes(const F16* p) {
#if RBFAST_LANES == 16
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif RBFAST_LANES == 8
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return Lanes{load(p), load(p + 1), load(p + 2), load(p + 3)};
#endif
}

static inline void store_lanes(float* p, Lanes v) { memcpy(p, &v, sizeof v); }
static inline void store_lanes(F32* p, Lanes v) { store_lanes(&p->bits, v); }
static inline void store_lanes(BF16* p, Lanes v) {
  const LaneBits wide = reinterpret_cast<LaneBits>(v);
  const LaneBits top = wide >> 16;
  const LaneBits rounded = v == v ? (wide + 0x7fff + (top & 1)) >> 16 : top | 0x40;
#if RBFAST_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(rounded)));
#elif RBFAST_LANES == 8
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(rounded), __m256i{});
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  const HalfBits half = __builtin_convertvector(rounded, HalfBits);
  memcpy(p, &half, sizeof half);
#endif
}
static inline void store_lanes(F16* p, Lanes v) {
#if RBFAST_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif RBFAST_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) store(p + i, v[i]);
#endif
}

// The end of a row: the first n < kLanes values. A load fills the others with zero, a store does not touch them.
template <typename T>
static inline Lanes load_lanes(const T* p, int n) {
  T padded[kLanes] = {};
  memcpy(padded, p, n * sizeof(T));
  return load_lanes(padded);
}
template <typename T>
static inline void store_lanes(T* p, Lanes v, int n) {
  T padded[kLanes];
  store_lanes(padded, v);
  memcpy(p, padded, n * sizeof(T));
}

}  // namespace rbfast
