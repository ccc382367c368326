// Shared by the driver (topk_encode.cpp, compiled for the baseline) and the kernels (.inl, compiled
// once per CPU level): row state, jobs and the table of kernels. Nothing here may be vectorised.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace fastsae {
namespace topk {

constexpr int kMaxRows = 14;  // rows of the widest microkernel: 14 x 2 accumulators of 32 registers
constexpr int kMaxCols = 32;
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

// Scores of packed row panels against packed latent panels, appended to `rows`.
template <class T>
struct PlainJob {
  int64_t depth;                   // D, or pairs of D for bf16 products
  int mr;                          // rows of one panel of A
  int64_t panel_begin, panel_end;  // row panels
  int64_t n_rows;                  // valid rows of A
  const void* a;                   // [panels][depth][mr]
  const void* b;                   // [latent panels][depth][nr]
  int64_t n_cols;                  // valid latents of b
  int64_t first;                   // index of the first latent of b
  int64_t block;                   // latent panels that fit in L2 beside a row panel
  const T* bias;                   // [F] or null
  const T* scale;                  // [F] or null
  Rows<T>* rows;
};

// The filter's side of a row: bounds of the ranks of candidates not yet rescored, in order of
// index, and the largest known lower bound of the k-th best rank.
struct FilterRows {
  float *lower, *upper;  // [rows, stride]
  int32_t* index;
  int32_t *count, *limit;  // [rows]; at `limit` candidates `full` is called
  float* threshold;
  const float* err_w;   // [rows] factor of |w|: |x - x^| and accumulation errors
  const float* err_dw;  // [rows] factor of |w - w^|: |x^|
  int64_t stride;
  void* owner;
  void (*full)(void* owner, int64_t row);
};

// Per latent of a chunk, padded to whole panels: rank = score * scale + bias, |error| <=
// err_w * norm + err_dw * residual + the slack already inside lower and upper.
struct FilterCols {
  float *scale, *upper, *lower, *norm, *residual;
};

struct FilterJob {
  int64_t depth;
  int mr;
  int64_t panel_begin, panel_end, n_rows;
  const uint32_t *a, *b;
  int64_t n_cols, first, block;
  FilterCols cols;
  FilterRows* rows;
};

// Unpacked rows of W against few rows of x (as T): no packing, W streamed once.
template <class T, class In>
struct DotJob {
  int64_t d, n_rows, begin, end;
  const T* x;  // [n_rows, D]
  const In* w;
  const T *bias, *scale;
  Rows<T>* rows;
};

template <class T, class In>
struct Kernels {
  int max_rows, cols;
  void (*scan)(const PlainJob<T>&);
  // Panel of `cols` latents, [D][cols]; a null row is zero.
  void (*pack)(const In* const* rows, int64_t d, T* out);
  void (*scan_dot)(const DotJob<T, In>&);
  // out[i] = <x, rows[i]>, in the same order of summation as scan_dot.
  void (*dots)(const T* x, const In* const* rows, int64_t n, int64_t d, T* out);
  void (*shrink)(Rows<T>&, int64_t row);  // for counts up to kSelect; null: none
  // bf16 products, or null.
  int bf16_max_rows, bf16_cols;
  void (*scan_bf16)(const PlainJob<T>&);
  void (*scan_filter)(const FilterJob&);
  // Raises a row's threshold to the k-th best of its lower bounds and the `known` exact ranks, and
  // drops the candidates below it.
  void (*prune)(FilterRows&, int64_t row, const float* ranks, int64_t known, int64_t k);
  // [pairs][stride] bf16 pairs; square[i] = sum w^2, residual[i] = sum (w - w^)^2 unless null.
  void (*pack_bf16)(const In* const* rows, int64_t d, uint32_t* out, float* square,
                    float* residual);
};

}  // namespace topk
}  // namespace fastsae
