// topk_member: is a latent among the k best of x W_enc^T + b_enc? By counting who beats it.
//
// With a screen (codes int8 [2, F, D], bounds [4, F]) and x in integers q of its own step a
// latent's score is known from a quarter of the bytes:
//   |step x_step <codes_0, q> - <w, x>| <= margin |x| + size |x - x_step q|
// Those too close to call are taken with codes_1 / 254 added, whose margin is that much smaller,
// and what is left is scored from W_enc itself.
//
// A latent of rank r is settled by the first k F / r, so most tokens leave early: a thread takes
// some tokens through the first weights. By those that still have an undecided latent the rest is
// gone through in stretches, each twice as long as all before it. Where many stay, the k best of
// those are selected instead.
#include "cpu/topk_member.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/select.h"

namespace fastsae {
namespace topk_member {
constexpr int64_t kLatents = 64;     // scored at a time
constexpr int64_t kFirst = 512;      // at most so many are scored before tokens are gathered
constexpr int64_t kTokens = 4;       // scored together
constexpr int64_t kAlone = 1 << 19;  // multiply-adds that no other thread is woken for
constexpr int64_t kFew = 32;         // tokens to the end of whose weights counting is cheaper
constexpr int64_t kFewUnscreened = 8;

// x in integers: |x| <= norm, |x - step codes| <= off.
struct Quantised {
  const int16_t* codes;
  float step, norm, off;
};
}  // namespace topk_member
}  // namespace fastsae

#define FASTSAE_KERNEL_BF16
#define FASTSAE_KERNEL "cpu/topk_member.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

using namespace ::fastsae::topk_member;

constexpr const char* kOp = "topk_member";

// MemberWeights in the dtype of x.
template <class In>
struct Problem {
  Problem(const MemberWeights& m)
      : level(cpu_level()),
        w(static_cast<const In*>(m.w)),
        bias(static_cast<const In*>(m.bias)),
        scale(static_cast<const In*>(m.scale)),
        codes(m.codes),
        bounds(m.bounds),
        D(m.D),
        F(m.F),
        k(m.k),
        positive(m.positive) {}

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

  // x [N, D], latents [P, J], member [N, J]
  Counter(const Problem<In>& p, const In* x, int64_t N, const int32_t* latents, int64_t P,
          int64_t J, bool* member)
      : p_(p),
        x_(x),
        member_(member),
        wide_(std::is_same<In, A>::value ? 0 : N * p.D),
        q_(p.codes ? N * p.D : 0),
        pairs_(N * J),
        counts_(new std::atomic<int32_t>[N * J]) {
    std::fill(member, member + N * J, false);
    start(N, latents, N / P, J);
  }

  // Counts until all is decided, or until more than `few` are left, for which selecting is cheaper.
  // Returns how many.
  int64_t run(int64_t few) {
    while (left() && done_ < p_.F) {
      // a latent of rank F / 16 is settled by 16 k others: where none is, they are members
      const bool fruitless = done_ >= 16 * p_.k && 4 * left() > 3 * before_;
      if (left() > few && (done_ >= p_.F / 8 || fruitless)) break;
      before_ = left();
      // one group need not be gathered again: it stops where all of it is known
      const int64_t end = left() <= kTokens ? p_.F : std::min(p_.F, 2 * done_);
      stretch(done_, end);
      done_ = end;
      open_.erase(std::remove_if(open_.begin(), open_.end(),
                                 [&](const Token& token) { return settled(token); }),
                  open_.end());
    }
    return left();
  }

  // The undecided tokens' rows, [left, D].
  void gather(In* rows) const {
    for (size_t t = 0; t < open_.size(); ++t) {
      std::copy_n(x_ + open_[t].row * p_.D, p_.D, rows + t * p_.D);
    }
  }

  // Answers them from what was selected, indices [left, k].
  void answer(const int32_t* indices) const {
    for (size_t t = 0; t < open_.size(); ++t) {
      const int32_t* best = indices + t * p_.k;
      for (int64_t i = open_[t].begin; i < open_[t].end; ++i) {
        const Pair& pair = pairs_.get()[i];
        member_[pair.place] = std::find(best, best + p_.k, pair.latent) != best + p_.k;
      }
    }
  }

 private:
  struct Pair {
    int64_t place;  // in member
    int32_t latent;
    A rank;
  };
  struct Token {
    int64_t row, begin, end;  // its pairs
    const A* x;               // as places (products.inl)
    Quantised q;
    bool open;  // is an answer missing after the first latents?
  };

  int64_t left() const { return static_cast<int64_t>(open_.size()); }
  A bias(int64_t latent) const { return p_.bias ? widen(p_.bias[latent]) : A(0); }
  A rank(A score, int64_t latent) const {
    if (p_.bias) score += widen(p_.bias[latent]);
    return p_.scale ? score * widen(p_.scale[latent]) : score;
  }
  // Scores of pairs, x as places.
  void exact(const A* const* x, const In* const* rows, int64_t n, A* out) const {
    FASTSAE_AT_BF16_LEVEL(p_.level, pair_scores<false>, x, rows, n, p_.D, out);
  }
  void score(const A* const* x, int64_t tokens, const In* w, int64_t n, A* out) const {
    Buffer<A> panel(tokens > 1 ? kTokens * p_.D : 0);
    FASTSAE_AT_BF16_LEVEL(p_.level, topk_member::scores, x, tokens, w, n, p_.D, panel.get(), out);
  }
  void code_score(const int16_t* const* q, int64_t tokens, const int8_t* codes, int64_t n,
                  float* out) const {
    FASTSAE_AT_BF16_LEVEL(p_.level, topk_member::code_scores, q, tokens, codes, n, p_.D, out);
  }

  // Takes every group of tokens through the first latents. A pair's place is free for it alone.
  void start(int64_t N, const int32_t* latents, int64_t run, int64_t J) {
    int64_t used = 0;  // of the lists' J places
    for (int64_t i = 0; i < N / run * J; ++i) {
      if (latents[i] >= 0) used = std::max(used, i % J + 1);
    }
    if (!used) return;
    const int64_t fit = kAlone / (kTokens * std::max<int64_t>(p_.D, 1)) / kLatents * kLatents;
    done_ = std::min(p_.F, std::max(kLatents, std::min(kFirst, fit)));
    const int64_t groups = (N + kTokens - 1) / kTokens, work = N * (used + 2 * kLatents) * p_.D;
    std::vector<Token> tokens(N);
    parallel_each(groups, work < kAlone ? 1 : threads_for(groups, work), [&](int64_t g) {
      const int64_t begin = g * kTokens, size = std::min(kTokens, N - begin);
      Token* group = tokens.data() + begin;
      find_pairs(group, begin, size, latents, run, used, J);
      bool open = false;
      for (int64_t t = 0; t < size; ++t) {
        if (group[t].begin == group[t].end) continue;
        open = true;
        if (p_.codes) quantise(group[t].row, &group[t].q);
      }
      for (int64_t first = 0; open && first < done_; first += kLatents) {
        open = count(group, size, first, std::min(kLatents, done_ - first));
      }
      for (int64_t t = 0; t < size; ++t) {
        if (!settled(group[t])) group[t].open = true;
      }
    });
    for (const Token& token : tokens) {
      before_ += token.begin < token.end;
      if (token.open) open_.push_back(token);
    }
  }

  // Scores the latents that a group of tokens asks for: those that their own sign does not settle.
  void find_pairs(Token* group, int64_t begin, int64_t size, const int32_t* latents, int64_t run,
                  int64_t used, int64_t J) {
    std::array<Pair, kLatents> found;
    std::array<Token*, kLatents> token;
    std::array<const A*, kLatents> x;
    std::array<const In*, kLatents> w;
    std::array<A, kLatents> scores;
    int64_t count = 0;
    const auto flush = [&] {
      exact(x.data(), w.data(), count, scores.data());
      for (int64_t i = 0; i < count; ++i) {
        const int32_t latent = found[i].latent;
        if (p_.positive && scores[i] + bias(latent) <= A(0)) continue;  // NaN stays
        found[i].rank = rank(scores[i], latent);
        counts_[token[i]->end].store(0, std::memory_order_relaxed);
        pairs_.get()[token[i]->end++] = found[i];
      }
      count = 0;
    };
    for (int64_t n = begin; n < begin + size; ++n, ++group) {
      *group = {n, n * J, n * J, nullptr, {}, false};
      const int32_t* wanted = latents + n / run * J;
      for (int64_t j = 0; j < used; ++j) {
        if (wanted[j] < 0) continue;
        if (!group->x) group->x = row(n);
        if (count == kLatents) flush();
        found[count] = {n * J + j, wanted[j], A(0)};
        token[count] = group, x[count] = group->x, w[count++] = p_.w + wanted[j] * p_.D;
      }
    }
    flush();
  }

  // Row n of x as places.
  const A* row(int64_t n) const {
    const In* x = x_ + n * p_.D;
    if constexpr (std::is_same<In, A>::value) {
      return x;
    } else {
      FASTSAE_AT_BF16_LEVEL(p_.level, places, x, p_.D, wide_.get() + n * p_.D);
      return wide_.get() + n * p_.D;
    }
  }

  void quantise(int64_t n, Quantised* out) {
    if constexpr (std::is_same<A, float>::value) {
      const In* x = x_ + n * p_.D;
      const float* values;
      if constexpr (std::is_same<In, float>::value) {
        values = x;
      } else {
        static thread_local std::vector<float> store;
        store.resize(p_.D);
        FASTSAE_AT_BF16_LEVEL(p_.level, topk_member::values_of, x, p_.D, store.data());
        values = store.data();
      }
      FASTSAE_AT_BF16_LEVEL(p_.level, topk_member::quantise, values, p_.D, q_.get() + n * p_.D,
                            out);
    } else {
      (void)n, (void)out;
    }
  }

  bool undecided(const Token& token) const {
    for (int64_t i = token.begin; i < token.end; ++i) {
      if (counts_[i].load(std::memory_order_relaxed) < p_.k) return true;
    }
    return false;
  }

  // Answers a token whose latents are all known; after all of W_enc every one is.
  bool settled(const Token& token) {
    if (done_ < p_.F && undecided(token)) return false;
    for (int64_t i = token.begin; i < token.end; ++i) {
      member_[pairs_.get()[i].place] = counts_[i].load(std::memory_order_relaxed) < p_.k;
    }
    return true;
  }

  // Counts the latents [begin, end) for every open token. A block of weights serves all of them
  // before the next one is read.
  void stretch(int64_t begin, int64_t end) {
    const int64_t groups = (left() + kTokens - 1) / kTokens;
    const int64_t tasks = groups * ((end - begin + kLatents - 1) / kLatents);
    const int64_t work = left() * (end - begin) * p_.D;
    parallel_each(tasks, work < kAlone ? 1 : threads_for(tasks, work), [&](int64_t i) {
      const int64_t first = begin + i / groups * kLatents, t = i % groups * kTokens;
      count(open_.data() + t, std::min(kTokens, left() - t), first,
            std::min(kLatents, end - first));
    });
  }

  // Adds those of the n latents from `first` that beat a pair to its count. False when there was
  // no undecided token.
  bool count(const Token* group, int64_t size, int64_t first, int64_t n) {
    const Token* token[kTokens];
    const A* x[kTokens];
    const int16_t* q[kTokens];
    int64_t tokens = 0;
    for (int64_t t = 0; t < size; ++t) {
      if (!undecided(group[t])) continue;
      token[tokens] = group + t;
      q[tokens] = group[t].q.codes;
      x[tokens++] = group[t].x;
    }
    if (!tokens) return false;
    std::array<A, kTokens * kLatents> low, high;  // bounds of the ranks; equal where known
    if (p_.codes) {
      if constexpr (std::is_same<A, float>::value) {
        code_score(q, tokens, p_.codes + first * p_.D, n, low.data());
        std::array<float, kLatents> biases, scales;
        for (int64_t l = 0; l < n; ++l) biases[l] = bias(first + l);
        for (int64_t l = 0; p_.scale && l < n; ++l) scales[l] = widen(p_.scale[first + l]);
        for (int64_t t = 0; t < tokens; ++t) {
          FASTSAE_AT_BF16_LEVEL(p_.level, topk_member::bracket, low.data() + t * kLatents,
                                high.data() + t * kLatents, n, p_.bounds + first, p_.F, 0,
                                biases.data(), p_.scale ? scales.data() : nullptr, token[t]->q);
        }
      }
    } else {
      score(x, tokens, p_.w + first * p_.D, n, low.data());
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = t * kLatents; i < t * kLatents + n; ++i) {
          low[i] = high[i] = rank(low[i], first + i - t * kLatents);
        }
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = token[t]->begin; i < token[t]->end; ++i) {
        if (counts_[i].load(std::memory_order_relaxed) >= p_.k) continue;
        const int32_t better = beaten_by(pairs_.get()[i], *token[t], low.data() + t * kLatents,
                                         high.data() + t * kLatents, first, n);
        counts_[i].fetch_add(better, std::memory_order_relaxed);
      }
    }
    return true;
  }

  int32_t beaten_by(const Pair& pair, const Token& token, A* lower, A* upper, int64_t first,
                    int64_t n) const {
    int32_t better;
    uint64_t near;
    FASTSAE_AT_BF16_LEVEL(p_.level, topk_member::compare, lower, upper, n, pair.rank, &better,
                          &near);
    const Key own = topk::make_key<A>(pair.rank, pair.latent);
    for (; near; near &= near - 1) {
      const int l = __builtin_ctzll(near);
      A *low = lower + l, *high = upper + l;
      if (!(*low == *high) && p_.codes) look_closer(token, first + l, low, high);
      if (*low > pair.rank || *high < pair.rank) {
        better += *low > pair.rank;
        continue;
      }
      const int32_t latent = static_cast<int32_t>(first + l);
      if (!(*low == *high)) {
        const In* w = p_.w + latent * p_.D;
        exact(&token.x, &w, 1, low);
        *low = *high = rank(*low, latent);
      }
      better += topk::make_key<A>(*low, latent) > own;
    }
    return better;
  }

  // Bounds from both codes.
  void look_closer(const Token& token, int64_t latent, A* low, A* high) const {
    if constexpr (std::is_same<A, float>::value) {
      *low =
          FASTSAE_AT_BF16_LEVEL(p_.level, topk_member::fine_score, token.q.codes,
                                p_.codes + latent * p_.D, p_.codes + (p_.F + latent) * p_.D, p_.D);
      const float offset = bias(latent), scale = p_.scale ? widen(p_.scale[latent]) : 1.0f;
      FASTSAE_AT_BF16_LEVEL(p_.level, topk_member::bracket, low, high, 1, p_.bounds + latent, p_.F,
                            1, &offset, p_.scale ? &scale : nullptr, token.q);
    }
  }

  const Problem<In>& p_;
  const In* x_;
  bool* member_;
  Buffer<A> wide_;      // [N, D] where x is narrower
  Buffer<int16_t> q_;   // [N, D] with a screen
  Buffer<Pair> pairs_;  // J places a token, filled from the first
  std::unique_ptr<std::atomic<int32_t>[]> counts_;
  std::vector<Token> open_;
  int64_t done_ = 0;    // latents that all open tokens were compared with
  int64_t before_ = 0;  // open tokens before the last of them
};

void check_latents(const int32_t* latents, int64_t n, int64_t F) {
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(latents[i] >= -1 && latents[i] < F, kOp, ": latents must lie in [-1, ", F,
                    "), got ", latents[i]);
  }
}

Tensor topk_member_cpu(const Tensor& x, const Tensor& W_enc, const std::optional<Tensor>& b_enc,
                       const Tensor& latents, int64_t k, const std::optional<Tensor>& rank_scale,
                       bool positive, const std::optional<Tensor>& codes,
                       const std::optional<Tensor>& bounds) {
  const int64_t D = x.size(-1), F = W_enc.size(0), P = latents.size(0), J = latents.size(1);
  STD_TORCH_CHECK(D > 0, kOp, ": no columns");
  const int64_t N = x.numel() / D;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.is_contiguous() && x.is_cpu(), kOp, ": x must be a contiguous CPU tensor");
  check_tensor(kOp, "W_enc", W_enc, {F, D}, dtype);
  check_tensor(kOp, "latents", latents, {P, J}, ScalarType::Int);
  STD_TORCH_CHECK(N == 0 || (P > 0 && N % P == 0), kOp, ": ", P, " lists for ", N, " tokens");
  if (b_enc) check_tensor(kOp, "b_enc", *b_enc, {F}, dtype);
  if (rank_scale) check_tensor(kOp, "rank_scale", *rank_scale, {F}, dtype);
  STD_TORCH_CHECK(k >= 1 && k <= F && F <= INT32_MAX, kOp, ": k = ", k, " and F = ", F,
                  " do not fit");
  STD_TORCH_CHECK(codes.has_value() == bounds.has_value(), kOp, ": half a screen");
  if (codes) {
    check_tensor(kOp, "codes", *codes, {2, F, D}, ScalarType::Char);
    check_tensor(kOp, "bounds", *bounds, {4, F}, ScalarType::Float);
    STD_TORCH_CHECK(dtype != ScalarType::Double, kOp, ": a screen bounds fp32 scores");
  }
  const int32_t* wanted = data<int32_t>(latents);
  check_latents(wanted, P * J, F);
  Tensor member = torch::stable::new_empty(x, {N, J}, ScalarType::Bool);
  if (N * J == 0) return member;
  const auto pointer = [](const std::optional<Tensor>& t) {
    return t ? t->const_data_ptr() : nullptr;
  };
  const MemberWeights weights{W_enc.const_data_ptr(),
                              pointer(b_enc),
                              pointer(rank_scale),
                              static_cast<const int8_t*>(pointer(codes)),
                              static_cast<const float*>(pointer(bounds)),
                              D,
                              F,
                              k,
                              positive};
  with_float_type(dtype, kOp, [&](auto zero) {
    using In = decltype(zero);
    const Problem<In> problem(weights);
    Counter<In> counter(problem, data<In>(x), N, wanted, P, J, mutable_data<bool>(member));
    const int64_t left = counter.run(codes ? kFew : kFewUnscreened);
    if (!left) return;
    Tensor rows = torch::stable::new_empty(x, {left, D});
    counter.gather(mutable_data<In>(rows));
    const auto best = topk_encode_cpu(rows, W_enc, b_enc, k, false, rank_scale);
    counter.answer(data<int32_t>(std::get<1>(best)));
  });
  return member;
}

}  // namespace

void topk_member_counted(const MemberWeights& weights, ScalarType dtype, const void* x, int64_t N,
                         const int32_t* latents, int64_t P, int64_t J, bool* member) {
  check_latents(latents, P * J, weights.F);
  with_float_type(dtype, kOp, [&](auto zero) {
    using In = decltype(zero);
    const Problem<In> problem(weights);
    Counter<In>(problem, static_cast<const In*>(x), N, latents, P, J, member).run(N);
  });
}

}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("topk_member_cpu", TORCH_BOX(&fastsae::topk_member_cpu));
}
