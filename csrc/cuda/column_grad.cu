// column_grad on a GPU. The delta of a frozen weight W [out, in] is dW[:, cols] = scale * B A, so its gradients need,
// for xs = x[:, cols],
//     H = xs A^T,  dB = scale * dy^T H,  dH = dy B,  dA = scale * dH^T xs.
//
// Traffic: dy is the only large operand, T * out values. `sweep` copies it through shared memory once and does both of
// its products there, on tensor cores. What they need as partners, H and B, is fp32: it is cut into two pieces of bf16
// (three where dy is fp32). A block takes a strip of features and a run of tokens, a warp keeps B and dB of its
// features in registers. Per tile of 32 tokens the warps' parts of dH are added up in shared memory, so what goes back
// to memory is k floats for every token and strip: 4 k / 512 of the bytes of a bf16 dy for strips of 256.
//
// Five launches: `project` makes H, `sweep` over dy leaves parts of dB and dH, `sum_hidden` adds up dH, `sweep` over xs
// leaves parts of dA, `sum_parts` adds up dA and dB. Work is cut into equal shares for all multiprocessors: block b
// does units [b * share, ...) of the list of all (strip, tile of tokens). Every sum runs in an order fixed by the
// shapes and the number of multiprocessors, without atomics.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cuda/column_sweep.cuh"

namespace rbfast {
namespace {

// ---- sums of parts ----

// The sum of parts[i * step] over [begin, end), which `team` warps share; complete in the first of a team.
__device__ Floats sum_of_parts(const Floats* parts, int64_t step, int begin, int end, int team, Floats* scratch) {
  const int lane = threadIdx.x % kWarp, member = threadIdx.x / kWarp % team;
  const int each = (end - begin + team - 1) / team, from = begin + member * each;
  const int to = from + each < end ? from + each : end;
  Floats sum{};
#pragma unroll 8
  for (int i = from; i < to; ++i) sum = sum + read_floats(parts + i * step + lane);
  scratch[threadIdx.x] = sum;
  __syncthreads();
  for (int w = 1; member == 0 && w < team; ++w) sum = sum + scratch[threadIdx.x + w * kWarp];
  return sum;
}

// dH, from its parts, as operands with `pieces` pieces. A block adds up 16 tokens by 8 ranks.
__global__ void __launch_bounds__(kThreads) sum_hidden(const Dots dots, int pieces, Pair* to) {
  constexpr int kRow = 9;
  RBFAST_SHARED_MEMORY(memory);
  Floats* scratch = reinterpret_cast<Floats*>(memory);
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  const Floats sum = sum_of_parts(dots.parts + blockIdx.x * int64_t{kWarp}, gridDim.x * int64_t{kWarp}, 0, dots.strips,
                                  kWarps, scratch);
  if (threadIdx.x >= kWarp) return;
  float* total = reinterpret_cast<float*>(scratch + kThreads);  // [16, kRow]
#pragma unroll
  for (int e = 0; e < 4; ++e) total[(g + e / 2 * 8) * kRow + 2 * c + e % 2] = sum.value[e];
  __syncwarp();
  uint32_t upper[3], lower[3];
  split(total[2 * c * kRow + g], total[(2 * c + 1) * kRow + g], upper);
  split(total[(2 * c + 8) * kRow + g], total[(2 * c + 9) * kRow + g], lower);
#pragma unroll
  for (int p = 0; p < 3; ++p)
    if (p < pieces) to[(blockIdx.x * int64_t{pieces} + p) * kWarp + lane] = {{upper[p], lower[p]}};
}

// sum[v * feature + i * rank] = scale * the sum over the blocks that had v's strip, which a team of warps adds up.
struct Sum {
  Shares shares;
  int n, strip_leaves, k, rank_blocks;
  float scale;
  float* sum;
  int64_t feature, rank;
  int team, blocks;

  Sum(const Shares& shares, int64_t n, int strip_leaves, int k, int rank_blocks, float scale, float* sum,
      int64_t feature, int64_t rank)
      : shares(shares),
        n(static_cast<int>(n)),
        strip_leaves(strip_leaves),
        k(k),
        rank_blocks(rank_blocks),
        scale(scale),
        sum(sum),
        feature(feature),
        rank(rank),
        team(shares.tiles / shares.share > 8 ? kWarps : 1),  // few parts are read at once by one warp
        blocks(static_cast<int>(ceil_div(ceil_div(n, kLeaf) * rank_blocks, kWarps / team))) {}
};

__global__ void __launch_bounds__(kThreads) sum_parts(const Sum first, const Sum second) {
  RBFAST_SHARED_MEMORY(memory);
  const bool is_first = static_cast<int>(blockIdx.x) < first.blocks;
  const Sum s = is_first ? first : second;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int index = (blockIdx.x - (is_first ? 0 : first.blocks)) * (kWarps / s.team) + warp / s.team;
  const int leaf = index / s.rank_blocks, j = index % s.rank_blocks, strip = leaf / s.strip_leaves;
  const int tiles = static_cast<int>(s.shares.tiles), share = static_cast<int>(s.shares.share);
  const bool is_inside = tiles > 0 && leaf * kLeaf < s.n;
  const int begin = is_inside ? strip * tiles / share : 0, end = is_inside ? ((strip + 1) * tiles - 1) / share + 1 : 0;
  const int64_t step = static_cast<int64_t>(s.strip_leaves) * s.rank_blocks * kWarp;  // from block to block
  const Floats* parts = s.shares.parts + strip * step + (leaf % s.strip_leaves * s.rank_blocks + j) * kWarp;
  const Floats sum = sum_of_parts(parts, step, begin, end, s.team, reinterpret_cast<Floats*>(memory));
  if (warp % s.team > 0) return;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int v = leaf * kLeaf + lane / 4 + e / 2 * 8, i = 8 * j + lane % 4 * 2 + e % 2;
    if (v < s.n && i < s.k) s.sum[v * s.feature + i * s.rank] = s.scale * sum.value[e];
  }
}

// ---- launching ----

// Bytes of shared memory for a block, of so many on a multiprocessor.
int64_t shared_room(const Device& device, int blocks) {
  constexpr int kReserved = 1024;  // by the system, for each block
  const int all = device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / blocks - kReserved;
  return std::min(all, device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Blocks of a sweep that a multiprocessor has room for, with two tiles each.
template <typename T, int kN, bool kDot>
int sweep_blocks(const Device& device) {
  constexpr int kLeast = 2 * kStageBytes<T, kN> + kScratchBytes<kN, kDot>;
  return shared_room(device, kBlocks<T, kN>) >= kLeast ? kBlocks<T, kN> : 1;
}

// Ranks at a time: all that one block has room for.
int most_ranks(const Device& device) {
  constexpr int kNeeded = 2 * kStageBytes<float, 4> + kScratchBytes<4, true>;
  return shared_room(device, 1) >= kNeeded ? kMostRanks : kMostRanks - 8;
}

// How the units of a matrix are shared.
template <typename T, int kN, bool kDot>
Shares shares_of(const Device& device, int64_t tokens, int64_t n) {
  Shares s{ceil_div(n, Tile<T>::kWidth), ceil_div(tokens, kTokens), 1, 0, nullptr};
  const int64_t units = s.strips * s.tiles;
  const int64_t busy = sweep_blocks<T, kN, kDot>(device) * device.attribute(cudaDevAttrMultiProcessorCount);
  s.share = std::max<int64_t>(1, ceil_div(units, busy));
  s.blocks = ceil_div(units, s.share);
  return s;
}

template <typename T, int kN, bool kDot>
void launch_sweep(const Device& device, Sweep<T> s) {
  constexpr int64_t kMostStages = 4;
  const int64_t room = shared_room(device, sweep_blocks<T, kN, kDot>(device)) - kScratchBytes<kN, kDot>;
  s.stages = static_cast<int>(std::min(kMostStages, room / kStageBytes<T, kN>));
  const size_t shared = s.stages * kStageBytes<T, kN> + kScratchBytes<kN, kDot>;
  allow_shared(sweep<T, kN, kDot>, shared);
  device.launch({s.shares.blocks, 1, kThreads, 1, shared}, sweep<T, kN, kDot>, s);
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
  Shares of_y = shares_of<Y, kN, true>(device, y.tokens, y.n), of_x = shares_of<X, kN, false>(device, x.tokens, x.n);
  const int64_t tiles = of_y.tiles, of_tile = kTokens / kLeaf * kN * kWarp;
  Workspace work;
  const int64_t hidden = work.add<Pair>(tiles * of_tile * kPartners<Y>);
  const int64_t d_hidden = work.add<Pair>(tiles * of_tile * kPartners<X>);
  const int64_t dots = work.add<Floats>(of_y.strips * tiles * of_tile);
  const int64_t dB_parts = work.add<Floats>((of_y.blocks + of_y.strips) * Tile<Y>::kStrip * kN * kWarp);
  const int64_t dA_parts = work.add<Floats>((of_x.blocks + of_x.strips) * Tile<X>::kStrip * kN * kWarp);
  work.allocate(g.dy);
  of_y.parts = work.at<Floats>(dB_parts);
  of_x.parts = work.at<Floats>(dA_parts);
  const Factor a(g.A, g.A.stride(0), g.A.stride(1), first, k), b(g.B, g.B.stride(1), g.B.stride(0), first, k);
  project(device, g.xs, a, {work.at<Pair>(hidden), kPartners<Y>});
  const Dots parts{work.at<Floats>(dots), of_y.strips, tiles};
  launch_sweep<Y, kN, true>(device, {y, of_y, 0, work.at<Pair>(hidden), b, parts});
  constexpr size_t kShared = kThreads * sizeof(Floats) + 16 * 9 * sizeof(float);
  const int pieces = kPartners<X>;
  device.launch({tiles * kTokens / kLeaf * kN, 1, kThreads, 1, kShared}, sum_hidden, parts, pieces,
                work.at<Pair>(d_hidden));
  launch_sweep<X, kN, false>(device, {x, of_x, 0, work.at<Pair>(d_hidden), b, parts});
  const int64_t all = g.A.size(0);
  const Sum dB(of_y, y.n, Tile<Y>::kStrip, k, kN, g.scale, g.dB + first, all, 1);
  const Sum dA(of_x, x.n, Tile<X>::kStrip, k, kN, g.scale, g.dA + first * x.n, 1, x.n);
  device.launch({int64_t{dB.blocks} + dA.blocks, 1, kThreads, 1, kThreads * sizeof(Floats)}, sum_parts, dB, dA);
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
