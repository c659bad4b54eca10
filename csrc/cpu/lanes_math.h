// exp, log1p and tanh of a vector, to about one unit in the last place, with the small differences kept apart: what a
// divergence between two close distributions is made of. Included by ISA files only.
//
// A NaN goes through: every clamp is written so that a comparison with NaN keeps it.
#pragma once

#include "cpu/lanes.h"

namespace rbfast {

typedef int32_t LaneInts __attribute__((vector_size(kLanes * 4)));

static inline Lanes larger(Lanes a, Lanes b) { return b > a ? b : a; }
static inline Lanes magnitude(Lanes v) { return reinterpret_cast<Lanes>(reinterpret_cast<LaneBits>(v) & 0x7fffffff); }

// exp(x) = 2^n (1 + r + square), |r| <= ln2 / 2, with square = r^2 P(r). For x in [-87, 0].
struct ExpParts {
  Lanes r, square, scale;
  LaneInts is_near;  // n = 0
};

static inline ExpParts exp_parts(Lanes x) {
  const Lanes shifted = fmadd(x, splat(1.44269504f), splat(12582912.0f));  // n in the low bits
  const Lanes n = shifted - 12582912.0f;
  const Lanes r = fmadd(n, splat(2.12194440e-4f), fmadd(n, splat(-0.693359375f), x));
  Lanes p = fmadd(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
  p = fmadd(p, r, splat(8.3334519073e-3f));
  p = fmadd(p, r, splat(4.1665795894e-2f));
  p = fmadd(p, r, splat(1.6666665459e-1f));
  p = fmadd(p, r, splat(5.0000001201e-1f));
  const LaneInts exponent = reinterpret_cast<LaneInts>(shifted) - 0x4b400000 + 127;
  return {r, p * (r * r), reinterpret_cast<Lanes>(exponent << 23), n == splat(0.0f)};
}

// exp(x) for x <= 0; 0 below -87.
static inline Lanes exp_negative(Lanes x) {
  const Lanes bounded = x < splat(-87.0f) ? splat(-87.0f) : x;
  const ExpParts e = exp_parts(bounded);
  const Lanes value = (e.r + e.square + 1.0f) * e.scale;
  return x < splat(-87.0f) ? splat(0.0f) : value;
}

// For x <= 0: all = exp(x), change = exp(x) - 1, rest = exp(x) - 1 - x >= 0.
struct ExpChange {
  Lanes all, change, rest;
};

static inline ExpChange exp_change(Lanes x) {
  const Lanes bounded = x < splat(-87.0f) ? splat(-87.0f) : x;
  const ExpParts e = exp_parts(bounded);
  const Lanes small = e.r + e.square;
  const Lanes far = x < splat(-87.0f) ? splat(0.0f) : (small + 1.0f) * e.scale;
  return {e.is_near ? small + 1.0f : far, e.is_near ? small : far - 1.0f, e.is_near ? e.square : far - 1.0f - x};
}

// For w > -1, given with y = 1 + w (which may be known better than by adding 1): log(1 + w), and w - log(1 + w) >= 0.
struct LogParts {
  Lanes log, rest;
};

static inline LogParts log1p_parts(Lanes w, Lanes y) {
  // 1 + w = 2^k f with f in [sqrt(1/2), sqrt(2)); log(1 + u) = 2 s + 2 s^3 (1/3 + s^2/5 + ...) with s = u / (2 + u).
  const LaneInts bits = reinterpret_cast<LaneInts>(y);
  const LaneInts k = (bits - 0x3f3504f3) >> 23;
  const LaneInts is_near = k == 0;
  const Lanes u = is_near ? w : reinterpret_cast<Lanes>(bits - (k << 23)) - 1.0f;
  const Lanes s = u / (u + 2.0f), s2 = s * s;
  Lanes p = fmadd(s2, splat(2.0f / 11), splat(2.0f / 9));
  p = fmadd(p, s2, splat(2.0f / 7));
  p = fmadd(p, s2, splat(2.0f / 5));
  p = fmadd(p, s2, splat(2.0f / 3)) * s2;
  const Lanes power = __builtin_convertvector(k, Lanes) * 0.693147181f;
  const Lanes log = fmadd(p, s, s + s) + power;
  return {log, is_near ? s * (w - p) : w - log};
}

static inline Lanes tanh_lanes(Lanes x) {
  const Lanes t = exp_change(magnitude(x) * -2.0f).change;
  const Lanes value = -t / (t + 2.0f);
  return x < splat(0.0f) ? -value : value;
}

}  // namespace rbfast
