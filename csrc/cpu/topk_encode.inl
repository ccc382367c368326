// Kernels of topk_encode, compiled once per CPU level. No standard templates here: another
// translation unit could share them.
#include "cpu/products.inl"
#include "cpu/select.inl"

namespace fastsae {
namespace FASTSAE_NS {
namespace topk {

using namespace ::fastsae::topk;

template <class In, int NV>
static void scan(const PlainJob<acc_t<In>>& job) {
  using P = Product<In>;
  using A = acc_t<In>;
  constexpr int kCols = NV * Vec<A>::kLanes;
  alignas(64) A c[kMaxRows * kCols];
  const int64_t panels = (job.n_cols + kCols - 1) / kCols;
  for (int64_t block = 0; block < panels; block += job.block) {
    const int64_t block_end = block + job.block < panels ? block + job.block : panels;
    for (int64_t p = job.panel_begin; p < job.panel_end; ++p) {
      const A* a = job.a + p * job.mr * job.depth;
      const int64_t row = p * job.mr;
      const int n_rows = static_cast<int>(job.n_rows - row < job.mr ? job.n_rows - row : job.mr);
      for (int64_t q = block; q < block_end; ++q) {
        tile_rows<P, NV>(job.mr, job.depth, a, job.b + q * kCols * job.depth, false, c);
        const int64_t col = q * kCols;
        const int n_cols = static_cast<int>(job.n_cols - col < kCols ? job.n_cols - col : kCols);
        const int64_t first = job.first + col;
        emit<A, NV>(c, row, n_rows, n_cols, first, job.bias ? job.bias + first : nullptr,
                    job.scale ? job.scale + first : nullptr, job.rows);
      }
    }
  }
}

template <class In, int NV>
static void scan_stream(const StreamJob<acc_t<In>, In>& job) {
  using A = acc_t<In>;
  constexpr int kCols = NV * Vec<A>::kLanes;
  const int64_t panels = (job.n_rows + job.mr - 1) / job.mr;
  for (int64_t j = job.begin; j < job.end; j += kCols) {
    const int n = static_cast<int>(job.end - j < kCols ? job.end - j : kCols);
    const In* rows[kCols];
    for (int l = 0; l < kCols; ++l) rows[l] = job.w + (j + (l < n ? l : n - 1)) * job.d;
    stream<In, NV>(job.a, panels, job.mr, rows, job.d, job.c);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t row = p * job.mr;
      const int n_rows = static_cast<int>(job.n_rows - row < job.mr ? job.n_rows - row : job.mr);
      emit<A, NV>(job.c + row * kCols, row, n_rows, n, j, job.bias ? job.bias + j : nullptr,
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
  t.per = Product<In>::kPer;
  t.scan = scan<In, kNV>;
  t.scan_stream = scan_stream<In, kNV>;
  t.pack = pack<In, kNV>;
  t.places = places<In>;
  t.scores = pair_scores<true, In>;
  t.shrink = small_shrink<A>();
#if FASTSAE_LEVEL == 3
  set_filter(t);
#endif
  return t;
}

}  // namespace topk
}  // namespace FASTSAE_NS
}  // namespace fastsae
