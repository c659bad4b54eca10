// Element-wise arithmetic of the losses, written once for CPU vectors and for single CUDA threads.
//
// The including file defines `Lanes`, one or more floats with operators (a GCC vector on a CPU, float on a GPU; ?:
// selects per lane), `LaneInts` of the same width, and splat, fmadd, as_ints, as_lanes, to_lanes, larger, smaller,
// nearest_whole and times_power as described in cpu/lanes.h. A GPU has its own terms of a divergence
// (cuda/divergence.cuh); from here it takes exp_change, for its tanh.
//
// exp(x) is accurate to about 1 + |x| ulp; exp(x) - 1, log1p and tanh to about one. The small differences that make up
// a divergence between two close distributions are kept as values of their own. NaN propagates: every clamp is written
// so that a comparison with NaN keeps it.
//
// d = log p - log q is computed from differences of logits. The larger of p and q is exp of its logarithm; the smaller
// follows from exp(-|d|) - 1. So q - p and every term of D keep their relative accuracy when p and q are close, and
// every term is >= 0.
#pragma once

#include <stdint.h>

#ifndef RBFAST_INLINE
#define RBFAST_INLINE static inline
#endif

namespace rbfast {

// Logits are clamped to at least this: it acts as -inf without the NaN of inf - inf, and its exp is 0 beside any other
// logit.
constexpr float kLeastLogit = -1e30f;

// For x below -86, exp(x) counts as 0, or as exp(-86) if that makes no difference: no power of two is denormal.
constexpr float kLeastPower = -124.0f;
constexpr float kLog2e = 1.44269504f;

RBFAST_INLINE Lanes magnitude(Lanes v) { return as_lanes(as_ints(v) & 0x7fffffff); }

// 2^y for y in [-124, 0].
RBFAST_INLINE Lanes power_of_two(Lanes y) {
  const Lanes n = nearest_whole(y), f = y - n;
  Lanes p = fmadd(f, splat(1.535336207e-4f), splat(1.339887449e-3f));
  p = fmadd(p, f, splat(9.618437358e-3f));
  p = fmadd(p, f, splat(5.550332471e-2f));
  p = fmadd(p, f, splat(2.402264791e-1f));
  p = fmadd(p, f, splat(6.931472029e-1f));
  return times_power(fmadd(p, f, splat(1.0f)), n);
}

// exp(x) for x <= 0, clamped to at least exp(-86), which does not change a sum that contains a 1.
RBFAST_INLINE Lanes exp_in_sum(Lanes x) { return power_of_two(larger(x * kLog2e, splat(kLeastPower))); }

// exp(x) for x <= 0, and 0 below -86.
RBFAST_INLINE Lanes exp_negative(Lanes x) {
  const Lanes y = x * kLog2e;
  return y < splat(kLeastPower) ? splat(0.0f) : power_of_two(larger(y, splat(kLeastPower)));
}

// For x <= 0: change = exp(x) - 1, rest = exp(x) - 1 - x >= 0, all = exp(x), at least exp(-86).
struct ExpChange {
  Lanes all, change, rest;
};

// exp(x) = 2^n (1 + r + square), |r| <= ln2 / 2, with square = r^2 P(r).
RBFAST_INLINE ExpChange exp_change(Lanes x) {
  const Lanes bounded = larger(x, splat(kLeastPower / kLog2e)), n = nearest_whole(bounded * kLog2e);
  const Lanes r = fmadd(n, splat(2.12194440e-4f), fmadd(n, splat(-0.693359375f), bounded));
  Lanes p = fmadd(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
  p = fmadd(p, r, splat(8.3334519073e-3f));
  p = fmadd(p, r, splat(4.1665795894e-2f));
  p = fmadd(p, r, splat(1.6666665459e-1f));
  p = fmadd(p, r, splat(5.0000001201e-1f));
  const Lanes square = p * (r * r), small = r + square, power = times_power(splat(1.0f), n);
  const Lanes change = fmadd(small, power, power - 1.0f);
  return {fmadd(small, power, power), change, n == splat(0.0f) ? square : change - x};
}

// log = log(1 + w) and rest = w - log(1 + w) >= 0, for w > -1. y = 1 + w is given, as the caller may know it more
// accurately.
struct LogParts {
  Lanes log, rest;
};

RBFAST_INLINE LogParts log1p_parts(Lanes w, Lanes y) {
  // 1 + w = 2^k f with f in [sqrt(1/2), sqrt(2)); log(1 + u) = 2 s + 2 s^3 (1/3 + s^2/5 + ...) with s = u / (2 + u).
  const LaneInts bits = as_ints(y);
  const LaneInts k = (bits - 0x3f3504f3) >> 23;
  const LaneInts is_near = k == 0;
  const Lanes u = is_near ? w : as_lanes(bits - (k << 23)) - 1.0f;
  const Lanes s = u / (u + 2.0f), s2 = s * s;
  Lanes p = fmadd(s2, splat(2.0f / 11), splat(2.0f / 9));
  p = fmadd(p, s2, splat(2.0f / 7));
  p = fmadd(p, s2, splat(2.0f / 5));
  p = fmadd(p, s2, splat(2.0f / 3)) * s2;
  const Lanes power = to_lanes(k) * 0.693147181f;
  const Lanes log = fmadd(p, s, s + s) + power;
  return {log, is_near ? s * (w - p) : w - log};
}

RBFAST_INLINE Lanes tanh_lanes(Lanes x) {
  const Lanes t = exp_change(magnitude(x) * -2.0f).change;
  const Lanes value = -t / (t + 2.0f);
  return x < splat(0.0f) ? -value : value;
}

// ---- a dense teacher ----

// The teacher's and the student's distributions over the first n ids, at inverse temperature inv_tau:
// log q_v = (z_v - z_max) * inv_tau - z_log, log p_v = (t_v - t_max) * inv_tau - t_log,
// log p_v - log q_v = (t_v - z_v) * inv_tau - shift.
// dz_v = coefficient * (gradient of D)_v + at_one * exp(z_v - z_max).
struct DensePass {
  int64_t n;
  float inv_tau, z_max, z_log, t_max, t_log, shift, beta, rest_of_beta, coefficient, at_one;
  float mean_score;  // from the pass for values, for the pass for gradients
};
// Clamps log p in reverse KL, and |d| if beyond it the smaller of p and q is negligible.
constexpr float kLeastLog = -100.0f;

// p and q of some ids: e is the larger, small.all * e the smaller, gap = |log p - log q|.
struct Pair {
  Lanes e, gap;
  LaneInts p_leads;
  ExpChange small;
};

enum class Kind { forward, reverse, js };

template <Kind kKind>
RBFAST_INLINE Pair pair(Lanes z, Lanes t, const DensePass& pass) {
  const Lanes inv_tau = splat(pass.inv_tau);
  const Lanes log_q = fmadd(z - pass.z_max, inv_tau, splat(-pass.z_log));
  Lanes log_p = fmadd(t - pass.t_max, inv_tau, splat(-pass.t_log));
  Lanes d = (t - z) * pass.inv_tau - pass.shift;  // not fused: 0 where the two rows differ by a constant
  if (kKind == Kind::reverse) {
    const LaneInts low = log_p < splat(kLeastLog);
    log_p = low ? splat(kLeastLog) : log_p;
    d = low ? log_p - log_q : d;
  }
  if (kKind != Kind::forward) d = smaller(d, splat(-kLeastLog));
  if (kKind != Kind::reverse) d = larger(d, splat(kLeastLog));
  const Lanes gap = magnitude(d);
  const LaneInts p_leads = d >= splat(0.0f);
  const Lanes log_e = p_leads ? log_p : log_q;
  return {exp_negative(smaller(log_e, splat(0.0f))), gap, p_leads, exp_change(-gap)};
}

// (b log(b/a) - b + a) / a for b = a exp(-gap) < a.
RBFAST_INLINE Lanes lesser_term(const Pair& x) { return fmadd(-x.gap, x.small.change, -x.small.rest); }

struct Term {
  Lanes divergence, q, score;  // score: log q/p or log q/m. In forward KL q holds q - p, and score is unused
};

template <Kind kKind>
RBFAST_INLINE Term term(Lanes z, Lanes t, const DensePass& pass) {
  const Pair x = pair<kKind>(z, t, pass);
  if (kKind == Kind::forward) {
    const Lanes change = x.e * x.small.change;
    return {x.e * (x.p_leads ? x.small.rest : lesser_term(x)), x.p_leads ? change : -change, Lanes{}};
  }
  const Lanes q = x.p_leads ? x.e * x.small.all : x.e;
  if (kKind == Kind::reverse) return {x.e * (x.p_leads ? lesser_term(x) : x.small.rest), q, x.p_leads ? -x.gap : x.gap};
  // m = e (1 + u change), u the weight of the smaller one; m / (the smaller one) = 1 - (1 - u) change / all.
  const Lanes u = x.p_leads ? splat(pass.rest_of_beta) : splat(pass.beta);
  const Lanes rest_of_u = x.p_leads ? splat(pass.beta) : splat(pass.rest_of_beta);
  const LogParts larger_one = log1p_parts(u * x.small.change, fmadd(u, x.small.all, rest_of_u));
  const Lanes growth = -rest_of_u * x.small.change / x.small.all;
  const LogParts smaller_one = log1p_parts(growth, growth + 1.0f);
  const LaneInts is_far = x.gap > splat(40.0f);  // growth may overflow, and the smaller one is negligible beside m
  const Lanes lesser = is_far ? rest_of_u : x.small.all * smaller_one.rest;
  const Lanes log_m_over_small = is_far ? larger_one.log + x.gap : smaller_one.log;
  return {x.e * (rest_of_u * larger_one.rest + u * lesser), q, x.p_leads ? -log_m_over_small : -larger_one.log};
}

}  // namespace rbfast
