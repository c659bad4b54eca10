// The main kernels for a dense teacher, whose logits come with the student's. The student's row is in a team's
// registers, the teacher's in its shared memory, so memory is read once: 8 V bytes of a row, and 2 V (bf16) or 4 V
// written. Each thread copies and reads its own vectors in shared memory, so it waits for no other.
#pragma once

#include "cuda/divergence.cuh"
#include "cuda/row.cuh"

namespace rbfast {
namespace {

// The scalars of a row between its sums and its gradient. d = (t - z) * scale - shift is log(p/q), for JS its e. For JS
// q and p include their weights, and coefficient is for scores in base 2. The CE's part of the gradient is q_one * q +
// one(z).
struct DenseScale {
  float scale, shift, coefficient, q_one;
  float least_t;  // reverse KL: the t at which p reaches its floor
  Powers q, p, one;
  int shared;  // number of ids that the teacher has too
};

// z and t: sums over the ids that both have, and their pivots. all: over all of the student's ids at temperature 1.
struct DenseSums {
  Sums z, t, all;
};

// one_is_q: the student's distribution at temperature 1 is q.
template <Kind kKind>
__device__ inline DenseScale dense_scale(const RowInfo& info, const Series& series, const DenseSums& sums, int shared,
                                         bool one_is_q) {
  constexpr bool kIsJs = kKind == Kind::js;
  const float scale = info.scale(), z = sums.z.at_tau, t = sums.t.at_tau, weight = series.rest_of_beta;
  const float shift = fmaf(sums.t.pivot - sums.z.pivot, scale, log2f(t / z));  // in base 2
  const bool is_known = t > 0 && t < INFINITY;                                 // if not, the row is NaN
  return {kIsJs ? scale * series.sign : info.inv_tau,
          shift * (kIsJs ? series.sign : kLn2f),
          is_known ? info.kl_scale * (kIsJs ? kLn2f : 1) : NAN,
          one_is_q ? info.ce_weight / weight : 0,
          kKind == Kind::reverse ? sums.t.pivot + (kFloor2 + log2f(t)) / scale : 0,
          {sums.z.pivot, scale, weight / z},
          {sums.t.pivot, scale, (kIsJs ? series.beta : 1) / t},
          {sums.all.pivot, kLog2e, one_is_q ? 0 : info.ce_weight / sums.all.at_one},
          shared};
}

// One id's term of D, its q as in DenseScale, and the part of D's gradient in z that does not need the whole row: q - p
// for forward KL; q * score for the others, from which q * (the mean score) is subtracted later.
struct Part {
  float term, q, gradient;
};

template <Kind kKind>
__device__ inline Part part_of(float z, float t, const DenseScale& row, const Series& series) {
  if (kKind == Kind::reverse) t = fmaxf(t, row.least_t);
  const float d = fmaxf(fmaf(t - z, row.scale, -row.shift), kLeastLogit), q = row.q(z), p = row.p(t);
  if (kKind == Kind::js) {
    const JsTerm x = js_term(q, p, d, series);
    return {x.term, q, q * x.score};
  }
  if (kKind == Kind::reverse) return {kl_term(q, p, -d).term, q, -q * d};
  const KlTerm x = kl_term(p, q, d);
  return {x.term, q, x.change};
}

struct DenseTotals {
  float terms = 0, scores = 0;
};

// Turns the logits z of a tile into their gradient except for the mean score's part, of which `put_q` receives the
// factor for each vector. Returns the sums of D's terms and of the scores. kGeneral: with a head, or ids that the
// teacher does not have.
template <Kind kKind, bool kGeneral, int kStep, int kVectors, typename GetT, typename PutQ>
__device__ inline DenseTotals gradient_tile(Vector (&z)[kVectors], int first, const DenseScale& row,
                                            const Series& series, const RowInfo& info, const Head& head,
                                            const GetT& get_t, const PutQ& put_q) {
  // Whether to branch around the powers at temperature 1: only forward KL has registers left for a vector of them.
  constexpr bool kBranches = kKind == Kind::forward;
  const bool with_one = row.one.factor != 0;
  float terms[2] = {}, scores[2] = {};
  for_each_vector<kVectors, kStep>(first, [&](int v, int i) {
    compiler_barrier();
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
      terms[j % 2] += x.term;
      if (kKind != Kind::forward) scores[j % 2] += x.gradient;
      const float text = kBranches ? fmaf(x.q, row.q_one, one.value[j]) : x.q * row.q_one;
      float gradient = fmaf(x.gradient, row.coefficient, text);
      if (!kBranches && with_one) gradient += row.one(logit);
      z[i].value[j] = kGeneral ? head.backward(gradient, logit) : gradient;
      q.value[j] = kGeneral ? head.backward(x.q, logit) : x.q;
    }
    if (kKind != Kind::forward) put_q(q, i);
  });
  compiler_barrier();  // the label's data are read only now
  const float of_label = kGeneral ? head.backward(info.ce_weight, info.z_label) : info.ce_weight;
  const int label = info.label;
  if (static_cast<unsigned>(label - first) % kStep < kVector)  // one thread of the team has it
    for_each_vector<kVectors, kStep>(first, [&](int v, int i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        if (v + j == label) z[i].value[j] -= of_label;
    });
  return {(terms[0] + terms[1]) * (kKind == Kind::js ? kLn2f : 1), scores[0] + scores[1]};
}

// Subtracts the mean score's part from a vector of the gradient.
__device__ inline void subtract_mean(Vector& gradient, const Vector& q, float mean) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) gradient.value[j] = fmaf(-mean, q.value[j], gradient.value[j]);
}

// Raises -inf, of masked ids and of columns beyond the row, to kLeastLogit. NaN stays NaN.
template <int kVectors>
__device__ inline void clamp_logits(Vector (&z)[kVectors]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
#pragma unroll
    for (int j = 0; j < kVector; ++j) z[i].value[j] = max_nan(z[i].value[j], kLeastLogit);
}

template <typename T>
struct DenseExchange {
  Exchange<3, T::kAllWarps> sums;
  Exchange<1, T::kAllWarps> scores;

  // The sums of a row, from each thread's: of z, of t, and of all the student's ids at temperature 1, which are z's
  // unless needs_one.
  template <typename SumsAbout, typename GetLargest>
  __device__ DenseSums find(const T& team, const RowInfo& info, bool needs_one, int buffer, const SumsAbout& sums_about,
                            const GetLargest& largest) {
    const auto found = find_sums<3, 3>(team, sums, {{info.pivot, info.teacher_pivot, info.pivot}}, needs_one ? 3 : 2,
                                       buffer, sums_about, largest);
    const Sums z{found.pivot[0], found.sum[0]}, t{found.pivot[1], found.sum[1]};
    if (needs_one) return {z, t, {found.pivot[2], 0, found.sum[2]}};
    return {z, t, {z.pivot, 0, z.at_tau}};
  }
};

// Starts the copies of a thread's tile into shared memory; columns beyond the row become kLeastLogit.
template <int kVectors, int kStep, int kThreads>
__device__ inline void copy_tile(Vector* mine, const Input& row, int first) {
  const auto copy_inside = [&](int v, int i) {
    __pipeline_memcpy_async(&mine[i * kThreads], row.begin + v, sizeof(Vector));
  };
  const auto copy_any = [&](int v, int i) {
    if (row.is_aligned && v + kVector <= row.end) return copy_inside(v, i);
#pragma unroll 1
    for (int j = 0; j < kVector; ++j)
      if (v + j < row.end)
        __pipeline_memcpy_async(&mine[i * kThreads].value[j], row.begin + v + j, sizeof(float));
      else
        mine[i * kThreads].value[j] = kLeastLogit;
  };
  for_each_vector<kVectors, kStep>(first, row.is_aligned ? row.end : 0, copy_inside, copy_any);
  __pipeline_commit();
}

// sum_tile and largest_of over a thread's vectors in shared memory.
template <int kVectors, int kThreads>
__device__ inline float sum_shared(const Vector* mine, float pivot, float scale) {
  PowerSum sum(pivot, scale);
#pragma unroll 4
  for (int i = 0; i < kVectors; ++i) sum.add(mine[i * kThreads]);
  return sum.total();
}
template <int kVectors, int kThreads>
__device__ inline float largest_shared(const Vector* mine) {
  float top = kLeastLogit;
#pragma unroll 4
  for (int i = 0; i < kVectors; ++i)
    for (int j = 0; j < kVector; ++j) top = fmaxf(top, mine[i * kThreads].value[j]);
  return top;
}

// Held rows: without a head, and with a teacher that has all of their ids.
template <Kind kKind, int kBlocks, int kThreads, int kVectors, int kResident>
__global__ void __launch_bounds__(kThreads, kResident)
    dense_rows(const Job job, const Series series, const Scratch scratch) {
  if constexpr (is_supported<kBlocks>()) {
    using T = Team<kBlocks, kThreads>;
    RBFAST_SHARED_MEMORY(memory);
    auto& exchange = *reinterpret_cast<DenseExchange<T>*>(memory);
    Vector* mine = reinterpret_cast<Vector*>(memory + sizeof(exchange)) + threadIdx.x;
    const T team;
    const Head head(job);
    const int V = static_cast<int>(job.vocabulary);
    team.sync();  // every block has started: its shared memory can be written
    for (int round = 0; team.row(round) < job.rows; ++round) {
      const int row = team.row(round), buffer = round % 2;
      copy_tile<kVectors, T::kStep, kThreads>(mine, {job.teacher + row * job.teacher_stride, V}, team.first());
      Vector z[kVectors];
      read_tile<T::kStep>(z, Input::of(job, row), team.first());
      const RowInfo& info = scratch.rows[row];
      const float scale = info.scale();
      const bool needs_one = info.inv_tau != 1;
      const auto sums_about = [&](const Array<3>& pivot) {
        __pipeline_wait_prior(0);
        compiler_barrier();  // the wait does not say that it changes memory, and no __syncthreads follows it
        const float of_t = sum_shared<kVectors, kThreads>(mine, pivot[1], scale);  // while z arrives
        clamp_logits(z);
        return Array<3>{{sum_tile(z, pivot[0], scale), of_t, needs_one ? sum_tile(z, pivot[2], kLog2e) : 0}};
      };
      const auto largest = [&] {
        const float top = largest_of(z, kLeastLogit);
        return Array<3>{{top, largest_shared<kVectors, kThreads>(mine), top}};
      };
      // The barrier in here comes after every logit of the row is read: dz may overwrite them.
      const DenseSums sums = exchange.find(team, info, needs_one, buffer, sums_about, largest);
      const DenseScale row_scale = dense_scale<kKind>(info, series, sums, V, !needs_one);
      if (team.is_leader()) scratch.sums[row] = sums.all;
      const DenseTotals totals = gradient_tile<kKind, false, T::kStep>(
          z, team.first(), row_scale, series, info, head, [&](int, int i) { return mine[i * kThreads]; },
          [&](const Vector& q, int i) { mine[i * kThreads] = q; });
      const float terms = warp_sum(totals.terms);
      if (threadIdx.x % kWarp == 0) scratch.terms[row * T::kAllWarps + team.warp()] = terms;
      if (kKind != Kind::forward) {
        const Array<1> scores = exchange.scores.template reduce<Add>(team, Array<1>{{totals.scores}}, 1, buffer);
        const float mean = scores[0] * row_scale.coefficient / series.rest_of_beta;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          compiler_barrier();
          subtract_mean(z[i], mine[i * kThreads], mean);
        }
      }
      if (job.dz == nullptr) continue;
      Output(job, row).store_tile<T::kStep>(z, team.first(), [](const Vector& of) { return of; });
    }
  }
}

constexpr int kDenseStreamVectors = 2;

// All other rows are streamed, as in sparse.cuh.
template <Kind kKind, int kBlocks, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    dense_streamed(const Job job, const Series series, const Scratch scratch, const bool needs_sync) {
  if constexpr (is_supported<kBlocks>()) {
    using T = Team<kBlocks, kThreads>;
    constexpr int kTile = T::kStep * kDenseStreamVectors;
    RBFAST_SHARED_MEMORY(memory);
    auto& exchange = *reinterpret_cast<DenseExchange<T>*>(memory);
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
      clamp_logits(z);
      clamp_logits(t);
    };
    const auto gradient = [&](int first, const DenseScale& row_scale) {
      return gradient_tile<kKind, true, T::kStep>(
          z, first, row_scale, series, info, head, [&](int, int i) { return t[i]; },
          [&](const Vector& q, int i) { t[i] = q; });
    };
    // Masks the student's logits of a tile at ids that the teacher does not have.
    const auto mask = [&](int first) {
      for_each_vector<kDenseStreamVectors, T::kStep>(first, [&](int v, int i) {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          if (v + j >= n) z[i].value[j] = kLeastLogit;
      });
    };
    const auto sums_about = [&](const Array<3>& pivot) {
      Array<3> sums{};
      for (int first = team.first(); first < V; first += kTile) {
        read(first);
        prepare(first);
        if (needs_one) sums[2] += sum_tile(z, pivot[2], kLog2e);
        mask(first);
        sums[0] += sum_tile(z, pivot[0], scale);
        sums[1] += sum_tile(t, pivot[1], scale);
      }
      return sums;
    };
    const auto largest = [&] {
      Array<3> top{{kLeastLogit, kLeastLogit, kLeastLogit}};
      for (int first = team.first(); first < V; first += kTile) {
        read(first);
        prepare(first);
        top[2] = largest_of(z, top[2]);
        mask(first);
        top[0] = largest_of(z, top[0]);
        top[1] = largest_of(t, top[1]);
      }
      return top;
    };
    team.sync();  // every block has started: its shared memory can be written
    const DenseSums sums = exchange.find(team, info, needs_one, 0, sums_about, largest);
    const DenseScale row_scale = dense_scale<kKind>(info, series, sums, n, !needs_one);
    if (team.is_leader()) scratch.sums[row] = sums.all;
    const bool is_forward = kKind == Kind::forward;
    DenseTotals totals;
    float mean = 0;
    if (!is_forward || job.dz == nullptr) {
      for (int first = team.first(); first < n; first += kTile) {
        read(first);
        prepare(first);
        const DenseTotals more = gradient(first, row_scale);
        totals.terms += more.terms, totals.scores += more.scores;
      }
    }
    if (!is_forward) {
      const Array<1> scores = exchange.scores.template reduce<Add>(team, Array<1>{{totals.scores}}, 1, 0);
      mean = scores[0] * row_scale.coefficient / series.rest_of_beta;
    }
    for (int start = 0; job.dz != nullptr && start < V; start += kTile) {
      const int first = start + team.first();
      read(first);
      if (needs_sync) team.sync();
      prepare(first);
      const DenseTotals more = gradient(first, row_scale);
      if (is_forward) totals.terms += more.terms;
#pragma unroll
      for (int i = 0; !is_forward && i < kDenseStreamVectors; ++i) subtract_mean(z[i], t[i], mean);
      Output(job, row).store_tile<T::kStep>(z, first, [](const Vector& of) { return of; });
    }
    const float terms = warp_sum(totals.terms);
    if (threadIdx.x % kWarp == 0) scratch.terms[row * T::kAllWarps + team.warp()] = terms;
  }
}

// The losses of a row, by one warp, from the terms of D that `warps` warps of its team wrote.
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
      log(static_cast<double>(all.at_one)) + (static_cast<double>(all.pivot) - info.z_label) * (kLog2e * kLn2);
  losses.store(job, info, row, sum < 0 ? 0 : sum, ce);
}

}  // namespace
}  // namespace rbfast
