// The reduction at the end of a sweep: blocks write parts of dH, dB and dA to memory, wait at a grid barrier, and share
// the work of adding them up. The shapes and the number of blocks fix the order of each sum.
#pragma once

#include "cuda/column_products.cuh"

namespace rbfast {
namespace {

// The parts of dH, [strips, tiles, 2, blocks of ranks, lanes], and where dH goes: as operands of products with tiles of
// xs, [matrices, tiles, 2, blocks of ranks, pieces, lanes].
struct Dots {
  Floats* parts = nullptr;
  Pair* hidden = nullptr;
  int pieces = 0;
};

// How all blocks share the list of units, strip by strip of all matrices, and the parts [blocks + strips, slices of a
// strip, blocks of ranks, lanes] of x^T w that they write: part b + q belongs only to block b and strip q.
struct Shares {
  int strips, tiles, blocks;
  int each, more;  // units per block; the first `more` blocks have one more
  Floats* parts = nullptr;

  Shares(int64_t strips, int64_t tiles, int64_t blocks)
      : strips(static_cast<int>(strips)),
        tiles(static_cast<int>(tiles)),
        blocks(static_cast<int>(blocks)),
        each(static_cast<int>(strips * tiles / blocks)),
        more(static_cast<int>(strips * tiles % blocks)) {}
  __device__ int first_of(int block) const { return block * each + (block < more ? block : more); }
  // The block that has a unit.
  __device__ int block_of(int unit) const {
    const int of_these = more * (each + 1);
    return unit < of_these ? unit / (each + 1) : more + (unit - of_these) / each;
  }
};

// Warps per block of a sweep.
constexpr int kSweepWarps = 4, kSweepThreads = kSweepWarps * kWarp;

// How many warps share a sum of this many parts: one warp has at most 16 loads in flight.
__host__ __device__ inline int warps_for(int parts) { return parts > 16 ? kSweepWarps : 1; }

// to[v * feature + i * rank] = scale * the sum over the blocks that had v's strip
struct Sum {
  float* to = nullptr;
  int64_t feature = 0, rank = 0;
  int k = 0;
  float scale = 0;
};

// Shared memory for the sums of a block's warps. Two are used in turn: the first warp of a sum may still read one while
// the others write to the other. That suffices within a matrix, whose sums of dH come first.
struct SumStorage {
  static constexpr int kRow = 9;
  Floats parts[kSweepThreads];
  float totals[kSweepWarps][kSlice * kRow];
};

// The sum of parts[i * step] for i in [begin, end), split between `warps` warps; complete in the first of them.
__device__ inline Floats sum_of_parts(const Floats* parts, int64_t step, int begin, int end, int warps,
                                      Floats* shared) {
  constexpr int kAtOnce = 16;  // loads in flight together
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % warps;
  const int each = (end - begin + warps - 1) / warps, from = begin + warp * each;
  const int to = from + each < end ? from + each : end;
  Floats sum{};
#pragma unroll 1
  for (int i = from; i < to; i += kAtOnce) {
    Floats part[kAtOnce];
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) part[b] = i + b < to ? read_floats(parts + (i + b) * step + lane) : Floats{};
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) sum = sum + part[b];
  }
  if (warps == 1) return sum;
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int w = 1; warp == 0 && w < warps; ++w) sum = sum + shared[threadIdx.x + w * kWarp];
  return sum;
}

// Every `warps` warps add up dH for 16 tokens by 8 ranks, one of `all` such tiles of a matrix. dots: of this matrix.
__device__ inline void sum_dots(const Dots& dots, int strips, int index, int all, int warps, SumStorage& storage) {
  constexpr int kRow = SumStorage::kRow;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, c = lane % 4;
  const int tile = index * (kSweepWarps / warps) + warp / warps;
  const Floats* parts = dots.parts + tile * int64_t{kWarp};
  const Floats sum = sum_of_parts(parts, all * int64_t{kWarp}, 0, tile < all ? strips : 0, warps, storage.parts);
  if (warp % warps > 0 || tile >= all) return;
  float* total = storage.totals[warp];
#pragma unroll
  for (int e = 0; e < 4; ++e) total[(g + e / 2 * 8) * kRow + 2 * c + e % 2] = sum.value[e];
  __syncwarp();
  write_operand(dots.hidden + tile * int64_t{dots.pieces} * kWarp, dots.pieces,
                {total[2 * c * kRow + g], total[(2 * c + 1) * kRow + g]},
                {total[(2 * c + 8) * kRow + g], total[(2 * c + 9) * kRow + g]});
}

// Every `warps` warps add up x^T w for 16 features by 8 ranks. first, n: the matrix's first strip, and its features.
template <int kRanks, int kStrip>
__device__ inline void sum_outer(const Sum& s, const Shares& shares, int first, int n, int index, int warps,
                                 SumStorage& storage) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tile = index * (kSweepWarps / warps) + warp / warps;
  const int slice = tile / kRanks, j = tile % kRanks, strip = first + slice / kStrip;
  const bool is_inside = shares.tiles > 0 && slice * kSlice < n;
  const int begin = is_inside ? shares.block_of(strip * shares.tiles) : 0;
  const int end = is_inside ? shares.block_of((strip + 1) * shares.tiles - 1) + 1 : 0;
  constexpr int kStep = kStrip * kRanks * kWarp;  // from block to block
  const Floats* parts = shares.parts + strip * int64_t{kStep} + (slice % kStrip * kRanks + j) * kWarp;
  const Floats sum = sum_of_parts(parts, kStep, begin, end, warps, storage.parts);
  if (warp % warps > 0) return;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int v = slice * kSlice + lane / 4 + e / 2 * 8, i = 8 * j + lane % 4 * 2 + e % 2;
    if (v < n && i < s.k) s.to[v * s.feature + i * s.rank] = s.scale * sum.value[e];
  }
}

}  // namespace
}  // namespace rbfast
