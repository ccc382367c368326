// A stable least-significant-digit radix sort of (key, payload) pairs, in segments of equal length.
//
// Three kernels a digit: every tile counts its digits, the counts of a digit are summed over the
// tiles, every tile writes its pairs to their places in order. Ranks come from position, never from
// the order of atomics, so the result is the same in every run.
#pragma once

#include "cuda/device.h"

namespace fastsae {
namespace cuda {

constexpr int kSortThreads = 256;
constexpr int kSortWarps = kSortThreads / kWarp;
constexpr int kSortTile = 4096;
constexpr int kMaxDigitBits = 9;
constexpr int kMaxDigits = 1 << kMaxDigitBits;

// One pass over segments of n pairs: the digit is (key >> shift) & (digits - 1).
struct SortPass {
  const uint32_t* key;  // [segments, n]
  const int32_t* payload;
  uint32_t* key_out;
  int32_t* payload_out;
  int64_t n;
  int64_t tiles;      // ceil(n / kSortTile)
  int shift, digits;  // a power of two
  uint32_t* count;    // [segments, digits, tiles], then the same as sums over the tiles before
  uint32_t* total;    // [segments, digits]
};

struct SortShared {
  uint32_t count[kSortWarps][kMaxDigits];
  uint32_t sums[kSortWarps];
};

static __global__ void __launch_bounds__(kSortThreads) sort_count(SortPass pass) {
  SortShared& s = dynamic_shared<SortShared>();
  const int64_t segment = blockIdx.x / pass.tiles, tile = blockIdx.x % pass.tiles;
  const int t = threadIdx.x;
  uint32_t* count = s.count[0];
  for (int d = t; d < pass.digits; d += kSortThreads) count[d] = 0;
  __syncthreads();
  const uint32_t* key = pass.key + segment * pass.n;
  for (int64_t i = tile * kSortTile + t; i < (tile + 1) * kSortTile && i < pass.n;
       i += kSortThreads) {
    atomicAdd(&count[(key[i] >> pass.shift) & (pass.digits - 1)], 1u);
  }
  __syncthreads();
  for (int d = t; d < pass.digits; d += kSortThreads) {
    pass.count[(segment * pass.digits + d) * pass.tiles + tile] = count[d];
  }
}

// One block per segment and digit: exclusive sums over the tiles.
static __global__ void __launch_bounds__(kSortThreads) sort_sum(SortPass pass) {
  SortShared& s = dynamic_shared<SortShared>();
  uint32_t* count = pass.count + static_cast<int64_t>(blockIdx.x) * pass.tiles;
  uint32_t before = 0;
  for (int64_t first = 0; first < pass.tiles; first += kSortThreads) {
    const int64_t i = first + threadIdx.x;
    uint32_t sum = 0;
    const uint32_t exclusive = block_scan(i < pass.tiles ? count[i] : 0u, s.sums, &sum);
    if (i < pass.tiles) count[i] = before + exclusive;
    before += sum;
    __syncthreads();
  }
  if (threadIdx.x == 0) pass.total[blockIdx.x] = before;
}

// Every warp owns a contiguous part of the tile and walks it 32 pairs at a time.
static __global__ void __launch_bounds__(kSortThreads) sort_scatter(SortPass pass) {
  constexpr int kPart = kSortTile / kSortWarps;
  SortShared& s = dynamic_shared<SortShared>();
  const int64_t segment = blockIdx.x / pass.tiles, tile = blockIdx.x % pass.tiles;
  const int t = threadIdx.x, warp = warp_id(), lane = lane_id(), digits = pass.digits;
  const uint32_t* key = pass.key + segment * pass.n;
  const int64_t begin = tile * kSortTile + warp * kPart;
  const int64_t end = begin + kPart < pass.n ? begin + kPart : pass.n;

  for (int w = 0; w < kSortWarps; ++w) {
    for (int d = t; d < digits; d += kSortThreads) s.count[w][d] = 0;
  }
  __syncthreads();
  for (int64_t i = begin + lane; i < end; i += kWarp) {
    atomicAdd(&s.count[warp][(key[i] >> pass.shift) & (digits - 1)], 1u);
  }
  __syncthreads();
  // Counts to first places: digits before this one, tiles before this one, warps before this one.
  uint32_t smaller = 0;
  for (int first = 0; first < digits; first += kSortThreads) {
    const int d = first + t;
    uint32_t sum = 0;
    uint32_t place = smaller;
    place += block_scan(d < digits ? pass.total[segment * digits + d] : 0u, s.sums, &sum);
    smaller += sum;
    if (d < digits) {
      place += pass.count[(segment * digits + d) * pass.tiles + tile];
      for (int w = 0; w < kSortWarps; ++w) {
        const uint32_t count = s.count[w][d];
        s.count[w][d] = place;
        place += count;
      }
    }
    __syncthreads();
  }
  for (int64_t i0 = begin; i0 < end; i0 += kWarp) {
    const int64_t i = i0 + lane;
    const bool valid = i < end;
    const uint32_t k = valid ? key[i] : 0;
    const uint32_t digit = valid ? (k >> pass.shift) & (digits - 1) : kMaxDigits;
    const unsigned same = __match_any_sync(kFullWarp, digit);
    const int rank = __popc(same & ((1u << lane) - 1));
    const uint32_t first = valid ? s.count[warp][digit] : 0;
    __syncwarp();
    if (valid && rank == 0) s.count[warp][digit] = first + __popc(same);
    __syncwarp();
    if (valid) {
      const int64_t to = segment * pass.n + first + rank;
      pass.key_out[to] = k;
      pass.payload_out[to] = pass.payload[segment * pass.n + i];
    }
  }
}

// Two buffers of [segments, n] pairs and the counts; `sort` returns the one that its result is in.
class RadixSort {
 public:
  RadixSort(const Tensor& like, int64_t segments, int64_t n)
      : segments_(segments),
        n_(n),
        tiles_(ceil_div(n, kSortTile)),
        pairs_(workspace<uint64_t>(like, 2 * segments * n)),
        counts_(workspace<uint32_t>(like, segments * kMaxDigits * (tiles_ + 1))) {}

  uint32_t* key(int buffer) const {
    return mutable_data<uint32_t>(pairs_) + buffer * segments_ * n_;
  }
  int32_t* payload(int buffer) const { return reinterpret_cast<int32_t*>(key(2 + buffer)); }

  // Sorts the first segments of buffer 0 by the low `bits` of the keys, ascending.
  int sort(const Queue& queue, int bits, int64_t segments) const {
    const int passes = static_cast<int>(ceil_div(bits, kMaxDigitBits));
    const int digit_bits = passes ? static_cast<int>(ceil_div(bits, passes)) : 0;
    for (int p = 0; p < passes; ++p) {
      uint32_t* count = mutable_data<uint32_t>(counts_);
      const int from = p % 2, digits = 1 << digit_bits;
      const SortPass pass{key(from),
                          payload(from),
                          key(1 - from),
                          payload(1 - from),
                          n_,
                          tiles_,
                          p * digit_bits,
                          digits,
                          count,
                          count + segments * digits * tiles_};
      queue.launch(sort_count, segments * tiles_, kSortThreads, sizeof(SortShared), pass);
      queue.launch(sort_sum, segments * digits, kSortThreads, sizeof(SortShared), pass);
      queue.launch(sort_scatter, segments * tiles_, kSortThreads, sizeof(SortShared), pass);
    }
    return passes % 2;
  }

 private:
  int64_t segments_, n_, tiles_;
  Tensor pairs_, counts_;
};

}  // namespace cuda
}  // namespace fastsae
