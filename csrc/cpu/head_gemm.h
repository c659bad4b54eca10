// C [m, n] = A [m, k] B [k, n] in fp32, from operands of any of the three storage types. One entry point per
// instruction set. Plain pointers only.
#pragma once

#include <stdint.h>

#include "cpu/lanes.h"

namespace rbfast {

enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2 };

// One operand, seen as `outer` (a row of A, a column of B) by k. One of its two strides, in elements, is 1.
struct Operand {
  const void* data;
  Storage type;
  int64_t outer_stride;
  int64_t k_stride;
};

// fresh: C is set to the product. resumed: each element's sum continues from its value in C.
enum class Sums : int { fresh, resumed };

struct Gemm {
  Operand a;
  Operand b;
  float* c;
  int64_t ldc;
  int64_t k;
  Sums sums;
};

// Columns of C are split between threads in multiples of this, rows in multiples of kRowUnit.
constexpr int64_t kColumnUnit = 48;
constexpr int64_t kRowUnit = 8;
// Rows of A packed at a time, and how much of k: all of a k up to kLongK, a longer one in pieces of kShortK, which keep
// the packed rows in a 1 MiB L2.
constexpr int64_t kRowBlock = 256;
constexpr int64_t kLongK = 4032;
constexpr int64_t kShortK = 960;

static inline int64_t gemm_k_block(int64_t k) { return k <= kLongK ? k : kShortK; }
// Bytes of scratch that one call of gemm needs for `rows` rows, aligned to 64.
static inline int64_t gemm_scratch(int64_t rows, int64_t k) {
  const int64_t padded = (rows < kRowBlock ? rows : kRowBlock) + kRowUnit;
  return 4 * (padded * (gemm_k_block(k) + 2) + kColumnUnit * 192);
}

// A filtered product takes kFilteredWords words of k at a time, and packs those that it needs in panels of up to
// kFilteredPanel.
constexpr int64_t kFilteredWords = 1024;
constexpr int64_t kFilteredPanel = 96;
// Bytes of scratch that one call of filtered_gemm needs for `columns` columns, aligned to 64.
static inline int64_t filtered_scratch(int64_t columns) {
  return 4 * (columns + kColumnUnit) * kFilteredPanel + 6 * kRowBlock * kFilteredWords;
}

#define RBFAST_GEMM(ISA)                                                                                             \
  namespace ISA {                                                                                                    \
  /* Rows [m0, m1) and columns [n0, n1) of C. The order of the sum over k is the same whatever the rectangle. */     \
  void gemm(const Gemm& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1, void* scratch);                           \
  /* As gemm with resumed sums; magnitudes below thresholds[i] >= 0 in row i of A count as 0. B is dense along n. */ \
  void filtered_gemm(const Gemm& g, const float* thresholds, int64_t m0, int64_t m1, int64_t n0, int64_t n1,         \
                     void* scratch);                                                                                 \
  /* A threshold for a row of A: magnitudes below it sum to at most *left_out, itself at most `share` of all. */     \
  void row_threshold(const Operand& a, int64_t row, int64_t k, float share, float* threshold, float* left_out);      \
  }

RBFAST_GEMM(scalar)
RBFAST_GEMM(avx2)
RBFAST_GEMM(avx512)
RBFAST_GEMM(avx512_bf16)

}  // namespace rbfast
