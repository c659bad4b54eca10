// One row of logits: its label, weights and teacher sums, its head, its vectors in registers, and where its gradient
// goes.
#pragma once

#include <type_traits>

#include "cuda/team.cuh"

namespace rbfast {
namespace {

constexpr int kMaskBits = 0x7fc0b1d5;  // a NaN, see Head::mask_value

__device__ inline float tanh_fast(float x) {
  const float t = exp_change(fabsf(x) * -2.0f).change;
  return copysignf(divide_fast(-t, t + 2.0f), x);
}

// z = cap(scale * (x + bias))
struct Head {
  const float* bias;
  float scale, softcap, inv_softcap;

  __host__ __device__ explicit Head(const Job& job)
      : bias(job.bias), scale(job.logit_scale), softcap(job.softcap), inv_softcap(1 / job.softcap) {}
  __host__ __device__ bool is_plain() const { return bias == nullptr && scale == 1 && softcap == 0; }
  __device__ float logit(float x, int v) const {
    if (bias != nullptr) x += bias[v];
    x *= scale;
    if (softcap != 0) x = tanh_fast(x * inv_softcap) * softcap;
    return x < kLeastLogit ? kLeastLogit : x;
  }
  // d loss / d x from d loss / d z
  __device__ float backward(float gradient, float z) const {
    if (softcap != 0) gradient *= 1 - z * inv_softcap * (z * inv_softcap);
    return gradient * scale;
  }
  // What masks the logits of a top-k teacher's ids, so that the row's sums are those of the tail. -inf adds nothing to
  // a sum, but a softcap would make it finite: hence the NaN.
  __device__ float mask_value() const { return is_plain() ? -INFINITY : __int_as_float(kMaskBits); }
};

// What is known of a row before its logits are read, see prepare_rows. Sums over the teacher's support (its ids) are as
// in Sums. The teacher's tail is p_tail at temperature 1; at any other, log_tail is the known part of its log2. At a
// low temperature all probabilities may underflow fp32, so the largest one of the support is factored out of p_support,
// log_tail and the entries.
struct alignas(16) RowInfo {
  float inv_tau, kl_scale, ce_weight, z_label;  // kl_scale: kl_weight * tau
  float support_max, support_tau, support_one, p_support;
  float p_tail, log_tail;
  int label;                   // -1: outside the vocabulary
  float pivot, teacher_pivot;  // see Sums

  __device__ float scale() const { return inv_tau * kLog2e; }
};

// Where the losses of rows go.
struct Losses {
  float *divergence, *ce, *loss;

  __device__ void store(const Job& job, const RowInfo& info, int64_t row, double d, double cross_entropy) const {
    divergence[row] = static_cast<float>(d);
    ce[row] = static_cast<float>(cross_entropy);
    const double tau = of_row(job.temperature, row);
    loss[row] = static_cast<float>(info.kl_scale * tau * d + info.ce_weight * cross_entropy);
  }
};

struct alignas(8) Entry {
  float z, log_p;  // of an id of the support; log_p in base 2, at the row's temperature, see RowInfo
};

// What the kernels of one call pass to each other.
struct Scratch {
  RowInfo* rows;
  Sums* sums;      // per row: of the tail, or with a dense teacher of the whole vocabulary
  float* terms;    // of D, per row and warp of its team
  Entry* entries;  // [rows, k]
};

// Calls f(v, i) for each vector i of a thread's tile, which begins at column `first`.
template <int kVectors, int kStep, typename F>
__device__ inline void for_each_vector(int first, const F& f) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) f(first + i * kStep, i);
}
// Calls inside(v, i) for each vector that is known to lie before column `end`, any(v, i) for the others. Layouts are no
// larger than needed, so in most rows only a thread's last vector can cross the end: the others are spared the
// comparison and the default.
template <int kVectors, int kStep, typename Inside, typename Any>
__device__ inline void for_each_vector(int first, int end, const Inside& inside, const Any& any) {
  if (first + (kVectors - 2) * kStep + kVector <= end) {
    for_each_vector<kVectors - 1, kStep>(first, inside);
    any(first + (kVectors - 1) * kStep, kVectors - 1);
  } else {
    for_each_vector<kVectors, kStep>(first, any);
  }
}

// A row of logits to read; columns from `end` on are -inf. It has no columns if the row does not exist.
struct Input {
  const float* begin;
  int end;
  bool is_aligned;

  __device__ Input(const float* begin, int end)
      : begin(begin), end(end), is_aligned(rbfast::is_aligned(begin, sizeof(Vector))) {}
  __device__ bool is_whole() const { return is_aligned && end % kVector == 0; }  // no vector is cut off
  // A row of the job's logits.
  __device__ static Input of(const Job& job, int64_t row) {
    return {job.logits + row * job.logits_stride, row < job.rows ? static_cast<int>(job.vocabulary) : 0};
  }
};

// The vector at column v of a whole row.
__device__ inline Vector read_whole(const Input& row, int v) {
  constexpr Vector kEmpty = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
  return v < row.end ? *reinterpret_cast<const Vector*>(row.begin + v) : kEmpty;
}
// The same for an aligned row and a vector known to lie in it.
__device__ inline Vector read_inside(const Input& row, int v) {
  return *reinterpret_cast<const Vector*>(row.begin + v);
}
// The same for any row.
__device__ inline Vector read_vector(const Input& row, int v) {
  return read<kVector>(row.begin + v, row.end - v, row.is_aligned, -INFINITY);
}

template <int kStep, int kVectors>
__device__ inline void read_tile(Vector (&z)[kVectors], const Input& row, int first) {
  for_each_vector<kVectors, kStep>(
      first, row.is_aligned ? row.end : 0, [&](int v, int i) { z[i] = read_inside(row, v); },
      [&](int v, int i) { z[i] = read_vector(row, v); });
}

// Turns a tile of raw logits into what the softmax sees, and masked ones into -inf.
template <int kStep, int kVectors>
__device__ inline void apply_head(Vector (&z)[kVectors], const Head& head, int first, int end) {
  for_each_vector<kVectors, kStep>(first, [&](int v, int i) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float x = z[i].value[j];
      z[i].value[j] = v + j >= end || __float_as_int(x) == kMaskBits ? -INFINITY : head.logit(x, v + j);
    }
  });
}

template <int kVectors>
__device__ inline float sum_tile(const Vector (&z)[kVectors], float pivot, float scale) {
  PowerSum sum(pivot, scale);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) sum.add(z[i]);
  return sum.total();
}

// The largest of a thread's tile and `top`.
template <int kVectors>
__device__ inline float largest_of(const Vector (&z)[kVectors], float top) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
#pragma unroll
    for (int j = 0; j < kVector; ++j) top = fmaxf(top, z[i].value[j]);
  return top;
}

// A row of dz; it has no columns if no gradient is wanted.
struct Output {
  void* dz;
  int end;  // columns
  bool is_bf16, is_aligned;

  __device__ Output(const Job& job, int64_t row)
      : end(job.dz == nullptr ? 0 : static_cast<int>(job.vocabulary)), is_bf16(job.dz_is_bf16) {
    const int bytes = is_bf16 ? 2 : 4;
    dz = static_cast<char*>(job.dz) + row * job.dz_stride * bytes;
    is_aligned = rbfast::is_aligned(dz, kVector * bytes);
  }
  __device__ bool is_whole() const { return is_aligned && end % kVector == 0; }

  __device__ void store_one(float gradient, int v) const {
    if (is_bf16)
      store(static_cast<__nv_bfloat16*>(dz) + v, gradient);
    else
      store(static_cast<float*>(dz) + v, gradient);
  }
  // Stores an aligned vector inside the row, as bf16 or fp32.
  template <bool kBf16>
  __device__ void store_inside(const Vector& gradient, int v) const {
    const float* g = gradient.value;
    if (kBf16)
      *reinterpret_cast<Pack<unsigned, 2>*>(static_cast<uint16_t*>(dz) +
                                            v) = {{pack_bf16(g[0], g[1]), pack_bf16(g[2], g[3])}};
    else
      *reinterpret_cast<Vector*>(static_cast<float*>(dz) + v) = gradient;
  }
  __device__ void store_vector(const Vector& gradient, int v) const {
    if (is_aligned && v + kVector <= end)
      return is_bf16 ? store_inside<true>(gradient, v) : store_inside<false>(gradient, v);
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      if (v + j < end) store_one(gradient.value[j], v + j);
  }
  // Stores f(z[i]), the gradient of each vector of a tile; f is not called for vectors beyond the row.
  template <int kStep, int kVectors, typename F>
  __device__ void store_tile(const Vector (&z)[kVectors], int first, const F& f) const {
    const auto store_all = [&](auto is_bf16) {
      for_each_vector<kVectors, kStep>(
          first, is_aligned ? end : 0, [&](int v, int i) { store_inside<is_bf16.value>(f(z[i]), v); },
          [&](int v, int i) {
            if (v < end) store_vector(f(z[i]), v);
          });
    };
    is_bf16 ? store_all(std::true_type{}) : store_all(std::false_type{});
  }
};

}  // namespace
}  // namespace rbfast
