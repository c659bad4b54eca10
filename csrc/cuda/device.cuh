// Shared by the CUDA ops: storage types, vector reads, sums over a warp, and launching on torch's stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "checks.h"

// The dynamic shared memory of a block. The tests define their own, for threads that run on the host.
#ifndef RBFAST_SHARED_MEMORY
#define RBFAST_SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]
#endif

namespace rbfast {

// ---- values ----

__device__ inline float load(const float* p) { return *p; }
__device__ inline float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ inline float load(const __half* p) { return __half2float(*p); }
__device__ inline void store(float* p, float value) { *p = value; }
__device__ inline void store(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }
__device__ inline void store(__half* p, float value) { *p = __float2half_rn(value); }

// Calls f(T{}) with the storage type of `type`.
template <typename F>
void for_each_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Half:
      return f(__half{});
    default:
      expect(false, "the CUDA ops take float32, bfloat16 or float16, got ", torch::headeronly::toString(type),
             "; cast it, or call the function of the same name in rbfast.ops.reference");
  }
}

// n values that move together; aligned to their size, and to 16 bytes at most.
template <typename T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Pack {
  T value[n];
};

// `bytes` bytes in registers that move with one instruction. 16-bit values would take a register each.
template <int bytes>
using Bits = Pack<std::conditional_t<bytes % 4 == 0, uint32_t, uint16_t>, bytes % 4 == 0 ? bytes / 4 : bytes / 2>;

template <int bytes>
__device__ inline Bits<bytes> read_bits(const void* from) {
  return *static_cast<const Bits<bytes>*>(from);
}
// With one instruction, whatever the compiler deduces about the parts.
template <int bytes>
__device__ inline void write_bits(void* to, const Bits<bytes>& bits) {
#ifdef __CUDA_ARCH__
  if constexpr (bytes == 16) {
    const uint32_t* part = bits.value;
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(part[0]), "r"(part[1]), "r"(part[2]),
                 "r"(part[3])
                 : "memory");
    return;
  }
#endif
  *static_cast<Bits<bytes>*>(to) = bits;
}
// Value i of those in `bits`.
template <typename T, int bytes>
__device__ inline T value_of(const Bits<bytes>& bits, int i) {
  T value;
  memcpy(&value, reinterpret_cast<const char*>(&bits) + i * sizeof(T), sizeof(T));
  return value;
}
template <typename T, int bytes>
__device__ inline void set_value(Bits<bytes>& bits, int i, T value) {
  memcpy(reinterpret_cast<char*>(&bits) + i * sizeof(T), &value, sizeof(T));
}

__host__ __device__ inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// The values p[0 .. left), at most n of them, the others `empty`; with one instruction if p is known to be aligned.
template <int n, typename T>
__device__ inline Pack<T, n> read(const T* p, int64_t left, bool aligned, T empty) {
  Pack<T, n> values;
  if (aligned && left >= n) return *reinterpret_cast<const Pack<T, n>*>(p);
#pragma unroll
  for (int i = 0; i < n; ++i) values.value[i] = i < left ? p[i] : empty;
  return values;
}

// The same value, but opaque to the compiler, which must recompute what derives from it at each use. It would otherwise
// keep that in registers across the iterations of a loop, and there are none to spare.
template <typename T>
__device__ inline T rematerialize(T value) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
#endif
  return value;
}

// ---- a warp ----

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// Reduction operators.
struct Add {
  static constexpr float identity = 0;
  template <typename T>
  __device__ static T apply(T a, T b) {
    return a + b;
  }
};
// Ignores NaN, as the CPU's kernels do: the sums propagate it.
struct Max {
  static constexpr float identity = -INFINITY;
  template <typename T>
  __device__ static T apply(T a, T b) {
    return b > a ? b : a;
  }
};

// All-reduces the values of a warp's lanes: every lane gets the result.
template <typename Op, typename T>
__device__ inline T warp_reduce(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = Op::apply(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}
template <typename T>
__device__ inline T warp_sum(T value) {
  return warp_reduce<Add>(value);
}
template <typename T>
__device__ inline T warp_max(T value) {
  return warp_reduce<Max>(value);
}

// ---- launching ----

// The result of make(), cached per key and call site, so that the driver is asked once.
template <typename Key, typename F>
auto once(const Key& key, const F& make) {
  static std::mutex mutex;
  static std::map<Key, decltype(make())> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known.emplace(key, make()).first->second;
}

inline void check(cudaError_t error, const char* what) {
  const bool has_no_code = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  expect(error == cudaSuccess, "CUDA: ", what, " failed: ", cudaGetErrorString(error),
         has_no_code ? "; rbfast's CUDA ops run on sm_80 and later, if TORCH_CUDA_ARCH_LIST named it when they were "
                       "built; reinstall rbfast with RBFAST_CUDA=0 to run Triton and plain torch on this GPU"
                     : "");
}

struct Shape {
  int64_t x;  // blocks
  int64_t y = 1;
  int threads = 256;
  int cluster = 1;  // blocks along x that share a cluster
  size_t shared = 0;
  bool is_cooperative = false;  // for a grid barrier: the device must hold all blocks at once
};

// A Shape in CUDA's form. It points into itself.
struct Configuration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Configuration(const Shape& shape, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(shape.x), static_cast<unsigned>(shape.y));
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = shape.cluster > 1 || shape.is_cooperative ? 1 : 0;
    if (shape.is_cooperative) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = shape.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
  }
  Configuration(const Configuration&) = delete;
};

// A tensor of an op and its name in messages; null for an optional tensor that is not given.
struct Argument {
  const char* name;
  const Tensor* tensor;

  Argument(const char* name, const Tensor& x) : name(name), tensor(&x) {}
  Argument(const char* name, const std::optional<Tensor>& x) : name(name), tensor(x ? &*x : nullptr) {}

  std::string place() const {
    if (tensor->is_cpu()) return "the CPU";
    return (tensor->is_cuda() ? "cuda:" : "another device with index ") + std::to_string(tensor->get_device_index());
  }
};

// The device of an op's tensors, made current while this lives, and torch's current stream on it. Torch dispatches to
// the GPU if any tensor is there; a kernel must not dereference one that is not.
class Device {
 public:
  Device(const char* op, std::initializer_list<Argument> arguments)
      : index_(arguments.begin()->tensor->get_device_index()) {
    const Argument& first = *arguments.begin();
    for (const Argument& x : arguments) {
      if (x.tensor == nullptr || x.tensor->device() == first.tensor->device()) continue;
      expect(false, op, ": all tensors must be on one device, but ", first.name, " is on ", first.place(), " and ",
             x.name, " on ", x.place(), "; move one with .to(device)");
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index_, &guard_));
  }
  ~Device() { aoti_torch_delete_cuda_guard(guard_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_), "cudaDeviceGetAttribute");
    return value;
  }

  // The key of a device for `once`: the tests imitate several devices under one index.
  std::pair<int, int> key() const { return {index_, attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)}; }

  // Allows a kernel all the shared memory of a block. Always the same amount: another thread may be about to launch it.
  template <typename... Expected>
  void allow_shared_memory(void (*kernel)(Expected...)) const {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
          "cudaFuncSetAttribute");
  }

  // How many clusters of a launch, or blocks if a cluster is one block, the device holds at once.
  template <typename... Expected>
  int clusters_that_fit(const Shape& shape, void (*kernel)(Expected...)) const {
    int count = 0;
    if (shape.cluster == 1) {
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, shape.threads, shape.shared),
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
      return count * attribute(cudaDevAttrMultiProcessorCount);
    }
    Configuration configuration(shape, stream_);
    check(cudaOccupancyMaxActiveClusters(&count, kernel, &configuration.config), "cudaOccupancyMaxActiveClusters");
    return count;
  }

  template <typename... Expected, typename... Given>
  void launch(const Shape& shape, void (*kernel)(Expected...), Given&&... arguments) const {
    if (shape.x == 0 || shape.y == 0) return;
    expect(shape.x <= INT32_MAX && shape.y <= 65535, "CUDA: too large for one launch: ", shape.x, " x ", shape.y,
           " blocks; split the rows between calls");
    Configuration configuration(shape, stream_);
    check(cudaLaunchKernelEx(&configuration.config, kernel, static_cast<Expected>(arguments)...), "launching a kernel");
  }

 private:
  int index_;
  CUDAGuardHandle guard_ = nullptr;  // unlike cudaSetDevice, it creates no context on a GPU that torch does not use
  cudaStream_t stream_ = nullptr;
};

}  // namespace rbfast
