// Runs SIMT CUDA kernels on the CPU: the .cu files of csrc/cuda, compiled as C++ with
// -DFASTSAE_ON_HOST, include this in place of the CUDA headers.
//
// Every thread of a block is a fiber; blocks run one after another. A fiber runs until it reaches a
// barrier or a warp operation, and the order in which fibers run is reversed every round, so that a
// missing barrier shows. Shared memory is poisoned before every block. What would hang on a GPU
// (divergent barriers, a warp of which some lanes wait elsewhere) throws. Not modelled: races
// between blocks, memory ordering, inline PTX, tensor cores, asynchronous copies.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define FASTSAE_CUDA_KEY CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;
enum class Wait { kNone, kBlock, kWarp };

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t first;  // entered once; every later switch is a longjmp
  jmp_buf at;
  bool started = false, done = true;
  Wait wait = Wait::kNone;
  int warp_ops = 0;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from block to block
  int threads = 0, current = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  std::vector<uint64_t> slot[2];  // values exchanged in a warp; two, so that one wait is enough
  std::vector<int> vote;
  std::vector<char> shared;
  char* shared_begin = nullptr;
};
inline thread_local Block block;

inline void wait(Wait what) {
  Fiber& me = *block.fibers[block.current];
  me.wait = what;
  if (_setjmp(me.at) == 0) _longjmp(block.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    block.body();
    block.fibers[block.current]->done = true;
    wait(Wait::kNone);
  }
}

inline void resume(int thread) {
  Fiber& fiber = *block.fibers[thread];
  block.current = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.first);
  fiber.stack.reset(new char[kStack]);
  fiber.first.uc_stack.ss_sp = fiber.stack.get();
  fiber.first.uc_stack.ss_size = kStack;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, fiber_main, 0);
  setcontext(&fiber.first);
}

// Lets the warps go on whose live lanes all wait for a warp operation.
inline bool release_warps() {
  bool any = false;
  for (int first = 0; first < block.threads; first += kWarp) {
    int live = 0, waiting = 0;
    const int end = first + kWarp < block.threads ? first + kWarp : block.threads;
    for (int i = first; i < end; ++i) {
      live += !block.fibers[i]->done;
      waiting += !block.fibers[i]->done && block.fibers[i]->wait == Wait::kWarp;
    }
    if (waiting == 0 || waiting < live) continue;
    for (int i = first; i < end; ++i) block.fibers[i]->wait = Wait::kNone;
    any = true;
  }
  return any;
}

inline void run_block() {
  for (int i = 0; i < block.threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.done = false;
    fiber.wait = Wait::kNone;
    fiber.warp_ops = 0;
  }
  for (bool backwards = false;; backwards = !backwards) {
    for (int j = 0; j < block.threads; ++j) {
      const int i = backwards ? block.threads - 1 - j : j;
      if (!block.fibers[i]->done && block.fibers[i]->wait == Wait::kNone) resume(i);
    }
    if (release_warps()) continue;
    int live = 0, at_barrier = 0;
    for (int i = 0; i < block.threads; ++i) {
      live += !block.fibers[i]->done;
      at_barrier += !block.fibers[i]->done && block.fibers[i]->wait == Wait::kBlock;
    }
    if (live == 0) return;
    if (at_barrier < live) {
      block.fibers.clear();
      throw std::runtime_error("cuda_on_host: this would hang: " + std::to_string(at_barrier) +
                               " of " + std::to_string(live) + " live threads at __syncthreads");
    }
    for (int i = 0; i < block.threads; ++i) block.fibers[i]->wait = Wait::kNone;
  }
}

template <class T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "at most 8 bytes");
  const int me = block.current;
  uint64_t* slot = block.slot[block.fibers[me]->warp_ops++ % 2].data();
  slot[me] = 0;
  std::memcpy(slot + me, &value, sizeof(T));
  wait(Wait::kWarp);
  if (source < block.threads) std::memcpy(&value, slot + source, sizeof(T));
  return value;
}

// The lanes of the caller's warp for whose values f holds.
template <class F>
unsigned lanes(uint64_t value, const F& f) {
  const int me = block.current, first = me - me % kWarp;
  uint64_t* slot = block.slot[block.fibers[me]->warp_ops++ % 2].data();
  slot[me] = value;
  wait(Wait::kWarp);
  unsigned mask = 0;
  for (int i = first; i < first + kWarp && i < block.threads; ++i) {
    if (!block.fibers[i]->done && f(slot[i])) mask |= 1u << (i - first);
  }
  return mask;
}

template <class T>
T& dynamic_shared() {
  return *reinterpret_cast<T*>(block.shared_begin);
}

// Stands in for the CUDA stream: a launch runs at once.
class Queue {
 public:
  template <class Tensor>
  explicit Queue(const Tensor&) {}

  template <class... P, class... A>
  void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, A... args) const {
    if (threads <= 0 || threads > 1024 || threads % kWarp || shared > (163u << 10)) {
      throw std::runtime_error("cuda_on_host: a launch that sm_80 would refuse");
    }
    block.threads = threads;
    while (static_cast<int>(block.fibers.size()) < threads) {
      block.fibers.push_back(std::make_unique<Fiber>());
    }
    for (auto& slot : block.slot) slot.resize(threads);
    block.vote.resize(threads);
    block.body = [=] { kernel(static_cast<P>(args)...); };
    blockDim.x = static_cast<unsigned>(threads);
    gridDim.x = static_cast<unsigned>(blocks);
    block.shared.resize(shared + 16);
    block.shared_begin = block.shared.data();
    while (reinterpret_cast<uintptr_t>(block.shared_begin) % 16) ++block.shared_begin;
    for (int64_t b = 0; b < blocks; ++b) {
      blockIdx.x = static_cast<unsigned>(b);
      std::memset(block.shared_begin, 0xcd, shared);
      run_block();
    }
  }

  uint32_t read(const uint32_t* p) const { return *p; }
  void zero(void* p, size_t bytes) const { std::memset(p, 0, bytes); }
};

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::Wait::kBlock); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_host::wait(cuda_on_host::Wait::kWarp); }
inline int __syncthreads_count(int vote) {
  auto& b = cuda_on_host::block;
  b.vote[b.current] = vote != 0;
  __syncthreads();
  int count = 0;
  for (int i = 0; i < b.threads; ++i) count += !b.fibers[i]->done && b.vote[i];
  __syncthreads();
  return count;
}

template <class T>
T __shfl_sync(unsigned, T v, int lane) {
  const int me = cuda_on_host::block.current;
  return cuda_on_host::exchange(v, (me & ~31) | (lane & 31));
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return cuda_on_host::exchange(v, cuda_on_host::block.current ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T v, unsigned d) {
  const unsigned me = static_cast<unsigned>(cuda_on_host::block.current);
  return cuda_on_host::exchange(v, static_cast<int>(me % 32 >= d ? me - d : me));
}
template <class T>
T __shfl_down_sync(unsigned, T v, unsigned d) {
  const unsigned me = static_cast<unsigned>(cuda_on_host::block.current);
  return cuda_on_host::exchange(v, static_cast<int>(me % 32 + d < 32 ? me + d : me));
}
inline unsigned __ballot_sync(unsigned, int vote) {
  return cuda_on_host::lanes(vote != 0, [](uint64_t v) { return v != 0; });
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
template <class T>
unsigned __match_any_sync(unsigned, T v) {
  const uint64_t mine = static_cast<uint64_t>(v);
  return cuda_on_host::lanes(mine, [=](uint64_t other) { return other == mine; });
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
inline float __fsqrt_rn(float v) { return __builtin_sqrtf(v); }

template <class T>
void __stcg(T* p, T v) {
  *p = v;
}

template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
