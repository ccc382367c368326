// Kernels of topk_encode, compiled once per CPU level. No standard templates here: another
// translation unit could share them.

namespace fastsae {
namespace FASTSAE_NS {
namespace topk {

using namespace ::fastsae::topk;

// Bit i: !(a[i] <= b[i]), true for NaN.
#if FASTSAE_LEVEL == 0
template <class A>
inline uint32_t not_le(Vec<A> a, Vec<A> b) {
  uint32_t mask = 0;
  for (int i = 0; i < Vec<A>::kLanes; ++i) mask |= uint32_t(!(a.v[i] <= b.v[i])) << i;
  return mask;
}
#elif FASTSAE_LEVEL == 1
inline uint32_t not_le(Vec<float> a, Vec<float> b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)));
}
inline uint32_t not_le(Vec<double> a, Vec<double> b) {
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_NLE_UQ)));
}
#else
inline uint32_t not_le(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ);
}
inline uint32_t not_le(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask(a.v, b.v, _CMP_NLE_UQ);
}
#endif

#if FASTSAE_LEVEL >= 2
// Stores the chosen lanes side by side; writes a whole vector.
inline void append(__m512 v, __mmask16 mask, float* out) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, v));
}
inline void append(__m512d, __mmask16, double*) {}
inline void append_index(int64_t first, __mmask16 mask, int32_t* out) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), lanes);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, index));
}

// Unsigned integers in the order of the floats: NaN first, -0 equal to +0.
inline __m512i order16(__m512 v) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512i bits = _mm512_mask_set1_epi32(
      _mm512_castps_si512(v), _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_EQ_OQ), 0);
  const __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign);
  return _mm512_mask_set1_epi32(_mm512_xor_si512(bits, flip),
                                _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), -1);
}

// The k-th largest of n >= k unsigned integers: bisection by bits, without branches on the data.
// v is padded with zeros to a multiple of 16. `above` counts those larger than the result.
static uint32_t kth_largest(const uint32_t* v, int64_t n, int64_t k, int64_t* above) {
  __m512i least = _mm512_set1_epi32(-1), most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i x = _mm512_load_si512(v + i);
    most = _mm512_max_epu32(most, x);
    least = _mm512_min_epu32(least, x);
  }
  const uint32_t high = _mm512_reduce_max_epu32(most);
  const uint32_t differ = high ^ _mm512_reduce_min_epu32(least);
  uint32_t prefix = high;
  if (differ) {
    int bit = 31 - __builtin_clz(differ);
    prefix &= ~((2u << bit) - 1u);
    for (; bit >= 0; --bit) {
      const uint32_t candidate = prefix | (1u << bit);
      const __m512i c = _mm512_set1_epi32(static_cast<int>(candidate));
      int64_t count = 0;
      for (int64_t i = 0; i < n; i += 16) {
        count +=
            __builtin_popcount(_mm512_cmp_epu32_mask(_mm512_load_si512(v + i), c, _MM_CMPINT_NLT));
      }
      if (count < k) continue;
      prefix = candidate;
      if (count > k) continue;
      // Exactly k from here on up: the least of them.
      __m512i kth = _mm512_set1_epi32(-1);
      for (int64_t i = 0; i < n; i += 16) {
        const __m512i x = _mm512_load_si512(v + i);
        kth = _mm512_mask_min_epu32(kth, _mm512_cmp_epu32_mask(x, c, _MM_CMPINT_NLT), kth, x);
      }
      prefix = _mm512_reduce_min_epu32(kth);
      break;
    }
  }
  int64_t count = 0;
  const __m512i kth = _mm512_set1_epi32(static_cast<int>(prefix));
  for (int64_t i = 0; i < n; i += 16) {
    count +=
        __builtin_popcount(_mm512_cmp_epu32_mask(_mm512_load_si512(v + i), kth, _MM_CMPINT_NLE));
  }
  *above = count;
  return prefix;
}

inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}

static void shrink(Rows<float>& rows, int64_t row) {
  const int64_t n = rows.count[row], k = rows.k;
  if (n < k) return;
  float* rank = rows.rank + row * rows.stride;
  int32_t* index = rows.index + row * rows.stride;
  alignas(64) uint32_t order[kSelect + 16];
  for (int64_t i = 0; i < n; i += 16) {
    _mm512_store_si512(
        order + i, _mm512_maskz_mov_epi32(first_lanes(n - i), order16(_mm512_loadu_ps(rank + i))));
  }
  int64_t above = 0;
  const uint32_t kth = kth_largest(order, n, k, &above);
  int64_t ties = k - above, kept = 0;  // the first of the equal ones have the lowest indices
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(kth));
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i o = _mm512_load_si512(order + i);
    const __mmask16 lanes = first_lanes(n - i);
    uint32_t equal = _mm512_mask_cmpeq_epu32_mask(lanes, o, limit);
    __mmask16 keep = _mm512_mask_cmp_epu32_mask(lanes, o, limit, _MM_CMPINT_NLE);
    for (; equal && ties > 0; equal &= equal - 1, --ties) {
      keep = static_cast<__mmask16>(keep | (equal & (~equal + 1)));
    }
    const __m512 r = _mm512_loadu_ps(rank + i);
    const __m512i x = _mm512_loadu_si512(index + i);
    _mm512_storeu_ps(rank + kept, _mm512_maskz_compress_ps(keep, r));
    _mm512_storeu_si512(index + kept, _mm512_maskz_compress_epi32(keep, x));
    kept += __builtin_popcount(keep);
  }
  rows.count[row] = kept;
  rows.threshold[row] = threshold_from_order(kth);
}

// 16 x 16 transpose of 32-bit elements.
static inline void transpose16(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

#endif

// C [MR, NR] = A panel [depth][MR] x B panel [depth][NR]; every pair sums in order of depth.
template <class A, int MR, int NV>
static void tile(int64_t depth, const A* a, const A* b, A* c) {
  using V = Vec<A>;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) acc[i][j] = V::zero();
  }
  for (int64_t d = 0; d < depth; ++d, a += MR, b += NV * V::kLanes) {
    V w[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) w[j] = V::load(b + j * V::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const V s = V::set1(a[i]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) acc[i][j] = V::fma(s, w[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) acc[i][j].store(c + (i * NV + j) * V::kLanes);
  }
}

// Appends what beats the row's threshold. c [rows, NR]; `bias`, `scale` at the panel's latents.
template <class A, int NV>
static void emit(const A* c, int64_t row, int n_rows, int n_cols, int64_t first, const A* bias,
                 const A* scale, Rows<A>* rows) {
  using V = Vec<A>;
  constexpr int kW = V::kLanes;
  A padded[2][NV * kW];
  if (n_cols < NV * kW) {  // do not read bias and scale past their end
    for (int i = 0; i < NV * kW; ++i) {
      padded[0][i] = bias && i < n_cols ? bias[i] : A(0);
      padded[1][i] = scale && i < n_cols ? scale[i] : A(0);
    }
    if (bias) bias = padded[0];
    if (scale) scale = padded[1];
  }
  const uint64_t valid = (uint64_t(1) << n_cols) - 1;
  for (int r = 0; r < n_rows; ++r, c += NV * kW) {
    V rank[NV];
    const V threshold = V::set1(rows->threshold[row + r]);
    uint64_t mask = 0;
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      rank[j] = V::load(c + j * kW);
      if (bias) rank[j] = rank[j] + V::load(bias + j * kW);
      if (scale) rank[j] = rank[j] * V::load(scale + j * kW);
      mask |= uint64_t(not_le(rank[j], threshold)) << (j * kW);
    }
    mask &= valid;
    if (__builtin_expect(mask == 0, 1)) continue;
#if FASTSAE_LEVEL >= 2
    if constexpr (sizeof(A) == 4) {
      int64_t n = rows->count[row + r];
      A* out = rows->rank + (row + r) * rows->stride;
      int32_t* index = rows->index + (row + r) * rows->stride;
      for (int j = 0; j < NV; ++j, mask >>= kW) {
        const __mmask16 m = static_cast<__mmask16>(mask);
        append(rank[j].v, m, out + n);
        append_index(first + j * kW, m, index + n);
        n += __builtin_popcount(m);
      }
      rows->count[row + r] = n;
      if (n >= rows->capacity) rows->shrink(*rows, row + r);
      continue;
    }
#endif
    A ranks[NV * kW];
    for (int j = 0; j < NV; ++j) rank[j].store(ranks + j * kW);
    for (; mask; mask &= mask - 1) {
      const int i = __builtin_ctzll(mask);
      rows->add(row + r, ranks[i], static_cast<int32_t>(first + i));
    }
  }
}

template <class A, int NV>
static void tile_rows(int mr, int64_t depth, const A* a, const A* b, A* c) {
  switch (mr) {
    case 1:
      return tile<A, 1, NV>(depth, a, b, c);
    case 2:
      return tile<A, 2, NV>(depth, a, b, c);
    case 4:
      return tile<A, 4, NV>(depth, a, b, c);
    case 6:
      return tile<A, 6, NV>(depth, a, b, c);
    case 8:
      return tile<A, 8, NV>(depth, a, b, c);
    case 10:
      return tile<A, 10, NV>(depth, a, b, c);
    case 12:
      return tile<A, 12, NV>(depth, a, b, c);
    default:
      return tile<A, 14, NV>(depth, a, b, c);
  }
}

template <class A, int NV>
static void scan(const PlainJob<A>& job) {
  using V = Vec<A>;
  constexpr int kCols = NV * V::kLanes;
  alignas(64) A c[kMaxRows * kCols];
  const int64_t panels = (job.n_cols + kCols - 1) / kCols;
  for (int64_t block = 0; block < panels; block += job.block) {
    const int64_t block_end = block + job.block < panels ? block + job.block : panels;
    for (int64_t p = job.panel_begin; p < job.panel_end; ++p) {
      const A* a = static_cast<const A*>(job.a) + p * job.mr * job.depth;
      const int64_t row = p * job.mr;
      const int n_rows = static_cast<int>(job.n_rows - row < job.mr ? job.n_rows - row : job.mr);
      for (int64_t q = block; q < block_end; ++q) {
        tile_rows<A, NV>(job.mr, job.depth, a, static_cast<const A*>(job.b) + q * kCols * job.depth,
                         c);
        const int64_t col = q * kCols;
        const int n_cols = static_cast<int>(job.n_cols - col < kCols ? job.n_cols - col : kCols);
        const int64_t first = job.first + col;
        emit<A, NV>(c, row, n_rows, n_cols, first, job.bias ? job.bias + first : nullptr,
                    job.scale ? job.scale + first : nullptr, job.rows);
      }
    }
  }
}

template <class A, class In, int NV>
static void pack(const In* const* rows, int64_t d, A* out) {
  using V = Vec<A>;
  constexpr int kCols = NV * V::kLanes;
  constexpr int64_t kDepth = 16;  // a cache line of fp32 of every row at a time
  alignas(64) A tmp[kCols][kDepth];
  for (int64_t d0 = 0; d0 < d; d0 += kDepth) {
    const int64_t n = d - d0 < kDepth ? d - d0 : kDepth;
#if FASTSAE_LEVEL >= 2
    if constexpr (sizeof(A) == 4) {
      if (n == kDepth && rows[kCols - 1]) {  // the last panel of W may be short: its end is null
        for (int r = 0; r < kCols; r += 16) {
          __m512i m[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) m[i] = _mm512_castps_si512(V::load(rows[r + i] + d0).v);
          transpose16(m);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) _mm512_store_si512(out + (d0 + i) * kCols + r, m[i]);
        }
        continue;
      }
    }
#endif
    for (int r = 0; r < kCols; ++r) {
      if (rows[r] && n == kDepth) {
        for (int64_t i = 0; i < kDepth; i += V::kLanes) V::load(rows[r] + d0 + i).store(tmp[r] + i);
      } else {
        for (int64_t i = 0; i < n; ++i) {
          tmp[r][i] = rows[r] ? widen(rows[r][d0 + i]) : 0;
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int r = 0; r < kCols; ++r) out[(d0 + i) * kCols + r] = tmp[r][i];
    }
  }
}

// R rows of x against L latents. One accumulator per pair, so the order of summation of a pair
// depends on neither R, L nor its place.
template <class A, class In, int R, int L>
static void dot_block(const A* const* x, const In* const* w, int64_t d, A* out, int64_t stride) {
  using V = Vec<A>;
  constexpr int kW = V::kLanes;
  V acc[R][L];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) acc[r][l] = V::zero();
  }
  int64_t i = 0;
  for (; i + kW <= d; i += kW) {
    V xs[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) xs[r] = V::load(x[r] + i);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const V ws = V::load(w[l] + i);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][l] = V::fma(xs[r], ws, acc[r][l]);
    }
  }
  if (i < d) {
    const int n = static_cast<int>(d - i);
    for (int l = 0; l < L; ++l) {
      const V ws = V::load_n(w[l] + i, n);
      for (int r = 0; r < R; ++r) acc[r][l] = V::fma(V::load_n(x[r] + i, n), ws, acc[r][l]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) out[r * stride + l] = acc[r][l].sum();
  }
}

template <class A, class In>
static void dots(const A* x, const In* const* rows, int64_t n, int64_t d, A* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) dot_block<A, In, 1, 8>(&x, rows + i, d, out + i, 0);
  for (; i + 4 <= n; i += 4) dot_block<A, In, 1, 4>(&x, rows + i, d, out + i, 0);
  for (; i < n; ++i) dot_block<A, In, 1, 1>(&x, rows + i, d, out + i, 0);
}

template <class A, class In, int NV>
static void scan_dot(const DotJob<A, In>& job) {
  using V = Vec<A>;
  constexpr int kCols = NV * V::kLanes;
  A c[4 * kCols];
  for (int64_t j = job.begin; j < job.end; j += kCols) {
    const int n = static_cast<int>(job.end - j < kCols ? job.end - j : kCols);
    for (int64_t r0 = 0; r0 < job.n_rows; r0 += 4) {
      const int n_rows = static_cast<int>(job.n_rows - r0 < 4 ? job.n_rows - r0 : 4);
      const A* x[4];
      for (int r = 0; r < 4; ++r) x[r] = job.x + (r0 + (r < n_rows ? r : 0)) * job.d;
      for (int l = 0; l < n; l += 4) {
        const In* w[4];  // past the end: repeats the last latent, not emitted
        for (int i = 0; i < 4; ++i) w[i] = job.w + (j + (l + i < n ? l + i : n - 1)) * job.d;
        switch (n_rows) {
          case 1:
            dot_block<A, In, 1, 4>(x, w, job.d, c + l, kCols);
            break;
          case 2:
            dot_block<A, In, 2, 4>(x, w, job.d, c + l, kCols);
            break;
          case 3:
            dot_block<A, In, 3, 4>(x, w, job.d, c + l, kCols);
            break;
          default:
            dot_block<A, In, 4, 4>(x, w, job.d, c + l, kCols);
            break;
        }
      }
      emit<A, NV>(c, r0, n_rows, n, j, job.bias ? job.bias + j : nullptr,
                  job.scale ? job.scale + j : nullptr, job.rows);
    }
  }
}

#if FASTSAE_LEVEL == 3
#include "cpu/topk_encode_bf16.inl"
#endif

// The kernels of this level for inputs In.
template <class In>
static Kernels<acc_t<In>, In> table() {
  using A = acc_t<In>;
  constexpr int kNV = 2;
  Kernels<A, In> t{};
  t.max_rows = FASTSAE_LEVEL >= 2 ? 14 : FASTSAE_LEVEL == 1 ? 6 : 4;
  t.cols = kNV * Vec<A>::kLanes;
  t.scan = scan<A, kNV>;
  t.pack = pack<A, In, kNV>;
  t.scan_dot = scan_dot<A, In, kNV>;
  t.dots = dots<A, In>;
#if FASTSAE_LEVEL >= 2
  if constexpr (sizeof(A) == 4) t.shrink = shrink;
#endif
#if FASTSAE_LEVEL == 3
  set_bf16(t);
#endif
  return t;
}

}  // namespace topk
}  // namespace FASTSAE_NS
}  // namespace fastsae
