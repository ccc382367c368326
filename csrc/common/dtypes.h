// Storage types of the kernels, on the CPU and the GPU, and their widening to the accumulation
// type.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define FASTSAE_HD __host__ __device__
#else
#define FASTSAE_HD
#endif

namespace fastsae {

// Raw 16-bit floats: the kernels convert them themselves, at every CPU level.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The type that sums over T run in.
template <class T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};
template <class T>
using acc_t = typename Acc<T>::type;

FASTSAE_HD inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
FASTSAE_HD inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

FASTSAE_HD inline float widen(float v) { return v; }
FASTSAE_HD inline double widen(double v) { return v; }
FASTSAE_HD inline float widen(bf16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
FASTSAE_HD inline float widen(fp16 v) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(v.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(v.bits & 0x7fff) << 13;
  // Scaling by 2^112 re-biases the exponent and makes subnormals come out right.
  if (rest < (31u << 23)) {
    return bits_to_float(sign | float_to_bits(bits_to_float(rest) * bits_to_float(0x77800000)));
  }
  return bits_to_float(sign | 0x7f800000 | rest);  // inf, NaN
#endif
}

// Round to nearest, ties to even.
template <class T>
FASTSAE_HD T narrow(acc_t<T> v);
template <>
FASTSAE_HD inline float narrow<float>(float v) {
  return v;
}
template <>
FASTSAE_HD inline double narrow<double>(double v) {
  return v;
}
template <>
FASTSAE_HD inline bf16 narrow<bf16>(float v) {
  const uint32_t bits = float_to_bits(v);
  if (v != v) return {static_cast<uint16_t>((bits >> 16) | 0x40)};  // a quiet NaN stays one
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
FASTSAE_HD inline fp16 narrow<fp16>(float v) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(v))};
#else
  const uint32_t bits = float_to_bits(v), sign = (bits >> 16) & 0x8000, mag = bits & 0x7fffffff;
  uint32_t half;
  if (mag > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (mag >= 0x477ff000) {
    half = 0x7c00;  // rounds past the largest half: inf
  } else if (mag < 0x38800000) {
    // Subnormal: adding 0.5 shifts the value so that the FPU rounds at the half's last bit.
    half = float_to_bits(bits_to_float(mag) + 0.5f) - 0x3f000000;
  } else {
    half = (mag - 0x38000000 + 0xfff + ((mag >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

}  // namespace fastsae
