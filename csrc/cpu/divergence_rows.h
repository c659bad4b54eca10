// The passes over one row of logits that make up divergence_rows_, one set of entry points per instruction set. Plain
// pointers only. divergence_rows.cpp computes the scalars between the passes in fp64.
#pragma once

#include <stdint.h>

#include "cpu/lanes.h"
#include "divergence_math.h"

namespace rbfast {

// sum_v exp((z_v - max) * inv_tau) and sum_v exp(z_v - max); undefined if max is kLeastLogit.
struct LogSum {
  float max;
  double at_tau, at_one;
};

// Where a row's gradient goes, and its head: z = softcap * tanh(scale * x / softcap), softcap 0: none.
struct Output {
  void* dz;  // null: no gradient is wanted
  bool is_bf16;
  int64_t label;
  float ce_weight;  // subtracted from the label's gradient
  float scale, softcap;
  int64_t row_stride, teacher_stride;  // of logits; a pass whose own rows are in cache prefetches the next ones
};

// dz_v = at_tau * exp((z_v - max) * inv_tau) + at_one * exp(z_v - max)
struct TailGradient {
  float max, inv_tau, at_tau, at_one;
};

// D, and the mean under q of log q/p (reverse KL) or log q/m (JS), which their gradients need.
struct DenseValue {
  double divergence, mean_score;
};

#define RBFAST_ROW_KERNELS(ISA)                                                                                      \
  namespace ISA {                                                                                                    \
  /* z = cap(scale * (z + bias)); bias may be null */                                                                \
  void head_logits(float* z, const float* bias, int64_t n, float scale, float softcap);                              \
  void log_sum(const float* z, int64_t n, float inv_tau, LogSum* result);                                            \
  void tail_gradient(const float* z, int64_t n, const TailGradient& g, const Output& out);                           \
  /* D; forward KL also writes its gradient in the same pass if out has a dz */                                      \
  void dense_value(const float* z, const float* t, int64_t vocabulary, const DensePass& pass, const Output& out,     \
                   DenseValue* value);                                                                               \
  /* the gradient of reverse KL and JS */                                                                            \
  void dense_gradient(const float* z, const float* t, int64_t vocabulary, const DensePass& pass, const Output& out); \
  }

RBFAST_ROW_KERNELS(scalar)
RBFAST_ROW_KERNELS(avx2)
RBFAST_ROW_KERNELS(avx512)

}  // namespace rbfast
