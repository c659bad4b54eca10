// The arithmetic of the adapter's ops. Included by columns_{scalar,avx2,avx512}.cpp, each with its own target pragma
// and with ISA set to its namespace.
//
// The delta of a frozen weight W [out, in] is dW[:, cols] = scale * B A, so its gradients need, for xs = x[:, cols],
//     H = xs A^T,  dB = scale * dy^T H,  dH = scale * dy B,  dA = dH^T xs.
//
// Traffic: dy is the only large operand, T * out values, against k * (T + out) for its partners and results. `sweep`
// reads it once for both of its products; it also computes H (dot only) and dA (outer only). A tile of a few tokens
// shares each load of m and acc, and features come in strips, so that those 2k rows stay in L1 while the tokens stream
// past. The shapes alone fix the order of every sum.
#include "cpu/columns.h"

// For loops over a tile: its arrays live in registers only if every index is a constant.
#define RBFAST_UNROLL _Pragma("GCC unroll 8")

namespace rbfast {
namespace ISA {
namespace {

// Load or store a row's values [v, v + kLanes), of which only the first `valid` exist.
template <typename T>
inline Lanes load_at(const T* row, int64_t v, int64_t valid) {
  return valid >= kLanes ? load_lanes(row + v) : load_lanes(row + v, static_cast<int>(valid));
}
template <typename T>
inline void store_at(T* row, int64_t v, int64_t valid, Lanes value) {
  valid >= kLanes ? store_lanes(row + v, value) : store_lanes(row + v, value, static_cast<int>(valid));
}

// Calls f(v, valid) for every vector of a row of n values; valid is below kLanes only for the last one.
template <typename F>
inline void for_lanes(int64_t n, const F& f) {
  int64_t v = 0;
  for (; v + kLanes <= n; v += kLanes) f(v, kLanes);
  if (v < n) f(v, n - v);
}

// One pass over x [tokens, n]: dot [tokens, k] += x m^T and/or acc [k, n] += w^T x; m and acc have row stride n_all.
template <typename T>
struct Sweep {
  const T* x;
  int64_t ld, tokens, n, n_all, k;
  const float* m;
  float* dot;
  const float* w;
  float* acc;
};

// kTokens tokens from t, kRank ranks from i.
template <typename T, bool kDot, bool kOuter, int kRank, int kTokens>
inline void sweep_tile(const Sweep<T>& s, int64_t t, int64_t i) {
  constexpr int kAhead = 8;  // tokens to prefetch ahead: rows are too short for the hardware prefetcher
  Lanes dot[kTokens][kRank] = {}, w[kTokens][kRank] = {};
  if (kOuter) {
    RBFAST_UNROLL
    for (int a = 0; a < kTokens; ++a) RBFAST_UNROLL
    for (int b = 0; b < kRank; ++b) w[a][b] = splat(s.w[(t + a) * s.k + i + b]);
  }
  const T* x = s.x + t * s.ld;
  const float* m = kDot ? s.m + i * s.n_all : nullptr;
  float* acc = kOuter ? s.acc + i * s.n_all : nullptr;
  for_lanes(s.n, [&](int64_t v, int64_t valid) __attribute__((always_inline)) {
    Lanes value[kTokens];
    RBFAST_UNROLL
    for (int a = 0; a < kTokens; ++a) {
      value[a] = load_at(x + a * s.ld, v, valid);
      __builtin_prefetch(x + (a + kAhead) * s.ld + v);
    }
    RBFAST_UNROLL
    for (int b = 0; b < kRank; ++b) {
      if (kDot) {
        const Lanes row = load_at(m + b * s.n_all, v, valid);
        RBFAST_UNROLL
        for (int a = 0; a < kTokens; ++a) dot[a][b] = fmadd(value[a], row, dot[a][b]);
      }
      if (kOuter) {
        Lanes total = load_at(acc + b * s.n_all, v, valid);
        RBFAST_UNROLL
        for (int a = 0; a < kTokens; ++a) total = fmadd(value[a], w[a][b], total);
        store_at(acc + b * s.n_all, v, valid, total);
      }
    }
  });
  if (kDot) {
    RBFAST_UNROLL
    for (int a = 0; a < kTokens; ++a) RBFAST_UNROLL
    for (int b = 0; b < kRank; ++b) s.dot[(t + a) * s.k + i + b] += sum(dot[a][b]);
  }
}

template <typename T, bool kDot, bool kOuter, int kRank>
void sweep_tokens(const Sweep<T>& s, int64_t i) {
  constexpr int kTokens = kRank == 1 ? 8 : kRank == 2 ? 4 : 2;
  int64_t t = 0;
  for (; t + kTokens <= s.tokens; t += kTokens) sweep_tile<T, kDot, kOuter, kRank, kTokens>(s, t, i);
  for (; t < s.tokens; ++t) sweep_tile<T, kDot, kOuter, kRank, 1>(s, t, i);
}

template <typename T, bool kDot, bool kOuter>
void sweep(const Sweep<T>& s) {
  constexpr int64_t kFeatures = 2048;
  for (int64_t begin = 0; begin < s.n; begin += kFeatures) {
    Sweep<T> part = s;
    part.n = s.n - begin < kFeatures ? s.n - begin : kFeatures;
    part.x += begin;
    if (kDot) part.m += begin;
    if (kOuter) part.acc += begin;
    int64_t i = 0;
    for (; i + 4 <= s.k; i += 4) sweep_tokens<T, kDot, kOuter, 4>(part, i);
    for (; i + 2 <= s.k; i += 2) sweep_tokens<T, kDot, kOuter, 2>(part, i);
    for (; i < s.k; ++i) sweep_tokens<T, kDot, kOuter, 1>(part, i);
  }
}

// target[v] = base[v] + sum_i w[i] m[i, v] for a row of n values; m has row stride ld. The sum starts at zero and runs
// in order of i, and each product is rounded before it is added: the same bits on every CPU. With k = 0 the base is
// copied bitwise.
template <typename T>
inline void add_low_rank(const T* base, T* target, int64_t n, const float* w, const float* m, int64_t ld, int64_t k) {
  if (k == 0) {
    for (int64_t v = 0; v < n; ++v) target[v] = base[v];
    return;
  }
  for_lanes(n, [=](int64_t v, int64_t valid) __attribute__((always_inline)) {
    Lanes total = {};
    for (int64_t i = 0; i < k; ++i) total = total + splat(w[i]) * load_at(m + i * ld, v, valid);
    store_at(target, v, valid, load_at(base, v, valid) + total);
  });
}

// to[to_at(j)] = from[from_at(j)] for j < s; within a run both indices are consecutive.
template <int64_t kRun, typename T, typename To, typename From>
inline void copy_runs(T* to, const To& to_at, const T* from, const From& from_at, int64_t s) {
  for (int64_t j = 0; j < s; j += kRun) __builtin_memcpy(to + to_at(j), from + from_at(j), kRun * sizeof(T));
}
template <typename T, typename To, typename From>
inline void copy_columns(T* to, const To& to_at, const T* from, const From& from_at, int64_t s, int64_t run) {
  switch (run) {
    case 16:
      return copy_runs<16>(to, to_at, from, from_at, s);
    case 8:
      return copy_runs<8>(to, to_at, from, from_at, s);
    case 4:
      return copy_runs<4>(to, to_at, from, from_at, s);
    case 2:
      return copy_runs<2>(to, to_at, from, from_at, s);
    default:
      return copy_runs<1>(to, to_at, from, from_at, s);
  }
}

// target(r, offset[j]) = base + w m, with w [rows, k], m [k, s], and base [rows, s] of row stride ld, or the target's
// own values if base is null. A tile is computed on the stack, then written along the smaller stride.
template <typename T>
void update_columns(T* target, int64_t row, const int64_t* offset, int64_t rows, int64_t s, int64_t run, const T* base,
                    int64_t ld, int64_t k, const float* w, const float* m) {
  constexpr int64_t kTileRows = 32, kTileCols = 256;
  const auto in_order = [](int64_t j) { return j; };
  for (int64_t first = 0; first < s; first += kTileCols) {
    const int64_t columns = s - first < kTileCols ? s - first : kTileCols;
    const auto at = [=](int64_t j) { return offset[first + j]; };
    for (int64_t begin = 0; begin < rows; begin += kTileRows) {
      const int64_t end = rows - begin < kTileRows ? rows : begin + kTileRows;
      T tile[kTileRows][kTileCols];
      for (int64_t r = begin; r < end; ++r) {
        T* line = tile[r - begin];
        if (base == nullptr) copy_columns(line, in_order, target + r * row, at, columns, run);
        add_low_rank(base == nullptr ? line : base + r * ld + first, line, columns, w + r * k, m + first, s, k);
      }
      if (row == 1) {
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t r = begin; r < end; ++r) target[r + offset[first + j]] = tile[r - begin][j];
      } else {
        for (int64_t r = begin; r < end; ++r)
          copy_columns(target + r * row, at, tile[r - begin], in_order, columns, run);
      }
    }
  }
}

template <typename T>
void gather(const T* x, int64_t ld, int64_t tokens, const int32_t* cols, int64_t s, int64_t run, T* xs) {
  const auto at = [=](int64_t j) { return static_cast<int64_t>(cols[j]); };
  const auto in_order = [](int64_t j) { return j; };
  for (int64_t t = 0; t < tokens; ++t, x += ld, xs += s) copy_columns(xs, in_order, x, at, s, run);
}

}  // namespace

#define RBFAST_DEFINE_COLUMN_KERNELS(T)                                                                            \
  void column_gather(const T* x, int64_t ld, int64_t tokens, const int32_t* cols, int64_t s, int64_t run, T* xs) { \
    gather(x, ld, tokens, cols, s, run, xs);                                                                       \
  }                                                                                                                \
  void column_dot(const T* x, int64_t ld, int64_t tokens, int64_t n, int64_t k, const float* m, float* dot) {      \
    sweep<T, true, false>({x, ld, tokens, n, n, k, m, dot, nullptr, nullptr});                                     \
  }                                                                                                                \
  void column_outer(const T* x, int64_t ld, int64_t tokens, int64_t n, int64_t k, const float* w, float* acc) {    \
    sweep<T, false, true>({x, ld, tokens, n, n, k, nullptr, nullptr, w, acc});                                     \
  }                                                                                                                \
  void column_dot_outer(const T* x, int64_t ld, int64_t tokens, int64_t n, int64_t k, const float* m, float* dot,  \
                        const float* w, float* acc) {                                                              \
    sweep<T, true, true>({x, ld, tokens, n, n, k, m, dot, w, acc});                                                \
  }                                                                                                                \
  void column_add(T* y, int64_t ld, int64_t tokens, int64_t n, int64_t k, const float* w, const float* m) {        \
    for (int64_t t = 0; t < tokens; ++t, y += ld, w += k) add_low_rank(y, y, n, w, m, n, k);                       \
  }                                                                                                                \
  void column_update(T* target, int64_t row, const int64_t* offset, int64_t rows, int64_t s, int64_t run,          \
                     const T* base, int64_t ld, int64_t k, const float* w, const float* m) {                       \
    update_columns(target, row, offset, rows, s, run, base, ld, k, w, m);                                          \
  }

RBFAST_DEFINE_COLUMN_KERNELS(F32)
RBFAST_DEFINE_COLUMN_KERNELS(BF16)
RBFAST_DEFINE_COLUMN_KERNELS(F16)

}  // namespace ISA
}  // namespace rbfast
