// topk_encode: the k best of x W_enc^T + b_enc per row, exact, without [N, F].
//
// Chunks of latents are packed, multiplied tile by tile against packed rows, and each tile is
// compared with its rows' thresholds in the epilogue; what passes goes into a buffer per row that
// is cut to the k best when it is full. Three ways to score:
//   dot     few rows: W is streamed once, nothing is packed
//   plain   products in the accumulation type (bf16 inputs: bf16 products, exact, fp32 sums)
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
// Measured on Zen 4 at D = 768, F = 24576 (benchmarks/NOTES.md): up to so many rows streaming W
// beats packing it; more where only fp32 products come after packing.
constexpr int64_t kDotRows = 12;
constexpr int64_t kDotRowsWide = 48;    // AVX-512, fp32 products
constexpr int64_t kFilterRows = 16;     // and 8 a thread, so that every thread has a panel
constexpr int64_t kFilterRatio = 24;    // F / k below which too many pairs are rescored
constexpr double kRescoreLimit = 0.08;  // share of rescored pairs beyond which the filter loses

// Last call: [path (0 dot, 1 plain, 2 filter, 3 filter then plain), rows, latents, rescored pairs].
std::atomic<int64_t> g_stats[4];

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Uninitialised, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n = 0) { resize(n); }
  void resize(int64_t n) {
    if (n <= 0) return;
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(n) * sizeof(T)) != 0) throw std::bad_alloc();
    data_.reset(static_cast<T*>(p));
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  std::unique_ptr<T, Free> data_;
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows per panel: the smallest microkernel that needs no more panels than the widest.
int panel_rows(int64_t n, int widest) {
  const int64_t panels = (n + widest - 1) / widest;
  const int64_t need = (n + panels - 1) / panels;
  for (int mr : {1, 2, 4, 6, 8, 10, 12, 14}) {
    if (mr >= need) return std::min(mr, widest);
  }
  return widest;
}

// sqrt of a sum of `terms` squares accumulated in fp32 lanes, rounded up. Anything that could
// overflow later becomes inf. The constant covers squares that underflowed.
inline float norm_above(float square, int64_t terms) {
  const double rounding = 1.0 + static_cast<double>(terms / 16 + 32) * 0x1p-23;
  const double norm =
      std::sqrt(static_cast<double>(square) * rounding + static_cast<double>(terms) * 0x1p-125) *
      (1 + 0x1p-22);
  return norm <= 0x1p40 ? static_cast<float>(norm) : std::numeric_limits<float>::infinity();
}

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
        indices_(indices) {
    bias_ = widened(bias, bias_store_, f);
    scale_ = widened(scale, scale_store_, f);
    threads_ = std::max<int64_t>(1, torch::stable::get_num_threads());
    capacity_ = k + std::max<int64_t>(k, 64);
    if (capacity_ > f + 1) capacity_ = std::max(f, k) + 1;  // a row never holds more than F
  }

  void run() {
    const char* force = std::getenv("FASTSAE_TOPK_ENCODE_PATH");
    const std::string path = force ? force : "";
    STD_TORCH_CHECK(path.empty() || path == "dot" || path == "plain" || path == "filter", kOp,
                    ": FASTSAE_TOPK_ENCODE_PATH must be dot, plain or filter, got ", path);
    constexpr bool exact16 = std::is_same<In, bf16>::value;
    const bool packs = kMaxCols * round_up(d_, 2) * int64_t(sizeof(A)) <= (8 << 20);
    const bool can_filter = kernels_.scan_filter && !exact16 && packs;
    bool filter = can_filter && n_ >= std::max(kFilterRows, 8 * threads_) && d_ >= 64 &&
                  k_ * kFilterRatio <= f_ && k_ <= 1024;
    const bool wide = kernels_.cols == kMaxCols && !plain_bf16();
    bool dot = !packs || (!filter && n_ <= (wide ? kDotRowsWide : kDotRows));
    if (path == "dot") dot = true;
    if (path == "plain" && packs) dot = filter = false;
    if (path == "filter" && can_filter && k_ <= 1024) filter = true, dot = false;
    g_stats[0] = dot ? 0 : filter ? 2 : 1;
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
      if (dot) {
        run_dot(r, n);
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

  // Rows r.. of x as [panels][D][mr], zero past n.
  void pack_rows(int64_t r, int64_t n, int mr, A* out) const {
    const int64_t panels = (n + mr - 1) / mr;
    parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        A* panel = out + p * mr * d_;
        for (int i = 0; i < mr; ++i) {
          const int64_t row = p * mr + i;
          const In* src = x_ + (r + row) * d_;
          if (row < n) {
            for (int64_t d = 0; d < d_; ++d) panel[d * mr + i] = widen(src[d]);
          } else {
            for (int64_t d = 0; d < d_; ++d) panel[d * mr + i] = A(0);
          }
        }
      }
    });
  }

  // Rows as bf16 pairs [panels][pairs][mr]; square and residual [n] unless null.
  void pack_rows_bf16(int64_t r, int64_t n, int mr, uint32_t* out, float* square,
                      float* residual) const {
    const int64_t pairs = (d_ + 1) / 2, panels = (n + mr - 1) / mr;
    parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
      Buffer<uint32_t> tmp(pairs * kMaxCols);
      float sq[kMaxCols], re[kMaxCols];
      for (int64_t p = begin; p < end; ++p) {
        const In* rows[kMaxCols] = {};
        for (int i = 0; i < mr && p * mr + i < n; ++i) rows[i] = x_ + (r + p * mr + i) * d_;
        kernels_.pack_bf16(rows, d_, tmp.get(), sq, re);
        uint32_t* panel = out + p * mr * pairs;
        for (int64_t q = 0; q < pairs; ++q) {
          for (int i = 0; i < mr; ++i) panel[q * mr + i] = tmp[q * kMaxCols + i];
        }
        for (int i = 0; square && i < mr && p * mr + i < n; ++i) {
          square[p * mr + i] = sq[i];
          residual[p * mr + i] = re[i];
        }
      }
    });
  }

  void latent_rows(int64_t first, int64_t end, int cols, const In** rows) const {
    for (int i = 0; i < cols; ++i) rows[i] = first + i < end ? w_ + (first + i) * d_ : nullptr;
  }

  // Latents [begin, end) into panels of `out`; q_begin.. q_end of those panels.
  void pack_latents(bool use_bf16, int64_t begin, int64_t end, int64_t q_begin, int64_t q_end,
                    void* out) const {
    const In* rows[kMaxCols];
    for (int64_t q = q_begin; q < q_end; ++q) {
      const int cols = use_bf16 ? kernels_.bf16_cols : kernels_.cols;
      latent_rows(begin + q * cols, end, cols, rows);
      if (use_bf16) {
        kernels_.pack_bf16(rows, d_, static_cast<uint32_t*>(out) + q * cols * ((d_ + 1) / 2),
                           nullptr, nullptr);
      } else {
        kernels_.pack(rows, d_, static_cast<A*>(out) + q * cols * d_);
      }
    }
  }

  // The same for the filter, with the per-latent side of the error bound.
  void pack_filter(int64_t begin, int64_t end, int64_t q_begin, int64_t q_end, uint32_t* out,
                   const FilterCols& fc) const {
    const int cols = kernels_.bf16_cols;
    const In* rows[kMaxCols];
    float square[kMaxCols], residual[kMaxCols];
    constexpr float kInf = std::numeric_limits<float>::infinity();
    for (int64_t q = q_begin; q < q_end; ++q) {
      latent_rows(begin + q * cols, end, cols, rows);
      kernels_.pack_bf16(rows, d_, out + q * cols * ((d_ + 1) / 2), square, residual);
      for (int i = 0; i < cols; ++i) {
        const int64_t c = q * cols + i, j = begin + c;
        const double scale = scale_ && j < end ? double(scale_[j]) : 1.0;
        const double bias = bias_ && j < end ? double(bias_[j]) : 0.0;
        // Roundings after the sums, and results that flush to zero (at most 2^-126 each).
        const double slack = std::abs(bias) * 0x1p-20 + static_cast<double>(d_ + 8) * 0x1p-124;
        const double dw = norm_above(residual[i], d_), norm = norm_above(square[i], d_) + dw;
        const bool tame = std::abs(scale) <= 0x1p40 && std::abs(bias) <= 0x1p40;
        // Not below 2^-60: the products of norms must not become denormal, which would lose bits.
        const double size = std::max(std::abs(scale), 0x1p-60);
        fc.scale[c] = static_cast<float>(scale);
        fc.upper[c] = static_cast<float>(bias * scale + (slack * size + 0x1p-120));
        fc.lower[c] = static_cast<float>(bias * scale - (slack * size + 0x1p-120));
        fc.norm[c] = tame ? static_cast<float>(norm * size * (1 + 0x1p-20)) : kInf;
        fc.residual[c] = tame ? static_cast<float>(dw * size * (1 + 0x1p-20)) : kInf;
      }
    }
  }

  // Exact products of bf16 inputs where the CPU has them, else products in A.
  bool plain_bf16() const { return std::is_same<In, bf16>::value && kernels_.scan_bf16; }

  // One row's scores of the latents listed, with the plain path's own order of summation.
  void plain_scores(const void* a, int64_t row, int mr, const int32_t* latents, int64_t n,
                    A* out) const {
    const bool use_bf16 = plain_bf16();
    const int64_t depth = use_bf16 ? (d_ + 1) / 2 : d_;
    const int cols = use_bf16 ? kernels_.bf16_cols : kernels_.cols;
    Buffer<A> panel(cols * depth), x(depth);
    // One row out of its panel; a bf16 pair is copied as the 4 bytes that it is.
    for (int64_t d = 0; d < depth; ++d) {
      x[d] = static_cast<const A*>(a)[(row / mr) * mr * depth + d * mr + row % mr];
    }
    A ranks[2 * kSlack], threshold;
    int32_t index[2 * kSlack];
    int64_t count;
    for (int64_t i = 0; i < n; i += cols) {
      const In* rows[kMaxCols];
      const int m = static_cast<int>(std::min<int64_t>(cols, n - i));
      for (int c = 0; c < cols; ++c) rows[c] = c < m ? w_ + int64_t(latents[i + c]) * d_ : nullptr;
      PlainJob<A> job{};
      job.depth = depth, job.mr = 1, job.panel_end = 1, job.n_rows = 1;
      job.a = x.get(), job.b = panel.get(), job.n_cols = m, job.block = 1;
      Rows<A> sink{ranks, index, &threshold, &count, kMaxCols + 1, 0, kMaxCols, shrink_any<A>};
      threshold = std::numeric_limits<A>::quiet_NaN();
      count = 0;
      job.rows = &sink;
      if (use_bf16) {
        kernels_.pack_bf16(rows, d_, reinterpret_cast<uint32_t*>(panel.get()), nullptr, nullptr);
        if constexpr (std::is_same<A, float>::value) kernels_.scan_bf16(job);
      } else {
        kernels_.pack(rows, d_, panel.get());
        kernels_.scan(job);
      }
      for (int c = 0; c < m; ++c) out[i + index[c]] = ranks[c];
    }
  }

  A rank_of(A score, int64_t latent) const {
    if (bias_) score += bias_[latent];
    return scale_ ? score * scale_[latent] : score;
  }

  // Sorts row `row` of `rows` and writes it to output row `out`. Scaled ranks say nothing about the
  // values, which are then scored again: `score(row, latents, n, out)`.
  template <class Score>
  void write_row(Rows<A>& rows, int64_t row, int64_t out, const Score& score) const {
    rows.shrink(rows, row);
    static thread_local std::vector<Key> keys;
    keys.resize(k_);
    for (int64_t i = 0; i < k_; ++i) {
      keys[i] = make_key<A>(rows.rank[row * rows.stride + i], rows.index[row * rows.stride + i]);
    }
    std::sort(keys.begin(), keys.end(), std::greater<Key>());
    int32_t* index = indices_ + out * k_;
    for (int64_t i = 0; i < k_; ++i) index[i] = key_index<A>(keys[i]);
    constexpr int64_t kBatch = 256;
    A scores[kBatch];
    for (int64_t i0 = 0; i0 < k_; i0 += kBatch) {
      const int64_t n = std::min(kBatch, k_ - i0);
      if (scale_) {
        score(row, index + i0, n, scores);
        for (int64_t i = 0; bias_ && i < n; ++i) scores[i] += bias_[index[i0 + i]];
      } else {
        for (int64_t i = 0; i < n; ++i) scores[i] = key_rank<A>(keys[i0 + i]);
      }
      for (int64_t i = 0; i < n; ++i) {
        const A v = relu_ && scores[i] <= A(0) ? A(0) : scores[i];  // NaN stays
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

  void run_dot(int64_t r, int64_t n) {
    const int64_t groups = groups_for(n);
    std::vector<RowState> states(groups);
    for (auto& s : states) init_rows(s, n);
    Buffer<A> store;
    const A* x = widened(x_ + r * d_, store, n * d_);
    const int64_t per = round_up((f_ + groups - 1) / groups, kMaxCols);
    parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        DotJob<A, In> job{d_,    n,      std::min(f_, g * per), std::min(f_, (g + 1) * per), x, w_,
                          bias_, scale_, &states[g].rows};
        kernels_.scan_dot(job);
      }
    });
    for (int64_t row = 0; row < n; ++row) {
      merge(states, row);
      write_row(states[0].rows, row, r + row,
                [&](int64_t i, const int32_t* list, int64_t m, A* out) {
                  dot_scores(x + i * d_, list, m, out);
                });
    }
  }

  void dot_scores(const A* x, const int32_t* latents, int64_t n, A* out) const {
    const In* rows[8];
    for (int64_t i = 0; i < n; i += 8) {
      const int64_t m = std::min<int64_t>(8, n - i);
      for (int64_t t = 0; t < m; ++t) rows[t] = w_ + int64_t(latents[i + t]) * d_;
      kernels_.dots(x, rows, m, d_, out + i);
    }
  }

  // Groups of latents that run side by side, each with its own row states.
  int64_t groups_for(int64_t n) const {
    const int64_t bytes = n * row_stride() * int64_t(sizeof(A) + 4);
    return std::max<int64_t>(1, std::min(threads_, std::min(f_ / 256, (16 << 20) / bytes)));
  }

  int64_t chunk_latents(bool use_bf16, int cols, int64_t bytes) const {
    const int64_t row = use_bf16 ? round_up(d_, 2) * 2 : d_ * int64_t(sizeof(A));
    return std::min(round_up(f_, cols), std::max<int64_t>(cols, bytes / row / cols * cols));
  }

  PlainJob<A> plain_job(const void* a, int64_t n, int mr, bool use_bf16, Rows<A>* rows) const {
    PlainJob<A> job{};
    job.depth = use_bf16 ? (d_ + 1) / 2 : d_;
    job.mr = mr;
    job.panel_end = (n + mr - 1) / mr;
    job.n_rows = n;
    job.a = a;
    const int cols = use_bf16 ? kernels_.bf16_cols : kernels_.cols;
    job.block = std::max<int64_t>(1, kBlockBytes / (cols * job.depth * int64_t(sizeof(A))));
    job.bias = bias_;
    job.scale = scale_;
    job.rows = rows;
    return job;
  }

  void scan_plain(const PlainJob<A>& job, bool use_bf16) const {
    if constexpr (std::is_same<A, float>::value) {
      if (use_bf16) return kernels_.scan_bf16(job);
    }
    kernels_.scan(job);
  }

  // Latents [first, F) by the plain path over rows already packed; all rows in one group.
  void plain_chunks(const void* a, int64_t n, int mr, int64_t first, Rows<A>* rows) const {
    const bool use_bf16 = plain_bf16();
    const int cols = use_bf16 ? kernels_.bf16_cols : kernels_.cols;
    const int64_t chunk = chunk_latents(use_bf16, cols, kChunkBytes);
    const PlainJob<A> base = plain_job(a, n, mr, use_bf16, rows);
    Buffer<A> packed(chunk * base.depth);
    for (int64_t c = first; c < f_; c += chunk) {
      const int64_t c_end = std::min(f_, c + chunk);
      parallel_for(0, (c_end - c + cols - 1) / cols, 2, [&](int64_t begin, int64_t end) {
        pack_latents(use_bf16, c, c_end, begin, end, packed.get());
      });
      parallel_ranges(base.panel_end, mr * (c_end - c) * d_, [&](int64_t begin, int64_t end) {
        PlainJob<A> job = base;
        job.panel_begin = begin, job.panel_end = end;
        job.b = packed.get(), job.n_cols = c_end - c, job.first = c;
        scan_plain(job, use_bf16);
      });
    }
  }

  void run_plain(int64_t r, int64_t n) {
    const bool use_bf16 = plain_bf16();
    const int widest = use_bf16 ? kernels_.bf16_max_rows : kernels_.max_rows;
    const int mr = panel_rows(n, widest);
    const int64_t panels = (n + mr - 1) / mr, depth = use_bf16 ? (d_ + 1) / 2 : d_;
    Buffer<A> a(panels * mr * depth);
    if (use_bf16) {
      pack_rows_bf16(r, n, mr, reinterpret_cast<uint32_t*>(a.get()), nullptr, nullptr);
    } else {
      pack_rows(r, n, mr, a.get());
    }
    const int64_t groups = panels >= 4 * threads_ ? 1 : groups_for(n);
    std::vector<RowState> states(groups);
    for (auto& s : states) init_rows(s, n);
    if (groups == 1) {
      plain_chunks(a.get(), n, mr, 0, &states[0].rows);
    } else {
      const int cols = use_bf16 ? kernels_.bf16_cols : kernels_.cols;
      const int64_t per = round_up((f_ + groups - 1) / groups, cols);
      parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
          PlainJob<A> job = plain_job(a.get(), n, mr, use_bf16, &states[g].rows);
          const int64_t chunk = chunk_latents(use_bf16, cols, kBlockBytes);
          Buffer<A> packed(chunk * depth);
          const int64_t g_end = std::min(f_, (g + 1) * per);
          for (int64_t c = g * per; c < g_end; c += chunk) {
            const int64_t c_end = std::min(g_end, c + chunk);
            pack_latents(use_bf16, c, c_end, 0, (c_end - c + cols - 1) / cols, packed.get());
            job.b = packed.get(), job.n_cols = c_end - c, job.first = c;
            scan_plain(job, use_bf16);
          }
        }
      });
    }
    write_plain(states, a.get(), mr, r, n);
  }

  void write_plain(std::vector<RowState>& states, const void* a, int mr, int64_t r, int64_t n) {
    parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        merge(states, row);
        write_row(states[0].rows, row, r + row,
                  [&](int64_t i, const int32_t* list, int64_t m, A* out) {
                    plain_scores(a, i, mr, list, m, out);
                  });
      }
    });
  }

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
  const A *bias_, *scale_;
  Buffer<A> bias_store_, scale_store_;
  int64_t threads_, capacity_;
};

#include "cpu/topk_encode_filter.h"

template <class In>
void encode(const Tensor& x, const Tensor& w, const In* bias, const In* scale, int64_t k, bool relu,
            Tensor& values, Tensor& indices) {
  Encoder<In>(cpu_level(), data<In>(x), data<In>(w), bias, scale, x.size(0), x.size(1), w.size(0),
              k, relu, mutable_data<In>(values), mutable_data<int32_t>(indices))
      .run();
}

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
