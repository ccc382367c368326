// sparse_adam_step: the gradient row of a latent is formed in L1 and applied at once, so that a
// step moves the parameter and its two moments once each way and nothing else.
#include <cmath>

#include "common/group_by_latent.h"
#include "cpu/kernels.h"

namespace fastsae {

// What does not depend on the element, computed in double.
template <class A>
struct AdamScalars {
  A beta1, one_minus_beta1, beta2, one_minus_beta2;
  A inv_sqrt_correction2;  // 1 / sqrt(1 - beta2^step)
  A eps;
  A step_size;  // lr / (1 - beta1^step)
  A weight_decay;
};

}  // namespace fastsae

#define FASTSAE_KERNEL "cpu/sparse_adam_step.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

constexpr const char* kOp = "sparse_adam_step";

void sparse_adam_step_cpu(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                          const Tensor& values, const Tensor& indices, const Tensor& rows,
                          double lr, double beta1, double beta2, double eps, double weight_decay,
                          int64_t step, bool lazy, bool unit_norm) {
  const CpuLevel level = cpu_level();
  const int64_t N = values.size(0), K = values.size(1), F = param.size(0), D = param.size(1);
  const ScalarType dtype = param.scalar_type();
  const ScalarType moment = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_tensor(kOp, "param", param, {F, D}, dtype);
  check_tensor(kOp, "exp_avg", exp_avg, {F, D}, moment);
  check_tensor(kOp, "exp_avg_sq", exp_avg_sq, {F, D}, moment);
  check_tensor(kOp, "values", values, {N, K}, dtype);
  check_tensor(kOp, "indices", indices, {N, K}, ScalarType::Int);
  check_tensor(kOp, "rows", rows, {N, D}, dtype);
  const Groups groups = group_by_latent(kOp, data<int32_t>(indices), N, K, F);
  if (D == 0) return;
  std::vector<int32_t> active;
  if (lazy) active = groups.active();
  const int32_t* latents = lazy ? active.data() : nullptr;
  with_float_type(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const double t = static_cast<double>(step);
    const AdamScalars<A> scalars{
        static_cast<A>(beta1),
        static_cast<A>(1 - beta1),
        static_cast<A>(beta2),
        static_cast<A>(1 - beta2),
        static_cast<A>(1 / std::sqrt(1 - std::pow(beta2, t))),
        static_cast<A>(eps),
        static_cast<A>(lr / (1 - std::pow(beta1, t))),
        static_cast<A>(weight_decay),
    };
    const T *v = data<T>(values), *r = data<T>(rows);
    T* p = mutable_data<T>(param);
    A *m = mutable_data<A>(exp_avg), *s = mutable_data<A>(exp_avg_sq);
    // A row's own update moves six rows of memory; the gathered ones are mostly in a cache.
    parallel_latents(groups, lazy ? &active : nullptr, 4, D, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(2 * D);
      FASTSAE_AT_LEVEL(level, adam_step, groups.view(), scalars, unit_norm, v, r, D, latents, begin,
                       end, scratch.get(), p, m, s);
    });
  });
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("sparse_adam_step_cpu", TORCH_BOX(&fastsae::sparse_adam_step_cpu));
}
