// The k best of a row, kept while its scores come: keys, candidate buffers, the cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace fastsae {
namespace topk {

constexpr int kSlack = 32;

// Keys order (rank descending, ties by lowest index, NaN first) as plain unsigned integers.
template <class T>
struct KeyOf;

template <>
struct KeyOf<float> {
  using Key = uint64_t;
  using Bits = uint32_t;
  static constexpr int kShift = 32;
};

template <>
struct KeyOf<double> {
  __extension__ using Key = unsigned __int128;
  using Bits = uint64_t;
  static constexpr int kShift = 64;
};

template <class T>
static inline typename KeyOf<T>::Key make_key(T rank, int32_t index) {
  using Bits = typename KeyOf<T>::Bits;
  using Key = typename KeyOf<T>::Key;
  constexpr Bits sign = Bits(1) << (sizeof(Bits) * 8 - 1);
  Bits bits;
  std::memcpy(&bits, &rank, sizeof bits);
  if (rank == T(0)) bits = 0;  // -0 ties with +0
  bits = rank != rank ? ~Bits(0) : (bits & sign) ? ~bits : (bits | sign);
  return (Key(bits) << KeyOf<T>::kShift) | Key(Bits(0xffffffffu - static_cast<uint32_t>(index)));
}

template <class T>
static inline int32_t key_index(typename KeyOf<T>::Key key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

template <class T>
static inline T key_rank(typename KeyOf<T>::Key key) {
  using Bits = typename KeyOf<T>::Bits;
  constexpr Bits sign = Bits(1) << (sizeof(Bits) * 8 - 1);
  const Bits order = static_cast<Bits>(key >> KeyOf<T>::kShift);
  if (order == ~Bits(0)) return std::numeric_limits<T>::quiet_NaN();
  const Bits bits = (order & sign) ? (order ^ sign) : ~order;
  T rank;
  std::memcpy(&rank, &bits, sizeof rank);
  return rank;
}

// The rank whose order is given, as a threshold: k NaN seen means that only NaN may still enter.
static inline float threshold_from_order(uint32_t order) {
  if (order >= 0xff800000u) return std::numeric_limits<float>::infinity();
  return key_rank<float>(static_cast<uint64_t>(order) << 32);
}

// The best so far of a set of rows: ranks and indices in order of index, cut to the k best when
// they reach `capacity`. A score enters when !(score <= threshold): strict, because a later latent
// loses a tie; NaN as the threshold lets everything in (fewer than k seen), NaN as the score always
// enters.
template <class T>
struct Rows {
  T* rank;           // [rows, stride]
  int32_t* index;    // [rows, stride]
  T* threshold;      // [rows]
  int64_t* count;    // [rows]
  int64_t capacity;  // > k
  int64_t stride;    // capacity + kSlack or more: a whole vector may be stored past the end
  int64_t k;
  void (*shrink)(Rows&, int64_t row);  // keeps the k best, raises the threshold

  inline void add(int64_t row, T r, int32_t i) {
    int64_t& n = count[row];
    rank[row * stride + n] = r;
    index[row * stride + n] = i;
    if (++n >= capacity) shrink(*this, row);
  }
};

// Ranks up to this many are selected by the vectorised kernel, more by std::nth_element.
constexpr int64_t kSelect = 4096;

// Rows::shrink for any count.
template <class T>
void shrink_any(Rows<T>& rows, int64_t row) {
  using Key = typename KeyOf<T>::Key;
  const int64_t n = rows.count[row], k = rows.k;
  if (n < k) return;
  T* rank = rows.rank + row * rows.stride;
  int32_t* index = rows.index + row * rows.stride;
  static thread_local std::vector<Key> keys;
  keys.resize(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = make_key<T>(rank[i], index[i]);
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<Key>());
  const Key kth = keys[k - 1];
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (make_key<T>(rank[i], index[i]) < kth) continue;
    rank[kept] = rank[i];
    index[kept++] = index[i];
  }
  rows.count[row] = k;
  const T threshold = key_rank<T>(kth);
  // k NaN seen: only NaN may still enter, and loses.
  rows.threshold[row] = threshold != threshold ? std::numeric_limits<T>::infinity() : threshold;
  if (n > kSelect) std::vector<Key>().swap(keys);
}

}  // namespace topk
}  // namespace fastsae
