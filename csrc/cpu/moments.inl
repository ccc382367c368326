// Rows of Adam's moments in the format they are stored in. Included by the .inl of an operator,
// once per CPU level; no include guard.

namespace fastsae {
namespace FASTSAE_NS {

// Others pass through fp32 in segments that stay in L1, a multiple of a block.
constexpr int64_t kMomentSegment = 4 * kMomentBlock;

// n elements of row f from column d.
inline void load_moments(const Bf16Moments& moments, int64_t f, int64_t D, int64_t d, int64_t n,
                         float* m, float* v) {
  const bf16 *from_m = moments.mean + f * D + d, *from_v = moments.square + f * D + d;
  for (int64_t i = 0; i < n; ++i) m[i] = widen(from_m[i]);
  for (int64_t i = 0; i < n; ++i) v[i] = widen(from_v[i]);
}

inline void store_moments(const Bf16Moments& moments, int64_t f, int64_t D, int64_t d, int64_t n,
                          const float* m, const float* v) {
  uint16_t *to_m = &moments.mean[f * D + d].bits, *to_v = &moments.square[f * D + d].bits;
  const uint32_t key = row_key(moments.step, static_cast<uint32_t>(f)),
                 first = static_cast<uint32_t>(d);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t r = random_bits(key, first + static_cast<uint32_t>(i));
    to_m[i] = round_bf16(m[i], r & 0xffff).bits;
    to_v[i] = round_bf16(v[i], r >> 16).bits;
  }
}

inline void load_moments(const CodedMoments& moments, int64_t f, int64_t D, int64_t d, int64_t n,
                         float* m, float* v) {
  const int64_t blocks = (D + kMomentBlock - 1) / kMomentBlock;
  for (int64_t i = 0; i < n; i += kMomentBlock) {
    const int64_t block = f * blocks + (d + i) / kMomentBlock;
    const int64_t end = n < i + kMomentBlock ? n : i + kMomentBlock;
    const float m_unit = mean_unit(moments.mean_scale[block]),
                v_unit = root_unit(moments.square_scale[block]);
    const int8_t* from_m = moments.mean + f * D + d;
    const uint8_t* from_v = moments.square + f * D + d;
    for (int64_t j = i; j < end; ++j) m[j] = decode_mean(from_m[j], m_unit);
    for (int64_t j = i; j < end; ++j) v[j] = decode_square(from_v[j], v_unit);
  }
}

inline void store_moments(const CodedMoments& moments, int64_t f, int64_t D, int64_t d, int64_t n,
                          const float* m, const float* v) {
  const int64_t blocks = (D + kMomentBlock - 1) / kMomentBlock;
  const uint32_t key = row_key(moments.step, static_cast<uint32_t>(f)),
                 first = static_cast<uint32_t>(d);
  int8_t* to_m = moments.mean + f * D + d;
  uint8_t* to_v = moments.square + f * D + d;
  float root[kMomentBlock];
  for (int64_t i = 0; i < n; i += kMomentBlock) {
    const int64_t block = f * blocks + (d + i) / kMomentBlock;
    const int64_t count = n - i < kMomentBlock ? n - i : kMomentBlock;
    uint32_t most_m = 0, most_v = 0;
    for (int64_t j = 0; j < count; ++j) {
      root[j] = sqrtf(v[i + j]);
      const uint32_t a = magnitude(m[i + j]), b = magnitude(root[j]);
      most_m = most_m < a ? a : most_m;
      most_v = most_v < b ? b : most_v;
    }
    const float m_scale = bits_to_float(most_m), v_scale = bits_to_float(most_v);
    moments.mean_scale[block] = m_scale;
    moments.square_scale[block] = v_scale;
    const float m_inverse = inverse_scale(m_scale), v_inverse = inverse_scale(v_scale);
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t r = random_bits(key, first + static_cast<uint32_t>(i + j));
      to_m[i + j] = encode_mean(m[i + j], m_inverse, r & 0xffff);
      to_v[i + j] = encode_root(root[j], v_inverse, r >> 16);
    }
  }
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
