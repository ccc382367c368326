// The gradient row of one latent, summed from its pairs. Included by the .inl of an operator, once
// per CPU level; no include guard.
#include "cpu/rows.inl"

namespace fastsae {
namespace FASTSAE_NS {

// sum[d] = sum over the pairs of latent f, in order, of values * rows[token, d]; f has pairs.
template <class T>
void gradient_row(const GroupsView& groups, int64_t f, const T* values, const T* rows, int64_t D,
                  acc_t<T>* sum) {
  constexpr int64_t kWeights = 64;  // gathered at a time, to the stack
  acc_t<T> weights[kWeights];
  const int64_t begin = groups.offset[f], end = groups.offset[f + 1];
  for (int64_t j = begin; j < end; j += kWeights) {
    const int64_t count = end - j < kWeights ? end - j : kWeights;
    for (int64_t i = 0; i < count; ++i) weights[i] = widen(values[groups.position[j + i]]);
    const int32_t* token = groups.token + j;
    if (j == begin) {
      weighted_sum<true>(weights, token, count, groups.n_pairs - j, rows, D, sum);
    } else {
      weighted_sum<false>(weights, token, count, groups.n_pairs - j, rows, D, sum);
    }
  }
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
