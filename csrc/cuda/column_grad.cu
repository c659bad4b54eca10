// column_grad on a GPU. The delta of a frozen weight W [out, in] is dW[:, cols] = scale * B A, so its gradients need,
// for xs = x[:, cols],
//     H = xs A^T,  dB = scale * dy^T H,  dH = dy B,  dA = scale * dH^T xs.
//
// Traffic: dy is the only large operand, T * out values. `sweep` copies it through shared memory once and computes both
// of its products there, on tensor cores. Their partners H and B are fp32, so each is split into two bf16 pieces (three
// if dy is fp32). A block takes a strip of features and a run of tokens; a warp keeps B and dB of its features in
// registers. For each tile of 32 tokens the warps' parts of dH are summed in shared memory, so only k floats per token
// and strip go back to memory: 4 k / 512 of the bytes of a bf16 dy for strips of 256.
//
// Three launches: `project` computes H and splits B, `sweep` over dy computes dB and dH, `sweep` over xs computes dA.
// Blocks get equal shares of the list of all (strip, tile of tokens) and write partial sums to memory. After a grid
// barrier they share the work of adding these up; the launch is cooperative, so the device holds all blocks at once.
// The shapes and the number of multiprocessors fix the order of every sum, whichever block comes first.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cuda/column_sweep.cuh"

namespace rbfast {
namespace {

// ---- launching ----

// Bytes of shared memory per block, with this many blocks on a multiprocessor.
int64_t shared_per_block(const Device& device, int blocks) {
  constexpr int kReserved = 1024;  // by the system, per block
  const int all = device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / blocks - kReserved;
  return std::min(all, device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// How a sweep runs on a device: tiles and bytes of shared memory per block, and the blocks that it holds at once.
struct Fit {
  int stages;
  size_t shared;
  int64_t blocks;
};

// The key of a device for `once`.
std::pair<int, int> key_of(const Device& device) {
  return {device.index(), device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

template <typename T, int kN, bool kDot>
Fit fit_of(const Device& device) {
  return once(key_of(device), [&] {
    constexpr int64_t kMostStages = 4, kStage = kStageBytes<T, kN, kDot>, kScratch = kScratchBytes<kN, kDot>;
    int resident = kBlocks<T, kN, kDot>;
    while (resident > 1 && shared_per_block(device, resident) < 2 * kStage + kScratch) --resident;
    const int64_t room = shared_per_block(device, resident) - kScratch;
    Fit fit{static_cast<int>(std::min(kMostStages, room / kStage)), 0, 0};
    fit.shared = fit.stages * kStage + kScratch;
    device.allow_shared_memory(sweep<T, kN, kDot>);
    const int64_t all = device.clusters_that_fit({1, 1, kSweepThreads, 1, fit.shared}, sweep<T, kN, kDot>);
    fit.blocks = std::min<int64_t>(all, resident * device.attribute(cudaDevAttrMultiProcessorCount));
    expect(fit.blocks > 0, "column_grad: this GPU has too little shared memory for a block: ", fit.shared, " bytes");
    return fit;
  });
}

// Ranks per sweep: as many as a block has shared memory for.
int most_ranks(const Device& device) {
  constexpr int kNeeded = 2 * kStageBytes<float, 4, true> + kScratchBytes<4, true>;
  return once(key_of(device), [&] { return shared_per_block(device, 1) >= kNeeded ? kMostRanks : kMostRanks - 8; });
}

// Shares the units of a matrix between blocks, at least `least` to each. Without any units, one block writes sums of 0.
template <typename Tile>
Shares shares_of(const Fit& fit, int64_t tokens, int64_t n, int64_t least) {
  const int64_t strips = ceil_div(n, Tile::kWidth), tiles = ceil_div(tokens, kTokens), units = strips * tiles;
  expect(units <= INT32_MAX / 2, "column_grad: too large for one call: ", tokens, " x ", n, "; split the tokens");
  return {strips, tiles, std::max<int64_t>(1, std::min(fit.blocks, units / least))};
}

// One allocation, cut into pieces that start at multiples of 16 bytes.
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

template <typename T, int kN, bool kDot>
void launch_sweep(const Device& device, const Fit& fit, const Sweep<T>& s) {
  static_assert(2 * sizeof(SumStorage) <= 2 * kStageBytes<T, kN, kDot>);
  device.launch({s.shares.blocks, 1, kSweepThreads, 1, fit.shared, true}, sweep<T, kN, kDot>, s);
}

template <typename Y, typename X, int kN>
void grad_of_ranks(const Device& device, RankBlocks<kN>, const Gradients& g, int64_t first, int k) {
  using TileY = Tile<Y, true>;
  using TileX = Tile<X, false>;
  const Matrix<Y> y(g.dy);
  const Matrix<X> x(g.xs);
  const Fit fit_y = fit_of<Y, kN, true>(device), fit_x = fit_of<X, kN, false>(device);
  // Whatever its share, a block writes parts of dA as large as three tiles of xs: give it at least 4 units.
  Shares of_y = shares_of<TileY>(fit_y, y.tokens, y.n, 1), of_x = shares_of<TileX>(fit_x, x.tokens, x.n, 4);
  const int64_t tiles = of_y.tiles, of_tile = kTokens / kSlice * kN * kWarp;
  Workspace work;
  const int64_t hidden = work.add<Pair>(tiles * of_tile * kPartners<Y>);
  const int64_t d_hidden = work.add<Pair>(tiles * of_tile * kPartners<X>);
  const int64_t B = work.add<Pair>(ceil_div(y.n, kSlice) * kN * kPartners<Y> * kWarp);
  const int64_t dots = work.add<Floats>(of_y.strips * tiles * of_tile);
  const int64_t dB_parts = work.add<Floats>((of_y.blocks + of_y.strips) * TileY::kStrip * kN * kWarp);
  const int64_t dA_parts = work.add<Floats>((of_x.blocks + of_x.strips) * TileX::kStrip * kN * kWarp);
  work.allocate(g.dy);
  of_y.parts = work.at<Floats>(dB_parts);
  of_x.parts = work.at<Floats>(dA_parts);
  const int64_t all = g.A.size(0);
  const Factor a(g.A, g.A.stride(0), g.A.stride(1), first, k), b(g.B, g.B.stride(1), g.B.stride(0), first, k);
  const Sum dB(of_y, g.dB + first, all, 1, k, g.scale), dA(of_x, g.dA + first * x.n, 1, x.n, k, g.scale);
  const Dots parts{work.at<Floats>(dots), work.at<Pair>(d_hidden), kPartners<X>};
  const Operands of_B{b, y.n, work.at<Pair>(B), kPartners<Y>};
  project(device, g.xs, a, {work.at<Pair>(hidden), kPartners<Y>}, &of_B);
  launch_sweep<Y, kN, true>(device, fit_y, {y, of_y, fit_y.stages, work.at<Pair>(hidden), dB, of_B.to, parts});
  launch_sweep<X, kN, false>(device, fit_x, {x, of_x, fit_x.stages, work.at<Pair>(d_hidden), dA, nullptr, {}});
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
