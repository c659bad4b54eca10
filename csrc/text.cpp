// `rbfast._text`: the curation's hot loops over many texts, NumPy in and NumPy out, without the GIL.
//
// Texts come as one byte buffer and n + 1 offsets. Each thread takes a run of texts and writes only their results, so
// results do not depend on the number of threads. The Python side (rbfast/curation/text.py) passes arrays of the right
// types; rbfast/curation/text_reference.py defines what each function returns.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/facility.h"
#include "text/parallel.h"
#include "text/tokens.h"

namespace py = pybind11;

namespace rbfast {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void expect(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

// Checks that `starts` cuts [0, length) into rows; returns the number of rows.
int64_t checked_rows(const char* name, const Array<int64_t>& starts, int64_t length) {
  const int64_t n = starts.size() - 1;
  expect(starts.ndim() == 1 && n >= 0, std::string(name) + " must hold at least one position in one dimension");
  const int64_t* at = starts.data();
  for (int64_t i = 0; i < n; ++i)
    expect(at[i] <= at[i + 1], std::string(name) + " must not decrease, but does at " + std::to_string(i + 1));
  expect(at[0] == 0 && at[n] == length,
         std::string(name) + " must run from 0 to " + std::to_string(length) + ", the length of what it divides");
  return n;
}

template <typename T>
void checked_below(const char* name, const Array<T>& indices, int64_t bound) {
  for (int64_t i = 0; i < indices.size(); ++i)
    expect(indices.data()[i] >= 0 && indices.data()[i] < bound,
           std::string(name) + " must lie in [0, " + std::to_string(bound) + ")");
}

void checked_threads(int64_t threads) {
  expect(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
}

// Rows of different lengths: each thread appends to its own part, and the parts are joined in order.
template <typename T>
struct Ragged {
  std::vector<std::vector<T>> parts;
  Array<int64_t> starts;

  Ragged(int64_t rows, int64_t threads) : parts(threads), starts(rows + 1) { starts.mutable_data()[0] = 0; }

  Array<T> join() {
    int64_t* at = starts.mutable_data();
    for (int64_t i = 1; i < starts.size(); ++i) at[i] += at[i - 1];  // from lengths to offsets
    Array<T> all(at[starts.size() - 1]);
    T* next = all.mutable_data();
    for (auto& part : parts) {
      next = std::copy(part.begin(), part.end(), next);
      std::vector<T>().swap(part);
    }
    return all;
  }
};

// Calls f(hash) for every shingle of `tokens`, in order. Fewer than k tokens make one shingle.
template <typename F>
void each_shingle(const std::vector<uint64_t>& tokens, size_t k, const F& f) {
  const size_t length = std::min(k, tokens.size());
  for (size_t i = 0; length > 0 && i + length <= tokens.size(); ++i) {
    uint64_t hash = 0;
    for (size_t j = i; j < i + length; ++j) hash = mix(hash + tokens[j]);
    f(hash);
  }
}

// Sorts and deduplicates out[before:]; returns how many values are left there.
template <typename T>
int64_t sort_new(std::vector<T>& out, size_t before) {
  std::sort(out.begin() + before, out.end());
  out.erase(std::unique(out.begin() + before, out.end()), out.end());
  return static_cast<int64_t>(out.size() - before);
}

// Calls f(i, token hashes of text i) for i in [first, last).
template <typename F>
void each_text(const char* text, const int64_t* at, int64_t first, int64_t last, bool mask_digits, const F& f) {
  Tokeniser tokenise;
  std::vector<uint64_t> tokens;
  for (int64_t i = first; i < last; ++i) {
    tokens.clear();
    for (const Token& token : tokenise(std::string_view(text + at[i], at[i + 1] - at[i]), mask_digits))
      tokens.push_back(token.hash);
    f(i, tokens);
  }
}

py::tuple shingles(const Array<uint8_t>& bytes, const Array<int64_t>& starts, int64_t k, bool mask_digits,
                   int64_t threads) {
  const int64_t n = checked_rows("starts", starts, bytes.size());
  expect(k >= 1, "k must be at least 1, got " + std::to_string(k));
  checked_threads(threads);
  const char* text = reinterpret_cast<const char*>(bytes.data());
  const int64_t* at = starts.data();
  Ragged<uint64_t> found(n, threads);
  Array<int64_t> counts(n);
  int64_t *lengths = found.starts.mutable_data() + 1, *count = counts.mutable_data();
  {
    const py::gil_scoped_release release;
    parallel_parts(n, threads, [&](int64_t part, int64_t first, int64_t last) {
      auto& out = found.parts[part];
      each_text(text, at, first, last, mask_digits, [&](int64_t i, const std::vector<uint64_t>& tokens) {
        const size_t before = out.size();
        each_shingle(tokens, k, [&](uint64_t hash) { out.push_back(hash); });
        count[i] = static_cast<int64_t>(tokens.size());
        lengths[i] = sort_new(out, before);
      });
    });
  }
  const Array<uint64_t> hashes = found.join();
  return py::make_tuple(hashes, found.starts, counts);
}

// Finds hashes in a sorted table. Hashes are uniform, so their top bits select a bucket.
class Table {
 public:
  Table(const uint64_t* sorted, int64_t size) : sorted_(sorted) {
    while (bits_ < 30 && (int64_t{1} << bits_) < size) ++bits_;
    starts_.assign((size_t{1} << bits_) + 1, 0);
    for (int64_t i = 0; i < size; ++i) ++starts_[(sorted[i] >> (64 - bits_)) + 1];
    for (size_t b = 1; b < starts_.size(); ++b) starts_[b] += starts_[b - 1];
  }
  // The index of `hash`, or -1.
  int64_t find(uint64_t hash) const {
    const size_t bucket = hash >> (64 - bits_);
    for (int64_t i = starts_[bucket]; i < starts_[bucket + 1]; ++i)
      if (sorted_[i] == hash) return i;
    return -1;
  }

 private:
  const uint64_t* sorted_;
  int bits_ = 1;
  std::vector<int64_t> starts_;
};

py::tuple find(const Array<uint8_t>& bytes, const Array<int64_t>& starts, int64_t k, bool mask_digits,
               const Array<uint64_t>& index, int64_t threads) {
  const int64_t n = checked_rows("starts", starts, bytes.size());
  expect(k >= 1, "k must be at least 1, got " + std::to_string(k));
  checked_threads(threads);
  expect(index.size() < std::numeric_limits<int32_t>::max(), "index must have fewer than 2^31 hashes");
  expect(std::is_sorted(index.data(), index.data() + index.size()), "index must be sorted");
  const char* text = reinterpret_cast<const char*>(bytes.data());
  const int64_t* at = starts.data();
  Ragged<int32_t> found(n, threads);
  int64_t* lengths = found.starts.mutable_data() + 1;
  {
    const py::gil_scoped_release release;
    const Table table(index.data(), index.size());
    parallel_parts(n, threads, [&](int64_t part, int64_t first, int64_t last) {
      auto& ids = found.parts[part];
      each_text(text, at, first, last, mask_digits, [&](int64_t i, const std::vector<uint64_t>& tokens) {
        const size_t before = ids.size();
        each_shingle(tokens, k, [&](uint64_t hash) {
          const int64_t id = table.find(hash);
          if (id >= 0) ids.push_back(static_cast<int32_t>(id));
        });
        lengths[i] = sort_new(ids, before);
      });
    });
  }
  const Array<int32_t> ids = found.join();
  return py::make_tuple(ids, found.starts);
}

py::tuple containment(const Array<int32_t>& ids, const Array<int64_t>& starts, const Array<int32_t>& postings,
                      const Array<int64_t>& posting_starts, const Array<int64_t>& weights, const Array<int64_t>& totals,
                      const Array<int64_t>& own, double least, int64_t threads) {
  const int64_t n = checked_rows("starts", starts, ids.size()), evaluations = totals.size();
  const bool both = own.size() > 0;  // the Dice coefficient, which counts both sides
  expect(!both || own.size() == n, "own must have one value for each row, or none");
  const int64_t terms = checked_rows("posting_starts", posting_starts, postings.size());
  expect(weights.size() == terms, "weights must have one value for each row of postings");
  checked_below("ids", ids, terms);
  checked_below("postings", postings, evaluations);
  checked_threads(threads);
  const double smallest = evaluations ? *std::min_element(totals.data(), totals.data() + evaluations) : 1;
  expect(smallest > 0, "totals must be more than 0");
  Array<int32_t> best(n);
  Array<double> share(n);
  int32_t* best_item = best.mutable_data();
  double* best_share = share.mutable_data();
  const int64_t *at = starts.data(), *from = posting_starts.data(), *weight = weights.data(), *total = totals.data(),
                *mine = own.data();
  const int32_t *id = ids.data(), *item = postings.data();
  {
    const py::gil_scoped_release release;
    parallel_parts(n, threads, [&](int64_t, int64_t first, int64_t last) {
      std::vector<int64_t> shared(evaluations, 0);
      std::vector<int32_t> touched;
      for (int64_t i = first; i < last; ++i) {
        best_item[i] = -1;
        best_share[i] = 0.0;
        int64_t held = 0;
        for (int64_t j = at[i]; j < at[i + 1]; ++j) held += weight[id[j]];
        const double most = both ? 2.0 * static_cast<double>(held) / (smallest + static_cast<double>(mine[i]))
                                 : static_cast<double>(held) / smallest;
        if (most < least) continue;  // no item can reach `least`
        touched.clear();
        for (int64_t j = at[i]; j < at[i + 1]; ++j)
          for (int64_t p = from[id[j]]; p < from[id[j] + 1]; ++p) {
            if (shared[item[p]] == 0 && weight[id[j]] > 0) touched.push_back(item[p]);
            shared[item[p]] += weight[id[j]];
          }
        std::sort(touched.begin(), touched.end());  // on ties the first item is reported
        for (const int32_t e : touched) {
          const double part = both ? static_cast<double>(2 * shared[e]) / static_cast<double>(total[e] + mine[i])
                                   : static_cast<double>(shared[e]) / static_cast<double>(total[e]);
          if (part >= least && part > best_share[i]) best_share[i] = part, best_item[i] = e;
          shared[e] = 0;
        }
      }
    });
  }
  return py::make_tuple(best, share);
}

Array<uint32_t> minhash(const Array<uint64_t>& hashes, const Array<int64_t>& starts, const Array<uint64_t>& multipliers,
                        int64_t threads) {
  const int64_t n = checked_rows("starts", starts, hashes.size()), width = multipliers.size();
  checked_threads(threads);
  Array<uint32_t> signatures({n, width});
  uint32_t* signature = signatures.mutable_data();
  const uint64_t *hash = hashes.data(), *multiplier = multipliers.data();
  const int64_t* at = starts.data();
  {
    const py::gil_scoped_release release;
    parallel_parts(n, threads, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        uint32_t* least = signature + i * width;
        std::fill_n(least, width, std::numeric_limits<uint32_t>::max());
        for (int64_t j = at[i]; j < at[i + 1]; ++j)
          for (int64_t w = 0; w < width; ++w)
            least[w] = std::min(least[w], static_cast<uint32_t>((hash[j] * multiplier[w]) >> 32));
      }
    });
  }
  return signatures;
}

py::tuple choose(const Array<int64_t>& starts, const Array<int32_t>& features, const Array<int32_t>& values,
                 int64_t width, int64_t size, int64_t threads) {
  const int64_t n = checked_rows("starts", starts, features.size());
  expect(values.size() == features.size(), "values must have one value for each feature");
  expect(n < std::numeric_limits<int32_t>::max(), "expected fewer than 2^31 items");
  expect(size >= 0 && size <= n,
         "size must lie in [0, " + std::to_string(n) + "], the number of items, got " + std::to_string(size));
  checked_below("features", features, width);
  checked_threads(threads);
  Choice choice;
  {
    const py::gil_scoped_release release;
    choice = facility_location({starts.data(), features.data(), values.data(), n}, width, size, threads);
  }
  return py::make_tuple(Array<int64_t>(size, choice.items.data()), Array<int64_t>(size, choice.gains.data()));
}

}  // namespace
}  // namespace rbfast

PYBIND11_MODULE(_text, m) {
  using namespace rbfast;
  m.doc() = "The curation's hot loops. Called through rbfast.curation.text; defined in rbfast.curation.text_reference.";
  m.def("shingles", &shingles, py::arg("bytes").noconvert(), py::arg("starts").noconvert(), py::arg("k"),
        py::arg("mask_digits"), py::arg("threads"));
  m.def("find", &find, py::arg("bytes").noconvert(), py::arg("starts").noconvert(), py::arg("k"),
        py::arg("mask_digits"), py::arg("index").noconvert(), py::arg("threads"));
  m.def("containment", &containment, py::arg("ids").noconvert(), py::arg("starts").noconvert(),
        py::arg("postings").noconvert(), py::arg("posting_starts").noconvert(), py::arg("weights").noconvert(),
        py::arg("totals").noconvert(), py::arg("own").noconvert(), py::arg("least"), py::arg("threads"));
  m.def("minhash", &minhash, py::arg("hashes").noconvert(), py::arg("starts").noconvert(),
        py::arg("multipliers").noconvert(), py::arg("threads"));
  m.def("facility_location", &choose, py::arg("starts").noconvert(), py::arg("features").noconvert(),
        py::arg("values").noconvert(), py::arg("width"), py::arg("size"), py::arg("threads"));
}
