// The checked arguments of divergence_rows_ as plain pointers, for the kernels of both CPU and CUDA. A row of logits x
// with label y has (rbfast/ops/reference.py is the definition)
//     z = cap(logit_scale * (x + bias)),  q = softmax(z / tau),
//     loss = kl_weight * tau^2 * D + ce_weight * CE(softmax(z), y),
//     dz = d loss / d x = (kl_weight * tau * g + ce_weight * (softmax(z) - onehot(y))) * d z / d x.
// D and g = d D / d (z / tau), with m = beta p + (1 - beta) q and means over q:
//     beta = 0:  D = KL(p, q),                             g = q - p
//     beta = 1:  D = KL(q, p),                             g = q (score - mean score),  score = log(q / p)
//     between:   D = beta KL(p, m) + (1 - beta) KL(q, m),  g = (1 - beta) q (score - mean score),  score = log(q / m)
// p comes from a teacher's log-probs of k ids, with a tail for all others (top-k), or from its logits (dense). Without
// a teacher (text) D is 0.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"

#ifndef RBFAST_INLINE
#define RBFAST_INLINE static inline
#endif

namespace rbfast {

// A number per row: values[row] * factor, or factor alone in every row if values is null.
struct Parameter {
  const float* values;
  double factor;
};

RBFAST_INLINE float of_row(const Parameter& parameter, int64_t row) {
  return static_cast<float>(parameter.values == nullptr ? parameter.factor : parameter.values[row] * parameter.factor);
}

// Strides are in elements. With neither ids nor a teacher the rows are text: cross-entropy alone.
struct Job {
  float* logits;
  int64_t logits_stride, rows, vocabulary;
  void* dz;  // null: no gradient is wanted
  int64_t dz_stride;
  bool dz_is_bf16;
  const int64_t* labels;
  Parameter kl_weight, ce_weight, temperature;
  const int64_t* ids;
  const float* logprobs;
  int64_t k;
  const float* teacher;
  int64_t teacher_stride, teacher_vocabulary;
  const float* bias;
  double beta;
  float logit_scale, softcap;  // softcap 0: none
};

// Checks shapes and types, but not the values of labels and ids: on a GPU that would synchronise the stream.
class Arguments {
 public:
  Job job{};

  Arguments(const Tensor& logits, const std::optional<Tensor>& dz, const Tensor& labels,
            const std::optional<Tensor>& kl_weight, const std::optional<Tensor>& ce_weight,
            const std::optional<Tensor>& temperature, const std::optional<Tensor>& ids,
            const std::optional<Tensor>& logprobs, const std::optional<Tensor>& teacher,
            const std::optional<Tensor>& bias, double beta, double logit_scale, std::optional<double> softcap,
            double kl_factor, double ce_factor, double temperature_factor) {
    expect(logits.dim() == 2 && logits.size(1) > 0 && logits.scalar_type() == ScalarType::Float,
           "divergence_rows_: logits must be float32 [T, V] with V > 0");
    job.rows = logits.size(0);
    job.vocabulary = logits.size(1);
    expect_plane("logits", logits);
    expect_writable("divergence_rows_", "logits", logits);
    job.logits = mutable_data<float>(logits);
    job.logits_stride = logits.stride(0);
    if (dz) take_dz(*dz);
    job.labels = data<int64_t>(of_rows("labels", labels, ScalarType::Long));
    job.kl_weight = parameter("kl_weight", kl_weight, kl_factor);
    job.ce_weight = parameter("ce_weight", ce_weight, ce_factor);
    job.temperature = parameter("temperature", temperature, temperature_factor);
    if (ids && logprobs)
      take_top_k(*ids, *logprobs);
    else if (teacher)
      take_teacher(*teacher);
    if (bias) take_bias(*bias);
    job.beta = beta;
    job.logit_scale = static_cast<float>(logit_scale);
    job.softcap = static_cast<float>(softcap.value_or(0));
  }

 private:
  std::vector<Tensor> alive_;  // keeps the memory behind the job's pointers

  void take_dz(const Tensor& dz) {
    expect_plane("dz", dz);
    job.dz_is_bf16 = dz.scalar_type() == ScalarType::BFloat16;
    expect(dz.size(1) == job.vocabulary && (job.dz_is_bf16 || dz.scalar_type() == ScalarType::Float),
           "divergence_rows_: dz must be float32 or bfloat16, of the shape of logits");
    expect_writable("divergence_rows_", "dz", dz);
    job.dz = dz.mutable_data_ptr();
    job.dz_stride = dz.stride(0);
    expect_rows_apart();
  }

  // If dz overlaps the logits, each row of dz must start at its own row of logits.
  void expect_rows_apart() const {
    if (job.rows == 0) return;
    const int64_t bytes = job.dz_is_bf16 ? 2 : 4;
    const char *z = reinterpret_cast<const char*>(job.logits), *dz = static_cast<const char*>(job.dz);
    const char* z_end = z + ((job.rows - 1) * job.logits_stride + job.vocabulary) * 4;
    const char* dz_end = dz + ((job.rows - 1) * job.dz_stride + job.vocabulary) * bytes;
    const bool is_apart = dz_end <= z || z_end <= dz;
    const bool is_same = dz == z && (job.rows < 2 || job.dz_stride * bytes == job.logits_stride * 4);
    expect(is_apart || is_same,
           "divergence_rows_: dz may overlap logits only if each row starts where its logits start; ",
           "give it memory of its own, or logits.view(dz.dtype)[:, :V]");
  }

  void take_top_k(const Tensor& ids, const Tensor& logprobs) {
    const Tensor id = dense("ids", ids, ScalarType::Long), log_p = dense("logprobs", logprobs, ScalarType::Float);
    expect(id.dim() == 2 && log_p.dim() == 2 && id.size(1) == log_p.size(1),
           "divergence_rows_: ids and logprobs must both be [T, k]");
    job.ids = data<int64_t>(id);
    job.logprobs = data<float>(log_p);
    job.k = id.size(1);
  }

  void take_teacher(const Tensor& teacher) {
    expect_rows("teacher", teacher, ScalarType::Float);
    expect_plane("teacher", teacher);
    expect(teacher.size(1) > 0, "divergence_rows_: teacher must have at least one column");
    job.teacher = data<float>(teacher);
    job.teacher_stride = teacher.stride(0);
    job.teacher_vocabulary = teacher.size(1);
  }

  void take_bias(const Tensor& bias) {
    const Tensor b = alive_.emplace_back(as_contiguous(bias));
    expect(b.dim() == 1 && b.size(0) == job.vocabulary && b.scalar_type() == ScalarType::Float,
           "divergence_rows_: bias must be float32 [", job.vocabulary, "]");
    job.bias = data<float>(b);
  }

  Parameter parameter(const char* name, const std::optional<Tensor>& values, double factor) {
    return {values ? data<float>(of_rows(name, *values, ScalarType::Float)) : nullptr, factor};
  }

  Tensor of_rows(const char* name, const Tensor& x, ScalarType type) {
    expect(x.dim() == 1, "divergence_rows_: ", name, " must have 1 dimension, got ", x.dim());
    return dense(name, x, type);
  }

  Tensor dense(const char* name, const Tensor& x, ScalarType type) {
    expect_rows(name, x, type);
    return alive_.emplace_back(as_contiguous(x));
  }

  void expect_rows(const char* name, const Tensor& x, ScalarType type) const {
    expect(x.dim() > 0 && x.size(0) == job.rows && x.scalar_type() == type, "divergence_rows_: ", name, " must be ",
           torch::headeronly::toString(type), " with one entry per row of logits (", job.rows, "), got ",
           torch::headeronly::toString(x.scalar_type()), " with ", x.dim() > 0 ? x.size(0) : 0);
  }

  // Expects [rows, columns] with dense rows: x is read or written in place.
  void expect_plane(const char* name, const Tensor& x) const {
    expect(x.dim() == 2 && x.size(0) == job.rows && (x.stride(1) == 1 || x.size(1) < 2), "divergence_rows_: ", name,
           " must be [", job.rows, ", columns] with dense rows; call contiguous() on it");
  }
};

}  // namespace rbfast
