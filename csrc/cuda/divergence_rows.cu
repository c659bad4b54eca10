// Losses of rows of logits and their gradient on a GPU; what is computed is defined in rbfast/reference.py, the
// arithmetic of a value is in divergence_math.h, that of a top-k teacher's buckets in buckets.h.
//
// A row belongs to a team: one block, or on Hopper and later a cluster of up to 8, whose members take turns along the row
// a tile at a time and exchange their sums through distributed shared memory. So few rows are under way at once, and
// what a member reads it keeps in its shared memory as far as that goes; the later passes over the row read the rest
// again, from the level-2 cache on a large GPU. A 128k row of fp32 logits is 64 KB for each of 8 members: it is read from
// memory once, and three blocks share an SM, so that one loads while another computes.
//
// dz may lie over the logits. In fp32 each thread writes where it has just read. In bf16, element v covers logit v / 2:
// where the first half of a row is kept, those are logits that were read before the team first met. Where it is not,
// the team goes through the row in step: it meets between reading a stretch and writing its gradients, which can only
// cover what has been read.
//
// Ids and labels cannot be checked without waiting for the stream: a row with one outside the vocabulary becomes NaN.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cuda/row.cuh"

namespace rbfast {
namespace {

constexpr int kBlocks = 3;  // that share an SM
constexpr int kLargestTeam = 8;
constexpr int kMostIds = 1024;             // of a top-k teacher
constexpr int64_t kMostColumns = 1 << 30;  // of a row, so that an int counts them

// ---- text alone, or a top-k teacher ----

struct Entry {
  Bucket bucket;
  double z;  // -inf: padding; NaN: an id outside the vocabulary
  int64_t id;
  float gradient;
};

// Reads the teacher's ids and leaves holes in the logits, so that what is left is the tail. The leader alone.
__device__ double take_support(const Job& job, const Row& row, const Source& z, Entry* entries) {
  const int64_t k = job.ids == nullptr ? 0 : job.k;
  float* logits = job.logits + row.index * job.logits_stride;
  for (int64_t i = threadIdx.x; i < k; i += kThreads) {
    const int64_t id = job.ids[row.index * k + i];
    const bool is_used = id >= 0 && id < job.vocabulary;
    entries[i].id = is_used ? id : -1;
    entries[i].z = is_used ? z.logit(logits[id], id) : id == -1 ? -INFINITY : NAN;
    entries[i].bucket.log_p = id == -1 ? -INFINITY : job.logprobs[row.index * k + i];
  }
  const double label = row.has_label() ? z.logit(logits[row.label], row.label) : NAN;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < k; i += kThreads)
    if (entries[i].id >= 0) logits[entries[i].id] = as_lanes(kHoleBits);
  return label;
}

// f(i) over the buckets 0 .. k, a lane at a time, summed.
template <typename F>
__device__ double sum_buckets(int64_t count, const F& f) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kWarp) sum += f(i);
  return warp_sum(sum);
}

// Brings the teacher's log-probs at temperature 1 to the row's, with the tail as the last bucket.
__device__ void teacher_buckets(const Row& row, const Total& tail, bool has_tail, Entry* entries, int64_t k) {
  const double inv_tau = row.inv_tau;
  const double total = sum_buckets(k, [&](int64_t i) { return exp(entries[i].bucket.log_p); });
  const double excess = total > 1 ? log(total) : 0;  // over 1 by rounding: scaled back to 1
  double rest = has_tail ? log1p(-(total > 1 ? 1 : total)) : -INFINITY;
  const bool is_plain = inv_tau == 1 && has_tail;
  // At another temperature the tail's share needs its shape: the student's.
  if (!is_plain && has_tail) rest = rest * inv_tau + log(tail.at_tau) - log(tail.at_one) * inv_tau;
  if (threadIdx.x == 0) entries[k].bucket.log_p = rest;
  for (int64_t i = threadIdx.x; i < k; i += kWarp)
    entries[i].bucket.log_p = (entries[i].bucket.log_p - excess) * (is_plain ? 1 : inv_tau);
  __syncwarp();
  if (is_plain) return;
  double top = -INFINITY;
  for (int64_t i = threadIdx.x; i <= k; i += kWarp) top = entries[i].bucket.log_p > top ? entries[i].bucket.log_p : top;
  top = warp_max(top);
  const double sum = sum_buckets(k + 1, [&](int64_t i) { return exp(entries[i].bucket.log_p - top); });
  for (int64_t i = threadIdx.x; i <= k; i += kWarp) entries[i].bucket.log_p -= top + log(sum);
  __syncwarp();
}

// D over the buckets, whose gradients it leaves in them.
__device__ double bucket_divergence(double beta, Entry* entries, int64_t count) {
  double mean = 0;
  const double value = sum_buckets(count, [&](int64_t i) {
    const BucketTerm term = bucket_term(entries[i].bucket.log_p, entries[i].bucket.log_q, beta);
    entries[i].bucket.gradient = term.score;
    mean += term.q * term.score;
    return term.divergence;
  });
  mean = warp_sum(mean);
  if (beta > 0)
    for (int64_t i = threadIdx.x; i < count; i += kWarp)
      entries[i].bucket.gradient = score_gradient(entries[i].bucket.log_q, entries[i].bucket.gradient, mean, beta);
  __syncwarp();
  return value < 0 ? 0 : value;
}

// The scalars of a row, by the leader's first warp: its losses, the gradient of the support, and what the tail's needs.
__device__ void solve_sparse(const Job& job, const Row& row, const Total& tail, double z_label, Entry* entries,
                             Shared& shared, float* divergence, float* ce) {
  const int64_t k = job.ids == nullptr ? 0 : job.k;
  const double inv_tau = row.inv_tau;
  const bool has_tail = tail.max > kNone || isnan(tail.at_one);
  double top = tail.max;
  for (int64_t i = threadIdx.x; i < k; i += kWarp) top = entries[i].z > top ? entries[i].z : top;
  top = warp_max(top);
  const double below = tail.max - top;
  double sum_tau = sum_buckets(k, [&](int64_t i) { return exp((entries[i].z - top) * inv_tau); });
  double sum_one = sum_buckets(k, [&](int64_t i) { return exp(entries[i].z - top); });
  if (has_tail) sum_tau += tail.at_tau * exp(below * inv_tau), sum_one += tail.at_one * exp(below);
  const double log_tau = log(sum_tau), log_one = log(sum_one);
  double value = 0, tail_pull = 0;
  if (job.ids != nullptr) {
    for (int64_t i = threadIdx.x; i < k; i += kWarp) entries[i].bucket.log_q = (entries[i].z - top) * inv_tau - log_tau;
    if (threadIdx.x == 0)
      entries[k].bucket.log_q = has_tail ? below * inv_tau + log(tail.at_tau) - log_tau : -INFINITY;
    __syncwarp();
    teacher_buckets(row, tail, has_tail, entries, k);
    value = bucket_divergence(job.beta, entries, k + 1);
    tail_pull = static_cast<double>(row.weight) * row.tau * entries[k].bucket.gradient;
  }
  for (int64_t i = threadIdx.x; i < k; i += kWarp) {
    const double pull = static_cast<double>(row.weight) * row.tau * entries[i].bucket.gradient;
    const double gradient = pull + row.ce_weight * exp(entries[i].z - top - log_one);
    entries[i].gradient = row.finish(static_cast<float>(gradient), static_cast<float>(entries[i].z), entries[i].id);
  }
  if (threadIdx.x != 0) return;
  double at_tau = has_tail ? tail_pull / tail.at_tau : 0, at_one = has_tail ? row.ce_weight * exp(below - log_one) : 0;
  if (inv_tau == 1) at_tau += at_one, at_one = 0;
  shared.tail_max = tail.max;
  shared.tail_at_tau = static_cast<float>(at_tau);
  shared.tail_at_one = static_cast<float>(at_one);
  divergence[row.index] = static_cast<float>(value);
  ce[row.index] = static_cast<float>(log_one - (z_label - top));
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    sparse_rows(const Job job, const Plan plan, float* divergence, float* ce) {
  RBFAST_SHARED_MEMORY(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  Entry* entries = reinterpret_cast<Entry*>(memory + sizeof(Shared));
  const Team team;
  const Row row(job, blockIdx.x / team.size);
  const Source source = student(job, row, plan, memory);
  double z_label = 0;
  if (team.rank == 0) z_label = take_support(job, row, source, entries);
  team.meet();

  Sums sums[1];
  for (int round = 0; round < plan.rounds; round += kAhead) {
    Vector z[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) z[a] = source.fetch(team.position(round + a));
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      source.keep(z[a], round + a);
      add(sums[0], z[a], team.position(round + a), 0, row.vocabulary, row.inv_tau);
    }
  }
  post_totals(sums, row.inv_tau, shared);
  team.meet();
  if (team.rank == 0 && threadIdx.x < kWarp)
    solve_sparse(job, row, team_total(team, shared, 0, row.inv_tau), z_label, entries, shared, divergence, ce);
  team.meet();
  if (row.dz == nullptr) return;

  const Shared& leader = *team.of(&shared, 0);
  const float top = leader.tail_max, at_tau = leader.tail_at_tau, at_one = leader.tail_at_one;
  for (int round = 0; round < plan.rounds; ++round) {
    const int v = team.position(round);
    Vector z, gradient;
    if (v < row.vocabulary) {
      z = source.again(v, round);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float x = z.value[i] - top;
        gradient.value[i] = exp_negative(x * row.inv_tau) * at_tau;
        if (at_one != 0) gradient.value[i] += exp_negative(x) * at_one;
      }
    }
    if (plan.in_step) team.meet();
    if (v < row.vocabulary) row.put(gradient, z, v);
  }
  team.meet();  // the tail is written, and no member leaves while another reads its shared memory
  if (team.rank != 0 || job.ids == nullptr) return;
  for (int64_t i = threadIdx.x; i < job.k; i += kThreads)
    if (entries[i].id >= 0) row.put_one(entries[i].gradient, static_cast<int>(entries[i].id));
}

// ---- a dense teacher ----

// The scalars between the passes, from the sums over the row. Returns the CE.
__device__ double dense_pass(const Job& job, const Row& row, const Total (&totals)[kSums], double z_label, int64_t n,
                             DensePass& pass) {
  const Total &z = totals[0], &rest = totals[1], &t = totals[2];
  const double inv_tau = row.inv_tau, top = larger(z.max, rest.max);
  const double z_log = log(z.at_tau) + (z.max - top) * inv_tau, t_log = log(t.at_tau);
  const double log_one = log(z.at_one * exp(z.max - top) + rest.at_one * exp(rest.max - top));
  pass.n = n;
  pass.inv_tau = row.inv_tau;
  pass.z_max = static_cast<float>(top);
  pass.z_log = static_cast<float>(z_log);
  pass.t_max = t.max;
  pass.t_log = static_cast<float>(t_log);
  pass.shift = static_cast<float>((t.max - top) * inv_tau + t_log - z_log);
  pass.beta = static_cast<float>(job.beta);
  pass.rest_of_beta = static_cast<float>(1 - job.beta);
  const double share = job.beta == 0 || job.beta == 1 ? 1 : 1 - job.beta;
  pass.coefficient = static_cast<float>(static_cast<double>(row.weight) * row.tau * share);
  pass.at_one = static_cast<float>(row.ce_weight * exp(-log_one));
  pass.mean_score = 0;
  return log_one - (z_label - top);
}

// The gradient of a vector, before the label's part.
template <Kind kKind>
__device__ Vector dense_gradient(const Vector& z, const Vector& t, int v, const DensePass& pass, double* divergence) {
  Vector gradient;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    gradient.value[i] = pass.at_one == 0 ? 0 : exp_negative(z.value[i] - pass.z_max) * pass.at_one;
    if (v + i >= pass.n) continue;
    const Term x = term<kKind>(z.value[i], t.value[i], pass);
    if (kKind == Kind::forward) *divergence += x.divergence;
    const float part = kKind == Kind::forward ? x.q : x.q * (x.score - pass.mean_score);
    gradient.value[i] = fmaf(part, pass.coefficient, gradient.value[i]);
  }
  return gradient;
}

// D of this thread's values, and the sum of their scores under q.
template <Kind kKind>
__device__ void dense_values(const Team& team, const Plan& plan, const Source& source, const Source& other,
                             const DensePass& pass, double (&values)[2]) {
  for (int round = 0; round < plan.rounds; ++round) {
    const int v = team.position(round);
    if (v >= pass.n) continue;
    const Vector z = source.again(v, round), t = other.again(v, round);
    float terms = 0, scores = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (v + i >= pass.n) continue;
      const Term x = term<kKind>(z.value[i], t.value[i], pass);
      terms += x.divergence;
      scores += kKind == Kind::forward ? 0 : x.q * x.score;
    }
    values[0] += terms;
    values[1] += scores;
  }
}

template <Kind kKind>
__global__ void __launch_bounds__(kThreads, kBlocks - 1)
    dense_rows_of(const Job job, const Plan plan, float* divergence, float* ce) {
  RBFAST_SHARED_MEMORY(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Team team;
  const Row row(job, blockIdx.x / team.size);
  const Source source = student(job, row, plan, memory), other = teacher(job, row, plan, memory);
  const bool is_leader = team.rank == 0 && threadIdx.x == 0;
  double z_label = NAN;
  if (is_leader && row.has_label()) z_label = source.logit(source.row[row.label], row.label);

  Sums sums[kSums];
  for (int round = 0; round < plan.rounds; round += kAhead / 2) {
    Vector z[kAhead / 2], t[kAhead / 2];
#pragma unroll
    for (int a = 0; a < kAhead / 2; ++a) {
      z[a] = source.fetch(team.position(round + a));
      t[a] = other.fetch(team.position(round + a));
    }
#pragma unroll
    for (int a = 0; a < kAhead / 2; ++a) {
      const int v = team.position(round + a);
      source.keep(z[a], round + a);
      other.keep(t[a], round + a);
      add(sums[0], z[a], v, 0, other.n, row.inv_tau);
      add(sums[2], t[a], v, 0, other.n, row.inv_tau);
      if (v + kVector > other.n) add(sums[1], z[a], v, other.n, row.vocabulary, row.inv_tau);
    }
  }
  post_totals(sums, row.inv_tau, shared);
  team.meet();
  if (threadIdx.x == 0) {
    const Total totals[kSums] = {team_total(team, shared, 0, row.inv_tau), team_total(team, shared, 1, row.inv_tau),
                                 team_total(team, shared, 2, row.inv_tau)};
    const double loss = dense_pass(job, row, totals, z_label, other.n, shared.pass);
    if (is_leader) ce[row.index] = static_cast<float>(loss);
  }
  __syncthreads();
  DensePass pass = shared.pass;

  double values[2] = {};
  if (kKind != Kind::forward || row.dz == nullptr) {
    dense_values<kKind>(team, plan, source, other, pass, values);
    if (kKind != Kind::forward) {
      block_sum(values, shared);
      if (threadIdx.x == 0) shared.values[1] = values[1];
      team.meet();
      pass.mean_score = static_cast<float>(team_value(team, shared, 1));
      values[0] = threadIdx.x == 0 ? values[0] : 0;  // summed already
    }
  }
  for (int round = 0; row.dz != nullptr && round < plan.rounds; ++round) {
    const int v = team.position(round);
    Vector z, gradient;
    if (v < row.vocabulary) {
      z = source.again(v, round);
      const Vector t = v < pass.n ? other.again(v, round) : z;
      gradient = dense_gradient<kKind>(z, t, v, pass, &values[0]);
    }
    if (plan.in_step) team.meet();
    if (v < row.vocabulary) row.put(gradient, z, v);
  }
  block_sum(values, shared);
  if (threadIdx.x == 0) shared.values[0] = values[0];
  team.meet();
  if (is_leader) {
    const double value = team_value(team, shared, 0);
    divergence[row.index] = static_cast<float>(value < 0 ? 0 : value);
  }
  team.meet();  // no member leaves while another reads its shared memory
}

// ---- launching ----

using Kernel = void (*)(Job, Plan, float*, float*);

Kernel kernel_of(const Job& job) {
  if (job.teacher == nullptr) return sparse_rows;
  if (job.beta == 0) return dense_rows_of<Kind::forward>;
  return job.beta == 1 ? dense_rows_of<Kind::reverse> : dense_rows_of<Kind::js>;
}

// Whether the kernel that this device runs was compiled for clusters: one made for an older GPU may run on a newer one.
bool has_clusters(const Device& device, Kernel kernel) {
  cudaFuncAttributes compiled{};
  check(cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
  return compiled.ptxVersion >= 90 && device.attribute(cudaDevAttrClusterLaunch) != 0;
}

// The team and the tiles it keeps. Where a dense teacher is kept too, one block less shares an SM.
Plan make_plan(const Device& device, const Job& job, Kernel kernel) {
  constexpr int kReserved = 1024;  // of each block, by the driver
  const int rows = job.teacher == nullptr ? 1 : 2;
  const int64_t room = device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (kBlocks + 1 - rows) - kReserved;
  const int64_t entries = job.ids == nullptr || rows == 2 ? 0 : job.k + 1;
  Plan plan{};
  plan.kept_offset = static_cast<int>(ceil_div(sizeof(Shared) + entries * sizeof(Entry), 16) * 16);
  const int64_t tile = sizeof(Vector) * kThreads * rows, tiles = ceil_div(job.vocabulary, kTile);
  const int64_t most_kept = std::max<int64_t>(0, (room - plan.kept_offset) / tile);
  const int largest = has_clusters(device, kernel) ? kLargestTeam : 1;
  plan.team = 1;
  while (plan.team < largest && ceil_div(tiles, plan.team) > most_kept) plan.team *= 2;
  plan.rounds = static_cast<int>(ceil_div(tiles, plan.team));
  plan.kept = static_cast<int>(std::min<int64_t>(plan.rounds, most_kept));
  // Gradient v in bf16 covers logit v / 2: the kept half of a row is all that is ever covered.
  const int64_t kept = int64_t{plan.kept} * plan.team * kTile;
  plan.in_step = job.dz == static_cast<void*>(job.logits) && job.dz_is_bf16 && job.vocabulary > 2 * kept;
  return plan;
}

// A gradient over the logits must have each row in the memory of its own logits.
void expect_rows_apart(const Job& job) {
  if (job.dz == nullptr || job.rows == 0) return;
  const int64_t bytes = job.dz_is_bf16 ? 2 : 4;
  const char *z = reinterpret_cast<const char*>(job.logits), *dz = static_cast<const char*>(job.dz);
  const char* z_end = z + ((job.rows - 1) * job.logits_stride + job.vocabulary) * 4;
  const char* dz_end = dz + ((job.rows - 1) * job.dz_stride + job.vocabulary) * bytes;
  const bool is_apart = dz_end <= z || z_end <= dz;
  const bool is_same = dz == z && (job.rows < 2 || job.dz_stride * bytes == job.logits_stride * 4);
  expect(is_apart || is_same, "divergence_rows_: dz overlaps logits in another way than row by row from the same ",
         "address; give it memory of its own, or logits.view(dz.dtype)[:, :V]");
}

std::tuple<Tensor, Tensor> divergence_rows_(Tensor logits, std::optional<Tensor> dz, const Tensor& labels,
                                            const Tensor& weight, const Tensor& ce_weight, const Tensor& temperature,
                                            std::optional<Tensor> ids, std::optional<Tensor> logprobs,
                                            std::optional<Tensor> teacher, std::optional<Tensor> bias, double beta,
                                            double logit_scale, std::optional<double> softcap) {
  const Device device("divergence_rows_", {{"logits", logits},
                                           {"dz", dz},
                                           {"labels", labels},
                                           {"weight", weight},
                                           {"ce_weight", ce_weight},
                                           {"temperature", temperature},
                                           {"ids", ids},
                                           {"logprobs", logprobs},
                                           {"teacher", teacher},
                                           {"bias", bias}});
  const Arguments arguments(logits, dz, labels, weight, ce_weight, temperature, ids, logprobs, teacher, bias, beta,
                            logit_scale, softcap);
  const Job& job = arguments.job;
  expect(job.k <= kMostIds, "divergence_rows_: ids must be [T, k] with k at most ", kMostIds, " on a GPU, got ", job.k);
  expect(job.vocabulary <= kMostColumns, "divergence_rows_: logits must have at most 2^30 columns, got ", job.vocabulary);
  expect_rows_apart(job);
  const Tensor value = torch::stable::new_empty(logits, {job.rows}), ce = torch::stable::new_empty(logits, {job.rows});
  const Kernel kernel = kernel_of(job);
  const Plan plan = make_plan(device, job, kernel);
  const size_t tiles = sizeof(Vector) * kThreads * plan.kept * (job.teacher == nullptr ? 1 : 2);
  const size_t bytes = plan.kept_offset + tiles;
  // The same limit in every call: another thread may be about to launch this kernel with more than these bytes.
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
        "cudaFuncSetAttribute");
  device.launch({job.rows * plan.team, 1, kThreads, plan.team, bytes}, kernel, job, plan, mutable_data<float>(value),
                mutable_data<float>(ce));
  return {value, ce};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CUDA, m) { m.impl("divergence_rows_", TORCH_BOX(&divergence_rows_)); }

}  // namespace rbfast
