// Weighted sums and inner products of gathered rows: the inner loops of every sparse operator.
// Included by the .inl of an operator, once per CPU level; no include guard.
//
// They run at the speed of the memory that the rows come from: four whole rows at a time, and the
// rows eight places further on are asked for into L2 meanwhile. (Keeping a block of columns in
// registers over all rows, with or without prefetch, took 1.5 to 2 times as long.) `readable` says
// how many entries of `index` may be looked at, so that the prefetch reaches into the next group.

namespace fastsae {
namespace FASTSAE_NS {

constexpr int kAhead = 8;

// The next kRows rows and those to prefetch. With nothing left to prefetch, the rows themselves.
template <int kRows, class T>
struct RowSet {
  const T* row[kRows];
  const T* next[kRows];

  RowSet(const T* rows, const int32_t* index, int64_t readable, int64_t D) {
    for (int r = 0; r < kRows; ++r) {
      row[r] = rows + index[r] * D;
      next[r] = r + kAhead < readable ? rows + index[r + kAhead] * D : row[r];
    }
  }
  void prefetch_next(int64_t d) const {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + d, 0, 2);
  }
};

// sum[d] (+)= sum_r weights[r] rows[index[r], d]; kFirst: sum is written, not added to.
template <int kRows, bool kFirst, class T>
void add_rows(const acc_t<T>* weights, const int32_t* index, int64_t readable, const T* rows,
              int64_t D, acc_t<T>* sum) {
  using V = Vec<acc_t<T>>;
  const RowSet<kRows, T> set(rows, index, readable, D);
  V w[kRows];
  for (int r = 0; r < kRows; ++r) w[r] = V::set1(weights[r]);
  int64_t d = 0;
  for (; d + V::kLanes <= D; d += V::kLanes) {
    set.prefetch_next(d);
    V s = kFirst ? w[0] * V::load(set.row[0] + d) : V::load(sum + d);
    for (int r = kFirst; r < kRows; ++r) s = V::fma(w[r], V::load(set.row[r] + d), s);
    s.store(sum + d);
  }
  if (d < D) {
    const int n = static_cast<int>(D - d);
    V s = kFirst ? w[0] * V::load_n(set.row[0] + d, n) : V::load_n(sum + d, n);
    for (int r = kFirst; r < kRows; ++r) s = V::fma(w[r], V::load_n(set.row[r] + d, n), s);
    s.store_n(sum + d, n);
  }
}

// sum[d] (+)= sum_{j < count} weights[j] rows[index[j], d], in the order of j. count 0 with kFirst
// is not allowed.
template <bool kFirst, class T>
void weighted_sum(const acc_t<T>* weights, const int32_t* index, int64_t count, int64_t readable,
                  const T* rows, int64_t D, acc_t<T>* sum) {
  int64_t j = 0;
  if (kFirst) {
    j = count < 4 ? count : 4;
    if (j == 4) add_rows<4, true>(weights, index, readable, rows, D, sum);
    if (j == 3) add_rows<3, true>(weights, index, readable, rows, D, sum);
    if (j == 2) add_rows<2, true>(weights, index, readable, rows, D, sum);
    if (j == 1) add_rows<1, true>(weights, index, readable, rows, D, sum);
  }
  for (; j + 4 <= count; j += 4) {
    add_rows<4, false>(weights + j, index + j, readable - j, rows, D, sum);
  }
  if (count - j == 3) add_rows<3, false>(weights + j, index + j, readable - j, rows, D, sum);
  if (count - j == 2) add_rows<2, false>(weights + j, index + j, readable - j, rows, D, sum);
  if (count - j == 1) add_rows<1, false>(weights + j, index + j, readable - j, rows, D, sum);
}

// out[r] = <x, rows[index[r]]>.
template <int kRows, class T>
void dot_rows(const T* x, const int32_t* index, int64_t readable, const T* rows, int64_t D,
              T* out) {
  using V = Vec<acc_t<T>>;
  const RowSet<kRows, T> set(rows, index, readable, D);
  V even[kRows], odd[kRows];  // two chains each: an fma's result is not needed at once
  for (int r = 0; r < kRows; ++r) even[r] = odd[r] = V::zero();
  int64_t d = 0;
  for (; d + 2 * V::kLanes <= D; d += 2 * V::kLanes) {
    set.prefetch_next(d);
    set.prefetch_next(d + V::kLanes);
    const V x0 = V::load(x + d), x1 = V::load(x + d + V::kLanes);
    for (int r = 0; r < kRows; ++r) {
      even[r] = V::fma(x0, V::load(set.row[r] + d), even[r]);
      odd[r] = V::fma(x1, V::load(set.row[r] + d + V::kLanes), odd[r]);
    }
  }
  for (; d < D; d += V::kLanes) {
    const int n = static_cast<int>(D - d < V::kLanes ? D - d : V::kLanes);
    const V x0 = n == V::kLanes ? V::load(x + d) : V::load_n(x + d, n);
    for (int r = 0; r < kRows; ++r) {
      const T* p = set.row[r] + d;
      even[r] = V::fma(x0, n == V::kLanes ? V::load(p) : V::load_n(p, n), even[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = narrow<T>((even[r] + odd[r]).sum());
}

// out[d] = sum[d], rounded to T.
template <class T>
void store_row(const acc_t<T>* sum, int64_t D, T* out) {
  using V = Vec<acc_t<T>>;
  int64_t d = 0;
  for (; d + V::kLanes <= D; d += V::kLanes) V::load(sum + d).store(out + d);
  if (d < D) V::load_n(sum + d, static_cast<int>(D - d)).store_n(out + d, static_cast<int>(D - d));
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
