// A packed matrix product for the instruction set ISA; included by head_gemm_filtered_kernel.inl.
//
// The unit of work is a tile of kRows x 3 vectors of C, held in registers while k runs. Both operands are packed first:
// a panel of A holds kRows values for each k, a panel of B three vectors for each k, both read in order, so the inner
// loop is one load per vector, one broadcast per row and kRows * 3 multiply-adds. Under AVX512_BF16 a packed word is a
// pair of bf16 values of consecutive k and one instruction does 32 multiply-adds; elsewhere a word is an fp32 value.
//
// Traffic: A is packed once per block of rows; a panel of B (18 KiB) is packed just before it is used and stays in L1
// while all rows of the block pass over it. So each element of a large B is read once per row block.
//
// Order of sums: k is cut at multiples of kBlockK, and sums run in order inside a block. With Sums::fresh, blocks are
// added to C in order, which has smaller errors. With Sums::resumed, the sum continues from the value in C: it is
// bitwise the same wherever it was interrupted, at any even k. Nothing depends on the size of the rectangle, so nothing
// depends on the threads.
#include "cpu/head_gemm.h"

namespace rbfast {
namespace ISA {
namespace {

#if defined(BF16_PAIRS)
typedef uint32_t Word;
typedef LaneBits Words;
constexpr int kDepth = 2;  // values of k in a word
constexpr int kBlockK = 192;
#else
typedef float Word;
typedef Lanes Words;
constexpr int kDepth = 1;
constexpr int kBlockK = 96;
#endif
#if RBFAST_LANES == 16
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;
constexpr int kColumns = kVectors * kLanes;

static inline Lanes multiply_add(Word a, Words b, Lanes sum) {
#if defined(BF16_PAIRS)
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
  return fmadd(splat(a), b, sum);
#endif
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t words(int64_t depth) { return (depth + kDepth - 1) / kDepth; }

// ---- packing: panel[k][i] = word k of outer i ----

#if defined(BF16_PAIRS)
static inline Word word(const BF16* p, int64_t k_stride, bool whole) {
  return p->bits | (whole ? static_cast<Word>(p[k_stride].bits) << 16 : 0);
}
static inline Words load_words(const BF16* p) {
  Words w;
  memcpy(&w, p, sizeof w);
  return w;
}
#else
template <typename T>
static inline Word word(const T* p, int64_t, bool) {
  return load(p);
}
template <typename T>
static inline Words load_words(const T* p) {
  return load_lanes(p);
}
#endif

// Interleaves the words of a and b: a0 b0 a1 b1 ... in low, then high.
static inline void interleave(Words a, Words b, Words& low, Words& high) {
#if defined(__clang__)  // it lacks __builtin_shuffle, and compiles vectors of four only
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  LaneBits first, second;
  for (int i = 0; i < kLanes; ++i) {
    first[i] = i / 2 + (i % 2) * kLanes;
    second[i] = first[i] + kLanes / 2;
  }
  low = __builtin_shuffle(a, b, first);
  high = __builtin_shuffle(a, b, second);
#endif
}

// Packs kLanes words of each of R outers, k contiguous: interleaving R vectors log2(R) times puts them in panel order.
template <int R, typename T>
static inline void pack_block(const T* const* outers, int64_t k, Word* panel, int ld) {
  Words v[R], w[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) v[i] = outers[i] ? load_words(outers[i] + k) : Words{};
#pragma GCC unroll 4
  for (int stage = 1; stage < R; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < R / 2; ++i) interleave(v[i], v[i + R / 2], w[2 * i], w[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) v[i] = w[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) memcpy(panel + i * kLanes / R * ld, &v[i], sizeof(Words));
}

// Packs words [0, count) of R outers to panel[k * ld + i]; outers beyond `valid` and k beyond `depth` are zero.
template <int R, typename T>
static void pack_outers(const T* x, const Operand& g, int64_t valid, int64_t depth, Word* panel, int ld) {
  const int64_t count = words(depth);
  int64_t done = 0;
  if (g.k_stride == 1) {
    const T* outers[R];
    for (int i = 0; i < R; ++i) outers[i] = i < valid ? x + i * g.outer_stride : nullptr;
    for (; (done + kLanes) * kDepth <= depth; done += kLanes)
      pack_block<R>(outers, done * kDepth, panel + done * ld, ld);
  } else if (valid >= R && g.outer_stride == 1) {
    for (; (done + 1) * kDepth <= depth; ++done) {
      const T* p = x + done * kDepth * g.k_stride;
      for (int i = 0; i < R; ++i) panel[done * ld + i] = word(p + i, g.k_stride, true);
    }
  }
  for (; done < count; ++done) {
    const bool whole = (done + 1) * kDepth <= depth;
    for (int i = 0; i < R; ++i)
      panel[done * ld + i] =
          i < valid ? word(x + i * g.outer_stride + done * kDepth * g.k_stride, g.k_stride, whole) : Word{};
  }
}

// Calls f with a pointer to element `offset` of x, in its type.
template <typename F>
static inline void typed(const Operand& x, int64_t offset, const F& f) {
#if !defined(BF16_PAIRS)
  if (x.type == Storage::f32) return f(static_cast<const F32*>(x.data) + offset);
  if (x.type == Storage::f16) return f(static_cast<const F16*>(x.data) + offset);
#endif
  f(static_cast<const BF16*>(x.data) + offset);
}

// Packs a panel of `Width` outers from `outer`, in groups of R, for k in [k0, k0 + depth).
template <int R, int Width>
static void pack(const Operand& x, int64_t outer, int64_t end, int64_t k0, int64_t depth, Word* panel) {
  typed(x, outer * x.outer_stride + k0 * x.k_stride, [&](const auto* p) {
    for (int i = 0; i < Width; i += R)
      pack_outers<R>(p + i * x.outer_stride, x, end - outer - i, depth, panel + i, Width);
  });
}

// Prefetches the cache lines of the next panel of B, evenly while tiles are computed: all at once they would fill the
// core's miss buffers and stall it, and a prefetch every four words made products 17% slower on a Zen 3.
struct Ahead {
  const char* run;  // `length` contiguous bytes; `runs` such stretches are left
  int64_t at, length, stride, runs;
  int64_t every;  // words of k between two prefetches: about the last tile completes them, if there are enough words

  inline void ask() {
    if (runs <= 0) return;
    __builtin_prefetch(run + at, 0, 2);
    at += 64;
    if (at < length) return;
    at = 0;
    run += stride;
    --runs;
  }
};

static inline Ahead panel_ahead(const Operand& x, int64_t outer, int64_t end, int64_t k0, int64_t depth,
                                int64_t tiles) {
  const int64_t bytes = x.type == Storage::f32 ? 4 : 2, outers = smaller(kColumns, end - outer);
  const char* first = static_cast<const char*>(x.data) + (outer * x.outer_stride + k0 * x.k_stride) * bytes;
  const bool along_k = x.k_stride == 1;
  Ahead ahead{first,
              0,
              along_k ? depth * bytes : outers * bytes,
              (along_k ? x.outer_stride : x.k_stride) * bytes,
              along_k ? outers : depth,
              1};
  const int64_t lines = (ahead.length + 63) / 64 * ahead.runs, asked = words(depth) * tiles;
  if (asked > lines) ahead.every = asked / lines;
  return ahead;
}

// ---- the tile ----

enum class Update { set, add, resume };

// Words of B in order, or those of `places` if kPicked.
struct Panel {
  const Word* words;
  const int16_t* places;
};

template <bool kPicked>
static inline void tile(const Word* a, Panel b, int64_t count, float* c, int64_t ldc, Update update, Ahead& ahead) {
  Lanes sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j)
      sums[i][j] = update == Update::resume ? load_lanes(c + i * ldc + j * kLanes) : Lanes{};
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) __builtin_prefetch(c + i * ldc + j * kLanes, 1);
  for (int64_t k = 0; k < count;) {
    ahead.ask();
    for (const int64_t stop = smaller(k + ahead.every, count); k < stop; ++k) {
      const Word* word_of_b = kPicked ? b.words + b.places[k] * kColumns : b.words + k * kColumns;
      Words columns[kVectors];  // loaded one by one: a copy of all three would go through the stack
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) memcpy(&columns[j], word_of_b + j * kLanes, sizeof(Words));
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) sums[i][j] = multiply_add(a[k * kRows + i], columns[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * ldc + j * kLanes;
      store_lanes(to, update == Update::add ? load_lanes(to) + sums[i][j] : sums[i][j]);
    }
}

// A tile of `rows` x `columns` at the edge of C: the same arithmetic on a whole tile in a buffer.
template <bool kPicked>
static void edge_tile(const Word* a, Panel b, int64_t count, float* c, int64_t ldc, Update update, int64_t rows,
                      int64_t columns, Ahead& ahead) {
  float whole[kRows * kColumns] = {};
  if (update != Update::set)
    for (int64_t i = 0; i < rows; ++i) memcpy(whole + i * kColumns, c + i * ldc, columns * sizeof(float));
  tile<kPicked>(a, b, count, whole, kColumns, update, ahead);
  for (int64_t i = 0; i < rows; ++i) memcpy(c + i * ldc, whole + i * kColumns, columns * sizeof(float));
}

}  // namespace

void gemm(const Gemm& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1, void* scratch) {
  Word* panel_b = static_cast<Word*>(scratch);
  Word* panels_a = panel_b + kColumns * kBlockK;
  const int64_t k_block = gemm_k_block(g.k);
  for (int64_t kb = 0; kb < g.k; kb += k_block) {
    const int64_t kb_end = smaller(kb + k_block, g.k);
    // Panels of A are cut at the same k as B: panel (row group r, block) starts at (r * padded + block start) * kRows.
    const int64_t padded = words(k_block);
    for (int64_t mb = m0; mb < m1; mb += kRowBlock) {
      const int64_t mb_end = smaller(mb + kRowBlock, m1);
      for (int64_t m = mb; m < mb_end; m += kRows)
        pack<kRows, kRows>(g.a, m, mb_end, kb, kb_end - kb, panels_a + (m - mb) * padded);
      for (int64_t n = n0; n < n1; n += kColumns) {
        for (int64_t k = kb; k < kb_end; k += kBlockK) {
          const int64_t depth = smaller(kBlockK, kb_end - k);
          pack<kLanes, kColumns>(g.b, n, n1, k, depth, panel_b);
          const Update update = g.sums == Sums::resumed ? Update::resume : k == 0 ? Update::set : Update::add;
          const int64_t columns = smaller(kColumns, n1 - n);
          const int64_t tiles = (mb_end - mb + kRows - 1) / kRows;
          Ahead ahead{};
          ahead.every = kBlockK;
          if (const int64_t next = k + kBlockK; next < kb_end)
            ahead = panel_ahead(g.b, n, n1, next, smaller(kBlockK, kb_end - next), tiles);
          else if (n + kColumns < n1)
            ahead = panel_ahead(g.b, n + kColumns, n1, kb, smaller(kBlockK, kb_end - kb), tiles);
          for (int64_t m = mb; m < mb_end; m += kRows) {
            const Word* panel_a = panels_a + (m - mb) * padded + words(k - kb) * kRows;
            const int64_t rows = smaller(kRows, mb_end - m);
            float* c = g.c + m * g.ldc + n;
            if (rows == kRows && columns == kColumns)
              tile<false>(panel_a, {panel_b, nullptr}, words(depth), c, g.ldc, update, ahead);
            else
              edge_tile<false>(panel_a, {panel_b, nullptr}, words(depth), c, g.ldc, update, rows, columns, ahead);
          }
        }
      }
    }
  }
}

}  // namespace ISA
}  // namespace rbfast
