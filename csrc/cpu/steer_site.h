// A place in a model that is steered: the tables of `steer`, and the SAE whose k best decide where
// an entry needs that. Checked once, by Python, whose object of it keeps what is pointed into.
#pragma once

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
  const int32_t* wanted;
  const void* centre;
  MemberWeights member;
};

// out [tokens, D] = x steered. False, with nothing done, for so many tokens that membership is
// better found by selecting, which is left to the caller.
bool steer_site(const SteerSite& site, const void* x, const bool* mask, int64_t tokens, void* out);

}  // namespace fastsae
