// Which instruction sets the CPU kernels may use, chosen once at run time.
#pragma once

namespace fastsae {

// Ordered: a CPU that has one level has all before it.
enum class CpuLevel : int {
  kPortable = 0,    // what the compiler's baseline has
  kAvx2 = 1,        // AVX2, FMA, F16C
  kAvx512 = 2,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16 = 3,  // and dot products of bf16 and of integers (VNNI)
};

// The level in force: the fastest that the CPU and the compiler have, or the one that
// FASTSAE_CPU_LEVEL or `_set_cpu_level` asks for. Throws when FASTSAE_CPU_LEVEL names a level that
// is unknown or not available, so call it once at the start of an operator, not inside a parallel
// region.
CpuLevel cpu_level();

// The time of a multiply-add of bf16 pairs, measured, by that of one of fp32. Only where the CPU
// has the level avx512_bf16 (bf16_rate.cpp).
double bf16_rate();

}  // namespace fastsae

// Kernels for x86 levels are compiled only where the compiler knows the targets.
#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define FASTSAE_X86 1
#if defined(__clang__) || __GNUC__ >= 10
#define FASTSAE_X86_BF16 1
#else
#define FASTSAE_X86_BF16 0
#endif
#else
#define FASTSAE_X86 0
#define FASTSAE_X86_BF16 0
#endif
