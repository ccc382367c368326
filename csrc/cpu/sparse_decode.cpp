// sparse_decode: out[n] = b_dec + sum_k values[n, k] W_dec[indices[n, k]].
#include "cpu/kernels.h"

#define FASTSAE_KERNEL "cpu/sparse_decode.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

constexpr const char* kOp = "sparse_decode";

Tensor sparse_decode_cpu(const Tensor& values, const Tensor& indices, const Tensor& W_dec,
                         const std::optional<Tensor>& b_dec) {
  const CpuLevel level = cpu_level();
  const int64_t N = values.size(0), K = values.size(1), F = W_dec.size(0), D = W_dec.size(1);
  const ScalarType dtype = W_dec.scalar_type();
  check_tensor(kOp, "W_dec", W_dec, {F, D}, dtype);
  check_tensor(kOp, "values", values, {N, K}, dtype);
  check_tensor(kOp, "indices", indices, {N, K}, ScalarType::Int);
  if (b_dec) check_tensor(kOp, "b_dec", *b_dec, {D}, dtype);
  const int32_t* index = data<int32_t>(indices);
  check_indices(kOp, index, N * K, F);
  Tensor out = torch::stable::new_empty(W_dec, {N, D});
  if (N * D == 0) return out;
  with_float_type(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    const T* bias = b_dec ? data<T>(*b_dec) : nullptr;
    const T *v = data<T>(values), *W = data<T>(W_dec);
    T* o = mutable_data<T>(out);
    parallel_ranges(N, K * D, [&](int64_t begin, int64_t end) {
      Buffer<acc_t<T>> scratch(D + K);
      FASTSAE_AT_LEVEL(level, decode, v, index, W, bias, o, N, K, D, begin, end, scratch.get());
    });
  });
  return out;
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("sparse_decode_cpu", TORCH_BOX(&fastsae::sparse_decode_cpu));
}
