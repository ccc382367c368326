// What topk_member counts against, for operators that need a membership (steer.cpp).
#pragma once

#include "cpu/kernels.h"

namespace fastsae {

// Shapes as in the schema; bias, scale, codes and bounds may be null. All but codes and bounds have
// the dtype of x.
struct MemberWeights {
  const void *w, *bias, *scale;
  const int8_t* codes;
  const float* bounds;
  int64_t D, F, k;
  bool positive;
};

// member [N, J] of x [N, D] and latents [P, J], a list for every N / P tokens. Counts all of them
// to the end, which is right for few tokens: up to kCounted it takes at most as long as selecting.
constexpr int64_t kCounted = 128;
void topk_member_counted(const MemberWeights& weights, ScalarType dtype, const void* x, int64_t N,
                         const int32_t* latents, int64_t P, int64_t J, bool* member);

}  // namespace fastsae
