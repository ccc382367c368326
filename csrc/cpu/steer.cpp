// steer: x' = x + s^-1 sum_j delta_j(x) d_j over the entries of each sequence's list.
#include "common/steer.h"

#include <cmath>

#include "cpu/kernels.h"

#define FASTSAE_KERNEL "cpu/steer.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

constexpr const char* kOp = "steer";

void steer_cpu(const Tensor& x, const Tensor& enc, const Tensor& dec, const Tensor& param,
               const Tensor& code, const Tensor& slots, const std::optional<Tensor>& mask,
               const std::optional<Tensor>& member, int64_t norm, double eps, Tensor out) {
  const CpuLevel level = cpu_level();
  const int64_t D = x.size(-1), S = enc.size(0), O = enc.size(1), B = slots.size(0);
  const ScalarType dtype = x.scalar_type();
  const int64_t M = D ? x.numel() / D : 0;
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous() && x.is_cpu() && out.is_cpu() &&
                      out.scalar_type() == dtype && out.numel() == x.numel(),
                  kOp, ": x and out must be contiguous CPU tensors of one shape and dtype");
  check_tensor(kOp, "enc", enc, {S, O, D}, dtype);
  check_tensor(kOp, "dec", dec, {S, O, D}, dtype);
  check_tensor(kOp, "param", param, {S, O, kSteerParams}, wide);
  check_tensor(kOp, "code", code, {S, O, kSteerCodes}, ScalarType::Int);
  check_tensor(kOp, "slots", slots, {B}, ScalarType::Int);
  const auto fits = [](const Tensor& t, int64_t n) {
    return t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Bool && t.numel() == n;
  };
  STD_TORCH_CHECK(!mask || fits(*mask, M), kOp, ": mask must be contiguous bool, one per token");
  STD_TORCH_CHECK(!member || fits(*member, M * O), kOp, ": member must be contiguous bool [M, O]");
  STD_TORCH_CHECK(M == 0 || (B > 0 && M % B == 0), kOp, ": ", M, " tokens for ", B, " sequences");
  const int32_t* slot = data<int32_t>(slots);
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(slot[b] >= -1 && slot[b] < S, kOp, ": slots must lie in [-1, ", S, "), got ",
                    slot[b]);
  }
  if (M * D == 0) return;
  with_float_type(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T *xs = data<T>(x), *e = data<T>(enc), *d = data<T>(dec);
    T* o = mutable_data<T>(out);
    const A* p = data<A>(param);
    const int32_t* c = data<int32_t>(code);
    const bool* masked = mask ? data<bool>(*mask) : nullptr;
    const bool* members = member ? data<bool>(*member) : nullptr;
    // a row is two passes of a cache's speed: 32 tokens of a small model are one thread's work
    parallel_ranges(M, D, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(D + 2 * O);
      FASTSAE_AT_LEVEL(level, steer_rows, xs, e, d, p, c, slot, masked, members,
                       static_cast<int>(norm), static_cast<A>(eps), o, O, D, M / B, begin, end,
                       scratch.get());
    });
  });
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) { m.impl("steer_cpu", TORCH_BOX(&fastsae::steer_cpu)); }
