// topk: the k largest of each row of x [N, M], descending, ties by lowest index.
//
// A candidate is one number: (order of its value) << 32 | ~index, so that "larger" is "comes
// first". Up to kSharedK, a row is read once: what beats the threshold goes into shared memory,
// which is cut to its k best, raising the threshold, whenever it is full. Few long rows are cut
// into segments, and the segments' best are selected from in the same way. Larger k takes
// topk_large.h. Which path, and every size, follows from the shapes: no host sync, nothing
// data-dependent.
#include "cuda/topk_large.h"
#include "cuda/topk_order.h"

namespace fastsae {
namespace cuda {
namespace {

constexpr const char* kOp = "topk";
constexpr int kThreads = 256;
constexpr int kTile = 4096;       // elements between two barriers, 64 bytes a thread in fp32
constexpr int kEdge = 16;         // elements of a row before and after whole packs
constexpr int kSharedK = 4096;    // 96 KB of candidates
constexpr int64_t kBlocks = 264;  // two a multiprocessor of an H100: fewer rows are cut up
constexpr int kBins = 256;
static_assert(kBins == kThreads, "a thread a bin");

struct alignas(16) Shared {
  uint32_t count, digit, above;
  uint32_t bins[kBins];
  uint32_t sums[kThreads / kWarp];

  __device__ uint64_t* candidates() { return reinterpret_cast<uint64_t*>(this + 1); }
};

// What fits beside the k best: a whole tile, and room so that cuts are rare.
__host__ __device__ constexpr int64_t capacity_of(int64_t k) {
  return k + (k > 2048 ? k : 2048) + kTile + kEdge;
}
constexpr size_t shared_bytes(int64_t k) { return sizeof(Shared) + capacity_of(k) * 8; }

// The block's candidates; every method is called by all threads, but `add`.
template <class T>
class Selector {
 public:
  __device__ Selector(Shared& s, int k) : s_(s), k_(k) {
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
  }

  __device__ __forceinline__ void add(uint64_t candidate) {
    if (candidate > threshold_) s_.candidates()[atomicAdd(&s_.count, 1u)] = candidate;
  }
  // One comparison for most elements; NaN on either side is decided exactly.
  __device__ __forceinline__ void add(T v, int64_t index) {
    if (!(widen(v) < floor_)) add(candidate_of(v, index));
  }

  // After at most kTile + kEdge calls of `add` a block.
  __device__ void settle() {
    __syncthreads();
    const uint32_t count = s_.count;
    __syncthreads();
    if (count + kTile + kEdge > capacity_of(k_)) cut(count);
  }

  // Leaves the k best, or all when there are fewer, padded with 0 to `size`; returned in any order.
  __device__ uint64_t* finish(int size) {
    __syncthreads();
    uint32_t count = s_.count;
    __syncthreads();
    if (count > static_cast<uint32_t>(k_)) {
      cut(count);
      count = k_;
    }
    for (int i = count + threadIdx.x; i < size; i += kThreads) s_.candidates()[i] = 0;
    __syncthreads();
    return s_.candidates();
  }

 private:
  __device__ void cut(uint32_t count) {
    threshold_ = kth_largest(count);
    floor_ = widen(Order<T>::value(static_cast<uint32_t>(threshold_ >> 32)));
    uint64_t* candidates = s_.candidates();
    if (threadIdx.x == 0) s_.count = 0;
    // In place: what is written lies before all that is still to be read.
    constexpr int kPer = 4;
    for (uint32_t first = 0; first < count; first += kPer * kThreads) {
      uint64_t c[kPer];
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const uint32_t i = first + j * kThreads + threadIdx.x;
        c[j] = i < count ? candidates[i] : 0;
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (c[j] >= threshold_) candidates[atomicAdd(&s_.count, 1u)] = c[j];
      }
      __syncthreads();
    }
  }

  // A number that exactly k of the candidates reach, digit by digit from the top. It is the k-th
  // largest unless all that share its leading digits are taken.
  __device__ uint64_t kth_largest(uint32_t count) {
    const uint64_t* candidates = s_.candidates();
    const int t = threadIdx.x, bin = kBins - 1 - t;
    uint64_t prefix = 0;
    uint32_t need = k_;
    for (int shift = Order<T>::kBits + 24; shift >= 0; shift -= 8) {
      s_.bins[t] = 0;
      __syncthreads();
      for (uint32_t i = t; i < count; i += kThreads) {
        const uint64_t c = candidates[i] >> shift;
        if (c >> 8 == prefix) atomicAdd(&s_.bins[c & 255], 1u);
      }
      __syncthreads();
      uint32_t total = 0;
      const uint32_t mine = s_.bins[bin], larger = block_scan(mine, s_.sums, &total);
      if (larger < need && need <= larger + mine) {
        s_.digit = bin;
        s_.above = larger;
      }
      __syncthreads();
      prefix = prefix << 8 | s_.digit;
      need -= s_.above;
      if (s_.bins[s_.digit] == need) return prefix << shift;
      __syncthreads();
    }
    return prefix;
  }

  Shared& s_;
  const int k_;
  uint64_t threshold_ = 0;  // below every candidate
  float floor_ = -INFINITY;
};

// Descending. n: a power of two.
__device__ void sort_descending(uint64_t* c, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int i = threadIdx.x; i < n / 2; i += kThreads) {
        const int a = 2 * i - (i & (stride - 1)), b = a + stride;
        const uint64_t x = c[a], y = c[b];
        if ((x < y) == ((a & size) == 0)) {
          c[a] = y;
          c[b] = x;
        }
      }
      __syncthreads();
    }
  }
}

template <class T>
__device__ void write_sorted(Selector<T>& selector, int k, const T* row, T* values,
                             int32_t* indices) {
  int size = 1;
  while (size < k) size *= 2;
  uint64_t* best = selector.finish(size);
  sort_descending(best, size);
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const uint32_t index = ~static_cast<uint32_t>(best[i]);
    indices[i] = static_cast<int32_t>(index);
    values[i] = row[index];
  }
}

// One block a segment of a row. With one segment a row the result is final, otherwise `best`
// [rows, segments, k] gets the candidates, unsorted.
template <class T>
__global__ void __launch_bounds__(kThreads)
    select_rows(const T* x, int64_t m, int k, int64_t segments, int64_t segment_length,
                uint64_t* best, T* values, int32_t* indices) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kPacks = kTile / kSize / kThreads;
  Selector<T> selector(dynamic_shared<Shared>(), k);
  const int64_t n = blockIdx.x / segments;
  const int64_t begin = blockIdx.x % segments * segment_length;
  const int64_t end = begin + segment_length < m ? begin + segment_length : m;
  const T* row = x + n * m;
  const int t = threadIdx.x;

  // Whole packs lie on 16-byte addresses; at most kSize - 1 elements on either side do not.
  const int64_t misaligned = reinterpret_cast<uintptr_t>(row + begin) / sizeof(T) % kSize;
  int64_t body = begin + (kSize - misaligned) % kSize;
  if (body > end) body = end;
  const int64_t packs = (end - body) / kSize, tail = body + packs * kSize;
  if (begin + t < body) selector.add(row[begin + t], begin + t);
  if (tail + t < end) selector.add(row[tail + t], tail + t);

  for (int64_t first = 0; first < packs; first += kPacks * kThreads) {
    Pack<T> pack[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t p = first + j * kThreads + t;
      if (p < packs) pack[j] = load_pack(row + body + p * kSize);
    }
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t p = first + j * kThreads + t;
      if (p >= packs) break;
#pragma unroll
      for (int i = 0; i < kSize; ++i) selector.add(pack[j].v[i], body + p * kSize + i);
    }
    selector.settle();
  }

  if (segments == 1) {
    write_sorted(selector, k, row, values + n * k, indices + n * k);
  } else {
    const uint64_t* kept = selector.finish(k);
    for (int i = t; i < k; i += kThreads) best[static_cast<int64_t>(blockIdx.x) * k + i] = kept[i];
  }
}

// The k best of a row's `count` candidates.
template <class T>
__global__ void __launch_bounds__(kThreads)
    select_candidates(const T* x, int64_t m, int k, const uint64_t* best, int64_t count, T* values,
                      int32_t* indices) {
  Selector<T> selector(dynamic_shared<Shared>(), k);
  const int64_t n = blockIdx.x;
  for (int64_t first = 0; first < count; first += kTile) {
    for (int64_t i = first + threadIdx.x; i < first + kTile && i < count; i += kThreads) {
      selector.add(best[n * count + i]);
    }
    selector.settle();
  }
  write_sorted(selector, k, x + n * m, values + n * k, indices + n * k);
}

// Enough segments to fill a device, as long as one is many times what it leaves to the second pass.
int64_t segments_for(int64_t n, int64_t m, int64_t k) {
  const int64_t most = m / (4 * (k > kTile ? k : kTile));
  const int64_t wanted = ceil_div(kBlocks, n);
  return wanted < most ? wanted : most > 1 ? most : 1;
}

template <class T>
void select(const Queue& queue, const Tensor& x, int64_t n, int64_t m, int64_t k,
            const Tensor& values, const Tensor& indices) {
  const T* in = data<T>(x);
  T* v = mutable_data<T>(values);
  int32_t* index = mutable_data<int32_t>(indices);
  if (k > kSharedK) return select_large<T>(queue, x, n, m, k, v, index);
  const int64_t segments = segments_for(n, m, k), length = ceil_div(m, segments);
  const Tensor best = workspace<uint64_t>(x, segments == 1 ? 0 : n * segments * k);
  uint64_t* candidates = mutable_data<uint64_t>(best);
  queue.launch(select_rows<T>, n * segments, kThreads, shared_bytes(k), in, m, k, segments, length,
               candidates, v, index);
  if (segments == 1) return;
  queue.launch(select_candidates<T>, n, kThreads, shared_bytes(k), in, m, k, candidates,
               segments * k, v, index);
}

std::tuple<Tensor, Tensor> topk_cuda(const Tensor& x, int64_t k) {
  const int64_t n = x.size(0), m = x.size(1);
  const ScalarType dtype = x.scalar_type();
  check_tensor(kOp, "x", x, x, {n, m}, dtype);
  STD_TORCH_CHECK(0 <= k && k <= m && m <= INT32_MAX, kOp, ": k = ", k, " and M = ", m,
                  " do not fit");
  Tensor values = torch::stable::new_empty(x, {n, k});
  Tensor indices = torch::stable::new_empty(x, {n, k}, ScalarType::Int);
  if (n * k == 0) return {values, indices};
  const Queue queue(x);
  with_gpu_float(dtype, kOp,
                 [&](auto zero) { select<decltype(zero)>(queue, x, n, m, k, values, indices); });
  return {values, indices};
}

}  // namespace
}  // namespace cuda
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, FASTSAE_CUDA_KEY, m) {
  m.impl("topk_cuda", TORCH_BOX(&fastsae::cuda::topk_cuda));
}
