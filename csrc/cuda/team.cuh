// A row's team, one block or a cluster of blocks: who holds which columns, and how the team reduces its sums.
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

// Whether a kernel of teams of `blocks` can run on the architecture being compiled for.
template <int blocks>
__host__ __device__ constexpr bool is_possible() {
#ifdef RBFAST_HAS_CLUSTERS
  return true;
#else
  return blocks == 1;
#endif
}

// Keeps the compiler from moving reads of memory across it, which would put more in flight than there are registers.
__device__ inline void keep_order() {
#ifdef __CUDA_ARCH__
  asm volatile("" ::: "memory");
#endif
}

// kBlocks blocks of kThreads threads.
template <int kBlocks, int kThreads>
struct Team {
  static constexpr int kWarps = kThreads / kWarp, kAllWarps = kBlocks * kWarps;
  static constexpr int kStep = kBlocks * kThreads * kVector;  // columns of one vector in every thread

  // All of this is recomputed at every use: kept from row to row it would take registers.
  __device__ static int rank() { return kBlocks == 1 ? 0 : afresh(static_cast<int>(blockIdx.x)) % kBlocks; }
  // This thread's first column; its next vectors are kStep columns apart.
  __device__ static int first() { return afresh((rank() * kThreads + static_cast<int>(threadIdx.x)) * kVector); }
  __device__ static int warp() { return rank() * kWarps + static_cast<int>(threadIdx.x) / kWarp; }
  __device__ static bool is_leader() { return rank() == 0 && threadIdx.x == 0; }
  // The team's row in a round: rows go to the teams in turn.
  __device__ static int row(int round) {
    return (afresh(static_cast<int>(blockIdx.x)) + round * afresh(static_cast<int>(gridDim.x))) / kBlocks;
  }

  // A barrier over all threads of the team; what was written before it is visible after it.
  __device__ void meet() const {
#ifdef RBFAST_HAS_CLUSTERS
    if (kBlocks > 1) {
      cooperative_groups::this_cluster().barrier_arrive();
      return cooperative_groups::this_cluster().barrier_wait();
    }
#endif
    __syncthreads();
  }
  // A member's copy of an object in shared memory, given this block's.
  template <typename T>
  __device__ T* of(T* mine, int member) const {
#ifdef RBFAST_HAS_CLUSTERS
    if (kBlocks > 1) return cooperative_groups::this_cluster().map_shared_rank(mine, member);
#endif
    return mine;
  }
};

// A group of n floats.
template <int n>
struct Few {
  float value[n];

  __device__ float& operator[](int i) { return value[i]; }
  __device__ float operator[](int i) const { return value[i]; }
};

// A slot in every block for the values of each warp of the team. It is double-buffered: a member may write the next
// values while another still reads.
template <int n, int kWarps>
struct Exchange {
  float given[2][kWarps][n];

  // Reduces the first `count` values over all threads of the team; every thread gets the results. The team meets once.
  template <typename Of, int m, typename T>
  __device__ Few<m> over(const T& team, const Few<m>& mine, int count, int turn) {
    static_assert(m <= n);
    constexpr int kTeamBlocks = kWarps / T::kWarps;
    const int lane = afresh(static_cast<int>(threadIdx.x) % kWarp);
    Few<m> all = mine;
#pragma unroll
    for (int i = 0; i < m; ++i)
      if (i < count) all[i] = over_warp<Of>(all[i]);
    if (lane < kTeamBlocks) {
      float* place = team.of(given[turn][afresh(team.warp())], lane);
#pragma unroll
      for (int i = 0; i < m; ++i)
        if (i < count) place[i] = all[i];
    }
    team.meet();
#pragma unroll
    for (int i = 0; i < m; ++i) {
      if (i >= count) continue;
      all[i] = Of::empty;
#pragma unroll
      for (int warp = 0; warp < kWarps; warp += kWarp)
        if (warp + lane < kWarps) all[i] = Of::of(all[i], given[turn][warp + lane][i]);
      all[i] = over_warp<Of>(all[i]);
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

// Whether a pivot served, judged by the sum over the row. The power of a logit that lies y away in base 2 has a
// relative error of 2^-25 |y|: here up to 2^-20, the same as for logits far below the largest one. False for NaN.
__device__ inline bool is_in_reach(float sum) { return sum > 0x1p-30f && sum < 0x1p30f; }

// The factor that rebases sums from `pivot` to `top`.
__device__ inline float lowered(float pivot, float top, float scale) { return exp2_fast((pivot - top) * scale); }

// factor * 2^((z - pivot) * scale) = factor * 2^(z * scale - shift - off). `off` is the rounding error of shift; it
// goes into the factor, which saves an operation per logit.
struct Powers {
  float scale, shift, off, factor;

  __device__ Powers(float pivot, float scale, float factor) : scale(scale) {
    // Logits this large are 2^6 / scale or more apart, so only the pivot itself counts, at any scale. A power of two as
    // the scale makes the product exact.
    if (fabsf(pivot * scale) >= 0x1p30f) this->scale = __int_as_float(__float_as_int(scale) & 0x7f800000);
    shift = __fmul_rn(pivot, this->scale);  // no initializer: nvcc's host pass keeps those, and lacks __fmul_rn
    off = fmaf(pivot, this->scale, -shift);
    this->factor = factor * exp2_fast(-off);
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
  __device__ float total() const { return divide((sum[0] + sum[1]) + (sum[2] + sum[3]), exp2_fast(powers.off)); }
};

// A team's results for a row: its sums, and the pivots that they are about.
template <int n, int kPivots>
struct Found {
  Few<kPivots> pivot;
  Few<n> sum;
};

// The first `count` of n sums over a row; sums_about(pivots) gives a thread's. If the given pivots do not serve, the
// row's largest logits are used, of which largest() gives a thread's: one more pass, and the team meets twice more.
template <int n, int kPivots, typename T, typename E, typename SumsAbout, typename GetLargest>
__device__ inline Found<n, kPivots> find_sums(const T& team, E& exchange, Few<kPivots> pivot, int count, int turn,
                                              const SumsAbout& sums_about, const GetLargest& largest) {
  Few<n> sum = exchange.template over<Add>(team, sums_about(pivot), count, turn);
  bool serves = true;
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (i < count) serves = serves && is_in_reach(sum[i]);
  if (!serves) {
    pivot = exchange.template over<Largest>(team, largest(), kPivots, 1 - turn);
#pragma unroll
    for (int i = 0; i < kPivots; ++i) pivot[i] = as_pivot(pivot[i]);
    sum = exchange.template over<Add>(team, sums_about(pivot), count, turn);
  }
  return {pivot, sum};
}

}  // namespace
}  // namespace rbfast
