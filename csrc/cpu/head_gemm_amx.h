// The head's products of bf16 values in AMX tiles of 16 x 32. Plain pointers only.
#pragma once

#include "cpu/head_gemm.h"

namespace rbfast {
namespace amx {

// Tiles go in pairs: a panel is 32 rows of A or columns of B, a step 32 values of k.
constexpr int64_t kPanel = 32;
constexpr int64_t kDepth = 32;
// Bytes of a step of a panel, padded by a cache line: steps 2 KiB apart would map to the same two sets of L1.
constexpr int64_t kStepBytes = 2 * 1024 + 64;

// Bytes of each operand that are packed at a time.
struct Room {
  int64_t rows, columns;
};

static inline bool is_along(const Operand& x) { return x.k_stride == 1; }

// Together less than L2 (2 MiB). Columns dense along k are a head, which the product reads once: the rows of a chunk
// stay in L2, and packed columns pass through beside them.
static inline Room room(const Gemm& g) {
  if (is_along(g.b)) return {800 << 10, 512 << 10};
  return {384 << 10, 1280 << 10};
}

static inline int64_t ceil_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// How much of k is packed at a time. Fresh sums restart there, so this affects their last bits.
static inline int64_t k_block(const Gemm& g) {
  if (!is_along(g.b)) return g.sums == Sums::resumed ? 1024 : 512;
  return g.k <= 4096 ? ceil_to(g.k, kDepth) : 2048;
}

// The number of panels of this depth that fit in `bytes`, at least one.
static inline int64_t fitting_panels(int64_t depth, int64_t bytes) {
  const int64_t fitting = bytes / (depth / kDepth * kStepBytes);
  return fitting > 1 ? fitting : 1;
}

// Bytes of scratch that one call of gemm needs, aligned to 64.
static inline int64_t scratch(const Gemm& g) {
  const int64_t depth = k_block(g),
                panels = fitting_panels(depth, room(g).rows) + fitting_panels(depth, room(g).columns);
  return panels * (depth / kDepth * kStepBytes) + kPanel * kPanel * 4;
}

// As gemm of the other instruction sets, for operands that are both bf16. Sums may be resumed at multiples of kDepth.
void gemm(const Gemm& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1, void* scratch);

}  // namespace amx
}  // namespace rbfast
