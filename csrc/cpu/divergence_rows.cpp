// Losses of rows of logits and their gradients on the CPU: checks, threads, and the fp64 scalars of a row. The formulas
// are in divergence_job.h, the passes over a row in divergence_rows_kernel.inl.
#include "cpu/divergence_rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "buckets.h"
#include "cpu/dispatch.h"
#include "divergence_job.h"

namespace rbfast {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Losses {
  double divergence, ce;
};

struct Weights {
  double kl, ce, tau;

  double loss(const Losses& of) const { return kl * tau * tau * of.divergence + ce * of.ce; }
};

// One row, with its logits already scaled and capped.
struct Row {
  const Job& job;
  Isa isa;
  float* z;
  Output out;
  Weights weights;
  float inv_tau;
  double z_label;
};

double logit(float z) { return std::max(z, kLeastLogit); }

double log_add(double x, double y) {
  const double top = std::max(x, y);
  return top == -kInfinity ? top : top + std::log(std::exp(x - top) + std::exp(y - top));
}

// D over the buckets; stores in each bucket the gradient in its logit.
double divergence(std::vector<Bucket>& buckets, double beta) {
  double value = 0, mean = 0;
  for (Bucket& b : buckets) {
    const BucketTerm term = bucket_term(b.log_p, b.log_q, beta);
    value += term.divergence;
    mean += term.q * term.score;
    b.gradient = term.score;
  }
  if (beta > 0)
    for (Bucket& b : buckets) b.gradient = score_gradient(b.log_q, b.gradient, mean, beta);
  return std::max(value, 0.0);
}

// Normalises the buckets' log p at the row's temperature, with the tail's mass in the last bucket. tail: the student's;
// the teacher's is assumed to have its shape.
void teacher_buckets(const Row& row, const LogSum& tail, bool has_tail, std::vector<Bucket>& buckets) {
  const size_t k = buckets.size() - 1;
  const double inv_tau = row.inv_tau;
  double total = 0;
  for (size_t i = 0; i < k; ++i) total += std::exp(buckets[i].log_p);
  const double excess = std::max(std::log(total), 0.0);  // if rounding took the total over 1, scale it back
  for (size_t i = 0; i < k; ++i) buckets[i].log_p -= excess;
  buckets[k].log_p = has_tail ? std::log1p(-std::min(total, 1.0)) : -kInfinity;
  if (inv_tau == 1 && has_tail) return;
  // At another temperature the tail's mass depends on its shape, which is the student's.
  buckets[k].log_p = buckets[k].log_p * inv_tau + std::log(tail.at_tau) - std::log(tail.at_one) * inv_tau;
  if (!has_tail) buckets[k].log_p = -kInfinity;
  double normaliser = buckets[k].log_p;
  for (size_t i = 0; i < k; ++i) normaliser = log_add(normaliser, buckets[i].log_p *= inv_tau);
  for (Bucket& b : buckets) b.log_p -= normaliser;
}

// A row with k log-probs of its teacher; ids null: text, cross-entropy alone.
Losses sparse_row(const Row& row, const int64_t* ids, const float* logprobs, int64_t k) {
  struct Entry {
    int64_t id;
    double z;
  };
  thread_local std::vector<Entry> support;
  thread_local std::vector<Bucket> buckets;
  support.clear();
  buckets.clear();
  const double inv_tau = row.inv_tau;
  double top = kLeastLogit;
  for (int64_t i = 0; i < k; ++i) {
    if (ids[i] < 0) continue;
    support.push_back({ids[i], logit(row.z[ids[i]])});
    buckets.push_back({logprobs[i], 0, 0});
    top = std::max(top, support.back().z);
    row.z[ids[i]] = kLeastLogit;  // leaves the tail, which is summed separately
  }
  LogSum tail;
  RBFAST_CALL(row.isa, log_sum, row.z, row.job.vocabulary, row.inv_tau, &tail);
  const bool has_tail = tail.max > kLeastLogit || std::isnan(tail.at_one);
  top = std::max<double>(top, tail.max);
  const double below = tail.max - top;
  double sum_tau = has_tail ? tail.at_tau * std::exp(below * inv_tau) : 0;
  double sum_one = has_tail ? tail.at_one * std::exp(below) : 0;
  for (const Entry& e : support) {
    sum_tau += std::exp((e.z - top) * inv_tau);
    sum_one += std::exp(e.z - top);
  }
  const double log_tau = std::log(sum_tau), log_one = std::log(sum_one);
  Losses losses{0, log_one - (row.z_label - top)};

  double tail_pull = 0;  // dz of the whole tail
  if (ids != nullptr) {
    for (size_t i = 0; i < support.size(); ++i) buckets[i].log_q = (support[i].z - top) * inv_tau - log_tau;
    buckets.push_back({0, has_tail ? below * inv_tau + std::log(tail.at_tau) - log_tau : -kInfinity, 0});
    teacher_buckets(row, tail, has_tail, buckets);
    losses.divergence = divergence(buckets, row.job.beta);
    tail_pull = row.weights.kl * row.weights.tau * buckets.back().gradient;
  }
  if (row.out.dz == nullptr) return losses;

  double at_tau = has_tail ? tail_pull / tail.at_tau : 0;
  double at_one = has_tail ? row.weights.ce * std::exp(below - log_one) : 0;
  if (inv_tau == 1) at_tau += std::exchange(at_one, 0);
  const TailGradient g{tail.max, row.inv_tau, static_cast<float>(at_tau), static_cast<float>(at_one)};
  RBFAST_CALL(row.isa, tail_gradient, row.z, row.job.vocabulary, g, row.out);
  for (size_t i = 0; i < support.size(); ++i) {
    const auto [id, z] = support[i];
    double gradient =
        row.weights.kl * row.weights.tau * buckets[i].gradient + row.weights.ce * std::exp(z - top - log_one);
    if (id == row.out.label) gradient -= row.weights.ce;
    if (row.out.softcap != 0) gradient *= 1 - (z / row.out.softcap) * (z / row.out.softcap);
    const float value = static_cast<float>(gradient * row.out.scale);
    if (row.out.is_bf16)
      store(static_cast<BF16*>(row.out.dz) + id, value);
    else
      store(static_cast<F32*>(row.out.dz) + id, value);
  }
  return losses;
}

// A row with a dense teacher's logits. D is over the ids that both vocabularies have.
Losses dense_row(const Row& row, const float* teacher) {
  const int64_t vocabulary = row.job.vocabulary, shared = std::min(vocabulary, row.job.teacher_vocabulary);
  const double inv_tau = row.inv_tau;
  LogSum z, rest{kLeastLogit, 0, 0}, t;
  RBFAST_CALL(row.isa, log_sum, row.z, shared, row.inv_tau, &z);
  if (shared < vocabulary) RBFAST_CALL(row.isa, log_sum, row.z + shared, vocabulary - shared, row.inv_tau, &rest);
  RBFAST_CALL(row.isa, log_sum, teacher, shared, row.inv_tau, &t);
  if (t.max <= kLeastLogit) t.max = std::numeric_limits<float>::quiet_NaN();  // no distribution, so no loss either
  const double top = std::max(z.max, rest.max);
  const double z_log = std::log(z.at_tau) + (z.max - top) * inv_tau, t_log = std::log(t.at_tau);
  const double log_one = std::log(z.at_one * std::exp(z.max - top) + rest.at_one * std::exp(rest.max - top));
  const double shift = (t.max - top) * inv_tau + t_log - z_log;
  DensePass pass{shared,
                 row.inv_tau,
                 static_cast<float>(top),
                 static_cast<float>(z_log),
                 t.max,
                 static_cast<float>(t_log),
                 static_cast<float>(shift),
                 static_cast<float>(row.job.beta),
                 static_cast<float>(1 - row.job.beta),
                 static_cast<float>(row.weights.kl * row.weights.tau *
                                    (row.job.beta == 0 || row.job.beta == 1 ? 1 : 1 - row.job.beta)),
                 static_cast<float>(row.weights.ce * std::exp(-log_one)),
                 0};
  DenseValue value;
  RBFAST_CALL(row.isa, dense_value, row.z, teacher, vocabulary, pass, row.out, &value);
  if (row.out.dz != nullptr && row.job.beta != 0) {
    // log1p_parts does not propagate NaN to the scores of JS; the divergence has it.
    pass.mean_score = static_cast<float>(std::isnan(value.divergence) ? value.divergence : value.mean_score);
    RBFAST_CALL(row.isa, dense_gradient, row.z, teacher, vocabulary, pass, row.out);
  }
  return {value.divergence, log_one - (row.z_label - top)};
}

Losses solve_row(const Job& job, const Weights& weights, Isa isa, int64_t i) {
  float* z = job.logits + i * job.logits_stride;
  if (job.bias != nullptr || job.logit_scale != 1 || job.softcap != 0)
    RBFAST_CALL(isa, head_logits, z, job.bias, job.vocabulary, job.logit_scale, job.softcap);
  void* dz = nullptr;
  if (job.dz != nullptr) dz = static_cast<char*>(job.dz) + i * job.dz_stride * (job.dz_is_bf16 ? 2 : 4);
  const float ce_weight = static_cast<float>(weights.ce), inv_tau = static_cast<float>(1 / weights.tau);
  const Output out{dz,          job.dz_is_bf16,    job.labels[i],     ce_weight, job.logit_scale,
                   job.softcap, job.logits_stride, job.teacher_stride};
  const Row row{job, isa, z, out, weights, inv_tau, logit(z[job.labels[i]])};
  if (job.teacher != nullptr) return dense_row(row, job.teacher + i * job.teacher_stride);
  if (job.ids != nullptr) return sparse_row(row, job.ids + i * job.k, job.logprobs + i * job.k, job.k);
  return sparse_row(row, nullptr, nullptr, 0);
}

void expect_ids(const char* name, const int64_t* ids, int64_t count, int64_t least, int64_t vocabulary) {
  for (int64_t i = 0; i < count; ++i)
    expect(ids[i] >= least && ids[i] < vocabulary, "divergence_rows_: ", name, " must be in [", least, ", ", vocabulary,
           "), got ", ids[i]);
}

std::tuple<Tensor, Tensor, Tensor> divergence_rows_(Tensor logits, std::optional<Tensor> dz, const Tensor& labels,
                                                    std::optional<Tensor> kl_weight, std::optional<Tensor> ce_weight,
                                                    std::optional<Tensor> temperature, std::optional<Tensor> ids,
                                                    std::optional<Tensor> logprobs, std::optional<Tensor> teacher,
                                                    std::optional<Tensor> bias, double beta, double logit_scale,
                                                    std::optional<double> softcap, double kl_factor, double ce_factor,
                                                    double temperature_factor) {
  const Arguments arguments(logits, dz, labels, kl_weight, ce_weight, temperature, ids, logprobs, teacher, bias, beta,
                            logit_scale, softcap, kl_factor, ce_factor, temperature_factor);
  const Job& job = arguments.job;
  expect_ids("labels", job.labels, job.rows, 0, job.vocabulary);
  if (job.ids != nullptr) expect_ids("ids", job.ids, job.rows * job.k, -1, job.vocabulary);
  const Isa isa = active_isa();
  const int64_t rows = job.rows;
  Tensor divergence = empty(logits, {rows}), ce = empty(logits, {rows}), loss = empty(logits, {rows});
  float *divergences = mutable_data<float>(divergence), *ces = mutable_data<float>(ce);
  float* weighted = mutable_data<float>(loss);
  torch::stable::parallel_for(0, rows, grain(job.vocabulary), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Weights weights{of_row(job.kl_weight, i), of_row(job.ce_weight, i), of_row(job.temperature, i)};
      const Losses losses = solve_row(job, weights, isa, i);
      divergences[i] = static_cast<float>(losses.divergence);
      ces[i] = static_cast<float>(losses.ce);
      weighted[i] = static_cast<float>(weights.loss(losses));
    }
  });
  return {divergence, ce, loss};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CPU, m) { m.impl("divergence_rows_", TORCH_BOX(&divergence_rows_)); }

}  // namespace rbfast
