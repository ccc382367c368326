#include "cpu/support/cpu_level.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>

#if FASTSAE_X86
#include <cpuid.h>
#endif

namespace fastsae {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};
constexpr int kLevels = 4;

#if FASTSAE_X86
// Which register states the operating system saves (XCR0).
uint64_t saved_states() {
  uint32_t lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

CpuLevel detect() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return CpuLevel::kPortable;
  const bool fma = c & (1u << 12), osxsave = c & (1u << 27), avx = c & (1u << 28);
  const bool f16c = c & (1u << 29);
  if (!(fma && osxsave && avx && f16c)) return CpuLevel::kPortable;
  const uint64_t states = saved_states();
  if ((states & 0x6) != 0x6) return CpuLevel::kPortable;  // xmm, ymm
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return CpuLevel::kPortable;
  const uint32_t max_subleaf = a;
  const bool vnni = c & (1u << 11);
  if (!(b & (1u << 5))) return CpuLevel::kPortable;                           // AVX2
  const uint32_t avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  if ((b & avx512) != avx512 || (states & 0xe6) != 0xe6) return CpuLevel::kAvx2;
  if (!FASTSAE_X86_BF16 || !vnni || max_subleaf < 1) return CpuLevel::kAvx512;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  return (a & (1u << 5)) ? CpuLevel::kAvx512Bf16 : CpuLevel::kAvx512;
}
#else
CpuLevel detect() { return CpuLevel::kPortable; }
#endif

CpuLevel detected() {
  static const CpuLevel level = detect();
  return level;
}

// Of the time of two multiply-adds, which a product of bf16 pairs replaces: it must leave something
// for the pairs that are scored again.
constexpr double kBf16Pays = 1.5;

// The level in force when none is asked for.
CpuLevel fastest() {
  static const CpuLevel level = [] {
    const bool slow = detected() == CpuLevel::kAvx512Bf16 && bf16_rate() > kBf16Pays;
    return slow ? CpuLevel::kAvx512 : detected();
  }();
  return level;
}

std::string available() {
  std::string names;
  for (int i = 0; i <= static_cast<int>(detected()); ++i) {
    names += (i ? " " : "") + std::string(kNames[i]);
  }
  return names;
}

CpuLevel parse(const std::string& name, const char* source) {
  if (name.empty()) return fastest();
  for (int i = 0; i < kLevels; ++i) {
    if (name != kNames[i]) continue;
    STD_TORCH_CHECK(i <= static_cast<int>(detected()), source, ": CPU level ", name,
                    " is not available here; available: ", available());
    return static_cast<CpuLevel>(i);
  }
  STD_TORCH_CHECK(false, source, ": unknown CPU level ", name, "; available: ", available());
}

std::atomic<int> current{-1};

CpuLevel from_environment() {
  const char* name = std::getenv("FASTSAE_CPU_LEVEL");
  return parse(name ? name : "", "FASTSAE_CPU_LEVEL");
}

std::string level_name() { return kNames[static_cast<int>(cpu_level())]; }
std::string level_names() { return available(); }

// "auto" goes back to what the environment and the CPU say.
void set_level(std::string name) {
  const CpuLevel level = name == "auto" ? from_environment() : parse(name, "_set_cpu_level");
  current.store(static_cast<int>(level));
}

}  // namespace

CpuLevel cpu_level() {
  int level = current.load(std::memory_order_relaxed);
  if (level < 0) {
    level = static_cast<int>(from_environment());
    current.store(level, std::memory_order_relaxed);
  }
  return static_cast<CpuLevel>(level);
}

}  // namespace fastsae

// No tensor arguments, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(fastsae, CompositeExplicitAutograd, m) {
  m.impl("_cpu_level", TORCH_BOX(&fastsae::level_name));
  m.impl("_cpu_levels", TORCH_BOX(&fastsae::level_names));
  m.impl("_set_cpu_level", TORCH_BOX(&fastsae::set_level));
}
