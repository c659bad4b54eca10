// Helpers for every op, CPU or CUDA, between the torch dispatcher and its kernels: tensors, data pointers, and checks
// whose messages say what was expected and what came.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

namespace rbfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws the message (a RuntimeError in Python) unless `ok`.
template <typename... Parts>
void expect(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x if it is contiguous, else a copy. torch::stable::contiguous looks its op up by name at every call, even if x needs
// no copy.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// x if its rows are dense, else a copy.
inline Tensor as_dense_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) < 2 ? x : torch::stable::contiguous(x);
}

// An uninitialised tensor on the device of `like`. Torch's new_empty goes through the dispatcher, which costs the host
// as much as a kernel launch.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4], count = 1;
  for (size_t d = sizes.size(); d-- > 0; count *= std::max<int64_t>(1, sizes.begin()[d])) strides[d] = count;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, static_cast<int32_t>(type),
                                                  device, like.get_device_index(), &made));
  return Tensor(made);
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty(like, sizes, like.scalar_type());
}

inline Tensor floats(const Tensor& like, int64_t rows, int64_t cols) {
  return empty(like, {rows, cols}, ScalarType::Float);
}

inline void expect_matrix(const char* op, const char* name, const Tensor& x, int64_t rows, int64_t cols) {
  expect(x.dim() == 2, op, ": ", name, " must have 2 dimensions, got ", x.dim());
  expect((rows < 0 || x.size(0) == rows) && (cols < 0 || x.size(1) == cols), op, ": ", name, " must be [",
         rows < 0 ? x.size(0) : rows, ", ", cols < 0 ? x.size(1) : cols, "] to fit the other arguments, got [",
         x.size(0), ", ", x.size(1), "]");
}

inline void expect_float32(const char* op, const char* name, const Tensor& x) {
  expect(x.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
         torch::headeronly::toString(x.scalar_type()));
}

inline void expect_delta(const char* op, const Tensor& A, const Tensor& B, int64_t s, int64_t out) {
  expect_float32(op, "A", A);
  expect_float32(op, "B", B);
  expect_matrix(op, "A", A, -1, s);
  expect_matrix(op, "B", B, out, A.size(0));
}

// All lists of a batched op must have the same length.
inline void expect_lists(const char* op, size_t count, std::initializer_list<size_t> others) {
  for (size_t other : others)
    expect(other == count, op, ": all lists must be of one length, got ", count, " and ", other);
}

// Checks `run`: the columns of a support come in aligned runs of that many.
inline void expect_run(const char* op, int64_t s, int64_t run) {
  expect(run >= 1 && run <= 16 && (run & (run - 1)) == 0, op, ": run must be 1, 2, 4, 8 or 16, got ", run);
  expect(s % run == 0, op, ": run must divide the number of columns, ", s, ", got ", run);
}

// Refuses an expanded tensor: threads would race to write the same element.
inline void expect_writable(const char* op, const char* name, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    expect(x.stride(d) != 0 || x.size(d) < 2, op, ": ", name,
           " is an expanded view, which cannot be written to: clone it");
  }
}

}  // namespace rbfast
