// Selection while scores come: compare with the row's threshold, append, cut to the k best.
// Included by the .inl of an operator, once per CPU level; no include guard, no standard templates.

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

#endif

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

// The vectorised cut for up to kSelect candidates, or null.
template <class A>
static auto small_shrink() -> void (*)(Rows<A>&, int64_t) {
#if FASTSAE_LEVEL >= 2
  if constexpr (sizeof(A) == 4) return shrink;
#endif
  return nullptr;
}

}  // namespace topk
}  // namespace FASTSAE_NS
}  // namespace fastsae
