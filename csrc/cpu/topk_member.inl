namespace fastsae {
namespace FASTSAE_NS {
namespace topk_member {

using namespace ::fastsae::topk_member;

// Vec<float>::kLanes codes as floats.
inline Vec<float> load_codes(const int8_t* p) {
#if FASTSAE_LEVEL >= 2
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
#elif FASTSAE_LEVEL == 1
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
#else
  Vec<float> r;
  for (int i = 0; i < Vec<float>::kLanes; ++i) r.v[i] = p[i];
  return r;
#endif
}

inline Vec<float> load_codes_n(const int8_t* p, int n) {
  int8_t padded[Vec<float>::kLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load_codes(padded);
}

// The same two loads for rows of W_enc.
template <class A, class In>
inline Vec<A> load_row(const In* p) {
  return Vec<A>::load(p);
}
template <class A, class In>
inline Vec<A> load_row_n(const In* p, int n) {
  return Vec<A>::load_n(p, n);
}
template <>
inline Vec<float> load_row<float, int8_t>(const int8_t* p) {
  return load_codes(p);
}
template <>
inline Vec<float> load_row_n<float, int8_t>(const int8_t* p, int n) {
  return load_codes_n(p, n);
}

// out[r, l] = <x_r, w_l>: R rows x [R, d] against L rows w [L, d]. One accumulator per pair, so
// that a pair's sum does not depend on its neighbours and equal rows tie.
template <class A, class In, int R, int L>
inline void dot_block(const A* x, const In* w, int64_t d, A* out, int64_t stride) {
  using V = Vec<A>;
  V acc[R][L];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) acc[r][l] = V::zero();
  }
  int64_t i = 0;
  for (; i + V::kLanes <= d; i += V::kLanes) {
    V xs[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) xs[r] = V::load(x + r * d + i);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const V ws = load_row<A>(w + l * d + i);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][l] = V::fma(xs[r], ws, acc[r][l]);
    }
  }
  if (i < d) {
    const int n = static_cast<int>(d - i);
    for (int l = 0; l < L; ++l) {
      const V ws = load_row_n<A>(w + l * d + i, n);
      for (int r = 0; r < R; ++r) acc[r][l] = V::fma(V::load_n(x + r * d + i, n), ws, acc[r][l]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) out[r * stride + l] = acc[r][l].sum();
  }
}

template <class A, class In, int R>
static void dots(const A* x, const In* w, int64_t n, int64_t d, A* out) {
  int64_t l = 0;
  for (; l + 4 <= n; l += 4) dot_block<A, In, R, 4>(x, w + l * d, d, out + l, kLatents);
  for (; l < n; ++l) dot_block<A, In, R, 1>(x, w + l * d, d, out + l, kLatents);
}

// out [tokens, kLatents] = x [tokens, d] times the n rows w [n, d]; tokens <= kTokens.
template <class A, class In>
static void scores(const A* x, int64_t tokens, const In* w, int64_t n, int64_t d, A* out) {
  switch (tokens) {
    case 1:
      return dots<A, In, 1>(x, w, n, d, out);
    case 2:
      return dots<A, In, 2>(x, w, n, d, out);
    case 3:
      return dots<A, In, 3>(x, w, n, d, out);
    default:
      return dots<A, In, 4>(x, w, n, d, out);
  }
}

}  // namespace topk_member
}  // namespace FASTSAE_NS
}  // namespace fastsae
