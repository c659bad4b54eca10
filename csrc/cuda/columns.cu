// The adapter's ops on a GPU that move columns or add a low rank: column_gather, column_linear_, column_scatter_ and
// column_fold_. (column_grad.cu has the gradients, and H.)
//
// Traffic: what is copied or changed is read and written once; the factors of the delta are read once for every tile.
// Where columns come in runs, a lane moves up to 16 bytes at a time. A fold keeps its rows of B and its columns of A in
// shared memory and goes down the rows: per value and rank one multiplication and one addition, because every product is
// rounded before it is added. For k ranks that is 2 k operations a value, which an H200 does in the time of a copy for k
// up to about 11.
//
// A column outside the matrix, which a GPU cannot report without waiting, is read as NaN and never written.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cuda/column_products.cuh"

namespace rbfast {
namespace {

constexpr int kLane = 8;  // values of a row that a lane has, at most

// Calls f(std::integral_constant<int, n>) for n = vector, a power of 2 up to kLane.
template <typename F>
__device__ inline void for_vector(int vector, const F& f) {
  if (vector == 8)
    f(std::integral_constant<int, 8>{});
  else if (vector == 4)
    f(std::integral_constant<int, 4>{});
  else if (vector == 2)
    f(std::integral_constant<int, 2>{});
  else
    f(std::integral_constant<int, 1>{});
}

template <int n, typename T>
__device__ inline Pack<T, n>* as_vector(T* p) {
  return reinterpret_cast<Pack<T, n>*>(p);
}
template <int n, typename T>
__device__ inline const Pack<T, n>* as_vector(const T* p) {
  return reinterpret_cast<const Pack<T, n>*>(p);
}

// ---- gather ----

template <typename T>
struct Gather {
  const T* x;
  int64_t row, column, width, tokens;
  const int64_t* cols;
  int64_t s;
  T* xs;
};

// xs[t, j] = x[t, cols[j]], a vector of kVector columns at a time.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) gather(const Gather<T> p) {
  constexpr int kRows = 4;  // that share each index
  using Vector = Pack<T, kVector>;
  const int64_t first = (blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp) * kRows;
  for (int64_t j = threadIdx.x % kWarp * kVector; j < p.s; j += kWarp * kVector) {
    const int64_t c = p.cols[j];
    const bool is_inside = c >= 0 && c + kVector <= p.width && c % kVector == 0;
    Vector values[kRows];
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      if (first + a < p.tokens && is_inside)
        values[a] = *reinterpret_cast<const Vector*>(p.x + (first + a) * p.row + c * p.column);
      else
#pragma unroll
        for (int e = 0; e < kVector; ++e) store(values[a].value + e, NAN);
    }
#pragma unroll
    for (int a = 0; a < kRows; ++a)
      if (first + a < p.tokens) *reinterpret_cast<Vector*>(p.xs + (first + a) * p.s + j) = values[a];
  }
}

// ---- linear ----

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
  constexpr int kShared = 8;  // tokens that share each value of B
  const int64_t v = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x, first = blockIdx.x * int64_t{kShared};
  if (v >= p.n) return;
  float total[kShared] = {};
  for (int64_t i = 0; i < p.k; ++i) {
    const float b = p.B[v * p.b_row + i * p.b_rank];
#pragma unroll
    for (int a = 0; a < kShared; ++a)
      if (first + a < p.tokens) total[a] = fmaf(p.h[(first + a) * p.k + i], b, total[a]);
  }
#pragma unroll
  for (int a = 0; a < kShared; ++a) {
    if (first + a >= p.tokens) break;
    T* y = p.y + (first + a) * p.row + v * p.column;
    store(y, load(y) + p.scale * total[a]);
  }
}

// ---- scatter and fold ----

// target[r, cols[j]] = base[r, j] + sum_i (scale * w[r, i]) m[i, j]; without a base it adds to what is there. The sum
// runs in order of i from zero and every product is rounded before it is added: a fold has the same bits everywhere.
// With k = 0 the base is copied bit by bit.
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
  const float* m;  // m[i * m_rank + j * m_column]
  int64_t m_rank, m_column;
  float scale;
  int vector, base_vector;  // values that move together in the target and in the base
  int64_t tiles;            // of rows, for one block
};

// A tile is kWarps * kRows rows by 32 * kLane columns, lanes along the columns; or, where the rows are what lies together
// in memory, 32 * kRows rows by kWarps * kLane columns, lanes along the rows.
template <typename T, bool kDown>
struct UpdateTile {
  static constexpr int kRows = kDown ? 2 : 4, kRanks = 16;  // rows of a thread; ranks in shared memory at a time
  static constexpr int kTall = (kDown ? kWarp : kWarps) * kRows, kWide = (kDown ? kWarps : kWarp) * kLane;
  static constexpr size_t kShared = kRanks * (kTall + kWide) * sizeof(float);
};

template <typename T, bool kDown>
__global__ void __launch_bounds__(kThreads, 2) update_columns(const Update<T> p) {
  using Tile = UpdateTile<T, kDown>;
  constexpr int kRows = Tile::kRows, kRanks = Tile::kRanks, kTall = Tile::kTall, kWide = Tile::kWide;
  constexpr int kApart = kDown ? kWarp : 1;  // from one row of a thread to the next
  RBFAST_SHARED_MEMORY(memory);
  float* w = reinterpret_cast<float*>(memory);  // [kRanks, kTall], scaled
  float* m = w + kRanks * kTall;                // [kRanks, kWide]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int of_row = kDown ? lane : warp * kRows, of_column = (kDown ? warp : lane) * kLane;
  const int64_t j = blockIdx.y * int64_t{kWide} + of_column;
  int column[kLane];  // of the target; negative where nothing is written
#pragma unroll
  for (int e = 0; e < kLane; ++e) {
    const int64_t c = j + e < p.s ? p.cols[j + e] : -1;
    const bool is_inside = c >= 0 && c < p.width && c % p.vector == e % p.vector;
    column[e] = is_inside ? static_cast<int>(c) : -1;
  }
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    const int64_t top = (blockIdx.x * p.tiles + tile) * kTall;
    if (top >= p.rows) break;
    Pack<T, kLane> values[kRows];
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      const int64_t r = top + of_row + a * kApart;
      if (r >= p.rows) break;
      const T* target = p.target + r * p.row;
      for_vector(p.base == nullptr ? p.vector : p.base_vector, [&](auto vector) {
        constexpr int kVector = decltype(vector)::value;
#pragma unroll
        for (int e = 0; e < kLane; e += kVector) {
          if (column[e] < 0) continue;
          const T* from = p.base == nullptr ? target + column[e] * p.column : p.base + r * p.ld + j + e;
          memcpy(values[a].value + e, as_vector<kVector>(from), sizeof(T) * kVector);
        }
      });
    }
    float total[kRows][kLane] = {};
    for (int64_t begin = 0; begin < p.k; begin += kRanks) {
      const int ranks = p.k - begin < kRanks ? static_cast<int>(p.k - begin) : kRanks;
      __syncthreads();
      for (int i = threadIdx.x; i < ranks * kTall; i += kThreads) {
        const int64_t r = top + i / ranks;
        const float value = r < p.rows ? p.w[r * p.w_row + (begin + i % ranks) * p.w_rank] : 0;
        w[i % ranks * kTall + i / ranks] = __fmul_rn(p.scale, value);
      }
      if (tile == 0 || p.k > kRanks)
        for (int i = threadIdx.x; i < ranks * kWide; i += kThreads) {
          const int64_t at = blockIdx.y * int64_t{kWide} + i % kWide;
          m[i] = at < p.s ? p.m[(begin + i / kWide) * p.m_rank + at * p.m_column] : 0;
        }
      __syncthreads();
      for (int i = 0; i < ranks; ++i) {
        float left[kRows], right[kLane];
#pragma unroll
        for (int a = 0; a < kRows; ++a) left[a] = w[i * kTall + of_row + a * kApart];
#pragma unroll
        for (int e = 0; e < kLane; e += 4) memcpy(right + e, &m[i * kWide + of_column + e], 16);
#pragma unroll
        for (int a = 0; a < kRows; ++a)
#pragma unroll
          for (int e = 0; e < kLane; ++e) total[a][e] = __fadd_rn(total[a][e], __fmul_rn(left[a], right[e]));
      }
    }
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      const int64_t r = top + of_row + a * kApart;
      if (r >= p.rows) break;
      if (p.k > 0)
#pragma unroll
        for (int e = 0; e < kLane; ++e)
          store(values[a].value + e, __fadd_rn(load(values[a].value + e), total[a][e]));
      T* target = p.target + r * p.row;
      for_vector(p.vector, [&](auto vector) {
        constexpr int kVector = decltype(vector)::value;
#pragma unroll
        for (int e = 0; e < kLane; e += kVector)
          if (column[e] >= 0) memcpy(as_vector<kVector>(target + column[e] * p.column), values[a].value + e, sizeof(T) * kVector);
      });
    }
  }
}

// ---- launching ----

// How many of a run's columns can move together: as many as are aligned in every row, of 16 bytes at most.
template <typename T>
int vector_of(const void* p, int64_t row, int64_t column, int64_t run) {
  if (column != 1) return 1;
  int64_t vector = std::min<int64_t>(run, 16 / sizeof(T));
  while (vector > 1 && !(is_aligned(p, vector * sizeof(T)) && row % vector == 0)) vector /= 2;
  return static_cast<int>(vector);
}

template <typename T, bool kDown>
void launch_update(const Device& device, Update<T> p) {
  using Tile = UpdateTile<T, kDown>;
  const int64_t across = ceil_div(p.s, Tile::kWide), down = ceil_div(p.rows, Tile::kTall);
  const int64_t busy = 4 * device.attribute(cudaDevAttrMultiProcessorCount);  // so many blocks share the work evenly
  p.tiles = std::max<int64_t>(1, std::min<int64_t>(8, across * down / busy));
  device.launch({ceil_div(down, p.tiles), across, kThreads, 1, Tile::kShared}, update_columns<T, kDown>, p);
}

template <typename T>
void run_update(const Device& device, Update<T> p, int64_t run) {
  expect(p.width <= INT32_MAX, "CUDA: a matrix must have fewer than 2^31 columns, got ", p.width);
  p.vector = vector_of<T>(p.target, p.row, p.column, run);
  p.base_vector = p.base == nullptr ? 1 : vector_of<T>(p.base, p.ld, 1, p.s % kLane == 0 ? kLane : 1);
  if (p.row == 1 && p.column != 1)
    launch_update<T, true>(device, p);
  else
    launch_update<T, false>(device, p);
}

// ---- ops ----

const int64_t* checked_columns(const char* op, const Tensor& cols, int64_t run) {
  expect(cols.dim() == 1 && cols.scalar_type() == ScalarType::Long, op, ": cols must be int64 with 1 dimension, got ",
         torch::headeronly::toString(cols.scalar_type()), " with ", cols.dim());
  expect_run(op, cols.size(0), run);
  return data<int64_t>(cols);
}

template <typename T, int kVector>
void launch_gather(const Device& device, const Gather<T>& p) {
  device.launch({ceil_div(p.tokens, kWarps * 4), p.s > 0, kThreads}, gather<T, kVector>, p);
}

Tensor column_gather(const Tensor& x, const Tensor& cols, int64_t run) {
  const char* op = "column_gather";
  expect_matrix(op, "x", x, -1, -1);
  const Device device(op, {{"x", x}, {"cols", cols}});
  const Tensor index = torch::stable::contiguous(cols);
  const int64_t* column = checked_columns(op, index, run);
  const int64_t tokens = x.size(0), s = cols.size(0);
  const Tensor xs = torch::stable::new_empty(x, {tokens, s});
  for_each_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Gather<T> p{data<T>(x), x.stride(0), x.stride(1), x.size(1), tokens, column, s, mutable_data<T>(xs)};
    const int vector = vector_of<T>(p.x, p.row, p.column, run);
    if (vector * sizeof(T) == 16)
      launch_gather<T, 16 / sizeof(T)>(device, p);
    else if (vector * sizeof(T) == 8)
      launch_gather<T, 8 / sizeof(T)>(device, p);
    else
      launch_gather<T, 1>(device, p);
  });
  return xs;
}

void column_linear_(Tensor y, const Tensor& xs, const Tensor& A, const Tensor& B, double scale) {
  const char* op = "column_linear_";
  expect_matrix(op, "y", y, -1, -1);
  expect_matrix(op, "xs", xs, y.size(0), -1);
  expect_delta(op, A, B, xs.size(1), y.size(1));
  expect_writable(op, "y", y);
  const Device device(op, {{"y", y}, {"xs", xs}, {"A", A}, {"B", B}});
  const int64_t tokens = y.size(0), out = y.size(1), k = A.size(0);
  const Tensor hidden = project_all(device, xs, A, k, A.stride(0), A.stride(1));
  for_each_type(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Add<T> add{mutable_data<T>(y), y.stride(0),    y.stride(1), tokens,      out,
                     k,                  data<float>(hidden), data<float>(B), B.stride(0), B.stride(1),
                     static_cast<float>(scale)};
    device.launch({ceil_div(tokens, 8), ceil_div(out, 256)}, add_low_rank<T>, add);
  });
}

void column_scatter_(Tensor dx, const Tensor& dy, const Tensor& cols, const Tensor& A, const Tensor& B, double scale,
                     int64_t run) {
  const char* op = "column_scatter_";
  expect_matrix(op, "dx", dx, -1, -1);
  expect_matrix(op, "dy", dy, dx.size(0), -1);
  expect_delta(op, A, B, cols.numel(), dy.size(1));
  expect_writable(op, "dx", dx);
  const Device device(op, {{"dx", dx}, {"dy", dy}, {"cols", cols}, {"A", A}, {"B", B}});
  const int64_t tokens = dx.size(0), k = A.size(0);
  const Tensor index = torch::stable::contiguous(cols);
  const int64_t* column = checked_columns(op, index, run);
  const Tensor d_hidden = project_all(device, dy, B, k, B.stride(1), B.stride(0));
  for_each_type(dx.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Update<T> update{mutable_data<T>(dx), dx.stride(0), dx.stride(1), tokens, dx.size(1), column, cols.size(0),
                           nullptr, 0, k, data<float>(d_hidden), k, 1, data<float>(A), A.stride(0), A.stride(1),
                           static_cast<float>(scale), 1, 1, 1};
    run_update(device, update, run);
  });
}

void column_fold_(Tensor weight, const Tensor& base_columns, const Tensor& cols, const Tensor& A, const Tensor& B,
                  double scale, int64_t run) {
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
  const int64_t* column = checked_columns(op, index, run);
  for_each_type(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Update<T> update{mutable_data<T>(weight), weight.stride(0), weight.stride(1), out, weight.size(1), column,
                           cols.size(0), data<T>(base), base.stride(0), k, data<float>(B), B.stride(0), B.stride(1),
                           data<float>(A), A.stride(0), A.stride(1), static_cast<float>(scale), 1, 1, 1};
    run_update(device, update, run);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CUDA, m) {
  m.impl("column_gather", TORCH_BOX(&column_gather));
  m.impl("column_linear_", TORCH_BOX(&column_linear_));
  m.impl("column_scatter_", TORCH_BOX(&column_scatter_));
  m.impl("column_fold_", TORCH_BOX(&column_fold_));
}

}  // namespace rbfast
