// What the operators' CPU files share: dtypes, index checks, pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

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

// A [rows, cols] tensor; what memory safety needs, the messages for users are Python's.
inline void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows,
                         int64_t cols, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && t.is_contiguous() &&
                      t.scalar_type() == dtype &&
                      t.device().type() == torch::headeronly::DeviceType::CPU,
                  op, ": ", name, " must be a contiguous CPU tensor [", rows, ", ", cols,
                  "] of dtype ", torch::headeronly::toString(dtype));
}

[[noreturn]] inline void raise_out_of_range(const char* op, const int32_t* indices, int64_t n,
                                            int64_t n_latents) {
  const auto range = std::minmax_element(indices, indices + n);
  STD_TORCH_CHECK(false, op, ": indices must lie in [0, ", n_latents, "), got values from ",
                  *range.first, " to ", *range.second);
  __builtin_unreachable();
}

// Throws before anything is followed: the largest index, as unsigned, must be below n_latents.
inline void check_indices(const char* op, const int32_t* indices, int64_t n, int64_t n_latents) {
  std::atomic<bool> bad{false};
  const uint32_t limit = static_cast<uint32_t>(n_latents);
  torch::stable::parallel_for(0, n, 1 << 17, [&](int64_t begin, int64_t end) {
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) {
      largest = std::max(largest, static_cast<uint32_t>(indices[i]));
    }
    if (largest >= limit && begin < end) bad = true;
  });
  if (bad) raise_out_of_range(op, indices, n, n_latents);
}

}  // namespace fastsae
