// The part of CUDA that the kernels use, on the host: with it g++ compiles csrc/cuda/*.cu to run on CPU tensors.
//
// A CUDA thread is a fiber. All fibers of a cluster take turns on one host thread, and each runs until it waits at a
// barrier or exchanges values with its warp. A cooperative grid is one cluster. So between two barriers threads run one
// after the other, and a warp gets as far ahead of the others as barriers allow. The test chooses the order: as
// numbered, reversed or random. A kernel with a race gives another result in one of them. A barrier that some threads
// never reach ends the launch with an error.
#pragma once

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#define CUDA CPU  // the dispatch key; after the headers of torch, which use that name

#define __global__ static
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define RBFAST_TENSOR_CORE_ON_HOST
#define RBFAST_SHARED_MEMORY(name) char* const name = on_host::block_of(on_host::current()).memory

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kPlainShared = 48 << 10;  // bytes of shared memory that a block has by default
constexpr size_t kGuard = 64;  // bytes after a block's shared memory, which no thread may change

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][32];  // of this exchange and of the one before it, which others may still be reading
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> room;
  char* memory;
  bool has_started = false, has_ended = false;  // one of its threads
};

// A pending copy; without `to`, the end of a group of copies.
struct Copy {
  void* to = nullptr;
  const void* from = nullptr;
  int bytes = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  unsigned thread;
  int block;
  const Barrier* waits_for;
  uint64_t generation, cluster_generation;  // of the barrier it waits for; of its cluster's when it arrived there
  bool is_started, is_done;
  std::vector<Copy> copies;
};

// The imitated device and the order of its threads, which the tests choose.
struct Machine {
  int clusters = 2;           // that fit at once; -1: a GPU without clusters, and kernels compiled for it
  int shared_bytes = 233472;  // 0: a GPU that no kernel is compiled for
  int order = 0;
  int launches = 0;  // so far
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  Barrier cluster;
  bool is_cooperative = false;  // the grid that runs
  Fiber* current = nullptr;
  jmp_buf scheduler;
  ucontext_t entry;
  std::function<void()> kernel;
  std::mt19937 random{0};
  std::set<const void*> roomy;  // the kernels that may have more than kPlainShared
};
inline Machine machine;
inline int most_shared() { return machine.shared_bytes - 1024; }  // of a block

inline Fiber& current() { return *machine.current; }
inline Block& block_of(const Fiber& fiber) { return machine.blocks[fiber.block]; }
inline Warp& warp_of(const Fiber& fiber) { return block_of(fiber).warps[fiber.thread / 32]; }

inline void arrive(Barrier& barrier) {
  current().generation = barrier.generation;
  if (++barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
}
inline void wait_for(Barrier& barrier, uint64_t generation) {
  Fiber& fiber = current();
  if (barrier.generation != generation) return;
  fiber.waits_for = &barrier;
  fiber.generation = generation;
  if (_setjmp(fiber.state) == 0) _longjmp(machine.scheduler, 1);
}
inline void wait(Barrier& barrier) {
  arrive(barrier);
  wait_for(barrier, current().generation);
}

inline void start_fiber() {
  machine.kernel();
  current().is_done = block_of(current()).has_ended = true;
  _longjmp(machine.scheduler, 1);
}

inline void resume(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = dim3(fiber.thread);
  blockIdx = block_of(fiber).index;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.is_started) _longjmp(fiber.state, 1);
  fiber.is_started = block_of(fiber).has_started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, start_fiber, 0);
  setcontext(&fiber.context);
}

inline bool can_run(const Fiber& fiber) {
  return !fiber.is_done && (fiber.waits_for == nullptr || fiber.waits_for->generation != fiber.generation);
}

// Runs a warp as far as it gets, in this order of lanes. Returns how many of them finished, or -1 if none ran.
inline int run_warp(int first, const std::vector<int>& lanes) {
  int done = -1;
  for (bool has_run = true; has_run;) {
    has_run = false;
    for (int lane : lanes) {
      Fiber& fiber = machine.fibers[first + lane];
      if (!can_run(fiber)) continue;
      has_run = true;
      resume(fiber);
      done = std::max(done, 0) + fiber.is_done;
    }
  }
  return done;
}

inline void run_fibers() {
  std::vector<int> warps(machine.fibers.size() / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  if (machine.order == 1) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  for (size_t done = 0; done < machine.fibers.size();) {
    if (machine.order > 1) {
      std::shuffle(warps.begin(), warps.end(), machine.random);
      std::shuffle(lanes.begin(), lanes.end(), machine.random);
    }
    bool is_stuck = true;
    for (int warp : warps) {
      const int more = run_warp(32 * warp, lanes);
      if (more < 0) continue;
      is_stuck = false;
      done += more;
    }
    if (is_stuck) throw std::runtime_error("some threads wait at a barrier that others never reach");
  }
}

inline void run_cluster(dim3 first, int blocks, unsigned threads, size_t shared) {
  machine.blocks.clear();
  machine.blocks.resize(blocks);
  machine.cluster = {static_cast<int>(blocks * threads)};
  machine.fibers.resize(blocks * threads);
  for (int b = 0; b < blocks; ++b) {
    Block& block = machine.blocks[b];
    block.index = dim3(first.x + b, first.y);
    block.barrier.expected = threads;
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.expected = 32;
    block.room.reset(new char[shared + kGuard + 16]);
    memset(block.room.get(), 0xff, shared + kGuard + 16);  // NaN, so that reads before a write show
    block.memory = block.room.get() + (16 - reinterpret_cast<uintptr_t>(block.room.get()) % 16) % 16;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = machine.fibers[b * threads + t];
      if (fiber.stack == nullptr) fiber.stack.reset(new char[kStackBytes]);
      fiber.thread = t;
      fiber.block = b;
      fiber.waits_for = nullptr;
      fiber.is_started = fiber.is_done = false;
      fiber.copies.clear();
    }
  }
  run_fibers();
  for (const Block& block : machine.blocks)
    for (size_t i = 0; i < kGuard; ++i)
      if (block.memory[shared + i] != static_cast<char>(0xff)) throw std::runtime_error("a write past shared memory");
}

// The values of all lanes of the warp, valid until the exchange after the next one. All lanes must take part.
inline const uint64_t* exchange_all(uint64_t value) {
  Warp& warp = warp_of(current());
  uint64_t* values = warp.values[warp.barrier.generation % 2];
  values[current().thread % 32] = value;
  wait(warp.barrier);
  return values;
}

// The value of another lane.
template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  memcpy(&value, &exchange_all(bits)[from], sizeof(T));
  return value;
}

}  // namespace on_host

// Fills new memory with NaN, like shared memory: the linker redirects aoti_torch_empty_strided here.
extern "C" AOTITorchError __real_aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t,
                                                          int32_t, AtenTensorHandle*);
extern "C" __attribute__((used)) inline AOTITorchError __wrap_aoti_torch_empty_strided(
    int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t type, int32_t device, int32_t index,
    AtenTensorHandle* made) {
  const AOTITorchError error = __real_aoti_torch_empty_strided(dim, sizes, strides, type, device, index, made);
  void* memory = nullptr;
  int64_t bytes = 0;
  if (error != 0) return error;
  aoti_torch_get_storage_size(*made, &bytes);
  aoti_torch_get_data_ptr(*made, &memory);
  if (bytes > 0) memset(memory, 0xff, bytes);
  return 0;
}

extern "C" __attribute__((visibility("default"), used)) inline void imitate(int clusters, int shared_bytes, int order) {
  on_host::machine.clusters = clusters;
  on_host::machine.shared_bytes = shared_bytes;
  on_host::machine.order = order;
}
extern "C" __attribute__((visibility("default"), used)) inline int launches() { return on_host::machine.launches; }

// ---- in a kernel ----

inline void __syncthreads() { on_host::wait(on_host::block_of(on_host::current()).barrier); }
inline void __syncwarp() { on_host::wait(on_host::warp_of(on_host::current()).barrier); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return on_host::exchange(value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return on_host::exchange(value, threadIdx.x % 32 ^ step);
}
inline unsigned atomicOr(unsigned* p, unsigned bits) { return std::exchange(*p, *p | bits); }
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const bool is_aligned = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes == 0;
  if (!is_aligned || (bytes != 4 && bytes != 8 && bytes != 16)) throw std::runtime_error("a copy that a GPU cannot make");
  on_host::current().copies.push_back({to, from, static_cast<int>(bytes)});
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) {  // waits for all of them
  for (const on_host::Copy& copy : on_host::current().copies) memcpy(copy.to, copy.from, copy.bytes);
  on_host::current().copies.clear();
}
inline float __int_as_float(int bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
using std::isnan;

namespace cooperative_groups {
struct Cluster {
  static void barrier_arrive() {
    on_host::arrive(on_host::machine.cluster);
    on_host::current().cluster_generation = on_host::current().generation;
  }
  static void barrier_wait() { on_host::wait_for(on_host::machine.cluster, on_host::current().cluster_generation); }
  static int block_rank() { return on_host::current().block; }
  static int num_blocks() { return static_cast<int>(on_host::machine.blocks.size()); }
  template <typename T>
  static T* map_shared_rank(T* mine, int rank) {
    const on_host::Block &own = on_host::block_of(on_host::current()), &other = on_host::machine.blocks[rank];
    if (!other.has_started || other.has_ended) throw std::runtime_error("a block whose shared memory may not exist");
    return reinterpret_cast<T*>(other.memory + (reinterpret_cast<char*>(mine) - own.memory));
  }
};
inline Cluster this_cluster() { return {}; }
struct Grid {
  static void sync() {
    if (!on_host::machine.is_cooperative) throw std::runtime_error("a grid waits that was not launched to");
    on_host::wait(on_host::machine.cluster);
  }
};
inline Grid this_grid() { return {}; }
}  // namespace cooperative_groups

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 v) { return __int_as_float(static_cast<int>(uint32_t{v.bits} << 16)); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = static_cast<uint32_t>(__float_as_int(v));
  return {static_cast<uint16_t>(v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }

// ---- the runtime ----

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidClusterSize,
  cudaErrorCooperativeLaunchTooLarge,
  cudaErrorInvalidDeviceFunction,
  cudaErrorNoKernelImageForDevice
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrClusterLaunch,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
typedef struct Stream* cudaStream_t;

struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

constexpr int kMultiprocessors = 20;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge ? "too many blocks in cooperative launch"
         : error == cudaErrorInvalidDeviceFunction   ? "invalid device function"
         : error == cudaErrorNoKernelImageForDevice  ? "no kernel image is available for execution on the device"
                                                     : "invalid argument";
}
using CUDAGuardHandle = void*;
inline AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) { return *guard = nullptr, 0; }
inline AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount            ? kMultiprocessors
           : which == cudaDevAttrClusterLaunch                ? on_host::machine.clusters >= 0
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? on_host::most_shared()
                                                              : on_host::machine.shared_bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = on_host::machine.clusters >= 0 ? 90 : 80;
  return on_host::machine.shared_bytes == 0 ? cudaErrorInvalidDeviceFunction : cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > on_host::most_shared()) return cudaErrorInvalidValue;
  on_host::machine.roomy.insert(kernel);
  return cudaSuccess;
}
// So few that some teams have several rows, and others fewer.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  return *clusters = on_host::machine.clusters, cudaSuccess;
}
template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given... arguments) {
  const bool is_cooperative = config->numAttrs > 0 && config->attrs->id == cudaLaunchAttributeCooperative;
  const int cluster = is_cooperative ? config->gridDim.x : config->numAttrs > 0 ? config->attrs->val.clusterDim.x : 1;
  const unsigned threads = config->blockDim.x;
  if (cluster > 1 && !is_cooperative && on_host::machine.clusters == 0) return cudaErrorInvalidClusterSize;
  if (on_host::machine.shared_bytes == 0) return cudaErrorNoKernelImageForDevice;
  if (is_cooperative && cluster > kMultiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  on_host::machine.is_cooperative = is_cooperative;
  ++on_host::machine.launches;
  if (threads % 32 != 0 || threads > 1024 || config->gridDim.x % cluster != 0) return cudaErrorInvalidValue;
  if (config->dynamicSmemBytes > static_cast<size_t>(on_host::most_shared())) return cudaErrorInvalidValue;
  const bool is_roomy = on_host::machine.roomy.count(reinterpret_cast<const void*>(kernel)) > 0;
  if (config->dynamicSmemBytes > on_host::kPlainShared && !is_roomy) return cudaErrorInvalidValue;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  on_host::machine.kernel = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; x += cluster)
      on_host::run_cluster(dim3(x, y), cluster, threads, config->dynamicSmemBytes);
  return cudaSuccess;
}
