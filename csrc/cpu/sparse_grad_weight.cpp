// sparse_grad_weight: out[f] = sum over the pairs with indices[n, k] = f of values[n, k] rows[n],
// dense or for the latents that occur only. Grouped by latent, so that every row of the result is
// summed by one thread in one order: repeatable bit for bit.
#include "cpu/kernels.h"
#include "cpu/support/group_by_latent.h"

#define FASTSAE_KERNEL "cpu/sparse_grad_weight.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

struct Factors {
  int64_t N, K, D;
  ScalarType dtype;
};

Factors check_factors(const char* op, const Tensor& values, const Tensor& indices,
                      const Tensor& rows) {
  const Factors s{values.size(0), values.size(1), rows.size(1), rows.scalar_type()};
  check_tensor(op, "values", values, {s.N, s.K}, s.dtype);
  check_tensor(op, "indices", indices, {s.N, s.K}, ScalarType::Int);
  check_tensor(op, "rows", rows, {s.N, s.D}, s.dtype);
  return s;
}

// The rows of out: those of `latents`, or all.
void run(const char* op, const Factors& s, const Groups& groups, const Tensor& values,
         const Tensor& rows, const std::vector<int32_t>* latents, const Tensor& out) {
  const CpuLevel level = cpu_level();
  if (s.D == 0) return;
  const int32_t* which = latents ? latents->data() : nullptr;
  with_float_type(s.dtype, op, [&](auto zero) {
    using T = decltype(zero);
    const T *v = data<T>(values), *r = data<T>(rows);
    T* o = mutable_data<T>(out);
    parallel_latents(groups, latents, 1, s.D, [&](int64_t begin, int64_t end) {
      Buffer<acc_t<T>> sum(s.D);
      FASTSAE_AT_LEVEL(level, grad_weight, groups.view(), v, r, s.D, which, begin, end, sum.get(),
                       o);
    });
  });
}

Tensor sparse_grad_weight_cpu(const Tensor& values, const Tensor& indices, const Tensor& rows,
                              int64_t n_latents) {
  const char* op = "sparse_grad_weight";
  const Factors s = check_factors(op, values, indices, rows);
  const Groups groups = group_by_latent(op, data<int32_t>(indices), s.N, s.K, n_latents);
  Tensor out = new_result(rows, {n_latents, s.D});
  run(op, s, groups, values, rows, nullptr, out);
  return out;
}

std::tuple<Tensor, Tensor> sparse_grad_weight_rows_cpu(const Tensor& values, const Tensor& indices,
                                                       const Tensor& rows, int64_t n_latents) {
  const char* op = "sparse_grad_weight_rows";
  const Factors s = check_factors(op, values, indices, rows);
  const Groups groups = group_by_latent(op, data<int32_t>(indices), s.N, s.K, n_latents);
  const std::vector<int32_t> active = groups.active();
  const int64_t count = static_cast<int64_t>(active.size());
  Tensor latents = torch::stable::new_empty(indices, {count});
  std::copy(active.begin(), active.end(), mutable_data<int32_t>(latents));
  Tensor out = new_result(rows, {count, s.D});
  run(op, s, groups, values, rows, &active, out);
  return {latents, out};
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("sparse_grad_weight_cpu", TORCH_BOX(&fastsae::sparse_grad_weight_cpu));
  m.impl("sparse_grad_weight_rows_cpu", TORCH_BOX(&fastsae::sparse_grad_weight_rows_cpu));
}
