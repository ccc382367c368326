// steer: x' = x + s^-1 sum_j delta_j(x) d_j over the entries of each sequence's list.
#include "common/steer.h"

#include <cmath>

#include "cpu/steer_site.h"

#define FASTSAE_KERNEL "cpu/steer.inl"
#include "cpu/foreach_level.h"

namespace fastsae {
namespace {

constexpr const char* kOp = "steer";

// x and out [M, D]; member [M, O] or null.
void steer_tokens(const SteerSite& site, const void* x, const bool* mask, const bool* member,
                  int64_t M, void* out) {
  const CpuLevel level = cpu_level();
  const int64_t O = site.O, D = site.D, B = site.B;
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(site.slots[b] >= -1 && site.slots[b] < site.S, kOp, ": slots must lie in [-1, ",
                    site.S, "), got ", site.slots[b]);
  }
  if (M * D == 0) return;
  with_float_type(site.dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    // a row is two passes of a cache's speed: 32 tokens of a small model are one thread's work
    parallel_ranges(M, D, [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(D + 2 * O);
      FASTSAE_AT_LEVEL(level, steer_rows, static_cast<const T*>(x), static_cast<const T*>(site.enc),
                       static_cast<const T*>(site.dec), static_cast<const A*>(site.param),
                       site.code, site.slots, mask, member, static_cast<int>(site.norm),
                       static_cast<A>(site.eps), static_cast<T*>(out), O, D, M / B, begin, end,
                       scratch.get());
    });
  });
}

void steer_cpu(const Tensor& x, const Tensor& enc, const Tensor& dec, const Tensor& param,
               const Tensor& code, const Tensor& slots, const std::optional<Tensor>& mask,
               const std::optional<Tensor>& member, int64_t norm, double eps, Tensor out) {
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
  const SteerSite site{dtype,
                       enc.const_data_ptr(),
                       dec.const_data_ptr(),
                       param.const_data_ptr(),
                       data<int32_t>(code),
                       data<int32_t>(slots),
                       S,
                       O,
                       D,
                       B,
                       norm,
                       eps,
                       nullptr,
                       nullptr,
                       {}};
  steer_tokens(site, x.const_data_ptr(), mask ? data<bool>(*mask) : nullptr,
               member ? data<bool>(*member) : nullptr, M, out.mutable_data_ptr());
}

}  // namespace

bool steer_site(const SteerSite& site, const void* x, const bool* mask, int64_t tokens, void* out) {
  if (!site.wanted) {
    steer_tokens(site, x, mask, nullptr, tokens, out);
    return true;
  }
  if (tokens > kCounted) return false;
  Buffer<bool> member(tokens * site.O);
  with_float_type(site.dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    const T *rows = static_cast<const T*>(x), *centre = static_cast<const T*>(site.centre);
    Buffer<T> centred(centre ? tokens * site.D : 0);
    for (int64_t i = 0; centre && i < tokens * site.D; i += site.D) {
      for (int64_t d = 0; d < site.D; ++d) {
        centred.get()[i + d] = narrow<T>(widen(rows[i + d]) - widen(centre[d]));
      }
    }
    topk_member_counted(site.member, site.dtype, centre ? centred.get() : rows, tokens, site.wanted,
                        site.B, site.O, member.get());
  });
  steer_tokens(site, x, mask, member.get(), tokens, out);
  return true;
}

}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) { m.impl("steer_cpu", TORCH_BOX(&fastsae::steer_cpu)); }
