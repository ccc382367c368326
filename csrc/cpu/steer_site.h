// A place in a model that is steered: the tables of `steer`, and the SAE whose k best decide where
// an entry needs that. `fastsae::_steer_site` makes one of tensors, which it checks and keeps.
#pragma once

#include <vector>

#include "cpu/topk_member.h"

namespace fastsae {

struct SteerSite {
  ScalarType dtype;
  const void *enc, *dec, *param;
  const int32_t *code, *slots;
  int64_t S, O, D, B;  // slots, entries, width, sequences
  int64_t norm;
  double eps;
  // No membership: wanted is null. Else [B, O]; centre [D] (or null) is subtracted before W_enc.
  const int32_t* wanted = nullptr;
  const void* centre = nullptr;
  MemberWeights member = {};
  std::vector<Tensor> kept = {};  // hold the memory that is pointed into
};

// out [tokens, D] = x steered. False, with nothing done, for so many tokens that membership is
// better found by selecting, which is left to the caller.
bool steer_site(const SteerSite& site, const void* x, const bool* mask, int64_t tokens, void* out);

}  // namespace fastsae
