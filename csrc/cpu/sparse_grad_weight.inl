#include "cpu/gradient_row.inl"

namespace fastsae {
namespace FASTSAE_NS {

// out[i] for latents[i] (latent i when latents is null), i in [begin, end). sum: D accumulators.
template <class T>
void grad_weight(const GroupsView& groups, const T* values, const T* rows, int64_t D,
                 const int32_t* latents, int64_t begin, int64_t end, acc_t<T>* sum, T* out) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t f = latents ? latents[i] : i;
    if (groups.offset[f] == groups.offset[f + 1]) {
      std::memset(static_cast<void*>(out + i * D), 0, D * sizeof(T));
    } else {
      gradient_row(groups, f, values, rows, D, sum);
      store_row(sum, D, out + i * D);
    }
  }
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
