// topk_encode: the k best of x W_enc^T + b_enc per row, exact, without [N, F].
//
// Latents are packed, multiplied tile by tile against packed rows, and each tile is compared with
// its rows' thresholds in the epilogue; what passes goes into a buffer per row that is cut to the k
// best when it is full. Three ways to score, of which every one gives a pair the same score
// (products.inl):
//   stream  few rows: a panel of W at a time goes through L1
//   plain   chunks of W are packed for all rows
//   bounded fp32 and fp16 where the CPU has bf16 products: scores of rounded inputs with a proven
//           error bound per pair; only pairs whose bound reaches the threshold are scored in fp32
#include "cpu/topk_encode.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

#include "cpu/kernels.h"
#include "cpu/topk_encode_bounded.h"
#include "cpu/topk_encode_plain.h"
#include "cpu/topk_encode_problem.h"
#include "cpu/topk_encode_stream.h"

#define FASTSAE_KERNEL "cpu/topk_encode.inl"
#define FASTSAE_KERNEL_BF16
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

using namespace topk;

constexpr const char* kOp = "topk_encode";
constexpr int64_t kRowBytes = 28 << 20;  // everything that is kept per row of a super-block
// Rows up to which streaming W beats packing it, at every level (benchmarks/notes/topk_encode.md).
// It also serves more rows where they make too few panels for the threads to share.
constexpr int64_t kStreamRows = 128;
constexpr int64_t kStreamPanels = 4;  // a thread
constexpr int64_t kFilterRows = 32;   // and 8 a thread, so that every thread has a panel
constexpr int64_t kFilterRatio = 24;  // F / k below which too many pairs are rescored

enum Design : int64_t { kStream = 0, kPlain = 1, kBounded = 2, kBoundedThenPlain = 3 };
std::atomic<int64_t> g_stats[4];  // of the last call: design, rows, latents, rescored pairs

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

// Which design takes a problem.
template <class In>
Design design_of(const Problem<In>& p) {
  const char* force = std::getenv("FASTSAE_TOPK_ENCODE_DESIGN");
  const std::string asked = force ? force : "";
  STD_TORCH_CHECK(asked.empty() || asked == "stream" || asked == "plain" || asked == "bounded", kOp,
                  ": FASTSAE_TOPK_ENCODE_DESIGN must be stream, plain or bounded, got ", asked);
  // one panel of latents has to fit the cache
  const bool packs = kMaxCols * round_up(p.d, 2) * int64_t(sizeof(acc_t<In>)) <= (8 << 20);
  const bool can_filter = p.kernels.scan_filter && packs && p.k <= 1024;
  if (asked == "stream" || !packs) return kStream;
  if (asked == "plain") return kPlain;
  if (asked == "bounded" && can_filter) return kBounded;
  if (can_filter && p.n >= std::max(kFilterRows, 8 * p.threads) && p.d >= 64 &&
      p.k * kFilterRatio <= p.f) {
    return kBounded;
  }
  const bool few = p.n / p.kernels.max_rows < kStreamPanels * p.threads;
  return p.n <= kStreamRows || few ? kStream : kPlain;
}

template <class In>
void encode(const Problem<In>& p) {
  using A = acc_t<In>;
  const Design design = design_of(p);
  int64_t row_bytes = p.row_stride() * (sizeof(A) + 4) + 32 + p.d * sizeof(A);
  if (design == kBounded) row_bytes += p.d * 2 + pending_stride(p) * 12;
  const int64_t most = std::max<int64_t>(1, kRowBytes / row_bytes);
  const int64_t blocks = (p.n + most - 1) / most;
  const int64_t rows = (p.n + blocks - 1) / blocks;
  BoundedStats told;
  for (int64_t r = 0; r < p.n; r += rows) {
    const int64_t n = std::min(rows, p.n - r);
    if (design == kStream) select_stream(p, r, n);
    if (design == kPlain) select_plain(p, r, n);
    if constexpr (std::is_same<A, float>::value) {
      if (design == kBounded) select_bounded(p, r, n, told);
    }
  }
  g_stats[0] = told.gave_up ? kBoundedThenPlain : design;
  g_stats[1] = p.n;
  g_stats[2] = p.f;
  g_stats[3] = told.rescored;
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
    encode(Problem<In>(kernels_at<In>(cpu_level()), data<In>(x), data<In>(W_enc),
                       b_enc ? data<In>(*b_enc) : nullptr,
                       rank_scale ? data<In>(*rank_scale) : nullptr, N, D, F, k, relu,
                       mutable_data<In>(values), mutable_data<int32_t>(indices)));
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
  if (N > 0) {
    const Problem<float> problem(kernels_at<float>(cpu_level()), data<float>(x), data<float>(W_enc),
                                 data<float>(b_enc), nullptr, N, D, F, 1, false, nullptr, nullptr);
    filter_bounds(problem, mutable_data<float>(lower), mutable_data<float>(upper),
                  mutable_data<float>(exact));
  }
  return {lower, upper, exact};
}

// The design that takes x [N, D] against F latents at the level in force; no memory is read.
std::string topk_encode_design(const Tensor& x, int64_t F, int64_t k) {
  const char* names[] = {"stream", "plain", "bounded"};
  std::string name;
  with_float_type(x.scalar_type(), kOp, [&](auto zero) {
    using In = decltype(zero);
    name =
        names[design_of(Problem<In>(kernels_at<In>(cpu_level()), nullptr, nullptr, nullptr, nullptr,
                                    x.size(0), x.size(1), F, k, false, nullptr, nullptr))];
  });
  return name;
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
  m.impl("_topk_encode_design", TORCH_BOX(&fastsae::topk_encode_design));
}
STABLE_TORCH_LIBRARY_IMPL(fastsae, CompositeExplicitAutograd, m) {
  m.impl("_topk_encode_stats", TORCH_BOX(&fastsae::topk_encode_stats));
}
