// Included by columns_{scalar,avx2,avx512}.cpp, each under its own target and with ISA set to its namespace.
#include "cpu/columns.h"

namespace rbfast {
namespace ISA {
namespace {

template <typename T>
void gather(const T* x, int64_t ld, const int64_t* cols, int64_t s, T* xs, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t j = 0; j < s; ++j) xs[t * s + j] = x[t * ld + cols[j]];
}

}  // namespace

void column_gather(const F32* x, int64_t ld, const int64_t* cols, int64_t s, F32* xs, int64_t begin, int64_t end) {
  gather(x, ld, cols, s, xs, begin, end);
}
void column_gather(const BF16* x, int64_t ld, const int64_t* cols, int64_t s, BF16* xs, int64_t begin, int64_t end) {
  gather(x, ld, cols, s, xs, begin, end);
}
void column_gather(const F16* x, int64_t ld, const int64_t* cols, int64_t s, F16* xs, int64_t begin, int64_t end) {
  gather(x, ld, cols, s, xs, begin, end);
}

}  // namespace ISA
}  // namespace rbfast
