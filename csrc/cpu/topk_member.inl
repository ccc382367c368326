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

// out[r, l] = <x_r, w_l>: R rows x_r [d] against L rows w [L, d]. One accumulator per pair, so
// that a pair's sum does not depend on its neighbours and equal rows tie.
template <class A, class In, int R, int L>
inline void dot_block(const A* const* x, const In* w, int64_t d, A* out, int64_t stride) {
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
    for (int r = 0; r < R; ++r) xs[r] = V::load(x[r] + i);
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
      for (int r = 0; r < R; ++r) acc[r][l] = V::fma(V::load_n(x[r] + i, n), ws, acc[r][l]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) out[r * stride + l] = acc[r][l].sum();
  }
}

template <class A, class In, int R>
static void dots(const A* const* x, const In* w, int64_t n, int64_t d, A* out) {
  int64_t l = 0;
  for (; l + 4 <= n; l += 4) dot_block<A, In, R, 4>(x, w + l * d, d, out + l, kLatents);
  for (; l < n; ++l) dot_block<A, In, R, 1>(x, w + l * d, d, out + l, kLatents);
}

// out [tokens, kLatents] = the rows x_t [d] times the n rows w [n, d]; tokens <= kTokens.
template <class A, class In>
static void scores(const A* const* x, int64_t tokens, const In* w, int64_t n, int64_t d, A* out) {
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

// |x|^2
template <class A>
static void squares(const A* x, int64_t d, double* out) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= d; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += double(x[i + j]) * double(x[i + j]);
  }
  for (; i < d; ++i) sums[0] += double(x[i]) * double(x[i]);
  *out = 0;
  for (double s : sums) *out += s;
}

// From products with codes (in low) to bounds of the ranks of n latents: low, high; NaN where
// nothing is known. bound [n, 2] is step, margin; scale may be null.
static void bracket(float* low, float* high, int64_t n, const float* bound, const float* bias,
                    const float* scale, float norm) {
  for (int64_t l = 0; l < n; ++l) {
    const float approx = low[l] * bound[2 * l];
    // roundings of the sum with the bias, of the product with the scale, and of these bounds
    const float slack = (std::abs(bias[l]) + std::abs(approx)) * 0x1p-20f + 0x1p-100f;
    low[l] = approx + bias[l];
    high[l] = bound[2 * l + 1] * norm + slack;
  }
  for (int64_t l = 0; scale && l < n; ++l) {
    low[l] *= scale[l];
    high[l] = high[l] * std::abs(scale[l]) + std::abs(low[l]) * 0x1p-20f + 0x1p-100f;
  }
  for (int64_t l = 0; l < n; ++l) {
    const float centre = low[l];
    const float radius = std::abs(centre) <= 0x1p100f ? high[l] * (1 + 0x1p-20f)
                                                      : std::numeric_limits<float>::infinity();
    low[l] = centre - radius;
    high[l] = centre + radius;
  }
}

// How many of n bounds lie above the rank, and how many neither above nor below.
template <class A>
static void compare(const A* low, const A* high, int64_t n, A rank, int32_t* above, int32_t* near) {
  int32_t over = 0, under = 0;
  for (int64_t l = 0; l < n; ++l) {
    over += low[l] > rank;
    under += high[l] < rank;
  }
  *above = over;
  *near = static_cast<int32_t>(n) - over - under;
}

}  // namespace topk_member
}  // namespace FASTSAE_NS
}  // namespace fastsae
