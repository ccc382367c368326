// steer: x' = x + s^-1 sum_j delta_j(x) d_j over the entries of each sequence's list.
//
// One block a token: its warps take an entry's inner product each, then all threads write the
// columns. Nothing is written before every entry has been read, so out may be x.
#include "common/steer.h"
#include "cuda/rows.h"

namespace fastsae {
namespace cuda {
namespace {

constexpr const char* kOp = "steer";
constexpr int kSteerThreads = 256;
constexpr int kSteerWarps = kSteerThreads / kWarp;

// The tables of the lists and what they are applied to.
template <class T>
struct SteerTables {
  const T *x, *enc, *dec;
  const float* param;
  const int32_t *code, *slots;
  const bool *mask, *member;
  T* out;
  int64_t S, O, D, run;
  int norm;
  float eps;
};

// Sum over the block's threads, the same in each of them. warp_sums: one float a warp.
__device__ __forceinline__ float block_sum(float v, float* warp_sums) {
  v = warp_sum(v);
  __syncthreads();
  if (lane_id() == 0) warp_sums[warp_id()] = v;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kSteerWarps; ++w) sum += warp_sums[w];
  return sum;
}

// u = (x - mean) / divisor; 1/s = back.
struct SteerInput {
  float mean = 0, divisor = 1, back = 1;
};

template <class T>
__device__ SteerInput steer_input(const T* x, int64_t D, int norm, float eps, float* warp_sums) {
  SteerInput in;
  if (norm == kNormNone) return in;
  if (norm == kNormLayer) {
    float sum = 0;
    for (int64_t d = threadIdx.x; d < D; d += kSteerThreads) sum += widen(x[d]);
    in.mean = block_sum(sum, warp_sums) / static_cast<float>(D);
  }
  float squares = 0;
  for (int64_t d = threadIdx.x; d < D; d += kSteerThreads) {
    const float v = widen(x[d]) - in.mean;
    squares += v * v;
  }
  const int64_t n = norm == kNormLayer ? (D > 1 ? D - 1 : 1) : D;
  in.back = sqrtf(block_sum(squares, warp_sums) / static_cast<float>(n));
  in.divisor = in.back + (norm == kNormLayer ? eps : 0.f);
  return in;
}

// <row, x - mean>, for a warp; the sum is in every lane.
template <class T, int kVec>
__device__ __forceinline__ float steer_dot(const T* row, const T* x, float mean, int64_t D) {
  float sum = 0;
  for (int64_t d = lane_id() * int64_t(kVec); d < D; d += kWarp * kVec) {
    float r[kVec], v[kVec];
    load_wide(row + d, r);
    load_wide(x + d, v);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum = fmaf(r[i], v[i] - mean, sum);
  }
  return warp_sum(sum);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kSteerThreads) steer_tokens(SteerTables<T> t) {
  float* warp_sums = &dynamic_shared<float>();
  float *f = warp_sums + kSteerWarps, *delta = f + t.O;
  const int64_t m = blockIdx.x, slot = t.slots[m / t.run];
  const T* x = t.x + m * t.D;
  T* out = t.out + m * t.D;
  int count = 0;  // entries before END; 0 leaves the token alone
  const int32_t* code = t.code + slot * t.O * kSteerCodes;
  if (slot >= 0 && slot < t.S && !(t.mask && !t.mask[m])) {
    while (count < t.O && code[count * kSteerCodes + kSteerOp] != kSteerEnd) ++count;
  }
  if (count > 0) {
    const float* param = t.param + slot * t.O * kSteerParams;
    const SteerInput in = steer_input(x, t.D, t.norm, t.eps, warp_sums);
    for (int o = warp_id(); o < count; o += kSteerWarps) {
      const int32_t* c = code + o * kSteerCodes;
      const bool raw = c[kSteerFlags] & kSteerRaw;
      float p = 0;
      if (c[kSteerOp] != kSteerAdd) {
        p = steer_dot<T, kVec>(t.enc + (slot * t.O + o) * t.D, x, raw ? 0.f : in.mean, t.D);
        if (!raw) p /= in.divisor;
      }
      const bool selected = t.member && t.member[m * t.O + o];
      if (lane_id() == 0) {
        f[o] = steer_activation(p, param + o * kSteerParams, c[kSteerFlags], selected);
      }
    }
    __syncthreads();
    for (int o = static_cast<int>(threadIdx.x); o < count; o += kSteerThreads) {
      const int32_t* c = code + o * kSteerCodes;
      const float* q = param + o * kSteerParams;
      const int gate = c[kSteerGate];
      const bool open = gate < 0 || (gate < count && f[gate] > q[kSteerTau]);
      const float own = open ? steer_delta(c[kSteerOp], f[o], q[kSteerValue]) : 0.f;
      delta[o] = c[kSteerFlags] & kSteerRaw ? own : own * in.back;
    }
    __syncthreads();
  }
  bool touched = false;
  for (int o = 0; o < count; ++o) touched |= delta[o] != 0.f;
  if (!touched && out == x) return;
  const T* dec = t.dec + slot * t.O * t.D;
  for (int64_t d = threadIdx.x * int64_t(kVec); d < t.D; d += kSteerThreads * kVec) {
    if (!touched) {  // bit for bit, whatever the bits are
      for (int i = 0; i < kVec; ++i) out[d + i] = x[d + i];
      continue;
    }
    float sum[kVec], row[kVec];
    load_wide(x + d, sum);
    for (int o = 0; o < count; ++o) {
      const float weight = delta[o];
      if (weight == 0.f) continue;
      load_wide(dec + o * t.D + d, row);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] = fmaf(weight, row[i], sum[i]);
    }
    store_narrow(out + d, sum);
  }
}

void steer_cuda(const Tensor& x, const Tensor& enc, const Tensor& dec, const Tensor& param,
                const Tensor& code, const Tensor& slots, const std::optional<Tensor>& mask,
                const std::optional<Tensor>& member, int64_t norm, double eps, Tensor out) {
  const int64_t D = x.size(-1), S = enc.size(0), O = enc.size(1), B = slots.size(0);
  const int64_t M = D ? x.numel() / D : 0;
  const ScalarType dtype = x.scalar_type();
  const auto fits = [&](const Tensor& t, ScalarType type, int64_t n) {
    return t.is_contiguous() && t.scalar_type() == type && t.numel() == n &&
           t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index();
  };
  STD_TORCH_CHECK(x.is_contiguous() && fits(out, dtype, x.numel()), kOp,
                  ": x and out must be contiguous, of one shape, dtype and device");
  check_tensor(kOp, "enc", enc, x, {S, O, D}, dtype);
  check_tensor(kOp, "dec", dec, x, {S, O, D}, dtype);
  check_tensor(kOp, "param", param, x, {S, O, kSteerParams}, ScalarType::Float);
  check_tensor(kOp, "code", code, x, {S, O, kSteerCodes}, ScalarType::Int);
  check_tensor(kOp, "slots", slots, x, {B}, ScalarType::Int);
  STD_TORCH_CHECK(!mask || fits(*mask, ScalarType::Bool, M), kOp, ": mask must be bool, a token");
  STD_TORCH_CHECK(!member || fits(*member, ScalarType::Bool, M * O), kOp,
                  ": member must be bool [M, O]");
  STD_TORCH_CHECK(M == 0 || (B > 0 && M % B == 0), kOp, ": ", M, " tokens for ", B, " sequences");
  if (M * D == 0) return;
  const Queue queue(x);
  with_gpu_float(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    SteerTables<T> t{data<T>(x),
                     data<T>(enc),
                     data<T>(dec),
                     data<float>(param),
                     data<int32_t>(code),
                     data<int32_t>(slots),
                     mask ? data<bool>(*mask) : nullptr,
                     member ? data<bool>(*member) : nullptr,
                     mutable_data<T>(out),
                     S,
                     O,
                     D,
                     M / B,
                     static_cast<int>(norm),
                     static_cast<float>(eps)};
    const size_t shared = (kSteerWarps + 2 * O) * sizeof(float);
    with_vector<T>(D, {t.x, t.enc, t.dec, t.out}, [&](auto vec) {
      queue.launch(steer_tokens<T, decltype(vec)::value>, M, kSteerThreads, shared, t);
    });
  });
}

}  // namespace
}  // namespace cuda
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, FASTSAE_CUDA_KEY, m) {
  m.impl("steer_cuda", TORCH_BOX(&fastsae::cuda::steer_cuda));
}
