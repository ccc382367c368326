// Kernels of topk_encode, compiled once per CPU level. No standard templates here: another
// translation unit could share them.
#include "cpu/select.inl"

namespace fastsae {
namespace FASTSAE_NS {
namespace topk {

using namespace ::fastsae::topk;

#if FASTSAE_LEVEL >= 2
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
  t.shrink = small_shrink<A>();
#if FASTSAE_LEVEL == 3
  set_bf16(t);
#endif
  return t;
}

}  // namespace topk
}  // namespace FASTSAE_NS
}  // namespace fastsae
