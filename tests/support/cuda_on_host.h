// Runs SIMT CUDA kernels on the CPU: the .cu files of csrc/cuda, compiled as C++ with
// -DFASTSAE_ON_HOST, include this in place of the CUDA headers.
//
// Every thread of a block is a fiber; blocks run one after another. A fiber runs until it reaches a
// barrier or a warp operation, and the order in which fibers run is reversed every round, so that a
// missing barrier shows. Shared memory is poisoned before every block. What would hang on a GPU
// (divergent barriers, a warp of which some lanes wait elsewhere) throws. The blocks of a cluster run
// together, and what sm_90 adds is in hopper_on_host.h. Not modelled: races between blocks, memory
// ordering.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
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
#define __grid_constant__
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
enum class Wait { kNone, kBlock, kWarp, kCluster, kUntil };

// A product that a thread asked the tensor cores for, and the batch it belongs to.
struct Product {
  std::function<void()> form;
  int batch;
};

struct Named {
  int arrived = 0, turn = 0;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t first;  // entered once; every later switch is a longjmp
  jmp_buf at;
  bool started = false, done = true;
  Wait wait = Wait::kNone;
  std::function<bool()> until;  // of Wait::kUntil
  int warp_ops = 0;
  std::deque<Product> products;
  int batch = 0;
};

// The blocks that run together: one, or a cluster's.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from block to block; block by block
  int threads = 0, blocks = 0, current = 0;
  unsigned first = 0;  // index of the first block
  jmp_buf scheduler;
  std::function<void()> body;
  std::vector<uint64_t> slot[2];  // values exchanged in a warp; two, so that one wait is enough
  std::vector<int> vote;
  std::vector<char> shared;
  std::vector<char*> shared_begin;            // of each block
  std::vector<std::function<void()>> later;   // what a GPU does beside the threads, in any order
  std::vector<std::array<Named, 16>> named;   // barriers of each block
  uint32_t coins = 1;

  int all() const { return threads * blocks; }
  int own() const { return current / threads; }  // which of the blocks
  bool coin() {
    coins = coins * 1664525u + 1013904223u;
    return coins >> 31;
  }
};
inline thread_local Block block;

inline void wait(Wait what) {
  Fiber& me = *block.fibers[block.current];
  me.wait = what;
  if (_setjmp(me.at) == 0) _longjmp(block.scheduler, 1);
}

inline void wait_until(std::function<bool()> over) {
  if (over()) return;
  block.fibers[block.current]->until = std::move(over);
  wait(Wait::kUntil);
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
  threadIdx.x = static_cast<unsigned>(thread % block.threads);
  blockIdx.x = block.first + static_cast<unsigned>(thread / block.threads);
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

// Lets groups of `size` fibers go on whose live ones all wait for `what`.
inline bool release(Wait what, int size) {
  bool any = false;
  for (int first = 0; first < block.all(); first += size) {
    int live = 0, waiting = 0;
    for (int i = first; i < first + size; ++i) {
      live += !block.fibers[i]->done;
      waiting += !block.fibers[i]->done && block.fibers[i]->wait == what;
    }
    if (waiting == 0 || waiting < live) continue;
    for (int i = first; i < first + size; ++i) block.fibers[i]->wait = Wait::kNone;
    any = true;
  }
  return any;
}

inline bool release_whose_time_came() {
  bool any = false;
  for (int i = 0; i < block.all(); ++i) {
    Fiber& fiber = *block.fibers[i];
    if (fiber.done || fiber.wait != Wait::kUntil || !fiber.until()) continue;
    fiber.wait = Wait::kNone;
    any = true;
  }
  return any;
}

inline void do_one_later() {
  const size_t i = block.coin() ? 0 : block.later.size() - 1;
  const auto act = std::move(block.later[i]);
  block.later.erase(block.later.begin() + static_cast<int64_t>(i));
  act();
}

inline void check_nothing_is_left() {
  bool left = !block.later.empty();
  for (int i = 0; i < block.all(); ++i) left |= !block.fibers[i]->products.empty();
  for (const auto& own : block.named) {
    for (const Named& named : own) left |= named.arrived != 0;
  }
  if (left) throw std::runtime_error("cuda_on_host: a block ended before what it had begun");
}

inline void run_blocks() {
  block.later.clear();
  block.named.assign(block.blocks, {});
  for (int i = 0; i < block.all(); ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.done = false;
    fiber.wait = Wait::kNone;
    fiber.warp_ops = fiber.batch = 0;
    fiber.products.clear();
  }
  for (bool backwards = false;; backwards = !backwards) {
    bool ran = false, held_back = false;
    for (int j = 0; j < block.all(); ++j) {
      const int i = backwards ? block.all() - 1 - j : j;
      if (block.blocks > 1 && j % kWarp == 0) held_back = block.coin() && block.coin();
      if (held_back || block.fibers[i]->done || block.fibers[i]->wait != Wait::kNone) continue;
      resume(i);
      ran = true;
    }
    if (release(Wait::kWarp, kWarp) || ran) continue;
    if (release_whose_time_came() || release(Wait::kBlock, block.threads)) continue;
    if (release(Wait::kCluster, block.all())) continue;
    int live = 0, at_barrier = 0;
    bool ready = false;
    for (int i = 0; i < block.all(); ++i) {
      const Fiber& fiber = *block.fibers[i];
      live += !fiber.done;
      at_barrier += !fiber.done && fiber.wait == Wait::kBlock;
      ready |= !fiber.done && fiber.wait == Wait::kNone;
    }
    if (live == 0) return check_nothing_is_left();
    if (ready) continue;
    if (!block.later.empty()) {
      do_one_later();
      continue;
    }
    block.fibers.clear();
    throw std::runtime_error("cuda_on_host: this would hang: " + std::to_string(at_barrier) +
                             " of " + std::to_string(live) + " live threads at __syncthreads");
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
  if (source < block.all()) std::memcpy(&value, slot + source, sizeof(T));
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
  for (int i = first; i < first + kWarp; ++i) {
    if (!block.fibers[i]->done && f(slot[i])) mask |= 1u << (i - first);
  }
  return mask;
}

template <class T>
T& dynamic_shared() {
  return *reinterpret_cast<T*>(block.shared_begin[block.own()]);
}

// Stands in for the CUDA stream: a launch runs at once.
class Queue {
 public:
  template <class Tensor>
  explicit Queue(const Tensor&) {}

  template <class... P, class... A>
  void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, A... args) const {
    if (shared > (163u << 10)) refuse();
    run(kernel, blocks, 1, threads, shared, args...);
  }

  // Three clusters, as if the device were that small.
  template <class... P, class... A>
  void launch_clusters(void (*kernel)(P...), int64_t most, int size, int threads, size_t shared,
                       A... args) const {
    if (shared > (227u << 10)) refuse();
    run(kernel, size * (most < 3 ? most : 3), size, threads, shared, args...);
  }

  uint32_t read(const uint32_t* p) const { return *p; }
  void zero(void* p, size_t bytes) const { std::memset(p, 0, bytes); }

 private:
  [[noreturn]] static void refuse() {
    throw std::runtime_error("cuda_on_host: a launch that a GPU would refuse");
  }

  template <class... P, class... A>
  static void run(void (*kernel)(P...), int64_t blocks, int cluster, int threads, size_t shared,
                  A... args) {
    if (threads <= 0 || threads > 1024 || threads % kWarp) refuse();
    block.threads = threads;
    block.blocks = cluster;
    while (static_cast<int>(block.fibers.size()) < block.all()) {
      block.fibers.push_back(std::make_unique<Fiber>());
    }
    for (auto& slot : block.slot) slot.resize(block.all());
    block.vote.resize(block.all());
    block.body = [=] { kernel(static_cast<P>(args)...); };
    blockDim.x = static_cast<unsigned>(threads);
    gridDim.x = static_cast<unsigned>(blocks);
    // On a GPU all of a cluster begin at the same offset; only 16 bytes are sure.
    const size_t stride = (shared + 2047) / 1024 * 1024;
    block.shared.resize(stride * cluster + 1024);
    char* begin = block.shared.data();
    while (reinterpret_cast<uintptr_t>(begin) % 1024 != 16) ++begin;
    block.shared_begin.clear();
    for (int i = 0; i < cluster; ++i) block.shared_begin.push_back(begin + stride * i);
    for (int64_t b = 0; b < blocks; b += cluster) {
      block.first = static_cast<unsigned>(b);
      for (char* own : block.shared_begin) std::memset(own, 0xcd, shared);
      run_blocks();
    }
  }
};

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::Wait::kBlock); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_host::wait(cuda_on_host::Wait::kWarp); }
inline int __syncthreads_count(int vote) {
  auto& b = cuda_on_host::block;
  b.vote[b.current] = vote != 0;
  __syncthreads();
  int count = 0;
  for (int i = b.own() * b.threads; i < (b.own() + 1) * b.threads; ++i) count += !b.fibers[i]->done && b.vote[i];
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
