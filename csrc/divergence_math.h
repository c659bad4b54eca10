// The arithmetic of a row's losses, value by value, written once: for the vectors of a CPU and for one CUDA thread.
//
// Whoever includes it brings `Lanes`, one or more floats that operators work on (a GCC vector on a CPU, float on a GPU;
// `c ? a : b` chooses lane by lane), `LaneInts` of the same width, and splat, fmadd, as_ints, as_lanes, to_lanes,
// larger, smaller, nearest_whole and times_power as cpu/lanes.h describes them. A GPU has its own terms of a divergence
// (cuda/divergence.cuh) and takes tanh from here.
//
// exp of x is good to about 1 + |x| units in the last place; exp(x) - 1, log1p and tanh to about one, with the small
// differences kept apart: what a divergence between two close distributions is made of. A NaN goes through: every clamp
// is written so that a comparison with NaN keeps it.
//
// With d = log p - log q computed from differences of logits, the larger of p and q is exp of its logarithm and the
// smaller follows from exp(-|d|) - 1. So q - p and every term of D keep their relative accuracy when the two are close,
// and every term is >= 0.
#pragma once

#include <stdint.h>

#ifndef RBFAST_INLINE
#define RBFAST_INLINE static inline
#endif

namespace rbfast {

// Logits below this count as it: -inf without the NaN of inf - inf. exp of it is 0 beside any other logit.
constexpr float kNone = -1e30f;

// exp(x) for x below -86 counts as 0, or as exp(-86) where that is as good: no power of two is denormal.
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

// exp(x) for x <= 0, and at least exp(-86), so that a sum that has a 1 in it is the same.
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

// For w > -1, given with y = 1 + w (which may be known better than by adding 1): log(1 + w), and w - log(1 + w) >= 0.
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

// ---- a teacher beside the student ----

// A teacher's distribution over the first n ids beside the student's, at inverse temperature inv_tau:
// log q_v = (z_v - z_max) * inv_tau - z_log, log p_v = (t_v - t_max) * inv_tau - t_log,
// log p_v - log q_v = (t_v - z_v) * inv_tau - shift.
// dz_v = coefficient * (gradient of D)_v + at_one * exp(z_v - z_max).
struct DensePass {
  int64_t n;
  float inv_tau, z_max, z_log, t_max, t_log, shift, beta, rest_of_beta, coefficient, at_one;
  float mean_score;  // what the pass for values returned, for the pass for gradients
};
constexpr float kLeastLog = -100.0f;  // the one below which a term of the other distribution is as good as alone

// p and q of some ids: e is the larger of the two, small.all * e the other one, gap = |log p - log q|.
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

// With b = a exp(-gap) < a: b log(b/a) - b + a, over a.
RBFAST_INLINE Lanes lesser_term(const Pair& x) { return fmadd(-x.gap, x.small.change, -x.small.rest); }

struct Term {
  Lanes divergence, q, score;  // score: log q/p or log q/m; for forward KL q holds q - p, and score nothing
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
  const LaneInts is_far = x.gap > splat(40.0f);  // where growth may overflow, and the smaller one is nothing beside m
  const Lanes lesser = is_far ? rest_of_u : x.small.all * smaller_one.rest;
  const Lanes log_m_over_small = is_far ? larger_one.log + x.gap : smaller_one.log;
  return {x.e * (rest_of_u * larger_one.rest + u * lesser), q, x.p_leads ? -log_m_over_small : -larger_one.log};
}

}  // namespace rbfast
