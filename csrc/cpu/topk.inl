#include "cpu/select.inl"

namespace fastsae {
namespace FASTSAE_NS {
namespace topk {

// Appends what beats the threshold of the one row in `rows`, in order of index.
template <class T>
static void scan_row(const T* x, int64_t m, Rows<acc_t<T>>* rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int kCols = 2 * V::kLanes;
  A wide[kCols];
  for (int64_t i = 0; i < m; i += kCols) {
    const A* c = wide;
    if (m - i < kCols) {
      for (int j = 0; j < m - i; ++j) wide[j] = widen(x[i + j]);
    } else if constexpr (sizeof(T) == sizeof(A)) {
      c = x + i;
    } else {
      V::load(x + i).store(wide);
      V::load(x + i + V::kLanes).store(wide + V::kLanes);
    }
    const int n = static_cast<int>(m - i < kCols ? m - i : kCols);
    emit<A, 2>(c, 0, 1, n, i, nullptr, nullptr, rows);
  }
}

}  // namespace topk
}  // namespace FASTSAE_NS
}  // namespace fastsae
