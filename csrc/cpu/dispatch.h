// Dispatch between torch and the CPU kernels, by storage type and by instruction set.
#pragma once

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"

// Calls KERNEL as compiled for `isa`. Call active_isa() before a parallel region: it may throw, and an exception thrown
// inside one loses its message.
#if defined(__x86_64__)
#define RBFAST_CALL(isa, KERNEL, ...) \
  switch (isa) {                      \
    case Isa::scalar:                 \
      scalar::KERNEL(__VA_ARGS__);    \
      break;                          \
    case Isa::avx2:                   \
      avx2::KERNEL(__VA_ARGS__);      \
      break;                          \
    default:                          \
      avx512::KERNEL(__VA_ARGS__);    \
      break;                          \
  }
#else
#define RBFAST_CALL(isa, KERNEL, ...) (void)(isa), scalar::KERNEL(__VA_ARGS__)
#endif

namespace rbfast {

// Calls f(T{}) with the storage type of `type`.
template <typename F>
void for_each_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(F32{});
    case ScalarType::BFloat16:
      return f(BF16{});
    case ScalarType::Half:
      return f(F16{});
    default:
      expect(false, "the native CPU ops take float32, bfloat16 or float16, got ", torch::headeronly::toString(type),
             "; cast it, or call the function of the same name in rbfast.ops.reference");
  }
}

// Rows per task, enough to be worth a thread: about 32k elements.
inline int64_t grain(int64_t elements_per_row) { return 32768 / (elements_per_row + 1) + 1; }

}  // namespace rbfast
