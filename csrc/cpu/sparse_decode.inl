#include "cpu/rows.inl"

namespace fastsae {
namespace FASTSAE_NS {

// Tokens [begin, end) of N. scratch: D + K accumulators.
template <class T>
void decode(const T* values, const int32_t* indices, const T* W_dec, const T* bias, T* out,
            int64_t N, int64_t K, int64_t D, int64_t begin, int64_t end, acc_t<T>* scratch) {
  acc_t<T>*sum = scratch, *weights = scratch + D;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t k = 0; k < K; ++k) weights[k] = widen(values[n * K + k]);
    const int32_t* index = indices + n * K;
    const int64_t readable = (N - n) * K;
    if (bias || K == 0) {
      for (int64_t d = 0; d < D; ++d) sum[d] = bias ? widen(bias[d]) : acc_t<T>(0);
      weighted_sum<false>(weights, index, K, readable, W_dec, D, sum);
    } else {
      weighted_sum<true>(weights, index, K, readable, W_dec, D, sum);
    }
    store_row(sum, D, out + n * D);
  }
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
