// The arithmetic of one id's part of a divergence, on the special function unit. Log-probabilities are in base 2.
//
// Each term of a divergence is >= 0. If p and q are close, it is a polynomial in d = log(p/q), so that terms and
// gradients keep their relative accuracy near the teacher; otherwise it is computed from p and q.
#pragma once

#include "cuda/lane.cuh"

namespace rbfast {
namespace {

constexpr float kLn2f = 0.693147181f;

// exp(x) - 1 - x for |x| < kNear, to a relative error of 2^-20.
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
  const float near_term = a * rest, near_change = fmaf(-a, d, near_term), far_term = fmaf(a, d, apart);
  return {is_near ? near_term : far_term, is_near ? near_change : apart};
}

// JS(beta), in base 2. m = beta p + (1 - beta) q is close to the one of p and q with the larger weight, the heavier
// one: q for beta <= 1/2. All of an id's terms are functions of e = log2(lighter / heavier).
//
// Near: with d = log(p/q), log(m/q) = K(d) = log(1 - beta + beta exp(d)), the cumulant generating function of a
// Bernoulli(beta) variable; the term beta p log(p/m) + (1 - beta) q log(q/m) is m (d K'(d) - K(d)).
constexpr int kSeries = 8;
constexpr float kNearJs = 0.721347520f;  // |d| < 1/2
struct Series {
  float beta, rest_of_beta;
  float heavier, lighter;    // their weights
  float sign, is_q_lighter;  // e = sign * log2(p/q); is_q_lighter: 1 or 0
  float score[kSeries];      // coefficients of e^1 ... in log2(q/m)
  float term[kSeries - 1];   // coefficients of e^2 ... in term / m
};

__device__ inline float series_score(const Series& s, float e) {
  float sum = s.score[kSeries - 1];
#pragma unroll
  for (int i = kSeries - 2; i >= 0; --i) sum = fmaf(sum, e, s.score[i]);
  return sum * e;
}
__device__ inline float series_term(const Series& s, float e) {
  float sum = s.term[kSeries - 2];
#pragma unroll
  for (int i = kSeries - 3; i >= 0; --i) sum = fmaf(sum, e, s.term[i]);
  return sum * (e * e);
}

constexpr float kFloor2 = -144.269504f;  // the least log p in reverse KL: -100, in base 2

// log2(m / heavier), for e <= 100: beyond that the heavier one is negligible.
__device__ inline float log_m_of(const Series& s, float e) {
  return log2_fast(fmaf(s.lighter, exp2_fast(e), s.heavier));
}
__device__ inline float far_score(const Series& s, float e, float log_m) { return fmaf(s.is_q_lighter, e, -log_m); }

// One id's part of JS, and log2(q/m), from (1 - beta) q, beta p and e.
struct JsTerm {
  float term, score;
};
__device__ inline JsTerm js_term(float of_q, float of_p, float e, const Series& s) {
  const bool is_near = fabsf(e) < kNearJs;
  e = fminf(e, 100.0f);
  const float m = of_p + of_q, near = unconditional(m * series_term(s, e)),
              near_score = unconditional(series_score(s, e));
  const float log_m = log_m_of(s, e), of_lighter = s.is_q_lighter != 0 ? of_q : of_p;
  const float far = fmaf(of_lighter, e, -(m * log_m));
  return {is_near ? near : max_nan(far, 0.0f), is_near ? near_score : far_score(s, e, log_m)};
}

// For an id of a support, from log2 q and log2 p: log(q/p) or log(q/m), and q times it.
struct Score {
  float score, weighted;
};
template <Kind kKind>
__device__ inline Score score_of(float log_q, float log_p, const Series& s) {
  const float q = exp2_fast(log_q);
  float score;
  if (kKind == Kind::js) {
    const float e = fminf(fmaxf((log_p - log_q) * s.sign, kLeastLogit), 100.0f);
    score = fabsf(e) < kNearJs ? series_score(s, e) : far_score(s, e, log_m_of(s, e));
  } else {
    score = log_q - fmaxf(log_p, kFloor2);
  }
  score *= kLn2f;
  return {score, q == 0 ? 0 : q * score};
}

}  // namespace

// The series of JS(beta). For reverse KL the factor rest_of_beta is 1.
inline Series make_series(double beta) {
  // Cumulants as polynomials in beta: k_1 = beta, k_(n+1) = beta (1 - beta) dk_n/dbeta.
  Series s{};
  s.beta = static_cast<float>(beta);
  s.rest_of_beta = static_cast<float>(beta == 1 ? 1 : 1 - beta);
  const bool is_q_lighter = beta > 0.5;
  s.heavier = is_q_lighter ? s.beta : s.rest_of_beta;
  s.lighter = is_q_lighter ? s.rest_of_beta : s.beta;
  s.sign = is_q_lighter ? -1 : 1;
  s.is_q_lighter = is_q_lighter ? 1 : 0;
  double cumulant[kSeries + 2] = {0, 1}, power = 1 / kLn2;  // d^n / n! over e^n, in base 2
  for (int n = 1; n <= kSeries; ++n) {
    power *= s.sign * kLn2 / n;
    double value = 0;
    for (int i = kSeries + 1; i >= 0; --i) value = value * beta + cumulant[i];
    s.score[n - 1] = static_cast<float>(-value * power);
    if (n > 1) s.term[n - 2] = static_cast<float>(value * (n - 1) * power);
    double next[kSeries + 2] = {};
    for (int i = 1; i <= kSeries; ++i) next[i] += i * cumulant[i], next[i + 1] -= i * cumulant[i];
    for (int i = 0; i <= kSeries + 1; ++i) cumulant[i] = next[i];
  }
  return s;
}

}  // namespace rbfast
