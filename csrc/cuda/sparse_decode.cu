// sparse_decode: out[n] = b_dec + sum_k values[n, k] W_dec[indices[n, k]].
//
// One warp a token and slice of the columns; the slices of a token run side by side, so that its
// rows are read whole at about the same time.
#include "cuda/rows.h"

namespace fastsae {
namespace cuda {
namespace {

constexpr const char* kOp = "sparse_decode";

// The pairs of one token. An index outside [0, F) is not followed.
template <class T>
struct TokenPairs {
  const T* values;
  const int32_t* indices;
  int64_t F;

  __device__ WeightedRow operator()(int64_t k) const {
    const int32_t index = indices[k];
    const bool valid = index >= 0 && index < F;
    return {valid ? widen(values[k]) : 0.f, valid ? index : -1};
  }
};

template <class T, int kVec>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    decode_rows(const T* values, const int32_t* indices, const T* W_dec, const T* bias, T* out,
                int64_t N, int64_t K, int64_t F, int64_t D, uint32_t slices) {
  const uint32_t warp = grid_warp();
  const int64_t n = warp / slices, column = (warp % slices * kWarp + lane_id()) * int64_t(kVec);
  if (n >= N) return;
  float sum[kVec] = {};
  if (bias && column < D) load_wide(bias + column, sum);
  const TokenPairs<T> pairs{values + n * K, indices + n * K, F};
  add_rows(pairs, 0, K, W_dec, D, column, sum);
  if (column < D) store_narrow(out + n * D + column, sum);
}

Tensor sparse_decode_cuda(const Tensor& values, const Tensor& indices, const Tensor& W_dec,
                          const std::optional<Tensor>& b_dec) {
  const int64_t N = values.size(0), K = values.size(1), F = W_dec.size(0), D = W_dec.size(1);
  const ScalarType dtype = W_dec.scalar_type();
  check_tensor(kOp, "W_dec", W_dec, W_dec, {F, D}, dtype);
  check_tensor(kOp, "values", values, W_dec, {N, K}, dtype);
  check_tensor(kOp, "indices", indices, W_dec, {N, K}, ScalarType::Int);
  if (b_dec) check_tensor(kOp, "b_dec", *b_dec, W_dec, {D}, dtype);
  Tensor out = torch::stable::new_empty(W_dec, {N, D});
  if (N * D == 0) return out;
  const Queue queue(W_dec);
  with_gpu_float(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    const T *v = data<T>(values), *W = data<T>(W_dec), *b = b_dec ? data<T>(*b_dec) : nullptr;
    T* o = mutable_data<T>(out);
    with_vector<T>(D, {W, b, o}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const int64_t slices = ceil_div(D, kWarp * kVec);
      queue.launch(decode_rows<T, kVec>, blocks_for(N, slices), kRowThreads, 0, v,
                   data<int32_t>(indices), W, b, o, N, K, F, D, slices);
    });
  });
  return out;
}

}  // namespace
}  // namespace cuda
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, FASTSAE_CUDA_KEY, m) {
  m.impl("sparse_decode_cuda", TORCH_BOX(&fastsae::cuda::sparse_decode_cuda));
}
