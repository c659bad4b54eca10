// The main kernels for text and for a top-k teacher, between prepare_rows and finish_rows of support.cuh. Traffic: a
// held row reads 4 V bytes (a streamed one 8 V) and writes 2 V (bf16) or 4 V.
#pragma once

#include "cuda/support.cuh"

namespace rbfast {
namespace {

// The gradient of a vector of the tail. kTwo: its part at temperature 1 is not included in the other.
template <bool kHasHead, bool kTwo>
__device__ inline Vector tail_gradient(const Vector& z, const TailScale& tail, const Head& head) {
  Vector gradient;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    float g = tail.at_tau(z.value[j]);
    if (kTwo) g += tail.at_one(z.value[j]);
    gradient.value[j] = kHasHead ? head.backward(g, z.value[j]) : g;
  }
  return gradient;
}

// Stores the gradient f(z[i]) of each vector of a tile, and reads the next row's vector in its place. Each vector is
// compared with the end of its row, even one that lies inside: without that branch text took 2% longer, as the compiler
// computes many gradients before it stores one.
template <int kStep, int kVectors, typename F>
__device__ inline void replace_tile(Vector (&z)[kVectors], const Output& output, const Input& next, int first,
                                    const F& f) {
  const auto replace_whole = [&](auto is_bf16) {
    for_each_vector<kVectors, kStep>(first, [&](int v, int i) {
      if (v < output.end) output.store_inside<is_bf16.value>(f(z[i]), v);
      z[i] = read_whole(next, v);
    });
  };
  if (output.is_whole() && next.is_whole())
    return output.is_bf16 ? replace_whole(std::true_type{}) : replace_whole(std::false_type{});
  const auto replace_any = [&](int v, int i) {
    if (v < output.end) output.store_vector(f(z[i]), v);
    z[i] = read_vector(next, v);
  };
  if (!output.is_aligned || !next.is_aligned || !output.is_bf16)
    return for_each_vector<kVectors, kStep>(first, replace_any);
  const int end = output.end < next.end ? output.end : next.end;  // one of them may be absent
  for_each_vector<kVectors, kStep>(
      first, end,
      [&](int v, int i) {
        if (v < output.end) output.store_inside<true>(f(z[i]), v);
        z[i] = read_inside(next, v);
      },
      replace_any);
}

template <typename T>
using SparseExchange = Exchange<2, T::kAllWarps>;

// The sums of a row's tail, from each thread's.
template <typename T, typename SumsAbout, typename GetLargest>
__device__ inline Sums find_tail(const T& team, SparseExchange<T>& exchange, const RowInfo& info, bool needs_one,
                                 int buffer, const SumsAbout& sums_about, const GetLargest& largest) {
  const auto found = find_sums<2, 1>(
      team, exchange, {{info.pivot}}, needs_one ? 2 : 1, buffer,
      [&](const Array<1>& pivot) { return sums_about(pivot[0]); }, [&] { return Array<1>{{largest()}}; });
  return {found.pivot[0], found.sum[0], needs_one ? found.sum[1] : found.sum[0]};
}

// A team holds a whole row in its registers, and is persistent: it takes row after row. kGeneral: with a head, or with
// reverse KL or JS, which need more registers.
template <int kBlocks, int kThreads, int kVectors, int kResident, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kGeneral&& kResident > 2 ? 2 : kResident)
    sparse_rows(const Job job, const Series series, const Scratch scratch) {
  if constexpr (is_supported<kBlocks>()) {
    using T = Team<kBlocks, kThreads>;
    RBFAST_SHARED_MEMORY(memory);
    auto& exchange = *reinterpret_cast<SparseExchange<T>*>(memory);
    const T team;
    const Head head(job);
    const int V = static_cast<int>(job.vocabulary);
    team.sync();  // every block has started: its shared memory can be written
    Vector z[kVectors];
    read_tile<T::kStep>(z, Input::of(job, team.row(0)), team.first());
    for (int round = 0; team.row(round) < job.rows; ++round) {
      const int row = team.row(round), buffer = round % 2;
      const RowInfo& info = scratch.rows[row];
      const float scale = info.scale();
      const bool needs_one = info.inv_tau != 1;
      if (kGeneral) apply_head<T::kStep>(z, head, team.first(), V);
      const auto sums_about = [&](float pivot) {
        return Array<2>{{sum_tile(z, pivot, scale), needs_one ? sum_tile(z, pivot, kLog2e) : 0}};
      };
      // The barrier in here comes after every logit of the row is read: dz may overwrite them.
      const Sums sums =
          find_tail(team, exchange, info, needs_one, buffer, sums_about, [&] { return largest_of(z, kLeastLogit); });
      if (team.is_leader()) scratch.sums[row] = sums;
      const TailScale tail = tail_scale<kGeneral>(job, series, info, scratch.entries + row * job.k, sums, scale);
      const Input next = Input::of(job, team.row(round + 1));
      const Output output(job, row);
      if (tail.at_one.factor == 0)
        replace_tile<T::kStep>(z, output, next, team.first(),
                               [&](const Vector& of) { return tail_gradient<kGeneral, false>(of, tail, head); });
      else
        replace_tile<T::kStep>(z, output, next, team.first(),
                               [&](const Vector& of) { return tail_gradient<kGeneral, true>(of, tail, head); });
    }
  }
}

constexpr int kStreamThreads = 512, kStreamVectors = 4;

// Rows that no team can hold: the second pass reads them again. Teams are as large as possible, so that few rows are in
// flight and the second pass hits L2 where it can. dz may overwrite the logits. In fp32 each thread writes where it has
// just read. In bf16 (needs_sync) element v covers logit v / 2, so there is a barrier between reading a tile and
// writing its gradients, which cover columns of this tile and of those before it.
template <int kBlocks>
__global__ void __launch_bounds__(kStreamThreads, 1)
    sparse_streamed(const Job job, const Series series, const Scratch scratch, const bool needs_sync) {
  if constexpr (is_supported<kBlocks>()) {
    using T = Team<kBlocks, kStreamThreads>;
    constexpr int kTile = T::kStep * kStreamVectors;
    RBFAST_SHARED_MEMORY(memory);
    auto& exchange = *reinterpret_cast<SparseExchange<T>*>(memory);
    const T team;
    const Head head(job);
    const int V = static_cast<int>(job.vocabulary);
    const int64_t row = team.row(0);
    const Input input = Input::of(job, row);
    const RowInfo info = scratch.rows[row];
    const float scale = info.scale();
    const bool needs_one = info.inv_tau != 1, is_plain = head.is_plain();
    team.sync();  // every block has started: its shared memory can be written
    Vector z[kStreamVectors];
    const auto read = [&](int first) {
      read_tile<T::kStep>(z, input, first);
      if (!is_plain) apply_head<T::kStep>(z, head, first, V);
    };
    const auto sums_about = [&](float pivot) {
      Array<2> sums{};
      for (int first = team.first(); first < V; first += kTile) {
        read(first);
        sums[0] += sum_tile(z, pivot, scale);
        if (needs_one) sums[1] += sum_tile(z, pivot, kLog2e);
      }
      return sums;
    };
    const auto largest = [&] {
      float top = kLeastLogit;
      for (int first = team.first(); first < V; first += kTile) {
        read(first);
        top = largest_of(z, top);
      }
      return top;
    };
    const Sums sums = find_tail(team, exchange, info, needs_one, 0, sums_about, largest);
    if (team.is_leader()) scratch.sums[row] = sums;
    if (job.dz == nullptr) return;
    const TailScale tail = tail_scale<true>(job, series, info, scratch.entries + row * job.k, sums, scale);
    const Output output(job, row);
    for (int start = 0; start < V; start += kTile) {
      const int first = start + team.first();
      read_tile<T::kStep>(z, input, first);
      if (needs_sync) team.sync();
      if (!is_plain) apply_head<T::kStep>(z, head, first, V);
      output.store_tile<T::kStep>(z, first,
                                  [&](const Vector& of) { return tail_gradient<true, true>(of, tail, head); });
    }
  }
}

}  // namespace
}  // namespace rbfast
