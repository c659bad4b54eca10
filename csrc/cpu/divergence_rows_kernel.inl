// The passes over a row of logits. Included by divergence_rows_{scalar,avx2,avx512}.cpp, each with its own target
// pragma and with ISA set to its namespace.
//
// Traffic: a row of 50k logits is 200 KB. The first pass reads it from memory, the later ones from L2. The gradient may
// overwrite the logits, since its element v lies at or before logit v.
#include "cpu/divergence_rows.h"

namespace rbfast {
namespace ISA {
namespace {

// Up to this many values are summed in fp32; the block sums are added in fp64.
constexpr int64_t kBlock = 64 * kLanes;

// The first pass over a row prefetches this far ahead: the hardware prefetcher stops at the end of a page.
constexpr int64_t kAhead = 2048;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls f(v, left) for every vector of [begin, end); left is below kLanes only for the last one. In the loop it is a
// constant, so that whole vectors are not tested.
template <typename F>
static inline __attribute__((always_inline)) void for_lanes(int64_t begin, int64_t end, const F& f) {
  int64_t v = begin;
  for (; v + kLanes <= end; v += kLanes) f(v, kLanes);
  if (v < end) f(v, end - v);
}

// kLanes logits, of which the first `left` exist; the others become kLeastLogit.
static inline __attribute__((always_inline)) Lanes load_logits(const float* p, int64_t left) {
  Lanes z = left >= kLanes ? load_lanes(p) : load_lanes(p, static_cast<int>(left));
  if (left < kLanes)
    for (int i = static_cast<int>(left); i < kLanes; ++i) z[i] = kLeastLogit;
  return larger(z, splat(kLeastLogit));
}

// Applies the label and the head's derivative to kLanes values of the gradient at column v, and stores them.
template <typename T>
static inline __attribute__((always_inline)) void store_gradient(const Output& out, Lanes gradient, Lanes z, int64_t v,
                                                                 int64_t left) {
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
  float top = kLeastLogit;
  double at_tau = 0, at_one = 0;
  for (int64_t b = 0; b < n; b += kBlock) {
    const int64_t end = smaller(b + kBlock, n);
    Lanes most = splat(kLeastLogit);
    for_lanes(b, end, [&](int64_t v, int64_t left) __attribute__((always_inline)) {
      __builtin_prefetch(z + v + kAhead);
      most = larger(most, load_logits(z + v, left));
    });
    float block_top = kLeastLogit;
    for (int i = 0; i < kLanes; ++i) block_top = most[i] > block_top ? most[i] : block_top;
    if (block_top > top) {
      at_tau *= __builtin_exp((static_cast<double>(top) - block_top) * inv_tau);
      at_one *= __builtin_exp(static_cast<double>(top) - block_top);
      top = block_top;
    }
    Lanes sum_tau{}, sum_one{};
    for_lanes(b, end, [&](int64_t v, int64_t left) __attribute__((always_inline)) {
      const Lanes x = load_logits(z + v, left) - top;
      sum_tau += exp_in_sum(kTwo ? x * inv_tau : x);
      if (kTwo) sum_one += exp_in_sum(x);
    });
    at_tau += sum(sum_tau);
    if (kTwo) at_one += sum(sum_one);
  }
  *result = {top, at_tau, kTwo ? at_one : at_tau};
}

template <typename T, bool kTwo>
static void tail_gradient_of(const float* z, int64_t n, const TailGradient& in, const Output& to) {
  const TailGradient g = in;  // copies, which stores through dz cannot alias
  const Output out = to;
  for_lanes(0, n, [&](int64_t v, int64_t left) __attribute__((always_inline)) {
    __builtin_prefetch(z + v + out.row_stride, 0, 2);
    const Lanes logit = load_logits(z + v, left), x = logit - g.max;
    Lanes gradient = exp_negative(x * g.inv_tau) * g.at_tau;
    if (kTwo) gradient = fmadd(exp_negative(x), splat(g.at_one), gradient);
    store_gradient<T>(out, gradient, logit, v, left);
  });
}

// Columns that the teacher lacks: CE alone.
template <typename T>
static void rest_of_row(const float* z, int64_t vocabulary, const DensePass& pass, const Output& out) {
  for_lanes(pass.n, vocabulary, [&](int64_t v, int64_t left) __attribute__((always_inline)) {
    const Lanes logit = load_logits(z + v, left);
    store_gradient<T>(out, exp_negative(logit - pass.z_max) * pass.at_one, logit, v, left);
  });
}

template <typename T, Kind kKind, bool kValue, bool kGradient>
static void dense(const float* z, const float* t, int64_t vocabulary, const DensePass& in, const Output& to,
                  DenseValue* value) {
  const DensePass pass = in;  // copies, as above
  const Output out = to;
  double divergence = 0, mean_score = 0;
  for (int64_t b = 0; b < pass.n; b += kBlock) {
    const int64_t end = smaller(b + kBlock, pass.n);
    Lanes terms{}, scores{};
    for_lanes(b, end, [&](int64_t v, int64_t left) __attribute__((always_inline)) {
      __builtin_prefetch(z + v + out.row_stride, 0, 2);
      __builtin_prefetch(t + v + out.teacher_stride, 0, 2);
      const Lanes logit = load_logits(z + v, left);
      const Term x = term<kKind>(logit, load_logits(t + v, left), pass);
      if (kValue) {
        terms += x.divergence;
        if (kKind != Kind::forward) scores = fmadd(x.q, x.score, scores);
      }
      if (kGradient) {
        const Lanes gradient = kKind == Kind::forward ? x.q : x.q * (x.score - pass.mean_score);
        const Lanes ce = pass.at_one == 0 ? Lanes{} : exp_negative(logit - pass.z_max) * pass.at_one;
        store_gradient<T>(out, fmadd(gradient, splat(pass.coefficient), ce), logit, v, left);
      }
    });
    divergence += sum(terms);
    mean_score += sum(scores);
  }
  if (kGradient) rest_of_row<T>(z, vocabulary, pass, out);
  if (kValue) *value = {divergence, mean_score};
}

}  // namespace

void head_logits(float* z, const float* bias, int64_t n, float scale, float softcap) {
  for_lanes(0, n, [&](int64_t v, int64_t left) __attribute__((always_inline)) {
    Lanes x = load_logits(z + v, left);
    if (bias != nullptr) x += load_logits(bias + v, left);
    x *= scale;
    if (softcap != 0) x = tanh_lanes(x / softcap) * softcap;
    if (left >= kLanes)
      store_lanes(z + v, x);
    else
      store_lanes(z + v, x, static_cast<int>(left));
  });
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
