// Included by divergence_rows_{scalar,avx2,avx512}.cpp, each under its own target and with ISA set to its namespace.
//
// Traffic: a row of 50k logits is 200 KB. It comes from memory once, in the first pass, and the later ones find it in
// the level-2 cache; the gradient may be written over it, since its element v lies at or before logit v.
//
// Accuracy: with d = log p - log q computed from differences of logits, the larger of p and q is exp of its logarithm
// and the smaller follows from exp(-|d|) - 1. So q - p and every term of D keep their relative accuracy when the two
// are close, and every term is >= 0.
#include "cpu/divergence_rows.h"
#include "cpu/lanes_math.h"

namespace rbfast {
namespace ISA {
namespace {

// Sums of this many values are kept in fp32; longer ones are added up in fp64.
constexpr int64_t kBlock = 64 * kLanes;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// kLanes logits, of which `left` are there.
static inline Lanes take(const float* p, int64_t left) {
  Lanes z = left >= kLanes ? load_lanes(p) : load_lanes(p, static_cast<int>(left));
  if (left < kLanes)
    for (int i = static_cast<int>(left); i < kLanes; ++i) z[i] = kNone;
  return z < splat(kNone) ? splat(kNone) : z;
}

// Finishes kLanes values of the gradient in z, at column v, and stores them.
template <typename T>
static inline void put(const Output& out, Lanes gradient, Lanes z, int64_t v, int64_t left) {
  const uint64_t lane = static_cast<uint64_t>(out.label - v);
  if (lane < static_cast<uint64_t>(kLanes)) gradient[lane] -= out.ce_weight;
  if (out.softcap != 0) {
    const Lanes t = z / out.softcap;
    gradient *= 1.0f - t * t;
  }
  gradient *= out.scale;
  T* to = static_cast<T*>(out.dz) + v;
  if (left >= kLanes)
    store_lanes(to, gradient);
  else
    store_lanes(to, gradient, static_cast<int>(left));
}

template <bool kTwo>
static void log_sum_of(const float* z, int64_t n, float inv_tau, LogSum* result) {
  float top = kNone;
  double at_tau = 0, at_one = 0;
  for (int64_t b = 0; b < n; b += kBlock) {
    const int64_t end = smaller(b + kBlock, n);
    Lanes most = splat(kNone);
    for (int64_t v = b; v < end; v += kLanes) most = larger(most, take(z + v, end - v));
    float block_top = kNone;
    for (int i = 0; i < kLanes; ++i) block_top = most[i] > block_top ? most[i] : block_top;
    if (block_top > top) {
      at_tau *= __builtin_exp((static_cast<double>(top) - block_top) * inv_tau);
      at_one *= __builtin_exp(static_cast<double>(top) - block_top);
      top = block_top;
    }
    Lanes sum_tau{}, sum_one{};
    for (int64_t v = b; v < end; v += kLanes) {
      const Lanes x = take(z + v, end - v) - top;
      sum_tau += exp_negative(x * inv_tau);
      if (kTwo) sum_one += exp_negative(x);
    }
    at_tau += sum(sum_tau);
    if (kTwo) at_one += sum(sum_one);
  }
  *result = {top, at_tau, kTwo ? at_one : at_tau};
}

template <typename T, bool kTwo>
static void tail_gradient_of(const float* z, int64_t n, const TailGradient& g, const Output& out) {
  for (int64_t v = 0; v < n; v += kLanes) {
    const Lanes logit = take(z + v, n - v), x = logit - g.max;
    Lanes gradient = exp_negative(x * g.inv_tau) * g.at_tau;
    if (kTwo) gradient = fmadd(exp_negative(x), splat(g.at_one), gradient);
    put<T>(out, gradient, logit, v, n - v);
  }
}

// p and q of kLanes ids: e is the larger of the two, small.all * e the other one, gap = |log p - log q|.
struct Pair {
  Lanes e, gap;
  LaneInts p_leads;
  ExpChange small;
};

template <bool kFloor>
static inline Pair pair(Lanes z, Lanes t, const DensePass& pass) {
  const Lanes log_q = (z - pass.z_max) * pass.inv_tau - pass.z_log;
  Lanes log_p = (t - pass.t_max) * pass.inv_tau - pass.t_log;
  Lanes d = (t - z) * pass.inv_tau - pass.shift;
  if (kFloor) {
    const LaneInts low = log_p < splat(-100.0f);
    log_p = low ? splat(-100.0f) : log_p;
    d = low ? log_p - log_q : d;
  }
  const Lanes gap = magnitude(d);
  const LaneInts p_leads = d >= splat(0.0f);
  const Lanes log_e = p_leads ? log_p : log_q;
  return {exp_negative(log_e > splat(0.0f) ? splat(0.0f) : log_e), gap, p_leads, exp_change(-gap)};
}

// With b = a exp(-gap) < a: b log(b/a) - b + a, over a.
static inline Lanes lesser_term(const Pair& x) {
  const Lanes bounded = x.gap > splat(100.0f) ? splat(100.0f) : x.gap;
  const Lanes near = -x.small.rest - x.gap * x.small.change;
  const Lanes far = 1.0f - (bounded + 1.0f) * x.small.all;
  return x.gap < splat(0.34f) ? near : far;
}

enum class Kind { forward, reverse, js };

struct Term {
  Lanes divergence, q, score;  // score: log q/p or log q/m; for forward KL q holds q - p, and score nothing
};

template <Kind kKind>
static inline Term term(Lanes z, Lanes t, const DensePass& pass) {
  const Pair x = pair<kKind == Kind::reverse>(z, t, pass);
  if (kKind == Kind::forward) {
    const Lanes change = x.e * x.small.change;
    return {x.e * (x.p_leads ? x.small.rest : lesser_term(x)), x.p_leads ? change : -change, Lanes{}};
  }
  const Lanes q = x.p_leads ? x.e * x.small.all : x.e;
  if (kKind == Kind::reverse)
    return {x.e * (x.p_leads ? lesser_term(x) : x.small.rest), q, x.p_leads ? -x.gap : x.gap};
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

// The columns that the teacher lacks: CE alone.
template <typename T>
static void rest_of_row(const float* z, int64_t vocabulary, const DensePass& pass, const Output& out) {
  for (int64_t v = pass.n; v < vocabulary; v += kLanes) {
    const Lanes logit = take(z + v, vocabulary - v);
    put<T>(out, exp_negative(logit - pass.z_max) * pass.at_one, logit, v, vocabulary - v);
  }
}

template <typename T, Kind kKind, bool kValue, bool kGradient>
static void dense(const float* z, const float* t, int64_t vocabulary, const DensePass& pass, const Output& out,
                  DenseValue* value) {
  double divergence = 0, mean_score = 0;
  for (int64_t b = 0; b < pass.n; b += kBlock) {
    const int64_t end = smaller(b + kBlock, pass.n);
    Lanes terms{}, scores{};
    for (int64_t v = b; v < end; v += kLanes) {
      const Lanes logit = take(z + v, end - v);
      const Term x = term<kKind>(logit, take(t + v, end - v), pass);
      if (kValue) {
        terms += x.divergence;
        if (kKind != Kind::forward) scores = fmadd(x.q, x.score, scores);
      }
      if (kGradient) {
        const Lanes gradient = kKind == Kind::forward ? x.q : x.q * (x.score - pass.mean_score);
        const Lanes ce = pass.at_one == 0 ? Lanes{} : exp_negative(logit - pass.z_max) * pass.at_one;
        put<T>(out, fmadd(gradient, splat(pass.coefficient), ce), logit, v, end - v);
      }
    }
    divergence += sum(terms);
    mean_score += sum(scores);
  }
  if (kGradient) rest_of_row<T>(z, vocabulary, pass, out);
  if (kValue) *value = {divergence, mean_score};
}

}  // namespace

void head_logits(float* z, const float* bias, int64_t n, float scale, float softcap) {
  for (int64_t v = 0; v < n; v += kLanes) {
    Lanes x = take(z + v, n - v);
    if (bias != nullptr) x += take(bias + v, n - v);
    x *= scale;
    if (softcap != 0) x = tanh_lanes(x / softcap) * softcap;
    if (n - v >= kLanes)
      store_lanes(z + v, x);
    else
      store_lanes(z + v, x, static_cast<int>(n - v));
  }
}

void log_sum(const float* z, int64_t n, float inv_tau, LogSum* result) {
  inv_tau == 1 ? log_sum_of<false>(z, n, inv_tau, result) : log_sum_of<true>(z, n, inv_tau, result);
}

void tail_gradient(const float* z, int64_t n, const TailGradient& g, const Output& out) {
  if (out.is_bf16)
    g.at_one == 0 ? tail_gradient_of<BF16, false>(z, n, g, out) : tail_gradient_of<BF16, true>(z, n, g, out);
  else
    g.at_one == 0 ? tail_gradient_of<F32, false>(z, n, g, out) : tail_gradient_of<F32, true>(z, n, g, out);
}

void dense_value(const float* z, const float* t, int64_t vocabulary, const DensePass& pass, const Output& out,
                 DenseValue* value) {
  if (pass.beta == 1) return dense<F32, Kind::reverse, true, false>(z, t, vocabulary, pass, out, value);
  if (pass.beta != 0) return dense<F32, Kind::js, true, false>(z, t, vocabulary, pass, out, value);
  if (out.dz == nullptr) return dense<F32, Kind::forward, true, false>(z, t, vocabulary, pass, out, value);
  if (out.is_bf16) return dense<BF16, Kind::forward, true, true>(z, t, vocabulary, pass, out, value);
  dense<F32, Kind::forward, true, true>(z, t, vocabulary, pass, out, value);
}

void dense_gradient(const float* z, const float* t, int64_t vocabulary, const DensePass& pass, const Output& out) {
  if (pass.beta == 1)
    out.is_bf16 ? dense<BF16, Kind::reverse, false, true>(z, t, vocabulary, pass, out, nullptr)
                : dense<F32, Kind::reverse, false, true>(z, t, vocabulary, pass, out, nullptr);
  else
    out.is_bf16 ? dense<BF16, Kind::js, false, true>(z, t, vocabulary, pass, out, nullptr)
                : dense<F32, Kind::js, false, true>(z, t, vocabulary, pass, out, nullptr);
}

}  // namespace ISA
}  // namespace rbfast
