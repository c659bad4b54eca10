// The head's products by tiles with the instructions emulated, so that any CPU can test what AMX will run.
#include "cpu/head_gemm_amx.h"

#include <math.h>
#include <stdlib.h>

namespace emulated {

struct Tile {
  unsigned char bytes[16][64];
};
thread_local Tile tiles[8];

// x, or zero if it is subnormal, as the instructions flush subnormal inputs and outputs. Without a branch, so that
// loops over it are vectorised.
inline float flushed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t is_normal = (bits & 0x7f800000) != 0;
  bits &= 0x80000000 | -is_normal;
  memcpy(&x, &bits, 4);
  return x;
}

inline float value(uint32_t bits_in_upper_half) {
  float x;
  memcpy(&x, &bits_in_upper_half, 4);
  return flushed(x);
}

void load(int tile, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(tiles[tile].bytes[i], static_cast<const char*>(from) + i * stride, 64);
}

void store(int tile, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * stride, tiles[tile].bytes[i], 64);
}

// As Intel's manual describes TDPBF16PS: sums of the even values of k and of the odd ones, then both are added. Its
// multiply-adds are fused, but the product of two bf16 values is exact in fp32, so that nothing is rounded twice here.
void multiply_add(int to, int a, int b) {
  uint32_t x[16][16], y[16][16];
  float c[16][16];
  memcpy(x, tiles[a].bytes, sizeof x);
  memcpy(y, tiles[b].bytes, sizeof y);
  memcpy(c, tiles[to].bytes, sizeof c);
  for (int m = 0; m < 16; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < 16; ++k) {
      const float x_even = value(x[m][k] << 16), x_odd = value(x[m][k] & 0xffff0000);
      for (int n = 0; n < 16; ++n) {
        even[n] = flushed(x_even * value(y[k][n] << 16) + even[n]);
        odd[n] = flushed(x_odd * value(y[k][n] & 0xffff0000) + odd[n]);
      }
    }
    for (int n = 0; n < 16; ++n) c[m][n] = flushed(flushed(c[m][n]) + flushed(even[n] + odd[n]));
  }
  memcpy(tiles[to].bytes, c, sizeof c);
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) (void)(config)
#define _tile_release() (void)0
#define _tile_zero(tile) memset(&emulated::tiles[tile], 0, sizeof(emulated::Tile))
#define _tile_loadd emulated::load
#define _tile_stream_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply_add
#include "cpu/head_gemm_amx_kernel.inl"

// C [rows, columns], a rectangle of the whole; strides are in values. Scratch is filled with NaNs first.
extern "C" void product(const void* a, int64_t a_outer, int64_t a_k, const void* b, int64_t b_outer, int64_t b_k, float* c,
                        int64_t ldc, int64_t k, int resumed, const int64_t* rectangle) {
  using namespace rbfast;
  const Gemm g{{a, Storage::bf16, a_outer, a_k},
               {b, Storage::bf16, b_outer, b_k},
               c,
               ldc,
               k,
               resumed ? Sums::resumed : Sums::fresh};
  void* scratch = aligned_alloc(64, amx::scratch(g));
  memset(scratch, 0xff, amx::scratch(g));
  amx::gemm(g, rectangle[0], rectangle[1], rectangle[2], rectangle[3], scratch);
  free(scratch);
}
