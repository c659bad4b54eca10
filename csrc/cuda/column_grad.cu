// column_grad on a GPU. The delta of a frozen weight W [out, in] is dW[:, cols] = scale * B A, so its gradients need, for
// xs = x[:, cols],
//     H = xs A^T,  dB = scale * dy^T H,  dH = dy B,  dA = scale * dH^T xs.
//
// Traffic: dy is the only large operand, T * out values. `sweep` copies it through shared memory once and does both of
// its products there, on tensor cores. What they need as partners, H and B, is fp32: it is cut into two pieces of bf16
// (three where dy is fp32). A block takes a strip of features and a run of tokens, a warp keeps B and dB of its features
// in registers. Per tile of 32 tokens the warps' parts of dH are added up in shared memory, so what goes back to memory
// is k floats for every token and strip: 4 k / 1024 of the bytes of a bf16 dy for strips of 512.
//
// Four launches: `project` makes H, `sweep` over dy leaves parts of dB and dH, `sweep` over xs adds up dH and leaves
// parts of dA, `sum_parts` adds up dA and dB. Work is cut into equal shares for all multiprocessors: block b does units
// [b * share, ...) of the list of all (strip, tile of tokens). Every sum runs in an order fixed by the shapes and the
// number of multiprocessors, without atomics.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cuda/column_products.cuh"

namespace rbfast {
namespace {

constexpr int kBlocks = 1;  // of `sweep` on a multiprocessor
constexpr int kLeaves16 = 4, kLeaves32 = 1;  // 16 features each, of a warp; of 16-bit and of 32-bit values

// ---- both products of a matrix ----

// A tile of x in shared memory: rows of kWidth values, in chunks of 16 bytes that change places from row to row, so that
// eight rows of a chunk lie in different banks.
template <typename T>
struct Tile {
  static constexpr int kLeaves = sizeof(T) == 4 ? kLeaves32 : kLeaves16;
  static constexpr int kStrip = kLeaves * kWarps, kWidth = kStrip * kLeaf, kChunk = 16 / sizeof(T);
  static constexpr int kBytes = kTokens * kWidth * sizeof(T);
  T* values;

  __device__ T* at(int t, int v) const {
    return values + t * kWidth + ((v / kChunk) ^ (t & 7)) * kChunk + v % kChunk;
  }

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

// The parts of dH, [strips, tiles, 2, blocks of ranks, lanes].
struct Dots {
  Floats* parts;
  int64_t strips, tiles;
};

// The list of units that all blocks share, and the parts [blocks + strips, leaves of a strip, blocks of ranks, lanes] of
// x^T w that they leave: block b and strip q have part b + q to themselves.
struct Shares {
  int64_t strips, tiles, share, blocks;
  Floats* parts;
};

template <typename T>
struct Sweep {
  Matrix<T> x;
  Shares shares;
  int stages;  // tiles in shared memory: one is worked on, the others are on their way
  // with both products:
  const Pair* hidden;  // H, as `project` leaves it
  Factor m;            // B
  // dH: with both products it is written, else read
  Dots dots;
};

// Bytes of shared memory for one tile and its H, and for what the warps have to add up.
template <typename T, int kN, bool kDot>
constexpr int kStageBytes = Tile<T>::kBytes + (kDot ? kTokens / kLeaf * kN * kPartners<T> * kWarp * 8 : 0);
template <int kN, bool kDot>
constexpr int kScratchBytes = kDot ? kWarps * kTokens / kLeaf * kN * kWarp * 16 : kTokens * (8 * kN + 1) * 4;

// Starts to copy a unit's tile of x, and of H.
template <typename T, int kN, bool kDot>
__device__ void start_copies(const Sweep<T>& s, int64_t unit, char* stage) {
  using Tile = Tile<T>;
  constexpr int kChunks = Tile::kWidth / Tile::kChunk;
  const Tile tile{reinterpret_cast<T*>(stage)};
  const int64_t first = unit % s.shares.tiles * kTokens, begin = unit / s.shares.tiles * Tile::kWidth;
#pragma unroll
  for (int i = threadIdx.x; i < kTokens * kChunks; i += kThreads) {
    const int row = i / kChunks, v = i % kChunks * Tile::kChunk;
    if (s.x.aligned) {
      const int64_t left = first + row < s.x.tokens ? s.x.n - begin - v : 0;
      const int valid = left < 0 ? 0 : left < Tile::kChunk ? static_cast<int>(left) : Tile::kChunk;
      copy_async(tile.at(row, v), valid > 0 ? s.x.x + (first + row) * s.x.row + begin + v : s.x.x, valid * sizeof(T));
    } else {
      *reinterpret_cast<Pack<T, Tile::kChunk>*>(tile.at(row, v)) = read<Tile::kChunk>(s.x, first + row, begin + v);
    }
  }
  if constexpr (kDot) {
    constexpr int kPairs = kTokens / kLeaf * kN * kPartners<T> * kWarp;
    const Pair* from = s.hidden + unit % s.shares.tiles * kPairs;
    Pair* to = reinterpret_cast<Pair*>(stage + Tile::kBytes);
    for (int i = 2 * threadIdx.x; i < kPairs; i += 2 * kThreads) copy_async(to + i, from + i, 16);
  }
}

__device__ inline void wait_for_stage(int stages) {
  if (stages >= 4)
    wait_for_copies<2>();
  else if (stages == 3)
    wait_for_copies<1>();
  else
    wait_for_copies<0>();
}

// dH of a tile from its parts, as rows of 8 kN + 1 floats.
template <int kN>
__device__ void add_dots(const Dots& dots, int64_t tile, float* rows) {
  constexpr int kCount = kTokens / kLeaf * kN * kWarp, kRow = 8 * kN + 1;
  for (int i = threadIdx.x; i < kCount; i += kThreads) {
    Floats sum{};
#pragma unroll 8
    for (int64_t q = 0; q < dots.strips; ++q) sum = sum + dots.parts[(q * dots.tiles + tile) * kCount + i];
    const int l = i % kWarp, t = i / (kN * kWarp) * kLeaf + l / 4, rank = i / kWarp % kN * 8 + l % 4 * 2;
#pragma unroll
    for (int e = 0; e < 4; ++e) rows[(t + e / 2 * 8) * kRow + rank + e % 2] = sum.value[e];
  }
}

// The pieces of the operand [16 tokens, 8 ranks] that rows of floats hold.
template <int kN, int kCount>
__device__ void hidden_operand(const float* rows, int t, int block, uint32_t (&h)[kCount][2]) {
  constexpr int kRow = 8 * kN + 1;
  const int lane = threadIdx.x % kWarp;
  const float* from = rows + (t + lane % 4 * 2) * kRow + 8 * block + lane / 4;
  uint32_t upper[kCount], lower[kCount];
  split(from[0], from[kRow], upper);
  split(from[8 * kRow], from[9 * kRow], lower);
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    h[p][0] = upper[p];
    h[p][1] = lower[p];
  }
}

template <typename T, int kN, bool kDot>
__global__ void __launch_bounds__(kThreads, kBlocks) sweep(const Sweep<T> s) {
  using Tile = Tile<T>;
  constexpr int kLeaves = Tile::kLeaves, kParts = kTokens / kLeaf, kPartner = kPartners<T>;
  constexpr int kStage = kStageBytes<T, kN, kDot>;
  RBFAST_SHARED_MEMORY(memory);
  char* scratch = memory + s.stages * kStage;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tiles = s.shares.tiles, all = s.shares.strips * tiles, begin = blockIdx.x * s.shares.share;
  const int64_t end = begin + s.shares.share < all ? begin + s.shares.share : all;
  float outer[kLeaves][kN][4];
  uint32_t m[kDot ? kLeaves : 1][kN][kPartner][2];
  int64_t strip = -1, left = 0;  // the strip of features that this block works on, and those from its first one on

  const auto store_outer = [&] {
#pragma unroll
    for (int f = 0; f < kLeaves; ++f) {
      const int leaf = f * kWarps + warp;
      if (leaf * kLeaf >= left) continue;
      const int64_t at = ((blockIdx.x + strip) * Tile::kStrip + leaf) * kN;
#pragma unroll
      for (int j = 0; j < kN; ++j) memcpy(&s.shares.parts[(at + j) * kWarp + lane], outer[f][j], sizeof(Floats));
    }
  };
  const auto start_strip = [&](int64_t next) {
    strip = next;
    left = s.x.n - strip * Tile::kWidth;
#pragma unroll
    for (int f = 0; f < kLeaves; ++f)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) outer[f][j][i] = 0;
        if constexpr (kDot) {
          const int64_t v = strip * Tile::kWidth + (f * kWarps + warp) * kLeaf + lane % 4 * 2;
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
    if (begin + i < end) start_copies<T, kN, kDot>(s, begin + i, memory + i * kStage);
    close_copies();
  }
  int now = 0, next = s.stages - 1;
  for (int64_t unit = begin; unit < end; ++unit) {
    wait_for_stage(s.stages);
    __syncthreads();  // the tile is there, and nobody reads the one before it any more
    if (unit + s.stages - 1 < end) start_copies<T, kN, kDot>(s, unit + s.stages - 1, memory + next * kStage);
    close_copies();
    if (unit / tiles != strip) {
      if (strip >= 0) store_outer();
      start_strip(unit / tiles);
    }
    const Tile tile{reinterpret_cast<T*>(memory + now * kStage)};
    if constexpr (!kDot) {
      add_dots<kN>(s.dots, unit % tiles, reinterpret_cast<float*>(scratch));
      __syncthreads();
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t h[kN][kPartner][2];
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if constexpr (kDot) {
          const Pair* pairs = reinterpret_cast<const Pair*>(memory + now * kStage + Tile::kBytes);
#pragma unroll
          for (int p = 0; p < kPartner; ++p)
            memcpy(h[j][p], &pairs[((part * kN + j) * kPartner + p) * kWarp + lane], sizeof(Pair));
        } else {
          hidden_operand<kN>(reinterpret_cast<const float*>(scratch), part * kLeaf, j, h[j]);
        }
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
        Floats* to = reinterpret_cast<Floats*>(scratch) + (warp * kParts + part) * kN * kWarp + lane;
#pragma unroll
        for (int j = 0; j < kN; ++j) memcpy(to + j * kWarp, dot[j], sizeof(Floats));
      }
    }
    if constexpr (kDot) {
      constexpr int kCount = kParts * kN * kWarp;
      __syncthreads();
      const Floats* from = reinterpret_cast<const Floats*>(scratch);
      Floats* to = s.dots.parts + (strip * tiles + unit % tiles) * kCount;
      for (int i = threadIdx.x; i < kCount; i += kThreads) {
        Floats sum = from[i];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) sum = sum + from[w * kCount + i];
        to[i] = sum;
      }
    }
    now = now + 1 < s.stages ? now + 1 : 0;
    next = next + 1 < s.stages ? next + 1 : 0;
  }
  if (strip >= 0) store_outer();
}

// ---- sums of parts ----

// sum[v * feature + i * rank] = scale * the sum over the blocks that had v's strip.
struct Sum {
  Shares shares;
  int64_t n, leaves, strip_leaves;
  int k, rank_blocks;
  float scale;
  float* sum;
  int64_t feature, rank;
};

__global__ void __launch_bounds__(kThreads) sum_parts(const Sum first, const Sum second) {
  RBFAST_SHARED_MEMORY(memory);
  Floats* parts = reinterpret_cast<Floats*>(memory);
  const int64_t of_first = first.leaves * first.rank_blocks;
  const bool is_first = blockIdx.x < of_first;
  const Sum s = is_first ? first : second;
  const int64_t index = is_first ? blockIdx.x : blockIdx.x - of_first;
  const int64_t leaf = index / s.rank_blocks, strip = leaf / s.strip_leaves, tiles = s.shares.tiles;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, j = static_cast<int>(index % s.rank_blocks);
  const int64_t begin = tiles > 0 ? strip * tiles / s.shares.share : 0;
  const int64_t end = tiles > 0 ? ((strip + 1) * tiles - 1) / s.shares.share + 1 : 0;
  const int64_t each = (end - begin + kWarps - 1) / kWarps, from = begin + warp * each;
  Floats sum{};
#pragma unroll 4
  for (int64_t b = from; b < (from + each < end ? from + each : end); ++b)
    sum = sum + s.shares.parts[(((b + strip) * s.strip_leaves + leaf % s.strip_leaves) * s.rank_blocks + j) * kWarp + lane];
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < kWarps; ++w) sum = sum + parts[w * kWarp + lane];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int64_t v = leaf * kLeaf + lane / 4 + e / 2 * 8;
    const int i = 8 * j + lane % 4 * 2 + e % 2;
    if (v < s.n && i < s.k) s.sum[v * s.feature + i * s.rank] = s.scale * sum.value[e];
  }
}

// ---- launching ----

// How the units of a matrix are shared.
Shares shares_of(const Device& device, int64_t tokens, int64_t n, int64_t width) {
  Shares s{ceil_div(n, width), ceil_div(tokens, kTokens), 1, 0, nullptr};
  const int64_t units = s.strips * s.tiles, busy = kBlocks * device.attribute(cudaDevAttrMultiProcessorCount);
  s.share = std::max<int64_t>(1, ceil_div(units, busy));
  s.blocks = ceil_div(units, s.share);
  return s;
}

// Bytes of shared memory for a block.
int64_t shared_room(const Device& device) {
  constexpr int kReserved = 1024;  // by the system, for each block
  const int all = device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kBlocks - kReserved;
  return std::min(all, device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

template <typename T, int kN, bool kDot>
void launch_sweep(const Device& device, Sweep<T> s) {
  constexpr int64_t kMostStages = 4;
  const int64_t room = shared_room(device) - kScratchBytes<kN, kDot>;
  s.stages = static_cast<int>(std::min(kMostStages, room / kStageBytes<T, kN, kDot>));
  const size_t shared = s.stages * kStageBytes<T, kN, kDot> + kScratchBytes<kN, kDot>;
  allow_shared(sweep<T, kN, kDot>, shared);
  device.launch({s.shares.blocks, 1, kThreads, 1, shared}, sweep<T, kN, kDot>, s);
}

// Ranks at a time: two tiles have to fit into shared memory.
int most_ranks(const Device& device) {
  constexpr int kNeeded = 2 * kStageBytes<__half, 4, true> + kScratchBytes<4, true>;
  return shared_room(device) >= kNeeded ? kMostRanks : kMostRanks - 8;
}

// Memory that is cut into pieces.
class Workspace {
 public:
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t at = size_;
    size_ += ceil_div(count * sizeof(T), 16) * 4;
    return at;
  }
  void allocate(const Tensor& like) { memory_ = mutable_data<float>(tensor_.emplace(floats(like, 1, size_))); }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(memory_ + offset);
  }

 private:
  int64_t size_ = 0;  // in floats
  std::optional<Tensor> tensor_;
  float* memory_ = nullptr;
};

struct Gradients {
  const Tensor &dy, &xs, &A, &B;
  float scale;
  float *dA, *dB;
};

template <typename Y, typename X, int kN>
void grad_of_ranks(const Device& device, RankBlocks<kN>, const Gradients& g, int64_t first, int k) {
  const Matrix<Y> y(g.dy);
  const Matrix<X> x(g.xs);
  Shares of_y = shares_of(device, y.tokens, y.n, Tile<Y>::kWidth), of_x = shares_of(device, x.tokens, x.n, Tile<X>::kWidth);
  const int64_t tiles = of_y.tiles, of_tile = kTokens / kLeaf * kN * kWarp;
  Workspace work;
  const int64_t operands = work.add<Pair>(tiles * of_tile * kPartners<Y>);
  const int64_t dots = work.add<Floats>(of_y.strips * tiles * of_tile);
  const int64_t dB_parts = work.add<Floats>((of_y.blocks + of_y.strips) * Tile<Y>::kStrip * kN * kWarp);
  const int64_t dA_parts = work.add<Floats>((of_x.blocks + of_x.strips) * Tile<X>::kStrip * kN * kWarp);
  work.allocate(g.dy);
  of_y.parts = work.at<Floats>(dB_parts);
  of_x.parts = work.at<Floats>(dA_parts);
  const Pair* hidden = work.at<Pair>(operands);
  const Factor a(g.A, g.A.stride(0), g.A.stride(1), first, k), b(g.B, g.B.stride(1), g.B.stride(0), first, k);
  project(device, g.xs, a, {work.at<Pair>(operands), kPartners<Y>});
  const Dots parts{work.at<Floats>(dots), of_y.strips, tiles};
  launch_sweep<Y, kN, true>(device, {y, of_y, 0, hidden, b, parts});
  launch_sweep<X, kN, false>(device, {x, of_x, 0, nullptr, b, parts});
  const int64_t all = g.A.size(0);
  const Sum dB{of_y, y.n, ceil_div(y.n, kLeaf), Tile<Y>::kStrip, k, kN, g.scale, g.dB + first, all, 1};
  const Sum dA{of_x, x.n, ceil_div(x.n, kLeaf), Tile<X>::kStrip, k, kN, g.scale, g.dA + first * x.n, 1, x.n};
  device.launch({(dB.leaves + dA.leaves) * kN, 1, kThreads, 1, kThreads * sizeof(Floats)}, sum_parts, dB, dA);
}

std::tuple<Tensor, Tensor> column_grad(const Tensor& dy, const Tensor& xs, const Tensor& A, const Tensor& B,
                                       double scale) {
  const char* op = "column_grad";
  expect_matrix(op, "dy", dy, -1, -1);
  expect_matrix(op, "xs", xs, dy.size(0), -1);
  expect_delta(op, A, B, xs.size(1), dy.size(1));
  const Device device(op, {{"dy", dy}, {"xs", xs}, {"A", A}, {"B", B}});
  const int64_t k = A.size(0);
  const Tensor dA = floats(A, k, xs.size(1)), dB = floats(B, dy.size(1), k);
  const Gradients gradients{dy, xs, A, B, static_cast<float>(scale), mutable_data<float>(dA), mutable_data<float>(dB)};
  for_each_type(dy.scalar_type(), [&](auto dy_type) {
    for_each_type(xs.scalar_type(), [&](auto xs_type) {
      const int most = most_ranks(device);
      for (int64_t i = 0; i < k; i += most) {
        const int ranks = static_cast<int>(std::min<int64_t>(most, k - i));
        for_rank_blocks(ranks, [&](auto blocks) {
          grad_of_ranks<decltype(dy_type), decltype(xs_type)>(device, blocks, gradients, i, ranks);
        });
      }
    });
  });
  return {dA, dB};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CUDA, m) { m.impl("column_grad", TORCH_BOX(&column_grad)); }

}  // namespace rbfast
