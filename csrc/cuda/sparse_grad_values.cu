// sparse_grad_values: out[n, k] = <grad_out[n], W_dec[indices[n, k]]>.
//
// One warp a token and four of its latents: a piece of grad_out[n] serves four rows; the warps of a
// token run side by side and find it in the cache.
#include "cuda/rows.h"

namespace fastsae {
namespace cuda {
namespace {

constexpr const char* kOp = "sparse_grad_values";
constexpr int kDots = 4;

template <class T, int kVec>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    dot_rows(const T* grad_out, const int32_t* indices, const T* W_dec, T* out, int64_t N,
             int64_t K, int64_t F, int64_t D, uint32_t groups) {
  const uint32_t warp = grid_warp();
  const int64_t n = warp / groups, first = warp % groups * kDots;
  if (n >= N) return;
  const T* x = grad_out + n * D;
  const T* row[kDots];  // null: past the last latent, or an index outside [0, F): not followed
#pragma unroll
  for (int r = 0; r < kDots; ++r) {
    const int32_t index = first + r < K ? indices[n * K + first + r] : -1;
    row[r] = index >= 0 && index < F ? W_dec + index * D : nullptr;
  }
  float sum[kDots] = {};
#pragma unroll 2
  for (int64_t d = lane_id() * kVec; d < D; d += kWarp * kVec) {
    const Raw<T, kVec> a = Raw<T, kVec>::load(x + d);
    Raw<T, kVec> w[kDots] = {};
#pragma unroll
    for (int r = 0; r < kDots; ++r) {
      if (row[r]) w[r] = Raw<T, kVec>::load(row[r] + d);
    }
#pragma unroll
    for (int r = 0; r < kDots; ++r) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[r] = fmaf(a[i], w[r][i], sum[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kDots; ++r) {
    const float dot = warp_sum(sum[r]);
    if (lane_id() == r && first + r < K) out[n * K + first + r] = narrow<T>(row[r] ? dot : 0.f);
  }
}

Tensor sparse_grad_values_cuda(const Tensor& grad_out, const Tensor& indices, const Tensor& W_dec) {
  const int64_t N = indices.size(0), K = indices.size(1), F = W_dec.size(0), D = W_dec.size(1);
  const ScalarType dtype = W_dec.scalar_type();
  check_tensor(kOp, "W_dec", W_dec, W_dec, {F, D}, dtype);
  check_tensor(kOp, "grad_out", grad_out, W_dec, {N, D}, dtype);
  check_tensor(kOp, "indices", indices, W_dec, {N, K}, ScalarType::Int);
  Tensor out = torch::stable::new_empty(W_dec, {N, K});
  if (N * K == 0) return out;
  const Queue queue(W_dec);
  with_gpu_float(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    const T *g = data<T>(grad_out), *W = data<T>(W_dec);
    with_vector<T>(D, {g, W}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const int64_t groups = ceil_div(K, kDots);
      queue.launch(dot_rows<T, kVec>, blocks_for(N, groups), kRowThreads, 0, g,
                   data<int32_t>(indices), W, mutable_data<T>(out), N, K, F, D, groups);
    });
  });
  return out;
}

}  // namespace
}  // namespace cuda
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, FASTSAE_CUDA_KEY, m) {
  m.impl("sparse_grad_values_cuda", TORCH_BOX(&fastsae::cuda::sparse_grad_values_cuda));
}
