// What the operators' CPU files share: dtypes, checks, threads.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "common/dtypes.h"
#include "common/tensor.h"
#include "cpu/buffer.h"
#include "cpu/support/cpu_level.h"

namespace fastsae {

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
void with_float_type(ScalarType dtype, const char* op, const F& f) {
  with_dtype<true>(dtype, op, f);
}

inline void check_tensor(const char* op, const char* name, const Tensor& t,
                         std::initializer_list<int64_t> shape, ScalarType dtype) {
  check_layout(op, name, t, t.is_cpu(), shape, dtype);
}

// Throws before anything is followed when an index is outside [0, n_latents).
inline void check_indices(const char* op, const int32_t* indices, int64_t n, int64_t n_latents) {
  if (n == 0) return;
  uint32_t largest = 0;  // a negative index is a large unsigned one
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, static_cast<uint32_t>(indices[i]));
  if (largest < static_cast<uint64_t>(n_latents)) return;
  const auto is_outside = [n_latents](int32_t i) { return i < 0 || i >= n_latents; };
  STD_TORCH_CHECK(false, op, ": indices must lie in [0, ", n_latents, "), and ",
                  std::count_if(indices, indices + n, is_outside), " of ", n,
                  " do not, the first at place ",
                  std::find_if(indices, indices + n, is_outside) - indices);
}

// f(i) for i in [0, n) on `threads` of torch's threads, handed out as they come free (other work
// may hold a core). What is computed for an i must not depend on the thread.
template <class F>
void parallel_each(int64_t n, int64_t threads, const F& f) {
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

// How many threads are worth waking for n things that take `work` multiply-adds in all.
inline int64_t threads_for(int64_t n, int64_t work) {
  const int64_t enough = 1 << 14;  // about 5 us for one thread
  return std::min<int64_t>({n, work / enough + 1, torch::stable::get_num_threads()});
}

// Into how many pieces to cut n things for `threads`: enough that none waits long for the last.
inline int64_t n_pieces(int64_t n, int64_t threads) {
  return threads == 1 ? 1 : std::min(n, threads * 16);
}

// f(begin, end) over pieces of [0, n); each of the n is `work` multiply-adds.
template <class F>
void parallel_ranges(int64_t n, int64_t work, const F& f) {
  if (n <= 0) return;
  const int64_t threads = threads_for(n, n * work), pieces = n_pieces(n, threads);
  parallel_each(pieces, threads, [&](int64_t i) { f(n * i / pieces, n * (i + 1) / pieces); });
}

// A new tensor like `like`, not written yet, on huge pages where Linux has them: writing it for the
// first time then costs a page fault per 2 MB, not per 4 kB (most of the time of a large result).
inline Tensor new_result(const Tensor& like, std::initializer_list<int64_t> shape) {
  Tensor out = torch::stable::new_empty(like, shape);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t p = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t begin = (p + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (p + out.numel() * out.element_size()) / kHuge * kHuge;
  if (end >= begin + 4 * kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

// The operator, for others that select (topk_encode.cpp).
std::tuple<Tensor, Tensor> topk_encode_cpu(const Tensor& x, const Tensor& W_enc,
                                           const std::optional<Tensor>& b_enc, int64_t k, bool relu,
                                           const std::optional<Tensor>& rank_scale);

}  // namespace fastsae
