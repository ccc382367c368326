// kLanes x kLanes transposes in registers, for Vec<float> and Vec<double> at every CPU level.
// Included by products.inl; no include guard.

namespace fastsae {
namespace FASTSAE_NS {

#if FASTSAE_LEVEL == 0

#if FASTSAE_X86
inline void transpose(Vec<float>* v) { _MM_TRANSPOSE4_PS(v[0].v, v[1].v, v[2].v, v[3].v); }
#endif
template <class A>
inline void transpose(Vec<A>* v) {
  for (int i = 0; i < Vec<A>::kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const A kept = v[i].v[j];
      v[i].v[j] = v[j].v[i];
      v[j].v[i] = kept;
    }
  }
}

#elif FASTSAE_LEVEL == 1

inline void transpose(Vec<float>* v) {
  __m256 t[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    s[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    s[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    v[i].v = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
    v[i + 4].v = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
  }
}

inline void transpose(Vec<double>* v) {
  const __m256d t0 = _mm256_unpacklo_pd(v[0].v, v[1].v), t1 = _mm256_unpackhi_pd(v[0].v, v[1].v);
  const __m256d t2 = _mm256_unpacklo_pd(v[2].v, v[3].v), t3 = _mm256_unpackhi_pd(v[2].v, v[3].v);
  v[0].v = _mm256_permute2f128_pd(t0, t2, 0x20);
  v[1].v = _mm256_permute2f128_pd(t1, t3, 0x20);
  v[2].v = _mm256_permute2f128_pd(t0, t2, 0x31);
  v[3].v = _mm256_permute2f128_pd(t1, t3, 0x31);
}

#else

inline void transpose(Vec<float>* v) {
  __m512 t[16], s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    s[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    s[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    s[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(s[i], s[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(s[i], s[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(s[i + 8], s[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(s[i + 8], s[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    v[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

inline void transpose(Vec<double>* v) {
  __m512d t[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(v[i].v, v[i + 1].v);
    t[i + 1] = _mm512_unpackhi_pd(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    s[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
    s[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
    s[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
    s[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    v[i].v = _mm512_shuffle_f64x2(s[i], s[i + 4], 0x88);
    v[i + 4].v = _mm512_shuffle_f64x2(s[i], s[i + 4], 0xdd);
  }
}

#endif

}  // namespace FASTSAE_NS
}  // namespace fastsae
