// The filter over inputs rounded to bf16. Part of topk_encode.inl, at the level avx512_bf16 only.

using V16 = Vec<float>;
constexpr int kBf16Cols = 32;

// Appends every latent whose upper bound reaches the row's threshold (NaN bounds always do).
template <class A, int NV>
static inline void take(const ToFilter& to, const float* c, int64_t row, int n_rows, int64_t first,
                        int64_t col, int n_cols) {
  static_assert(NV == 2, "32 latents");
  const FilterCols& cols = to.cols;
  FilterRows* rows = to.rows;
  const uint32_t valid = n_cols >= 32 ? ~0u : (1u << n_cols) - 1;
  __m512 scale[2], upper[2], norm[2], residual[2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    scale[j] = _mm512_loadu_ps(cols.scale + col + 16 * j);
    upper[j] = _mm512_loadu_ps(cols.upper + col + 16 * j);
    norm[j] = _mm512_loadu_ps(cols.norm + col + 16 * j);
    residual[j] = _mm512_loadu_ps(cols.residual + col + 16 * j);
  }
  for (int r = 0; r < n_rows; ++r, c += kBf16Cols) {
    const __m512 threshold = _mm512_set1_ps(rows->threshold[row + r]);
    const __m512 err_w = _mm512_set1_ps(rows->err_w[row + r]);
    const __m512 err_dw = _mm512_set1_ps(rows->err_dw[row + r]);
    __m512 bound[2];
    uint32_t mask = 0;
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 rank = _mm512_fmadd_ps(_mm512_load_ps(c + 16 * j), scale[j], upper[j]);
      bound[j] = _mm512_fmadd_ps(err_w, norm[j], _mm512_fmadd_ps(err_dw, residual[j], rank));
      mask |= static_cast<uint32_t>(_mm512_cmp_ps_mask(bound[j], threshold, _CMP_NLT_UQ))
              << (16 * j);
    }
    mask &= valid;
    if (__builtin_expect(mask == 0, 1)) continue;
    const int64_t base = (row + r) * rows->stride;
    int32_t n = rows->count[row + r];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j, mask >>= 16) {
      const __mmask16 m = static_cast<__mmask16>(mask);
      const __m512 rank = _mm512_fmadd_ps(_mm512_load_ps(c + 16 * j), scale[j],
                                          _mm512_loadu_ps(cols.lower + col + 16 * j));
      const __m512 lower =
          _mm512_fnmadd_ps(err_w, norm[j], _mm512_fnmadd_ps(err_dw, residual[j], rank));
      append(lower, m, rows->lower + base + n);
      append(bound[j], m, rows->upper + base + n);
      append_index(first + 16 * j, m, rows->index + base + n);
      n += __builtin_popcount(m);
    }
    rows->count[row + r] = n;
    if (n >= rows->limit[row + r]) rows->full(rows->owner, row + r);
  }
}

static void prune(FilterRows& rows, int64_t row, const float* ranks, int64_t known, int64_t k) {
  const int64_t base = row * rows.stride;
  float *lower = rows.lower + base, *upper = rows.upper + base;
  int32_t* index = rows.index + base;
  const int64_t n = rows.count[row];
  if (n + known < k || n + known > kSelect) return;
  const __m512 inf = _mm512_set1_ps(__builtin_inff());
  alignas(64) uint32_t order[kSelect + 48];
  int64_t m = 0;
  for (int64_t i = 0; i < n; i += 16, m += 16) {
    const __m512 v = _mm512_loadu_ps(lower + i);
    const __mmask16 real = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q) & first_lanes(n - i);
    _mm512_store_si512(order + m, _mm512_maskz_mov_epi32(real, order16(v)));  // NaN: knows nothing
  }
  for (int64_t i = 0; i < known; i += 16, m += 16) {
    const __m512 v = _mm512_loadu_ps(ranks + i);
    const __m512 top = _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), inf);
    _mm512_store_si512(order + m, _mm512_maskz_mov_epi32(first_lanes(known - i), order16(top)));
  }
  int64_t above = 0;
  const uint32_t kth = kth_largest(order, m, k, &above);
  if (kth < 0x00800000u) return;  // below every finite number
  const float t = threshold_from_order(kth);
  if (t > rows.threshold[row]) rows.threshold[row] = t;
  const __m512 threshold = _mm512_set1_ps(rows.threshold[row]);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 u = _mm512_loadu_ps(upper + i), l = _mm512_loadu_ps(lower + i);
    const __m512i x = _mm512_loadu_si512(index + i);
    const __mmask16 keep = _mm512_cmp_ps_mask(u, threshold, _CMP_NLT_UQ) & first_lanes(n - i);
    _mm512_storeu_ps(lower + kept, _mm512_maskz_compress_ps(keep, l));
    _mm512_storeu_ps(upper + kept, _mm512_maskz_compress_ps(keep, u));
    _mm512_storeu_si512(index + kept, _mm512_maskz_compress_epi32(keep, x));
    kept += __builtin_popcount(keep);
  }
  rows.count[row] = static_cast<int32_t>(kept);
}

// 16 values as fp32 from position i of a row of d, zero past the end.
template <class In>
static inline __m512 load_fp32(const In* row, int64_t i, int64_t d) {
  if (i + 16 <= d) return V16::load(row + i).v;
  return V16::load_n(row + i, i < d ? static_cast<int>(d - i) : 0).v;
}

static inline __m256i round_bf16(__m512 v, __m512* square, __m512* residual) {
  const __m256i h = (__m256i)_mm512_cvtneps_pbh(v);
  const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  const __m512 diff = _mm512_sub_ps(v, back);
  *square = _mm512_fmadd_ps(v, v, *square);
  *residual = _mm512_fmadd_ps(diff, diff, *residual);
  return h;
}

// 32 rows to bf16 pairs [pairs][32], with the sums of squares of the rows and of what rounding
// took.
template <class In>
static void pack_bf16(const In* const* rows, int64_t d, float* out, float* square,
                      float* residual) {
  const int64_t pairs = (d + 1) / 2;
  for (int half = 0; half < 2; ++half) {
    __m512 sq[16], re[16];
    for (int r = 0; r < 16; ++r) sq[r] = re[r] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p += 16) {
      V16 m[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const In* row = rows[half * 16 + r];
        for (int64_t i = 2 * p; i < 2 * p + 32; i += 64 / static_cast<int64_t>(sizeof(In))) {
          __builtin_prefetch(row + kBf16Cols * d + i, 0, 2);
        }
        const __m256i lo = round_bf16(load_fp32(row, 2 * p, d), &sq[r], &re[r]);
        const __m256i hi = round_bf16(load_fp32(row, 2 * p + 16, d), &sq[r], &re[r]);
        m[r].v = _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1));
      }
      transpose(m);
      const int n = static_cast<int>(pairs - p < 16 ? pairs - p : 16);
      for (int i = 0; i < n; ++i) m[i].store(out + (p + i) * kBf16Cols + half * 16);
    }
    for (int r = 0; r < 16; ++r) {
      square[half * 16 + r] = V16{sq[r]}.sum();
      residual[half * 16 + r] = V16{re[r]}.sum();
    }
  }
}
