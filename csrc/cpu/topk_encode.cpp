// topk_encode: the k best of x W_enc^T + b_enc per row, exact, without [N, F].
//
// Latents are packed, multiplied tile by tile against packed rows, and each tile is compared with
// its rows' thresholds in the epilogue; what passes goes into a buffer per row that is cut to the k
// best when it is full. Three ways to score, of which every one gives a pair the same score
// (products.inl):
//   stream  few rows: a panel of W at a time goes through L1
//   plain   chunks of W are packed for all rows
//   filter  fp32 and fp16 where the CPU has bf16 products: scores of rounded inputs with a proven
//           error bound per pair; only pairs whose bound reaches the threshold are scored in fp32
#include "cpu/topk_encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernels.h"

#define FASTSAE_KERNEL "cpu/topk_encode.inl"
#define FASTSAE_KERNEL_BF16
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

using namespace topk;
using torch::stable::parallel_for;

constexpr const char* kOp = "topk_encode";
constexpr int64_t kChunkBytes = 4 << 20;    // packed latents of one chunk
constexpr int64_t kBlockBytes = 384 << 10;  // packed latents that stay in L2 beside the row panels
constexpr int64_t kRescoreBytes = 8 << 20;  // rows of W that rescoring goes over at a time
constexpr int64_t kRowBytes = 28 << 20;     // everything that is kept per row of a super-block
// Rows up to which streaming W beats packing it, at every level (benchmarks/notes/topk_encode.md).
// It also serves more rows where they make too few panels for the threads to share.
constexpr int64_t kStreamRows = 128;
constexpr int64_t kStreamPanels = 4;    // a thread
constexpr int64_t kFilterRows = 32;     // and 8 a thread, so that every thread has a panel
constexpr int64_t kFilterRatio = 24;    // F / k below which too many pairs are rescored
constexpr double kRescoreLimit = 0.08;  // share of rescored pairs beyond which the filter loses

// Last call: [path (0 stream, 1 plain, 2 filter, 3 filter then plain), rows, latents, rescored
// pairs].
std::atomic<int64_t> g_stats[4];

#include "cpu/topk_encode_pack.h"

template <class In>
Kernels<acc_t<In>, In> kernels_at(CpuLevel level) {
#if FASTSAE_X86
#if FASTSAE_X86_BF16
  if (level == CpuLevel::kAvx512Bf16) return avx512_bf16::topk::table<In>();
#endif
  if (level >= CpuLevel::kAvx512) return avx512::topk::table<In>();
  if (level == CpuLevel::kAvx2) return avx2::topk::table<In>();
#endif
  (void)level;
  return portable::topk::table<In>();
}

template <class In>
class Encoder {
 public:
  using A = acc_t<In>;
  using Key = typename KeyOf<A>::Key;
  static constexpr int64_t kBatch = 64;  // pairs scored at a time

  Encoder(CpuLevel level, const In* x, const In* w, const In* bias, const In* scale, int64_t n,
          int64_t d, int64_t f, int64_t k, bool relu, In* values, int32_t* indices)
      : kernels_(kernels_at<In>(level)),
        x_(x),
        w_(w),
        n_(n),
        d_(d),
        f_(f),
        k_(k),
        relu_(relu),
        values_(values),
        indices_(indices),
        bias_(widened(bias, bias_store_, f)),
        scale_(widened(scale, scale_store_, f)),
        pack_(kernels_, x, w, d, bias_, scale_) {
    threads_ = std::max<int64_t>(1, torch::stable::get_num_threads());
    capacity_ = k + std::max<int64_t>(k, 64);
    if (capacity_ > f + 1) capacity_ = std::max(f, k) + 1;  // a row never holds more than F
  }

  void run() {
    const char* force = std::getenv("FASTSAE_TOPK_ENCODE_PATH");
    const std::string path = force ? force : "";
    STD_TORCH_CHECK(path.empty() || path == "stream" || path == "plain" || path == "filter", kOp,
                    ": FASTSAE_TOPK_ENCODE_PATH must be stream, plain or filter, got ", path);
    const bool packs = kMaxCols * round_up(d_, 2) * int64_t(sizeof(A)) <= (8 << 20);
    const bool can_filter = kernels_.scan_filter && packs;
    bool filter = can_filter && n_ >= std::max(kFilterRows, 8 * threads_) && d_ >= 64 &&
                  k_ * kFilterRatio <= f_ && k_ <= 1024;
    const int64_t panels = n_ / kernels_.max_rows;
    bool stream = !packs || (!filter && (n_ <= kStreamRows || panels < kStreamPanels * threads_));
    if (path == "stream") stream = true;
    if (path == "plain" && packs) stream = filter = false;
    if (path == "filter" && can_filter && k_ <= 1024) filter = true, stream = false;
    g_stats[0] = stream ? 0 : filter ? 2 : 1;
    g_stats[1] = n_;
    g_stats[2] = f_;
    g_stats[3] = 0;
    int64_t row_bytes = row_stride() * (sizeof(A) + 4) + 32 + d_ * sizeof(A);
    if (filter) row_bytes += d_ * 2 + pending_stride() * 12;
    const int64_t most = std::max<int64_t>(1, kRowBytes / row_bytes);
    const int64_t blocks = (n_ + most - 1) / most;
    const int64_t rows = (n_ + blocks - 1) / blocks;
    for (int64_t r = 0; r < n_; r += rows) {
      const int64_t n = std::min(rows, n_ - r);
      if (stream) {
        run_stream(r, n);
      } else if (filter) {
        run_filter(r, n);
      } else {
        run_plain(r, n);
      }
    }
  }

  void bounds(float* lower, float* upper, float* exact);

 private:
  // Bias and scale as A, for the whole of F.
  static const A* widened(const In* p, Buffer<A>& store, int64_t f) {
    if (!p) return nullptr;
    if constexpr (std::is_same<In, A>::value) {
      (void)store, (void)f;
      return p;
    } else {
      store.resize(f);
      for (int64_t i = 0; i < f; ++i) store[i] = widen(p[i]);
      return store.get();
    }
  }

  // Candidates of a row that wait for rescoring; with what is known they must fit kSelect.
  int64_t pending_capacity() const {
    return std::min<int64_t>(6 * k_ + 192, kSelect - capacity_ - 64);
  }
  int64_t pending_stride() const { return pending_capacity() + 2 * kSlack; }

  struct RowState {
    Buffer<A> rank;
    Buffer<int32_t> index;
    Buffer<A> threshold;
    Buffer<int64_t> count;
    Rows<A> rows;
  };

  // Whole vectors: the selection reads to the end of the one that holds a row's last candidate.
  int64_t row_stride() const { return round_up(capacity_ + kSlack, 16); }

  void init_rows(RowState& s, int64_t n) const {
    const int64_t stride = row_stride();
    s.rank.resize(n * stride);
    s.index.resize(n * stride);
    s.threshold.resize(n);
    s.count.resize(n);
    std::fill_n(s.threshold.get(), n, std::numeric_limits<A>::quiet_NaN());
    std::fill_n(s.count.get(), n, 0);
    const bool small = kernels_.shrink && row_stride() <= kSelect;
    s.rows = {s.rank.get(),
              s.index.get(),
              s.threshold.get(),
              s.count.get(),
              capacity_,
              stride,
              k_,
              small ? kernels_.shrink : shrink_any<A>};
  }

  A rank_of(A score, int64_t latent) const {
    if (bias_) score += bias_[latent];
    return scale_ ? score * scale_[latent] : score;
  }

  // The row of x as places: itself, or a copy in `store`.
  const A* places(int64_t row, std::vector<A>& store) const {
    const In* x = x_ + row * d_;
    if constexpr (std::is_same<In, A>::value) {
      (void)store;
      return x;
    } else {
      store.resize(pack_.depth());
      kernels_.places(x, d_, store.data());
      return store.data();
    }
  }

  // The scores of listed latents, x as places.
  void scores(const A* x, const int32_t* latents, int64_t n, A* out) const {
    const In* rows[kBatch];
    for (int64_t i = 0; i < n; i += kBatch) {
      const int64_t m = std::min(kBatch, n - i);
      for (int64_t t = 0; t < m; ++t) rows[t] = w_ + int64_t(latents[i + t]) * d_;
      kernels_.scores(&x, rows, m, d_, out + i);
    }
  }

  // Sorts row `row` of `rows` and writes it to output row `out`. Scaled ranks say nothing about the
  // values, which are then scored again.
  void write_row(Rows<A>& rows, int64_t row, int64_t out) const {
    rows.shrink(rows, row);
    static thread_local std::vector<Key> keys;
    keys.resize(k_);
    for (int64_t i = 0; i < k_; ++i) {
      keys[i] = make_key<A>(rows.rank[row * rows.stride + i], rows.index[row * rows.stride + i]);
    }
    std::sort(keys.begin(), keys.end(), std::greater<Key>());
    int32_t* index = indices_ + out * k_;
    for (int64_t i = 0; i < k_; ++i) index[i] = key_index<A>(keys[i]);
    static thread_local std::vector<A> store;
    const A* x = scale_ ? places(out, store) : nullptr;
    A score[kBatch];
    for (int64_t i0 = 0; i0 < k_; i0 += kBatch) {
      const int64_t n = std::min(kBatch, k_ - i0);
      if (scale_) {
        scores(x, index + i0, n, score);
        for (int64_t i = 0; bias_ && i < n; ++i) score[i] += bias_[index[i0 + i]];
      } else {
        for (int64_t i = 0; i < n; ++i) score[i] = key_rank<A>(keys[i0 + i]);
      }
      for (int64_t i = 0; i < n; ++i) {
        const A v = relu_ && score[i] <= A(0) ? A(0) : score[i];  // NaN stays
        values_[out * k_ + i0 + i] = narrow<In>(v);
      }
    }
  }

  // Merges the groups' states into the first (later groups hold later latents).
  void merge(std::vector<RowState>& groups, int64_t row) const {
    for (size_t g = 1; g < groups.size(); ++g) {
      const Rows<A>& from = groups[g].rows;
      Rows<A>& to = groups[0].rows;
      for (int64_t i = 0; i < from.count[row]; ++i) {
        to.add(row, from.rank[row * from.stride + i], from.index[row * from.stride + i]);
      }
    }
  }

  // Rows r.. of the output, from the states of their groups.
  void write(std::vector<RowState>& states, int64_t r, int64_t n) const {
    parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        merge(states, row);
        write_row(states[0].rows, row, r + row);
      }
    });
  }

  // Latents of which a chunk of kChunkBytes packs so many.
  int64_t chunk_latents(int64_t row_bytes) const {
    const int64_t cols = kernels_.cols;
    return std::min(round_up(f_, cols), std::max(cols, kChunkBytes / row_bytes / cols * cols));
  }

  // Rows of x as [panels][depth][mr].
  struct Panels {
    int mr;
    int64_t panels;
    Buffer<A> places;
  };
  Panels pack_rows(int64_t r, int64_t n) const;
  void run_stream(int64_t r, int64_t n);
  void run_plain(int64_t r, int64_t n);
  void scan_chunks(const Panels& x, int64_t n, int64_t first, Rows<A>* rows) const;

  struct Filter;
  void run_filter(int64_t r, int64_t n);
  void row_errors(int64_t n, float* err_w, float* err_dw) const;
  void rescore_all(Filter& filter, int64_t n, int64_t n_latents) const;

  Kernels<A, In> kernels_;
  const In *x_, *w_;
  int64_t n_, d_, f_, k_;
  bool relu_;
  In* values_;
  int32_t* indices_;
  Buffer<A> bias_store_, scale_store_;
  const A *bias_, *scale_;
  Packing<In> pack_;
  int64_t threads_, capacity_;
};

#include "cpu/topk_encode_filter.h"
#include "cpu/topk_encode_plain.h"

template <class In>
void encode(const Tensor& x, const Tensor& w, const In* bias, const In* scale, int64_t k, bool relu,
            Tensor& values, Tensor& indices) {
  Encoder<In>(cpu_level(), data<In>(x), data<In>(w), bias, scale, x.size(0), x.size(1), w.size(0),
              k, relu, mutable_data<In>(values), mutable_data<int32_t>(indices))
      .run();
}

}  // namespace

std::tuple<Tensor, Tensor> topk_encode_cpu(const Tensor& x, const Tensor& W_enc,
                                           const std::optional<Tensor>& b_enc, int64_t k, bool relu,
                                           const std::optional<Tensor>& rank_scale) {
  const int64_t N = x.size(0), D = x.size(1), F = W_enc.size(0);
  const ScalarType dtype = x.scalar_type();
  check_tensor(kOp, "x", x, {N, D}, dtype);
  check_tensor(kOp, "W_enc", W_enc, {F, D}, dtype);
  if (b_enc) check_tensor(kOp, "b_enc", *b_enc, {F}, dtype);
  if (rank_scale) check_tensor(kOp, "rank_scale", *rank_scale, {F}, dtype);
  STD_TORCH_CHECK(k >= 1 && k <= F, kOp, ": k must lie in [1, ", F, "], got ", k);
  STD_TORCH_CHECK(F < (int64_t(1) << 31), kOp, ": F must be below 2^31, got ", F);
  Tensor values = torch::stable::new_empty(x, {N, k});
  Tensor indices = torch::stable::new_empty(x, {N, k}, ScalarType::Int);
  if (N == 0) return {values, indices};
  with_float_type(dtype, kOp, [&](auto zero) {
    using In = decltype(zero);
    encode<In>(x, W_enc, b_enc ? data<In>(*b_enc) : nullptr,
               rank_scale ? data<In>(*rank_scale) : nullptr, k, relu, values, indices);
  });
  return {values, indices};
}

namespace {

// lower, upper [N, F]: the filter's bounds; exact [N, F]: the fp32 scores they must enclose.
std::tuple<Tensor, Tensor, Tensor> topk_encode_bounds(const Tensor& x, const Tensor& W_enc,
                                                      const Tensor& b_enc) {
  const int64_t N = x.size(0), D = x.size(1), F = W_enc.size(0);
  check_tensor(kOp, "x", x, {N, D}, ScalarType::Float);
  check_tensor(kOp, "W_enc", W_enc, {F, D}, ScalarType::Float);
  check_tensor(kOp, "b_enc", b_enc, {F}, ScalarType::Float);
  STD_TORCH_CHECK(cpu_level() == CpuLevel::kAvx512Bf16, kOp, ": bounds need bf16 products");
  Tensor lower = torch::stable::new_empty(x, {N, F}), upper = torch::stable::new_empty(x, {N, F});
  Tensor exact = torch::stable::new_empty(x, {N, F});
  Encoder<float>(cpu_level(), data<float>(x), data<float>(W_enc), data<float>(b_enc), nullptr, N, D,
                 F, 1, false, nullptr, nullptr)
      .bounds(mutable_data<float>(lower), mutable_data<float>(upper), mutable_data<float>(exact));
  return {lower, upper, exact};
}

Tensor topk_encode_stats() {
  Tensor out = torch::stable::empty({4}, ScalarType::Long);
  for (int i = 0; i < 4; ++i) mutable_data<int64_t>(out)[i] = g_stats[i];
  return out;
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("topk_encode_cpu", TORCH_BOX(&fastsae::topk_encode_cpu));
  m.impl("_topk_encode_bounds", TORCH_BOX(&fastsae::topk_encode_bounds));
}
STABLE_TORCH_LIBRARY_IMPL(fastsae, CompositeExplicitAutograd, m) {
  m.impl("_topk_encode_stats", TORCH_BOX(&fastsae::topk_encode_stats));
}
