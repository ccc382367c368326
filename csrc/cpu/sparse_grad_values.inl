#include "cpu/rows.inl"

namespace fastsae {
namespace FASTSAE_NS {

// Tokens [begin, end) of N.
template <class T>
void grad_values(const T* grad_out, const int32_t* indices, const T* W_dec, T* out, int64_t N,
                 int64_t K, int64_t D, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* x = grad_out + n * D;
    const int32_t* index = indices + n * K;
    const int64_t readable = (N - n) * K;
    T* o = out + n * K;
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) dot_rows<4>(x, index + k, readable - k, W_dec, D, o + k);
    if (K - k == 3) dot_rows<3>(x, index + k, readable - k, W_dec, D, o + k);
    if (K - k == 2) dot_rows<2>(x, index + k, readable - k, W_dec, D, o + k);
    if (K - k == 1) dot_rows<1>(x, index + k, readable - k, W_dec, D, o + k);
  }
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
