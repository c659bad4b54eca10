// H = x m^T on a GPU, where x [tokens, n] are activations and m [k, n] is a factor of the delta, fp32.
//
// Traffic: for every 32 ranks of a factor x is read once, m once per block, and H is written once, as floats or as bf16
// pieces. Factors that share x share a launch, and then find x in the level-2 cache.
//
// A block takes 32 tokens and one factor. Its warps split the features and add up their results in shared memory, in
// order of the warps. A lane reads 8 values of a row at once: any order of features within a product will do, as long
// as x and m agree. m is split into three bf16 pieces, so H is as exact as fp32 sums are.
#include <algorithm>

#include "cuda/column_products.cuh"

namespace rbfast {
namespace {

// Warps per block. Blocks are few, so each has as many warps as registers allow, to hide memory latency.
template <typename T, int kN>
constexpr int kProjectWarps = sizeof(T) == 4 || kPieces<T> * kN == 8 ? 8 : 16;

constexpr int kLaneValues = 8;  // features of a row that a lane reads at once

template <typename T>
using Row = Bits<kLaneValues * sizeof(T)>;

// Reads a lane's share of the features from `begin` on, kLaneValues for each of four lanes: rows first, first + 8, ..
// of x, and one rank of every eight of m. If nothing is cut off, all of its loads are in flight at once.
template <typename T, int kRows, int kN>
__device__ inline void read_chunk(const Matrix<T>& x, const Factor& m, int64_t first, int64_t begin,
                                  Row<T> (&rows)[kRows], Row<float> (&ranks)[kN]) {
  const int lane = threadIdx.x % kWarp, rank = lane / 4;
  const int64_t v = begin + kLaneValues * (lane % 4);
  if (x.aligned && m.aligned && begin + 4 * kLaneValues <= x.n) {
    const T* row = x.x + first * x.row + v;
    const float* of_rank = m.m + rank * m.rank + v;
#pragma unroll
    for (int i = 0; i < kRows; ++i, row += 8 * x.row)
      rows[i] = first + 8 * i < x.tokens ? read_bits<sizeof(Row<T>)>(row) : Row<T>{};
#pragma unroll
    for (int j = 0; j < kN; ++j, of_rank += 8 * m.rank)
      ranks[j] = 8 * j + rank < m.k ? read_bits<sizeof(Row<float>)>(of_rank) : Row<float>{};
    return;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const Pack<T, kLaneValues> row = read<kLaneValues>(x, first + 8 * i, v);
    memcpy(&rows[i], &row, sizeof(row));
  }
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    float values[kLaneValues];
    m.read(8 * j + rank, v, x.n, values);
    memcpy(&ranks[j], values, sizeof(values));
  }
}

// Splits a block's share of a factor's slices into pieces, one slice per warp, the last warp first.
template <int kN>
__device__ inline void split_factor(const Operands& from, int warps) {
  const int lane = threadIdx.x % kWarp, slices = static_cast<int>(from.slices()), blocks = gridDim.x;
  const int share = (slices + blocks - 1) / blocks, begin = blockIdx.x * share;
  const int end = begin + share < slices ? begin + share : slices;
#pragma unroll 1
  for (int slice = begin + warps - 1 - threadIdx.x / kWarp; slice < end; slice += warps) {
    const int64_t v = slice * int64_t{kSlice} + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int rank = 8 * j + lane / 4;
      write_operand(from.to + (slice * int64_t{kN} + j) * from.pieces * kWarp, from.pieces,
                    {from.m.at(rank, v, from.n), from.m.at(rank, v + 1, from.n)},
                    {from.m.at(rank, v + 8, from.n), from.m.at(rank, v + 9, from.n)});
    }
  }
}

struct Projections {
  Projection each[kMostMatrices];
};

// While some warps of a block add up H, the others split its share of `also`. Blocks beyond the last tile only do that.
template <typename T, int kN>
__global__ void __launch_bounds__(kProjectWarps<T, kN>* kWarp, 1)
    project_tile(const Matrix<T> x, const __grid_constant__ Projections all) {
  const auto& [m, to, also] = all.each[blockIdx.y];
  constexpr int kParts = kTokens / kSlice, kRow = 8 * kN + 1;
  RBFAST_SHARED_MEMORY(memory);
  Floats* parts = reinterpret_cast<Floats*>(memory);  // [warps, kParts, kN, lanes]
  float* total = reinterpret_cast<float*>(parts + kProjectWarps<T, kN> * kParts * kN * kWarp);  // [kTokens, kRow]
  const int thread = rematerialize(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp, g = lane / 4;
  const int64_t first = blockIdx.x * int64_t{kTokens};
  if (first >= x.tokens) return split_factor<kN>(also, kProjectWarps<T, kN>);
  float acc[kParts][kN][4] = {};
#pragma unroll 1
  for (int64_t begin = warp * 4 * kLaneValues; begin < x.n; begin += kProjectWarps<T, kN> * 4 * kLaneValues) {
    Row<T> rows[kParts * 2];
    Row<float> ranks[kN];
    read_chunk(x, m, first + g, begin, rows, ranks);
    uint32_t a[kParts][2][kPieces<T>][4];  // of 2 products: features v .. v + 4 and v + 4 .. v + 8 of every lane
#pragma unroll
    for (int i = 0; i < kParts * 2; ++i) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t piece[kPieces<T>];
        T values[2];
        memcpy(values, reinterpret_cast<const char*>(&rows[i]) + pair * sizeof(values), sizeof(values));
        split_pair(values, piece);
#pragma unroll
        for (int p = 0; p < kPieces<T>; ++p) a[i / 2][pair / 2][p][i % 2 + pair % 2 * 2] = piece[p];
      }
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t b[3][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = 4 * step + 2 * half;
          uint32_t piece[3];
          float pair[2];
          memcpy(pair, ranks[j].value + at, sizeof(pair));
          split(pair[0], pair[1], piece);
#pragma unroll
          for (int p = 0; p < 3; ++p) b[p][half] = piece[p];
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) multiply_pieces(acc[part][j], a[part][step], b);
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int j = 0; j < kN; ++j) parts[((warp * kParts + part) * kN + j) * kWarp + lane] = floats_of(acc[part][j]);
  __syncthreads();
  split_factor<kN>(also, kProjectWarps<T, kN>);
  for (int i = threadIdx.x; i < kParts * kN * kWarp; i += kProjectWarps<T, kN> * kWarp) {
    Floats sum = parts[i];
    for (int w = 1; w < kProjectWarps<T, kN>; ++w) sum = sum + parts[w * kParts * kN * kWarp + i];
    const int l = i % kWarp, t = i / (kN * kWarp) * kSlice + l / 4, rank = i / kWarp % kN * 8 + l % 4 * 2;
#pragma unroll
    for (int e = 0; e < 4; ++e) total[(t + e / 2 * 8) * kRow + rank + e % 2] = sum.value[e];
  }
  __syncthreads();
  for (int i = threadIdx.x; to.operands != nullptr && i < kParts * kN * kWarp; i += kProjectWarps<T, kN> * kWarp) {
    const int l = i % kWarp, t = i / (kN * kWarp) * kSlice + l % 4 * 2, rank = i / kWarp % kN * 8 + l / 4;
    write_operand(to.operands + (blockIdx.x * int64_t{kParts * kN} + i / kWarp) * to.pieces * kWarp, to.pieces,
                  {total[t * kRow + rank], total[(t + 1) * kRow + rank]},
                  {total[(t + 8) * kRow + rank], total[(t + 9) * kRow + rank]});
  }
  for (int i = threadIdx.x; to.plain != nullptr && i < kTokens * m.k; i += kProjectWarps<T, kN> * kWarp)
    if (first + i / m.k < x.tokens) to.plain[(first + i / m.k) * to.ld + i % m.k] = total[i / m.k * kRow + i % m.k];
}

template <typename T, int kN>
void launch(const Device& device, RankBlocks<kN>, const Matrix<T>& x, const std::vector<Projection>& each) {
  constexpr size_t kParts = kProjectWarps<T, kN> * kTokens / kSlice * kN * kWarp * sizeof(Floats);
  constexpr size_t kShared = kParts + kTokens * (8 * kN + 1) * sizeof(float);
  if (kShared > 48 << 10)  // beyond 48 KB a kernel must opt in
    once(device.key(), [&] { return device.allow_shared_memory(project_tile<T, kN>), true; });
  Projections all;
  int64_t blocks = ceil_div(x.tokens, kTokens);
  for (size_t i = 0; i < each.size(); ++i) {
    all.each[i] = each[i];
    blocks = std::max(blocks, ceil_div(each[i].also.slices(), kProjectWarps<T, kN>));
  }
  const int64_t matrices = static_cast<int64_t>(each.size());
  device.launch({blocks, matrices, kProjectWarps<T, kN> * kWarp, 1, kShared}, project_tile<T, kN>, x, all);
}

}  // namespace

void project(const Device& device, const Tensor& x, const std::vector<Projection>& each) {
  for_each_type(x.scalar_type(), [&](auto type) {
    const Matrix<decltype(type)> matrix(x);
    for_rank_blocks(each.front().m.k, [&](auto blocks) { launch(device, blocks, matrix, each); });
  });
}

Tensor project_all(const Device& device, const Tensor& x, const Tensor& m, int64_t k, int64_t rank, int64_t feature) {
  const Tensor hidden = floats(x, x.size(0), k);
  for (int64_t i = 0; i < k; i += kMostRanks) {
    const int ranks = static_cast<int>(std::min<int64_t>(kMostRanks, k - i));
    project(device, x, {{Factor(m, rank, feature, i, ranks), {nullptr, 0, mutable_data<float>(hidden) + i, k}, {}}});
  }
  return hidden;
}

}  // namespace rbfast
