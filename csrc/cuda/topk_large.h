// topk for a k that shared memory cannot hold: the order of the k-th largest digit by digit, the
// winners in order of index, then a stable sort of them by order.
#pragma once

#include "cuda/radix_sort.h"
#include "cuda/topk_order.h"

namespace fastsae {
namespace cuda {

constexpr int kLargeThreads = 256;
constexpr int kLargeTile = 8192;
constexpr int kLargeDigitBits = 11;
constexpr int kLargeDigits = 1 << kLargeDigitBits;
constexpr int64_t kLargePairs = 1 << 24;  // winners sorted at once: 256 MB of workspace

// The leading digits of the k-th largest order so far, and how many with those digits are taken.
struct RowState {
  uint32_t prefix, need;
};

struct LargeShared {
  uint32_t bins[kLargeDigits];
  uint32_t sums[kLargeThreads / kWarp];
};

// One block a tile of a row: bins [rows, kLargeDigits] of those that share the row's prefix.
// kFirst: every element does, and `state` is not read.
template <bool kFirst, class T>
__global__ void __launch_bounds__(kLargeThreads)
    large_count(const T* x, int64_t m, int64_t tiles, int shift, int digit_bits,
                const RowState* state, uint32_t* bins) {
  LargeShared& s = dynamic_shared<LargeShared>();
  const int64_t n = blockIdx.x / tiles, first = blockIdx.x % tiles * kLargeTile;
  const int digits = 1 << digit_bits;
  const uint32_t prefix = kFirst ? 0 : state[n].prefix;
  for (int d = threadIdx.x; d < digits; d += kLargeThreads) s.bins[d] = 0;
  __syncthreads();
  for (int64_t i = first + threadIdx.x; i < first + kLargeTile && i < m; i += kLargeThreads) {
    const uint32_t top = Order<T>::of(x[n * m + i]) >> shift;
    if (kFirst || top >> digit_bits == prefix) atomicAdd(&s.bins[top & (digits - 1)], 1u);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < digits; d += kLargeThreads) {
    if (s.bins[d]) atomicAdd(&bins[n * kLargeDigits + d], s.bins[d]);
  }
}

// One block a row: the digit in which the k-th largest lies. Clears the bins for the next digit.
static __global__ void __launch_bounds__(kLargeThreads)
    large_pick(uint32_t* bins, int digit_bits, bool first, uint32_t k, RowState* state) {
  LargeShared& s = dynamic_shared<LargeShared>();
  const int64_t n = blockIdx.x;
  const int digits = 1 << digit_bits;
  const RowState before = first ? RowState{0, k} : state[n];
  uint32_t larger = 0;
  for (int top = digits - 1; top >= 0; top -= kLargeThreads) {
    const int d = top - static_cast<int>(threadIdx.x);
    uint32_t* bin = bins + n * kLargeDigits + d;
    const uint32_t mine = d >= 0 ? *bin : 0;
    uint32_t sum = 0;
    const uint32_t above = larger + block_scan(mine, s.sums, &sum);
    if (d >= 0) *bin = 0;
    if (above < before.need && before.need <= above + mine) {
      state[n] = {before.prefix << digit_bits | static_cast<uint32_t>(d), before.need - above};
    }
    larger += sum;
    __syncthreads();
  }
}

// counts [rows, 2, tiles]: elements of a tile above the row's k-th order, and equal to it.
template <class T>
__global__ void __launch_bounds__(kLargeThreads)
    large_winners(const T* x, int64_t m, int64_t tiles, const RowState* state, uint32_t* counts) {
  LargeShared& s = dynamic_shared<LargeShared>();
  const int64_t n = blockIdx.x / tiles, tile = blockIdx.x % tiles, first = tile * kLargeTile;
  const uint32_t kth = state[n].prefix;
  uint32_t above = 0, equal = 0;
  for (int64_t i = first + threadIdx.x; i < first + kLargeTile && i < m; i += kLargeThreads) {
    const uint32_t order = Order<T>::of(x[n * m + i]);
    above += order > kth;
    equal += order == kth;
  }
  uint32_t total = 0;  // two sums in one: a tile has fewer than 2^16 elements
  block_scan(above << 16 | equal, s.sums, &total);
  if (threadIdx.x == 0) {
    counts[(2 * n) * tiles + tile] = total >> 16;
    counts[(2 * n + 1) * tiles + tile] = total & 0xffff;
  }
}
static_assert(kLargeTile < 1 << 16, "two counts in a word");

// Winners in order of index, as pairs to sort: ascending keys are descending orders.
template <class T>
__global__ void __launch_bounds__(kLargeThreads)
    large_scatter(const T* x, int64_t m, int64_t tiles, int64_t k, const RowState* state,
                  const uint32_t* counts, uint32_t* key, int32_t* index) {
  LargeShared& s = dynamic_shared<LargeShared>();
  const int64_t n = blockIdx.x / tiles, tile = blockIdx.x % tiles, first = tile * kLargeTile;
  const RowState row = state[n];
  uint32_t above = counts[(2 * n) * tiles + tile], equal = counts[(2 * n + 1) * tiles + tile];
  for (int64_t i0 = first; i0 < first + kLargeTile && i0 < m; i0 += kLargeThreads) {
    const int64_t i = i0 + threadIdx.x;
    const uint32_t order = i < m ? Order<T>::of(x[n * m + i]) : 0;
    const bool is_above = order > row.prefix, is_equal = i < m && order == row.prefix;
    uint32_t total = 0;
    const uint32_t before =
        block_scan(uint32_t(is_above) << 16 | uint32_t(is_equal), s.sums, &total);
    const uint32_t ties = equal + (before & 0xffff);
    if (is_above || (is_equal && ties < row.need)) {
      const int64_t to = n * k + above + (before >> 16) + (ties < row.need ? ties : row.need);
      key[to] = order ^ Order<T>::kAll;
      index[to] = static_cast<int32_t>(i);
    }
    above += total >> 16;
    equal += total & 0xffff;
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kLargeThreads)
    large_gather(const T* x, int64_t m, int64_t k, int64_t count, const int32_t* sorted, T* values,
                 int32_t* indices) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLargeThreads + threadIdx.x;
  if (i >= count) return;
  indices[i] = sorted[i];
  values[i] = x[i / k * m + sorted[i]];
}

template <class T>
void select_large(const Queue& queue, const Tensor& x, int64_t n, int64_t m, int64_t k, T* values,
                  int32_t* indices) {
  const int64_t tiles = ceil_div(m, kLargeTile);
  const int64_t rows = k < kLargePairs ? (n < kLargePairs / k ? n : kLargePairs / k) : 1;
  const RadixSort pairs(x, rows, k);
  const Tensor bins = workspace<uint32_t>(x, rows * kLargeDigits);
  const Tensor states = workspace<RowState>(x, rows);
  const Tensor counts = workspace<uint32_t>(x, rows * 2 * (tiles + 1));
  uint32_t *bin = mutable_data<uint32_t>(bins), *count = mutable_data<uint32_t>(counts);
  RowState* state = mutable_data<RowState>(states);
  constexpr size_t kShared = sizeof(LargeShared);
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t r = n - first < rows ? n - first : rows;
    const T* in = data<T>(x) + first * m;
    queue.zero(bin, r * kLargeDigits * sizeof(uint32_t));
    for (int shift = Order<T>::kBits; shift > 0;) {
      const bool top = shift == Order<T>::kBits;
      const int digit_bits = shift < kLargeDigitBits ? shift : kLargeDigitBits;
      shift -= digit_bits;
      queue.launch(top ? large_count<true, T> : large_count<false, T>, r * tiles, kLargeThreads,
                   kShared, in, m, tiles, shift, digit_bits, state, bin);
      queue.launch(large_pick, r, kLargeThreads, kShared, bin, digit_bits, top, k, state);
    }
    queue.launch(large_winners<T>, r * tiles, kLargeThreads, kShared, in, m, tiles, state, count);
    const SortPass sums{nullptr, nullptr, nullptr, nullptr, m,
                        tiles,   0,       2,       count,   count + 2 * r * tiles};
    queue.launch(sort_sum, 2 * r, kSortThreads, sizeof(SortShared), sums);
    queue.launch(large_scatter<T>, r * tiles, kLargeThreads, kShared, in, m, tiles, k, state, count,
                 pairs.key(0), pairs.payload(0));
    const int sorted = pairs.sort(queue, Order<T>::kBits, r);
    queue.launch(large_gather<T>, ceil_div(r * k, kLargeThreads), kLargeThreads, 0, in, m, k, r * k,
                 pairs.payload(sorted), values + first * k, indices + first * k);
  }
}

}  // namespace cuda
}  // namespace fastsae
