// The main kernel of `column_grad`: one pass over a matrix x gives x^T w (`outer`) and, with kDot, x m (`dot`) too:
// both for dy, only the first for xs. A launch takes up to kMostMatrices matrices with equal numbers of tokens. See
// column_grad.cu.
#pragma once

#include <cooperative_groups.h>

#include "cuda/column_sums.cuh"

namespace rbfast {
namespace {

// Slices of 16 features per warp. With one product they are few: a block writes parts of dA for all features of a
// strip, however little of the strip it has.
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

// One of the matrices of a sweep.
template <typename T>
struct Swept {
  Matrix<T> x;
  Sum sum;                // dB or dA
  int first = INT32_MAX;  // its first strip in the list of all matrices' strips
};

// Matrices with equal numbers of tokens and ranks, and their factors.
template <typename T>
struct Sweep {
  Shares shares;
  int stages;          // tiles in shared memory: one is computed on, the others are being copied
  const Pair* hidden;  // w, as operands: H or dH, [matrices, tiles, ..]
  // with both products:
  const Pair* m = nullptr;  // B, as operands, [strips, slices of a strip, ..]
  Dots dots = {};
  Swept<T> each[kMostMatrices];

  // The matrix that has a strip.
  __device__ int matrix_of(int strip) const {
    int i = 0;
#pragma unroll
    for (int other = 1; other < kMostMatrices; ++other) i += strip >= each[other].first;
    return i;
  }
};

// A strip of features, in the list of all matrices' strips, and a tile of tokens.
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

// Starts to copy a tile of x. A thread copies the same features of every kRows-th row, so only kPlaces different
// swizzles occur.
template <typename Tile, typename T>
__device__ void copy_tile(const Matrix<T>& x, Unit unit, T* values) {
  constexpr int kChunks = Tile::kWidth / Tile::kChunk, kRows = kSweepThreads / kChunks, kPlaces = 8 / kRows;
  static_assert(8 % kRows == 0 && kTokens % 8 == 0);
  const int thread = rematerialize(threadIdx.x), row = thread / kChunks, v = thread % kChunks * Tile::kChunk;
  const int64_t feature = unit.strip * int64_t{Tile::kWidth} + v, left = x.n - feature;
  const int64_t first = unit.tile * int64_t{kTokens}, t = first + row;
  const T* from = x.x + t * x.row + feature;
  if (x.aligned && first + kTokens <= x.tokens && left >= Tile::kChunk) {
    T* to[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) to[i] = Tile{values}.at(row + i * kRows, v);
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i, from += kRows * x.row)
      copy_async(to[i % kPlaces] + i / kPlaces * 8 * Tile::kWidth, from, 16);
    return;
  }
  const int valid = left < 0 ? 0 : left < Tile::kChunk ? static_cast<int>(left) : Tile::kChunk;
#pragma unroll 1
  for (int i = 0; i < kTokens; i += kRows, from += kRows * x.row) {
    T* chunk = Tile{values}.at(row + i, v);
    if (x.aligned) {
      const bool is_inside = t + i < x.tokens && valid > 0;
      copy_async(chunk, is_inside ? from : x.x, is_inside ? valid * sizeof(T) : 0);
    } else {
      *reinterpret_cast<Pack<T, Tile::kChunk>*>(chunk) = read<Tile::kChunk>(x, t + i, feature);
    }
  }
}

// Starts to copy a unit's tile of x and its part of w.
template <typename T, int kN, bool kDot>
__device__ void start_copies(const Sweep<T>& s, Unit unit, char* stage) {
  using Tile = Tile<T, kDot>;
  const int i = s.matrix_of(unit.strip);
  constexpr int kPairs = kHiddenPairs<T, kN>;
  const Pair* from = s.hidden + (int64_t{i} * s.shares.tiles + unit.tile) * kPairs;
  Pair* to = reinterpret_cast<Pair*>(stage + Tile::kBytes);
#pragma unroll
  for (int i = 2 * threadIdx.x; i < kPairs; i += 2 * kSweepThreads) copy_async(to + i, from + i, 16);
  copy_tile<Tile>(s.each[i].x, {unit.strip - s.each[i].first, unit.tile}, reinterpret_cast<T*>(stage));
}

__device__ inline void wait_for_stage(int stages) {
  if (stages >= 4)
    wait_for_copies<2>();
  else if (stages == 3)
    wait_for_copies<1>();
  else
    wait_for_copies<0>();
}

// Adds up all parts, by all blocks of the grid, after every part is written. `memory` is shared memory.
template <typename T, int kRanks, bool kDot>
__device__ inline void sum_all(const Sweep<T>& s, char* memory) {
  constexpr int kStrip = Tile<T, kDot>::kStrip;
  const Shares& shares = s.shares;
  const int of_dots = kDot ? shares.tiles * (kTokens / kSlice) * kRanks : 0;  // of a matrix
  const int outer_warps = warps_for(shares.blocks / (shares.strips > 0 ? shares.strips : 1));
  SumStorage* storage = reinterpret_cast<SumStorage*>(memory);
  int buffer = 0, job = blockIdx.x;
#pragma unroll 1
  for (int i = 0; i < kMostMatrices && s.each[i].first != INT32_MAX; ++i) {
    const int first = s.each[i].first, n = static_cast<int>(s.each[i].x.n);
    const int strips = (n + kStrip * kSlice - 1) / (kStrip * kSlice), warps = warps_for(strips);
    const int at_once = kSweepWarps / warps, rounds = (of_dots + at_once - 1) / at_once;
    const int slices = (n + kSlice - 1) / kSlice;
    const int all = rounds + (slices * kRanks * outer_warps + kSweepWarps - 1) / kSweepWarps;
    const Dots dots{s.dots.parts + first * int64_t{of_dots} * kWarp,
                    s.dots.hidden + i * int64_t{of_dots} * s.dots.pieces * kWarp, s.dots.pieces};
#pragma unroll 1
    for (; job < all; job += gridDim.x, buffer ^= 1) {
      if (kDot && job < rounds)
        sum_dots(dots, strips, job, of_dots, warps, storage[buffer]);
      else
        sum_outer<kRanks, kStrip>(s.each[i].sum, shares, first, n, job - rounds, outer_warps, storage[buffer]);
    }
    job -= all;
    __syncthreads();  // the two storages are free, whichever of the sums used them
  }
}

template <typename T, int kN, bool kDot>
__global__ void __launch_bounds__(kSweepThreads, kBlocks<T, kN, kDot>) sweep(const __grid_constant__ Sweep<T> s) {
  using Tile = Tile<T, kDot>;
  constexpr int kOwn = kSlices<T, kDot>, kParts = kTokens / kSlice, kPartner = kPartners<T>;
  constexpr int kStage = kStageBytes<T, kN, kDot>;
  RBFAST_SHARED_MEMORY(memory);
  char* scratch = memory + s.stages * kStage;
  const int thread = rematerialize(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp, tiles = s.shares.tiles;
  const int begin = s.shares.first_of(blockIdx.x), count = s.shares.first_of(blockIdx.x + 1) - begin;
  const auto unit_at = [&](int i) {
    const unsigned at = begin + i, each = tiles;  // unsigned division takes fewer registers
    return Unit{static_cast<int>(at / each), static_cast<int>(at % each)};
  };
  float outer[kOwn][kN][4];
  uint32_t m[kDot ? kOwn : 1][kN][kPartner][2];
  // Features of its matrix from a strip's first one on.
  const auto left_of = [&](int strip) {
    const int i = s.matrix_of(strip);
    return static_cast<int>(s.each[i].x.n) - (strip - s.each[i].first) * Tile::kWidth;
  };

  const auto store_outer = [&](int strip) {
    const int left = left_of(strip);
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
  const auto start_strip = [&](int strip) {
    const int left = left_of(strip);
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
  int now = 0;
  for (int i = 0; i < count; ++i) {
    wait_for_stage(s.stages);
    __syncthreads();  // the tile and the previous unit's dots are there, and no thread reads that unit's tile
    const int free = now > 0 ? now - 1 : s.stages - 1;
    if (i + s.stages - 1 < count) start_copies<T, kN, kDot>(s, unit_at(i + s.stages - 1), memory + free * kStage);
    commit_copies();
    if constexpr (kDot)
      if (i > 0) store_dot(unit_at(i - 1), (i - 1) % 2);
    if (const Unit unit = unit_at(i); i == 0 || unit.tile == 0) {
      if (i > 0) store_outer(unit.strip - 1);
      start_strip(unit.strip);
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
  }
  if (count > 0) store_outer(unit_at(count - 1).strip);
  if constexpr (kDot) {
    __syncthreads();
    if (count > 0) store_dot(unit_at(count - 1), (count - 1) % 2);
  }
  cooperative_groups::this_grid().sync();  // every block's parts are written, and shared memory is free
  sum_all<T, kN, kDot>(s, memory);
}

}  // namespace
}  // namespace rbfast
