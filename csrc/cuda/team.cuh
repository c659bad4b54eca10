// A team shares a row of logits: it is one block or a cluster of blocks. This file has the columns that each thread
// holds, and the reductions over the team.
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

// Whether the architecture being compiled for can run teams of this many blocks.
template <int blocks>
__host__ __device__ constexpr bool is_supported() {
#ifdef RBFAST_HAS_CLUSTERS
  return true;
#else
  return blocks == 1;
#endif
}

// Keeps the compiler from moving reads of memory across it: more in flight would take more registers than there are.
__device__ inline void compiler_barrier() {
#ifdef __CUDA_ARCH__
  asm volatile("" ::: "memory");
#endif
}

// kBlocks blocks of kThreads threads.
template <int kBlocks, int kThreads>
struct Team {
  static constexpr int kWarps = kThreads / kWarp, kAllWarps = kBlocks * kWarps;
  static constexpr int kStep = kBlocks * kThreads * kVector;  // columns of one vector in every thread

  // All of this is rematerialized at every use: kept from row to row it would take registers.
  __device__ static int rank() { return kBlocks == 1 ? 0 : rematerialize(static_cast<int>(blockIdx.x)) % kBlocks; }
  // This thread's first column; its next vectors are kStep columns apart.
  __device__ static int first() { return rematerialize((rank() * kThreads + static_cast<int>(threadIdx.x)) * kVector); }
  __device__ static int warp() { return rank() * kWarps + static_cast<int>(threadIdx.x) / kWarp; }
  __device__ static bool is_leader() { return rank() == 0 && threadIdx.x == 0; }
  // The team's row in a round: rows go to the teams in turn.
  __device__ static int row(int round) {
    return (rematerialize(static_cast<int>(blockIdx.x)) + round * rematerialize(static_cast<int>(gridDim.x))) / kBlocks;
  }

  // A barrier over all threads of the team; what was written before it is visible after it.
  __device__ void sync() const {
#ifdef RBFAST_HAS_CLUSTERS
    if (kBlocks > 1) {
      cooperative_groups::this_cluster().barrier_arrive();
      return cooperative_groups::this_cluster().barrier_wait();
    }
#endif
    __syncthreads();
  }
  // The address of another block's copy of an object in shared memory, given that of this block's.
  template <typename T>
  __device__ T* map_shared(T* mine, int block) const {
#ifdef RBFAST_HAS_CLUSTERS
    if (kBlocks > 1) return cooperative_groups::this_cluster().map_shared_rank(mine, block);
#endif
    return mine;
  }
};

// n floats of a thread.
template <int n>
struct Array {
  float value[n];

  __device__ float& operator[](int i) { return value[i]; }
  __device__ float operator[](int i) const { return value[i]; }
};

// Shared memory of an all-reduce over a team: in every block a slot for each warp of the team. It is double-buffered: a
// warp may write its next values while another still reads.
template <int n, int kWarps>
struct Exchange {
  float slots[2][kWarps][n];

  // Reduces the first `count` values over all threads of the team; every thread gets the results. It takes one barrier.
  template <typename Op, int m, typename T>
  __device__ Array<m> reduce(const T& team, const Array<m>& mine, int count, int buffer) {
    static_assert(m <= n);
    constexpr int kTeamBlocks = kWarps / T::kWarps;
    const int lane = rematerialize(static_cast<int>(threadIdx.x) % kWarp);
    Array<m> all = mine;
#pragma unroll
    for (int i = 0; i < m; ++i)
      if (i < count) all[i] = warp_reduce<Op>(all[i]);
    if (lane < kTeamBlocks) {
      float* slot = team.map_shared(slots[buffer][rematerialize(team.warp())], lane);
#pragma unroll
      for (int i = 0; i < m; ++i)
        if (i < count) slot[i] = all[i];
    }
    team.sync();
#pragma unroll
    for (int i = 0; i < m; ++i) {
      if (i >= count) continue;
      all[i] = Op::identity;
#pragma unroll
      for (int warp = 0; warp < kWarps; warp += kWarp)
        if (warp + lane < kWarps) all[i] = Op::apply(all[i], slots[buffer][warp + lane][i]);
      all[i] = warp_reduce<Op>(all[i]);
    }
    return all;
  }
};

// ---- sums of powers ----

// Sums of 2^((z - pivot) * scale) over some logits: at_tau with scale = log2(e) / tau, at_one with log2(e). The pivot
// is known before the row is read, so no pass looks for the largest logit, and each power is taken as its logit
// arrives. In most rows the largest of a few logits will do; if not, the largest of all is used.
struct alignas(16) Sums {
  float pivot = 0, at_tau = 0, at_one = 0, unused = 0;
};

// A logit as a pivot; 0 if it is masked, infinite or NaN.
__device__ inline float as_pivot(float z) { return fabsf(z) < -kLeastLogit ? z : 0; }

// Whether a sum about a pivot is accurate enough. The power of a logit that lies y away in base 2 has a
// relative error of 2^-25 |y|: here up to 2^-20, the same as for logits far below the largest one. False for NaN.
__device__ inline bool is_in_range(float sum) { return sum > 0x1p-30f && sum < 0x1p30f; }

// The factor that rebases sums from `pivot` to `top`.
__device__ inline float rebase(float pivot, float top, float scale) { return exp2_fast((pivot - top) * scale); }

// factor * 2^((z - pivot) * scale) = factor * 2^(z * scale - shift - shift_error), where shift_error is what rounding
// took from shift. It goes into the factor, which saves an operation per logit.
struct Powers {
  float scale, shift, shift_error, factor;

  __device__ Powers(float pivot, float scale, float factor) : scale(scale) {
    // Logits this large are 2^6 / scale or more apart, so only the pivot itself counts, at any scale. A power of two as
    // the scale makes the product exact.
    if (fabsf(pivot * scale) >= 0x1p30f) this->scale = __int_as_float(__float_as_int(scale) & 0x7f800000);
    shift = __fmul_rn(pivot, this->scale);  // no initializer: nvcc's host pass keeps those, and lacks __fmul_rn
    shift_error = fmaf(pivot, this->scale, -shift);
    this->factor = factor * exp2_fast(-shift_error);
  }
  __device__ float shifted(float z) const { return exp2_fast(fmaf(z, scale, -shift)); }
  __device__ float operator()(float z) const { return shifted(z) * factor; }
};

// A thread's sum of powers about a pivot.
struct PowerSum {
  Powers powers;
  float sum[kVector] = {};

  __device__ PowerSum(float pivot, float scale) : powers(pivot, scale, 1) {}
  __device__ void add(const Vector& z) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum[j] += powers.shifted(z.value[j]);
  }
  // Divided by the pivot's own power as computed: if the pivot has all the mass, the sum is exactly 1 and the row's CE
  // 0.
  __device__ float total() const {
    return divide((sum[0] + sum[1]) + (sum[2] + sum[3]), exp2_fast(powers.shift_error));
  }
};

// The sums of a row, and the pivots that they are about.
template <int n, int kPivots>
struct TeamSums {
  Array<kPivots> pivot;
  Array<n> sum;
};

// The first `count` of n sums over a row; sums_about(pivots) gives a thread's. If the sums about the given pivots leave
// the range, the pivots become the row's largest logits, of which largest() gives a thread's: one more pass and two
// more barriers.
template <int n, int kPivots, typename T, typename E, typename SumsAbout, typename GetLargest>
__device__ inline TeamSums<n, kPivots> find_sums(const T& team, E& exchange, Array<kPivots> pivot, int count,
                                                 int buffer, const SumsAbout& sums_about, const GetLargest& largest) {
  Array<n> sum = exchange.template reduce<Add>(team, sums_about(pivot), count, buffer);
  bool are_in_range = true;
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (i < count) are_in_range = are_in_range && is_in_range(sum[i]);
  if (!are_in_range) {
    pivot = exchange.template reduce<Max>(team, largest(), kPivots, 1 - buffer);
#pragma unroll
    for (int i = 0; i < kPivots; ++i) pivot[i] = as_pivot(pivot[i]);
    sum = exchange.template reduce<Add>(team, sums_about(pivot), count, buffer);
  }
  return {pivot, sum};
}

}  // namespace
}  // namespace rbfast
