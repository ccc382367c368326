// Vectors of the accumulation type at one CPU level: Vec<float>, Vec<double>.
//
// Included by foreach_level.h once per level; no include guard. 16-bit storage is widened at the
// load and rounded (nearest, ties to even) at the store. `*_n` take the first n < kLanes elements;
// a load_n fills the rest with zeros.

namespace fastsae {
namespace FASTSAE_NS {

template <class A>
struct Vec;

#if FASTSAE_LEVEL == 0

// The compiler's own vectors: SSE2 or NEON, whatever the baseline has.
template <class A>
struct Vec {
  static constexpr int kLanes = 16 / sizeof(A);
  typedef A Native __attribute__((vector_size(16)));
  Native v;

  static Vec zero() { return {Native{}}; }
  static Vec set1(A a) { return {Native{} + a}; }
  static Vec load(const A* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  template <class T>
  static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = widen(p[i]);
    return r;
  }
  template <class T>
  static Vec load_n(const T* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = widen(p[i]);
    return r;
  }
  void store(A* p) const { std::memcpy(p, &v, sizeof(v)); }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = narrow<T>(v[i]);
  }
  template <class T>
  void store_n(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = narrow<T>(v[i]);
  }
  Vec operator+(Vec b) const { return {v + b.v}; }
  Vec operator-(Vec b) const { return {v - b.v}; }
  Vec operator*(Vec b) const { return {v * b.v}; }
  Vec operator/(Vec b) const { return {v / b.v}; }
  // Two roundings where the baseline has no fused one: the build forbids the compiler to contract.
  static Vec fma(Vec a, Vec b, Vec c) {
#ifdef __aarch64__
    if constexpr (sizeof(A) == 4) {
      return {(Native)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
    } else {
      return {(Native)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v)};
    }
#else
    return {a.v * b.v + c.v};
#endif
  }
  static Vec sqrt(Vec a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = __builtin_sqrt(a.v[i]);
    return a;
  }
  A sum() const {
    A s = v[0];
    for (int i = 1; i < kLanes; ++i) s += v[i];
    return s;
  }
};

#elif FASTSAE_LEVEL == 1

// n of 8 lanes set, as vmaskmov wants them.
inline __m256i lanes32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i lanes64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

template <>
struct Vec<float> {
  static constexpr int kLanes = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set1(float a) { return {_mm256_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) { return from_bf16(_mm_loadu_si128((const __m128i*)p)); }
  static Vec load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, lanes32(n))}; }
  template <class T>
  static Vec load_n(const T* p, int n) {
    T padded[8] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128((__m128i*)p, to_bf16()); }
  void store(fp16* p) const {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store_n(float* p, int n) const { _mm256_maskstore_ps(p, lanes32(n), v); }
  template <class T>
  void store_n(T* p, int n) const {
    T padded[8];
    store(padded);
    std::memcpy(p, padded, n * sizeof(T));
  }
  Vec operator+(Vec b) const { return {_mm256_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm256_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm256_mul_ps(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm256_div_ps(v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

 private:
  static Vec from_bf16(__m128i h) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  __m128i to_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
    r = _mm256_packus_epi32(r, r);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(r, 0x08));
  }
};

template <>
struct Vec<double> {
  static constexpr int kLanes = 4;
  __m256d v;

  static Vec zero() { return {_mm256_setzero_pd()}; }
  static Vec set1(double a) { return {_mm256_set1_pd(a)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load_n(const double* p, int n) { return {_mm256_maskload_pd(p, lanes64(n))}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store_n(double* p, int n) const { _mm256_maskstore_pd(p, lanes64(n), v); }
  Vec operator+(Vec b) const { return {_mm256_add_pd(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm256_sub_pd(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm256_mul_pd(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm256_div_pd(v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static Vec sqrt(Vec a) { return {_mm256_sqrt_pd(a.v)}; }
  double sum() const {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
};

#else

template <>
struct Vec<float> {
  static constexpr int kLanes = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set1(float a) { return {_mm512_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec load(const fp16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
  }
  static Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static Vec load_n(const bf16* p, int n) {
    return from_bf16(_mm256_maskz_loadu_epi16(mask(n), p));
  }
  static Vec load_n(const fp16* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, to_bf16()); }
  void store(fp16* p) const { _mm256_storeu_si256((__m256i*)p, to_fp16()); }
  void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  void store_n(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), to_bf16()); }
  void store_n(fp16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), to_fp16()); }
  Vec operator+(Vec b) const { return {_mm512_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm512_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm512_mul_ps(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm512_div_ps(v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }

 private:
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec from_bf16(__m256i h) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  // Not vcvtneps2bf16: that one flushes subnormals, the other levels do not.
  __m256i to_bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
  }
  __m256i to_fp16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

template <>
struct Vec<double> {
  static constexpr int kLanes = 8;
  __m512d v;

  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec set1(double a) { return {_mm512_set1_pd(a)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load_n(const double* p, int n) { return {_mm512_maskz_loadu_pd(mask(n), p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store_n(double* p, int n) const { _mm512_mask_storeu_pd(p, mask(n), v); }
  Vec operator+(Vec b) const { return {_mm512_add_pd(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm512_sub_pd(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm512_mul_pd(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm512_div_pd(v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static Vec sqrt(Vec a) { return {_mm512_sqrt_pd(a.v)}; }
  double sum() const { return _mm512_reduce_add_pd(v); }

 private:
  static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1); }
};

#endif

// The same of single numbers, to the bit.
#if FASTSAE_LEVEL == 0 && !defined(__aarch64__)
inline float fma(float a, float b, float c) { return a * b + c; }
inline double fma(double a, double b, double c) { return a * b + c; }
#else
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

// Asks for the cache lines of p[0, n) ahead of time.
template <class T>
inline void prefetch(const T* p, int64_t n) {
  const char* c = reinterpret_cast<const char*>(p);
  for (int64_t b = 0; b < n * static_cast<int64_t>(sizeof(T)); b += 64) __builtin_prefetch(c + b);
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
