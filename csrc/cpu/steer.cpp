// steer: x' = x + s^-1 sum_j delta_j(x) d_j over the entries of each sequence's list.
#include "common/steer.h"

#include <cmath>
#include <memory>

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

// The tables, checked. They must outlive the site, which keeps none of them.
SteerSite site_of(const Tensor& enc, const Tensor& dec, const Tensor& param, const Tensor& code,
                  const Tensor& slots, int64_t norm, double eps) {
  STD_TORCH_CHECK(enc.dim() == 3 && slots.dim() == 1, kOp, ": enc must be [S, O, D], slots [B]");
  const int64_t S = enc.size(0), O = enc.size(1), D = enc.size(2), B = slots.size(0);
  const ScalarType dtype = enc.scalar_type();
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  with_float_type(dtype, kOp, [](auto) {});
  check_tensor(kOp, "enc", enc, {S, O, D}, dtype);
  check_tensor(kOp, "dec", dec, {S, O, D}, dtype);
  check_tensor(kOp, "param", param, {S, O, kSteerParams}, wide);
  check_tensor(kOp, "code", code, {S, O, kSteerCodes}, ScalarType::Int);
  check_tensor(kOp, "slots", slots, {B}, ScalarType::Int);
  return {dtype,
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
          eps};
}

void steer_cpu(const Tensor& x, const Tensor& enc, const Tensor& dec, const Tensor& param,
               const Tensor& code, const Tensor& slots, const std::optional<Tensor>& mask,
               const std::optional<Tensor>& member, int64_t norm, double eps, Tensor out) {
  const SteerSite site = site_of(enc, dec, param, code, slots, norm, eps);
  const int64_t D = site.D, B = site.B;
  const int64_t M = D ? x.numel() / D : 0;
  STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous() && x.is_cpu() && out.is_cpu() &&
                      x.scalar_type() == site.dtype && out.scalar_type() == site.dtype &&
                      x.size(-1) == D && out.numel() == x.numel(),
                  kOp, ": x and out must be contiguous CPU tensors of one shape and enc's dtype");
  const auto fits = [](const Tensor& t, int64_t n) {
    return t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Bool && t.numel() == n;
  };
  STD_TORCH_CHECK(!mask || fits(*mask, M), kOp, ": mask must be contiguous bool, one per token");
  STD_TORCH_CHECK(!member || fits(*member, M * site.O), kOp,
                  ": member must be contiguous bool [M, O]");
  STD_TORCH_CHECK(M == 0 || (B > 0 && M % B == 0), kOp, ": ", M, " tokens for ", B, " sequences");
  steer_tokens(site, x.const_data_ptr(), mask ? data<bool>(*mask) : nullptr,
               member ? data<bool>(*member) : nullptr, M, out.mutable_data_ptr());
}

// The address of a new site: `_cpu.owned` takes it and frees it.
int64_t make_site(const Tensor& enc, const Tensor& dec, const Tensor& param, const Tensor& code,
                  const Tensor& slots, int64_t norm, double eps,
                  const std::optional<Tensor>& wanted, const std::optional<Tensor>& centre,
                  const std::optional<Tensor>& W_enc, const std::optional<Tensor>& b_enc,
                  const std::optional<Tensor>& rank_scale, const std::optional<Tensor>& codes,
                  const std::optional<Tensor>& bounds, int64_t k, bool positive) {
  auto site = std::make_unique<SteerSite>(site_of(enc, dec, param, code, slots, norm, eps));
  STD_TORCH_CHECK(site->B > 0, kOp, ": a site needs a sequence");
  site->kept = {enc, dec, param, code, slots};
  STD_TORCH_CHECK(wanted.has_value() == W_enc.has_value(), kOp, ": half a membership");
  if (wanted) {
    const int64_t D = site->D, F = W_enc->dim() ? W_enc->size(0) : 0;
    const ScalarType dtype = site->dtype;
    STD_TORCH_CHECK(norm == kNormNone, kOp, ": a site with membership normalises nothing");
    STD_TORCH_CHECK(D > 0 && k >= 1 && k <= F && F <= INT32_MAX, kOp, ": k = ", k,
                    " and W_enc do not fit");
    STD_TORCH_CHECK(!codes == !bounds && (!codes || dtype != ScalarType::Double), kOp,
                    ": a screen has two parts and bounds fp32 scores");
    const auto kept = [&](const char* name, const std::optional<Tensor>& t,
                          std::initializer_list<int64_t> shape, ScalarType type) -> const void* {
      if (!t) return nullptr;
      check_tensor(kOp, name, *t, shape, type);
      site->kept.push_back(*t);
      return t->const_data_ptr();
    };
    site->wanted =
        static_cast<const int32_t*>(kept("wanted", wanted, {site->B, site->O}, ScalarType::Int));
    site->centre = kept("centre", centre, {D}, dtype);
    site->member = {kept("W_enc", W_enc, {F, D}, dtype),
                    kept("b_enc", b_enc, {F}, dtype),
                    kept("rank_scale", rank_scale, {F}, dtype),
                    static_cast<const int8_t*>(kept("codes", codes, {2, F, D}, ScalarType::Char)),
                    static_cast<const float*>(kept("bounds", bounds, {4, F}, ScalarType::Float)),
                    D,
                    F,
                    k,
                    positive};
  }
  return reinterpret_cast<intptr_t>(site.release());
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

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("steer_cpu", TORCH_BOX(&fastsae::steer_cpu));
  m.impl("_steer_site", TORCH_BOX(&fastsae::make_site));
}
