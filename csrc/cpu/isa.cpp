#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/dispatch.h"

namespace rbfast {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kCount = static_cast<int>(std::size(kNames));

struct Choice {
  Isa isa;
  const char* why;  // why not a better one
};

#if defined(__x86_64__)
// Linux grants the tile registers on request, for all threads of a process; it may refuse.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Choice choose() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return {Isa::scalar, "this CPU has no AVX2"};
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return {Isa::avx2, "this CPU has no AVX-512"};
  if (!__builtin_cpu_supports("avx512bf16")) return {Isa::avx512, "this CPU has no products of bf16"};
  if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16"))
    return {Isa::avx512_bf16, "this CPU has no AMX"};
  if (!may_use_tiles()) return {Isa::avx512_bf16, "this CPU has AMX, but the kernel refuses its tiles"};
  return {Isa::amx, "the best that rbfast has"};
}
#else
Choice choose() { return {Isa::scalar, "vectors of four floats: the other kernels need x86-64"}; }
#endif

const Choice& choice() {
  static const Choice best = choose();
  return best;
}

const char* forced_isa() {
  const char* name = std::getenv("RBFAST_CPU_ISA");
  return name == nullptr || *name == '\0' ? nullptr : name;
}

}  // namespace

Isa active_isa() {
  const Isa best = choice().isa;
  // Read at every call, so that a test can force each set in turn within one process.
  const char* forced = forced_isa();
  if (forced == nullptr) return best;
  for (int i = 0; i < kCount; ++i) {
    if (std::strcmp(forced, kNames[i]) != 0) continue;
    expect(i <= static_cast<int>(best), "RBFAST_CPU_ISA=", forced, " is not supported by this CPU, whose best is ",
           kNames[static_cast<int>(best)]);
    return static_cast<Isa>(i);
  }
  throw std::runtime_error(std::string("RBFAST_CPU_ISA must be scalar, avx2, avx512, avx512_bf16 or amx, got ") +
                           forced);
}

}  // namespace rbfast

// The name of the active instruction set, for `rbfast info`; called through ctypes. Null if RBFAST_CPU_ISA is invalid.
extern "C" __attribute__((visibility("default"))) const char* rbfast_cpu_isa() {
  try {
    return rbfast::kNames[static_cast<int>(rbfast::active_isa())];
  } catch (const std::exception&) {
    return nullptr;
  }
}

// Why this instruction set is active and not a better one; if RBFAST_CPU_ISA is invalid, what is wrong with it.
extern "C" __attribute__((visibility("default"))) const char* rbfast_cpu_isa_reason() {
  try {
    rbfast::active_isa();
  } catch (const std::exception& error) {
    static thread_local std::string wrong;
    wrong = error.what();
    return wrong.c_str();
  }
  return rbfast::forced_isa() != nullptr ? "RBFAST_CPU_ISA says so" : rbfast::choice().why;
}
