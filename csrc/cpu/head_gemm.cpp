// The head's three products on the CPU: logits = hidden W^T, d_hidden = dz W and dW += dz^T hidden. Checks, scratch
// memory and threads are here, the arithmetic is in head_gemm_kernel.inl.
//
// Why not a library's: torch has no bf16 x bf16 -> fp32 product on the CPU, rounding logits to bf16 ruins the gradient
// near the teacher, and a library's bits change with the number of rows. These sum in fp32, in an order that depends
// only on k.
#include "cpu/head_gemm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/head_gemm_amx.h"

namespace rbfast {
namespace {

void expect_sums(const char* op, const char* name, const Tensor& x) {
  expect(x.scalar_type() == ScalarType::Float && x.is_contiguous(), op, ": ", name,
         " must be float32 and contiguous, got ", torch::headeronly::toString(x.scalar_type()));
}

Storage storage(const Tensor& x) {
  Storage type = Storage::f32;
  for_each_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    type = std::is_same_v<T, BF16> ? Storage::bf16 : std::is_same_v<T, F16> ? Storage::f16 : Storage::f32;
  });
  return type;
}

// An operand whose outer index runs over the rows of a matrix, or over its columns.
Operand by_rows(const Tensor& x) { return {x.const_data_ptr(), storage(x), x.stride(0), 1}; }
Operand by_columns(const Tensor& x) { return {x.const_data_ptr(), storage(x), 1, x.stride(0)}; }

bool are_bf16(const Gemm& g) { return g.a.type == Storage::bf16 && g.b.type == Storage::bf16; }
bool in_tiles(Isa isa, const Gemm& g) { return isa == Isa::amx && are_bf16(g); }

// Computes a rectangle of C with the kernel for these operands: if both are bf16, with AMX tiles or AVX512_BF16 pairs.
void multiply(Isa isa, const Gemm& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1, void* scratch) {
#if defined(__x86_64__)
  if (in_tiles(isa, g)) return amx::gemm(g, m0, m1, n0, n1, scratch);
  if (isa >= Isa::avx512_bf16 && are_bf16(g)) return avx512_bf16::gemm(g, m0, m1, n0, n1, scratch);
#endif
  RBFAST_CALL(isa, gemm, g, m0, m1, n0, n1, scratch);
}

void multiply_filtered(Isa isa, const Gemm& g, const float* thresholds, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                       void* scratch) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512_bf16 && are_bf16(g)) return avx512_bf16::filtered_gemm(g, thresholds, m0, m1, n0, n1, scratch);
#endif
  RBFAST_CALL(isa, filtered_gemm, g, thresholds, m0, m1, n0, n1, scratch);
}

// C [m, n] cut into down x across rectangles of `height` x `width`; the last ones may be smaller.
struct Rectangles {
  int64_t down, across, height, width;
};

Rectangles rectangles(int64_t m, int64_t n, int64_t down, int64_t across) {
  return {down, across, ceil_div(ceil_div(m, kRowUnit), down) * kRowUnit,
          ceil_div(ceil_div(n, kColumnUnit), across) * kColumnUnit};
}

// Calls f(m0, m1, n0, n1, scratch) for each rectangle in parallel, with scratch_bytes of scratch for each.
template <typename F>
void for_each(const Rectangles& cut, int64_t m, int64_t n, int64_t scratch_bytes, const F& f) {
  const size_t bytes = ceil_div(scratch_bytes, 64) * 64;
  const std::unique_ptr<char, decltype(&std::free)> scratch(
      static_cast<char*>(std::aligned_alloc(64, bytes * cut.across * cut.down)), &std::free);
  expect(scratch != nullptr, "out of memory: ", bytes * cut.across * cut.down,
         " bytes of scratch for a matrix product");
  torch::stable::parallel_for(0, cut.across * cut.down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m0 = i / cut.across * cut.height, n0 = i % cut.across * cut.width;
      if (m0 < m && n0 < n)
        f(m0, std::min(m0 + cut.height, m), n0, std::min(n0 + cut.width, n), scratch.get() + i * bytes);
    }
  });
}

// One rectangle per thread, across the longer side first.
void parallel_gemm(const Gemm& g, int64_t m, int64_t n) {
  const Isa isa = active_isa();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most_down = std::min(threads, ceil_div(m, kRowUnit));
  const int64_t most_across = std::min(threads, ceil_div(n, kColumnUnit));
  const int64_t across = m > n ? std::min(ceil_div(threads, most_down), most_across) : most_across;
  const int64_t down = m > n ? most_down : std::min(ceil_div(threads, most_across), most_down);
  const Rectangles cut = rectangles(m, n, down, across);
  const int64_t bytes = in_tiles(isa, g) ? amx::scratch(g) : gemm_scratch(cut.height, g.k);
  for_each(cut, m, n, bytes, [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1, char* scratch) {
    multiply(isa, g, m0, m1, n0, n1, scratch);
  });
}

// Splits the rows between threads first, because each thread scans its own rows, but leaves each enough of them to
// reuse a word of B.
void parallel_filtered_gemm(const Gemm& g, const float* thresholds, int64_t m, int64_t n) {
  const Isa isa = active_isa();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t down = std::min(threads, ceil_div(m, 4 * kRowUnit));
  const int64_t across = std::min(threads / down, ceil_div(n, kColumnUnit));
  const Rectangles cut = rectangles(m, n, down, across);
  const int64_t bytes = filtered_scratch(cut.width);
  for_each(cut, m, n, bytes, [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1, char* scratch) {
    multiply_filtered(isa, g, thresholds, m0, m1, n0, n1, scratch);
  });
}

void head_forward_(Tensor logits, const Tensor& hidden, const Tensor& weight) {
  expect_matrix("head_forward_", "hidden", hidden, -1, -1);
  expect_matrix("head_forward_", "weight", weight, -1, hidden.size(1));
  expect_matrix("head_forward_", "logits", logits, hidden.size(0), weight.size(0));
  expect_float32("head_forward_", "logits", logits);
  expect((logits.stride(1) == 1 || logits.size(1) < 2) && (logits.stride(0) >= logits.size(1) || logits.size(0) < 2),
         "head_forward_: logits must have contiguous rows that do not overlap");
  const int64_t tokens = hidden.size(0), vocabulary = weight.size(0), width = hidden.size(1);
  if (width == 0) torch::stable::zero_(logits);
  if (tokens == 0 || vocabulary == 0 || width == 0) return;
  const Tensor x = as_dense_rows(hidden), w = as_dense_rows(weight);
  parallel_gemm({by_rows(x), by_rows(w), mutable_data<float>(logits), logits.stride(0), width, Sums::fresh}, tokens,
                vocabulary);
}

void head_backward_(Tensor d_hidden, const Tensor& dz, const Tensor& weight, std::optional<Tensor> thresholds) {
  expect_matrix("head_backward_", "dz", dz, -1, -1);
  expect_matrix("head_backward_", "weight", weight, dz.size(1), -1);
  expect_matrix("head_backward_", "d_hidden", d_hidden, dz.size(0), weight.size(1));
  expect_sums("head_backward_", "d_hidden", d_hidden);
  const int64_t tokens = dz.size(0), vocabulary = dz.size(1), width = weight.size(1);
  if (thresholds) {
    expect_float32("head_backward_", "thresholds", *thresholds);
    expect(thresholds->dim() == 1 && thresholds->size(0) == tokens && thresholds->is_contiguous(),
           "head_backward_: thresholds must be [", tokens, "], one for each row of dz, and contiguous");
  }
  if (vocabulary == 0 || thresholds) torch::stable::zero_(d_hidden);
  if (tokens == 0 || vocabulary == 0 || width == 0) return;
  const Tensor x = as_dense_rows(dz), w = as_dense_rows(weight);
  const Sums sums = thresholds ? Sums::resumed : Sums::fresh;
  const Gemm g{by_rows(x), by_columns(w), mutable_data<float>(d_hidden), width, vocabulary, sums};
  if (thresholds)
    parallel_filtered_gemm(g, data<float>(*thresholds), tokens, width);
  else
    parallel_gemm(g, tokens, width);
}

std::tuple<Tensor, Tensor> row_thresholds(const Tensor& dz, double share) {
  expect_matrix("row_thresholds", "dz", dz, -1, -1);
  const Tensor x = as_dense_rows(dz);
  const int64_t rows = dz.size(0), count = dz.size(1);
  Tensor thresholds = empty(dz, {rows}, ScalarType::Float);
  Tensor left_out = empty(dz, {rows}, ScalarType::Float);
  const Isa isa = active_isa();
  const Operand a = by_rows(x);
  float *threshold = mutable_data<float>(thresholds), *sum = mutable_data<float>(left_out);
  torch::stable::parallel_for(0, rows, grain(count), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      RBFAST_CALL(isa, row_threshold, a, i, count, static_cast<float>(share), threshold + i, sum + i);
  });
  return {thresholds, left_out};
}

void head_grad_(Tensor dW, const Tensor& dz, const Tensor& hidden) {
  expect_matrix("head_grad_", "dz", dz, -1, -1);
  expect_matrix("head_grad_", "hidden", hidden, dz.size(0), -1);
  expect_matrix("head_grad_", "dW", dW, dz.size(1), hidden.size(1));
  const int64_t tokens = dz.size(0), vocabulary = dz.size(1), width = hidden.size(1);
  expect_sums("head_grad_", "dW", dW);
  if (tokens == 0 || vocabulary == 0 || width == 0) return;
  const Tensor x = as_dense_rows(dz), h = as_dense_rows(hidden);
  parallel_gemm({by_columns(x), by_columns(h), mutable_data<float>(dW), width, tokens, Sums::resumed}, vocabulary,
                width);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CPU, m) {
  m.impl("head_forward_", TORCH_BOX(&head_forward_));
  m.impl("head_backward_", TORCH_BOX(&head_backward_));
  m.impl("row_thresholds", TORCH_BOX(&row_thresholds));
  m.impl("head_grad_", TORCH_BOX(&head_grad_));
}

}  // namespace rbfast
