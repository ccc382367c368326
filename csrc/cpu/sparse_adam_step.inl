#include "cpu/gradient_row.h"

namespace fastsae {
namespace FASTSAE_NS {

// <a, b>.
template <class S, class T>
acc_t<T> dot(const S* a, const T* b, int64_t D) {
  using V = Vec<acc_t<T>>;
  V even = V::zero(), odd = V::zero();
  int64_t d = 0;
  for (; d + 2 * V::kLanes <= D; d += 2 * V::kLanes) {
    even = V::fma(V::load(a + d), V::load(b + d), even);
    odd = V::fma(V::load(a + d + V::kLanes), V::load(b + d + V::kLanes), odd);
  }
  for (; d < D; d += V::kLanes) {
    const int n = static_cast<int>(D - d < V::kLanes ? D - d : V::kLanes);
    even = n == V::kLanes ? V::fma(V::load(a + d), V::load(b + d), even)
                          : V::fma(V::load_n(a + d, n), V::load_n(b + d, n), even);
  }
  return (even + odd).sum();
}

// One vector of Adam: the moments are stored, the new parameter returned.
template <class A>
struct AdamVec {
  using V = Vec<A>;
  V beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_correction2, eps, step_size;

  explicit AdamVec(const AdamScalars<A>& s)
      : beta1(V::set1(s.beta1)),
        one_minus_beta1(V::set1(s.one_minus_beta1)),
        beta2(V::set1(s.beta2)),
        one_minus_beta2(V::set1(s.one_minus_beta2)),
        inv_sqrt_correction2(V::set1(s.inv_sqrt_correction2)),
        eps(V::set1(s.eps)),
        step_size(V::set1(s.step_size)) {}

  V update(V p, V g, V& m, V& v) const {
    m = V::fma(one_minus_beta1, g, beta1 * m);
    v = V::fma(one_minus_beta2 * g, g, beta2 * v);
    return p - step_size * (m / V::fma(V::sqrt(v), inv_sqrt_correction2, eps));
  }
};

// Adam on one row. grad: D accumulators, or null for a gradient of zero; `along` times the
// parameter is added to it (weight decay, projection). The new row goes to `out`, which may be
// param.
template <bool kGrad, class T, class Out>
void adam_row(const AdamVec<acc_t<T>>& adam, const T* param, const acc_t<T>* grad, acc_t<T> along,
              acc_t<T>* exp_avg, acc_t<T>* exp_avg_sq, int64_t D, Out* out) {
  using V = Vec<acc_t<T>>;
  const V a = V::set1(along);
  int64_t d = 0;
  for (; d + V::kLanes <= D; d += V::kLanes) {
    const V p = V::load(param + d);
    V g = kGrad ? V::load(grad + d) : V::zero();
    if (along != 0) g = V::fma(a, p, g);
    V m = V::load(exp_avg + d), v = V::load(exp_avg_sq + d);
    adam.update(p, g, m, v).store(out + d);
    m.store(exp_avg + d);
    v.store(exp_avg_sq + d);
  }
  if (d < D) {
    const int n = static_cast<int>(D - d);
    const V p = V::load_n(param + d, n);
    V g = kGrad ? V::load_n(grad + d, n) : V::zero();
    if (along != 0) g = V::fma(a, p, g);
    V m = V::load_n(exp_avg + d, n), v = V::load_n(exp_avg_sq + d, n);
    adam.update(p, g, m, v).store_n(out + d, n);
    m.store_n(exp_avg + d, n);
    v.store_n(exp_avg_sq + d, n);
  }
}

// out = row / |row|, or row where it is zero or NaN.
template <class T>
void store_unit_row(acc_t<T>* row, int64_t D, T* out) {
  using V = Vec<acc_t<T>>;
  const acc_t<T> norm = std::sqrt(dot(row, row, D));
  if (norm > 0) {
    const V n = V::set1(norm);
    int64_t d = 0;
    for (; d + V::kLanes <= D; d += V::kLanes) (V::load(row + d) / n).store(out + d);
    if (d < D) {
      const int rest = static_cast<int>(D - d);
      (V::load_n(row + d, rest) / n).store_n(out + d, rest);
    }
  } else {
    store_row(row, D, out);
  }
}

// One Adam step on rows latents[i] (rows i when latents is null), i in [begin, end). The gradient
// row is formed in `scratch` (2 D accumulators, in L1) and used at once.
template <class T>
void adam_step(const GroupsView& groups, const AdamScalars<acc_t<T>>& scalars, bool unit_norm,
               const T* values, const T* rows, int64_t D, const int32_t* latents, int64_t begin,
               int64_t end, acc_t<T>* scratch, T* param, acc_t<T>* exp_avg, acc_t<T>* exp_avg_sq) {
  using A = acc_t<T>;
  const AdamVec<A> adam(scalars);
  A *grad = scratch, *row = scratch + D;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t f = latents ? latents[i] : i;
    T* p = param + f * D;
    A *m = exp_avg + f * D, *v = exp_avg_sq + f * D;
    const bool has_grad = groups.offset[f] < groups.offset[f + 1];
    if (has_grad) gradient_row(groups, f, values, rows, D, grad);
    if (!unit_norm) {
      has_grad ? adam_row<true>(adam, p, grad, scalars.weight_decay, m, v, D, p)
               : adam_row<false>(adam, p, grad, scalars.weight_decay, m, v, D, p);
      continue;
    }
    // g - <g, p> / <p, p> p: what weight decay adds is parallel to p and goes as well.
    const A square = has_grad ? dot(p, p, D) : A(0);
    const A along = square > 0 ? -dot(grad, p, D) / square : A(0);
    has_grad ? adam_row<true>(adam, p, grad, along, m, v, D, row)
             : adam_row<false>(adam, p, grad, along, m, v, D, row);
    store_unit_row(row, D, p);
  }
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
