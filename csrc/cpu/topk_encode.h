// Shared by the driver (topk_encode.cpp, compiled for the baseline) and the kernels (.inl, compiled
// once per CPU level): row state, jobs and the table of kernels. Nothing here may be vectorised.
#pragma once

#include <cstdint>

#include "cpu/select.h"

namespace fastsae {
namespace topk {

constexpr int kMaxCols = 32;  // latents of the widest tile

// Row panels [panel_begin, panel_end) of `a` against all latent panels of `b`. What a place of a
// panel holds: products.inl.
template <class T>
struct Tiles {
  int64_t depth;                   // places of a row
  int mr;                          // rows of one panel of a
  int64_t panel_begin, panel_end;  // row panels
  int64_t n_rows;                  // valid rows of a
  const T* a;                      // [panels][depth][mr]
  const T* b;                      // [latent panels][depth][nr]
  int64_t n_cols;                  // valid latents of b
  int64_t first;                   // index of the first latent of b
  int64_t block;                   // latent panels that fit in L2 beside a row panel
};

// Where scores go: into the k best of their rows.
template <class T>
struct ToRows {
  const T* bias;   // [F] or null
  const T* scale;  // [F] or null
  Rows<T>* rows;
};

template <class T>
struct PlainJob : Tiles<T> {
  ToRows<T> to;
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
  FilterCols() = default;
  FilterCols(float* store, int64_t n)  // 5 * n of them
      : scale(store), upper(scale + n), lower(upper + n), norm(lower + n), residual(norm + n) {}
  float *scale, *upper, *lower, *norm, *residual;
};

// Where bounds go: to the candidates of their rows.
struct ToFilter {
  FilterCols cols;  // of the chunk of latents
  FilterRows* rows;
};

struct FilterJob : Tiles<float> {
  ToFilter to;
};

// Row panels against the latents [begin, end) of W as it lies, read once.
template <class T, class In>
struct StreamJob {
  int64_t d, n_rows, begin, end;
  int mr;
  const T* a;  // [panels][depth][mr]
  const In* w;
  T* c;  // scratch [panels * mr * cols]
  ToRows<T> to;
};

template <class T, class In>
struct Kernels {
  int max_rows, cols;  // of the widest tile
  int per;             // elements of d in a place of a panel
  void (*scan)(const PlainJob<T>&);
  void (*scan_stream)(const StreamJob<T, In>&);
  // Places [begin, end) of `cols` rows, [end - begin][cols].
  void (*pack)(const In* const* rows, int64_t begin, int64_t end, int64_t d, T* out);
  void (*places)(const In* row, int64_t d, T* out);
  // out[i] = <x[0], rows[i]>, x[0] as places.
  void (*scores)(const T* const* x, const In* const* rows, int64_t n, int64_t d, T* out);
  void (*shrink)(Rows<T>&, int64_t row);  // for counts up to kSelect; null: none
  // The filter, or null. It has the same tiles, of bf16 pairs.
  void (*scan_filter)(const FilterJob&);
  // Raises a row's threshold to the k-th best of its lower bounds and the `known` exact ranks, and
  // drops the candidates below it.
  void (*prune)(FilterRows&, int64_t row, const float* ranks, int64_t known, int64_t k);
  // All pairs of `cols` rows, rounded; square[i] = sum w^2, residual[i] = sum (w - w^)^2.
  void (*pack_bf16)(const In* const* rows, int64_t d, float* out, float* square, float* residual);
};

}  // namespace topk
}  // namespace fastsae
