// A matrix product with AMX tile instructions. Included by head_gemm_amx.cpp, and by the tests with an emulation of the
// instructions. Vectors are GCC's own, so that it compiles for any CPU.
//
// A tile instruction adds A [16, 32] B [32, 16] to C [16, 16]. A is stored in rows along k, B in words that pair two
// consecutive k of a column. A block of C, 2 x 2 tiles, stays in tile registers while k runs: four loads and four
// products a step, all from packed panels.
//
// Packing: if an operand is dense along k, rows of A are copied and columns of B transposed. Otherwise columns of B are
// interleaved from pairs of memory rows, and rows of A interleaved and transposed. (head_forward_ could pass its weight
// as A and transpose C instead: for 96 to 512 tokens and hidden sizes of 576 to 4096 that took as long.)
//
// Order of sums: within 32 values of k the instruction adds even and odd ones separately, then step follows step. Fresh
// sums restart at each block of k, and blocks are added in order; resumed sums continue from the value in C.
#include "cpu/head_gemm_amx.h"

namespace rbfast {
namespace amx {
namespace {

constexpr int64_t kTile = 16;
constexpr int64_t kTileBytes = 1024;
// Rows of memory to prefetch ahead of those being packed.
constexpr int64_t kRowsAhead = 8;

typedef uint32_t Words __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t Line __attribute__((vector_size(64)));
typedef uint64_t Pairs __attribute__((vector_size(64)));

template <typename T>
static inline T smaller(T a, T b) {
  return a < b ? a : b;
}

// Keeps writes before later tile instructions: the compiler does not know that these read memory.
static inline void compiler_barrier() { asm volatile("" ::: "memory"); }

template <typename V, typename T>
static inline V load_as(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
// The first n values, of two bytes each; the others are zero.
template <typename V>
static inline V load_as(const BF16* p, int64_t n) {
  if (n * 2 >= int64_t{sizeof(V)}) return load_as<V>(p);
  V v{};
  if (n > 0) memcpy(&v, p, n * 2);
  return v;
}

// ---- 16 x 16 words, transposed ----

#define RBFAST_EACH_LANE(a, b, c, d) \
  Words{a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12}
#define RBFAST_LANES_AT(a, b, c, d)                                                     \
  Words{4 * a, 4 * a + 1, 4 * a + 2, 4 * a + 3, 4 * b, 4 * b + 1, 4 * b + 2, 4 * b + 3, \
        4 * c, 4 * c + 1, 4 * c + 2, 4 * c + 3, 4 * d, 4 * d + 1, 4 * d + 2, 4 * d + 3}

// In each 16-byte lane, four of the eight values of each operand, interleaved.
#define RBFAST_ZIP_LANE(i) i, i + 32, i + 1, i + 33, i + 2, i + 34, i + 3, i + 35
#define RBFAST_ZIP(i) \
  Line { RBFAST_ZIP_LANE(i), RBFAST_ZIP_LANE(i + 8), RBFAST_ZIP_LANE(i + 16), RBFAST_ZIP_LANE(i + 24) }

static inline void transpose(Words* v) {
  Words t[16];
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {  // 4 x 4 words in each lane of 4 rows
    const Words a = __builtin_shuffle(v[g], v[g + 1], RBFAST_EACH_LANE(0, 16, 1, 17));
    const Words b = __builtin_shuffle(v[g], v[g + 1], RBFAST_EACH_LANE(2, 18, 3, 19));
    const Words c = __builtin_shuffle(v[g + 2], v[g + 3], RBFAST_EACH_LANE(0, 16, 1, 17));
    const Words d = __builtin_shuffle(v[g + 2], v[g + 3], RBFAST_EACH_LANE(2, 18, 3, 19));
    t[g] = __builtin_shuffle(a, c, RBFAST_EACH_LANE(0, 1, 16, 17));
    t[g + 1] = __builtin_shuffle(a, c, RBFAST_EACH_LANE(2, 3, 18, 19));
    t[g + 2] = __builtin_shuffle(b, d, RBFAST_EACH_LANE(0, 1, 16, 17));
    t[g + 3] = __builtin_shuffle(b, d, RBFAST_EACH_LANE(2, 3, 18, 19));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // 4 x 4 lanes
    const Words low = __builtin_shuffle(t[c], t[c + 4], RBFAST_LANES_AT(0, 1, 4, 5));
    const Words high = __builtin_shuffle(t[c], t[c + 4], RBFAST_LANES_AT(2, 3, 6, 7));
    const Words low_2 = __builtin_shuffle(t[c + 8], t[c + 12], RBFAST_LANES_AT(0, 1, 4, 5));
    const Words high_2 = __builtin_shuffle(t[c + 8], t[c + 12], RBFAST_LANES_AT(2, 3, 6, 7));
    v[c] = __builtin_shuffle(low, low_2, RBFAST_LANES_AT(0, 2, 4, 6));
    v[c + 4] = __builtin_shuffle(low, low_2, RBFAST_LANES_AT(1, 3, 5, 7));
    v[c + 8] = __builtin_shuffle(high, high_2, RBFAST_LANES_AT(0, 2, 4, 6));
    v[c + 12] = __builtin_shuffle(high, high_2, RBFAST_LANES_AT(1, 3, 5, 7));
  }
}

static inline void store_tile(char* to, const Words* v) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) memcpy(to + 64 * i, &v[i], 64);
}

// ---- packing ----

// Outer indices [begin, end) and k [k0, k0 + depth) of an operand. A panel has ceil(depth / kDepth) steps of two tiles.
struct Part {
  const Operand& x;
  int64_t begin, end, k0, depth;

  const BF16* at(int64_t outer, int64_t k) const {
    return static_cast<const BF16*>(x.data) + outer * x.outer_stride + (k0 + k) * x.k_stride;
  }
  int64_t panels() const { return (end - begin + kPanel - 1) / kPanel; }
  int64_t panel_bytes() const { return (depth + kDepth - 1) / kDepth * kStepBytes; }
};

// Word i pairs value i of the memory row at k with value i of the next.
static inline Words interleave(const Part& part, int64_t outer, int64_t k) {
  const int64_t valid = part.end - outer;
  const Halves even = k < part.depth ? load_as<Halves>(part.at(outer, k), valid) : Halves{};
  const Halves odd = k + 1 < part.depth ? load_as<Halves>(part.at(outer, k + 1), valid) : Halves{};
  return __builtin_convertvector(even, Words) | __builtin_convertvector(odd, Words) << 16;
}

// Rows of A dense along k: copied.
static void pack_rows(const Part& part, char* panels) {
  const int64_t count = part.panels() * kPanel, valid = part.end - part.begin, bytes = part.panel_bytes();
  const int64_t stride = part.x.outer_stride, depth = part.depth;
  for (int64_t i = 0; i < count; ++i) {
    char* to = panels + i / kPanel * bytes + i % kPanel * 64;
    if (i >= valid) {
      for (int64_t k = 0; k < depth; k += kDepth, to += kStepBytes) memset(to, 0, 64);
      continue;
    }
    const BF16* from = part.at(part.begin + i, 0);
    int64_t k = 0;
    for (; k + kDepth <= depth; k += kDepth, to += kStepBytes) {
      __builtin_prefetch(from + k + 2 * stride);
      memcpy(to, from + k, 64);
    }
    if (k == depth) continue;
    const Words last = load_as<Words>(from + k, depth - k);
    memcpy(to, &last, 64);
  }
}

// Rows of A across k: interleaved, then transposed.
static void pack_rows_across(const Part& part, char* panels) {
  for (int64_t k = 0; k < part.depth; k += kDepth)
    for (int64_t i = 0; i < part.panels() * kPanel; i += kTile) {
      Words v[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) v[r] = interleave(part, part.begin + i, k + 2 * r);
      transpose(v);
      store_tile(panels + i / kPanel * part.panel_bytes() + k / kDepth * kStepBytes + i % kPanel * 64, v);
    }
}

// The 32 words of a whole panel at k, from a cache line of the memory row at k and one of the next.
static inline void interleave_panel(const BF16* even, const BF16* odd, char* to) {
  const Line a = load_as<Line>(even), b = load_as<Line>(odd);
  const Pairs low = reinterpret_cast<Pairs>(__builtin_shuffle(a, b, RBFAST_ZIP(0)));
  const Pairs high = reinterpret_cast<Pairs>(__builtin_shuffle(a, b, RBFAST_ZIP(4)));
  const Pairs first = __builtin_shuffle(low, high, Pairs{0, 1, 8, 9, 2, 3, 10, 11});
  const Pairs second = __builtin_shuffle(low, high, Pairs{4, 5, 12, 13, 6, 7, 14, 15});
  memcpy(to, &first, 64);
  memcpy(to + kTileBytes, &second, 64);
}

// Columns of B across k: interleaved.
static void pack_columns_across(const Part& part, char* panels) {
  const int64_t stride = part.x.k_stride, bytes = part.panel_bytes(), whole = (part.end - part.begin) / kPanel;
  const int64_t count = part.panels(), depth = part.depth;
  for (int64_t k = 0; k < ceil_to(depth, kDepth); k += 2) {
    char* to = panels + k / kDepth * kStepBytes + k % kDepth * 32;
    int64_t p = 0;
    if (k + 1 < depth) {
      const BF16* from = part.at(part.begin, k);
      for (; p < whole; ++p, from += kPanel, to += bytes) {
        __builtin_prefetch(from + kRowsAhead * stride);
        __builtin_prefetch(from + (kRowsAhead + 1) * stride);
        interleave_panel(from, from + stride, to);
      }
    }
    for (; p < count; ++p, to += bytes)
      for (int64_t half = 0; half < 2; ++half) {
        const Words v = interleave(part, part.begin + p * kPanel + half * kTile, k);
        memcpy(to + half * kTileBytes, &v, 64);
      }
  }
}

// Columns of B dense along k: memory holds words of two values already, which are transposed.
static void pack_columns(const Part& part, char* panels) {
  for (int64_t i = 0; i < part.panels() * kPanel; i += kTile)
    for (int64_t k = 0; k < part.depth; k += kDepth) {
      Words v[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const int64_t outer = part.begin + i + r;
        v[r] = outer < part.end ? load_as<Words>(part.at(outer, k), part.depth - k) : Words{};
      }
      transpose(v);
      store_tile(panels + i / kPanel * part.panel_bytes() + k / kDepth * kStepBytes + i % kPanel * 64, v);
    }
}

// ---- 2 x 2 tiles of C ----

// Prefetches the columns that will be packed next, in equal shares while tiles are multiplied; memory and tiles would
// otherwise wait for each other. Without it a product of 256 or 512 tokens took 1.05 to 1.09 times as long.
struct Ahead {
  const char *at, *end;
  int64_t share;

  Ahead(const Part& next, int64_t shares)
      : at(reinterpret_cast<const char*>(next.at(next.begin, 0))),
        end(reinterpret_cast<const char*>(next.at(next.end, 0))),
        share(((end - at) / 64 + shares - 1) / shares * 64) {}

  void ask() {
    for (const char* stop = smaller(at + share, end); at < stop; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

enum class Update { set, add, resume };

struct Target {
  float* c;
  int64_t ld, rows, columns;  // up to kPanel each
  Update update;
  float* whole;  // [kPanel, kPanel], if C is not written directly

  bool direct() const { return update != Update::add && rows == kPanel && columns == kPanel; }
};

// next: the next block of C, [kPanel, kPanel], prefetched while this one is computed. The panel of A is used for every
// panel of B in turn, so B is loaded with a streaming hint, to leave A in L1.
static inline void multiply(const char* p, const char* q, int64_t steps, const float* next, int64_t ld, Ahead& ahead) {
  for (int64_t s = 0; s < steps; ++s, p += kStepBytes, q += kStepBytes) {
    ahead.ask();
    if (s < kPanel / 2) {
      __builtin_prefetch(next, 1);
      __builtin_prefetch(next + kTile, 1);
      __builtin_prefetch(next + ld, 1);
      __builtin_prefetch(next + ld + kTile, 1);
      next += 2 * ld;
    }
    _tile_loadd(4, p, 64);
    _tile_stream_loadd(6, q, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, q + kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, p + kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

static inline void load_tiles(const float* c, int64_t ld) {
  _tile_loadd(0, c, ld * 4);
  _tile_loadd(1, c + kTile, ld * 4);
  _tile_loadd(2, c + kTile * ld, ld * 4);
  _tile_loadd(3, c + kTile * ld + kTile, ld * 4);
}

static inline void store_tiles(float* c, int64_t ld) {
  _tile_stored(0, c, ld * 4);
  _tile_stored(1, c + kTile, ld * 4);
  _tile_stored(2, c + kTile * ld, ld * 4);
  _tile_stored(3, c + kTile * ld + kTile, ld * 4);
}

static inline void put_row(float* to, const float* from, int64_t columns, bool adds) {
  for (int64_t j = 0; j < columns; ++j) to[j] = adds ? to[j] + from[j] : from[j];
}

// Writes or adds `whole` to C.
static void put_block(const Target& t) {
  const bool adds = t.update == Update::add;
  if (adds && t.rows == kPanel && t.columns == kPanel) {
    float* to = t.c;
    for (int64_t i = 0; i < kPanel; ++i, to += t.ld)
      for (int64_t j = 0; j < kPanel; j += kTile) {
        const Floats sum = load_as<Floats>(to + j) + load_as<Floats>(t.whole + i * kPanel + j);
        memcpy(to + j, &sum, 64);
      }
    return;
  }
  for (int64_t i = 0; i < t.rows; ++i) put_row(t.c + i * t.ld, t.whole + i * kPanel, t.columns, adds);
}

static void block(const char* p, const char* q, int64_t steps, const Target& t, Ahead& ahead) {
  if (t.update != Update::resume) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else if (t.direct()) {
    load_tiles(t.c, t.ld);
  } else {
    memset(t.whole, 0, kPanel * kPanel * sizeof(float));
    for (int64_t i = 0; i < t.rows; ++i) memcpy(t.whole + i * kPanel, t.c + i * t.ld, t.columns * sizeof(float));
    compiler_barrier();
    load_tiles(t.whole, kPanel);
  }
  multiply(p, q, steps, t.c + kPanel, t.ld, ahead);
  if (t.direct()) return store_tiles(t.c, t.ld);
  store_tiles(t.whole, kPanel);
  put_block(t);
}

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
// Eight tiles of 16 rows of 64 bytes.
constexpr TileConfig kWholeTiles{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

}  // namespace

void gemm(const Gemm& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1, void* scratch) {
  _tile_loadconfig(&kWholeTiles);
  const int64_t longest = k_block(g), m_step = fitting_panels(longest, room(g).rows) * kPanel,
                n_step = fitting_panels(longest, room(g).columns) * kPanel;
  float* whole = static_cast<float*>(scratch);
  char* rows = static_cast<char*>(scratch) + kPanel * kPanel * 4;
  char* columns = rows + m_step / kPanel * (longest / kDepth * kStepBytes);
  for (int64_t k = 0; k < g.k; k += longest) {
    const int64_t depth = smaller(longest, g.k - k), steps = (depth + kDepth - 1) / kDepth;
    const Update update = g.sums == Sums::resumed ? Update::resume : k == 0 ? Update::set : Update::add;
    for (int64_t n = n0; n < n1; n += n_step) {
      const Part b{g.b, n, smaller(n + n_step, n1), k, depth};
      is_along(g.b) ? pack_columns(b, columns) : pack_columns_across(b, columns);
      const Part next{g.b, b.end, is_along(g.b) ? smaller(b.end + n_step, n1) : b.end, k, depth};
      Ahead ahead(next, (m1 - m0 + kPanel - 1) / kPanel * b.panels() * steps);
      for (int64_t m = m0; m < m1; m += m_step) {
        const Part a{g.a, m, smaller(m + m_step, m1), k, depth};
        const bool is_packed = n > n0 && m_step >= m1 - m0;
        if (!is_packed) is_along(g.a) ? pack_rows(a, rows) : pack_rows_across(a, rows);
        compiler_barrier();
        for (int64_t i = 0; i < a.panels(); ++i)
          for (int64_t j = 0; j < b.panels(); ++j) {
            const int64_t row = m + i * kPanel, column = n + j * kPanel;
            const Target target{g.c + row * g.ldc + column,   g.ldc,  smaller(kPanel, m1 - row),
                                smaller(kPanel, n1 - column), update, whole};
            block(rows + i * a.panel_bytes(), columns + j * b.panel_bytes(), steps, target, ahead);
          }
      }
    }
  }
  _tile_release();
}

}  // namespace amx
}  // namespace rbfast
