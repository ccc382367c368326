#include "cpu/products.inl"

namespace fastsae {
namespace FASTSAE_NS {
namespace topk_member {

using namespace ::fastsae::topk_member;

// out [tokens, kLatents] = the rows x_t (places) times the n rows w [n, d]; tokens <= kTokens,
// n <= kLatents. panel: scratch for kTokens rows.
template <class In>
static void scores(const acc_t<In>* const* x, int64_t tokens, const In* w, int64_t n, int64_t d,
                   acc_t<In>* panel, acc_t<In>* out) {
  using A = acc_t<In>;
  constexpr int kNV = 2, kCols = kNV * Vec<A>::kLanes;
  const int mr = tokens == 3 ? 4 : static_cast<int>(tokens);
  const A* a = x[0];
  if (mr > 1) {
    const int64_t depth = depth_of<In>(d);
    for (int r = 0; r < mr; ++r) {
      const A* row = x[r < tokens ? r : 0];
      for (int64_t i = 0; i < depth; ++i) panel[i * mr + r] = row[i];
    }
    a = panel;
  }
  alignas(64) A c[kMaxRows * kCols];
  for (int64_t l = 0; l < n; l += kCols) {
    const int64_t count = n - l < kCols ? n - l : kCols;
    const In* rows[kCols];
    for (int i = 0; i < kCols; ++i) rows[i] = w + (l + (i < count ? i : count - 1)) * d;
    stream<In, kNV>(a, 1, mr, rows, d, c);
    for (int64_t r = 0; r < tokens; ++r) {
      std::memcpy(out + r * kLatents + l, c + r * kCols, count * sizeof(A));
    }
  }
}

// Products of integers: q int16 [d] with codes int8 [d], kStep of each at a time, in int32 lanes.
// |q| is so small (quantise) that a lane takes all of its products.
#if FASTSAE_LEVEL >= 2
constexpr int kStep = 32;
typedef __m512i Lanes;
inline Lanes no_lanes() { return _mm512_setzero_si512(); }
inline Lanes load_q(const int16_t* p) { return _mm512_loadu_si512(p); }
inline Lanes load_q_n(const int16_t* p, int n) {
  return _mm512_maskz_loadu_epi16((1u << n) - 1, p);
}
inline Lanes load_codes(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
}
inline Lanes load_codes_n(const int8_t* p, int n) {
  return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << n) - 1, p));
}
inline Lanes add_products(Lanes sum, Lanes a, Lanes b) {
#if FASTSAE_LEVEL >= 3
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
inline float total(Lanes v) { return Vec<float>{_mm512_cvtepi32_ps(v)}.sum(); }
// out[i] = total(v[i])
inline void totals4(const Lanes* v, float* out) {
  const __m512 a = _mm512_cvtepi32_ps(v[0]), b = _mm512_cvtepi32_ps(v[1]);
  const __m512 c = _mm512_cvtepi32_ps(v[2]), e = _mm512_cvtepi32_ps(v[3]);
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 ce = _mm512_add_ps(_mm512_unpacklo_ps(c, e), _mm512_unpackhi_ps(c, e));
  const __m512 s = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(ce))),
      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(ce))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#elif FASTSAE_LEVEL == 1
constexpr int kStep = 16;
typedef __m256i Lanes;
inline Lanes no_lanes() { return _mm256_setzero_si256(); }
inline Lanes load_q(const int16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Lanes load_codes(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
}
inline Lanes add_products(Lanes sum, Lanes a, Lanes b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
inline float total(Lanes v) { return Vec<float>{_mm256_cvtepi32_ps(v)}.sum(); }
inline void totals4(const Lanes* v, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = total(v[i]);
}
#else
constexpr int kStep = 8;
struct Lanes {
  int32_t v[kStep];
};
inline Lanes no_lanes() { return {}; }
inline Lanes load_q(const int16_t* p) {
  Lanes r;
  for (int i = 0; i < kStep; ++i) r.v[i] = p[i];
  return r;
}
inline Lanes load_codes(const int8_t* p) {
  Lanes r;
  for (int i = 0; i < kStep; ++i) r.v[i] = p[i];
  return r;
}
inline Lanes add_products(Lanes sum, Lanes a, Lanes b) {
  for (int i = 0; i < kStep; ++i) sum.v[i] += a.v[i] * b.v[i];
  return sum;
}
inline float total(Lanes v) {
  float sum = 0;
  for (int i = 0; i < kStep; ++i) sum += static_cast<float>(v.v[i]);
  return sum;
}
inline void totals4(const Lanes* v, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = total(v[i]);
}
#endif
constexpr int kAhead = 4;  // rows that codes are fetched before their use
#if FASTSAE_LEVEL < 2
template <class T>
struct Padded {
  T v[kStep] = {};
  Padded(const T* p, int n) { std::memcpy(v, p, n * sizeof(T)); }
};
inline Lanes load_q_n(const int16_t* p, int n) { return load_q(Padded<int16_t>(p, n).v); }
inline Lanes load_codes_n(const int8_t* p, int n) { return load_codes(Padded<int8_t>(p, n).v); }
#endif

// out[r, l] = <q_r, codes_l>, codes [L, d].
template <int R, int L>
inline void code_block(const int16_t* const* q, const int8_t* codes, int64_t d, float* out) {
  Lanes acc[R][L];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) acc[r][l] = no_lanes();
  }
  int64_t i = 0;
  for (; i + kStep <= d; i += kStep) {
    Lanes qs[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) qs[r] = load_q(q[r] + i);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const Lanes c = load_codes(codes + l * d + i);
      // rows are too short for the hardware to see where they go on
      __builtin_prefetch(codes + (l + kAhead) * d + i);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][l] = add_products(acc[r][l], qs[r], c);
    }
  }
  if (i < d) {
    const int n = static_cast<int>(d - i);
    for (int l = 0; l < L; ++l) {
      const Lanes c = load_codes_n(codes + l * d + i, n);
      for (int r = 0; r < R; ++r) acc[r][l] = add_products(acc[r][l], load_q_n(q[r] + i, n), c);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (L == 4) {
      totals4(acc[r], out + r * kLatents);
    } else {
      for (int l = 0; l < L; ++l) out[r * kLatents + l] = total(acc[r][l]);
    }
  }
}

template <int R>
static void codes_of(const int16_t* const* q, const int8_t* codes, int64_t n, int64_t d,
                     float* out) {
  int64_t l = 0;
  for (; l + 4 <= n; l += 4) code_block<R, 4>(q, codes + l * d, d, out + l);
  for (; l < n; ++l) code_block<R, 1>(q, codes + l * d, d, out + l);
}

// out [tokens, kLatents] = the integers q_t [d] times the n rows of codes [n, d].
static void code_scores(const int16_t* const* q, int64_t tokens, const int8_t* codes, int64_t n,
                        int64_t d, float* out) {
  switch (tokens) {
    case 1:
      return codes_of<1>(q, codes, n, d, out);
    case 2:
      return codes_of<2>(q, codes, n, d, out);
    case 3:
      return codes_of<3>(q, codes, n, d, out);
    default:
      return codes_of<4>(q, codes, n, d, out);
  }
}

// <q, codes + rest / 254> of one latent.
static float fine_score(const int16_t* q, const int8_t* codes, const int8_t* rest, int64_t d) {
  Lanes first = no_lanes(), second = no_lanes();
  int64_t i = 0;
  for (; i + kStep <= d; i += kStep) {
    const Lanes x = load_q(q + i);
    first = add_products(first, x, load_codes(codes + i));
    second = add_products(second, x, load_codes(rest + i));
  }
  if (i < d) {
    const int n = static_cast<int>(d - i);
    const Lanes x = load_q_n(q + i, n);
    first = add_products(first, x, load_codes_n(codes + i, n));
    second = add_products(second, x, load_codes_n(rest + i, n));
  }
  return total(first) + total(second) / 254;
}

// x as the products see it: where they are of bf16 pairs, subnormals are zero.
template <class In>
static void values_of(const In* x, int64_t d, float* out) {
  for (int64_t i = 0; i < d; ++i) {
    out[i] = widen(x[i]);
    if (Product<In>::kPer == 2 && std::abs(out[i]) < 0x1p-126f) out[i] = 0;
  }
}

// q = x in steps of its own, and how much x is and lies off that. Nothing is known of an x that is
// not finite or so large that its products could overflow: its norm is inf.
static void quantise(const float* x, int64_t d, int16_t* q, Quantised* out) {
  const float inf = std::numeric_limits<float>::infinity();
  constexpr int kWide = 16;  // partial results, which the compiler makes vectors of
  float sizes[kWide] = {};
  double squares[kWide] = {}, offs[kWide] = {};
  int64_t i = 0;
  for (; i + kWide <= d; i += kWide) {
    for (int j = 0; j < kWide; ++j) {
      const float size = std::abs(x[i + j]);
      sizes[j] = size > sizes[j] ? size : sizes[j];
      squares[j] += double(size) * double(size);
    }
  }
  for (; i < d; ++i) {
    const float size = std::abs(x[i]);
    sizes[0] = size > sizes[0] ? size : sizes[0];
    squares[0] += double(size) * double(size);
  }
  float largest = 0;
  double square = 0;
  for (int j = 0; j < kWide; ++j) {
    largest = sizes[j] > largest ? sizes[j] : largest;
    square += squares[j];
  }
  // an int32 takes a lane's products: at most two in every 16 elements
  const int64_t most = INT32_MAX / (2 * 127 * ((d + 15) / 16 + 1));
  const float codes = static_cast<float>(most < 32767 ? most : 32767);
  const float step = largest / codes * (1 + 0x1p-20f), back = 1 / step;
  const double norm = std::sqrt(square) * (1 + 0x1p-20);
  const bool known = norm < 0x1p60, coarse = !(step > 0x1p-120f);
  *out = {q, known && !coarse ? step : 0.0f, known ? static_cast<float>(norm) : inf, 0.0f};
  out->norm *= 1 + 0x1p-20f;
  if (!known || coarse) {
    std::memset(q, 0, d * sizeof(*q));
    out->off = out->norm + 0x1p-120f;  // a subnormal norm may have been rounded down
    return;
  }
  for (i = 0; i + kWide <= d; i += kWide) {
    for (int j = 0; j < kWide; ++j) {
      const float code = std::nearbyint(x[i + j] * back);
      const double left = double(x[i + j]) - double(code) * double(step);
      q[i + j] = static_cast<int16_t>(static_cast<int32_t>(code));
      offs[j] += left * left;
    }
  }
  for (; i < d; ++i) {
    const float code = std::nearbyint(x[i] * back);
    const double left = double(x[i]) - double(code) * double(step);
    q[i] = static_cast<int16_t>(static_cast<int32_t>(code));
    offs[0] += left * left;
  }
  double off = 0;
  for (double part : offs) off += part;
  out->off = static_cast<float>(std::sqrt(off) * (1 + 0x1p-20)) * (1 + 0x1p-20f) + 0x1p-120f;
}

// From sums of codes (in low) to bounds of the ranks of n latents: low, high; NaN where nothing is
// known. bounds: rows of `stride`: step, margin, margin of both codes, size. scale may be null.
static void bracket(float* low, float* high, int64_t n, const float* bounds, int64_t stride,
                    int fine, const float* bias, const float* scale, const Quantised& x) {
  const float *step = bounds, *margin = bounds + (1 + fine) * stride, *size = bounds + 3 * stride;
  for (int64_t l = 0; l < n; ++l) {
    const float approx = low[l] * (step[l] * x.step);
    // roundings of the sum, of that with the bias, of the product with the scale, and of these
    const float slack = (std::abs(bias[l]) + std::abs(approx)) * 0x1p-20f + 0x1p-100f;
    low[l] = approx + bias[l];
    high[l] = margin[l] * x.norm + size[l] * x.off + slack;
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

// How many of n bounds lie above the rank, and bit l where neither above nor below.
template <class A>
static void compare(const A* low, const A* high, int64_t n, A rank, int32_t* above,
                    uint64_t* near) {
  uint8_t close[kLatents] = {};
  int32_t over = 0;
  for (int64_t l = 0; l < n; ++l) {
    over += low[l] > rank;
    close[l] = !(low[l] > rank) & !(high[l] < rank);
  }
  *above = over;
  *near = 0;
  for (int64_t l = 0; l < kLatents; l += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, close + l, 8);
    *near |= ((bytes * 0x0102040810204080) >> 56) << l;
  }
}

}  // namespace topk_member
}  // namespace FASTSAE_NS
}  // namespace fastsae
