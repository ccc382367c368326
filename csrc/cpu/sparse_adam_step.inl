#include "cpu/gradient_row.inl"
#include "cpu/moments.inl"

namespace fastsae {
namespace FASTSAE_NS {

// <p, p> and <g, p> in one pass.
template <class T>
void products(const T* p, const acc_t<T>* g, int64_t D, acc_t<T>* pp, acc_t<T>* gp) {
  using V = Vec<acc_t<T>>;
  V p0 = V::zero(), p1 = V::zero(), g0 = V::zero(), g1 = V::zero();
  int64_t d = 0;
  for (; d + 2 * V::kLanes <= D; d += 2 * V::kLanes) {
    const V a = V::load(p + d), b = V::load(p + d + V::kLanes);
    p0 = V::fma(a, a, p0);
    p1 = V::fma(b, b, p1);
    g0 = V::fma(a, V::load(g + d), g0);
    g1 = V::fma(b, V::load(g + d + V::kLanes), g1);
  }
  for (; d < D; d += V::kLanes) {
    const int n = static_cast<int>(D - d < V::kLanes ? D - d : V::kLanes);
    const V a = V::load_n(p + d, n);
    p0 = V::fma(a, a, p0);
    g0 = V::fma(a, V::load_n(g + d, n), g0);
  }
  *pp = (p0 + p1).sum();
  *gp = (g0 + g1).sum();
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
// param; returned is its square.
template <bool kGrad, class T, class Out>
acc_t<T> adam_row(const AdamVec<acc_t<T>>& adam, const T* param, const acc_t<T>* grad,
                  acc_t<T> along, acc_t<T>* exp_avg, acc_t<T>* exp_avg_sq, int64_t D, Out* out) {
  using V = Vec<acc_t<T>>;
  const V a = V::set1(along);
  V square = V::zero();
  int64_t d = 0;
  for (; d + V::kLanes <= D; d += V::kLanes) {
    const V p = V::load(param + d);
    V g = kGrad ? V::load(grad + d) : V::zero();
    if (along != 0) g = V::fma(a, p, g);
    V m = V::load(exp_avg + d), v = V::load(exp_avg_sq + d);
    const V next = adam.update(p, g, m, v);
    next.store(out + d);
    square = V::fma(next, next, square);
    m.store(exp_avg + d);
    v.store(exp_avg_sq + d);
  }
  if (d < D) {
    const int n = static_cast<int>(D - d);
    const V p = V::load_n(param + d, n);
    V g = kGrad ? V::load_n(grad + d, n) : V::zero();
    if (along != 0) g = V::fma(a, p, g);
    V m = V::load_n(exp_avg + d, n), v = V::load_n(exp_avg_sq + d, n);
    const V next = adam.update(p, g, m, v);
    next.store_n(out + d, n);
    m.store_n(exp_avg + d, n);
    v.store_n(exp_avg_sq + d, n);
    // Lanes past the end hold 0 - step * 0 / (0 + eps): nothing, or NaN when eps is 0.
    square = V::fma(V::load_n(out + d, n), V::load_n(out + d, n), square);
  }
  return square.sum();
}

// out = scale * row.
template <class T>
void store_scaled(const acc_t<T>* row, acc_t<T> scale, int64_t D, T* out) {
  using V = Vec<acc_t<T>>;
  const V s = V::set1(scale);
  int64_t d = 0;
  for (; d + V::kLanes <= D; d += V::kLanes) (s * V::load(row + d)).store(out + d);
  if (d < D) {
    const int n = static_cast<int>(D - d);
    (s * V::load_n(row + d, n)).store_n(out + d, n);
  }
}

// adam_row on row f with moments in any format.
template <bool kGrad, class W, class M, class Out>
acc_t<W> adam_row(const AdamVec<acc_t<W>>& adam, const W* weight, const acc_t<W>* grad,
                  acc_t<W> along, const M& moments, int64_t f, int64_t D, Out* out) {
  if constexpr (M::kInPlace) {
    return adam_row<kGrad>(adam, weight, grad, along, moments.mean + f * D, moments.square + f * D,
                           D, out);
  } else {
    float m[kMomentSegment], v[kMomentSegment], square = 0;
    for (int64_t d = 0; d < D; d += kMomentSegment) {
      const int64_t n = D - d < kMomentSegment ? D - d : kMomentSegment;
      load_moments(moments, f, D, d, n, m, v);
      square +=
          adam_row<kGrad>(adam, weight + d, kGrad ? grad + d : nullptr, along, m, v, n, out + d);
      store_moments(moments, f, D, d, n, m, v);
    }
    return square;
  }
}

// One Adam step on rows latents[i] (rows i when latents is null), i in [begin, end). The gradient
// row is formed in `scratch` (2 D accumulators, in L1) and used at once. Where the weights have
// wider masters, weight is those and param receives their rounded copy; else they are the same.
template <class T, class W, class M>
void adam_step(const GroupsView& groups, const AdamScalars<acc_t<T>>& scalars, bool unit_norm,
               const T* values, const T* rows, int64_t D, const int32_t* latents, int64_t begin,
               int64_t end, acc_t<T>* scratch, T* param, W* weight, const M& moments) {
  using A = acc_t<T>;
  constexpr bool kMaster = sizeof(W) != sizeof(T);
  const AdamVec<A> adam(scalars);
  A *grad = scratch, *row = scratch + D;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t f = latents ? latents[i] : i;
    W* w = weight + f * D;
    const bool has_grad = groups.offset[f] < groups.offset[f + 1];
    if (has_grad) gradient_row(groups, f, values, rows, D, grad);
    if (!unit_norm) {
      has_grad ? adam_row<true>(adam, w, grad, scalars.weight_decay, moments, f, D, w)
               : adam_row<false>(adam, w, grad, scalars.weight_decay, moments, f, D, w);
      if constexpr (kMaster) store_scaled<T>(w, A(1), D, param + f * D);
      continue;
    }
    // g - <g, p> / <p, p> p: what weight decay adds is parallel to p and goes as well.
    A pp = 0, gp = 0;
    if (has_grad) products(w, grad, D, &pp, &gp);
    const A along = pp > 0 ? -gp / pp : A(0);
    const A square = has_grad ? adam_row<true>(adam, w, grad, along, moments, f, D, row)
                              : adam_row<false>(adam, w, grad, along, moments, f, D, row);
    // A row that is zero or NaN has no direction.
    const A scale = square > 0 ? 1 / std::sqrt(square) : A(1);
    store_scaled(row, scale, D, w);
    if constexpr (kMaster) store_scaled(row, scale, D, param + f * D);
  }
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
