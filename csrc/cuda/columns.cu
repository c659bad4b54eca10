// The adapter's ops on a GPU that move columns or add a low-rank product: column_gather, column_linear_,
// column_scatter_ and column_fold_. (The gradients are in column_grad.cu, H in column_project.cu.)
//
// Traffic: what is copied or changed is read and written once; the factors of the delta are read once per tile. If
// columns come in runs, a lane moves up to 16 bytes at a time. A fold keeps its rows of B and its columns of A in
// shared memory and goes down the rows. Every product is rounded before it is added, so k ranks take 2 k operations
// per value, which an H200 does in the time of a copy for k up to about 11.
//
// A GPU cannot report a column outside the matrix without synchronising: it is read as NaN and never written.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cuda/column_products.cuh"

namespace rbfast {
namespace {

constexpr int kLaneValues = 8;  // values of a row per lane, at most

// ---- gather ----

template <typename T>
struct Gather {
  const T* x;
  int64_t row, column, width, tokens;
  const int64_t* cols;
  int64_t s;
  T* xs;
};

// xs[t, j] = x[t, cols[j]], kVector columns at a time; a thread has kPieces of them in each of kRows rows.
template <typename T, int kVector>
struct GatherTile {
  static constexpr int kRows = 4, kPieces = kVector * sizeof(T) == 16 ? 1 : 4;
  static constexpr int kTall = kWarps * kRows, kWide = kWarp * kVector * kPieces;
};

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, 4) gather(const Gather<T> p) {
  using Tile = GatherTile<T, kVector>;
  using Vector = Bits<kVector * sizeof(T)>;
  const int64_t first = blockIdx.x * int64_t{Tile::kTall} + threadIdx.x / kWarp * Tile::kRows;
  const int64_t left = blockIdx.y * int64_t{Tile::kWide} + threadIdx.x % kWarp * kVector;
  Vector values[Tile::kRows][Tile::kPieces];
#pragma unroll
  for (int q = 0; q < Tile::kPieces; ++q) {
    const int64_t j = left + q * kWarp * kVector, c = j < p.s ? p.cols[j] : -1;
    const bool is_inside = c >= 0 && c + kVector <= p.width && c % kVector == 0;
#pragma unroll
    for (int a = 0; a < Tile::kRows; ++a) {
      memset(&values[a][q], 0xff, sizeof(Vector));  // NaN, in every dtype
      if (first + a < p.tokens && is_inside)
        values[a][q] = read_bits<sizeof(Vector)>(p.x + (first + a) * p.row + c * p.column);
    }
  }
#pragma unroll
  for (int q = 0; q < Tile::kPieces; ++q) {
    const int64_t j = left + q * kWarp * kVector;
#pragma unroll
    for (int a = 0; a < Tile::kRows; ++a)
      if (first + a < p.tokens && j < p.s) write_bits<sizeof(Vector)>(p.xs + (first + a) * p.s + j, values[a][q]);
  }
}

// ---- linear, scatter and fold ----

// target[r, cols[j]] = base[r, j] + sum_i (scale * w[r, i]) m[i, j]; without a base it adds to what is there. The sum
// starts at zero and runs in order of i, and every product is rounded before it is added: a fold has the same bits on
// every device. With k = 0 the base is copied bitwise. Without cols every column changes.
template <typename T>
struct Update {
  T* target;
  int64_t row, column, rows, width;
  const int64_t* cols;  // or null
  int64_t s;
  const T* base;  // [rows, s] with row stride ld, or null
  int64_t ld, k;
  const float* w;  // w[r * w_row + i * w_rank]
  int64_t w_row, w_rank;
  const float* m;  // m[i * m_rank + j * m_column]
  int64_t m_rank, m_column;
  float scale;
  int64_t tiles;  // of rows, per block
};

// A thread has kRows rows by kPieces pieces of kVector columns, and kAcross threads cover the width of a tile. These
// are neighbours in a warp, unless the target is column-major: then a warp goes down the rows.
template <int kVector, bool kColumnMajor>
struct UpdateTile {
  static constexpr int kRows = kVector == 8 && !kColumnMajor ? 4 : 2;  // as registers allow
  static constexpr int kPieces = kLaneValues / kVector;
  static constexpr int kAcross = kColumnMajor || kVector > 1 ? kWarps : kWarp, kGroups = kThreads / kAcross;
  static constexpr int kTall = kGroups * kRows, kWide = kAcross * kLaneValues;
  static constexpr int kRanks = 32;        // in shared memory at a time
  static constexpr int kStep = kTall + 4;  // from rank to rank of w, padded against bank conflicts
  static constexpr size_t kShared = kRanks * (kStep + kWide) * sizeof(float);

  static __device__ int across() { return kColumnMajor ? threadIdx.x / kWarp : threadIdx.x % kAcross; }
  static __device__ int row(int a) {
    return kColumnMajor ? threadIdx.x % kWarp + a * kGroups : static_cast<int>(threadIdx.x) / kAcross * kRows + a;
  }
  static __device__ int column(int piece) {
    return kColumnMajor ? across() * kLaneValues + piece * kVector : (piece * kAcross + across()) * kVector;
  }
  // Where the value of m for column v of the tile is in shared memory: threads side by side read 16 bytes each from
  // different banks.
  static __device__ int shared_index(int v) { return kVector == 8 ? v / 4 % 2 * (kWide / 2) + v / 8 * 4 + v % 4 : v; }
};

// Reads `ranks` ranks from `begin` on: of the tile's rows of w, scaled, and if with_m of its columns of m.
template <typename Tile, typename T>
__device__ void read_factors(const Update<T>& p, int64_t top, int64_t left, int64_t begin, int ranks, bool with_m,
                             float* w, float* m) {
  constexpr int kBatch = 4;  // loads that a thread has in flight
  int row = static_cast<int>(threadIdx.x) / ranks, rank = static_cast<int>(threadIdx.x) % ranks;
  const int rows = kThreads / ranks, rest = kThreads % ranks;
  while (row < Tile::kTall) {
    float values[kBatch];
    int to[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t r = top + row;
      to[i] = row < Tile::kTall ? rank * Tile::kStep + row : -1;
      values[i] = to[i] >= 0 && r < p.rows ? p.w[r * p.w_row + (begin + rank) * p.w_rank] : 0;
      row += rows;
      rank += rest;
      if (rank >= ranks) {
        rank -= ranks;
        ++row;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (to[i] >= 0) w[to[i]] = __fmul_rn(p.scale, values[i]);
  }
#pragma unroll 4
  for (int i = threadIdx.x; with_m && i < ranks * Tile::kWide; i += kThreads) {
    const int v = i % Tile::kWide, of = i / Tile::kWide;
    m[of * Tile::kWide + Tile::shared_index(v)] =
        left + v < p.s ? p.m[(begin + of) * p.m_rank + (left + v) * p.m_column] : 0;
  }
}

template <typename T, int kVector, bool kColumnMajor>
__global__ void __launch_bounds__(kThreads, 3) update_columns(const Update<T> p) {
  using Tile = UpdateTile<kVector, kColumnMajor>;
  using Vector = Bits<kVector * sizeof(T)>;
  constexpr int kRows = Tile::kRows, kPieces = Tile::kPieces;
  constexpr int kTogether = kColumnMajor ? 1 : kVector;  // values side by side in the target
  constexpr int kTargets = kLaneValues / kTogether;
  RBFAST_SHARED_MEMORY(memory);
  float* w = reinterpret_cast<float*>(memory);  // [kRanks, kStep], scaled
  float* m = w + Tile::kRanks * Tile::kStep;    // [kRanks, kWide]
  const int64_t left = blockIdx.y * int64_t{Tile::kWide};
  int column[kTargets];  // of the target; negative if nothing is written
#pragma unroll
  for (int q = 0; q < kTargets; ++q) {
    const int64_t j = left + Tile::column(q * kTogether / kVector) + q * kTogether % kVector;
    const int64_t c = j >= p.s ? -1 : p.cols == nullptr ? j : p.cols[j];
    column[q] = c >= 0 && c + kTogether <= p.width && c % kTogether == 0 ? static_cast<int>(c) : -1;
  }
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    const int64_t top = (blockIdx.x * p.tiles + tile) * Tile::kTall;
    if (top >= p.rows) break;
    Vector values[kRows][kPieces];
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      const int64_t r = top + Tile::row(a);
      if (p.base != nullptr) {
#pragma unroll
        for (int q = 0; q < kPieces; ++q) {
          const int64_t j = left + Tile::column(q);
          if (r < p.rows && j < p.s) values[a][q] = read_bits<sizeof(Vector)>(p.base + r * p.ld + j);
        }
      } else {
#pragma unroll
        for (int q = 0; q < kTargets; ++q)
          if (r < p.rows && column[q] >= 0) {
            const T* from = p.target + r * p.row + column[q] * p.column;
            if constexpr (kTogether == kVector)
              values[a][q] = read_bits<sizeof(Vector)>(from);
            else
              set_value<T, sizeof(Vector)>(values[a][q / kVector], q % kVector, *from);
          }
      }
    }
    float total[kRows][kLaneValues] = {};
    for (int64_t begin = 0; begin < p.k; begin += Tile::kRanks) {
      const int ranks = p.k - begin < Tile::kRanks ? static_cast<int>(p.k - begin) : Tile::kRanks;
      __syncthreads();
      read_factors<Tile>(p, top, left, begin, ranks, tile == 0 || p.k > Tile::kRanks, w, m);
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < ranks; ++i) {
        Pack<float, kRows> of_row;
        const float *from_w = w + i * Tile::kStep, *from_m = m + i * Tile::kWide;
        if constexpr (kColumnMajor) {
#pragma unroll
          for (int a = 0; a < kRows; ++a) of_row.value[a] = from_w[Tile::row(a)];
        } else {
          of_row = *reinterpret_cast<const Pack<float, kRows>*>(from_w + Tile::row(0));
        }
        constexpr int kRead = kVector < 4 ? kVector : 4;
        Pack<float, kRead> of_column[kLaneValues / kRead];
#pragma unroll
        for (int e = 0; e < kLaneValues; e += kRead)
          of_column[e / kRead] = *reinterpret_cast<const Pack<float, kRead>*>(
              from_m + Tile::shared_index(Tile::column(e / kVector) + e % kVector));
#pragma unroll
        for (int a = 0; a < kRows; ++a)
#pragma unroll
          for (int e = 0; e < kLaneValues; ++e)
            total[a][e] = __fadd_rn(total[a][e], __fmul_rn(of_row.value[a], of_column[e / kRead].value[e % kRead]));
      }
    }
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      const int64_t r = top + Tile::row(a);
      if (p.k > 0)
#pragma unroll
        for (int e = 0; e < kLaneValues; ++e) {
          T value = value_of<T, sizeof(Vector)>(values[a][e / kVector], e % kVector);
          store(&value, __fadd_rn(load(&value), total[a][e]));
          set_value<T, sizeof(Vector)>(values[a][e / kVector], e % kVector, value);
        }
#pragma unroll
      for (int q = 0; q < kTargets; ++q)
        if (r < p.rows && column[q] >= 0) {
          T* to = p.target + r * p.row + column[q] * p.column;
          if constexpr (kTogether == kVector)
            write_bits<sizeof(Vector)>(to, values[a][q]);
          else
            *to = value_of<T, sizeof(Vector)>(values[a][q / kVector], q % kVector);
        }
    }
  }
}

// ---- launching ----

// How many of a run's columns can move together: as many as are aligned in every row, up to 16 bytes.
template <typename T>
int vector_width(const void* p, int64_t row, int64_t column, int64_t run) {
  if (column != 1) return 1;
  int64_t vector = std::min<int64_t>(run, 16 / sizeof(T));
  while (vector > 1 && !(is_aligned(p, vector * sizeof(T)) && row % vector == 0)) vector /= 2;
  return static_cast<int>(vector);
}

template <typename T, int kVector, bool kColumnMajor>
void launch_update(const Device& device, Update<T> p) {
  using Tile = UpdateTile<kVector, kColumnMajor>;
  const int64_t across = ceil_div(p.s, Tile::kWide), down = ceil_div(p.rows, Tile::kTall);
  const int64_t busy = 8 * device.attribute(cudaDevAttrMultiProcessorCount);  // enough blocks to share the work evenly
  p.tiles = std::max<int64_t>(1, std::min<int64_t>(8, across * down / busy));
  device.launch({ceil_div(down, p.tiles), across, kThreads, 1, Tile::kShared}, update_columns<T, kVector, kColumnMajor>,
                p);
}

template <typename T>
void run_update(const Device& device, const Update<T>& p, int64_t run) {
  constexpr int kVector = 16 / sizeof(T);
  expect(p.width <= INT32_MAX, "CUDA: a matrix must have fewer than 2^31 columns, got ", p.width);
  const bool is_column_major = p.row == 1 && p.column != 1;
  const bool has_vectors =
      (is_column_major || vector_width<T>(p.target, p.row, p.column, run) == kVector) &&
      (p.base == nullptr || vector_width<T>(p.base, p.ld, 1, p.s % kVector == 0 ? kVector : 1) == kVector);
  if (is_column_major && has_vectors)
    launch_update<T, kVector, true>(device, p);
  else if (is_column_major)
    launch_update<T, 1, true>(device, p);
  else if (has_vectors)
    launch_update<T, kVector, false>(device, p);
  else
    launch_update<T, 1, false>(device, p);
}

// ---- ops ----

const int64_t* checked_columns(const char* op, const Tensor& cols, int64_t run) {
  expect(cols.dim() == 1 && cols.scalar_type() == ScalarType::Long, op, ": cols must be int64 with 1 dimension, got ",
         torch::headeronly::toString(cols.scalar_type()), " with ", cols.dim());
  expect_run(op, cols.size(0), run);
  return data<int64_t>(cols);
}

// target += scale * w m, with w [rows, k]; the caller sets the columns, m and a base.
template <typename T>
Update<T> add_to(const Tensor& target, const Tensor& w, float scale) {
  Update<T> update{};
  update.target = mutable_data<T>(target), update.row = target.stride(0), update.column = target.stride(1);
  update.rows = target.size(0), update.width = target.size(1);
  update.w = data<float>(w), update.w_row = w.stride(0), update.w_rank = w.stride(1), update.k = w.size(1);
  update.scale = scale;
  return update;
}

template <typename T, int kVector>
void launch_gather(const Device& device, const Gather<T>& p) {
  using Tile = GatherTile<T, kVector>;
  device.launch({ceil_div(p.tokens, Tile::kTall), ceil_div(p.s, Tile::kWide), kThreads}, gather<T, kVector>, p);
}

Tensor column_gather(const Tensor& x, const Tensor& cols, int64_t run) {
  const char* op = "column_gather";
  expect_matrix(op, "x", x, -1, -1);
  const Device device(op, {{"x", x}, {"cols", cols}});
  const Tensor index = as_contiguous(cols);
  const int64_t* column = checked_columns(op, index, run);
  const int64_t tokens = x.size(0), s = cols.size(0);
  const Tensor xs = empty(x, {tokens, s});
  for_each_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Gather<T> p{data<T>(x), x.stride(0), x.stride(1), x.size(1), tokens, column, s, mutable_data<T>(xs)};
    const int vector = vector_width<T>(p.x, p.row, p.column, run);
    if (vector * sizeof(T) == 16)
      launch_gather<T, 16 / sizeof(T)>(device, p);
    else if (vector >= 2)
      launch_gather<T, 2>(device, p);
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
  const int64_t out = y.size(1), k = A.size(0);
  const Tensor hidden = project_all(device, xs, A, k, A.stride(0), A.stride(1));
  int64_t run = 16;
  while (out % run != 0) run /= 2;
  for_each_type(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Update<T> update = add_to<T>(y, hidden, static_cast<float>(scale));
    update.s = out;
    update.m = data<float>(B), update.m_rank = B.stride(1), update.m_column = B.stride(0);
    run_update(device, update, run);
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
  const int64_t k = A.size(0);
  const Tensor index = as_contiguous(cols);
  const int64_t* column = checked_columns(op, index, run);
  const Tensor d_hidden = project_all(device, dy, B, k, B.stride(1), B.stride(0));
  for_each_type(dx.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Update<T> update = add_to<T>(dx, d_hidden, static_cast<float>(scale));
    update.cols = column, update.s = cols.size(0);
    update.m = data<float>(A), update.m_rank = A.stride(0), update.m_column = A.stride(1);
    run_update(device, update, run);
  });
}

void fold(const char* op, const Tensor& weight, const Tensor& base_columns, const Tensor& cols, const Tensor& A,
          const Tensor& B, double scale, int64_t run) {
  expect_matrix(op, "weight", weight, -1, -1);
  expect_matrix(op, "base_columns", base_columns, weight.size(0), cols.numel());
  expect(base_columns.scalar_type() == weight.scalar_type(), op, ": base_columns must have the dtype of weight, ",
         torch::headeronly::toString(weight.scalar_type()), ", got ",
         torch::headeronly::toString(base_columns.scalar_type()));
  expect_delta(op, A, B, cols.numel(), weight.size(0));
  expect_writable(op, "weight", weight);
  const Device device(op, {{"weight", weight}, {"base_columns", base_columns}, {"cols", cols}, {"A", A}, {"B", B}});
  const Tensor index = as_contiguous(cols), base = as_dense_rows(base_columns);
  const int64_t* column = checked_columns(op, index, run);
  for_each_type(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Update<T> update = add_to<T>(weight, B, static_cast<float>(scale));
    update.cols = column, update.s = cols.size(0);
    update.base = data<T>(base), update.ld = base.stride(0);
    update.m = data<float>(A), update.m_rank = A.stride(0), update.m_column = A.stride(1);
    run_update(device, update, run);
  });
}

void column_fold_(Tensor weight, const Tensor& base_columns, const Tensor& cols, const Tensor& A, const Tensor& B,
                  double scale, int64_t run) {
  fold("column_fold_", weight, base_columns, cols, A, B, scale, run);
}

void column_fold_all_(std::vector<Tensor> weights, std::vector<Tensor> base_columns, std::vector<Tensor> cols,
                      std::vector<Tensor> A, std::vector<Tensor> B, double scale, std::vector<int64_t> runs) {
  const char* op = "column_fold_all_";
  expect_lists(op, weights.size(), {base_columns.size(), cols.size(), A.size(), B.size(), runs.size()});
  for (size_t i = 0; i < weights.size(); ++i)
    fold(op, weights[i], base_columns[i], cols[i], A[i], B[i], scale, runs[i]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rbfast, CUDA, m) {
  m.impl("column_gather", TORCH_BOX(&column_gather));
  m.impl("column_linear_", TORCH_BOX(&column_linear_));
  m.impl("column_scatter_", TORCH_BOX(&column_scatter_));
  m.impl("column_fold_", TORCH_BOX(&column_fold_));
  m.impl("column_fold_all_", TORCH_BOX(&column_fold_all_));
}

}  // namespace rbfast
