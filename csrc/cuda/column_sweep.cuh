// What `column_grad` reads dy and xs with: both products of a matrix by one pass over it; column_grad.cu says what for.
#pragma once

#include <cooperative_groups.h>

#include "cuda/column_sums.cuh"

namespace rbfast {
namespace {

// Blocks of `sweep` on a multiprocessor, as registers allow; one if its shared memory does not hold two tiles for each.
template <typename T, int kN>
constexpr int kBlocks = kN == 4 ? 1 : 2;
constexpr int kLeaves16 = 2, kLeaves32 = 1;  // 16 features each, of a warp; of 16-bit and of 32-bit values

// ---- both products of a matrix ----

// A tile of x in shared memory: rows of kWidth values, in chunks of 16 bytes that change places from row to row, so
// that eight rows of a chunk lie in different banks.
template <typename T>
struct Tile {
  static constexpr int kLeaves = sizeof(T) == 4 ? kLeaves32 : kLeaves16;
  static constexpr int kStrip = kLeaves * kWarps, kWidth = kStrip * kLeaf, kChunk = 16 / sizeof(T);
  static constexpr int kBytes = kTokens * kWidth * sizeof(T);
  T* values;

  __device__ T* at(int t, int v) const { return values + t * kWidth + ((v / kChunk) ^ (t & 7)) * kChunk + v % kChunk; }

  // The pieces of the operand [16 tokens, 16 features] from (t, v) on, or, transposed, [16 features, 16 tokens].
  template <bool kTransposed>
  __device__ void operand(int t, int v, uint32_t (&a)[kPieces<T>][4]) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    if constexpr (sizeof(T) == 2) {
      uint32_t raw[4];
      load_matrices<kTransposed>(raw, at(t + lane % 16, v + lane / 16 * 8));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T pair[2];
        memcpy(pair, &raw[kTransposed ? i / 2 + i % 2 * 2 : i], sizeof(pair));
        set(a, i, pair);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = g + i % 2 * 8, column = 2 * c + i / 2 * 8;
        const T pair[2] = {kTransposed ? *at(t + column, v + row) : *at(t + row, v + column),
                           kTransposed ? *at(t + column + 1, v + row) : *at(t + row, v + column + 1)};
        set(a, i, pair);
      }
    }
  }

 private:
  __device__ static void set(uint32_t (&a)[kPieces<T>][4], int i, const T* pair) {
    uint32_t piece[kPieces<T>];
    split_pair(pair, piece);
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) a[p][i] = piece[p];
  }
};

template <typename T>
struct Sweep {
  Matrix<T> x;
  Shares shares;
  int stages;          // tiles in shared memory: one is worked on, the others are on their way
  const Pair* hidden;  // w, as operands: H or dH
  Sum sum;             // dB or dA
  // with both products:
  Factor m;  // B
  Dots dots;
};

// A strip of features and a tile of tokens.
struct Unit {
  int strip, tile;

  __device__ void advance(int tiles) {
    if (++tile < tiles) return;
    tile = 0;
    ++strip;
  }
};

// Bytes of shared memory for one tile and its part of w, and for what the warps have to add up.
template <typename T, int kN>
constexpr int kHiddenPairs = kTokens / kLeaf * kN * kPartners<T> * kWarp;
template <typename T, int kN>
constexpr int kStageBytes = Tile<T>::kBytes + kHiddenPairs<T, kN> * sizeof(Pair);
template <int kN, bool kDot>
constexpr int kScratchBytes = kDot ? 2 * kWarps * kTokens / kLeaf * kN * kWarp * sizeof(Floats) : 0;

// Starts to copy a unit's tile of x. A thread copies the same features of every 8th row, so `at` is the same for all.
template <typename T>
__device__ void copy_tile(const Matrix<T>& x, Unit unit, T* values) {
  using Tile = Tile<T>;
  constexpr int kChunks = Tile::kWidth / Tile::kChunk, kRows = kThreads / kChunks;
  static_assert(kRows % 8 == 0 && kTokens % kRows == 0);
  const int row = threadIdx.x / kChunks, v = threadIdx.x % kChunks * Tile::kChunk;
  const int64_t feature = unit.strip * int64_t{Tile::kWidth} + v, left = x.n - feature;
  const int valid = left < 0 ? 0 : left < Tile::kChunk ? static_cast<int>(left) : Tile::kChunk;
  int64_t t = unit.tile * int64_t{kTokens} + row;
  const T* from = x.x + t * x.row + feature;
  T* to = Tile{values}.at(row, v);
#pragma unroll
  for (int i = 0; i < kTokens / kRows; ++i, t += kRows, from += kRows * x.row, to += kRows * Tile::kWidth) {
    if (x.aligned) {
      const bool is_inside = t < x.tokens && valid > 0;
      copy_async(to, is_inside ? from : x.x, is_inside ? valid * sizeof(T) : 0);
    } else {
      *reinterpret_cast<Pack<T, Tile::kChunk>*>(to) = read<Tile::kChunk>(x, t, feature);
    }
  }
}

// Starts to copy a unit's tile of x and its part of w.
template <typename T, int kN>
__device__ void start_copies(const Sweep<T>& s, Unit unit, char* stage) {
  copy_tile(s.x, unit, reinterpret_cast<T*>(stage));
  constexpr int kPairs = kHiddenPairs<T, kN>;
  const Pair* from = s.hidden + unit.tile * int64_t{kPairs};
  Pair* to = reinterpret_cast<Pair*>(stage + Tile<T>::kBytes);
#pragma unroll
  for (int i = 2 * threadIdx.x; i < kPairs; i += 2 * kThreads) copy_async(to + i, from + i, 16);
}

__device__ inline void wait_for_stage(int stages) {
  if (stages >= 4)
    wait_for_copies<2>();
  else if (stages == 3)
    wait_for_copies<1>();
  else
    wait_for_copies<0>();
}

template <typename T, int kN, bool kDot>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kN>) sweep(const Sweep<T> s) {
  using Tile = Tile<T>;
  constexpr int kLeaves = Tile::kLeaves, kParts = kTokens / kLeaf, kPartner = kPartners<T>;
  constexpr int kStage = kStageBytes<T, kN>;
  RBFAST_SHARED_MEMORY(memory);
  char* scratch = memory + s.stages * kStage;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tiles = static_cast<int>(s.shares.tiles);
  const int64_t all = s.shares.strips * tiles, begin = blockIdx.x * s.shares.share;
  const int count = static_cast<int>(begin + s.shares.share < all ? s.shares.share : all - begin);  // 0 where none is
  Unit unit{}, ahead{};
  if (count > 0) unit = ahead = {static_cast<int>(begin / tiles), static_cast<int>(begin % tiles)};
  float outer[kLeaves][kN][4];
  uint32_t m[kDot ? kLeaves : 1][kN][kPartner][2];
  int strip = -1;    // of features, that this block works on
  int64_t left = 0;  // features from its first one on

  const auto store_outer = [&] {
#pragma unroll
    for (int f = 0; f < kLeaves; ++f) {
      const int leaf = f * kWarps + warp;
      if (leaf * kLeaf >= left) continue;
      Floats* to = s.shares.parts + ((blockIdx.x + strip) * int64_t{Tile::kStrip} + leaf) * kN * kWarp + lane;
#pragma unroll
      for (int j = 0; j < kN; ++j) write_floats(to + j * kWarp, outer[f][j]);
    }
  };
  // Adds up what the warps left of dH for a unit, in the half of scratch that belongs to it.
  const auto store_dot = [&](Unit of, int half) {
    constexpr int kCount = kParts * kN * kWarp;
    const Floats* from = reinterpret_cast<const Floats*>(scratch) + half * kWarps * kCount;
    Floats* to = s.dots.parts + (static_cast<int64_t>(of.strip) * tiles + of.tile) * kCount;
    for (int l = threadIdx.x; l < kCount; l += kThreads) {
      Floats sum = from[l];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum = sum + from[w * kCount + l];
      write_floats(to + l, sum.value);
    }
  };
  const auto start_strip = [&](int next) {
    strip = next;
    left = s.x.n - strip * int64_t{Tile::kWidth};
#pragma unroll
    for (int f = 0; f < kLeaves; ++f)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) outer[f][j][i] = 0;
        if constexpr (kDot) {
          const int64_t v = strip * int64_t{Tile::kWidth} + (f * kWarps + warp) * kLeaf + lane % 4 * 2;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t piece[kPartner];
            const int rank = 8 * j + lane / 4;
            split(s.m.at(rank, v + 8 * half, s.x.n), s.m.at(rank, v + 8 * half + 1, s.x.n), piece);
#pragma unroll
            for (int p = 0; p < kPartner; ++p) m[f][j][p][half] = piece[p];
          }
        }
      }
  };

  for (int i = 0; i < s.stages - 1; ++i) {
    if (i < count) start_copies<T, kN>(s, ahead, memory + i * kStage);
    ahead.advance(tiles);
    close_copies();
  }
  int now = 0, next = s.stages - 1;
  Unit before{};
  for (int i = 0; i < count; ++i) {
    wait_for_stage(s.stages);
    __syncthreads();  // the tile is there, so are the dots of the unit before, and nobody reads its tile any more
    if (i + s.stages - 1 < count) start_copies<T, kN>(s, ahead, memory + next * kStage);
    ahead.advance(tiles);
    close_copies();
    if constexpr (kDot)
      if (i > 0) store_dot(before, (i - 1) % 2);
    if (unit.strip != strip) {
      if (strip >= 0) store_outer();
      start_strip(unit.strip);
    }
    const Tile tile{reinterpret_cast<T*>(memory + now * kStage)};
    const Pair* pairs = reinterpret_cast<const Pair*>(memory + now * kStage + Tile::kBytes) + lane;
#pragma unroll(sizeof(T) * kN < 8 ? kParts : 1)  // as registers allow
    for (int part = 0; part < kParts; ++part) {
      uint32_t h[kN][kPartner][2];
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int p = 0; p < kPartner; ++p) {
          const Pair pair = pairs[((part * kN + j) * kPartner + p) * kWarp];
          h[j][p][0] = pair.value[0];
          h[j][p][1] = pair.value[1];
        }
      float dot[kN][4] = {};
#pragma unroll
      for (int f = 0; f < kLeaves; ++f) {
        const int leaf = f * kWarps + warp;
        if (leaf * kLeaf >= left) continue;
        uint32_t x[kPieces<T>][4];
        if constexpr (kDot) {
          tile.template operand<false>(part * kLeaf, leaf * kLeaf, x);
#pragma unroll
          for (int j = 0; j < kN; ++j) multiply_pieces(dot[j], x, m[f][j]);
        }
        tile.template operand<true>(part * kLeaf, leaf * kLeaf, x);
#pragma unroll
        for (int j = 0; j < kN; ++j) multiply_pieces(outer[f][j], x, h[j]);
      }
      if constexpr (kDot) {
        Floats* to = reinterpret_cast<Floats*>(scratch) + ((i % 2 * kWarps + warp) * kParts + part) * kN * kWarp + lane;
#pragma unroll
        for (int j = 0; j < kN; ++j) to[j * kWarp] = floats_of(dot[j]);
      }
    }
    before = unit;
    unit.advance(tiles);
    now = now + 1 < s.stages ? now + 1 : 0;
    next = next + 1 < s.stages ? next + 1 : 0;
  }
  store_outer();
  if constexpr (kDot) {
    __syncthreads();
    if (count > 0) store_dot(before, (count - 1) % 2);
  }
  cooperative_groups::this_grid().sync();  // every block's parts are there, and nobody needs its shared memory
  sum_all<kN, Tile::kStrip, kDot>(s.sum, s.dots, s.shares, static_cast<int>(s.x.n), memory);
}

}  // namespace
}  // namespace rbfast
