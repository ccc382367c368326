// The time of a multiply-add of bf16 pairs by the time of one of fp32: see bf16_rate.cpp.

namespace fastsae {
namespace FASTSAE_NS {

#if FASTSAE_LEVEL == 3

struct Fp32 {
  static __m512 step(__m512 a, __m512 sum) { return _mm512_fmadd_ps(a, a, sum); }
};

struct Bf16Pairs {
  static __m512 step(__m512 a, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)a);
  }
};

// Ticks of 128 multiply-adds on each of eight sums: as many as fill two ports of four cycles.
template <class Product>
int64_t ticks() {
  __m512 a = _mm512_setzero_ps();
  __asm__ volatile("" : "+v"(a));  // unknown to the compiler, as are the sums, which all differ
  __m512 s0 = a, s1 = _mm512_add_ps(a, _mm512_set1_ps(1)), s2 = _mm512_add_ps(s1, s1),
         s3 = _mm512_add_ps(s2, s1), s4 = _mm512_add_ps(s2, s2), s5 = _mm512_add_ps(s4, s1),
         s6 = _mm512_add_ps(s4, s2), s7 = _mm512_add_ps(s4, s3);
  const int64_t begin = static_cast<int64_t>(__rdtsc());
  for (int i = 0; i < 128; ++i) {
    s0 = Product::step(a, s0);
    s1 = Product::step(a, s1);
    s2 = Product::step(a, s2);
    s3 = Product::step(a, s3);
    s4 = Product::step(a, s4);
    s5 = Product::step(a, s5);
    s6 = Product::step(a, s6);
    s7 = Product::step(a, s7);
  }
  __asm__ volatile("" ::"v"(s0), "v"(s1), "v"(s2), "v"(s3), "v"(s4), "v"(s5), "v"(s6), "v"(s7));
  return static_cast<int64_t>(__rdtsc()) - begin;
}

// The least of many short runs: another process on the core, or a clock that rises, lengthens some.
inline double bf16_rate() {
  int64_t bf16 = INT64_MAX, fp32 = INT64_MAX;
  for (int i = 0; i < 64; ++i) {
    bf16 = std::min(bf16, ticks<Bf16Pairs>());
    fp32 = std::min(fp32, ticks<Fp32>());
  }
  return static_cast<double>(bf16) / static_cast<double>(fp32);
}

#endif

}  // namespace FASTSAE_NS
}  // namespace fastsae
