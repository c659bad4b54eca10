// What every CPU op needs between the torch dispatcher and its kernels: types, pointers, grain sizes, the ISA switch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/isa.h"
#include "cpu/lanes.h"

// Calls KERNEL of the active instruction set.
#define RBFAST_CALL(KERNEL, ...)                              \
  switch (active_isa()) {                                     \
    case Isa::scalar: scalar::KERNEL(__VA_ARGS__); break;     \
    case Isa::avx2: avx2::KERNEL(__VA_ARGS__); break;         \
    default: avx512::KERNEL(__VA_ARGS__); break;              \
  }

namespace rbfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename F>
void for_each_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(F32{});
    case ScalarType::BFloat16: return f(BF16{});
    case ScalarType::Half: return f(F16{});
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows per task so that a task is worth a thread: about 32k elements.
inline int64_t grain(int64_t elements_per_row) { return 32768 / (elements_per_row + 1) + 1; }

}  // namespace rbfast
