// Weighted sums and inner products of gathered rows, for the warps of the sparse operators.
//
// A warp owns a slice of the columns: 32 lanes of kVec elements, 16 bytes a lane where rows lie on
// 16-byte addresses, else one element. No shared memory and no barriers: eight rows are in flight.
#pragma once

#include "cuda/device.h"

namespace fastsae {
namespace cuda {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kBatch = 8;  // rows in flight a warp
// Blocks a multiprocessor for __launch_bounds__: 128 registers. Without it ptxas squeezes the
// kernels into 32 to 48, spills, and keeps two rows in flight; with 80 the widest still spill.
constexpr int kRowBlocks = 2;

// Warps of a grid are numbered item by item, slice by slice. 32 bits: a 64-bit division is a call.
__device__ __forceinline__ uint32_t grid_warp() { return blockIdx.x * kRowWarps + warp_id(); }
inline int64_t blocks_for(int64_t items, int64_t slices) {
  STD_TORCH_CHECK(items * slices <= INT32_MAX, items, " rows in ", slices, " slices are too many");
  return ceil_div(items * slices, kRowWarps);
}

// One row of a weighted sum; row < 0: none.
struct WeightedRow {
  float weight;
  int32_t row;
};

// kVec elements as they lie in memory.
template <class T, int kVec>
struct Raw {
  Pack<T> pack;
  __device__ __forceinline__ static Raw load(const T* p) { return {load_pack(p)}; }
  __device__ __forceinline__ float operator[](int i) const { return widen(pack.v[i]); }
};
template <class T>
struct Raw<T, 1> {
  T v;
  __device__ __forceinline__ static Raw load(const T* p) { return {*p}; }
  __device__ __forceinline__ float operator[](int) const { return widen(v); }
};

// kVec consecutive elements as floats. fp32 may have more of them than a pack: several loads.
template <int kVec, class T>
__device__ __forceinline__ void load_wide(const T* p, float (&v)[kVec]) {
  constexpr int kSize = kVec == 1 ? 1 : Pack<T>::kSize;
#pragma unroll
  for (int first = 0; first < kVec; first += kSize) {
    const Raw<T, kSize> raw = Raw<T, kSize>::load(p + first);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[first + i] = raw[i];
  }
}

// To global memory; rounds once.
template <int kVec, class T>
__device__ __forceinline__ void store_narrow(T* p, const float (&v)[kVec]) {
  if constexpr (kVec == 1) {
    *p = narrow<T>(v[0]);
  } else {
#pragma unroll
    for (int first = 0; first < kVec; first += Pack<T>::kSize) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < Pack<T>::kSize; ++i) pack.v[i] = narrow<T>(v[first + i]);
      store_pack(p + first, pack);
    }
  }
}

// sum[i] += the weighted sum of rows[row, column + i] over pair(j), j in [begin, end), in order.
// The whole warp calls it with one range; a lane with column >= D reads no row.
template <int kVec, class T, class PairOf>
__device__ void add_rows(const PairOf& pair, int64_t begin, int64_t end, const T* rows, int64_t D,
                         int64_t column, float (&sum)[kVec]) {
  for (int64_t first = begin; first < end; first += kWarp) {
    WeightedRow mine{0, -1};
    if (first + lane_id() < end) mine = pair(first + lane_id());
    const int count = end - first < kWarp ? static_cast<int>(end - first) : kWarp;
    for (int j = 0; j < count; j += kBatch) {
      Raw<T, kVec> raw[kBatch] = {};
      float weight[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        weight[b] = __shfl_sync(kFullWarp, mine.weight, j + b);
        const int32_t row = __shfl_sync(kFullWarp, mine.row, j + b);
        if (row >= 0 && column < D) raw[b] = Raw<T, kVec>::load(rows + row * D + column);
        if (row < 0) weight[b] = 0;
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] = fmaf(weight[b], raw[b][i], sum[i]);
      }
    }
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) v += __shfl_xor_sync(kFullWarp, v, d);
  return v;
}

// Calls f(Int<kVec>) with the widest kVec that rows of D elements at these addresses allow.
template <int kValue>
struct Int {
  static constexpr int value = kValue;
};
template <class T, class F>
void with_vector(int64_t D, std::initializer_list<const void*> pointers, const F& f) {
  bool aligned = D % Pack<T>::kSize == 0;
  for (const void* p : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  aligned ? f(Int<Pack<T>::kSize>{}) : f(Int<1>{});
}

}  // namespace cuda
}  // namespace fastsae
