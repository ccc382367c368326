// sparse_adam_step: the gradient row of a latent is formed in L1 and applied at once, so that a
// step moves the parameter and its two moments once each way and nothing else.
#include <cmath>

#include "common/moments.h"
#include "cpu/kernels.h"
#include "cpu/support/group_by_latent.h"

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

// The moments [F, D]. In the accumulation type a row is updated where it lies.
template <class A>
struct WideMoments {
  static constexpr bool kInPlace = true;
  A *mean, *square;
};
struct Bf16Moments {
  static constexpr bool kInPlace = false;
  bf16 *mean, *square;
  uint32_t step;
};
struct CodedMoments {
  static constexpr bool kInPlace = false;
  int8_t* mean;
  uint8_t* square;
  float *mean_scale, *square_scale;  // [F, ceil(D / 128)]
  uint32_t step;
};

}  // namespace fastsae

#define FASTSAE_KERNEL "cpu/sparse_adam_step.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

constexpr const char* kOp = "sparse_adam_step";

// The format of the moments, read off exp_avg. Callers may name a dtype that does not fit the
// other tensor: check_tensor refuses it.
ScalarType square_dtype(ScalarType mean) {
  return mean == ScalarType::Char ? ScalarType::Byte : mean;
}

void sparse_adam_step_cpu(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                          const Tensor& values, const Tensor& indices, const Tensor& rows,
                          double lr, double beta1, double beta2, double eps, double weight_decay,
                          int64_t step, bool lazy, bool unit_norm,
                          const std::optional<Tensor>& exp_avg_scale,
                          const std::optional<Tensor>& exp_avg_sq_scale,
                          const std::optional<Tensor>& master,
                          const std::optional<Tensor>& schedule) {
  const CpuLevel level = cpu_level();
  const int64_t N = values.size(0), K = values.size(1), F = param.size(0), D = param.size(1);
  const ScalarType dtype = param.scalar_type(), moment = exp_avg.scalar_type();
  const bool wide = dtype == ScalarType::Double, coded = moment == ScalarType::Char;
  const bool fits = wide ? moment == ScalarType::Double
                         : coded || moment == ScalarType::Float || moment == ScalarType::BFloat16;
  STD_TORCH_CHECK(fits, kOp, ": exp_avg does not have a dtype that moments can have");
  STD_TORCH_CHECK(coded == exp_avg_scale.has_value() && coded == exp_avg_sq_scale.has_value(), kOp,
                  ": scales belong to int8 and uint8 moments");
  check_tensor(kOp, "param", param, {F, D}, dtype);
  check_tensor(kOp, "exp_avg", exp_avg, {F, D}, moment);
  check_tensor(kOp, "exp_avg_sq", exp_avg_sq, {F, D}, square_dtype(moment));
  check_tensor(kOp, "values", values, {N, K}, dtype);
  check_tensor(kOp, "indices", indices, {N, K}, ScalarType::Int);
  check_tensor(kOp, "rows", rows, {N, D}, dtype);
  if (coded) {
    const int64_t blocks = (D + kMomentBlock - 1) / kMomentBlock;
    check_tensor(kOp, "exp_avg_scale", *exp_avg_scale, {F, blocks}, ScalarType::Float);
    check_tensor(kOp, "exp_avg_sq_scale", *exp_avg_sq_scale, {F, blocks}, ScalarType::Float);
  }
  if (master) {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp,
                    ": master belongs to a 16-bit param");
    check_tensor(kOp, "master", *master, {F, D}, ScalarType::Float);
  }
  double t = static_cast<double>(step), step_size = lr / (1 - std::pow(beta1, t));
  double inv_sqrt_correction2 = 1 / std::sqrt(1 - std::pow(beta2, t));
  if (schedule) {
    check_tensor(kOp, "schedule", *schedule, {3}, ScalarType::Double);
    step_size = data<double>(*schedule)[0];
    inv_sqrt_correction2 = data<double>(*schedule)[1];
    t = data<double>(*schedule)[2];
  }
  const Groups groups = group_by_latent(kOp, data<int32_t>(indices), N, K, F);
  if (D == 0) return;
  std::vector<int32_t> active;
  if (lazy) active = groups.active();
  const int32_t* latents = lazy ? active.data() : nullptr;
  with_float_type(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const AdamScalars<A> scalars{
        static_cast<A>(beta1),
        static_cast<A>(1 - beta1),
        static_cast<A>(beta2),
        static_cast<A>(1 - beta2),
        static_cast<A>(inv_sqrt_correction2),
        static_cast<A>(eps),
        static_cast<A>(step_size),
        static_cast<A>(weight_decay),
    };
    const T *v = data<T>(values), *r = data<T>(rows);
    T* p = mutable_data<T>(param);
    // A row's own update moves six rows of memory; the gathered ones are mostly in a cache.
    const auto run = [&](auto* weight, const auto& moments) {
      parallel_latents(groups, lazy ? &active : nullptr, 4, D, [&](int64_t begin, int64_t end) {
        Buffer<A> scratch(2 * D);
        FASTSAE_AT_LEVEL(level, adam_step, groups.view(), scalars, unit_norm, v, r, D, latents,
                         begin, end, scratch.get(), p, weight, moments);
      });
    };
    const auto with_moments = [&](auto* weight) {
      const uint32_t time = static_cast<uint32_t>(static_cast<int64_t>(t));
      if constexpr (sizeof(A) == sizeof(float)) {
        if (moment == ScalarType::BFloat16) {
          return run(weight, Bf16Moments{mutable_data<bf16>(exp_avg),
                                         mutable_data<bf16>(exp_avg_sq), time});
        }
        if (coded) {
          return run(weight,
                     CodedMoments{mutable_data<int8_t>(exp_avg), mutable_data<uint8_t>(exp_avg_sq),
                                  mutable_data<float>(*exp_avg_scale),
                                  mutable_data<float>(*exp_avg_sq_scale), time});
        }
      }
      run(weight, WideMoments<A>{mutable_data<A>(exp_avg), mutable_data<A>(exp_avg_sq)});
    };
    if constexpr (sizeof(T) == 2) {
      if (master) return with_moments(mutable_data<float>(*master));
    }
    with_moments(p);
  });
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("sparse_adam_step_cpu", TORCH_BOX(&fastsae::sparse_adam_step_cpu));
}
