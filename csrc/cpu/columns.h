// The column kernels, one set of entry points per instruction set. Plain pointers only.
#pragma once

#include <stdint.h>

#include "cpu/lanes.h"

#define RBFAST_COLUMN_KERNELS(ISA)                                                                              \
  namespace ISA {                                                                                               \
  /* xs[t, j] = x[t, cols[j]] for rows [begin, end); x has row stride ld. T is any 2- or 4-byte storage type. */ \
  void column_gather(const F32* x, int64_t ld, const int64_t* cols, int64_t s, F32* xs, int64_t begin, int64_t end);   \
  void column_gather(const BF16* x, int64_t ld, const int64_t* cols, int64_t s, BF16* xs, int64_t begin, int64_t end); \
  void column_gather(const F16* x, int64_t ld, const int64_t* cols, int64_t s, F16* xs, int64_t begin, int64_t end);   \
  }

namespace rbfast {
RBFAST_COLUMN_KERNELS(scalar)
RBFAST_COLUMN_KERNELS(avx2)
RBFAST_COLUMN_KERNELS(avx512)
}  // namespace rbfast
