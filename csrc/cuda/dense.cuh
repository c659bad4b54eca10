// A dense teacher: its logits beside the student's. The student's row is in the registers of a team, the teacher's in
// its shared memory; each thread copies and reads its own vectors there, so that it waits for no other.
#pragma once

#include <type_traits>

#include "cuda/divergence.cuh"
#include "cuda/row.cuh"

namespace rbfast {
namespace {

// What each warp gives: the student's and the teacher's sums over the ids that both have, and the student's others.
struct BothSums {
  Sums z, t;
};
struct AllSums : BothSums {
  Sums rest;
};

// The scalars of a row between its sums and its gradient. log2 q = (z - z_max) * scale - z_log, log2 p likewise;
// log p/q = (t - z) * inv_tau - apart. shared: ids that the teacher has too.
struct DenseScale {
  float inv_tau, scale, z_max, z_log, t_max, t_log, apart, coefficient, q_one;
  Powers q, p, one;  // the CE's part of the gradient is q_one * q + one(z)
  int shared;
};

__device__ inline DenseScale dense_scale(const RowInfo& info, const Sums& z, const Sums& t, const Sums& all,
                                         float share, int shared, bool is_q) {
  const float scale = info.scale();
  const bool is_empty = t.at_tau == 0;  // no teacher: the row is NaN
  return {info.inv_tau,
          scale,
          z.max,
          log2f(z.at_tau),
          t.max,
          is_empty ? NAN : log2f(t.at_tau),
          fmaf(t.max - z.max, scale, log2f(t.at_tau / z.at_tau)) * kLn2f,
          is_empty ? NAN : info.pull * share,
          is_q ? info.ce_weight : 0,
          {z.max, scale, 1 / z.at_tau},
          {t.max, scale, 1 / t.at_tau},
          {all.max, kLog2e, is_q ? 0 : info.ce_weight / all.at_one},
          shared};
}

// Of one id: its term of D, q, and the gradient of D in z as far as it does not need the whole row: for forward KL
// q - p, for the others q * score, from which q * (the mean of the scores) is still to be taken.
struct Part {
  float term, q, gradient;
};

template <Kind kKind>
__device__ inline Part part_of(float z, float t, const DenseScale& row, const Series& series) {
  float d = fmaxf(fmaf(t - z, row.inv_tau, -row.apart), kNone);
  if (kKind == Kind::js) {
    const JsTerm x =
        js_term(fmaf(z - row.z_max, row.scale, -row.z_log), fmaf(t - row.t_max, row.scale, -row.t_log), d, series);
    return {x.term, x.score.q, x.score.weighted};
  }
  const float q = row.q(z);
  float p = row.p(t);
  if (kKind == Kind::forward) {
    const KlTerm x = kl_term(p, q, d);
    return {x.term, q, x.change};
  }
  if (fmaf(t - row.t_max, row.scale, -row.t_log) < kFloor2) {
    d = (kFloor2 - fmaf(z - row.z_max, row.scale, -row.z_log)) * kLn2f;
    p = 0;
  }
  return {kl_term(q, p, -d).term, q, -q * d};
}

struct DenseTotals {
  float terms = 0, scores = 0;
};

// The parts of a tile: z becomes the gradient in logits but for the mean score's part, and `put_q` takes the factor of
// that part for each vector. kGeneral: with a head, or ids that the teacher does not have.
template <Kind kKind, bool kGeneral, int kStep, int kVectors, typename GetT, typename PutQ>
__device__ inline DenseTotals solve_tile(Vector (&z)[kVectors], int first, const DenseScale& row, const Series& series,
                                         const RowInfo& info, const Head& head, const GetT& get_t, const PutQ& put_q) {
  // Whether the powers at temperature 1 are branched around: the other kinds have no registers left for a vector of
  // them.
  constexpr bool kBranches = kKind == Kind::forward;
  const bool with_one = row.one.factor != 0;
  float terms[kVector] = {}, scores[kVector] = {};
  for_each_vector<kVectors, kStep>(first, [&](int v, int i) {
    keep_order();
    const Vector t = get_t(v, i);
    Vector q, one{};
    if (kBranches && with_one)
#pragma unroll
      for (int j = 0; j < kVector; ++j) one.value[j] = row.one(z[i].value[j]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float logit = z[i].value[j];
      Part x = part_of<kKind>(logit, t.value[j], row, series);
      if (kGeneral && v + j >= row.shared) x = {};
      terms[j] += x.term;
      if (kKind != Kind::forward) scores[j] += x.gradient;
      const float text = kBranches ? fmaf(x.q, row.q_one, one.value[j]) : x.q * row.q_one;
      float gradient = fmaf(x.gradient, row.coefficient, text);
      if (!kBranches && with_one) gradient += row.one(logit);
      z[i].value[j] = kGeneral ? head.finish(gradient, logit) : gradient;
      q.value[j] = kGeneral ? head.finish(x.q, logit) : x.q;
    }
    if (kKind != Kind::forward) put_q(q, i);
  });
  keep_order();  // what is said about the label is read here
  const float of_label = kGeneral ? head.finish(info.ce_weight, info.z_label) : info.ce_weight;
  const int label = info.label;
  for_each_vector<kVectors, kStep>(first, [&](int v, int i) {
    if (static_cast<unsigned>(label - v) < kVector)
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        if (v + j == label) z[i].value[j] -= of_label;
  });
  return {(terms[0] + terms[1]) + (terms[2] + terms[3]), (scores[0] + scores[1]) + (scores[2] + scores[3])};
}

// Takes the mean score's part from a vector.
__device__ inline void take_mean(Vector& gradient, const Vector& q, float mean) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) gradient.value[j] = fmaf(-mean, q.value[j], gradient.value[j]);
}

template <int kVectors>
__device__ inline void clear_holes(Vector (&z)[kVectors]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
#pragma unroll
    for (int j = 0; j < kVector; ++j) z[i].value[j] = max_nan(z[i].value[j], kNone);
}

// A thread's tile, with the columns outside [begin, end) at kNone.
template <int kStep, int kVectors>
__device__ inline void add_part(Sums& sums, const Vector (&z)[kVectors], int first, int begin, int end, float scale,
                                bool needs_one) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    Vector part[1] = {z[i]};
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const int v = first + i * kStep + j;
      if (v < begin || v >= end) part[0].value[j] = kNone;
    }
    add_tile(sums, part, scale, needs_one);
  }
}

template <typename Given, int kWarps>
struct DenseShared {
  Exchange<Given, kWarps> sums;
  Exchange<float, kWarps> scores;
};

// A row's scalars from what all warps gave; all threads call it.
template <typename Given, int kWarps>
__device__ inline DenseScale total_scale(const DenseShared<Given, kWarps>& shared, const RowInfo& info, int n, int V,
                                         int turn, const Series& series, Sums* all_sums) {
  const float scale = info.scale();
  const bool needs_one = info.inv_tau != 1 || n < V;
  const Sums z = shared.sums.total(scale, needs_one, turn, [](const Given& x) { return x.z; });
  const Sums t = shared.sums.total(scale, false, turn, [](const Given& x) { return x.t; });
  Sums all = z;
  if constexpr (std::is_same_v<Given, AllSums>) {
    const Sums both[2] = {z, shared.sums.total(scale, true, turn, [](const Given& x) { return x.rest; })};
    all.max = fmaxf(both[0].max, both[1].max);
    all.at_one =
        both[0].at_one * lowered(both[0].max, all.max, kLog2e) + both[1].at_one * lowered(both[1].max, all.max, kLog2e);
  }
  *all_sums = all;
  return dense_scale(info, z, t, all, series.rest_of_beta, n, !needs_one);
}

// The mean score, from the sum that each warp gave; all threads call it.
template <typename Given, int kWarps>
__device__ inline float total_score(const DenseShared<Given, kWarps>& shared, int turn) {
  float sum = 0;
  for (int i = threadIdx.x % kWarp; i < kWarps; i += kWarp) sum += shared.scores.given[turn][i];
  return warp_add(sum);
}

// Starts the copies of a thread's tile into shared memory; columns beyond the row become kNone.
template <int kVectors, int kStep, int kThreads>
__device__ inline void copy_tile(Vector* mine, const Input& row, int first) {
  if (row.is_whole) {
    for_each_vector<kVectors, kStep>(first, row.end, [&](int v, int i, auto is_inside) {
      if (is_inside || v < row.end)
        __pipeline_memcpy_async(&mine[i * kThreads], row.begin + v, sizeof(Vector));
      else
        mine[i * kThreads] = {{kNone, kNone, kNone, kNone}};
    });
  } else {
#pragma unroll 1
    for (int i = 0; i < kVectors; ++i, mine += kThreads, first += kStep) {
      const bool is_inside = row.is_aligned && first + kVector <= row.end;
      if (is_inside) __pipeline_memcpy_async(mine, row.begin + first, sizeof(Vector));
#pragma unroll 1
      for (int j = is_inside ? kVector : 0; j < kVector; ++j)
        if (first + j < row.end)
          __pipeline_memcpy_async(&mine->value[j], row.begin + first + j, sizeof(float));
        else
          mine->value[j] = kNone;
    }
  }
  __pipeline_commit();
}

// A thread's sums over its vectors in shared memory.
template <int kVectors, int kThreads>
__device__ inline Sums shared_sums(const Vector* mine, float scale) {
  Sums sums;
#pragma unroll 4
  for (int i = 0; i < kVectors; ++i)
    for (int j = 0; j < kVector; ++j) sums.max = fmaxf(sums.max, mine[i * kThreads].value[j]);
  const float base = sums.max > kNone ? sums.max : 0;
  float added[kVector] = {};
#pragma unroll 4
  for (int i = 0; i < kVectors; ++i)
    for (int j = 0; j < kVector; ++j) added[j] += exp2_fast((mine[i * kThreads].value[j] - base) * scale);
  sums.at_tau = (added[0] + added[1]) + (added[2] + added[3]);
  return sums;
}

// For rows without a head, of whose ids the teacher has all.
template <Kind kKind, int kBlocks, int kThreads, int kVectors, int kResident>
__global__ void __launch_bounds__(kThreads, kResident)
    dense_rows(const Job job, const Series series, const Scratch scratch) {
  if constexpr (is_possible<kBlocks>()) {
    using T = Team<kBlocks, kThreads>;
    using Shared = DenseShared<BothSums, T::kAllWarps>;
    RBFAST_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<Shared*>(memory);
    Vector* mine = reinterpret_cast<Vector*>(memory + sizeof(Shared)) + threadIdx.x;
    const T team;
    const Head head(job);
    const int V = static_cast<int>(job.vocabulary);
    team.meet();  // every member has begun
    for (int round = 0; team.row(round) < job.rows; ++round) {
      const int row = team.row(round), turn = round % 2;
      copy_tile<kVectors, T::kStep, kThreads>(mine, {job.teacher + row * job.teacher_stride, V}, team.first());
      Vector z[kVectors];
      read_tile<T::kStep>(z, Input::of(job, row), team.first());
      const RowInfo& info = scratch.rows[row];
      const float scale = info.scale();
      const bool needs_one = info.inv_tau != 1;
      clear_holes(z);
      Sums z_sums[1];
      add_tile(z_sums[0], z, scale, needs_one);
      __pipeline_wait_prior(0);
      const Sums t_sums[1] = {shared_sums<kVectors, kThreads>(mine, scale)};
      shared.sums.give(team, {warp_sums(z_sums, scale, needs_one), warp_sums(t_sums, scale, false)}, turn);
      team.meet();  // and every logit of the row is read: dz may lie over them
      Sums all;
      const DenseScale row_scale = total_scale(shared, info, V, V, turn, series, &all);
      if (team.is_leader()) scratch.sums[row] = all;
      const DenseTotals totals = solve_tile<kKind, false, T::kStep>(
          z, team.first(), row_scale, series, info, head, [&](int, int i) { return mine[i * kThreads]; },
          [&](const Vector& q, int i) { mine[i * kThreads] = q; });
      const float terms = warp_add(totals.terms);
      if (threadIdx.x % kWarp == 0) scratch.terms[row * T::kAllWarps + team.warp()] = terms;
      if (kKind != Kind::forward) {
        shared.scores.give(team, warp_add(totals.scores), turn);
        team.meet();
        const float mean = total_score(shared, turn) * row_scale.coefficient;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          keep_order();
          take_mean(z[i], mine[i * kThreads], mean);
        }
      }
      if (job.dz == nullptr) continue;
      Output(job, row).put_tile<kVectors, T::kStep>(team.first(), [&](int, int i) { return z[i]; });
    }
  }
}

constexpr int kDenseStreamVectors = 2;

// All other rows, as in sparse.cuh.
template <Kind kKind, int kBlocks, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    dense_streamed(const Job job, const Series series, const Scratch scratch, const bool in_step) {
  if constexpr (is_possible<kBlocks>()) {
    using T = Team<kBlocks, kThreads>;
    constexpr int kTile = T::kStep * kDenseStreamVectors;
    RBFAST_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<DenseShared<AllSums, T::kAllWarps>*>(memory);
    const T team;
    const Head head(job);
    const int V = static_cast<int>(job.vocabulary);
    const int n = static_cast<int>(job.teacher_vocabulary < V ? job.teacher_vocabulary : V);
    const int64_t row = team.row(0);
    const Input logits = Input::of(job, row), teacher(job.teacher + row * job.teacher_stride, n);
    const RowInfo info = scratch.rows[row];
    const float scale = info.scale();
    const bool needs_one = info.inv_tau != 1 || n < V;
    Vector z[kDenseStreamVectors], t[kDenseStreamVectors];
    const auto read = [&](int first) {
      read_tile<T::kStep>(z, logits, first);
      read_tile<T::kStep>(t, teacher, first);
    };
    const auto prepare = [&](int first) {
      if (!head.is_plain()) apply_head<T::kStep>(z, head, first, V);
      clear_holes(z);
      clear_holes(t);
    };
    const auto solve = [&](int first, const DenseScale& row_scale) {
      return solve_tile<kKind, true, T::kStep>(
          z, first, row_scale, series, info, head, [&](int, int i) { return t[i]; },
          [&](const Vector& q, int i) { t[i] = q; });
    };
    team.meet();  // every member has begun
    Sums z_sums[1], t_sums[1], rest[1];
    for (int first = team.first(); first < V; first += kTile) {
      read(first);
      prepare(first);
      add_part<T::kStep>(z_sums[0], z, first, 0, n, scale, needs_one);
      if (n < V) add_part<T::kStep>(rest[0], z, first, n, V, scale, true);
      add_tile(t_sums[0], t, scale, false);
    }
    AllSums given{{warp_sums(z_sums, scale, needs_one), warp_sums(t_sums, scale, false)}, {}};
    if (n < V) given.rest = warp_sums(rest, scale, true);
    shared.sums.give(team, given, 0);
    team.meet();
    Sums all;
    const DenseScale row_scale = total_scale(shared, info, n, V, 0, series, &all);
    if (team.is_leader()) scratch.sums[row] = all;
    const bool is_forward = kKind == Kind::forward;
    DenseTotals totals;
    float mean = 0;
    if (!is_forward || job.dz == nullptr) {
      for (int first = team.first(); first < n; first += kTile) {
        read(first);
        prepare(first);
        const DenseTotals more = solve(first, row_scale);
        totals.terms += more.terms, totals.scores += more.scores;
      }
    }
    if (!is_forward) {
      shared.scores.give(team, warp_add(totals.scores), 0);
      team.meet();
      mean = total_score(shared, 0) * row_scale.coefficient;
    }
    for (int start = 0; job.dz != nullptr && start < V; start += kTile) {
      const int first = start + team.first();
      read(first);
      if (in_step) team.meet();
      prepare(first);
      const DenseTotals more = solve(first, row_scale);
      if (is_forward) totals.terms += more.terms;
#pragma unroll
      for (int i = 0; !is_forward && i < kDenseStreamVectors; ++i) take_mean(z[i], t[i], mean);
      Output(job, row).put_tile<kDenseStreamVectors, T::kStep>(first, [&](int, int i) { return z[i]; });
    }
    const float terms = warp_add(totals.terms);
    if (threadIdx.x % kWarp == 0) scratch.terms[row * T::kAllWarps + team.warp()] = terms;
  }
}

// The losses of a row, by a warp. `warps` have left their terms of D.
__global__ void __launch_bounds__(kWarp)
    finish_dense(const Job job, const Scratch scratch, const int warps, const Losses losses) {
  const int64_t row = blockIdx.x;
  double sum = 0;
  for (int i = threadIdx.x; i < warps; i += kWarp) sum += scratch.terms[row * warps + i];
  sum = warp_sum(sum);
  if (threadIdx.x != 0) return;
  const Sums all = scratch.sums[row];
  const RowInfo info = scratch.rows[row];
  const double ce =
      log(static_cast<double>(all.at_one)) + (static_cast<double>(all.max) - info.z_label) * (kLog2e * kLn2);
  losses.put(job, info, row, sum < 0 ? 0 : sum, ce);
}

}  // namespace
}  // namespace rbfast
