// mma, ldmatrix and cp.async of csrc/cuda/tensor_core.cuh for threads of the host. A copy takes place when it is waited
// for, so a kernel that reads too early sees the old values.
#pragma once
#include "cuda_runtime.h"

namespace rbfast {

inline float bf16_at(uint32_t pair, int index) {
  return __int_as_float(static_cast<int>(index == 0 ? pair << 16 : pair & 0xffff0000u));
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane {
    uint32_t a[4], b[2];
  };
  Lane all[32];
  for (int part = 0; part < 3; ++part) {
    const uint32_t low = part < 2 ? a[2 * part] : b[0], high = part < 2 ? a[2 * part + 1] : b[1];
    const uint64_t* values = on_host::exchange_all(uint64_t{high} << 32 | low);
    for (int l = 0; l < 32; ++l) {
      uint32_t* to = part < 2 ? all[l].a + 2 * part : all[l].b;
      to[0] = static_cast<uint32_t>(values[l]);
      to[1] = static_cast<uint32_t>(values[l] >> 32);
    }
  }
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int m = g + i / 2 * 8, n = 2 * c + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Lane &of_a = all[m % 8 * 4 + k % 8 / 2], &of_b = all[n * 4 + k % 8 / 2];
      d[i] += bf16_at(of_a.a[m / 8 + k / 8 * 2], k % 2) * bf16_at(of_b.b[k / 8], k % 2);
    }
  }
}

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("ldmatrix of an unaligned row");
  const uint64_t* rows = on_host::exchange_all(reinterpret_cast<uint64_t>(row));
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int from = kTransposed ? 2 * c + e : g, at = kTransposed ? g : 2 * c + e;
      pair[e] = reinterpret_cast<const uint16_t*>(rows[8 * i + from])[at];
    }
    r[i] = uint32_t{pair[1]} << 16 | pair[0];
  }
  on_host::exchange_all(0);  // no lane overwrites what another has yet to read
}

inline void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    throw std::runtime_error("cp.async of unaligned bytes");
  on_host::current().copies.push_back({to, from, bytes});
}
inline void commit_copies() { on_host::current().copies.push_back({}); }
template <int open>
void wait_for_copies() {
  std::vector<on_host::Copy>& copies = on_host::current().copies;
  int groups = 0;
  for (const on_host::Copy& copy : copies) groups += copy.to == nullptr;
  size_t done = 0;
  for (; groups > open; ++done) {
    const on_host::Copy& copy = copies[done];
    if (copy.to == nullptr) {
      --groups;
    } else {
      memset(copy.to, 0, 16);
      memcpy(copy.to, copy.from, copy.bytes);
    }
  }
  copies.erase(copies.begin(), copies.begin() + done);
}

}  // namespace rbfast
