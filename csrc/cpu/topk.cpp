// topk: the k largest of each row of x [N, M], descending, ties by lowest index.
//
// A row is read once: what beats the threshold goes into a buffer of 2k candidates, and the buffer
// is cut to its k best, which raises the threshold, whenever it is full. A larger k takes the
// elements with a large enough leading digit, and the first k after a radix sort of these.
#include <functional>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/select.h"

#define FASTSAE_KERNEL "cpu/topk.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

using namespace topk;

constexpr const char* kOp = "topk";

constexpr int64_t kRadixSort = 512;  // from so many winners on, digits beat comparisons
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;

// Pairs in two buffers, sorted by order descending; equal ones keep their order.
template <class Bits>
struct Pairs {
  static constexpr int kPasses = (8 * sizeof(Bits) + kDigitBits - 1) / kDigitBits;
  Buffer<Bits> orders;      // [2 * capacity]
  Buffer<int32_t> indices;  // [2 * capacity]
  Bits* order;
  int32_t* index;
  int64_t capacity, count = 0;

  explicit Pairs(int64_t n)
      : orders(2 * n), indices(2 * n), order(orders.get()), index(indices.get()), capacity(n) {}

  void add(Bits o, int64_t i) {
    order[count] = o;
    index[count++] = static_cast<int32_t>(i);
  }

  void sort() {
    std::vector<uint32_t> counts(kPasses * kDigits, 0);
    for (int64_t i = 0; i < count; ++i) {
      Bits o = ~order[i];
      for (int p = 0; p < kPasses; ++p, o >>= kDigitBits) ++counts[p * kDigits + o % kDigits];
    }
    for (int p = 0; p < kPasses; ++p) {
      uint32_t* place = counts.data() + p * kDigits;
      const int shift = p * kDigitBits;
      if (place[Bits(~order[0]) >> shift & (kDigits - 1)] == count) continue;
      uint32_t total = 0;
      for (int d = 0; d < kDigits; ++d) total += std::exchange(place[d], total);
      Bits* to_order = orders.get() + (order == orders.get() ? capacity : 0);
      int32_t* to_index = indices.get() + (index == indices.get() ? capacity : 0);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t to = place[Bits(~order[i]) >> shift & (kDigits - 1)]++;
        to_order[to] = order[i];
        to_index[to] = index[i];
      }
      order = to_order, index = to_index;
    }
  }
};

template <class T>
class RowSelector {
 public:
  using A = acc_t<T>;
  using Key = typename KeyOf<A>::Key;
  using Bits = typename KeyOf<A>::Bits;

  RowSelector(CpuLevel level, int64_t m, int64_t k)
      : level_(level),
        m_(m),
        k_(k),
        capacity_(k + std::min(std::max<int64_t>(k, 64), m - k + 1)),
        streams_(capacity_ + kSlack <= kSelect),
        rank_(streams_ ? capacity_ + kSlack : 0),
        index_(streams_ ? capacity_ + kSlack : 0),
        keys_(k),
        pairs_(streams_ ? (k < kRadixSort ? 0 : k) : m) {
    void (*small)(Rows<A>&, int64_t) = FASTSAE_AT_LEVEL(level, topk::small_shrink<A>);
    rows_ = {rank_.get(), index_.get(),
             &threshold_, &count_,
             capacity_,   0,
             k,           small ? small : shrink_any<A>};
  }

  // values [k], indices [k] of the row x [m].
  void run(const T* x, T* values, int32_t* indices) {
    if (streams_) {
      stream(x);
    } else {
      collect(x);
    }
    if (streams_ && k_ < kRadixSort) {
      for (int64_t i = 0; i < k_; ++i)
        keys_.get()[i] = make_key<A>(rank_.get()[i], index_.get()[i]);
      std::sort(keys_.get(), keys_.get() + k_, std::greater<Key>());
      for (int64_t i = 0; i < k_; ++i) indices[i] = key_index<A>(keys_.get()[i]);
    } else {
      pairs_.sort();
      std::copy_n(pairs_.index, k_, indices);
    }
    for (int64_t i = 0; i < k_; ++i) values[i] = x[indices[i]];
  }

 private:
  static Bits order_of(A rank) {
    return static_cast<Bits>(make_key<A>(rank, 0) >> KeyOf<A>::kShift);
  }

  // The k best, in order of index, through the buffer of candidates.
  void stream(const T* x) {
    threshold_ = std::numeric_limits<A>::quiet_NaN();
    count_ = 0;
    FASTSAE_AT_LEVEL(level_, topk::scan_row, x, m_, &rows_);
    rows_.shrink(rows_, 0);
    if (k_ < kRadixSort) return;
    pairs_.count = 0;
    for (int64_t i = 0; i < k_; ++i) pairs_.add(order_of(rank_.get()[i]), index_.get()[i]);
  }

  // All whose leading digit is at least the k-th's: the k best, in order of index, and some more.
  void collect(const T* x) {
    constexpr int kShift = 8 * sizeof(Bits) - kDigitBits;
    std::vector<int64_t> counts(kDigits, 0);
    for (int64_t i = 0; i < m_; ++i) ++counts[order_of(widen(x[i])) >> kShift];
    int64_t digit = kDigits - 1;
    for (int64_t above = counts[digit]; above < k_;) above += counts[--digit];
    pairs_.count = 0;
    for (int64_t i = 0; i < m_; ++i) {
      const Bits order = order_of(widen(x[i]));
      if (static_cast<int64_t>(order >> kShift) >= digit) pairs_.add(order, i);
    }
  }

  CpuLevel level_;
  int64_t m_, k_, capacity_, count_ = 0;
  bool streams_;
  A threshold_;
  Buffer<A> rank_;
  Buffer<int32_t> index_;
  Buffer<Key> keys_;
  Pairs<Bits> pairs_;
  Rows<A> rows_;
};

std::tuple<Tensor, Tensor> topk_cpu(const Tensor& x, int64_t k) {
  const CpuLevel level = cpu_level();
  const int64_t N = x.size(0), M = x.size(1);
  const ScalarType dtype = x.scalar_type();
  check_tensor(kOp, "x", x, {N, M}, dtype);
  STD_TORCH_CHECK(0 <= k && k <= M && M <= INT32_MAX, kOp, ": k = ", k, " and M = ", M,
                  " do not fit");
  Tensor values = torch::stable::new_empty(x, {N, k});
  Tensor indices = torch::stable::new_empty(x, {N, k}, ScalarType::Int);
  if (N * k == 0) return {values, indices};
  with_float_type(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    const T* in = data<T>(x);
    T* v = mutable_data<T>(values);
    int32_t* i = mutable_data<int32_t>(indices);
    parallel_ranges(N, M + 16 * k, [&](int64_t begin, int64_t end) {
      RowSelector<T> selector(level, M, k);
      for (int64_t n = begin; n < end; ++n) selector.run(in + n * M, v + n * k, i + n * k);
    });
  });
  return {values, indices};
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) { m.impl("topk_cpu", TORCH_BOX(&fastsae::topk_cpu)); }
