// Tensors of the stable ABI, for the files of the CPU and of the GPU: their memory, their dtypes,
// and what memory safety needs of them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>

#include "common/dtypes.h"

namespace fastsae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f(T{}) with the storage type of `dtype`; fp64 only where kFp64.
template <bool kFp64, class F>
void with_dtype(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    case ScalarType::Double:
      if constexpr (kFp64) return f(double{});
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, op, ": dtype ", torch::headeronly::toString(dtype),
                      " is not one of float32, bfloat16, float16", kFp64 ? ", float64" : "");
  }
}

// Refuses a tensor of another shape, dtype or layout, or one that is not `here`, on the device that
// it has to be on. The messages that users see are Python's.
inline void check_layout(const char* op, const char* name, const Tensor& t, bool here,
                         std::initializer_list<int64_t> shape, ScalarType dtype) {
  bool fits = here && t.dim() == static_cast<int64_t>(shape.size()) && t.scalar_type() == dtype &&
              t.is_contiguous();
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, op, ": ", name, " does not have the shape, dtype (",
                  torch::headeronly::toString(dtype), "), device or contiguous layout it needs");
}

}  // namespace fastsae
