// Compiles one kernel file once per CPU level, each in a namespace of its own:
//
//   #define FASTSAE_KERNEL "cpu/sparse_decode.inl"
//   #include "cpu/foreach_level.h"
//   ... fastsae::portable::f, fastsae::avx2::f, fastsae::avx512::f
//
// Only code inside the .inl is compiled with wider instructions: nothing that another translation
// unit could share. Two rules for an .inl: everything in `namespace FASTSAE_NS`, and no lambdas
// around intrinsics (clang does not give them the region's target); threads are started outside.
// With FASTSAE_KERNEL_BF16 defined there is a fourth level, avx512_bf16; without it that level
// runs the avx512 code.
//
// No include guard: a translation unit may compile several kernels.
#include "common/dtypes.h"
#include "cpu/support/cpu_level.h"

#if FASTSAE_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTSAE_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define FASTSAE_TARGET_BEGIN(t) \
  FASTSAE_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#define FASTSAE_TARGET_END FASTSAE_PRAGMA(clang attribute pop)
#else
#define FASTSAE_TARGET_BEGIN(t) FASTSAE_PRAGMA(GCC push_options) FASTSAE_PRAGMA(GCC target(t))
#define FASTSAE_TARGET_END FASTSAE_PRAGMA(GCC pop_options)
#endif

#define FASTSAE_LEVEL 0
#define FASTSAE_NS portable
#include "cpu/simd.inl"
#include FASTSAE_KERNEL
#undef FASTSAE_LEVEL
#undef FASTSAE_NS

#if FASTSAE_X86
FASTSAE_TARGET_BEGIN("avx2,fma,f16c")
#define FASTSAE_LEVEL 1
#define FASTSAE_NS avx2
#include "cpu/simd.inl"
#include FASTSAE_KERNEL
#undef FASTSAE_LEVEL
#undef FASTSAE_NS
FASTSAE_TARGET_END

FASTSAE_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define FASTSAE_LEVEL 2
#define FASTSAE_NS avx512
#include "cpu/simd.inl"
#include FASTSAE_KERNEL
#undef FASTSAE_LEVEL
#undef FASTSAE_NS
FASTSAE_TARGET_END

#if FASTSAE_X86_BF16 && defined(FASTSAE_KERNEL_BF16)
FASTSAE_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define FASTSAE_LEVEL 3
#define FASTSAE_NS avx512_bf16
#include "cpu/simd.inl"
#include FASTSAE_KERNEL
#undef FASTSAE_LEVEL
#undef FASTSAE_NS
FASTSAE_TARGET_END
#endif
#endif

// Calls `function` (a template-id is fine) at the level in force. For kernels without a bf16 level.
#undef FASTSAE_AT_LEVEL
#if FASTSAE_X86
#define FASTSAE_AT_LEVEL(level, function, ...)                                           \
  ((level) >= ::fastsae::CpuLevel::kAvx512                                               \
       ? ::fastsae::avx512::function(__VA_ARGS__)                                        \
       : ((level) == ::fastsae::CpuLevel::kAvx2 ? ::fastsae::avx2::function(__VA_ARGS__) \
                                                : ::fastsae::portable::function(__VA_ARGS__)))
#else
#define FASTSAE_AT_LEVEL(level, function, ...) \
  ((void)(level), ::fastsae::portable::function(__VA_ARGS__))
#endif

// The same for kernels with one.
#undef FASTSAE_AT_BF16_LEVEL
#if FASTSAE_X86_BF16
#define FASTSAE_AT_BF16_LEVEL(level, function, ...)                                            \
  ((level) == ::fastsae::CpuLevel::kAvx512Bf16 ? ::fastsae::avx512_bf16::function(__VA_ARGS__) \
                                               : FASTSAE_AT_LEVEL(level, function, __VA_ARGS__))
#else
#define FASTSAE_AT_BF16_LEVEL FASTSAE_AT_LEVEL
#endif

#undef FASTSAE_KERNEL
#undef FASTSAE_KERNEL_BF16
#undef FASTSAE_TARGET_BEGIN
#undef FASTSAE_TARGET_END
#undef FASTSAE_PRAGMA
