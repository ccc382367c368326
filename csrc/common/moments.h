// Adam's moments in 16 or 8 bits, element by element, on the CPU and the GPU. The formats are
// those of fastsae/reference/moments.py, which says why.
#pragma once

#include <math.h>

#include "common/dtypes.h"

namespace fastsae {

constexpr int kMomentBlock = 128;  // elements of a row that share a scale

// A permutation of 32-bit integers (constants: C. Wellons, hash-prospector).
FASTSAE_HD inline uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}

// 32 random bits for an element: the low 16 round exp_avg, the high 16 exp_avg_sq.
FASTSAE_HD inline uint32_t row_key(uint32_t step, uint32_t latent) {
  return mix(mix(step) ^ latent);
}
FASTSAE_HD inline uint32_t random_bits(uint32_t key, uint32_t column) {
  return mix(key ^ (column * 0x9e3779b1u));
}

// Rounds up with the probability of the distance from the lower neighbour. r: 16 random bits.
FASTSAE_HD inline bf16 round_bf16(float x, uint32_t r) {
  const uint32_t bits = float_to_bits(x), nan = x != x ? 0x40u : 0u;
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return {static_cast<uint16_t>(finite ? (bits + r) >> 16 : (bits >> 16) | nan)};
}

// Magnitudes compare as integers, and NaN is above all: a block's largest.
FASTSAE_HD inline uint32_t magnitude(float x) { return float_to_bits(x) & 0x7fffffffu; }
// |x|, or the largest number in place of infinity and NaN: what a code is made from. Clamped as an
// integer: compilers do not vectorise comparisons of floats with a NaN among them.
FASTSAE_HD inline float finite_magnitude(float x) {
  const uint32_t bits = magnitude(x);
  return bits_to_float(bits < 0x7f7fffffu ? bits : 0x7f7fffffu);
}

// 1 / scale; 0 where the block is zero, not finite, or too small for it.
FASTSAE_HD inline float inverse_scale(float scale) {
  const float inverse = 1 / scale;
  return inverse > 0 && inverse < bits_to_float(0x7f800000) ? inverse : 0.f;
}

FASTSAE_HD inline float uniform(uint32_t r) { return static_cast<float>(r) * (1.f / 65536); }

// c in [-127, 127], the value is scale * c * |c| / 127^2.
FASTSAE_HD inline int8_t encode_mean(float m, float inverse, uint32_t r) {
  const float q = finite_magnitude(m) * inverse * 16129.f;
  int32_t code = static_cast<int32_t>(sqrtf(q));
  code = code < 126 ? code : 126;
  const float c = static_cast<float>(code);
  code += uniform(r) * (2 * c + 1) < q - c * c;
  const int32_t sign = static_cast<int32_t>(float_to_bits(m)) >> 31;  // -1 or 0
  return static_cast<int8_t>((code ^ sign) - sign);
}
FASTSAE_HD inline float mean_unit(float scale) { return scale * static_cast<float>(1.0 / 16129); }
FASTSAE_HD inline float decode_mean(int8_t code, float unit) {
  const float c = code, a = c < 0 ? -c : c;
  return c * a * unit;
}

// c in [0, 255] for root = sqrt(v), the value is (scale * (c + 1)^2 / 256^2)^2.
FASTSAE_HD inline uint8_t encode_root(float root, float inverse, uint32_t r) {
  const float q = finite_magnitude(root) * inverse * 65536.f;
  int32_t code = static_cast<int32_t>(sqrtf(q));
  code = code > 1 ? code : 1;
  code = code < 255 ? code : 255;
  const float c = static_cast<float>(code), next = c + 1;
  const float here = (c * c) * (c * c), above = (next * next) * (next * next);
  code += uniform(r) * (above - here) < q * q - here;
  return static_cast<uint8_t>(code - 1);
}
FASTSAE_HD inline float root_unit(float scale) { return scale * (1.f / 65536); }
FASTSAE_HD inline float decode_square(uint8_t code, float unit) {
  const float c = static_cast<float>(code) + 1, root = c * c * unit;
  return root * root;
}

}  // namespace fastsae
