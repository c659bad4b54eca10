// head_gemm_kernel.inl, and a product of its words and tiles that skips the smallest values of A. Included by
// head_gemm_{scalar,avx2,avx512,avx512_bf16}.cpp, each with its own target pragma and with ISA set to its namespace.
//
// A group of kRows rows needs only the words of k in which one of its rows keeps a value; a block of rows needs the
// words of all its groups. Panels of B hold the block's words, and a group's tile picks its own words from them. A
// row's sum runs over k in order, and words needed by other rows only add zeros to it: its bits do not depend on the
// rows beside it, as long as B is finite.
#include "cpu/head_gemm_kernel.inl"

namespace rbfast {
namespace ISA {
namespace {

constexpr int64_t kPanels = (kFilteredWords + kFilteredPanel - 1) / kFilteredPanel;
constexpr int64_t kGroups = kRowBlock / kRows;

static inline Lanes magnitude(Lanes v) { return as_lanes(as_ints(v) & 0x7fffffff); }

template <typename T>
static inline Lanes magnitudes(const T* p, int64_t left) {
  return magnitude(left < kLanes ? load_lanes(p, static_cast<int>(left)) : load_lanes(p));
}

// sum + v in lanes where v < limit, sum in the others.
static inline Lanes add_below(Lanes sum, Lanes v, Lanes limit) {
#if RBFAST_LANES == 16
  return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(v, limit, _CMP_LT_OQ), sum, v);
#else
  return v < limit ? sum + v : sum;
#endif
}

// ---- the threshold of a row ----

// Thresholds to try, as shares of the sum that may be left out: 2^-8, 2^-9 ... 2^-15. In a peaked row few values lie
// above the first, and it takes over 2^15 values below the last to exceed that sum.
constexpr int kThresholds = 8;
constexpr int kFirstThreshold = 8;

// The sum of a row's magnitudes below each of N limits. Sums in fp32 are short, to keep their rounding small.
template <int N, typename T>
static void sums_below(const T* row, int64_t count, const float* limits, double* found) {
  constexpr int64_t kBlock = 256 * kLanes;
  for (int j = 0; j < N; ++j) found[j] = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = smaller(start + kBlock, count);
    Lanes sums[N] = {};
    for (int64_t i = start; i < end; i += kLanes) {
      const Lanes size = magnitudes(row + i, end - i);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) sums[j] = add_below(sums[j], size, splat(limits[j]));
    }
    for (int j = 0; j < N; ++j) found[j] += sum(sums[j]);
  }
}

// ---- which words are needed ----

// The words of a piece of k that a group of rows needs, in order.
struct Needs {
  Word* values;                 // [count][kRows]
  int16_t* places;              // [count]: first the word of k, later its place in its panel of B
  int16_t starts[kPanels + 1];  // where each panel starts
};

// Marks each of `depth` values of k at which some row has a value not below its threshold.
template <typename T>
static void mark(const T* a, int64_t stride, int64_t rows, int64_t depth, const float* thresholds, LaneInts* marks) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    LaneInts any{};
    for (int64_t i = 0; i < rows; ++i) any |= ~(magnitudes(a + i * stride + k, depth - k) < splat(thresholds[i]));
    marks[k / kLanes] = any;
  }
}

// The bits of a value, or 0 if it is below the threshold. Without a branch, which could not be predicted.
static inline uint32_t bits_above(float value, float threshold) {
  uint32_t bits, limit;
  memcpy(&bits, &value, 4);
  memcpy(&limit, &threshold, 4);
  return (bits & 0x7fffffff) < limit ? 0 : bits;
}

// The word at p, with values below the threshold replaced by 0.
template <typename T>
static inline Word word_above(const T* p, float threshold, bool whole) {
#if defined(BF16_PAIRS)
  return bits_above(load(p), threshold) >> 16 | (whole ? bits_above(load(p + 1), threshold) : 0);
#else
  const uint32_t bits = bits_above(load(p), threshold);
  float value;
  memcpy(&value, &bits, 4);
  return value;
#endif
}

// Packs the words `order` of B, whose rows start at b, in panels of kColumns columns; columns beyond `columns` are
// zero.
template <typename T>
static void pack_needed(const T* b, int64_t stride, const int16_t* order, int64_t count, int64_t depth, int64_t columns,
                        Word* panels) {
  for (int64_t i = 0; i < count; ++i) {
    const T* p = b + order[i] * kDepth * stride;
    const T* soon = b + order[smaller(i + 2, count - 1)] * kDepth * stride;
    const bool whole = (order[i] + 1) * kDepth <= depth;
    Word* to = panels + i * kColumns;
    for (int64_t n = 0; n < columns; n += kColumns, to += kColumns * kFilteredPanel) {
      for (int d = 0; d < kDepth; ++d)
        for (int64_t line = 0; line < kColumns * int64_t{sizeof(T)}; line += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(soon + d * stride + n) + line);
      if (whole && columns - n >= kColumns)
        for (int j = 0; j < kColumns; ++j) to[j] = word(p + n + j, stride, true);
      else
        for (int j = 0; j < kColumns; ++j) to[j] = j + n < columns ? word(p + n + j, stride, whole) : Word{};
    }
  }
}

// Writes the words of k that the rows need to needs.places and marks them in `needed`; returns their number.
static int64_t find_needs(const Operand& a, const float* thresholds, int64_t m, int64_t rows, int64_t k, int64_t depth,
                          const Needs& needs, uint8_t* needed) {
  LaneInts marks[kFilteredWords * kDepth / kLanes];
  typed(a, m * a.outer_stride + k, [&](const auto* p) { mark(p, a.outer_stride, rows, depth, thresholds + m, marks); });
  const int32_t* marked = reinterpret_cast<const int32_t*>(marks);
  int64_t count = 0;
  for (int64_t w = 0; w < words(depth); ++w) {
    const int any = (marked[w * kDepth] | marked[w * kDepth + kDepth - 1]) & 1;
    needs.places[count] = static_cast<int16_t>(w);
    count += any;
    needed[w] |= any;
  }
  return count;
}

// Turns words of k in needs.places into places in the panels, by their `ranks` among the needed ones, and reads the
// rows' values there.
static void take_values(const Operand& a, const float* thresholds, int64_t m, int64_t rows, int64_t k, int64_t depth,
                        const int16_t* ranks, int64_t count, Needs& needs) {
  typed(a, m * a.outer_stride + k, [&](const auto* p) {
    int64_t panel = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t w = needs.places[i], rank = ranks[w];
      for (; panel <= rank / kFilteredPanel; ++panel) needs.starts[panel] = static_cast<int16_t>(i);
      needs.places[i] = static_cast<int16_t>(rank % kFilteredPanel);
      const bool whole = (w + 1) * kDepth <= depth;
      Word* to = needs.values + i * kRows;
      for (int64_t r = 0; r < rows; ++r)
        to[r] = word_above(p + r * a.outer_stride + w * kDepth, thresholds[m + r], whole);
      for (int64_t r = rows; r < kRows; ++r) to[r] = Word{};
    }
    for (; panel <= kPanels; ++panel) needs.starts[panel] = static_cast<int16_t>(count);
  });
}

// Adds the product over a piece of k to a rectangle of C.
static void add_piece(const Gemm& g, const float* thresholds, int64_t m0, int64_t m1, int64_t n0, int64_t n1, int64_t k,
                      int64_t depth, Needs* needs, Word* panels) {
  uint8_t needed[kFilteredWords] = {};
  int64_t counts[kGroups];
  for (int64_t m = m0, group = 0; m < m1; m += kRows, ++group)
    counts[group] = find_needs(g.a, thresholds, m, smaller(kRows, m1 - m), k, depth, needs[group], needed);
  int16_t order[kFilteredWords], ranks[kFilteredWords];
  int64_t total = 0;
  for (int64_t w = 0; w < words(depth); ++w) {
    ranks[w] = static_cast<int16_t>(total);
    order[total] = static_cast<int16_t>(w);
    total += needed[w];
  }
  for (int64_t m = m0, group = 0; m < m1; m += kRows, ++group)
    take_values(g.a, thresholds, m, smaller(kRows, m1 - m), k, depth, ranks, counts[group], needs[group]);
  Ahead nothing{};
  nothing.every = kBlockK;
  for (int64_t first = 0, p = 0; first < total; first += kFilteredPanel, ++p) {
    typed(g.b, n0 + k * g.b.k_stride, [&](const auto* b) {
      pack_needed(b, g.b.k_stride, order + first, smaller(kFilteredPanel, total - first), depth, n1 - n0, panels);
    });
    for (int64_t n = n0; n < n1; n += kColumns)
      for (int64_t m = m0, group = 0; m < m1; m += kRows, ++group) {
        const Needs& own = needs[group];
        const int64_t start = own.starts[p], count = own.starts[p + 1] - start;
        if (count == 0) continue;
        const Word* a = own.values + start * kRows;
        const Panel b{panels + (n - n0) * kFilteredPanel, own.places + start};
        const int64_t rows = smaller(kRows, m1 - m), columns = smaller(kColumns, n1 - n);
        float* c = g.c + m * g.ldc + n;
        if (rows == kRows && columns == kColumns)
          tile<true>(a, b, count, c, g.ldc, Update::resume, nothing);
        else
          edge_tile<true>(a, b, count, c, g.ldc, Update::resume, rows, columns, nothing);
      }
  }
}

}  // namespace

void row_threshold(const Operand& a, int64_t row, int64_t k, float share, float* threshold, float* left_out) {
  typed(a, row * a.outer_stride, [&](const auto* p) {
    const float everything = __builtin_inff();
    double total, below[kThresholds];
    sums_below<1>(p, k, &everything, &total);
    const double allowed = share * total;
    *threshold = 1e-45f;  // the smallest positive float: only zeros lie below
    *left_out = 0;
    if (!(allowed < __builtin_inff())) return;
    float limits[kThresholds];
    for (int j = 0; j < kThresholds; ++j)
      limits[j] = static_cast<float>(allowed) / static_cast<float>(1 << (kFirstThreshold + j));
    sums_below<kThresholds>(p, k, limits, below);
    for (int j = kThresholds - 1; j >= 0; --j) {
      const double bound = below[j] * (1 + 0x1p-12);  // more than the rounding of the sums
      if (!(bound <= allowed)) break;
      if (limits[j] > *threshold) *threshold = limits[j], *left_out = static_cast<float>(bound);
    }
  });
}

void filtered_gemm(const Gemm& g, const float* thresholds, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                   void* scratch) {
  Word* panels = static_cast<Word*>(scratch);
  Word* values = panels + (n1 - n0 + kColumns) * kFilteredPanel;
  int16_t* places = reinterpret_cast<int16_t*>(values + kRowBlock * kFilteredWords);
  Needs needs[kGroups];
  for (int64_t i = 0; i < kGroups; ++i) {
    needs[i].values = values + i * kRows * kFilteredWords;
    needs[i].places = places + i * kFilteredWords;
  }
  for (int64_t mb = m0; mb < m1; mb += kRowBlock) {
    const int64_t mb_end = smaller(mb + kRowBlock, m1);
    for (int64_t k = 0; k < g.k; k += kFilteredWords * kDepth)
      add_piece(g, thresholds, mb, mb_end, n0, n1, k, smaller(kFilteredWords * kDepth, g.k - k), needs, panels);
  }
}

}  // namespace ISA
}  // namespace rbfast
