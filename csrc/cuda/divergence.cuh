// The arithmetic of one id's part of a divergence, by the special function unit. Log-probabilities are in base 2.
//
// Each term of a divergence is >= 0, and where p and q are close it comes from d = log(p/q) alone by a polynomial, so
// that terms and gradients keep their relative accuracy near the teacher; where they are not, from p and q.
#pragma once

#include "cuda/lane.cuh"

namespace rbfast {
namespace {

constexpr float kLn2f = 0.693147181f;

// exp(x) - 1 - x for |x| < kNear, within 2^-20 of itself.
constexpr float kNear = 0.25f;
__device__ inline float exp_rest(float x) {
  float p = fmaf(x, 1.0f / 720, 1.0f / 120);
  p = fmaf(p, x, 1.0f / 24);
  p = fmaf(p, x, 1.0f / 6);
  p = fmaf(p, x, 0.5f);
  return p * (x * x);
}

// The term a log(a/b) - a + b of KL(a, b), and b - a, with d = log(a/b): the term is a (exp(-d) - 1 + d).
struct KlTerm {
  float term, change;
};
__device__ inline KlTerm kl_term(float a, float b, float d) {
  const float rest = exp_rest(-d), apart = b - a;
  const bool is_near = fabsf(d) < kNear;
  return {is_near ? a * rest : fmaf(a, d, apart), is_near ? a * (rest - d) : apart};
}

// JS(beta), near: with d = log(p/q), log(m/q) = K(d) = log(1 - beta + beta exp(d)), the cumulants' function of a coin
// with P(1) = beta; and the term beta p log(p/m) + (1 - beta) q log(q/m) is m (d K'(d) - K(d)).
constexpr int kSeries = 8;
constexpr float kNearJs = 0.5f;
struct Series {
  float beta, rest_of_beta;
  float log[kSeries];   // of d^1 ... in K
  float term[kSeries];  // of d^2 ... in d K' - K, the last one 0
};

struct Score {
  float q, score, weighted;  // score: log q/p or log q/m; weighted: times q
};

__device__ inline float series_log(const Series& s, float d) {
  float sum = s.log[kSeries - 1];
#pragma unroll
  for (int i = kSeries - 2; i >= 0; --i) sum = fmaf(sum, d, s.log[i]);
  return sum * d;
}
__device__ inline float series_term(const Series& s, float d) {
  float sum = s.term[kSeries - 2];
#pragma unroll
  for (int i = kSeries - 3; i >= 0; --i) sum = fmaf(sum, d, s.term[i]);
  return sum * (d * d);
}

constexpr float kFloor2 = -144.269504f;  // of a log-prob in reverse KL: -100

// Of one id, from log q, log p and d = log(p/q), the latter in base e: its part of JS and its score.
struct JsTerm {
  float term;
  Score score;
};
__device__ inline JsTerm js_term(float log_q, float log_p, float d, const Series& s) {
  const float q = exp2_fast(log_q), of_p = s.beta * exp2_fast(log_p), of_q = s.rest_of_beta * q;
  // The logarithm of m over the one with the larger weight, which m is close to: q for beta <= 1/2. Where the other one
  // is 2^100 times as large, the first is nothing beside it and the logarithms are at their limits.
  const bool is_near = fabsf(d) < kNearJs, p_weighs = s.beta > 0.5f;
  const float apart = fminf((p_weighs ? -d : d) * kLog2e, 100.0f);
  const float power = exp2_fast(apart);
  const float log_m = log2_fast(p_weighs ? fmaf(s.rest_of_beta, power, s.beta) : fmaf(s.beta, power, s.rest_of_beta));
  const float log_q_over_m = p_weighs ? apart - log_m : -log_m, log_p_over_m = p_weighs ? -log_m : apart - log_m;
  const float far = fmaf(of_p, log_p_over_m, of_q * log_q_over_m) * kLn2f;
  const float score = is_near ? -series_log(s, d) : log_q_over_m * kLn2f;
  return {is_near ? (of_p + of_q) * series_term(s, d) : max_nan(far, 0.0f), {q, score, q * score}};
}

template <Kind kKind>
__device__ inline Score score_of(float log_q, float log_p, const Series& s) {
  if (kKind == Kind::js) {
    JsTerm x = js_term(log_q, log_p, (log_p - log_q) * kLn2f, s);
    if (x.score.q == 0) x.score.weighted = 0;
    return x.score;
  }
  log_p = log_p < kFloor2 ? kFloor2 : log_p;
  const float q = exp2_fast(log_q), score = (log_q - log_p) * kLn2f;
  return {q, score, q == 0 ? 0 : q * score};
}

}  // namespace

// The series of JS(beta). For reverse KL the factor rest_of_beta is 1.
inline Series make_series(double beta) {
  // Cumulants: k1 = beta and k' = beta (1 - beta) dk/dbeta, as polynomials in beta.
  Series s{};
  s.beta = static_cast<float>(beta);
  s.rest_of_beta = static_cast<float>(beta == 1 ? 1 : 1 - beta);
  double cumulant[kSeries + 2] = {0, 1}, factorial = 1;
  for (int n = 1; n <= kSeries; ++n) {
    factorial *= n;
    double value = 0;
    for (int i = kSeries + 1; i >= 0; --i) value = value * beta + cumulant[i];
    s.log[n - 1] = static_cast<float>(value / factorial);
    if (n > 1) s.term[n - 2] = static_cast<float>(value * (n - 1) / factorial);
    double next[kSeries + 2] = {};
    for (int i = 1; i <= kSeries; ++i) next[i] += i * cumulant[i], next[i + 1] -= i * cumulant[i];
    for (int i = 0; i <= kSeries + 1; ++i) cumulant[i] = next[i];
  }
  return s;
}

}  // namespace rbfast
