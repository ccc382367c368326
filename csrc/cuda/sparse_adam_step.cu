// sparse_adam_step: a block forms the gradient row of a latent and applies it at once, so that a
// step moves the parameter and its two moments once each way and nothing else.
#include <cmath>

#include "cuda/group_by_latent.h"

namespace fastsae {
namespace cuda {
namespace {

constexpr const char* kOp = "sparse_adam_step";
constexpr int64_t kMostColumns = 40000;  // of a row that unit_norm keeps in shared memory

// What does not depend on the element, computed in double on the host.
struct Scalars {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_correction2, eps, step_size;
  float weight_decay;
};

struct Shared {
  float sums[2][kRowWarps];

  __device__ float* row() { return reinterpret_cast<float*>(this + 1); }  // [D]
};

// The sum over the block, in the order of the warps. sums: one float a warp.
__device__ float block_sum(float v, float* sums) {
  v = warp_sum(v);
  if (lane_id() == 0) sums[warp_id()] = v;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) sum += sums[w];
  return sum;
}

// Adam on kVec elements: the moments are stored, the new parameter returned in p.
template <int kVec>
__device__ __forceinline__ void update(const Scalars& s, float along, const float (&g)[kVec],
                                       float* exp_avg, float* exp_avg_sq, float (&p)[kVec]) {
  float m[kVec], v[kVec];
  load_wide(exp_avg, m);
  load_wide(exp_avg_sq, v);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float grad = along != 0 ? fmaf(along, p[i], g[i]) : g[i];
    m[i] = fmaf(s.one_minus_beta1, grad, s.beta1 * m[i]);
    v[i] = fmaf(s.one_minus_beta2 * grad, grad, s.beta2 * v[i]);
    p[i] -= s.step_size * (m[i] / fmaf(sqrtf(v[i]), s.inv_sqrt_correction2, s.eps));
  }
  store_narrow(exp_avg, m);
  store_narrow(exp_avg_sq, v);
}

// One block a latent; its warps take slices of the columns in turn.
template <class T, int kVec, bool kUnitNorm>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    adam_rows(GroupsView g, const T* values, const T* rows, int64_t D, const float* parts,
              Scalars s, bool lazy, T* param, float* exp_avg, float* exp_avg_sq) {
  const int64_t f = blockIdx.x;
  const bool has_grad = g.offset[f] < g.offset[f + 1];
  if (lazy && !has_grad) return;
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kVec;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kVec;
  // every lane of a warp goes through all of its slices, also where it owns no column
  const int64_t end = ceil_div(D, kWarp * kVec) * kWarp * kVec;
  if constexpr (!kUnitNorm) {
    for (int64_t d = begin; d < end; d += stride) {
      float grad[kVec] = {}, p[kVec];
      if (has_grad) gradient_row(g, f, values, rows, D, d, parts, grad);
      if (d >= D) continue;
      load_wide(param + f * D + d, p);
      update(s, s.weight_decay, grad, exp_avg + f * D + d, exp_avg_sq + f * D + d, p);
      store_narrow(param + f * D + d, p);
    }
    return;
  }
  Shared& shared = dynamic_shared<Shared>();
  // A thread reads what it wrote itself, so the order is free: no two lanes share a bank.
  float* row = shared.row();
  const int64_t packs = D / kVec;
  // g - <g, p> / <p, p> p: what weight decay would add is parallel to p and goes as well.
  float along = 0;
  if (has_grad) {
    float pp = 0, gp = 0;
    for (int64_t d = begin; d < end; d += stride) {
      float grad[kVec] = {}, p[kVec];
      gradient_row(g, f, values, rows, D, d, parts, grad);
      if (d >= D) continue;
      load_wide(param + f * D + d, p);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        pp = fmaf(p[i], p[i], pp);
        gp = fmaf(grad[i], p[i], gp);
        row[i * packs + d / kVec] = grad[i];
      }
    }
    pp = block_sum(pp, shared.sums[0]);
    gp = block_sum(gp, shared.sums[1]);
    along = pp > 0 ? -gp / pp : 0.f;
  }
  float square = 0;
  for (int64_t d = begin; d < D; d += stride) {
    float grad[kVec] = {}, p[kVec];
    if (has_grad) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) grad[i] = row[i * packs + d / kVec];
    }
    load_wide(param + f * D + d, p);
    update(s, along, grad, exp_avg + f * D + d, exp_avg_sq + f * D + d, p);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      square = fmaf(p[i], p[i], square);
      row[i * packs + d / kVec] = p[i];
    }
  }
  __syncthreads();  // sums[0] has been read by all
  square = block_sum(square, shared.sums[0]);
  const float scale = square > 0 ? 1 / sqrtf(square) : 1.f;  // zero or NaN: no direction
  for (int64_t d = begin; d < D; d += stride) {
    float p[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) p[i] = scale * row[i * packs + d / kVec];
    store_narrow(param + f * D + d, p);
  }
}

void sparse_adam_step_cuda(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                           const Tensor& values, const Tensor& indices, const Tensor& rows,
                           double lr, double beta1, double beta2, double eps, double weight_decay,
                           int64_t step, bool lazy, bool unit_norm) {
  const int64_t N = values.size(0), K = values.size(1), F = param.size(0), D = param.size(1);
  const ScalarType dtype = param.scalar_type();
  check_tensor(kOp, "param", param, param, {F, D}, dtype);
  check_tensor(kOp, "exp_avg", exp_avg, param, {F, D}, ScalarType::Float);
  check_tensor(kOp, "exp_avg_sq", exp_avg_sq, param, {F, D}, ScalarType::Float);
  check_tensor(kOp, "values", values, param, {N, K}, dtype);
  check_tensor(kOp, "indices", indices, param, {N, K}, ScalarType::Int);
  check_tensor(kOp, "rows", rows, param, {N, D}, dtype);
  STD_TORCH_CHECK(!unit_norm || D <= kMostColumns, kOp, ": unit_norm needs D <= ", kMostColumns,
                  " on the cuda backend, got ", D);
  if (F * D == 0) return;
  const double t = static_cast<double>(step);
  const Scalars scalars{
      static_cast<float>(beta1),
      static_cast<float>(1 - beta1),
      static_cast<float>(beta2),
      static_cast<float>(1 - beta2),
      static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t))),
      static_cast<float>(eps),
      static_cast<float>(lr / (1 - std::pow(beta1, t))),
      static_cast<float>(weight_decay),
  };
  const Queue queue(param);
  const Groups groups(queue, kOp, indices, F);
  const GroupsView g = groups.view();
  const Tensor parts = parts_workspace(param, g.P, D);
  with_gpu_float(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    const T *v = data<T>(values), *r = data<T>(rows);
    T* p = mutable_data<T>(param);
    float *m = mutable_data<float>(exp_avg), *s = mutable_data<float>(exp_avg_sq);
    with_vector<T>(D, {r, p, m, s}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const int64_t slices = ceil_div(D, kWarp * kVec);
      const int threads = static_cast<int>(slices < kRowWarps ? slices : kRowWarps) * kWarp;
      const size_t shared = unit_norm ? sizeof(Shared) + D * sizeof(float) : 0;
      sum_heavy<kVec>(queue, g, v, r, D, parts);
      queue.launch(unit_norm ? adam_rows<T, kVec, true> : adam_rows<T, kVec, false>, F, threads,
                   shared, g, v, r, D, data<float>(parts), scalars, lazy, p, m, s);
    });
  });
}

}  // namespace
}  // namespace cuda
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, FASTSAE_CUDA_KEY, m) {
  m.impl("sparse_adam_step_cuda", TORCH_BOX(&fastsae::cuda::sparse_adam_step_cuda));
}
