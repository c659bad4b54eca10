// Losses of rows of logits and their gradients on a GPU. The formulas are in divergence_job.h, the arithmetic of an id
// in divergence.cuh, that of a top-k teacher's buckets in buckets.h.
//
// Traffic: a team (one block, or on Hopper and later a cluster of up to 8) holds a whole row in its registers, and a
// dense teacher's in its shared memory. So memory is read once: 4 V bytes of a row, 8 V with a dense teacher; dz takes
// 2 V (bf16) or 4 V. The team exchanges its sums through distributed shared memory, with one barrier per row (two for
// reverse KL and JS, two more if a row's sums leave the range of fp32). dz is written after it, so it may overwrite the
// logits. Rows that no layout holds are read again for each pass.
//
// To keep memory busy, two or more blocks should fit a multiprocessor: while one team waits, others read or write. For
// text and a top-k teacher, each vector of the next row is loaded into the registers of a vector of dz once that is
// stored. The tables below choose a layout by the vocabulary.
//
// prepare_rows gathers each row's label, weights and teacher ids before the main kernel; finish_rows or finish_dense
// computes the losses after it.
//
// Ids and labels cannot be checked without synchronising the stream: if one is outside the vocabulary, the row's loss
// becomes NaN.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "cuda/dense.cuh"
#include "cuda/sparse.cuh"

namespace rbfast {
namespace {

constexpr int kMostIds = 1024;             // of a top-k teacher
constexpr int64_t kMostColumns = 1 << 30;  // of a row, so that an int can index them

// ---- layouts ----

using Kernel = void (*)(Job, Series, Scratch);
using Streamed = void (*)(Job, Series, Scratch, bool);
enum Family { kPlain, kGeneral, kForward, kReverse, kJs };

// Teams of `blocks` blocks of `threads` threads with `vectors` vectors of 4 columns each. kernels: one per family, null
// if it does not have this layout.
struct Layout {
  int blocks, threads, vectors;
  size_t sparse_bytes, dense_bytes;
  Kernel kernels[5];

  int64_t columns() const { return int64_t{blocks} * threads * vectors * kVector; }
};

template <int kBlocks, int kThreads, int kVectors, int kResident>
constexpr Layout sparse(Kernel general = sparse_rows<kBlocks, kThreads, kVectors, kResident, true>) {
  return {kBlocks,  kThreads,
          kVectors, sizeof(SparseExchange<Team<kBlocks, kThreads>>),
          0,        {sparse_rows<kBlocks, kThreads, kVectors, kResident, false>, general, nullptr, nullptr, nullptr}};
}
template <int kBlocks, int kThreads, int kVectors, int kResident>
constexpr Layout dense() {
  return {kBlocks,
          kThreads,
          kVectors,
          0,
          sizeof(DenseExchange<Team<kBlocks, kThreads>>) + kThreads * kVectors * sizeof(Vector),
          {nullptr, nullptr, dense_rows<Kind::forward, kBlocks, kThreads, kVectors, kResident>,
           dense_rows<Kind::reverse, kBlocks, kThreads, kVectors, kResident>,
           dense_rows<Kind::js, kBlocks, kThreads, kVectors, kResident>}};
}

// blocks, threads, vectors, blocks per SM that the registers must allow. The first layout that holds the row, has the
// family and fits the GPU is taken. With 19 vectors a head would spill.
const Layout kSparseLayouts[] = {sparse<1, 256, 4, 4>(),  sparse<1, 256, 16, 2>(), sparse<4, 384, 6, 3>(),
                                 sparse<4, 384, 8, 3>(),  sparse<8, 256, 7, 3>(),  sparse<8, 256, 10, 3>(),
                                 sparse<8, 256, 13, 2>(), sparse<8, 256, 16, 2>(), sparse<8, 256, 19, 2>(nullptr),
                                 sparse<8, 512, 16, 1>()};
const Layout kDenseLayouts[] = {dense<1, 256, 4, 2>(), dense<4, 256, 12, 2>(), dense<8, 256, 7, 3>(),
                                dense<8, 256, 16, 2>(), dense<8, 512, 10, 1>()};

struct Plan {
  Kernel kernel = nullptr;  // null: use `streamed`
  Streamed streamed = nullptr;
  int blocks, threads;
  size_t bytes;
  int64_t teams = 0;  // that the device holds at once

  int warps() const { return blocks * threads / kWarp; }
};

Family family_of(const Job& job) {
  if (job.teacher == nullptr) return Head(job).is_plain() && (job.ids == nullptr || job.beta == 0) ? kPlain : kGeneral;
  return job.beta == 0 ? kForward : job.beta == 1 ? kReverse : kJs;
}

// Whether the kernel that this device runs was compiled for clusters: one made for an older GPU may run on a newer one.
bool has_clusters(const Device& device) {
  cudaFuncAttributes compiled{};
  check(cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(prepare_rows)), "cudaFuncGetAttributes");
  return compiled.ptxVersion >= 90 && device.attribute(cudaDevAttrClusterLaunch) != 0;
}

template <int kBlocks>
Plan streamed_plan(Family family) {
  constexpr int kDenseThreads = 256;
  if (family == kPlain || family == kGeneral)
    return {nullptr, sparse_streamed<kBlocks>, kBlocks, kStreamThreads,
            sizeof(SparseExchange<Team<kBlocks, kStreamThreads>>)};
  const Streamed kernel = family == kForward   ? dense_streamed<Kind::forward, kBlocks, kDenseThreads>
                          : family == kReverse ? dense_streamed<Kind::reverse, kBlocks, kDenseThreads>
                                               : dense_streamed<Kind::js, kBlocks, kDenseThreads>;
  return {nullptr, kernel, kBlocks, kDenseThreads, sizeof(DenseExchange<Team<kBlocks, kDenseThreads>>)};
}

// The fastest plan for a device whose clusters all fit.
Plan best_plan(const Device& device, const Job& job) {
  const Family family = family_of(job);
  const bool is_dense = job.teacher != nullptr, clusters = has_clusters(device);
  const size_t shared_limit = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const Layout *first = is_dense ? std::begin(kDenseLayouts) : std::begin(kSparseLayouts),
               *last = is_dense ? std::end(kDenseLayouts) : std::end(kSparseLayouts);
  const bool can_hold = !is_dense || (Head(job).is_plain() && job.teacher_vocabulary >= job.vocabulary);
  const auto fits = [&](const Layout& x) {
    return can_hold && x.columns() >= job.vocabulary && x.kernels[family] != nullptr && (x.blocks == 1 || clusters) &&
           x.sparse_bytes + x.dense_bytes <= shared_limit;
  };
  const Layout* found = std::find_if(first, last, fits);
  if (found == last) return clusters ? streamed_plan<8>(family) : streamed_plan<1>(family);
  return {found->kernels[family], nullptr, found->blocks, found->threads, found->sparse_bytes + found->dense_bytes};
}

// How many teams of a plan a device holds at once. The driver is asked once.
template <typename AnyKernel>
int teams_that_fit(const Device& device, const Plan& plan, AnyKernel kernel) {
  return once(std::tuple(kernel, device.key()), [&] {
    device.allow_shared_memory(kernel);
    return device.clusters_that_fit({plan.blocks, 1, plan.threads, plan.blocks, plan.bytes}, kernel);
  });
}

// The plan must not depend on the number of rows or on their addresses: a row has the same bits in every batch.
Plan make_plan(const Device& device, const Job& job) {
  Plan plan = best_plan(device, job);
  plan.teams =
      plan.kernel != nullptr ? teams_that_fit(device, plan, plan.kernel) : teams_that_fit(device, plan, plan.streamed);
  // A small slice of a GPU may have too few multiprocessors for a cluster.
  return plan.teams > 0 ? plan : streamed_plan<1>(family_of(job));
}

// Allocates the memory of a call's Scratch.
Tensor make_scratch(const Tensor& logits, const Job& job, int warps, Scratch& scratch) {
  const int64_t k = job.ids == nullptr ? 0 : job.k, terms = job.teacher == nullptr ? 0 : warps;
  const int64_t floats = (sizeof(RowInfo) + sizeof(Sums) + k * sizeof(Entry)) / sizeof(float) + terms;
  const Tensor memory = empty(logits, {job.rows * floats});
  scratch.rows = reinterpret_cast<RowInfo*>(memory.mutable_data_ptr());
  scratch.sums = reinterpret_cast<Sums*>(scratch.rows + job.rows);
  scratch.entries = reinterpret_cast<Entry*>(scratch.sums + job.rows);
  scratch.terms = reinterpret_cast<float*>(scratch.entries + job.rows * k);
  return memory;
}

void launch(const Device& device, const Job& job, const Plan& plan, const Scratch& scratch, const Losses& losses) {
  constexpr int kRows = kPrepareThreads / kWarp;
  const Series series = make_series(job.beta);
  device.launch({(job.rows + kRows - 1) / kRows, 1, kPrepareThreads}, prepare_rows, job, scratch);
  if (plan.kernel != nullptr) {
    const int64_t teams = std::min(job.rows, plan.teams);
    device.launch({teams * plan.blocks, 1, plan.threads, plan.blocks, plan.bytes}, plan.kernel, job, series, scratch);
  } else {
    const bool needs_sync = job.dz == static_cast<void*>(job.logits) && job.dz_is_bf16;
    const Shape shape{job.rows * plan.blocks, 1, plan.threads, plan.blocks, plan.bytes};
    device.allow_shared_memory(plan.streamed);
    device.launch(shape, plan.streamed, job, series, scratch, needs_sync);
  }
  if (job.teacher != nullptr)
    return device.launch({job.rows, 1, kWarp}, finish_dense, job, scratch, plan.warps(), losses);
  const size_t bytes = job.ids == nullptr ? 0 : (job.k + 1) * sizeof(Bucket);
  device.launch({job.rows, 1, kWarp, 1, bytes}, finish_rows, job, scratch, losses);
}

std::tuple<Tensor, Tensor, Tensor> divergence_rows_(Tensor logits, std::optional<Tensor> dz, const Tensor& labels,
                                                    std::optional<Tensor> kl_weight, std::optional<Tensor> ce_weight,
                                                    std::optional<Tensor> temperature, std::optional<Tensor> ids,
                                                    std::optional<Tensor> logprobs, std::optional<Tensor> teacher,
                                                    std::optional<Tensor> bias, double beta, double logit_scale,
                                                    std::optional<double> softcap, double kl_factor, double ce_factor,
                                                    double temperature_factor) {
  const Device device("divergence_rows_", {{"logits", logits},
                                           {"dz", dz},
                                           {"labels", labels},
                                           {"kl_weight", kl_weight},
                                           {"ce_weight", ce_weight},
                                           {"temperature", temperature},
                                           {"ids", ids},
                                           {"logprobs", logprobs},
                                           {"teacher", teacher},
                                           {"bias", bias}});
  const Arguments arguments(logits, dz, labels, kl_weight, ce_weight, temperature, ids, logprobs, teacher, bias, beta,
                            logit_scale, softcap, kl_factor, ce_factor, temperature_factor);
  const Job& job = arguments.job;
  expect(job.k <= kMostIds, "divergence_rows_: ids must be [T, k] with k at most ", kMostIds, " on a GPU, got ", job.k);
  expect(job.vocabulary <= kMostColumns, "divergence_rows_: logits must have at most 2^30 columns, got ",
         job.vocabulary);
  const Tensor divergence = empty(logits, {job.rows}), ce = empty(logits, {job.rows}), loss = empty(logits, {job.rows});
  const Plan plan = make_plan(device, job);
  Scratch scratch;
  const Tensor memory = make_scratch(logits, job, plan.warps(), scratch);
  launch(device, job, plan, scratch,
         {mutable_data<float>(divergence), mutable_data<float>(ce), mutable_data<float>(loss)});
  return {divergence, ce, loss};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CUDA, m) { m.impl("divergence_rows_", TORCH_BOX(&divergence_rows_)); }

}  // namespace rbfast
