// Shared by the adapter's ops: a matrix of activations with any strides, and H = x m^T, its product with a factor of
// the delta.
#pragma once

#include <vector>

#include "cuda/tensor_core.cuh"

namespace rbfast {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTokens = 32;       // per tile: twice the rows of a product
constexpr int kSlice = 16;        // features, or tokens, of one product
constexpr int kMostRanks = 32;    // per launch; ranks come in blocks of 8
constexpr int kMostMatrices = 4;  // per launch: those that share an input, such as q, k and v

using Floats = Pack<float, 4>;   // a lane's part of a product [16, 8]
using Pair = Pack<uint32_t, 2>;  // a lane's part of an operand [16, 8], of one piece

inline __device__ Floats floats_of(const float (&values)[4]) { return {{values[0], values[1], values[2], values[3]}}; }
// From and to global memory, in one instruction.
__device__ inline Floats read_floats(const Floats* from) {
  const Bits<16> bits = read_bits<16>(from);
  Floats values;
  memcpy(&values, &bits, sizeof(values));
  return values;
}
__device__ inline void write_floats(Floats* to, const float (&values)[4]) {
  Bits<16> bits;
  memcpy(&bits, values, sizeof(bits));
  write_bits<16>(to, bits);
}
inline __device__ Floats operator+(Floats a, const Floats& b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a.value[i] += b.value[i];
  return a;
}

// x [tokens, n]
template <typename T>
struct Matrix {
  const T* x = nullptr;
  int64_t row = 0, column = 0, tokens = 0, n = 0;
  bool aligned = false;  // rows are dense and start at multiples of 16 bytes

  Matrix() = default;
  explicit Matrix(const Tensor& from)
      : x(data<T>(from)),
        row(from.stride(0)),
        column(from.stride(1)),
        tokens(from.size(0)),
        n(from.size(1)),
        aligned(column == 1 && is_aligned(x, 16) && row * sizeof(T) % 16 == 0) {}
};

// The values at (t, v .. v + count), 0 outside the matrix.
template <int count, typename T>
__device__ inline Pack<T, count> read(const Matrix<T>& m, int64_t t, int64_t v) {
  const int64_t left = t < m.tokens ? m.n - v : 0;
  const T* from = m.x + t * m.row + v * m.column;
  if (m.aligned && left >= count) return *reinterpret_cast<const Pack<T, count>*>(from);
  Pack<T, count> values{};
  const int64_t step = rematerialize(m.column);
#pragma unroll
  for (int i = 0; i < count; ++i, from += step)
    if (i < left) values.value[i] = *from;
  return values;
}

// Up to kMostRanks ranks of A or B: m[i * rank + v * feature]
struct Factor {
  const float* m = nullptr;
  int64_t rank = 0, feature = 0;
  int k = 0;
  bool aligned = false;  // the features of a rank are dense and start at multiples of 16 bytes

  Factor() = default;
  Factor(const Tensor& from, int64_t rank, int64_t feature, int64_t first, int k)
      : m(data<float>(from) + first * rank),
        rank(rank),
        feature(feature),
        k(k),
        aligned(feature == 1 && is_aligned(m, 16) && rank % 4 == 0) {}
  __device__ float at(int i, int64_t v, int64_t n) const { return i < k && v < n ? m[i * rank + v * feature] : 0; }
  // The values of rank i at features v .. v + count; v and count are multiples of 4.
  template <int count>
  __device__ void read(int i, int64_t v, int64_t n, float (&values)[count]) const {
    const float* from = m + i * rank + v * feature;
    const int64_t left = i < k ? n - v : 0;
    if (aligned && left >= count) {
#pragma unroll
      for (int e = 0; e < count; e += 4) {
        const Bits<16> four = read_bits<16>(from + e);
        memcpy(values + e, &four, sizeof(four));
      }
    } else {
      const int64_t step = rematerialize(feature);
#pragma unroll
      for (int e = 0; e < count; ++e, from += step) values[e] = e < left ? *from : 0;
    }
  }
};

// Where H goes: as operands of products with tiles of T, [tiles, 2, blocks of ranks, pieces, lanes], and/or as plain
// floats [tokens, ld].
struct Hidden {
  Pair* operands = nullptr;
  int pieces = 0;
  float* plain = nullptr;
  int64_t ld = 0;
};

// Writes a lane's part of an operand [16, 8] as [pieces, lanes]: the pairs of its column from 2c and from 2c + 8.
__device__ inline void write_operand(Pair* to, int pieces, const float (&upper)[2], const float (&lower)[2]) {
  uint32_t first[3], second[3];
  split(upper[0], upper[1], first);
  split(lower[0], lower[1], second);
#pragma unroll
  for (int p = 0; p < 3; ++p)
    if (p < pieces) to[p * kWarp + threadIdx.x % kWarp] = {{first[p], second[p]}};
}

// A factor m, and where it goes as operands of products with tiles of T: [slices of n features, blocks of ranks,
// pieces, lanes].
struct Operands {
  Factor m;
  int64_t n = 0;
  Pair* to = nullptr;
  int pieces = 0;

  __host__ __device__ int64_t slices() const { return (n + kSlice - 1) / kSlice; }
};

// H for up to kMostRanks ranks of a factor, and where it goes. The same launch splits `also`, a factor of equal rank.
struct Projection {
  Factor m;
  Hidden to;
  Operands also;
};

// H of x for each of up to kMostMatrices factors of equal rank, in one launch (column_project.cu).
void project(const Device& device, const Tensor& x, const std::vector<Projection>& each);
// H [tokens, k] for all ranks of m [k, n], m[i * rank + v * feature], as plain floats.
Tensor project_all(const Device& device, const Tensor& x, const Tensor& m, int64_t k, int64_t rank, int64_t feature);

template <int kBlocks>
struct RankBlocks {};  // of 8 ranks

// Calls f(RankBlocks<n>{}) with the smallest n that holds k ranks.
template <typename F>
void for_rank_blocks(int k, const F& f) {
  switch ((k + 7) / 8) {
    case 1:
      return f(RankBlocks<1>{});
    case 2:
      return f(RankBlocks<2>{});
    case 3:
      return f(RankBlocks<3>{});
    default:
      return f(RankBlocks<4>{});
  }
}

}  // namespace rbfast
