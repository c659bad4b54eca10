// The main kernel of `column_grad`: one pass over a matrix x gives x^T w (`outer`) and, with kDot, x m (`dot`) too:
// both for dy, the first one for xs. See column_grad.cu.
#pragma once

#include <cooperative_groups.h>

#include "cuda/column_sums.cuh"

namespace rbfast {
namespace {

// Slices of 16 features per warp. With one product they are few: however little of a strip a block has, it writes parts
// of dA for all of the strip's features.
template <typename T, bool kDot>
constexpr int kSlices = (kDot ? 4 : 2) / (sizeof(T) == 4 ? 2 : 1);

// Blocks of `sweep` per multiprocessor as registers allow; fewer if shared memory does not hold two tiles for each.
template <typename T, int kN, bool kDot>
constexpr int kBlocks = kDot ? (kPieces<T> == 1 || kPieces<T> * kN < 4 ? 3 : 2) : 4;

// ---- both products of a matrix ----

// A tile of x in shared memory: rows of kWidth values, in 16-byte chunks swizzled by the row, so that eight rows of a
// chunk lie in different banks. A warp's slices are kStep values apart, a multiple of eight chunks, so all have the
// same swizzle.
template <typename T, bool kDot>
struct Tile {
  static constexpr int kStrip = kSlices<T, kDot> * kSweepWarps, kWidth = kStrip * kSlice, kChunk = 16 / sizeof(T);
  static constexpr int kStep = kSweepWarps * kSlice, kBytes = kTokens * kWidth * sizeof(T);
  static_assert(kStep / kChunk % 8 == 0);
  T* values;

  __device__ T* at(int t, int v) const { return values + t * kWidth + ((v / kChunk) ^ (t & 7)) * kChunk + v % kChunk; }

  // The pieces of the operand [16 tokens, 16 features], or, transposed, [16 features, 16 tokens], for this warp's slice
  // and the 16 tokens of a part.
  template <bool kTransposed>
  __device__ void operand(int part, int slice, uint32_t (&a)[kPieces<T>][4]) const {
    const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kSlice;
    const int offset = part * kSlice * kWidth + slice * kStep;
    if constexpr (sizeof(T) == 2) {
      const int upper = lane / 16 * 8, lower = lane / 8 % 2 * 8;
      uint32_t raw[4];
      load_matrices<kTransposed>(
          raw, at(lane % 8 + (kTransposed ? upper : lower), first + (kTransposed ? lower : upper)) + offset);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T pair[2];
        memcpy(pair, &raw[i], sizeof(pair));
        set(a, i, pair);
      }
    } else {
      const int g = lane / 4, c = lane % 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = g + i % 2 * 8, column = 2 * c + i / 2 * 8 + e;
          pair[e] = (kTransposed ? at(column, first + row) : at(row, first + column))[offset];
        }
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
  int stages;          // tiles in shared memory: one is computed on, the others are being copied
  const Pair* hidden;  // w, as operands: H or dH
  Sum sum;             // dB or dA
  // with both products:
  const Pair* m;  // B, as operands
  Dots dots;
};

// A strip of features and a tile of tokens.
struct Unit {
  int strip, tile;
};

// Bytes of shared memory for one tile and its part of w, and for the warps' parts of dH.
template <typename T, int kN>
constexpr int kHiddenPairs = kTokens / kSlice * kN * kPartners<T> * kWarp;
template <typename T, int kN, bool kDot>
constexpr int kStageBytes = Tile<T, kDot>::kBytes + kHiddenPairs<T, kN> * sizeof(Pair);
template <int kN, bool kDot>
constexpr int kScratchBytes = kDot ? 2 * kSweepWarps * kTokens / kSlice * kN * kWarp * sizeof(Floats) : 0;

// Starts to copy a unit's tile of x. A thread copies the same features of every kRows-th row, so only kPlaces different
// swizzles occur.
template <typename Tile, typename T>
__device__ void copy_tile(const Matrix<T>& x, Unit unit, T* values) {
  constexpr int kChunks = Tile::kWidth / Tile::kChunk, kRows = kSweepThreads / kChunks, kPlaces = 8 / kRows;
  static_assert(8 % kRows == 0 && kTokens % 8 == 0);
  const int row = threadIdx.x / kChunks, v = threadIdx.x % kChunks * Tile::kChunk;
  const int64_t feature = unit.strip * int64_t{Tile::kWidth} + v, left = x.n - feature;
  const int64_t first = unit.tile * int64_t{kTokens}, t = first + row;
  const T* from = x.x + t * x.row + feature;
  T* to[kPlaces];
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) to[i] = Tile{values}.at(row + i * kRows, v);
  if (x.aligned && first + kTokens <= x.tokens && left >= Tile::kChunk) {
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i, from += kRows * x.row)
      copy_async(to[i % kPlaces] + i / kPlaces * 8 * Tile::kWidth, from, 16);
    return;
  }
  const int valid = left < 0 ? 0 : left < Tile::kChunk ? static_cast<int>(left) : Tile::kChunk;
#pragma unroll 1
  for (int i = 0; i < kTokens; i += 8)
#pragma unroll
    for (int j = 0; j < kPlaces; ++j, from += kRows * x.row) {
      const int64_t at = t + i + j * kRows;
      T* chunk = to[j] + i * Tile::kWidth;
      if (x.aligned) {
        const bool is_inside = at < x.tokens && valid > 0;
        copy_async(chunk, is_inside ? from : x.x, is_inside ? valid * sizeof(T) : 0);
      } else {
        *reinterpret_cast<Pack<T, Tile::kChunk>*>(chunk) = read<Tile::kChunk>(x, at, feature);
      }
    }
}

// Starts to copy a unit's tile of x and its part of w.
template <typename T, int kN, bool kDot>
__device__ void start_copies(const Sweep<T>& s, Unit unit, char* stage) {
  using Tile = Tile<T, kDot>;
  copy_tile<Tile>(s.x, unit, reinterpret_cast<T*>(stage));
  constexpr int kPairs = kHiddenPairs<T, kN>;
  const Pair* from = s.hidden + unit.tile * int64_t{kPairs};
  Pair* to = reinterpret_cast<Pair*>(stage + Tile::kBytes);
#pragma unroll
  for (int i = 2 * threadIdx.x; i < kPairs; i += 2 * kSweepThreads) copy_async(to + i, from + i, 16);
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
__global__ void __launch_bounds__(kSweepThreads, kBlocks<T, kN, kDot>) sweep(const Sweep<T> s) {
  using Tile = Tile<T, kDot>;
  constexpr int kOwn = kSlices<T, kDot>, kParts = kTokens / kSlice, kPartner = kPartners<T>;
  constexpr int kStage = kStageBytes<T, kN, kDot>;
  RBFAST_SHARED_MEMORY(memory);
  char* scratch = memory + s.stages * kStage;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tiles = s.shares.tiles;
  const int begin = s.shares.first_of(blockIdx.x), count = s.shares.first_of(blockIdx.x + 1) - begin;
  const auto unit_at = [&](int i) { return Unit{(begin + i) / tiles, (begin + i) % tiles}; };
  float outer[kOwn][kN][4];
  uint32_t m[kDot ? kOwn : 1][kN][kPartner][2];
  int strip = -1;  // the strip of features that this block works on
  int left = 0;    // features from the strip's first one on

  const auto store_outer = [&] {
#pragma unroll
    for (int f = 0; f < kOwn; ++f) {
      const int slice = f * kSweepWarps + warp;
      if (slice * kSlice >= left) continue;
      Floats* to = s.shares.parts + ((blockIdx.x + strip) * int64_t{Tile::kStrip} + slice) * kN * kWarp + lane;
#pragma unroll
      for (int j = 0; j < kN; ++j) write_floats(to + j * kWarp, outer[f][j]);
    }
  };
  // Adds up the warps' parts of dH for a unit, from its half of scratch.
  const auto store_dot = [&](Unit of, int half) {
    constexpr int kCount = kParts * kN * kWarp;
    const Floats* from = reinterpret_cast<const Floats*>(scratch) + half * kSweepWarps * kCount;
    Floats* to = s.dots.parts + (static_cast<int64_t>(of.strip) * tiles + of.tile) * kCount;
    for (int l = threadIdx.x; l < kCount; l += kSweepThreads) {
      Floats sum = from[l];
#pragma unroll
      for (int w = 1; w < kSweepWarps; ++w) sum = sum + from[w * kCount + l];
      write_floats(to + l, sum.value);
    }
  };
  const auto start_strip = [&](int next) {
    strip = next;
    left = static_cast<int>(s.x.n) - strip * Tile::kWidth;
#pragma unroll
    for (int f = 0; f < kOwn; ++f) {
      const int slice = f * kSweepWarps + warp;
      const bool is_inside = slice * kSlice < left;
      const Pair* from = s.m + (strip * int64_t{Tile::kStrip} + slice) * kN * kPartner * kWarp + lane;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) outer[f][j][i] = 0;
#pragma unroll
        for (int p = 0; kDot && p < kPartner; ++p) {
          const Pair pair = is_inside ? from[(j * kPartner + p) * kWarp] : Pair{};
          m[f][j][p][0] = pair.value[0];
          m[f][j][p][1] = pair.value[1];
        }
      }
    }
  };

  for (int i = 0; i < s.stages - 1; ++i) {
    if (i < count) start_copies<T, kN, kDot>(s, unit_at(i), memory + i * kStage);
    commit_copies();
  }
  int now = 0, next = s.stages - 1;
  for (int i = 0; i < count; ++i) {
    wait_for_stage(s.stages);
    __syncthreads();  // the tile and the previous unit's dots are there, and no thread reads that unit's tile
    if (i + s.stages - 1 < count) start_copies<T, kN, kDot>(s, unit_at(i + s.stages - 1), memory + next * kStage);
    commit_copies();
    if constexpr (kDot)
      if (i > 0) store_dot(unit_at(i - 1), (i - 1) % 2);
    if (const int of = unit_at(i).strip; of != strip) {
      if (strip >= 0) store_outer();
      start_strip(of);
    }
    const Tile tile{reinterpret_cast<T*>(memory + now * kStage)};
    const Pair* pairs = reinterpret_cast<const Pair*>(memory + now * kStage + Tile::kBytes) + lane;
#pragma unroll 1
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
      // Features beyond the matrix are 0, here and in m: the compiler could not interleave the products across a
      // branch.
#pragma unroll
      for (int f = 0; f < kOwn; ++f) {
        uint32_t x[kPieces<T>][4];
        if constexpr (kDot) {
          tile.template operand<false>(part, f, x);
#pragma unroll
          for (int j = 0; j < kN; ++j) multiply_pieces(dot[j], x, m[f][j]);
        }
        tile.template operand<true>(part, f, x);
#pragma unroll
        for (int j = 0; j < kN; ++j) multiply_pieces(outer[f][j], x, h[j]);
      }
      if constexpr (kDot) {
        Floats* to =
            reinterpret_cast<Floats*>(scratch) + ((i % 2 * kSweepWarps + warp) * kParts + part) * kN * kWarp + lane;
#pragma unroll
        for (int j = 0; j < kN; ++j) to[j * kWarp] = floats_of(dot[j]);
      }
    }
    now = now + 1 < s.stages ? now + 1 : 0;
    next = next + 1 < s.stages ? next + 1 : 0;
  }
  store_outer();
  if constexpr (kDot) {
    __syncthreads();
    if (count > 0) store_dot(unit_at(count - 1), (count - 1) % 2);
  }
  cooperative_groups::this_grid().sync();  // every block's parts are written, and shared memory is free
  sum_all<kN, Tile::kStrip, kDot>(s.sum, s.dots, s.shares, static_cast<int>(s.x.n), memory);
}

}  // namespace
}  // namespace rbfast
