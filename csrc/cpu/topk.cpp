// topk: the k largest of each row of x [N, M], descending, ties by lowest index.
//
// A row is read once: what beats the threshold goes into a buffer of 2k candidates, and the buffer
// is cut to its k best, which raises the threshold, whenever it is full.
#include "cpu/kernels.h"
#include "cpu/select.h"

#define FASTSAE_KERNEL "cpu/topk.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

using namespace topk;

constexpr const char* kOp = "topk";

template <class T>
class RowSelector {
 public:
  using A = acc_t<T>;
  using Key = typename KeyOf<A>::Key;

  RowSelector(CpuLevel level, int64_t m, int64_t k)
      : level_(level),
        m_(m),
        k_(k),
        capacity_(k + std::min(std::max<int64_t>(k, 64), m - k + 1)),
        rank_(capacity_ + kSlack),
        index_(capacity_ + kSlack),
        keys_(k) {
    void (*small)(Rows<A>&, int64_t) = FASTSAE_AT_LEVEL(level, topk::small_shrink<A>);
    const bool fits = small && capacity_ + kSlack <= kSelect;
    rows_ = {rank_.get(), index_.get(),
             &threshold_, &count_,
             capacity_,   0,
             k,           fits ? small : shrink_any<A>};
  }

  // values [k], indices [k] of the row x [m].
  void run(const T* x, T* values, int32_t* indices) {
    threshold_ = std::numeric_limits<A>::quiet_NaN();
    count_ = 0;
    FASTSAE_AT_LEVEL(level_, topk::scan_row, x, m_, &rows_);
    rows_.shrink(rows_, 0);
    for (int64_t i = 0; i < k_; ++i) keys_.get()[i] = make_key<A>(rows_.rank[i], rows_.index[i]);
    std::sort(keys_.get(), keys_.get() + k_, std::greater<Key>());
    for (int64_t i = 0; i < k_; ++i) {
      indices[i] = key_index<A>(keys_.get()[i]);
      values[i] = x[indices[i]];
    }
  }

 private:
  CpuLevel level_;
  int64_t m_, k_, capacity_, count_ = 0;
  A threshold_;
  Scratch<A> rank_;
  Scratch<int32_t> index_;
  Scratch<Key> keys_;
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
