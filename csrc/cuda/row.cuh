// A row of logits under the hands of a team of blocks: reading it, keeping it, summing over it, writing its gradient.
// See divergence_rows.cu.
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

constexpr int kThreads = 192, kWarps = kThreads / kWarp, kVector = 4, kTile = kThreads * kVector;
constexpr int kAhead = 4;              // vectors that a thread asks memory for before it looks at the first
constexpr int kHoleBits = 0x7fc0b1d5;  // a NaN of our own: a logit of the teacher's support, which is not in the tail

using Vector = Pack<float, kVector>;

// How a launch lays out its rows.
struct Plan {
  int team;
  int rounds, kept;  // tiles of a member, and how many of them it keeps; a dense teacher's are kept as well
  bool in_step;      // dz is written over logits that are not kept
  int kept_offset;   // bytes before the tiles in shared memory: the buckets
};

// ---- a team ----

struct Team {
  int rank = 0, size = 1;

  __device__ Team() {
#ifdef RBFAST_HAS_CLUSTERS
    rank = cooperative_groups::this_cluster().block_rank();
    size = cooperative_groups::this_cluster().num_blocks();
#endif
  }
  // All threads of all members wait here; what they wrote before, to shared and global memory, is seen after.
  __device__ void meet() const {
#ifdef RBFAST_HAS_CLUSTERS
    if (size > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }
  // Another member's copy of something in shared memory.
  template <typename T>
  __device__ T* of(T* mine, int member) const {
#ifdef RBFAST_HAS_CLUSTERS
    if (size > 1) return cooperative_groups::this_cluster().map_shared_rank(mine, member);
#endif
    return mine;
  }
  // Where this thread's values of a round begin.
  __device__ int position(int round) const { return (round * size + rank) * kTile + threadIdx.x * kVector; }
};

// sum exp((z - max) * inv_tau) and sum exp(z - max); meaningless where max is kNone.
struct Sums {
  float max = kNone, at_tau = 0, at_one = 0;
};
struct Total {
  float max;
  double at_tau, at_one;
};

constexpr int kSums = 3;  // of a dense row: the student's shared ids, its others, the teacher's ids

struct Shared {
  float tops[kSums][kWarps];
  double sums[2 * kSums][kWarps];
  Total totals[kSums];  // of this member
  double values[2];     // of this member: the divergence, the mean score
  DensePass pass;
  float tail_max, tail_at_tau, tail_at_one;  // of the leader, for all
};

template <int n>
__device__ void block_max(float (&top)[n], Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int i = 0; i < n; ++i) {
    const float most = warp_max(top[i]);
    if (lane == 0) shared.tops[i][warp] = most;
  }
  __syncthreads();
  for (int i = 0; i < n; ++i) {
    top[i] = shared.tops[i][0];
    for (int w = 1; w < kWarps; ++w) top[i] = larger(top[i], shared.tops[i][w]);
  }
}

// In every thread, each the sum over the block, in an order that does not depend on timing.
template <int n>
__device__ void block_sum(double (&sum)[n], Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int i = 0; i < n; ++i) {
    const double total = warp_sum(sum[i]);
    if (lane == 0) shared.sums[i][warp] = total;
  }
  __syncthreads();
  for (int i = 0; i < n; ++i) {
    sum[i] = 0;
    for (int w = 0; w < kWarps; ++w) sum[i] += shared.sums[i][w];
  }
}

// Leaves this member's totals of its threads' sums in shared memory; the team must meet before they are read.
template <int n>
__device__ void post_totals(const Sums (&sums)[n], float inv_tau, Shared& shared) {
  float top[n];
  for (int i = 0; i < n; ++i) top[i] = sums[i].max;
  block_max(top, shared);
  double total[2 * n];
  for (int i = 0; i < n; ++i) {
    total[2 * i] = sums[i].at_tau * exp_negative((sums[i].max - top[i]) * inv_tau);
    total[2 * i + 1] = sums[i].at_one * exp_negative(sums[i].max - top[i]);
  }
  block_sum(total, shared);
  if (threadIdx.x == 0)
    for (int i = 0; i < n; ++i) shared.totals[i] = {top[i], total[2 * i], total[2 * i + 1]};
}

// The sums over the whole row, from what the members posted.
__device__ Total team_total(const Team& team, Shared& shared, int which, float inv_tau) {
  Total total{kNone, 0, 0};
  for (int m = 0; m < team.size; ++m) total.max = larger(total.max, team.of(&shared, m)->totals[which].max);
  for (int m = 0; m < team.size; ++m) {
    const Total part = team.of(&shared, m)->totals[which];
    total.at_tau += part.at_tau * exp_negative((part.max - total.max) * inv_tau);
    total.at_one += part.at_one * exp_negative(part.max - total.max);
  }
  if (inv_tau == 1) total.at_one = total.at_tau;
  return total;
}

__device__ double team_value(const Team& team, Shared& shared, int which) {
  double value = 0;
  for (int m = 0; m < team.size; ++m) value += team.of(&shared, m)->values[which];
  return value;
}

// ---- a row ----

// A row of logits that is read once and then again, its head applied: z = cap(scale * (x + bias)).
struct Source {
  const float* row;
  int n;
  bool is_aligned;
  const float* bias;
  float scale, softcap;
  Vector* tiles;
  int kept;

  __device__ float logit(float x, int v) const {
    if (as_ints(x) == kHoleBits) return kNone;
    if (bias != nullptr) x += bias[v];
    x *= scale;
    if (softcap != 0) x = tanh_lanes(x / softcap) * softcap;
    return x < kNone ? kNone : x;
  }
  __device__ Vector fetch(int v) const {
    Vector z = read<kVector>(row + v, n - v, is_aligned, kNone);
#pragma unroll
    for (int i = 0; i < kVector; ++i) z.value[i] = v + i < n ? logit(z.value[i], v + i) : kNone;
    return z;
  }
  __device__ void keep(const Vector& z, int round) const {
    if (round < kept) tiles[round * kThreads + threadIdx.x] = z;
  }
  __device__ Vector again(int v, int round) const {
    return round < kept ? tiles[round * kThreads + threadIdx.x] : fetch(v);
  }
};

// What is said about one row, and where its gradient goes.
struct Row {
  int64_t index, label;
  int vocabulary;
  float weight, ce_weight, tau, inv_tau, scale, softcap;
  void* dz;
  bool is_bf16, is_aligned;

  __device__ Row(const Job& job, int64_t i)
      : index(i),
        label(job.labels[i]),
        vocabulary(static_cast<int>(job.vocabulary)),
        weight(job.weight[i]),
        ce_weight(job.ce_weight[i]),
        tau(job.temperature[i]),
        inv_tau(1 / tau),
        scale(job.logit_scale),
        softcap(job.softcap),
        dz(nullptr),
        is_bf16(job.dz_is_bf16),
        is_aligned(false) {
    if (job.dz == nullptr) return;
    const int bytes = is_bf16 ? 2 : 4;
    dz = static_cast<char*>(job.dz) + i * job.dz_stride * bytes;
    is_aligned = rbfast::is_aligned(dz, kVector * bytes);
  }
  __device__ bool has_label() const { return label >= 0 && label < vocabulary; }
  // d loss / d logit v, from the gradient in z.
  __device__ float finish(float gradient, float z, int v) const {
    if (v == label) gradient -= ce_weight;
    if (softcap != 0) gradient *= 1 - z / softcap * (z / softcap);
    return gradient * scale;
  }
  __device__ void put_one(float gradient, int v) const {
    if (is_bf16)
      store(static_cast<__nv_bfloat16*>(dz) + v, gradient);
    else
      store(static_cast<float*>(dz) + v, gradient);
  }
  template <typename T>
  __device__ void put_as(const Vector& gradient, int v) const {
    T* to = static_cast<T*>(dz) + v;
    Pack<T, kVector> packed;
#pragma unroll
    for (int i = 0; i < kVector; ++i) store(&packed.value[i], gradient.value[i]);
    if (is_aligned && v + kVector <= vocabulary) {
      *reinterpret_cast<Pack<T, kVector>*>(to) = packed;
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (v + i < vocabulary) to[i] = packed.value[i];
  }
  __device__ void put(Vector gradient, const Vector& z, int v) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) gradient.value[i] = finish(gradient.value[i], z.value[i], v + i);
    if (is_bf16)
      put_as<__nv_bfloat16>(gradient, v);
    else
      put_as<float>(gradient, v);
  }
};

__device__ Source student(const Job& job, const Row& row, const Plan& plan, char* memory) {
  const float* z = job.logits + row.index * job.logits_stride;
  Vector* tiles = reinterpret_cast<Vector*>(memory + plan.kept_offset);
  return {z, row.vocabulary, is_aligned(z, 16), job.bias, job.logit_scale, job.softcap, tiles, plan.kept};
}

__device__ Source teacher(const Job& job, const Row& row, const Plan& plan, char* memory) {
  const float* t = job.teacher + row.index * job.teacher_stride;
  Vector* tiles = reinterpret_cast<Vector*>(memory + plan.kept_offset) + plan.kept * kThreads;
  const int shared = static_cast<int>(job.vocabulary < job.teacher_vocabulary ? job.vocabulary : job.teacher_vocabulary);
  return {t, shared, is_aligned(t, 16), nullptr, 1, 0, tiles, plan.kept};
}

// Adds the values below `end` of a vector at v.
__device__ void add(Sums& sums, const Vector& z, int v, int begin, int end, float inv_tau) {
  float top = kNone;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (v + i >= begin && v + i < end) top = larger(top, z.value[i]);
  if (top > sums.max) {
    sums.at_tau *= exp_negative((sums.max - top) * inv_tau);
    sums.at_one *= exp_negative(sums.max - top);
    sums.max = top;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (v + i < begin || v + i >= end) continue;
    sums.at_tau += exp_negative((z.value[i] - sums.max) * inv_tau);
    if (inv_tau != 1) sums.at_one += exp_negative(z.value[i] - sums.max);
  }
}

}  // namespace
}  // namespace rbfast
