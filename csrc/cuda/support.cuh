// Rows of text and of a top-k teacher, around the main kernel. The support is the teacher's ids, the tail all others.
// prepare_rows computes what is known before a row is read, tail_scale turns the row's sums into the gradient of the
// tail, and finish_rows computes the losses and the gradient at the support. Both small kernels touch O(k) values of a
// row, not V.
//
// prepare_rows masks the support's logits, so that the main kernel's sums are those of the tail. From these sums it
// takes a handful of fp32 operations to get the gradient. finish_rows computes the logarithms and everything else that
// a loss needs in fp64, off the critical path.
#pragma once

#include "cuda/divergence.cuh"
#include "cuda/row.cuh"

namespace rbfast {
namespace {

constexpr int kPrepareThreads = 128;

// The sum of f(i) over count entries, by a warp.
template <typename F>
__device__ double sum_over(int count, const F& f) {
  double sum = 0;
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) sum += f(i);
  return warp_sum(sum);
}

// The teacher's mass on its ids, scaled back to 1 if rounding takes it over 1.
struct Mass {
  double total, excess;  // excess: to subtract from each log-prob

  __device__ Mass(const float* logprobs, const int64_t* ids, int k)
      : total(sum_over(k, [&](int i) { return ids[i] == -1 ? 0 : exp(static_cast<double>(logprobs[i])); })),
        excess(total > 1 ? log(total) : 0) {}
  __device__ double tail() const { return total > 1 ? 0 : 1 - total; }
};

// A pivot (see Sums) for n logits, picked by a warp: the largest of the label's and of 32 others.
template <typename F>
__device__ float pick_pivot(int64_t n, int64_t label, const F& logit_at) {
  float top = fmaxf(kLeastLogit, logit_at(threadIdx.x % kWarp * n / kWarp));
  if (label >= 0 && label < n) top = fmaxf(top, logit_at(label));
  return as_pivot(warp_max(top));
}

// One warp per row. An id or a label outside the vocabulary gets the logit NaN.
__global__ void __launch_bounds__(kPrepareThreads) prepare_rows(const Job job, const Scratch scratch) {
  const int64_t row = (int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x) / kWarp;
  if (row >= job.rows) return;
  const Head head(job);
  const int lane = threadIdx.x % kWarp, k = job.ids == nullptr ? 0 : static_cast<int>(job.k);
  float* logits = job.logits + row * job.logits_stride;
  const bool has_teacher = job.ids != nullptr || job.teacher != nullptr;
  const float tau = has_teacher ? of_row(job.temperature, row) : 1;
  const int64_t label = job.labels[row];
  const bool has_label = label >= 0 && label < job.vocabulary;

  RowInfo info{};
  info.inv_tau = 1 / tau;
  info.kl_scale = has_teacher ? of_row(job.kl_weight, row) * tau : 0;
  info.ce_weight = of_row(job.ce_weight, row);
  info.label = has_label ? static_cast<int>(label) : -1;
  info.z_label = has_label ? head.logit(logits[label], info.label) : NAN;
  info.support_max = kLeastLogit;
  float p_top = kLeastLogit;  // log2 of the teacher's largest probability, at the row's temperature
  if (k > 0) {
    const int64_t* ids = job.ids + row * k;
    const float* logprobs = job.logprobs + row * k;
    Entry* entries = scratch.entries + row * k;
    const float scale = info.scale();
    const Mass mass(logprobs, ids, k);
    float top = kLeastLogit, best = -INFINITY;
    for (int i = lane; i < k; i += kWarp) {
      const int64_t id = ids[i];
      const bool is_used = id >= 0 && id < job.vocabulary;
      const float z = is_used ? head.logit(logits[id], static_cast<int>(id)) : id == -1 ? -INFINITY : NAN;
      entries[i] = {z, id == -1 ? -INFINITY : logprobs[i]};
      top = fmaxf(top, z);
      best = fmaxf(best, entries[i].log_p);
    }
    const auto at_tau = [&](float log_p) { return (log_p - mass.excess) * scale; };
    p_top = info.inv_tau == 1 ? 0 : fmaxf(kLeastLogit, static_cast<float>(at_tau(warp_max(best))));
    for (int i = lane; i < k; i += kWarp) entries[i].log_p = static_cast<float>(at_tau(entries[i].log_p) - p_top);
    __syncwarp();  // all logits are read, the label's too
    for (int i = lane; i < k; i += kWarp)
      if (ids[i] >= 0 && ids[i] < job.vocabulary) logits[ids[i]] = head.mask_value();
    top = warp_max(top);
    const auto sum = [&](float scale) {
      return static_cast<float>(sum_over(k, [&](int i) { return exp2_fast((entries[i].z - top) * scale); }));
    };
    info.support_max = top;
    info.support_tau = sum(scale);
    info.support_one = info.inv_tau == 1 ? info.support_tau : sum(kLog2e);
    info.p_support = static_cast<float>(sum_over(k, [&](int i) { return exp2_fast(entries[i].log_p); }));
    info.p_tail = static_cast<float>(mass.tail());
  } else if (job.ids != nullptr) {
    info.p_tail = 1;
  }
  info.log_tail = info.inv_tau * log2f(info.p_tail) - p_top;
  __syncwarp();  // the masks are written: the pivot comes from what the main kernel will read
  info.pivot = pick_pivot(job.vocabulary, label, [&](int64_t v) { return head.logit(logits[v], static_cast<int>(v)); });
  if (job.teacher != nullptr)
    info.teacher_pivot =
        pick_pivot(job.teacher_vocabulary, label, [&](int64_t v) { return job.teacher[row * job.teacher_stride + v]; });
  if (lane == 0) scratch.rows[row] = info;
}

// ---- between a row's sums and its gradient ----

// dz of the tail: at_tau(z) + at_one(z). At tau = 1 the second one is 0.
struct TailScale {
  Powers at_tau, at_one;
};

// For reverse KL and JS, the gradient of D in the tail's own logit, divided by its q, by a whole warp. log_q and log_p
// are the tail's, in base 2. An entry's log_q is (z - top) * scale - log2(all); subtracting log_norm normalises its
// log_p.
template <Kind kKind>
__device__ inline float tail_score(const Series& series, const Entry* entries, int k, float scale, float top,
                                   const Log2Parts& all, float log_norm, float log_q, float log_p) {
  float mean = 0;
#pragma unroll 1
  for (int i = threadIdx.x % kWarp; i < k; i += kWarp) {
    const Entry entry = entries[i];
    mean += score_of<kKind>(fmaf(entry.z - top, scale, -all.whole) - all.rest, entry.log_p - log_norm, series).weighted;
  }
  const Score tail = score_of<kKind>(log_q, log_p, series);
  return series.rest_of_beta * (tail.score - (warp_sum(mean) + tail.weighted));
}

// The gradient of the tail, from its sums. All lanes of a warp call it, with the same arguments. Without kGeneral, beta
// is 0.
template <bool kGeneral>
__device__ inline TailScale tail_scale(const Job& job, const Series& series, const RowInfo& info, const Entry* entries,
                                       const Sums& tail, float scale) {
  if (tail.at_one == 0) return {{0, scale, 0}, {0, kLog2e, 0}};  // no tail
  const bool is_plain = info.inv_tau == 1;
  const float top = fmaxf(tail.pivot, info.support_max);
  const float own = tail.at_tau * rebase(tail.pivot, top, scale);
  const float all = own + info.support_tau * rebase(info.support_max, top, scale);
  float gradient = 0;  // of D in the tail's own logit
  if (job.ids != nullptr) {
    // The teacher's tail is taken to have the student's shape, which matters at temperatures other than 1.
    float p = info.p_tail, p_support = info.p_support, above = 0;
    if (!is_plain) {
      const Log2Parts one = log2_parts(tail.at_one);
      const float log_share = fmaf(-info.inv_tau, one.rest, fmaf(-info.inv_tau, one.whole, info.log_tail));
      above = fmaxf(log_share, 0);  // if the tail outweighs the support, divide both by it
      p = exp2f(log_share - above) * tail.at_tau;
      p_support *= exp2f(-above);
    }
    const float q = divide(own, all), norm = p + p_support;
    if (!kGeneral || job.beta == 0) {
      gradient = q - divide(p, norm);
    } else {
      const float log_norm = log2f(norm) + above, log_p = log2f(p) - log2f(norm);
      const Log2Parts of_all = log2_parts(all), of_tail = log2_parts(tail.at_tau);
      const float log_q = fmaf(tail.pivot - top, scale, of_tail.whole - of_all.whole) + (of_tail.rest - of_all.rest);
      const int k = static_cast<int>(job.k);
      gradient = job.beta == 1
                     ? q * tail_score<Kind::reverse>(series, entries, k, scale, top, of_all, log_norm, log_q, log_p)
                     : q * tail_score<Kind::js>(series, entries, k, scale, top, of_all, log_norm, log_q, log_p);
    }
    gradient *= info.kl_scale;
  }
  // If the support is far above the pivot this is inf, and the CE's gradient in the tail becomes 0.
  const float others = info.support_one * rebase(info.support_max, tail.pivot, kLog2e);
  const float at_one = divide_fast(info.ce_weight, tail.at_one + others), at_tau = divide(gradient, tail.at_tau);
  return {{tail.pivot, scale, is_plain ? at_tau + at_one : at_tau}, {tail.pivot, kLog2e, is_plain ? 0 : at_one}};
}

// ---- after the main kernel ----

// Converts the teacher's log-probs from temperature 1 to the row's, with the tail as the last bucket.
__device__ inline void teacher_buckets(const float* logprobs, const int64_t* ids, double inv_tau, double log_shape,
                                       bool has_tail, Bucket* buckets, int k) {
  const int lane = threadIdx.x % kWarp;
  const Mass mass(logprobs, ids, k);
  const bool is_plain = inv_tau == 1 && has_tail;
  if (lane == 0)
    buckets[k].log_p = has_tail ? log1p(-(mass.total > 1 ? 1 : mass.total)) * inv_tau + log_shape : -INFINITY;
  for (int i = lane; i < k; i += kWarp)
    buckets[i].log_p = ids[i] == -1 ? -INFINITY : (logprobs[i] - mass.excess) * inv_tau;
  __syncwarp();
  if (is_plain) return;
  double top = -INFINITY;
  for (int i = lane; i <= k; i += kWarp) top = buckets[i].log_p > top ? buckets[i].log_p : top;
  top = warp_max(top);
  const double sum = sum_over(k + 1, [&](int i) { return exp(buckets[i].log_p - top); });
  for (int i = lane; i <= k; i += kWarp) buckets[i].log_p -= top + log(sum);
  __syncwarp();
}

// D over the buckets; stores in each bucket the gradient in its logit.
__device__ inline double bucket_divergence(double beta, Bucket* buckets, int count) {
  double mean = 0;
  const double value = sum_over(count, [&](int i) {
    const BucketTerm term = bucket_term(buckets[i].log_p, buckets[i].log_q, beta);
    buckets[i].gradient = term.score;
    mean += term.q * term.score;
    return term.divergence;
  });
  mean = warp_sum(mean);
  if (beta > 0)
    for (int i = threadIdx.x % kWarp; i < count; i += kWarp)
      buckets[i].gradient = score_gradient(buckets[i].log_q, buckets[i].gradient, mean, beta);
  __syncwarp();
  return value < 0 ? 0 : value;
}

// The log of a sum of powers about `pivot`, see Sums. Here and below a product is not fused with the addition after it:
// where equals are subtracted, an FMA would leave the product's rounding error in place of 0.
__device__ inline double log_sum(float pivot, float sum, float scale) {
  return log(static_cast<double>(sum)) + __dmul_rn(pivot, static_cast<double>(scale) * kLn2);
}
__device__ inline double log_add(double a, double b) {
  const double top = a > b || isnan(b) ? a : b;
  return isinf(top) ? a + b : top + log(exp(a - top) + exp(b - top));
}

// The losses of a row and its gradient at the support and at the label, by one block of one warp.
__global__ void __launch_bounds__(kWarp) finish_rows(const Job job, const Scratch scratch, const Losses losses) {
  RBFAST_SHARED_MEMORY(memory);
  Bucket* buckets = reinterpret_cast<Bucket*>(memory);
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x, k = job.ids == nullptr ? 0 : static_cast<int>(job.k);
  const RowInfo info = scratch.rows[row];
  const Sums tail = scratch.sums[row];
  const Entry* entries = scratch.entries + row * k;
  const int64_t* ids = job.ids + row * k;
  const Head head(job);
  const float scale = info.scale();
  const double at_tau = static_cast<double>(scale) * kLn2, at_one = static_cast<double>(kLog2e) * kLn2;
  const bool has_tail = tail.at_one > 0 || isnan(tail.at_one);
  const double tail_tau = has_tail ? log_sum(tail.pivot, tail.at_tau, scale) : -INFINITY;
  const double tail_one = has_tail ? log_sum(tail.pivot, tail.at_one, kLog2e) : -INFINITY;
  const double log_tau = log_add(tail_tau, log_sum(info.support_max, info.support_tau, scale));
  const double log_one = log_add(tail_one, log_sum(info.support_max, info.support_one, kLog2e));

  double value = 0, gradient_of_tail = 0;
  if (job.ids != nullptr) {
    for (int i = lane; i < k; i += kWarp) buckets[i].log_q = __dmul_rn(entries[i].z, at_tau) - log_tau;
    if (lane == 0) buckets[k].log_q = tail_tau - log_tau;
    __syncwarp();
    const bool is_plain = info.inv_tau == 1;
    const double log_shape =
        log(static_cast<double>(tail.at_tau)) - log(static_cast<double>(tail.at_one)) * info.inv_tau;
    teacher_buckets(job.logprobs + row * k, ids, info.inv_tau, is_plain ? 0 : log_shape, has_tail, buckets, k);
    value = bucket_divergence(job.beta, buckets, k + 1);
    gradient_of_tail = buckets[k].gradient;
  }
  if (lane == 0) losses.store(job, info, row, value, log_one - __dmul_rn(info.z_label, at_one));
  const Output output(job, row);
  if (job.dz == nullptr) return;
  const auto store_gradient = [&](int v, double z, double of_divergence) {
    const double one = exp(__dmul_rn(z, at_one) - log_one) - (v == info.label ? 1 : 0);
    output.store_one(
        head.backward(static_cast<float>(info.kl_scale * of_divergence + info.ce_weight * one), static_cast<float>(z)),
        v);
  };
  int is_in_support = 0;
  for (int i = lane; i < k; i += kWarp) {
    if (ids[i] < 0 || ids[i] >= job.vocabulary) continue;
    if (ids[i] == info.label) is_in_support = 1;
    store_gradient(static_cast<int>(ids[i]), entries[i].z, buckets[i].gradient);
  }
  is_in_support = warp_max(is_in_support);
  if (lane == 0 && info.label >= 0 && !is_in_support)
    store_gradient(info.label, info.z_label,
                   has_tail ? gradient_of_tail * exp(__dmul_rn(info.z_label, at_tau) - tail_tau) : 0);
}

}  // namespace
}  // namespace rbfast
