// Kernels of topk_encode, compiled once per CPU level. No standard templates here: another
// translation unit could share them.
#include "cpu/products.inl"
#include "cpu/select.inl"

namespace fastsae {
namespace FASTSAE_NS {
namespace topk {

using namespace ::fastsae::topk;

// The tile c of rows row.. and latents first.., which are `col` of the job.
template <class A, int NV>
static inline void take(const ToRows<A>& to, const A* c, int64_t row, int n_rows, int64_t first,
                        int64_t, int n_cols) {
  emit<A, NV>(c, row, n_rows, n_cols, first, to.bias ? to.bias + first : nullptr,
              to.scale ? to.scale + first : nullptr, to.rows);
}

static inline int at_most(int64_t left, int n) { return left < n ? static_cast<int>(left) : n; }

#if FASTSAE_LEVEL == 3
#include "cpu/topk_encode_bf16.inl"
#endif

// Every tile of a job: products as of P, and where they go.
template <class P, int NV, class Job>
static void scan(const Job& job) {
  using A = typename P::A;
  constexpr int kCols = NV * Vec<A>::kLanes;
  alignas(64) A c[kMaxRows * kCols];
  const int64_t panels = (job.n_cols + kCols - 1) / kCols;
  for (int64_t block = 0; block < panels; block += job.block) {
    const int64_t block_end = block + job.block < panels ? block + job.block : panels;
    for (int64_t p = job.panel_begin; p < job.panel_end; ++p) {
      const A* a = job.a + p * job.mr * job.depth;
      const int64_t row = p * job.mr;
      const int n_rows = at_most(job.n_rows - row, job.mr);
      for (int64_t q = block; q < block_end; ++q) {
        const int64_t col = q * kCols;
        tile_rows<P, NV>(job.mr, job.depth, a, job.b + col * job.depth, false, c);
        take<A, NV>(job.to, c, row, n_rows, job.first + col, col, at_most(job.n_cols - col, kCols));
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
    const int n = at_most(job.end - j, kCols);
    const In* rows[kCols];
    for (int l = 0; l < kCols; ++l) rows[l] = job.w + (j + (l < n ? l : n - 1)) * job.d;
    stream<In, NV>(job.a, panels, job.mr, rows, job.d, job.c);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t row = p * job.mr;
      take<A, NV>(job.to, job.c + row * kCols, row, at_most(job.n_rows - row, job.mr), j, 0, n);
    }
  }
}

// The kernels of this level for inputs In.
template <class In>
static Kernels<acc_t<In>, In> table() {
  using A = acc_t<In>;
  constexpr int kNV = 2;
  Kernels<A, In> t{};
  t.max_rows = FASTSAE_LEVEL >= 2 ? 14 : FASTSAE_LEVEL == 1 ? 6 : 4;
  t.cols = kNV * Vec<A>::kLanes;
  t.per = Product<In>::kPer;
  t.scan = scan<Product<In>, kNV, PlainJob<A>>;
  t.scan_stream = scan_stream<In, kNV>;
  t.pack = pack<In, kNV>;
  t.places = places<In>;
  t.scores = pair_scores<true, In>;
  t.shrink = small_shrink<A>();
#if FASTSAE_LEVEL == 3
  if constexpr (sizeof(A) == 4 && Product<In>::kPer == 1) {  // the tiles of bf16 inputs are these
    t.scan_filter = scan<Product<bf16>, kNV, FilterJob>;
    t.prune = prune;
    t.pack_bf16 = pack_bf16<In>;
  }
#endif
  return t;
}

}  // namespace topk
}  // namespace FASTSAE_NS
}  // namespace fastsae
