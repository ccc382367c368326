// topk_member: is a latent among the k best of x W_enc^T + b_enc? By counting who beats it.
//
// With a screen (codes int8 [F, D], bounds [F, 2]) a latent's score is known to
//   |step <codes, x> - <w, x>| <= margin |x|
// from a quarter of the bytes, and only those too close to call are scored from W_enc itself. The
// count stops at k.
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/select.h"

namespace fastsae {
namespace topk_member {
constexpr int64_t kLatents = 64;  // scored at a time
constexpr int64_t kTokens = 4;    // share a pass over the weights
constexpr int64_t kAlone = 8;     // times kLatents, before more threads are woken
}  // namespace topk_member
}  // namespace fastsae

#define FASTSAE_KERNEL "cpu/topk_member.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

using namespace ::fastsae::topk_member;

constexpr const char* kOp = "topk_member";

// Shapes as in the schema; bias, scale, codes and bounds may be null.
template <class In>
struct Problem {
  CpuLevel level;
  const In *w, *bias, *scale;
  const int8_t* codes;
  const float* bounds;
  int64_t D, F, k;
  bool positive;
};

template <class In>
class Counter {
 public:
  using A = acc_t<In>;
  using Key = typename topk::KeyOf<A>::Key;

  Counter(const Problem<In>& p, const In* x, int64_t tokens, const int32_t* latents, int64_t J,
          bool* member)
      : p_(p), tokens_(tokens), x_(tokens * p.D), norm_{} {
    for (int64_t i = 0; i < tokens * p.D; ++i) x_.get()[i] = widen(x[i]);
    for (int64_t t = 0; t < tokens; ++t) {
      double square = 0;
      for (int64_t d = 0; d < p.D; ++d) {
        square += double(x_.get()[t * p.D + d]) * double(x_.get()[t * p.D + d]);
      }
      // larger ones could overflow in the sums of codes: nothing is known of them
      const double norm = std::sqrt(square) * (1 + 0x1p-20);
      norm_[t] = norm < 0x1p60 ? static_cast<float>(norm) : std::numeric_limits<float>::infinity();
    }
    for (int64_t i = 0; i < tokens * J; ++i) {
      const int32_t latent = latents[i];
      member[i] = false;
      if (latent < 0) continue;
      const A score = exact(i / J, latent);
      if (p.positive && score + bias(latent) <= A(0)) continue;  // NaN stays
      pairs_.push_back({i / J, i, latent, rank(score, latent)});
    }
    counts_ = std::vector<std::atomic<int64_t>>(pairs_.size());
    for (auto& c : counts_) c = 0;
  }

  void run(bool* member) {
    // the first few show most latents to be no members, before a second thread could wake
    const int64_t pieces = (p_.F + kLatents - 1) / kLatents, alone = std::min(kAlone, pieces);
    for (int64_t i = 0; i < alone && open(); ++i) count(i * kLatents);
    if (open()) {
      const int64_t rest = pieces - alone;
      parallel_each(rest, threads_for(rest, rest * kLatents * p_.D * tokens_),
                    [&](int64_t i) { count((alone + i) * kLatents); });
    }
    for (size_t i = 0; i < pairs_.size(); ++i) member[pairs_[i].place] = counts_[i] < p_.k;
  }

 private:
  struct Pair {
    int64_t token, place;
    int32_t latent;
    A rank;
  };

  A bias(int64_t latent) const { return p_.bias ? widen(p_.bias[latent]) : A(0); }
  A rank(A score, int64_t latent) const {
    if (p_.bias) score += widen(p_.bias[latent]);
    return p_.scale ? score * widen(p_.scale[latent]) : score;
  }
  A exact(int64_t token, int64_t latent) const {
    A out;
    score(x_.get() + token * p_.D, 1, p_.w + latent * p_.D, 1, &out);
    return out;
  }

  template <class Row>
  void score(const A* x, int64_t tokens, const Row* w, int64_t n, A* out) const {
#if FASTSAE_X86
    if (p_.level >= CpuLevel::kAvx512) {
      return avx512::topk_member::scores<A, Row>(x, tokens, w, n, p_.D, out);
    }
    if (p_.level == CpuLevel::kAvx2) {
      return avx2::topk_member::scores<A, Row>(x, tokens, w, n, p_.D, out);
    }
#endif
    portable::topk_member::scores<A, Row>(x, tokens, w, n, p_.D, out);
  }

  bool open() const {
    for (auto& c : counts_) {
      if (c.load(std::memory_order_relaxed) < p_.k) return true;
    }
    return false;
  }

  // Adds the latents [begin, begin + kLatents) that beat a pair to its count.
  void count(int64_t begin) {
    if (!open()) return;
    const int64_t n = std::min(kLatents, p_.F - begin);
    std::array<A, kTokens * kLatents> low, high;  // bounds of the ranks; equal where known
    if (p_.codes) {
      if constexpr (std::is_same<A, float>::value) screened(begin, n, low.data(), high.data());
    } else {
      score(x_.get(), tokens_, p_.w + begin * p_.D, n, low.data());
      for (int64_t t = 0; t < tokens_; ++t) {
        for (int64_t i = t * kLatents; i < t * kLatents + n; ++i) {
          low[i] = high[i] = rank(low[i], begin + i - t * kLatents);
        }
      }
    }
    for (size_t i = 0; i < pairs_.size(); ++i) {
      const Pair& pair = pairs_[i];
      if (counts_[i].load(std::memory_order_relaxed) >= p_.k) continue;
      A *lower = low.data() + pair.token * kLatents, *upper = high.data() + pair.token * kLatents;
      const Key own = topk::make_key<A>(pair.rank, pair.latent);
      int64_t better = 0;
      for (int64_t l = 0; l < n; ++l) {
        if (upper[l] < pair.rank) continue;
        if (lower[l] > pair.rank) {
          ++better;
          continue;
        }
        if (!(lower[l] == upper[l])) {
          lower[l] = upper[l] = rank(exact(pair.token, begin + l), begin + l);
        }
        better += topk::make_key<A>(lower[l], static_cast<int32_t>(begin + l)) > own;
      }
      counts_[i].fetch_add(better, std::memory_order_relaxed);
    }
  }

  // Bounds of the ranks of n latents for every token; NaN where nothing is known.
  void screened(int64_t begin, int64_t n, float* low, float* high) const {
    score(x_.get(), tokens_, p_.codes + begin * p_.D, n, low);
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t l = 0; l < n; ++l) {
        const float *bound = p_.bounds + 2 * (begin + l), b = bias(begin + l);
        const float approx = low[t * kLatents + l] * bound[0];
        // roundings of the sum with the bias, of the product with the scale, and of these bounds
        const float slack = (std::abs(b) + std::abs(approx)) * 0x1p-20f + 0x1p-100f;
        float centre = approx + b, radius = bound[1] * norm_[t] + slack;
        if (p_.scale) {
          const float s = widen(p_.scale[begin + l]);
          centre *= s;
          radius = radius * std::abs(s) + std::abs(centre) * 0x1p-20f + 0x1p-100f;
        }
        radius *= 1 + 0x1p-20f;
        if (!(std::abs(centre) <= 0x1p100f)) radius = std::numeric_limits<float>::infinity();
        low[t * kLatents + l] = centre - radius;
        high[t * kLatents + l] = centre + radius;
      }
    }
  }

  const Problem<In>& p_;
  int64_t tokens_;
  Scratch<A> x_;  // [tokens, D]
  float norm_[kTokens];
  std::vector<Pair> pairs_;
  std::vector<std::atomic<int64_t>> counts_;
};

Tensor topk_member_cpu(const Tensor& x, const Tensor& W_enc, const std::optional<Tensor>& b_enc,
                       const Tensor& latents, int64_t k, const std::optional<Tensor>& rank_scale,
                       bool positive, const std::optional<Tensor>& codes,
                       const std::optional<Tensor>& bounds) {
  const CpuLevel level = cpu_level();
  const int64_t N = x.size(0), D = x.size(1), F = W_enc.size(0), J = latents.size(1);
  const ScalarType dtype = x.scalar_type();
  check_tensor(kOp, "x", x, {N, D}, dtype);
  check_tensor(kOp, "W_enc", W_enc, {F, D}, dtype);
  check_tensor(kOp, "latents", latents, {N, J}, ScalarType::Int);
  if (b_enc) check_tensor(kOp, "b_enc", *b_enc, {F}, dtype);
  if (rank_scale) check_tensor(kOp, "rank_scale", *rank_scale, {F}, dtype);
  STD_TORCH_CHECK(k >= 1 && k <= F && F <= INT32_MAX, kOp, ": k = ", k, " and F = ", F,
                  " do not fit");
  STD_TORCH_CHECK(codes.has_value() == bounds.has_value(), kOp, ": half a screen");
  if (codes) {
    check_tensor(kOp, "codes", *codes, {F, D}, ScalarType::Char);
    check_tensor(kOp, "bounds", *bounds, {F, 2}, ScalarType::Float);
    STD_TORCH_CHECK(dtype != ScalarType::Double, kOp, ": a screen bounds fp32 scores");
  }
  const int32_t* wanted = data<int32_t>(latents);
  for (int64_t i = 0; i < N * J; ++i) {
    STD_TORCH_CHECK(wanted[i] >= -1 && wanted[i] < F, kOp, ": latents must lie in [-1, ", F,
                    "), got ", wanted[i]);
  }
  Tensor member = torch::stable::new_empty(x, {N, J}, ScalarType::Bool);
  if (N * J == 0) return member;
  bool* out = mutable_data<bool>(member);
  with_float_type(dtype, kOp, [&](auto zero) {
    using In = decltype(zero);
    const Problem<In> problem{level,
                              data<In>(W_enc),
                              b_enc ? data<In>(*b_enc) : nullptr,
                              rank_scale ? data<In>(*rank_scale) : nullptr,
                              codes ? data<int8_t>(*codes) : nullptr,
                              bounds ? data<float>(*bounds) : nullptr,
                              D,
                              F,
                              k,
                              positive};
    const int64_t groups = (N + kTokens - 1) / kTokens;
    const auto answer = [&](int64_t i) {
      const int64_t n = i * kTokens, tokens = std::min(kTokens, N - n);
      Counter<In>(problem, data<In>(x) + n * D, tokens, wanted + n * J, J, out + n * J)
          .run(out + n * J);
    };
    // many groups share the threads, few are each shared by all threads
    const int64_t threads = threads_for(groups, groups * kAlone * kLatents * D);
    parallel_each(groups, groups >= 2 * threads ? threads : 1, answer);
  });
  return member;
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("topk_member_cpu", TORCH_BOX(&fastsae::topk_member_cpu));
}
