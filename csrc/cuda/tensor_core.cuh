// Products of 16-bit matrices with sums in fp32, and the loads that feed them: mma.m16n8k16, ldmatrix and cp.async,
// which every GPU has since sm_80. Comments call a lane of a warp (g, c), with g = lane / 4 and c = lane % 4.
//
// A value that bf16 cannot hold is split into a sum of bf16 pieces, each the rounded remainder of those before it: a
// float into three, an fp16 into two (both exact); a bf16 is one. A product of two such sums leaves out
// products of pieces that are smaller than the last one kept.
#pragma once

#include "cuda/device.cuh"

#ifdef RBFAST_TENSOR_CORE_ON_HOST  // the tests replace the instructions, for threads that run on the host
#include "tensor_core_on_host.h"
#else

namespace rbfast {

// d [16, 8] += a [16, 16] b [16, 8]. Lane (g, c) holds d at (g, 2c), (g, 2c+1), (g+8, 2c), (g+8, 2c+1); the pairs
// a at (g, 2c), (g+8, 2c), (g, 2c+8), (g+8, 2c+8); and the pairs b down its column g from 2c and from 2c+8.
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8. Lane (g, c) gets the
// pair at (g, 2c) of each, or, transposed, the values at (2c, g) and (2c+1, g).
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Starts to copy 16 bytes to shared memory, of which only `bytes` are read; the others become 0.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
// Makes one group of the copies that this thread started since the last call.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last `open` groups of this thread are in flight.
template <int open>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
}

}  // namespace rbfast
#endif

namespace rbfast {

// The number of pieces of a value of type T (kPieces), and of its fp32 partner in a product (kPartners). Two pieces
// leave out up to 2^-17 of the partner. The product of the second pieces of an fp16 and its partner is left out too, up
// to 2^-16 of the whole.
template <typename T>
constexpr int kPieces = sizeof(T) == 4 ? 3 : 2;
template <>
constexpr int kPieces<__nv_bfloat16> = 1;
template <typename T>
constexpr int kPartners = sizeof(T) == 4 ? 3 : 2;

__device__ inline uint32_t bits(const __nv_bfloat162& pair) {
  uint32_t result;
  memcpy(&result, &pair, sizeof(result));
  return result;
}

// The pieces of two floats, each pair side by side.
template <int n>
__device__ inline void split(float first, float second, uint32_t (&piece)[n]) {
#pragma unroll
  for (int p = 0; p < n; ++p) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    piece[p] = bits(pair);
    first -= __bfloat162float(pair.x);
    second -= __bfloat162float(pair.y);
  }
}
template <typename T>
__device__ inline void split_pair(const T* pair, uint32_t (&piece)[kPieces<T>]) {
  if constexpr (kPieces<T> == 1)
    memcpy(piece, pair, sizeof(piece));
  else
    split(load(pair), load(pair + 1), piece);
}

// d += a b, where a is the sum of kA pieces and b of kB. For fp32 (kA = 3) the products are summed separately first,
// because a tensor core truncates what it adds to a large sum.
template <int kA, int kB>
__device__ inline void multiply_pieces(float (&d)[4], const uint32_t (&a)[kA][4], const uint32_t (&b)[kB][2]) {
  constexpr int kMost = kA > kB ? kA : kB;
  float own[4] = {};
  float (&sum)[4] = kA == 3 ? own : d;
#pragma unroll
  for (int p = kMost - 1; p >= 0; --p)  // small products first
#pragma unroll
    for (int i = 0; i <= p; ++i)
      if (i < kA && p - i < kB) multiply_add(sum, a[i], b[p - i]);
  if constexpr (kA == 3) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += own[i];
  }
}

}  // namespace rbfast
