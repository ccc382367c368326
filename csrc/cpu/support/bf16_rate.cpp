// Whether this processor's products of bf16 pairs are worth taking.
//
// One does the work of two fp32 multiply-adds. On Zen 4 it takes as long as one, on the Intel
// server that was tried as long as four (benchmarks/notes/topk_encode.md), and no flag says which:
// so it is timed, once a process, in some hundred microseconds.
#include <algorithm>
#include <cstdint>

#include "cpu/support/cpu_level.h"

#define FASTSAE_KERNEL "cpu/support/bf16_rate.inl"
#define FASTSAE_KERNEL_BF16
#include "cpu/foreach_level.h"

namespace fastsae {

double bf16_rate() {
#if FASTSAE_X86_BF16
  return avx512_bf16::bf16_rate();
#else
  return 0;
#endif
}

}  // namespace fastsae
