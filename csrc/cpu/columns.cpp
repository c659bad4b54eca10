// The adapter's ops on the CPU: checks, memory and threads. The arithmetic is in columns_kernel.inl.
//
// Only the number of tokens decides how they are cut into groups of blocks, and partial sums are added in the order of
// the groups, so the bits do not depend on the number of threads.
#include "cpu/columns.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"

namespace rbfast {
namespace {

// ---- checks ----

// The indices as a dense array, checked to lie in [0, width) and to come in aligned runs of `run`.
Tensor checked_columns(const char* op, const Tensor& cols, int64_t width, int64_t run) {
  expect(cols.dim() == 1 && cols.scalar_type() == ScalarType::Long, op, ": cols must be int64 with 1 dimension, got ",
         torch::headeronly::toString(cols.scalar_type()), " with ", cols.dim());
  expect_run(op, cols.size(0), run);
  const Tensor result = as_contiguous(cols);
  const int64_t* index = data<int64_t>(result);
  const int64_t count = cols.size(0), low_bits = run - 1;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t column = index[j], within = j & low_bits;
    expect(column >= 0 && column < width, op, ": cols must lie in [0, ", width, "), got ", column, " at position ", j);
    expect((column & low_bits) == within && column - index[j - within] == within, op,
           ": cols must come in aligned runs of ", run, ", got ", column, " at position ", j);
  }
  return result;
}

// Where each column starts in a row of x, in elements.
Tensor checked_offsets(const char* op, const Tensor& cols, const Tensor& x, int64_t run) {
  const Tensor index = checked_columns(op, cols, x.size(1), run), offsets = empty(cols, {cols.size(0)});
  const int64_t* column = data<int64_t>(index);
  const int64_t stride = x.stride(1);
  std::transform(column, column + cols.size(0), mutable_data<int64_t>(offsets), [=](int64_t c) { return c * stride; });
  return offsets;
}

// ---- memory ----

// scaled: scale * B as a dense [out, k]. transposed: B [out, k] as a dense [k, out].
Tensor scaled(const Tensor& B, float scale) {
  const int64_t out = B.size(0), k = B.size(1), row = B.stride(0), col = B.stride(1);
  const Tensor result = floats(B, out, k);
  const float* source = data<float>(B);
  float* target = mutable_data<float>(result);
  for (int64_t o = 0; o < out; ++o)
    for (int64_t i = 0; i < k; ++i) target[o * k + i] = scale * source[o * row + i * col];
  return result;
}
Tensor transposed(const Tensor& B) {
  const int64_t out = B.size(0), k = B.size(1), row = B.stride(0), col = B.stride(1);
  const Tensor result = floats(B, k, out);
  const float* source = data<float>(B);
  float* target = mutable_data<float>(result);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t o = 0; o < out; ++o) target[i * out + o] = source[o * row + i * col];
  return result;
}

// ---- threads ----

constexpr int64_t kBlock = 32;  // tokens, few enough to stay in cache while they are read more than once

// Calls f(first, count) for blocks of at most `size` of `total` rows, in parallel if there is enough work.
template <typename F>
void parallel_blocks(int64_t total, int64_t size, int64_t elements_per_row, const F& f) {
  const int64_t blocks = ceil_div(total, size);
  torch::stable::parallel_for(0, blocks, grain(size * elements_per_row), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * size, std::min(size, total - i * size));
  });
}

// dot [tokens, k] = scale * x m^T for the rows of x from `first`.
template <typename T>
void project(Isa isa, const Tensor& x, int64_t first, int64_t tokens, int64_t k, const float* m, float scale,
             float* dot) {
  std::fill_n(dot, tokens * k, 0.0f);
  RBFAST_CALL(isa, column_dot, data<T>(x) + first * x.stride(0), x.stride(0), tokens, x.size(1), k, m, dot);
  for (int64_t i = 0; i < tokens * k; ++i) dot[i] *= scale;
}

// ---- ops ----

Tensor column_gather(const Tensor& x, const Tensor& cols, int64_t run) {
  const char* op = "column_gather";
  expect_matrix(op, "x", x, -1, -1);
  expect(x.size(1) <= INT32_MAX, op, ": x must have fewer than 2^31 columns, got ", x.size(1));
  const Tensor index = checked_columns(op, cols, x.size(1), run), source = as_dense_rows(x);
  const int64_t s = cols.size(0), ld = source.stride(0);
  const Tensor narrow = empty(cols, {s}, ScalarType::Int);
  int32_t* columns = mutable_data<int32_t>(narrow);
  std::copy_n(data<int64_t>(index), s, columns);
  const Tensor xs = empty(x, {x.size(0), s});
  const Isa isa = active_isa();
  for_each_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    parallel_blocks(x.size(0), kBlock, s, [&](int64_t t, int64_t tokens) {
      RBFAST_CALL(isa, column_gather, data<T>(source) + t * ld, ld, tokens, columns, s, run,
                  mutable_data<T>(xs) + t * s);
    });
  });
  return xs;
}

// Tokens per partial sum: enough that the sums are small beside dy, and at most 64 sums.
int64_t group_size(int64_t tokens) {
  constexpr int64_t kLeast = 128, kMostGroups = 64;
  return std::max(kLeast, ceil_div(ceil_div(tokens, kMostGroups), kBlock) * kBlock);
}

std::tuple<Tensor, Tensor> grad(const char* op, const Tensor& dy, const Tensor& xs, const Tensor& A, const Tensor& B,
                                double scale) {
  expect_matrix(op, "dy", dy, -1, -1);
  expect_matrix(op, "xs", xs, dy.size(0), -1);
  expect_delta(op, A, B, xs.size(1), dy.size(1));
  const int64_t tokens = dy.size(0), out = dy.size(1), s = xs.size(1), k = A.size(0), width = k * (out + s);
  const int64_t size = group_size(tokens), groups = std::max<int64_t>(1, ceil_div(tokens, size));
  const Tensor y = as_dense_rows(dy), x = as_dense_rows(xs), a = as_contiguous(A), bt = transposed(B);
  const Tensor hidden = floats(dy, 2 * tokens, k), sums = floats(dy, groups, width);
  float* total = mutable_data<float>(sums);  // a row is one group's dB^T [k, out] and dA [k, s]
  std::fill_n(total, width, 0.0f);
  const Isa isa = active_isa();
  for_each_type(dy.scalar_type(), [&](auto dy_type) {
    for_each_type(xs.scalar_type(), [&](auto xs_type) {
      using Y = decltype(dy_type);
      using X = decltype(xs_type);
      parallel_blocks(tokens, size, out + s, [&](int64_t first, int64_t count) {
        float* dB = total + first / size * width;
        float* dA = dB + k * out;
        std::fill_n(dB, width, 0.0f);
        for (int64_t t = first; t < first + count; t += kBlock) {
          const int64_t n = std::min(kBlock, first + count - t);
          float* h = mutable_data<float>(hidden) + t * k;
          float* dh = h + tokens * k;
          project<X>(isa, x, t, n, k, data<float>(a), static_cast<float>(scale), h);
          std::fill_n(dh, n * k, 0.0f);
          RBFAST_CALL(isa, column_dot_outer, data<Y>(y) + t * y.stride(0), y.stride(0), n, out, k, data<float>(bt), dh,
                      h, dB);
          for (int64_t i = 0; i < n * k; ++i) dh[i] *= static_cast<float>(scale);
          RBFAST_CALL(isa, column_outer, data<X>(x) + t * x.stride(0), x.stride(0), n, s, k, dh, dA);
        }
      });
    });
  });
  torch::stable::parallel_for(0, width, grain(groups), [&](int64_t begin, int64_t end) {
    for (int64_t g = 1; g < groups; ++g)
      for (int64_t j = begin; j < end; ++j) total[j] += total[g * width + j];
  });
  const Tensor dA = floats(A, k, s), dB = floats(B, out, k);
  std::copy_n(total + k * out, k * s, mutable_data<float>(dA));
  float* target = mutable_data<float>(dB);
  for (int64_t o = 0; o < out; ++o)
    for (int64_t i = 0; i < k; ++i) target[o * k + i] = total[i * out + o];
  return {dA, dB};
}

std::tuple<Tensor, Tensor> column_grad(const Tensor& dy, const Tensor& xs, const Tensor& A, const Tensor& B,
                                       double scale) {
  return grad("column_grad", dy, xs, A, B, scale);
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> column_grad_all(std::vector<Tensor> dy, const Tensor& xs,
                                                                     std::vector<Tensor> A, std::vector<Tensor> B,
                                                                     double scale) {
  const char* op = "column_grad_all";
  expect_lists(op, dy.size(), {A.size(), B.size()});
  std::vector<Tensor> dAs, dBs;
  for (size_t i = 0; i < dy.size(); ++i) {
    const auto [dA, dB] = grad(op, dy[i], xs, A[i], B[i], scale);
    dAs.push_back(dA);
    dBs.push_back(dB);
  }
  return {dAs, dBs};
}

void column_linear_(Tensor y, const Tensor& xs, const Tensor& A, const Tensor& B, double scale) {
  const char* op = "column_linear_";
  expect_matrix(op, "y", y, -1, -1);
  expect_matrix(op, "xs", xs, y.size(0), -1);
  expect_delta(op, A, B, xs.size(1), y.size(1));
  expect_writable(op, "y", y);
  const int64_t tokens = y.size(0), out = y.size(1), k = A.size(0);
  const Tensor x = as_dense_rows(xs), a = as_contiguous(A), bt = transposed(B), hidden = floats(y, tokens, k);
  Tensor target = as_dense_rows(y);
  const int64_t ld = target.stride(0);
  const Isa isa = active_isa();
  for_each_type(y.scalar_type(), [&](auto y_type) {
    for_each_type(xs.scalar_type(), [&](auto xs_type) {
      using Y = decltype(y_type);
      parallel_blocks(tokens, kBlock, out + xs.size(1), [&](int64_t t, int64_t n) {
        float* h = mutable_data<float>(hidden) + t * k;
        project<decltype(xs_type)>(isa, x, t, n, k, data<float>(a), static_cast<float>(scale), h);
        RBFAST_CALL(isa, column_add, mutable_data<Y>(target) + t * ld, ld, n, out, k, h, data<float>(bt));
      });
    });
  });
  if (target.mutable_data_ptr() != y.mutable_data_ptr()) torch::stable::copy_(y, target);
}

void column_scatter_(Tensor dx, const Tensor& dy, const Tensor& cols, const Tensor& A, const Tensor& B, double scale,
                     int64_t run) {
  const char* op = "column_scatter_";
  expect_matrix(op, "dx", dx, -1, -1);
  expect_matrix(op, "dy", dy, dx.size(0), -1);
  expect_delta(op, A, B, cols.numel(), dy.size(1));
  expect_writable(op, "dx", dx);
  const Tensor offsets = checked_offsets(op, cols, dx, run);
  const int64_t tokens = dx.size(0), s = offsets.size(0), k = A.size(0), row = dx.stride(0);
  const int64_t together = dx.stride(1) == 1 ? run : 1;
  const Tensor y = as_dense_rows(dy), a = as_contiguous(A), bt = transposed(B), hidden = floats(dx, tokens, k);
  const Isa isa = active_isa();
  for_each_type(dx.scalar_type(), [&](auto dx_type) {
    for_each_type(dy.scalar_type(), [&](auto dy_type) {
      using X = decltype(dx_type);
      parallel_blocks(tokens, kBlock, dy.size(1) + s, [&](int64_t t, int64_t n) {
        float* dh = mutable_data<float>(hidden) + t * k;
        project<decltype(dy_type)>(isa, y, t, n, k, data<float>(bt), static_cast<float>(scale), dh);
        RBFAST_CALL(isa, column_update, mutable_data<X>(dx) + t * row, row, data<int64_t>(offsets), n, s, together,
                    static_cast<const X*>(nullptr), 0, k, dh, data<float>(a));
      });
    });
  });
}

// One matrix to fold, with checked arguments and dense factors. Its blocks of rows can be written independently.
struct Fold {
  Tensor weight, base, offsets, a, b;
  int64_t together;

  int64_t blocks() const { return ceil_div(weight.size(0), kBlock); }

  void write(Isa isa, int64_t block) const {
    const int64_t o = block * kBlock, n = std::min(kBlock, weight.size(0) - o), s = offsets.size(0), k = a.size(0);
    const int64_t row = weight.stride(0), ld = base.stride(0);
    for_each_type(weight.scalar_type(), [&](auto type) {
      using T = decltype(type);
      RBFAST_CALL(isa, column_update, mutable_data<T>(weight) + o * row, row, data<int64_t>(offsets), n, s, together,
                  data<T>(base) + o * ld, ld, k, data<float>(b) + o * k, data<float>(a));
    });
  }
};

Fold checked_fold(const char* op, const Tensor& weight, const Tensor& base_columns, const Tensor& cols, const Tensor& A,
                  const Tensor& B, double scale, int64_t run) {
  expect_matrix(op, "weight", weight, -1, -1);
  expect_matrix(op, "base_columns", base_columns, weight.size(0), cols.numel());
  expect(base_columns.scalar_type() == weight.scalar_type(), op, ": base_columns must have the dtype of weight, ",
         torch::headeronly::toString(weight.scalar_type()), ", got ",
         torch::headeronly::toString(base_columns.scalar_type()));
  expect_delta(op, A, B, cols.numel(), weight.size(0));
  expect_writable(op, "weight", weight);
  for_each_type(weight.scalar_type(), [](auto) {});  // throws here: a parallel region must not throw
  return {weight,           as_dense_rows(base_columns),          checked_offsets(op, cols, weight, run),
          as_contiguous(A), scaled(B, static_cast<float>(scale)), weight.stride(1) == 1 ? run : 1};
}

void write_folds(const std::vector<Fold>& folds) {
  std::vector<int64_t> begins{0};  // each matrix's first block, counted over all matrices
  int64_t values = 0;
  for (const Fold& fold : folds) {
    begins.push_back(begins.back() + fold.blocks());
    values += fold.weight.size(0) * fold.offsets.size(0);
  }
  const int64_t total = begins.back();
  const Isa isa = active_isa();
  torch::stable::parallel_for(0, total, grain(values / std::max<int64_t>(1, total)), [&](int64_t begin, int64_t end) {
    size_t of = std::upper_bound(begins.begin(), begins.end(), begin) - begins.begin() - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= begins[of + 1]) ++of;
      folds[of].write(isa, i - begins[of]);
    }
  });
}

void column_fold_(Tensor weight, const Tensor& base_columns, const Tensor& cols, const Tensor& A, const Tensor& B,
                  double scale, int64_t run) {
  write_folds({checked_fold("column_fold_", weight, base_columns, cols, A, B, scale, run)});
}

void column_fold_all_(std::vector<Tensor> weights, std::vector<Tensor> base_columns, std::vector<Tensor> cols,
                      std::vector<Tensor> A, std::vector<Tensor> B, double scale, std::vector<int64_t> runs) {
  const char* op = "column_fold_all_";
  expect_lists(op, weights.size(), {base_columns.size(), cols.size(), A.size(), B.size(), runs.size()});
  std::vector<Fold> folds;
  for (size_t i = 0; i < weights.size(); ++i)
    folds.push_back(checked_fold(op, weights[i], base_columns[i], cols[i], A[i], B[i], scale, runs[i]));
  write_folds(folds);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CPU, m) {
  m.impl("column_gather", TORCH_BOX(&column_gather));
  m.impl("column_grad", TORCH_BOX(&column_grad));
  m.impl("column_grad_all", TORCH_BOX(&column_grad_all));
  m.impl("column_linear_", TORCH_BOX(&column_linear_));
  m.impl("column_scatter_", TORCH_BOX(&column_scatter_));
  m.impl("column_fold_", TORCH_BOX(&column_fold_));
  m.impl("column_fold_all_", TORCH_BOX(&column_fold_all_));
}

}  // namespace rbfast
