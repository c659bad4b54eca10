// The divergence over a few buckets (a top-k teacher's ids and the tail) in fp64, for CPU and CUDA.
#pragma once

#include <math.h>

#ifndef RBFAST_INLINE
#define RBFAST_INLINE static inline
#endif

namespace rbfast {

constexpr double kLogFloor = -100;  // reverse KL clamps log p to at least this

struct Bucket {
  double log_p, log_q, gradient;
};

// score: for forward KL the gradient in the bucket's logit; for reverse KL log q/p and for JS log q/m, which
// score_gradient turns into a gradient.
struct BucketTerm {
  double divergence, q, score;
};

// a log(a/b) - a + b >= 0
RBFAST_INLINE double kl_term(double a, double log_a, double b, double log_b) {
  return (a > 0 ? a * (log_a - log_b) : 0) - a + b;
}

RBFAST_INLINE BucketTerm bucket_term(double log_p, double log_q, double beta) {
  if (beta == 1 && log_q > -INFINITY && log_p < kLogFloor) log_p = kLogFloor;
  const double p = exp(log_p), q = exp(log_q);
  if (beta == 0) return {kl_term(p, log_p, q, log_q), q, q - p};
  if (beta == 1) return {kl_term(q, log_q, p, log_p), q, q > 0 ? log_q - log_p : 0};
  const double m = beta * p + (1 - beta) * q, log_m = log(m);
  const double value = beta * kl_term(p, log_p, m, log_m) + (1 - beta) * kl_term(q, log_q, m, log_m);
  return {m == 0 ? 0 : value, q, q > 0 ? log_q - log_m : 0};  // NaN stays NaN
}

// The gradient of reverse KL and JS in a bucket's logit, from its score and the mean of the scores under q.
RBFAST_INLINE double score_gradient(double log_q, double score, double mean, double beta) {
  return (beta == 1 ? 1 : 1 - beta) * exp(log_q) * (score - mean);
}

}  // namespace rbfast
