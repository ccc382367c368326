#include "cpu/support/group_by_latent.h"

namespace fastsae {
namespace {

constexpr int64_t kMaxBuckets = 256;  // cursors of all buckets stay in L1

struct Pair {
  uint32_t latent, position;
};

}  // namespace

std::vector<int32_t> Groups::active() const {
  std::vector<int32_t> latents;
  latents.reserve(std::min(n_latents, n_pairs));
  for (int64_t f = 0; f < n_latents; ++f) {
    if (offset.get()[f] < offset.get()[f + 1]) latents.push_back(static_cast<int32_t>(f));
  }
  return latents;
}

Groups group_by_latent(const char* op, const int32_t* indices, int64_t N, int64_t K, int64_t F) {
  const int64_t P = N * K;
  STD_TORCH_CHECK(P <= INT32_MAX && F <= INT32_MAX, op, ": N * K = ", P, " and n_latents = ", F,
                  " must be below 2^31");
  check_indices(op, indices, P, F);
  Groups groups{F, P, Buffer<uint32_t>(F + 1), Buffer<int32_t>(P), Buffer<uint32_t>(P)};
  uint32_t* offset = groups.offset.get();
  if (P == 0) {
    std::fill(offset, offset + F + 1, 0u);
    return groups;
  }
  int shift = 0;
  while (((F - 1) >> shift) >= kMaxBuckets) ++shift;
  const int64_t buckets = ((F - 1) >> shift) + 1;

  // First digit: every part of the pairs counts, then moves its own, to the buckets of the latents'
  // high bits.
  const int64_t parts = threads_for(P, P);
  std::vector<uint32_t> cursor(parts * buckets, 0);
  const auto part_begin = [&](int64_t part) { return P * part / parts; };
  parallel_each(parts, parts, [&](int64_t part) {
    uint32_t* count = cursor.data() + part * buckets;
    for (int64_t p = part_begin(part); p < part_begin(part + 1); ++p) ++count[indices[p] >> shift];
  });
  std::vector<uint32_t> bucket_begin(buckets + 1);
  uint32_t total = 0;
  for (int64_t b = 0; b < buckets; ++b) {
    bucket_begin[b] = total;
    for (int64_t part = 0; part < parts; ++part) {
      const uint32_t count = cursor[part * buckets + b];
      cursor[part * buckets + b] = total;
      total += count;
    }
  }
  bucket_begin[buckets] = total;
  Buffer<Pair> pairs(P);
  parallel_each(parts, parts, [&](int64_t part) {
    uint32_t* to = cursor.data() + part * buckets;
    for (int64_t p = part_begin(part); p < part_begin(part + 1); ++p) {
      const uint32_t latent = static_cast<uint32_t>(indices[p]);
      pairs.get()[to[latent >> shift]++] = {latent, static_cast<uint32_t>(p)};
    }
  });

  // Second digit: each bucket is sorted by one thread; `offset` of its latents is the cursor, which
  // ends one latent ahead.
  const uint32_t tokens_per = static_cast<uint32_t>(K);
  parallel_each(buckets, parts, [&](int64_t b) {
    const int64_t first = b << shift, last = std::min(F, (b + 1) << shift);
    const Pair *begin = pairs.get() + bucket_begin[b], *end = pairs.get() + bucket_begin[b + 1];
    std::vector<uint32_t> to(last - first, 0);
    for (const Pair* p = begin; p < end; ++p) ++to[p->latent - first];
    uint32_t at = bucket_begin[b];
    for (int64_t f = first; f < last; ++f) {
      offset[f] = at;
      at += to[f - first];
      to[f - first] = offset[f];
    }
    for (const Pair* p = begin; p < end; ++p) {
      const uint32_t j = to[p->latent - first]++;
      groups.position.get()[j] = p->position;
      groups.token.get()[j] = static_cast<int32_t>(p->position / tokens_per);
    }
  });
  offset[F] = total;
  return groups;
}

}  // namespace fastsae
