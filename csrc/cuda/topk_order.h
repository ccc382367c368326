// The order of the elements as unsigned integers: NaN above +inf, all NaN equal, -0 equal to +0.
#pragma once

#include "cuda/device.h"

namespace fastsae {
namespace cuda {

// The low kBits of a uint32_t. Smaller than every order is 0: even -inf is above it.
template <class T, class Bits, Bits kInf>
struct OrderOf {
  static constexpr int kBits = 8 * sizeof(Bits);
  static constexpr uint32_t kAll = static_cast<Bits>(~Bits(0)), kSign = kAll / 2 + 1;

  __device__ __forceinline__ static uint32_t of(T v) {
    Bits raw;
    memcpy(&raw, &v, sizeof raw);
    const uint32_t bits = raw, magnitude = bits & ~kSign;
    if (magnitude > kInf) return kAll;
    if (magnitude == 0) return kSign;
    return bits & kSign ? bits ^ kAll : bits | kSign;
  }

  // The value of that order; NaN for an order that no value has.
  __device__ __forceinline__ static T value(uint32_t order) {
    const Bits raw = static_cast<Bits>(order & kSign ? order ^ kSign : order ^ kAll);
    T v;
    memcpy(&v, &raw, sizeof v);
    return v;
  }
};

template <class T>
struct Order;
template <>
struct Order<float> : OrderOf<float, uint32_t, 0x7f800000u> {};
template <>
struct Order<bf16> : OrderOf<bf16, uint16_t, 0x7f80u> {};
template <>
struct Order<fp16> : OrderOf<fp16, uint16_t, 0x7c00u> {};

// Larger comes first; no two of a row are equal.
template <class T>
__device__ __forceinline__ uint64_t candidate_of(T v, int64_t index) {
  return static_cast<uint64_t>(Order<T>::of(v)) << 32 | ~static_cast<uint32_t>(index);
}

}  // namespace cuda
}  // namespace fastsae
