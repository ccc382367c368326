// The pairs (token, latent) of a batch, grouped by latent.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace fastsae {

// What the kernels read.
struct GroupsView {
  const uint32_t *offset, *position;
  const int32_t* token;
  int64_t n_pairs;
};

// Pairs of latent f are [offset[f], offset[f + 1]), in the order of their position n * K + k.
struct Groups {
  int64_t n_latents, n_pairs;
  Buffer<uint32_t> offset;    // [F + 1]
  Buffer<int32_t> token;      // [N * K]: n
  Buffer<uint32_t> position;  // [N * K]: n * K + k

  // The latents that occur, ascending.
  std::vector<int32_t> active() const;
  GroupsView view() const { return {offset.get(), position.get(), token.get(), n_pairs}; }
};

// A stable counting sort in two digits: O(N K + F) work and memory, parallel, and the same result
// for any number of threads. Throws, naming op, before anything else when an index is outside [0,
// F).
Groups group_by_latent(const char* op, const int32_t* indices, int64_t N, int64_t K, int64_t F);

// f(begin, end) over pieces of `latents` (of all latents when null) that cost about the same: a
// latent costs `base` and each of its pairs 1, in rows of D elements.
template <class F>
void parallel_latents(const Groups& groups, const std::vector<int32_t>* latents, int64_t base,
                      int64_t D, const F& f) {
  const uint32_t* offset = groups.offset.get();
  const int64_t count = latents ? static_cast<int64_t>(latents->size()) : groups.n_latents;
  const auto cost = [&](int64_t i) -> int64_t {  // of the first i
    return base * i + (i == count ? groups.n_pairs : offset[latents ? (*latents)[i] : i]);
  };
  const auto split = [&](int64_t target) {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      cost(middle) < target ? low = middle + 1 : high = middle;
    }
    return low;
  };
  if (count == 0) return;
  const int64_t total = cost(count), threads = threads_for(count, total * D);
  const int64_t pieces = n_pieces(count, threads);
  parallel_each(pieces, threads, [&](int64_t i) {
    const int64_t begin = split(total * i / pieces), end = split(total * (i + 1) / pieces);
    if (begin < end) f(begin, end);
  });
}

}  // namespace fastsae
