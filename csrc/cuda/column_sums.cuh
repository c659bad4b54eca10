// The sums at the end of a sweep: its blocks leave parts of dH, dB and dA in memory, wait for each other, and share the
// sums among themselves. Each sum runs in an order fixed by the shapes and the number of blocks.
#pragma once

#include "cuda/column_products.cuh"

namespace rbfast {
namespace {

// The parts of dH, [strips, tiles, 2, blocks of ranks, lanes], and where dH goes: as the operands of products with
// tiles of xs, [tiles, 2, blocks of ranks, pieces, lanes].
struct Dots {
  Floats* parts = nullptr;
  Pair* hidden = nullptr;
  int pieces = 0;
};

// The list of units that all blocks share, and the parts [blocks + strips, leaves of a strip, blocks of ranks, lanes]
// of x^T w that they leave: block b and strip q have part b + q to themselves.
struct Shares {
  int64_t strips, tiles, share, blocks;
  Floats* parts;
};

// to[v * feature + i * rank] = scale * the sum over the blocks that had v's strip, which a team of warps adds up.
struct Sum {
  float* to;
  int64_t feature, rank;
  int k, team;
  float scale;

  Sum(const Shares& shares, float* to, int64_t feature, int64_t rank, int k, float scale)
      : to(to),
        feature(feature),
        rank(rank),
        k(k),
        team(shares.tiles / shares.share > 8 ? kWarps : 1),  // few parts are read at once by one warp
        scale(scale) {}
};

// Shared memory for one sum of a block. There are two, which take turns: a team's first warp may read one while the
// others write to the other.
struct SumRoom {
  static constexpr int kRow = 9;
  Floats parts[kThreads];
  float total[kLeaf * kRow];
};

// The sum of parts[i * step] over [begin, end), which `team` warps share; complete in the first of a team.
__device__ inline Floats sum_of_parts(const Floats* parts, int64_t step, int begin, int end, int team, Floats* room) {
  const int lane = threadIdx.x % kWarp, member = threadIdx.x / kWarp % team;
  const int each = (end - begin + team - 1) / team, from = begin + member * each;
  const int to = from + each < end ? from + each : end;
  Floats sum{};
#pragma unroll 8
  for (int i = from; i < to; ++i) sum = sum + read_floats(parts + i * step + lane);
  room[threadIdx.x] = sum;
  __syncthreads();
  for (int w = 1; member == 0 && w < team; ++w) sum = sum + room[threadIdx.x + w * kWarp];
  return sum;
}

// dH for 16 tokens by 8 ranks, of which there are `all`.
__device__ inline void sum_dots(const Dots& dots, int strips, int index, int all, SumRoom& room) {
  constexpr int kRow = SumRoom::kRow;
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  const Floats sum =
      sum_of_parts(dots.parts + index * int64_t{kWarp}, all * int64_t{kWarp}, 0, strips, kWarps, room.parts);
  if (threadIdx.x >= kWarp) return;
  float* total = room.total;
#pragma unroll
  for (int e = 0; e < 4; ++e) total[(g + e / 2 * 8) * kRow + 2 * c + e % 2] = sum.value[e];
  __syncwarp();
  uint32_t upper[3], lower[3];
  split(total[2 * c * kRow + g], total[(2 * c + 1) * kRow + g], upper);
  split(total[(2 * c + 8) * kRow + g], total[(2 * c + 9) * kRow + g], lower);
#pragma unroll
  for (int p = 0; p < 3; ++p)
    if (p < dots.pieces) dots.hidden[(index * int64_t{dots.pieces} + p) * kWarp + lane] = {{upper[p], lower[p]}};
}

// What a block's warps add up of x^T w: of 16 features by 8 ranks each team.
template <int kRanks, int kStrip>
__device__ inline void sum_outer(const Sum& s, const Shares& shares, int n, int index, SumRoom& room) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, place = index * (kWarps / s.team) + warp / s.team;
  const int leaf = place / kRanks, j = place % kRanks, strip = leaf / kStrip;
  const int tiles = static_cast<int>(shares.tiles), share = static_cast<int>(shares.share);
  const bool is_inside = tiles > 0 && leaf * kLeaf < n;
  const int begin = is_inside ? strip * tiles / share : 0, end = is_inside ? ((strip + 1) * tiles - 1) / share + 1 : 0;
  constexpr int kStep = kStrip * kRanks * kWarp;  // from block to block
  const Floats* parts = shares.parts + strip * int64_t{kStep} + (leaf % kStrip * kRanks + j) * kWarp;
  const Floats sum = sum_of_parts(parts, kStep, begin, end, s.team, room.parts);
  if (warp % s.team > 0) return;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int v = leaf * kLeaf + lane / 4 + e / 2 * 8, i = 8 * j + lane % 4 * 2 + e % 2;
    if (v < n && i < s.k) s.to[v * s.feature + i * s.rank] = s.scale * sum.value[e];
  }
}

// All sums of a sweep, by all blocks of the grid, once every part is there. `memory` is shared.
template <int kRanks, int kStrip, bool kDot>
__device__ inline void sum_all(const Sum& sum, const Dots& dots, const Shares& shares, int n, char* memory) {
  const int of_dots = kDot ? static_cast<int>(shares.tiles) * (kTokens / kLeaf) * kRanks : 0;
  const int teams = kWarps / sum.team;
  const int all = of_dots + ((n + kLeaf - 1) / kLeaf * kRanks + teams - 1) / teams;
  SumRoom* rooms = reinterpret_cast<SumRoom*>(memory);
  int turn = 0;
#pragma unroll 1
  for (int i = blockIdx.x; i < all; i += gridDim.x, turn ^= 1) {
    if (kDot && i < of_dots)
      sum_dots(dots, static_cast<int>(shares.strips), i, of_dots, rooms[turn]);
    else
      sum_outer<kRanks, kStrip>(sum, shares, n, i - of_dots, rooms[turn]);
  }
}

}  // namespace
}  // namespace rbfast
