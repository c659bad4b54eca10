// The reduction at the end of a sweep: blocks write parts of dH, dB and dA to memory, wait at a grid barrier, and share
// the work of adding them up. The shapes and the number of blocks fix the order of each sum.
#pragma once

#include <algorithm>

#include "cuda/column_products.cuh"

namespace rbfast {
namespace {

// The parts of dH, [strips, tiles, 2, blocks of ranks, lanes], and where dH goes: as operands of products with tiles of
// xs, [tiles, 2, blocks of ranks, pieces, lanes].
struct Dots {
  Floats* parts = nullptr;
  Pair* hidden = nullptr;
  int pieces = 0;
};

// How all blocks share the list of units, strip by strip, and the parts [blocks + strips, leaves of a strip, blocks of
// ranks, lanes] of x^T w that they write: part b + q belongs to block b and strip q alone.
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
constexpr int kSweepers = 4, kSweepThreads = kSweepers * kWarp;

// How many warps share a sum of this many parts: one warp has at most 16 loads in flight.
__host__ __device__ inline int team_for(int parts) { return parts > 16 ? kSweepers : 1; }

// to[v * feature + i * rank] = scale * the sum over the blocks that had v's strip, added up by a team of warps.
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
        team(team_for(shares.blocks / std::max(1, shares.strips))),
        scale(scale) {}
};

// Shared memory for the sums of a block's warps. It is double-buffered: a team's first warp may read one buffer while
// the others write to the other.
struct SumRoom {
  static constexpr int kRow = 9;
  Floats parts[kSweepThreads];
  float totals[kSweepers][kLeaf * kRow];
};

// The sum of parts[i * step] for i in [begin, end), split between `team` warps; complete in the team's first warp.
__device__ inline Floats sum_of_parts(const Floats* parts, int64_t step, int begin, int end, int team, Floats* room) {
  constexpr int kAtOnce = 16;  // loads in flight together
  const int lane = threadIdx.x % kWarp, member = threadIdx.x / kWarp % team;
  const int each = (end - begin + team - 1) / team, from = begin + member * each;
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
  if (team == 1) return sum;
  room[threadIdx.x] = sum;
  __syncthreads();
  for (int w = 1; member == 0 && w < team; ++w) sum = sum + room[threadIdx.x + w * kWarp];
  return sum;
}

// Each team adds up dH for 16 tokens by 8 ranks, one of `all` such tiles.
__device__ inline void sum_dots(const Dots& dots, int strips, int index, int all, int team, SumRoom& room) {
  constexpr int kRow = SumRoom::kRow;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, c = lane % 4;
  const int place = index * (kSweepers / team) + warp / team;
  const Floats* parts = dots.parts + place * int64_t{kWarp};
  const Floats sum = sum_of_parts(parts, all * int64_t{kWarp}, 0, place < all ? strips : 0, team, room.parts);
  if (warp % team > 0 || place >= all) return;
  float* total = room.totals[warp];
#pragma unroll
  for (int e = 0; e < 4; ++e) total[(g + e / 2 * 8) * kRow + 2 * c + e % 2] = sum.value[e];
  __syncwarp();
  write_operand(dots.hidden + place * int64_t{dots.pieces} * kWarp, dots.pieces,
                {total[2 * c * kRow + g], total[(2 * c + 1) * kRow + g]},
                {total[(2 * c + 8) * kRow + g], total[(2 * c + 9) * kRow + g]});
}

// Each team adds up x^T w for 16 features by 8 ranks.
template <int kRanks, int kStrip>
__device__ inline void sum_outer(const Sum& s, const Shares& shares, int n, int index, SumRoom& room) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int place = index * (kSweepers / s.team) + warp / s.team;
  const int leaf = place / kRanks, j = place % kRanks, strip = leaf / kStrip;
  const bool is_inside = shares.tiles > 0 && leaf * kLeaf < n;
  const int begin = is_inside ? shares.block_of(strip * shares.tiles) : 0;
  const int end = is_inside ? shares.block_of((strip + 1) * shares.tiles - 1) + 1 : 0;
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

// All sums of a sweep, by all blocks of the grid, after every part is written. `memory` is shared memory.
template <int kRanks, int kStrip, bool kDot>
__device__ inline void sum_all(const Sum& sum, const Dots& dots, const Shares& shares, int n, char* memory) {
  const int of_dots = kDot ? shares.tiles * (kTokens / kLeaf) * kRanks : 0;
  const int team = team_for(shares.strips), teams = kSweepers / team;
  const int rounds = (of_dots + teams - 1) / teams;
  const int all = rounds + ((n + kLeaf - 1) / kLeaf * kRanks * sum.team + kSweepers - 1) / kSweepers;
  SumRoom* rooms = reinterpret_cast<SumRoom*>(memory);
  int turn = 0;
#pragma unroll 1
  for (int i = blockIdx.x; i < all; i += gridDim.x, turn ^= 1) {
    if (kDot && i < rounds)
      sum_dots(dots, shares.strips, i, of_dots, team, rooms[turn]);
    else
      sum_outer<kRanks, kStrip>(sum, shares, n, i - rounds, rooms[turn]);
  }
}

}  // namespace
}  // namespace rbfast
