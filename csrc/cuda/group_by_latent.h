// The pairs (token, latent) of a batch, grouped by latent on the device: a stable radix sort by
// latent, so the same result in every run; no host sync.
#pragma once

#include "cuda/radix_sort.h"
#include "cuda/rows.h"

namespace fastsae {
namespace cuda {

// What the kernels read. Pairs whose index lies outside [0, F) come last and belong to no latent.
struct GroupsView {
  const uint32_t* latent;   // [P] of the sorted pairs; F when it lies outside
  const uint32_t* offset;   // [F + 1]: pairs of latent f are [offset[f], offset[f + 1])
  const int32_t* position;  // [P]: n * K + k, ascending within a latent
  int64_t P, K, F;
};

static __global__ void __launch_bounds__(kSortThreads)
    group_keys(const int32_t* indices, int64_t P, int64_t F, uint32_t* key, int32_t* position) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  if (i >= P) return;
  const int32_t index = indices[i];
  key[i] = index >= 0 && index < F ? index : static_cast<uint32_t>(F);
  position[i] = static_cast<int32_t>(i);
}

// The first pair of every latent, by bisection: no latent waits for the gap before it.
static __global__ void __launch_bounds__(kSortThreads)
    group_offsets(const uint32_t* latent, int64_t P, int64_t F, uint32_t* offset) {
  const int64_t f = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  if (f > F) return;
  int64_t low = 0, high = P;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (latent[middle] < f) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  offset[f] = static_cast<uint32_t>(low);
}

class Groups {
 public:
  // indices [N, K].
  Groups(const Queue& queue, const char* op, const Tensor& indices, int64_t F)
      : P_(indices.size(0) * indices.size(1)),
        K_(indices.size(1)),
        F_(checked(op, P_, F)),
        pairs_(indices, 1, P_),
        offset_(workspace<uint32_t>(indices, F + 1)) {
    queue.launch(group_keys, ceil_div(P_, kSortThreads), kSortThreads, 0, data<int32_t>(indices),
                 P_, F, pairs_.key(0), pairs_.payload(0));
    int bits = 0;
    while (F >> bits) ++bits;
    sorted_ = pairs_.sort(queue, bits, 1);
    queue.launch(group_offsets, ceil_div(F + 1, kSortThreads), kSortThreads, 0, pairs_.key(sorted_),
                 P_, F, mutable_data<uint32_t>(offset_));
  }

  GroupsView view() const {
    return {pairs_.key(sorted_), data<uint32_t>(offset_), pairs_.payload(sorted_), P_, K_, F_};
  }

 private:
  static int64_t checked(const char* op, int64_t P, int64_t F) {
    STD_TORCH_CHECK(P <= INT32_MAX && F < INT32_MAX, op, ": N * K = ", P, " and n_latents = ", F,
                    " must be below 2^31");
    return F;
  }

  int64_t P_, K_, F_;
  RadixSort pairs_;
  Tensor offset_;
  int sorted_ = 0;
};

// ---- gradient rows: sum over the pairs of a latent of values * rows[token] ----------------------

// A latent with more pairs is summed in parts by many warps, the parts then in order.
constexpr int kPart = 256;

template <class T>
struct LatentPairs {
  GroupsView g;
  const T* values;

  __device__ WeightedRow operator()(int64_t j) const {
    const uint32_t position = g.position[j];
    return {widen(values[position]), static_cast<int32_t>(position / static_cast<uint32_t>(g.K))};
  }
};

// parts [2 ceil(P / kPart), D]. Part p of the sorted pairs holds pieces of at most two heavy
// latents: that of its first pair has row 2p, that of its last pair, if another, row 2p + 1.
template <int kVec, class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    sum_parts(GroupsView g, const T* values, const T* rows, int64_t D, uint32_t slices,
              float* parts) {
  const uint32_t warp = grid_warp();
  const int64_t part = warp / slices, column = (warp % slices * kWarp + lane_id()) * int64_t(kVec);
  const int64_t begin = part * kPart, end = begin + kPart < g.P ? begin + kPart : g.P;
  if (begin >= g.P) return;
  for (int which = 0; which < 2; ++which) {
    const int64_t f = g.latent[which ? end - 1 : begin];
    if (f >= g.F || (which && f == g.latent[begin])) continue;
    const int64_t first = g.offset[f], last = g.offset[f + 1];
    if (last - first <= kPart) continue;
    float sum[kVec] = {};
    add_rows(LatentPairs<T>{g, values}, first > begin ? first : begin, last < end ? last : end,
             rows, D, column, sum);
    if (column < D) store_narrow(parts + (2 * part + which) * D + column, sum);
  }
}

// The columns of the gradient row of latent f that this lane owns; the whole warp calls it.
template <int kVec, class T>
__device__ void gradient_row(const GroupsView& g, int64_t f, const T* values, const T* rows,
                             int64_t D, int64_t column, const float* parts, float (&sum)[kVec]) {
  const int64_t begin = g.offset[f], end = g.offset[f + 1];
  if (end - begin <= kPart) {
    add_rows(LatentPairs<T>{g, values}, begin, end, rows, D, column, sum);
    return;
  }
  if (column >= D) return;
  for (int64_t part = begin / kPart; part <= (end - 1) / kPart; ++part) {
    float v[kVec];
    load_wide(parts + (2 * part + (g.latent[part * kPart] != f)) * D + column, v);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += v[i];
  }
}

inline Tensor parts_workspace(const Tensor& like, int64_t P, int64_t D) {
  return workspace<float>(like, 2 * ceil_div(P, kPart) * D);
}

// Fills the parts of the heavy latents.
template <int kVec, class T>
void sum_heavy(const Queue& queue, const GroupsView& g, const T* values, const T* rows, int64_t D,
               const Tensor& parts) {
  const int64_t slices = ceil_div(D, kWarp * kVec);
  queue.launch(sum_parts<kVec, T>, blocks_for(ceil_div(g.P, kPart), slices), kRowThreads, 0, g,
               values, rows, D, slices, mutable_data<float>(parts));
}

}  // namespace cuda
}  // namespace fastsae
