// sparse_adam_step: a block forms the gradient row of a latent and applies it at once, so that a
// step moves the parameter and its two moments once each way and nothing else.
#include <cmath>
#include <type_traits>

#include "common/moments.h"
#include "cuda/group_by_latent.h"

namespace fastsae {
namespace cuda {
namespace {

constexpr const char* kOp = "sparse_adam_step";
constexpr int64_t kMostKept = 40000;  // floats of a row in shared memory

// What does not depend on the element, computed in double on the host.
struct Scalars {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_correction2, eps, step_size;
  float weight_decay;
  uint32_t step;
  const double* schedule;  // step_size, inv_sqrt_correction2, step on the device, or null

  __device__ void read_schedule() {
    if (schedule == nullptr) return;
    step_size = static_cast<float>(schedule[0]);
    inv_sqrt_correction2 = static_cast<float>(schedule[1]);
    step = static_cast<uint32_t>(static_cast<int64_t>(schedule[2]));
  }
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

// The weights, in param itself or in fp32 masters whose rounded copy param is.
template <class T>
struct Weights {
  T* param;       // [F, D]
  float* master;  // [F, D] or null

  template <int kVec>
  __device__ __forceinline__ void load(int64_t at, float (&p)[kVec]) const {
    master ? load_wide(master + at, p) : load_wide(param + at, p);
  }
  template <int kVec>
  __device__ __forceinline__ void store(int64_t at, const float (&p)[kVec]) const {
    if (master) store_narrow(master + at, p);
    store_narrow(param + at, p);
  }
};

// kVec small elements, one access.
template <class U, int kVec>
struct alignas(sizeof(U) * kVec) Few {
  U v[kVec];
};

// A row's moments in their format. `update_row` calls load and store for kVec columns of each
// thread; coded ones are kept in shared memory until `finish`, since a block of them has one scale.
struct WideMoments {
  float *mean, *square;  // [F, D]

  template <int kVec>
  __device__ __forceinline__ void load(int64_t f, int64_t D, int64_t d, float (&m)[kVec],
                                       float (&v)[kVec]) const {
    load_wide(mean + f * D + d, m);
    load_wide(square + f * D + d, v);
  }
  template <int kVec>
  __device__ __forceinline__ void store(int64_t f, int64_t D, int64_t d, uint32_t, float*,
                                        const float (&m)[kVec], const float (&v)[kVec]) const {
    store_narrow(mean + f * D + d, m);
    store_narrow(square + f * D + d, v);
  }
  __device__ void finish(int64_t, int64_t, uint32_t, const float*) const {}
};

struct Bf16Moments {
  bf16 *mean, *square;  // [F, D]

  template <int kVec>
  __device__ __forceinline__ void load(int64_t f, int64_t D, int64_t d, float (&m)[kVec],
                                       float (&v)[kVec]) const {
    const auto a = *reinterpret_cast<const Few<bf16, kVec>*>(mean + f * D + d);
    const auto b = *reinterpret_cast<const Few<bf16, kVec>*>(square + f * D + d);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      m[i] = widen(a.v[i]);
      v[i] = widen(b.v[i]);
    }
  }
  template <int kVec>
  __device__ __forceinline__ void store(int64_t f, int64_t D, int64_t d, uint32_t key, float*,
                                        const float (&m)[kVec], const float (&v)[kVec]) const {
    Few<bf16, kVec> a, b;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const uint32_t r = random_bits(key, static_cast<uint32_t>(d + i));
      a.v[i] = round_bf16(m[i], r & 0xffff);
      b.v[i] = round_bf16(v[i], r >> 16);
    }
    *reinterpret_cast<Few<bf16, kVec>*>(mean + f * D + d) = a;
    *reinterpret_cast<Few<bf16, kVec>*>(square + f * D + d) = b;
  }
  __device__ void finish(int64_t, int64_t, uint32_t, const float*) const {}
};

struct CodedMoments {
  int8_t* mean;                    // [F, D]
  uint8_t* square;                 // [F, D]
  float *mean_scale, *root_scale;  // [F, ceil(D / 128)]

  template <int kVec>
  __device__ __forceinline__ void load(int64_t f, int64_t D, int64_t d, float (&m)[kVec],
                                       float (&v)[kVec]) const {
    const auto a = *reinterpret_cast<const Few<int8_t, kVec>*>(mean + f * D + d);
    const auto b = *reinterpret_cast<const Few<uint8_t, kVec>*>(square + f * D + d);
    const int64_t block = f * ceil_div(D, kMomentBlock) + d / kMomentBlock;  // kVec divides 128
    const float m_unit = mean_unit(mean_scale[block]), v_unit = root_unit(root_scale[block]);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      m[i] = decode_mean(a.v[i], m_unit);
      v[i] = decode_square(b.v[i], v_unit);
    }
  }
  template <int kVec>
  __device__ __forceinline__ void store(int64_t, int64_t D, int64_t d, uint32_t, float* kept,
                                        const float (&m)[kVec], const float (&v)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      kept[d + i] = m[i];
      kept[D + d + i] = sqrtf(v[i]);
    }
  }
  // The block's threads together; kept: m and sqrt(v) of the row.
  __device__ void finish(int64_t f, int64_t D, uint32_t key, const float* kept) const {
    __syncthreads();
    const int64_t blocks = ceil_div(D, kMomentBlock);
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    constexpr int kEach = kMomentBlock / kWarp;
    for (int64_t block = warp_id(); block < blocks; block += warps) {
      float m[kEach] = {}, root[kEach] = {};
      uint32_t most_m = 0, most_root = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t d = block * kMomentBlock + i * kWarp + lane_id();
        if (d >= D) continue;
        m[i] = kept[d];
        root[i] = kept[D + d];
        most_m = larger(most_m, magnitude(m[i]));
        most_root = larger(most_root, magnitude(root[i]));
      }
      const float m_scale = bits_to_float(warp_largest(most_m));
      const float v_scale = bits_to_float(warp_largest(most_root));
      if (lane_id() == 0) {
        mean_scale[f * blocks + block] = m_scale;
        root_scale[f * blocks + block] = v_scale;
      }
      const float m_inverse = inverse_scale(m_scale), v_inverse = inverse_scale(v_scale);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t d = block * kMomentBlock + i * kWarp + lane_id();
        if (d >= D) continue;
        const uint32_t r = random_bits(key, static_cast<uint32_t>(d));
        mean[f * D + d] = encode_mean(m[i], m_inverse, r & 0xffff);
        square[f * D + d] = encode_root(root[i], v_inverse, r >> 16);
      }
    }
  }

 private:
  __device__ static uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }
  __device__ static uint32_t warp_largest(uint32_t v) {
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) v = larger(v, __shfl_xor_sync(kFullWarp, v, d));
    return v;
  }
};

// Adam on kVec elements: the moments are stored, the new weights returned in p.
template <int kVec, class M>
__device__ __forceinline__ void update(const Scalars& s, float along, const float (&g)[kVec],
                                       const M& moments, int64_t f, int64_t D, int64_t d,
                                       uint32_t key, float* kept, float (&p)[kVec]) {
  float m[kVec], v[kVec];
  moments.load(f, D, d, m, v);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float grad = along != 0 ? fmaf(along, p[i], g[i]) : g[i];
    m[i] = fmaf(s.one_minus_beta1, grad, s.beta1 * m[i]);
    v[i] = fmaf(s.one_minus_beta2 * grad, grad, s.beta2 * v[i]);
    p[i] -= s.step_size * (m[i] / fmaf(sqrtf(v[i]), s.inv_sqrt_correction2, s.eps));
  }
  moments.store(f, D, d, key, kept, m, v);
}

// Floats of shared memory a row needs: itself for unit_norm, both moments where they are coded.
__host__ __device__ constexpr int64_t kept_rows(bool unit_norm, bool coded) {
  return (unit_norm ? 1 : 0) + (coded ? 2 : 0);
}

// One block a latent; its warps take slices of the columns in turn.
template <class T, int kVec, bool kUnitNorm, class M>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    adam_rows(GroupsView g, const T* values, const T* rows, int64_t D, const float* parts,
              Scalars s, bool lazy, Weights<T> weights, M moments) {
  const int64_t f = blockIdx.x;
  const bool has_grad = g.offset[f] < g.offset[f + 1];
  if (lazy && !has_grad) return;
  s.read_schedule();
  const uint32_t key = row_key(s.step, static_cast<uint32_t>(f));
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kVec;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kVec;
  // every lane of a warp goes through all of its slices, also where it owns no column
  const int64_t end = ceil_div(D, kWarp * kVec) * kWarp * kVec;
  Shared& shared = dynamic_shared<Shared>();
  float* row = shared.row();
  float* kept = row + (kUnitNorm ? D : 0);
  if constexpr (!kUnitNorm) {
    for (int64_t d = begin; d < end; d += stride) {
      float grad[kVec] = {}, p[kVec];
      if (has_grad) gradient_row(g, f, values, rows, D, d, parts, grad);
      if (d >= D) continue;
      weights.load(f * D + d, p);
      update(s, s.weight_decay, grad, moments, f, D, d, key, kept, p);
      weights.store(f * D + d, p);
    }
    moments.finish(f, D, key, kept);
    return;
  }
  // A thread reads what it wrote itself, so the order is free: no two lanes share a bank.
  const int64_t packs = D / kVec;
  // g - <g, p> / <p, p> p: what weight decay would add is parallel to p and goes as well.
  float along = 0;
  if (has_grad) {
    float pp = 0, gp = 0;
    for (int64_t d = begin; d < end; d += stride) {
      float grad[kVec] = {}, p[kVec];
      gradient_row(g, f, values, rows, D, d, parts, grad);
      if (d >= D) continue;
      weights.load(f * D + d, p);
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
    weights.load(f * D + d, p);
    update(s, along, grad, moments, f, D, d, key, kept, p);
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
    weights.store(f * D + d, p);
  }
  moments.finish(f, D, key, kept);
}

void sparse_adam_step_cuda(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                           const Tensor& values, const Tensor& indices, const Tensor& rows,
                           double lr, double beta1, double beta2, double eps, double weight_decay,
                           int64_t step, bool lazy, bool unit_norm,
                           const std::optional<Tensor>& exp_avg_scale,
                           const std::optional<Tensor>& exp_avg_sq_scale,
                           const std::optional<Tensor>& master,
                           const std::optional<Tensor>& schedule) {
  const int64_t N = values.size(0), K = values.size(1), F = param.size(0), D = param.size(1);
  const ScalarType dtype = param.scalar_type(), moment = exp_avg.scalar_type();
  const bool coded = moment == ScalarType::Char;
  STD_TORCH_CHECK(coded || moment == ScalarType::Float || moment == ScalarType::BFloat16, kOp,
                  ": exp_avg does not have a dtype that moments can have");
  STD_TORCH_CHECK(coded == exp_avg_scale.has_value() && coded == exp_avg_sq_scale.has_value(), kOp,
                  ": scales belong to int8 and uint8 moments");
  check_tensor(kOp, "param", param, param, {F, D}, dtype);
  check_tensor(kOp, "exp_avg", exp_avg, param, {F, D}, moment);
  check_tensor(kOp, "exp_avg_sq", exp_avg_sq, param, {F, D}, coded ? ScalarType::Byte : moment);
  check_tensor(kOp, "values", values, param, {N, K}, dtype);
  check_tensor(kOp, "indices", indices, param, {N, K}, ScalarType::Int);
  check_tensor(kOp, "rows", rows, param, {N, D}, dtype);
  if (coded) {
    const int64_t blocks = ceil_div(D, kMomentBlock);
    check_tensor(kOp, "exp_avg_scale", *exp_avg_scale, param, {F, blocks}, ScalarType::Float);
    check_tensor(kOp, "exp_avg_sq_scale", *exp_avg_sq_scale, param, {F, blocks}, ScalarType::Float);
  }
  if (master) check_tensor(kOp, "master", *master, param, {F, D}, ScalarType::Float);
  if (schedule) check_tensor(kOp, "schedule", *schedule, param, {3}, ScalarType::Double);
  const int64_t kept = kept_rows(unit_norm, coded);
  STD_TORCH_CHECK(kept * D <= kMostKept, kOp, ": ", unit_norm ? "unit_norm" : "",
                  unit_norm && coded ? " with " : "", coded ? "8-bit moments" : "",
                  " needs D <= ", kMostKept / (kept ? kept : 1), " on the cuda backend, got ", D);
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
      static_cast<uint32_t>(step),
      schedule ? data<double>(*schedule) : nullptr,
  };
  const Queue queue(param);
  const Groups groups(queue, kOp, indices, F);
  const GroupsView g = groups.view();
  const Tensor parts = parts_workspace(param, g.P, D);
  with_gpu_float(dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    const T *v = data<T>(values), *r = data<T>(rows);
    const Weights<T> weights{mutable_data<T>(param),
                             master ? mutable_data<float>(*master) : nullptr};
    const auto run = [&](const auto& moments) {
      with_vector<T>(
          D, {r, weights.param, weights.master, moments.mean, moments.square}, [&](auto vec) {
            constexpr int kVec = decltype(vec)::value;
            using M = std::decay_t<decltype(moments)>;
            const int64_t slices = ceil_div(D, kWarp * kVec);
            const int threads = static_cast<int>(slices < kRowWarps ? slices : kRowWarps) * kWarp;
            const size_t shared = kept ? sizeof(Shared) + kept * D * sizeof(float) : 0;
            sum_heavy<kVec>(queue, g, v, r, D, parts);
            queue.launch(unit_norm ? adam_rows<T, kVec, true, M> : adam_rows<T, kVec, false, M>, F,
                         threads, shared, g, v, r, D, data<float>(parts), scalars, lazy, weights,
                         moments);
          });
    };
    if (coded) {
      run(CodedMoments{mutable_data<int8_t>(exp_avg), mutable_data<uint8_t>(exp_avg_sq),
                       mutable_data<float>(*exp_avg_scale),
                       mutable_data<float>(*exp_avg_sq_scale)});
    } else if (moment == ScalarType::BFloat16) {
      run(Bf16Moments{mutable_data<bf16>(exp_avg), mutable_data<bf16>(exp_avg_sq)});
    } else {
      run(WideMoments{mutable_data<float>(exp_avg), mutable_data<float>(exp_avg_sq)});
    }
  });
}

}  // namespace
}  // namespace cuda
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, FASTSAE_CUDA_KEY, m) {
  m.impl("sparse_adam_step_cuda", TORCH_BOX(&fastsae::cuda::sparse_adam_step_cuda));
}
