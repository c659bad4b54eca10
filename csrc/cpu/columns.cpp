// The adapter's ops on the CPU: checks, threads and the choice of instruction set. The arithmetic is in columns_kernel.inl.
#include "cpu/columns.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/dispatch.h"

namespace rbfast {
namespace {

using torch::stable::Tensor;

Tensor column_gather(const Tensor& x, const Tensor& cols) {
  const int64_t rows = x.size(0), s = cols.size(0);
  const Tensor index = torch::stable::contiguous(cols);
  const Tensor source = x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  Tensor xs = torch::stable::new_empty(x, {rows, s});
  const int64_t* columns = static_cast<const int64_t*>(index.const_data_ptr());
  for_each_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    torch::stable::parallel_for(0, rows, grain(s), [&](int64_t begin, int64_t end) {
      RBFAST_CALL(column_gather, data<T>(source), source.stride(0), columns, s, mutable_data<T>(xs), begin, end);
    });
  });
  return xs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CPU, m) {
  m.impl("column_gather", TORCH_BOX(&column_gather));
}

}  // namespace rbfast
