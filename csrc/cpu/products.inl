// The score <x, w> of a row of x and a row of W_enc, and who forms it: tiles of packed panels and
// single pairs. Included by the .inl of an operator, once per CPU level; no include guard, no
// standard templates.
//
// Every score of a level is one chain in order of d, from zero, a step of `Product` at a time. So
// it depends on its two rows alone: not on the path, the other rows, the place in a tile or the
// threads, and all that select or count agree bit for bit.
#include "cpu/transpose.inl"

namespace fastsae {
namespace FASTSAE_NS {

constexpr int kMaxRows = 14;  // of a tile: 14 x 2 sums of 32 registers

// A panel holds rows side by side: [depth][rows] places of type A. A place is a value widened to A.
template <class In>
struct Product {
  using A = acc_t<In>;
  using V = Vec<A>;
  static constexpr int kPer = 1;  // elements of d in a place

  // The place that begins at p, of which `left` elements are in the row.
  static A place(const In* p, int64_t) { return widen(*p); }
  // kLanes of them; zeros past the end.
  static V places(const In* p, int64_t left) {
    if (left >= V::kLanes) return V::load(p);
    return left > 0 ? V::load_n(p, static_cast<int>(left)) : V::zero();
  }
  static V step(V a, V b, V sum) { return V::fma(a, b, sum); }
  static A step(A a, A b, A sum) { return fma(a, b, sum); }
};

#if FASTSAE_LEVEL == 3
// A place is a pair of bf16, exact products of which are added to an fp32 sum. The instruction
// takes subnormal inputs for zeros and makes none.
template <>
struct Product<bf16> {
  using A = float;
  using V = Vec<float>;
  static constexpr int kPer = 2;

  static float place(const bf16* p, int64_t left) {
    return bits_to_float(p[0].bits | (left > 1 ? uint32_t(p[1].bits) << 16 : 0));
  }
  static V places(const bf16* p, int64_t left) {
    const __mmask32 mask = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
  }
  static V step(V a, V b, V sum) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)}; }
  static float step(float a, float b, float sum) {
    return _mm_cvtss_f32(
        _mm_dpbf16_ps(_mm_set_ss(sum), (__m128bh)_mm_set_ss(a), (__m128bh)_mm_set_ss(b)));
  }
};
#endif

template <class In>
static int64_t depth_of(int64_t d) {
  return (d + Product<In>::kPer - 1) / Product<In>::kPer;
}

// A row alone, as places [depth].
template <class In>
static void places(const In* row, int64_t d, acc_t<In>* out) {
  using P = Product<In>;
  for (int64_t i = 0; i < depth_of<In>(d); ++i) {
    out[i] = P::place(row + i * P::kPer, d - i * P::kPer);
  }
}

// Places [begin, end) of NV * kLanes rows of d. Rows lie one after another, so the hardware sees no
// stream in them: the lines of the next rows are fetched by hand.
template <class In, int NV>
static void pack(const In* const* rows, int64_t begin, int64_t end, int64_t d, acc_t<In>* out) {
  using P = Product<In>;
  using V = typename P::V;
  constexpr int kW = V::kLanes, kCols = NV * kW;
  for (int64_t i = begin; i < end; i += kW, out += kW * kCols) {
    const int n = static_cast<int>(end - i < kW ? end - i : kW);
    for (int r = 0; r < kCols; r += kW) {
      V v[kW];
#pragma GCC unroll 16
      for (int l = 0; l < kW; ++l) {
        const In* p = rows[r + l] + i * P::kPer;
        __builtin_prefetch(p + kCols * d, 0, 2);
        v[l] = P::places(p, d - i * P::kPer);
      }
      transpose(v);
      if (n == kW) {
#pragma GCC unroll 16
        for (int l = 0; l < kW; ++l) v[l].store(out + l * kCols + r);
      } else {
        for (int l = 0; l < n; ++l) v[l].store(out + l * kCols + r);
      }
    }
  }
}

// C [MR, NR] (+)= A panel [depth][MR] x B panel [depth][NR]; `more`: C holds the sums so far.
template <class P, int MR, int NV>
static void tile(int64_t depth, const typename P::A* a, const typename P::A* b, bool more,
                 typename P::A* c) {
  using V = typename P::V;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) acc[i][j] = V::zero();
  }
  if (more) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) acc[i][j] = V::load(c + (i * NV + j) * V::kLanes);
    }
  }
  for (int64_t d = 0; d < depth; ++d, a += MR, b += NV * V::kLanes) {
    V w[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) w[j] = V::load(b + j * V::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const V s = V::set1(a[i]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) acc[i][j] = P::step(s, w[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) acc[i][j].store(c + (i * NV + j) * V::kLanes);
  }
}

template <class P, int NV>
static void tile_rows(int mr, int64_t depth, const typename P::A* a, const typename P::A* b,
                      bool more, typename P::A* c) {
  switch (mr) {
    case 1:
      return tile<P, 1, NV>(depth, a, b, more, c);
    case 2:
      return tile<P, 2, NV>(depth, a, b, more, c);
    case 4:
      return tile<P, 4, NV>(depth, a, b, more, c);
    case 6:
      return tile<P, 6, NV>(depth, a, b, more, c);
    case 8:
      return tile<P, 8, NV>(depth, a, b, more, c);
    case 10:
      return tile<P, 10, NV>(depth, a, b, more, c);
    case 12:
      return tile<P, 12, NV>(depth, a, b, more, c);
    default:
      return tile<P, 14, NV>(depth, a, b, more, c);
  }
}

// C [panels][mr][NV * kLanes]: row panels a [panels][depth][mr] times rows of W as they lie, which
// go through L1 a few places at a time.
template <class In, int NV>
static void stream(const acc_t<In>* a, int64_t panels, int mr, const In* const* rows, int64_t d,
                   acc_t<In>* c) {
  using P = Product<In>;
  using A = typename P::A;
  constexpr int kCols = NV * P::V::kLanes;
  constexpr int64_t kPlaces = 32;
  alignas(64) A b[kPlaces * kCols];
  const int64_t depth = depth_of<In>(d);
  for (int64_t begin = 0; begin < depth; begin += kPlaces) {
    const int64_t end = begin + kPlaces < depth ? begin + kPlaces : depth;
    pack<In, NV>(rows, begin, end, d, b);
    for (int64_t p = 0; p < panels; ++p) {
      tile_rows<P, NV>(mr, end - begin, a + (p * depth + begin) * mr, b, begin > 0,
                       c + p * mr * kCols);
    }
  }
}

// Single pairs: out[i] = <x[i], rows[i]>, x as places; kShared: all are with x[0]. Several side by
// side, because a chain waits for each of its steps.
template <bool kShared, int L, class In>
static void chains(const acc_t<In>* const* x, const In* const* rows, int64_t d, acc_t<In>* out) {
  using P = Product<In>;
  acc_t<In> sum[L] = {};
  const int64_t depth = depth_of<In>(d);
  for (int64_t i = 0; i < depth; ++i) {
#pragma GCC unroll 8
    for (int l = 0; l < L; ++l) {
      const auto w = P::place(rows[l] + i * P::kPer, d - i * P::kPer);
      sum[l] = P::step(x[kShared ? 0 : l][i], w, sum[l]);
    }
  }
  for (int l = 0; l < L; ++l) out[l] = sum[l];
}

template <bool kShared, class In>
static void pair_scores(const acc_t<In>* const* x, const In* const* rows, int64_t n, int64_t d,
                        acc_t<In>* out) {
  int64_t i = 0;
  constexpr int kStep = kShared ? 0 : 1;
  for (; i + 8 <= n; i += 8) chains<kShared, 8>(x + i * kStep, rows + i, d, out + i);
  for (; i + 4 <= n; i += 4) chains<kShared, 4>(x + i * kStep, rows + i, d, out + i);
  for (; i + 2 <= n; i += 2) chains<kShared, 2>(x + i * kStep, rows + i, d, out + i);
  for (; i < n; ++i) chains<kShared, 1>(x + i * kStep, rows + i, d, out + i);
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
