// sparse_grad_values: out[n, k] = <grad_out[n], W_dec[indices[n, k]]>.
#include "cpu/kernels.h"

#define FASTSAE_KERNEL "cpu/sparse_grad_values.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

constexpr const char* kOp = "sparse_grad_values";

Tensor sparse_grad_values_cpu(const Tensor& grad_out, const Tensor& indices, const Tensor& W_dec) {
  const CpuLevel level = cpu_level();
  const int64_t N = indices.size(0), K = indices.size(1), F = W_dec.size(0), D = W_dec.size(1);
  const ScalarType dtype = W_dec.scalar_type();
  check_tensor(kOp, "W_dec", W_dec, {F, D}, dtype);
  check_tensor(kOp, "grad_out", grad_out, {N, D}, dtype);
  check_tensor(kOp, "indices", indices, {N, K}, ScalarType::Int);
  const int32_t* index = data<int32_t>(indices);
  check_indices(kOp, index, N * K, F);
  Tensor out = torch::stable::new_empty(W_dec, {N, K});
  with_float_type(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    const T *g = data<T>(grad_out), *W = data<T>(W_dec);
    T* o = mutable_data<T>(out);
    parallel_ranges(N, K * D, [&](int64_t begin, int64_t end) {
      FASTSAE_AT_LEVEL(level, grad_values, g, index, W, o, N, K, D, begin, end);
    });
  });
  return out;
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("sparse_grad_values_cpu", TORCH_BOX(&fastsae::sparse_grad_values_cpu));
}
