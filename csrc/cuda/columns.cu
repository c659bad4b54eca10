// The adapter's ops on a GPU. The delta of a frozen weight W [out, in] is dW[:, cols] = scale * B A, so its gradients
// need, for xs = x[:, cols],
//     H = xs A^T,  dB = scale * dy^T H,  dH = dy B,  dA = scale * dH^T xs.
//
// Traffic: dy is the only large operand, T * out values. `sweep` reads it once and does both of its products, as it does
// for H (a product with rows alone) and dA (with columns alone). A warp keeps its features' rows of B and of dB in
// registers and goes through a run of tokens by itself: no shared memory, no barrier. What it leaves are partial sums,
// of dB for its tokens and of dH for its features; `sum_parts` adds them up. Those of dH are k floats for every token
// and warp, written and read again: at most 3% of the bytes of a bf16 dy for k up to 4, but 12% for k = 8, 50% for 16
// and 200% for 32, where a warp has registers for fewer features.
//
// Every sum runs in an order fixed by the shapes alone, without atomics. A column outside the matrix, which a GPU cannot
// report without waiting, is read as NaN and never written.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cuda/device.cuh"

namespace rbfast {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kWarps = kThreads / kWarp;
constexpr int kValues = 32;   // a warp's products with rows at a time: kWidth tokens of kRank ranks, one for each lane
constexpr int64_t kBusy = 1536;  // warps that keep the memory of a large GPU busy: tokens are split until there are as many

// One pass over x [tokens, n] for up to kRank ranks of k_all: dot[b, t, i] is the part of sum_v x[t, v] m[i, v] that the
// features of block b give, outer[g, i, v] the part of sum_t w[t, i] x[t, v] that the tokens of group g give.
template <typename T>
struct Sweep {
  const T* x;
  int64_t ld, tokens, n;
  bool aligned;
  int k;
  int64_t k_all;
  const float* m;  // m[i * m_rank + v * m_feature]
  int64_t m_rank, m_feature;
  float* dot;  // [blocks, tokens, k_all], or null
  const float* w;  // [tokens, k_all]
  float* outer;  // [groups, k_all, n], or null
  int64_t group;  // tokens of a group
};

// Lane l's result is the sum over the warp of v[l]: 31 exchanges, where 32 separate sums take 160.
template <int kHalf = kValues / 2>
__device__ inline float sum_across(float (&v)[kValues]) {
  const bool is_upper = threadIdx.x & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float given = is_upper ? v[i] : v[i + kHalf], kept = is_upper ? v[i + kHalf] : v[i];
    v[i] = kept + __shfl_xor_sync(kAllLanes, given, kHalf);
  }
  if constexpr (kHalf > 1) return sum_across<kHalf / 2>(v);
  return v[0];
}

template <typename T, int kRank>
__global__ void __launch_bounds__(kThreads) sweep(const Sweep<T> s) {
  constexpr int kWidth = kValues / kRank;  // features of a lane, and tokens taken at a time
  const int lane = threadIdx.x % kWarp;
  const int64_t block = blockIdx.x * kWarps + threadIdx.x / kWarp, first = (block * kWarp + lane) * kWidth;
  if (block * kWarp * kWidth >= s.n) return;
  float m[kRank][kWidth], outer[kRank][kWidth] = {};
#pragma unroll
  for (int i = 0; i < kRank; ++i)
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      m[i][j] = s.dot != nullptr && i < s.k && first + j < s.n ? s.m[i * s.m_rank + (first + j) * s.m_feature] : 0;

  const int64_t begin = blockIdx.y * s.group, end = begin + s.group < s.tokens ? begin + s.group : s.tokens;
  const int64_t mine = lane / kRank;  // the token and rank that this lane loads and stores for the others
  const int rank = lane % kRank;
  for (int64_t t = begin; t < end; t += kWidth) {
    Pack<T, kWidth> x[kWidth];
#pragma unroll
    for (int a = 0; a < kWidth; ++a)
      x[a] = read<kWidth>(s.x + (t + a) * s.ld + first, t + a < end ? s.n - first : 0, s.aligned, T{});
    const bool is_value = t + mine < end && rank < s.k;
    if (s.outer != nullptr) {
      const float w = is_value ? s.w[(t + mine) * s.k_all + rank] : 0;
#pragma unroll
      for (int a = 0; a < kWidth; ++a)
#pragma unroll
        for (int i = 0; i < kRank; ++i) {
          const float factor = __shfl_sync(kAllLanes, w, a * kRank + i);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) outer[i][j] = fmaf(factor, load(&x[a].value[j]), outer[i][j]);
        }
    }
    if (s.dot != nullptr) {
      float dot[kValues] = {};
#pragma unroll
      for (int a = 0; a < kWidth; ++a)
#pragma unroll
        for (int i = 0; i < kRank; ++i)
#pragma unroll
          for (int j = 0; j < kWidth; ++j)
            dot[a * kRank + i] = fmaf(load(&x[a].value[j]), m[i][j], dot[a * kRank + i]);
      const float sum = sum_across(dot);
      if (is_value) s.dot[(block * s.tokens + t + mine) * s.k_all + rank] = sum;
    }
  }
  if (s.outer == nullptr) return;
#pragma unroll
  for (int i = 0; i < kRank; ++i)
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      if (i < s.k && first + j < s.n) s.outer[(blockIdx.y * s.k_all + i) * s.n + first + j] = outer[i][j];
}

// sum[i, v] or, transposed, sum[v, i] = scale * sum_g parts[g, i, v], with parts [count, k, n].
struct Parts {
  const float* parts;
  int64_t count, k, n;
  float scale;
  float* sum;
  bool is_transposed;
};

__global__ void sum_parts(const Parts first, const Parts second) {
  const Parts p = blockIdx.y == 0 ? first : second;
  const int64_t size = p.k * p.n, index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= size) return;
  float sum = 0;
  for (int64_t g = 0; g < p.count; ++g) sum += p.parts[g * size + index];
  const int64_t target = p.is_transposed ? index % p.n * p.k + index / p.n : index;
  p.sum[target] = p.scale * sum;
}

// xs[t, j] = x[t, cols[j]]
template <typename T>
__global__ void gather(const T* x, int64_t row, int64_t column, int64_t width, int64_t tokens, const int64_t* cols,
                       int64_t s, T* xs) {
  const int64_t t = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (t >= tokens) return;
  for (int64_t j = threadIdx.x % kWarp; j < s; j += kWarp) {
    const int64_t c = cols[j];
    if (c >= 0 && c < width)
      xs[t * s + j] = x[t * row + c * column];
    else
      store(xs + t * s + j, NAN);
  }
}

// y[t, v] += scale * sum_i h[t, i] B[v, i]
template <typename T>
struct Add {
  T* y;
  int64_t row, column, tokens, n, k;
  const float* h;  // [tokens, k]
  const float* B;  // B[v * b_row + i * b_rank]
  int64_t b_row, b_rank;
  float scale;
};

template <typename T>
__global__ void add_low_rank(const Add<T> p) {
  constexpr int kTokens = 8;  // that share each value of B
  const int64_t v = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x, first = blockIdx.x * int64_t{kTokens};
  if (v >= p.n) return;
  float total[kTokens] = {};
  for (int64_t i = 0; i < p.k; ++i) {
    const float b = p.B[v * p.b_row + i * p.b_rank];
#pragma unroll
    for (int a = 0; a < kTokens; ++a)
      if (first + a < p.tokens) total[a] = fmaf(p.h[(first + a) * p.k + i], b, total[a]);
  }
#pragma unroll
  for (int a = 0; a < kTokens; ++a) {
    if (first + a >= p.tokens) break;
    T* y = p.y + (first + a) * p.row + v * p.column;
    store(y, load(y) + p.scale * total[a]);
  }
}

// target[r, cols[j]] = base[r, j] + sum_i (scale * w[r, i]) m[i, j]; without a base it adds to what is there. The sum
// runs in order of i from zero and every product is rounded before it is added: a fold has the same bits everywhere.
template <typename T>
struct Update {
  T* target;
  int64_t row, column, rows, width;
  const int64_t* cols;
  int64_t s;
  const T* base;  // [rows, s] with row stride ld, or null
  int64_t ld, k;
  const float* w;  // w[r * w_row + i * w_rank]
  int64_t w_row, w_rank;
  const float* m;  // [k, s]
  float scale;
};

template <typename T>
__device__ void update_one(const Update<T>& p, int64_t r, int64_t j) {
  const int64_t c = p.cols[j];
  if (c < 0 || c >= p.width) return;
  float total = 0;
  for (int64_t i = 0; i < p.k; ++i) {
    const float w = __fmul_rn(p.scale, p.w[r * p.w_row + i * p.w_rank]);
    total = __fadd_rn(total, __fmul_rn(w, p.m[i * p.s + j]));
  }
  T* target = p.target + r * p.row + c * p.column;
  store(target, __fadd_rn(load(p.base == nullptr ? target : p.base + r * p.ld + j), total));
}

// A block has 32 rows. Lanes go along the columns, or along the rows where those are what lies together in memory.
template <typename T>
__global__ void update_columns(const Update<T> p) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t first = blockIdx.x * int64_t{kWarp}, end = first + kWarp < p.rows ? first + kWarp : p.rows;
  if (p.row == 1) {
    if (first + lane >= end) return;
    for (int64_t j = warp; j < p.s; j += warps) update_one(p, first + lane, j);
  } else {
    for (int64_t r = first + warp; r < end; r += warps)
      for (int64_t j = lane; j < p.s; j += kWarp) update_one(p, r, j);
  }
}

// ---- launching ----

// The ranks of one sweep: few of them leave a lane registers for more features and tokens.
int rank_of(int64_t k) { return k <= 4 ? 4 : k <= 8 ? 8 : k <= 16 ? 16 : 32; }
int64_t block_count(int64_t n, int64_t k) { return ceil_div(n, kWarp * (kValues / rank_of(k))); }

// Tokens are split into groups so that there are kBusy warps, as far as there are tokens.
int64_t group_size(int64_t tokens, int64_t n, int64_t k) {
  const int64_t groups = std::max<int64_t>(1, kBusy / std::max<int64_t>(1, block_count(n, k)));
  const int64_t width = kValues / rank_of(k);
  return std::max<int64_t>(1, ceil_div(ceil_div(tokens, groups), width)) * width;
}

// Runs the pass for all k ranks, 32 at a time.
template <typename T>
void run_sweep(const Device& device, Sweep<T> s) {
  const Shape shape{ceil_div(block_count(s.n, s.k_all), kWarps), ceil_div(s.tokens, s.group), kThreads};
  for (int64_t i = 0; i < s.k_all; i += kValues) {
    Sweep<T> part = s;
    part.k = static_cast<int>(std::min<int64_t>(kValues, s.k_all - i));
    part.m += s.dot != nullptr ? i * s.m_rank : 0;
    part.dot += s.dot != nullptr ? i : 0;
    part.w += s.outer != nullptr ? i : 0;
    part.outer += s.outer != nullptr ? i * s.n : 0;
    switch (rank_of(s.k_all)) {
      case 4:
        device.launch(shape, sweep<T, 4>, part);
        break;
      case 8:
        device.launch(shape, sweep<T, 8>, part);
        break;
      case 16:
        device.launch(shape, sweep<T, 16>, part);
        break;
      default:
        device.launch(shape, sweep<T, 32>, part);
    }
  }
}

template <typename T>
Sweep<T> sweep_over(const Tensor& x, int64_t k) {
  Sweep<T> s{};
  s.x = data<T>(x);
  s.ld = x.stride(0);
  s.tokens = x.size(0);
  s.n = x.size(1);
  s.aligned = is_aligned(s.x, 16) && s.ld * sizeof(T) % 16 == 0;
  s.k_all = k;
  s.group = group_size(s.tokens, s.n, k);
  return s;
}

void run_sums(const Device& device, const Parts& first, const Parts* second = nullptr) {
  const int64_t most = std::max(first.k * first.n, second != nullptr ? second->k * second->n : 0);
  device.launch({ceil_div(most, 256), second != nullptr ? 2 : 1}, sum_parts, first, second != nullptr ? *second : first);
}

// x m^T [tokens, k] from its parts; m [k, n] has the strides given.
Tensor project(const Device& device, const Tensor& x, const Tensor& m, int64_t k, int64_t m_rank, int64_t m_feature) {
  const int64_t tokens = x.size(0), blocks = block_count(x.size(1), k);
  const Tensor parts = floats(x, std::max<int64_t>(1, blocks) * tokens, k);
  for_each_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Sweep<T> s = sweep_over<T>(x, k);
    s.m = data<float>(m);
    s.m_rank = m_rank;
    s.m_feature = m_feature;
    s.dot = mutable_data<float>(parts);
    run_sweep(device, s);
  });
  if (blocks == 1) return parts;
  const Tensor result = floats(x, tokens, k);
  run_sums(device, {data<float>(parts), blocks, tokens, k, 1, mutable_data<float>(result), false});
  return result;
}

// ---- ops ----

const int64_t* checked_columns(const char* op, const Tensor& cols) {
  expect(cols.dim() == 1 && cols.scalar_type() == ScalarType::Long, op, ": cols must be int64 with 1 dimension, got ",
         torch::headeronly::toString(cols.scalar_type()), " with ", cols.dim());
  return data<int64_t>(cols);
}

Tensor column_gather(const Tensor& x, const Tensor& cols) {
  const char* op = "column_gather";
  expect_matrix(op, "x", x, -1, -1);
  const Device device(op, {{"x", x}, {"cols", cols}});
  const Tensor index = torch::stable::contiguous(cols);
  const int64_t* column = checked_columns(op, index);
  const int64_t tokens = x.size(0), s = cols.size(0);
  const Tensor xs = torch::stable::new_empty(x, {tokens, s});
  for_each_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (s == 0) return;
    device.launch({ceil_div(tokens, 256 / kWarp)}, gather<T>, data<T>(x), x.stride(0), x.stride(1), x.size(1), tokens,
                  column, s, mutable_data<T>(xs));
  });
  return xs;
}

std::tuple<Tensor, Tensor> column_grad(const Tensor& dy, const Tensor& xs, const Tensor& A, const Tensor& B,
                                       double scale) {
  const char* op = "column_grad";
  expect_matrix(op, "dy", dy, -1, -1);
  expect_matrix(op, "xs", xs, dy.size(0), -1);
  expect_delta(op, A, B, xs.size(1), dy.size(1));
  const Device device(op, {{"dy", dy}, {"xs", xs}, {"A", A}, {"B", B}});
  const int64_t tokens = dy.size(0), out = dy.size(1), s = xs.size(1), k = A.size(0);
  const Tensor y = dense_rows(dy), x = dense_rows(xs);
  const Tensor hidden = project(device, x, A, k, A.stride(0), A.stride(1));
  const int64_t blocks = block_count(out, k);
  const int64_t y_groups = ceil_div(tokens, group_size(tokens, out, k));
  const int64_t x_groups = ceil_div(tokens, group_size(tokens, s, k));
  const Tensor dot = floats(dy, blocks * tokens, k), d_hidden = floats(dy, tokens, k);
  const Tensor dB_parts = floats(dy, y_groups * k, out), dA_parts = floats(dy, x_groups * k, s);
  for_each_type(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Sweep<T> sweep = sweep_over<T>(y, k);
    sweep.m = data<float>(B);
    sweep.m_rank = B.stride(1);
    sweep.m_feature = B.stride(0);
    sweep.dot = mutable_data<float>(dot);
    sweep.w = data<float>(hidden);
    sweep.outer = mutable_data<float>(dB_parts);
    run_sweep(device, sweep);
  });
  run_sums(device, {data<float>(dot), blocks, tokens, k, 1, mutable_data<float>(d_hidden), false});
  for_each_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Sweep<T> sweep = sweep_over<T>(x, k);
    sweep.w = data<float>(d_hidden);
    sweep.outer = mutable_data<float>(dA_parts);
    run_sweep(device, sweep);
  });
  const Tensor dA = floats(A, k, s), dB = floats(B, out, k);
  const float factor = static_cast<float>(scale);
  const Parts of_A{data<float>(dA_parts), x_groups, k, s, factor, mutable_data<float>(dA), false};
  run_sums(device, {data<float>(dB_parts), y_groups, k, out, factor, mutable_data<float>(dB), true}, &of_A);
  return {dA, dB};
}

void column_linear_(Tensor y, const Tensor& xs, const Tensor& A, const Tensor& B, double scale) {
  const char* op = "column_linear_";
  expect_matrix(op, "y", y, -1, -1);
  expect_matrix(op, "xs", xs, y.size(0), -1);
  expect_delta(op, A, B, xs.size(1), y.size(1));
  expect_writable(op, "y", y);
  const Device device(op, {{"y", y}, {"xs", xs}, {"A", A}, {"B", B}});
  const int64_t tokens = y.size(0), out = y.size(1), k = A.size(0);
  const Tensor hidden = project(device, dense_rows(xs), A, k, A.stride(0), A.stride(1));
  for_each_type(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Add<T> add{mutable_data<T>(y), y.stride(0),    y.stride(1), tokens,      out,
                     k,                  data<float>(hidden), data<float>(B), B.stride(0), B.stride(1),
                     static_cast<float>(scale)};
    device.launch({ceil_div(tokens, 8), ceil_div(out, 256)}, add_low_rank<T>, add);
  });
}

void column_scatter_(Tensor dx, const Tensor& dy, const Tensor& cols, const Tensor& A, const Tensor& B, double scale) {
  const char* op = "column_scatter_";
  expect_matrix(op, "dx", dx, -1, -1);
  expect_matrix(op, "dy", dy, dx.size(0), -1);
  expect_delta(op, A, B, cols.numel(), dy.size(1));
  expect_writable(op, "dx", dx);
  const Device device(op, {{"dx", dx}, {"dy", dy}, {"cols", cols}, {"A", A}, {"B", B}});
  const int64_t tokens = dx.size(0), k = A.size(0);
  const Tensor index = torch::stable::contiguous(cols), a = torch::stable::contiguous(A);
  const int64_t* column = checked_columns(op, index);
  const Tensor d_hidden = project(device, dense_rows(dy), B, k, B.stride(1), B.stride(0));
  for_each_type(dx.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Update<T> update{mutable_data<T>(dx), dx.stride(0), dx.stride(1), tokens, dx.size(1), column, cols.size(0),
                           nullptr, 0, k, data<float>(d_hidden), k, 1, data<float>(a), static_cast<float>(scale)};
    device.launch({ceil_div(tokens, kWarp)}, update_columns<T>, update);
  });
}

void column_fold_(Tensor weight, const Tensor& base_columns, const Tensor& cols, const Tensor& A, const Tensor& B,
                  double scale) {
  const char* op = "column_fold_";
  expect_matrix(op, "weight", weight, -1, -1);
  expect_matrix(op, "base_columns", base_columns, weight.size(0), cols.numel());
  expect(base_columns.scalar_type() == weight.scalar_type(), op, ": base_columns must have the dtype of weight, ",
         torch::headeronly::toString(weight.scalar_type()), ", got ",
         torch::headeronly::toString(base_columns.scalar_type()));
  expect_delta(op, A, B, cols.numel(), weight.size(0));
  expect_writable(op, "weight", weight);
  const Device device(op, {{"weight", weight}, {"base_columns", base_columns}, {"cols", cols}, {"A", A}, {"B", B}});
  const int64_t out = weight.size(0), k = A.size(0);
  const Tensor index = torch::stable::contiguous(cols), base = dense_rows(base_columns);
  const Tensor a = torch::stable::contiguous(A);
  const int64_t* column = checked_columns(op, index);
  for_each_type(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Update<T> update{mutable_data<T>(weight), weight.stride(0), weight.stride(1), out, weight.size(1), column,
                           cols.size(0), data<T>(base), base.stride(0), k, data<float>(B), B.stride(0), B.stride(1),
                           data<float>(a), static_cast<float>(scale)};
    device.launch({ceil_div(out, kWarp)}, update_columns<T>, update);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CUDA, m) {
  m.impl("column_gather", TORCH_BOX(&column_gather));
  m.impl("column_grad", TORCH_BOX(&column_grad));
  m.impl("column_linear_", TORCH_BOX(&column_linear_));
  m.impl("column_scatter_", TORCH_BOX(&column_scatter_));
  m.impl("column_fold_", TORCH_BOX(&column_fold_));
}

}  // namespace rbfast
