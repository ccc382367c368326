// What the CUDA files share: launching on the tensor's device and stream, shared memory, loads,
// checks.
//
// All shared memory is dynamic, so that a kernel's layout is one struct. With FASTSAE_ON_HOST the
// same files compile as C++ against tests/support/cuda_on_host.h and run on the CPU; they register
// for CPU tensors then.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#ifdef FASTSAE_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define FASTSAE_CUDA_KEY CUDA
#endif

#include "common/dtypes.h"
#include "common/tensor.h"

namespace fastsae {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

#ifdef FASTSAE_ON_HOST
using cuda_on_host::dynamic_shared;
using cuda_on_host::Queue;
#else

// The block's shared memory as one struct, uninitialised.
template <class T>
__device__ T& dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
}

// The current stream of a tensor's device, which is the current device while this lives.
class Queue {
 public:
  explicit Queue(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... P, class... A>
  void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, A... args) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "a grid of ", blocks, " blocks is too large");
    const cudaLaunchConfig_t config = configure(kernel, blocks, threads, shared);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
  }

  // Clusters of `size` blocks, as many as the device can run at once, but at most `most`.
  template <class... P, class... A>
  void launch_clusters(void (*kernel)(P...), int64_t most, int size, int threads, size_t shared,
                       A... args) const {
    cudaLaunchConfig_t config = configure(kernel, size, threads, shared);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    STD_TORCH_CHECK(clusters > 0, "the device has no room for a cluster of ", size, " blocks");
    config.gridDim.x = static_cast<unsigned>(size * (most < clusters ? most : clusters));
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
  }

  // Waits for the device: only where a result's size depends on the data.
  uint32_t read(const uint32_t* p) const {
    uint32_t value = 0;
    STD_CUDA_CHECK(cudaMemcpyAsync(&value, p, sizeof value, cudaMemcpyDeviceToHost, stream_));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return value;
  }

  void zero(void* p, size_t bytes) const {
    if (bytes) STD_CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, stream_));
  }

 private:
  template <class Kernel>
  cudaLaunchConfig_t configure(Kernel kernel, int64_t blocks, int threads, size_t shared) const {
    if (shared > 48 << 10) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared)));
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    return config;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};
#endif

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
void with_gpu_float(ScalarType dtype, const char* op, const F& f) {
  with_dtype<false>(dtype, op, f);
}

// A workspace of n elements on the device of `like`. Its size depends on shapes only.
template <class T>
Tensor workspace(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {n * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte);
}

// `t` must lie on the device of `like`.
inline void check_tensor(const char* op, const char* name, const Tensor& t, const Tensor& like,
                         std::initializer_list<int64_t> shape, ScalarType dtype) {
  const bool here = t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index();
  check_layout(op, name, t, here, shape, dtype);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 16 bytes of T.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};
static_assert(sizeof(Pack<bf16>) == 16 && sizeof(Pack<float>) == 16, "one load");

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  Pack<T> pack;
  memcpy(&pack, &raw, 16);
  return pack;
}
// To global memory. The intrinsic, because nvcc splits a plain 16-byte store of values that were
// summed in a loop into four.
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack) {
  uint4 raw;
  memcpy(&raw, &pack, 16);
  __stcg(reinterpret_cast<uint4*>(p), raw);
}

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// Inclusive sum over the warp's lanes.
template <class T>
__device__ __forceinline__ T warp_scan(T v) {
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const T below = __shfl_up_sync(kFullWarp, v, d);
    if (lane_id() >= d) v += below;
  }
  return v;
}

// Exclusive sum over the block's threads, and the total. warp_sums: one T per warp and one more.
// The caller's next use of warp_sums must come after a barrier.
template <class T>
__device__ __forceinline__ T block_scan(T v, T* warp_sums, T* total) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const T inclusive = warp_scan(v);
  if (lane_id() == kWarp - 1) warp_sums[warp_id()] = inclusive;
  __syncthreads();
  T before = 0, sum = 0;
  for (int w = 0; w < warps; ++w) {
    if (w == warp_id()) before = sum;
    sum += warp_sums[w];
  }
  *total = sum;
  return before + inclusive - v;
}

}  // namespace cuda
}  // namespace fastsae
