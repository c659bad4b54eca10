// Facility location by lazy greedy: choose the items that best represent all of them.
//
// The gain of an item j is sum_i max(0, sim(i, j) - best_i), where best_i is the similarity of i to what is chosen so
// far (Nemhauser, Wolsey and Fisher 1978). Gains never grow as items are chosen, so an old gain is an upper bound and
// few are recomputed (Minoux 1978). Similarities are integer dot products of sparse vectors: sums are exact, so no
// order of summation, thread count or compiler can change the choice.
#pragma once

#include <algorithm>
#include <cstdint>
#include <queue>
#include <vector>

#include "text/parallel.h"

namespace rbfast {

// Rows of a sparse matrix: row i holds features[starts[i] .. starts[i + 1]) and their values.
struct Sparse {
  const int64_t* starts;
  const int32_t* features;
  const int32_t* values;
  int64_t rows;
};

// The same matrix by columns: which rows have a feature, and its value in each.
struct Postings {
  std::vector<int64_t> starts;
  std::vector<int32_t> rows, values;

  Postings(const Sparse& x, int64_t width) : starts(width + 1), rows(x.starts[x.rows]), values(rows.size()) {
    for (size_t i = 0; i < rows.size(); ++i) ++starts[x.features[i] + 1];
    for (int64_t f = 0; f < width; ++f) starts[f + 1] += starts[f];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t i = x.starts[r]; i < x.starts[r + 1]; ++i) {
        const int64_t at = next[x.features[i]]++;
        rows[at] = static_cast<int32_t>(r);
        values[at] = x.values[i];
      }
  }
};

// similarity [rows] of every row to row j.
inline void similarities(const Sparse& x, const Postings& columns, int64_t j, std::vector<int64_t>& similarity) {
  std::fill(similarity.begin(), similarity.end(), 0);
  for (int64_t i = x.starts[j]; i < x.starts[j + 1]; ++i) {
    const int64_t value = x.values[i];
    for (int64_t p = columns.starts[x.features[i]]; p < columns.starts[x.features[i] + 1]; ++p)
      similarity[columns.rows[p]] += value * columns.values[p];
  }
}

struct Choice {
  std::vector<int64_t> items, gains;  // in the order chosen
};

inline Choice facility_location(const Sparse& x, int64_t width, int64_t size, int64_t threads) {
  const Postings columns(x, width);
  std::vector<int64_t> best(x.rows, 0);
  const auto gain = [&](int64_t j, std::vector<int64_t>& similarity) {
    similarities(x, columns, j, similarity);
    int64_t total = 0;
    for (int64_t i = 0; i < x.rows; ++i) total += std::max<int64_t>(0, similarity[i] - best[i]);
    return total;
  };

  struct Bound {
    int64_t gain, item, round;
    bool operator<(const Bound& other) const {  // on ties the lower item is chosen
      return gain != other.gain ? gain < other.gain : item > other.item;
    }
  };
  std::vector<Bound> bounds(x.rows);
  parallel_parts(x.rows, threads, [&](int64_t, int64_t first, int64_t last) {
    std::vector<int64_t> similarity(x.rows);
    for (int64_t j = first; j < last; ++j) bounds[j] = {gain(j, similarity), j, 0};
  });
  std::priority_queue<Bound> queue(std::less<Bound>(), std::move(bounds));

  Choice choice;
  std::vector<int64_t> similarity(x.rows);
  for (int64_t round = 0; round < size;) {
    const Bound top = queue.top();
    queue.pop();
    if (top.round < round) {
      queue.push({gain(top.item, similarity), top.item, round});
      continue;
    }
    similarities(x, columns, top.item, similarity);
    for (int64_t i = 0; i < x.rows; ++i) best[i] = std::max(best[i], similarity[i]);
    choice.items.push_back(top.item);
    choice.gains.push_back(top.gain);
    ++round;
  }
  return choice;
}

}  // namespace rbfast
