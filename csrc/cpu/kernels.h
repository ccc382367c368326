// What the operators' CPU files share: dtypes, checks, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>

#include "common/cpu_level.h"
#include "common/dtypes.h"

namespace fastsae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
void with_float_type(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    case ScalarType::Double:
      return f(double{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype ", torch::headeronly::toString(dtype),
                      " is not one of float32, bfloat16, float16, float64");
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// What memory safety needs; the messages that users see are Python's.
inline void check_tensor(const char* op, const char* name, const Tensor& t,
                         std::initializer_list<int64_t> shape, ScalarType dtype) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size()) && t.scalar_type() == dtype &&
              t.is_contiguous() && t.is_cpu();
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, op, ": ", name, " does not have the shape, dtype (",
                  torch::headeronly::toString(dtype), ") or contiguous CPU layout that is needed");
}

// Throws before anything is followed when an index is outside [0, n_latents).
inline void check_indices(const char* op, const int32_t* indices, int64_t n, int64_t n_latents) {
  if (n == 0) return;
  uint32_t largest = 0;  // a negative index is a large unsigned one
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, static_cast<uint32_t>(indices[i]));
  if (largest < static_cast<uint64_t>(n_latents)) return;
  const auto range = std::minmax_element(indices, indices + n);
  STD_TORCH_CHECK(false, op, ": indices must lie in [0, ", n_latents, "), got values from ",
                  *range.first, " to ", *range.second);
}

// f(begin, end) over [0, n) on torch's threads, in pieces handed out as threads come free (other
// work may hold a core). `work` is the number of multiply-adds of one of the n.
template <class F>
void parallel_ranges(int64_t n, int64_t work, const F& f) {
  if (n <= 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || n == 1 || n * work < (1 << 14)) return f(0, n);
  const int64_t pieces = std::min(n, threads * 16);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    // Every thread takes pieces until none are left; begin and end only count the threads.
    for (; begin < end; ++begin) {
      for (int64_t i; (i = next.fetch_add(1)) < pieces;) {
        f(n * i / pieces, n * (i + 1) / pieces);
      }
    }
  });
}

// Uninitialised memory of one thread, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : p_(static_cast<T*>(::operator new(n * sizeof(T), kAlign))) {}
  ~Scratch() { ::operator delete(p_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return p_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* p_;
};

}  // namespace fastsae
