// The column kernels, one set of entry points per instruction set. Plain pointers only.
//
// T tokens, n features (of dy, xs, ...), s columns in the support, k the rank. A matrix given as `x, ld` has row stride
// ld and unit column stride; fp32 matrices without an ld are dense. `cols` are checked by the caller.
#pragma once

#include <stdint.h>

#include "cpu/lanes.h"

#define RBFAST_COLUMN_KERNELS_FOR(T)                                                                                   \
  /* xs[t, j] = x[t, cols[j]]; cols come in runs of `run` consecutive columns */                                       \
  void column_gather(const T* x, int64_t ld, int64_t tokens, const int32_t* cols, int64_t s, int64_t run, T* xs);      \
  /* dot[t, i] += sum_v x[t, v] m[i, v], with dot [T, k] and m [k, n] */                                               \
  void column_dot(const T* x, int64_t ld, int64_t tokens, int64_t n, int64_t k, const float* m, float* dot);           \
  /* acc[i, v] += sum_t w[t, i] x[t, v], with w [T, k] and acc [k, n] */                                               \
  void column_outer(const T* x, int64_t ld, int64_t tokens, int64_t n, int64_t k, const float* w, float* acc);         \
  /* both of the above in one pass over x */                                                                           \
  void column_dot_outer(const T* x, int64_t ld, int64_t tokens, int64_t n, int64_t k, const float* m, float* dot,      \
                        const float* w, float* acc);                                                                   \
  /* y[t, v] += sum_i w[t, i] m[i, v], with w [T, k] and m [k, n] */                                                   \
  void column_add(T* y, int64_t ld, int64_t tokens, int64_t n, int64_t k, const float* w, const float* m);             \
  /* target[r, offset[j]] = base[r, j] + sum_i w[r, i] m[i, j], with w [rows, k], m [k, s] and offsets in elements; */ \
  /* without a base it adds to what is there. Offsets come in runs of `run` consecutive ones */                        \
  void column_update(T* target, int64_t row, const int64_t* offset, int64_t rows, int64_t s, int64_t run,              \
                     const T* base, int64_t ld, int64_t k, const float* w, const float* m);

#define RBFAST_COLUMN_KERNELS(ISA) \
  namespace ISA {                  \
  RBFAST_COLUMN_KERNELS_FOR(F32)   \
  RBFAST_COLUMN_KERNELS_FOR(BF16)  \
  RBFAST_COLUMN_KERNELS_FOR(F16)   \
  }

namespace rbfast {
RBFAST_COLUMN_KERNELS(scalar)
RBFAST_COLUMN_KERNELS(avx2)
RBFAST_COLUMN_KERNELS(avx512)
}  // namespace rbfast
