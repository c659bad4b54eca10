// A row's team: one block, or a cluster of them. Who holds which columns, and how they add up what they have found.
#pragma once

#include <cooperative_groups.h>

#include "cuda/device.cuh"
#include "cuda/lane.cuh"
#include "divergence_job.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RBFAST_HAS_CLUSTERS
#endif

namespace rbfast {
namespace {

constexpr int kVector = 4;

using Vector = Pack<float, kVector>;

// Whether a kernel of teams of `blocks` can run on the architecture that is being compiled.
template <int blocks>
__host__ __device__ constexpr bool is_possible() {
#ifdef RBFAST_HAS_CLUSTERS
  return true;
#else
  return blocks == 1;
#endif
}

// Keeps the compiler from moving reads of memory across it: more of them under way at once than there are registers.
__device__ inline void keep_order() {
#ifdef __CUDA_ARCH__
  asm volatile("" ::: "memory");
#endif
}

// kBlocks blocks of kThreads threads.
template <int kBlocks, int kThreads>
struct Team {
  static constexpr int kWarps = kThreads / kWarp, kAllWarps = kBlocks * kWarps;
  static constexpr int kStep = kBlocks * kThreads * kVector;  // columns of one round of vectors

  // Everything here is computed anew wherever it is asked for: kept from row to row it would take registers.
  __device__ static int rank() { return kBlocks == 1 ? 0 : afresh(static_cast<int>(blockIdx.x)) % kBlocks; }
  // This thread's first column; its next ones are kStep further each.
  __device__ static int first() { return afresh((rank() * kThreads + static_cast<int>(threadIdx.x)) * kVector); }
  __device__ static int warp() { return rank() * kWarps + static_cast<int>(threadIdx.x) / kWarp; }
  __device__ static bool is_leader() { return rank() == 0 && threadIdx.x == 0; }
  // The row that the team has in a round: all teams take rows in turn.
  __device__ static int row(int round) {
    return (afresh(static_cast<int>(blockIdx.x)) + round * afresh(static_cast<int>(gridDim.x))) / kBlocks;
  }

  // All threads of all blocks wait for each other, and then see what the others wrote before.
  __device__ void meet() const {
#ifdef RBFAST_HAS_CLUSTERS
    if (kBlocks > 1) {
      cooperative_groups::this_cluster().barrier_arrive();
      return cooperative_groups::this_cluster().barrier_wait();
    }
#endif
    __syncthreads();
  }
  // Every member's copy of something in shared memory, from one of them.
  template <typename T>
  __device__ T* of(T* mine, int member) const {
#ifdef RBFAST_HAS_CLUSTERS
    if (kBlocks > 1) return cooperative_groups::this_cluster().map_shared_rank(mine, member);
#endif
    return mine;
  }
};

__device__ inline float warp_add(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// ---- sums of powers ----

// Sums of 2^((z - max) * scale) over some logits, with the row's scale = log2(e) / tau and with log2(e). The difference
// is exact where it counts: a row whose mass is on its largest logit has the sum 1.
struct alignas(16) Sums {
  float max = kNone, at_tau = 0, at_one = 0, unused = 0;
};

// The factor that brings sums below `max` to sums below the larger `top`.
__device__ inline float lowered(float max, float top, float scale) { return exp2_fast((max - top) * scale); }

// The same powers by one operation less for each logit, for what is multiplied by them: factor * 2^(z * scale - shift).
struct Powers {
  float scale, shift, factor;

  __device__ Powers(float max, float scale, float factor) : scale(scale), factor(factor) {
    shift = __fmul_rn(max, scale);  // here: nvcc's host pass keeps initializers, and knows no __fmul_rn
    this->factor *= exp2_fast(-fmaf(max, scale, -shift));  // what the largest one is off by
  }
  __device__ float operator()(float z) const { return exp2_fast(fmaf(z, scale, -shift)) * factor; }
};

// The sums of all lanes of a warp, in all of them. Without `needs_one` tau is 1: the two sums are one.
template <int n>
__device__ inline Sums warp_sums(const Sums (&mine)[n], float scale, bool needs_one) {
  Sums sums;
#pragma unroll
  for (int i = 0; i < n; ++i) sums.max = fmaxf(sums.max, mine[i].max);
  sums.max = warp_max(sums.max);
#pragma unroll
  for (int i = 0; i < n; ++i) sums.at_tau += mine[i].at_tau * lowered(mine[i].max, sums.max, scale);
  sums.at_tau = warp_add(sums.at_tau);
  sums.at_one = sums.at_tau;
  if (!needs_one) return sums;
  sums.at_one = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) sums.at_one += mine[i].at_one * lowered(mine[i].max, sums.max, kLog2e);
  sums.at_one = warp_add(sums.at_one);
  return sums;
}

// A place in every block for what each warp of the team gives. There are two, which take turns from row to row: a
// member may give what belongs to the next row while another still reads this one's.
template <typename Given, int kWarps>
struct Exchange {
  Given given[2][kWarps];

  template <typename T>
  __device__ void give(const T& team, const Given& value, int turn) {
    const int lane = afresh(threadIdx.x % kWarp), blocks = kWarps / T::kWarps;
    if (lane < blocks) *team.of(&given[turn][afresh(team.warp())], lane) = value;
  }
  // The sums over all warps, in all threads, once the team has met. `get` takes the Sums from what a warp gave.
  template <typename F>
  __device__ Sums total(float scale, bool needs_one, int turn, const F& get) const {
    constexpr int kPerLane = (kWarps + kWarp - 1) / kWarp;
    Sums mine[kPerLane];
    const int lane = afresh(threadIdx.x % kWarp);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int warp = lane + i * kWarp;
      if (warp < kWarps) mine[i] = get(given[turn][warp]);
    }
    return warp_sums(mine, scale, needs_one);
  }
};

}  // namespace
}  // namespace rbfast
