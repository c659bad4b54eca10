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
// Three launches: `project_tile` computes H and splits B, a `sweep` over dy computes dB and dH, and a `sweep` over xs
// computes dA. Matrices that share xs, such as q, k and v, share the launches.
// Blocks get equal shares of the list of all (strip, tile of tokens) and write partial sums to memory. After a grid
// barrier they share the work of adding these up; the launch is cooperative, so the device holds all blocks at once.
// The shapes and the number of multiprocessors fix the order of every sum, whichever block finishes first.
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

// How a sweep runs on a device: tiles and bytes of shared memory per block, and how many blocks the device holds at
// once.
struct Fit {
  int stages;
  size_t shared;
  int64_t blocks;
};

template <typename T, int kN, bool kDot>
Fit fit_of(const Device& device) {
  return once(device.key(), [&] {
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
  return once(device.key(), [&] { return shared_per_block(device, 1) >= kNeeded ? kMostRanks : kMostRanks - 8; });
}

// Shares the units of matrices between blocks, at least `least` to each. Without any units, one block writes sums of 0.
Shares shares_of(const Fit& fit, int64_t tokens, int64_t strips, int64_t least) {
  const int64_t tiles = ceil_div(tokens, kTokens), units = strips * tiles;
  expect(units <= INT32_MAX / 2, "column_grad: too large for one call: ", tokens, " tokens of ", strips,
         " strips of features; split the tokens");
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

// The factors of one matrix's delta, and their gradients.
struct Delta {
  Tensor dy, A, B, dA, dB;
};

template <typename T, int kN, bool kDot>
void launch_sweep(const Device& device, const Fit& fit, const Sweep<T>& s) {
  static_assert(2 * sizeof(SumStorage) <= 2 * kStageBytes<T, kN, kDot>);
  device.launch({s.shares.blocks, 1, kSweepThreads, 1, fit.shared, true}, sweep<T, kN, kDot>, s);
}

// Gradients of ranks first .. first + k, for up to kMostMatrices deltas that share xs and dy's dtype.
template <typename Y, typename X, int kN>
void grad_of_ranks(const Device& device, RankBlocks<kN>, const std::vector<Delta>& deltas, const Tensor& xs,
                   float scale, int64_t first, int k) {
  using TileY = Tile<Y, true>;
  using TileX = Tile<X, false>;
  const Matrix<X> x(xs);
  const Fit fit_y = fit_of<Y, kN, true>(device), fit_x = fit_of<X, kN, false>(device);
  const int matrices = static_cast<int>(deltas.size()), strips_x = static_cast<int>(ceil_div(x.n, TileX::kWidth));
  int64_t strips_y = 0;
  for (const Delta& delta : deltas) strips_y += ceil_div(delta.dy.size(1), TileY::kWidth);
  // Whatever its share, a block writes parts of dA as large as three tiles of xs: give it at least 4 units.
  Shares of_y = shares_of(fit_y, x.tokens, strips_y, 1),
         of_x = shares_of(fit_x, x.tokens, int64_t{matrices} * strips_x, 4);
  const int64_t tiles = of_y.tiles, of_tile = kTokens / kSlice * kN * kWarp, of_slice = kN * kPartners<Y> * kWarp;
  Workspace work;
  const int64_t hidden_at = work.add<Pair>(matrices * tiles * of_tile * kPartners<Y>);
  const int64_t d_hidden_at = work.add<Pair>(matrices * tiles * of_tile * kPartners<X>);
  const int64_t B_at = work.add<Pair>(strips_y * TileY::kStrip * of_slice);
  const int64_t dots_at = work.add<Floats>(strips_y * tiles * of_tile);
  const int64_t dB_parts = work.add<Floats>((of_y.blocks + of_y.strips) * TileY::kStrip * kN * kWarp);
  const int64_t dA_parts = work.add<Floats>((of_x.blocks + of_x.strips) * TileX::kStrip * kN * kWarp);
  work.allocate(xs);
  of_y.parts = work.at<Floats>(dB_parts);
  of_x.parts = work.at<Floats>(dA_parts);
  Pair *hidden = work.at<Pair>(hidden_at), *d_hidden = work.at<Pair>(d_hidden_at), *B = work.at<Pair>(B_at);
  Sweep<Y> over_y{of_y, fit_y.stages, hidden, B, {work.at<Floats>(dots_at), d_hidden, kPartners<X>}};
  Sweep<X> over_x{of_x, fit_x.stages, d_hidden};
  std::vector<Projection> projections;
  int strip = 0;
  for (int i = 0; i < matrices; ++i) {
    const Delta& delta = deltas[i];
    const Matrix<Y> y(delta.dy);
    const int64_t all = delta.A.size(0);
    const Factor a(delta.A, delta.A.stride(0), delta.A.stride(1), first, k);
    const Factor b(delta.B, delta.B.stride(1), delta.B.stride(0), first, k);
    const Hidden to{hidden + i * tiles * of_tile * kPartners<Y>, kPartners<Y>};
    projections.push_back({a, to, {b, y.n, B + strip * TileY::kStrip * of_slice, kPartners<Y>}});
    over_y.each[i] = {y, {mutable_data<float>(delta.dB) + first, all, 1, k, scale}, strip};
    over_x.each[i] = {x, {mutable_data<float>(delta.dA) + first * x.n, 1, x.n, k, scale}, i * strips_x};
    strip += static_cast<int>(ceil_div(y.n, TileY::kWidth));
  }
  project(device, xs, projections);
  launch_sweep<Y, kN, true>(device, fit_y, over_y);
  launch_sweep<X, kN, false>(device, fit_x, over_x);
}

void grad_of_deltas(const Device& device, const std::vector<Delta>& deltas, const Tensor& xs, float scale) {
  for_each_type(deltas.front().dy.scalar_type(), [&](auto dy_type) {
    for_each_type(xs.scalar_type(), [&](auto xs_type) {
      const int64_t k = deltas.front().A.size(0), most = most_ranks(device);
      for (int64_t i = 0; i < k; i += most) {
        const int ranks = static_cast<int>(std::min(most, k - i));
        for_rank_blocks(ranks, [&](auto blocks) {
          grad_of_ranks<decltype(dy_type), decltype(xs_type)>(device, blocks, deltas, xs, scale, i, ranks);
        });
      }
    });
  });
}

bool share_launches(const Delta& a, const Delta& b) {
  return a.dy.scalar_type() == b.dy.scalar_type() && a.A.size(0) == b.A.size(0);
}

std::vector<Delta> checked_deltas(const char* op, const std::vector<Tensor>& dy, const Tensor& xs,
                                  const std::vector<Tensor>& A, const std::vector<Tensor>& B) {
  std::vector<Delta> deltas;
  for (size_t i = 0; i < dy.size(); ++i) {
    expect_matrix(op, "dy", dy[i], -1, -1);
    expect_matrix(op, "xs", xs, dy[i].size(0), -1);
    expect_delta(op, A[i], B[i], xs.size(1), dy[i].size(1));
    const Device device(op, {{"dy", dy[i]}, {"xs", xs}, {"A", A[i]}, {"B", B[i]}});
    const int64_t k = A[i].size(0);
    deltas.push_back({dy[i], A[i], B[i], floats(A[i], k, xs.size(1)), floats(B[i], dy[i].size(1), k)});
  }
  return deltas;
}

using Gradients = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;

Gradients column_grad_all(std::vector<Tensor> dy, const Tensor& xs, std::vector<Tensor> A, std::vector<Tensor> B,
                          double scale) {
  const char* op = "column_grad_all";
  expect_lists(op, dy.size(), {A.size(), B.size()});
  const std::vector<Delta> deltas = checked_deltas(op, dy, xs, A, B);
  const Device device(op, {{"xs", xs}});
  Gradients gradients;
  std::vector<Delta> together;
  for (const Delta& delta : deltas) {
    if (!together.empty() && (together.size() == kMostMatrices || !share_launches(together.front(), delta))) {
      grad_of_deltas(device, together, xs, static_cast<float>(scale));
      together.clear();
    }
    together.push_back(delta);
    std::get<0>(gradients).push_back(delta.dA);
    std::get<1>(gradients).push_back(delta.dB);
  }
  if (!together.empty()) grad_of_deltas(device, together, xs, static_cast<float>(scale));
  return gradients;
}

std::tuple<Tensor, Tensor> column_grad(const Tensor& dy, const Tensor& xs, const Tensor& A, const Tensor& B,
                                       double scale) {
  const std::vector<Delta> one = checked_deltas("column_grad", {dy}, xs, {A}, {B});
  grad_of_deltas(Device("column_grad", {{"xs", xs}}), one, xs, static_cast<float>(scale));
  return {one.front().dA, one.front().dB};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CUDA, m) {
  m.impl("column_grad", TORCH_BOX(&column_grad));
  m.impl("column_grad_all", TORCH_BOX(&column_grad_all));
}

}  // namespace rbfast
