// The three storage types and how one value of each is read and written as fp32. Included by ISA files: no STL and no
// torch header in here, and everything is static, so that no symbol compiled for AVX-512 can be picked on an older CPU.
#pragma once

#include <stdint.h>
#include <string.h>

namespace rbfast {

struct F32 {
  float bits;
};
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

static inline float load(const F32* p) { return p->bits; }
static inline float load(const BF16* p) {
  const uint32_t wide = static_cast<uint32_t>(p->bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
static inline float load(const F16* p) {
  _Float16 half;
  memcpy(&half, p, 2);
  return static_cast<float>(half);
}

static inline void store(F32* p, float value) { p->bits = value; }
static inline void store(BF16* p, float value) {
  uint32_t wide;
  memcpy(&wide, &value, 4);
  // Round to nearest even; a NaN keeps its sign and becomes quiet.
  p->bits = value != value ? static_cast<uint16_t>((wide >> 16) | 0x40)
                           : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}
static inline void store(F16* p, float value) {
  const _Float16 half = static_cast<_Float16>(value);
  memcpy(p, &half, 2);
}

}  // namespace rbfast
