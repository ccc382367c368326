// sparse_grad_weight: out[f] = sum over the pairs with indices[n, k] = f of values[n, k] rows[n],
// dense or for the latents that occur only. Pairs are grouped by latent, so that every element of
// the result is summed in one order: repeatable bit for bit.
#include "cuda/group_by_latent.h"

namespace fastsae {
namespace cuda {
namespace {

// Row i of out is that of latents[i], or of latent i.
template <class T, int kVec>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    gradient_rows(GroupsView g, const T* values, const T* rows, int64_t D, uint32_t slices,
                  const float* parts, const int32_t* latents, int64_t count, T* out) {
  const uint32_t warp = grid_warp();
  const int64_t i = warp / slices, column = (warp % slices * kWarp + lane_id()) * int64_t(kVec);
  if (i >= count) return;
  float sum[kVec] = {};
  gradient_row(g, latents ? latents[i] : i, values, rows, D, column, parts, sum);
  if (column < D) store_narrow(out + i * D + column, sum);
}

// counts[tile]: latents of the tile that occur.
__global__ void __launch_bounds__(kSortThreads) count_active(GroupsView g, uint32_t* counts) {
  const int64_t f = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  const int count = __syncthreads_count(f < g.F && g.offset[f] < g.offset[f + 1]);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// Those latents, ascending; before[tile]: how many lie in the tiles before.
__global__ void __launch_bounds__(kSortThreads)
    write_active(GroupsView g, const uint32_t* before, int32_t* latents) {
  SortShared& s = dynamic_shared<SortShared>();
  const int64_t f = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  const bool active = f < g.F && g.offset[f] < g.offset[f + 1];
  uint32_t total = 0;
  const uint32_t place = before[blockIdx.x] + block_scan(uint32_t(active), s.sums, &total);
  if (active) latents[place] = static_cast<int32_t>(f);
}

struct Factors {
  int64_t N, K, D;
  ScalarType dtype;
};

Factors check_factors(const char* op, const Tensor& values, const Tensor& indices,
                      const Tensor& rows) {
  const Factors s{values.size(0), values.size(1), rows.size(1), rows.scalar_type()};
  check_tensor(op, "rows", rows, rows, {s.N, s.D}, s.dtype);
  check_tensor(op, "values", values, rows, {s.N, s.K}, s.dtype);
  check_tensor(op, "indices", indices, rows, {s.N, s.K}, ScalarType::Int);
  return s;
}

// The rows of out [count, D]: those of `latents`, or all.
void run(const char* op, const Queue& queue, const Factors& s, const GroupsView& g,
         const Tensor& values, const Tensor& rows, const int32_t* latents, int64_t count,
         const Tensor& out) {
  if (count * s.D == 0) return;
  const Tensor parts = parts_workspace(rows, g.P, s.D);
  with_gpu_float(s.dtype, op, [&](auto zero) {
    using T = decltype(zero);
    const T *v = data<T>(values), *r = data<T>(rows);
    T* o = mutable_data<T>(out);
    with_vector<T>(s.D, {r, o}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const int64_t slices = ceil_div(s.D, kWarp * kVec);
      sum_heavy<kVec>(queue, g, v, r, s.D, parts);
      queue.launch(gradient_rows<T, kVec>, blocks_for(count, slices), kRowThreads, 0, g, v, r, s.D,
                   slices, data<float>(parts), latents, count, o);
    });
  });
}

Tensor sparse_grad_weight_cuda(const Tensor& values, const Tensor& indices, const Tensor& rows,
                               int64_t n_latents) {
  const char* op = "sparse_grad_weight";
  const Factors s = check_factors(op, values, indices, rows);
  const Queue queue(rows);
  const Groups groups(queue, op, indices, n_latents);
  Tensor out = torch::stable::new_empty(rows, {n_latents, s.D});
  run(op, queue, s, groups.view(), values, rows, nullptr, n_latents, out);
  return out;
}

std::tuple<Tensor, Tensor> sparse_grad_weight_rows_cuda(const Tensor& values, const Tensor& indices,
                                                        const Tensor& rows, int64_t n_latents) {
  const char* op = "sparse_grad_weight_rows";
  const Factors s = check_factors(op, values, indices, rows);
  const Queue queue(rows);
  const Groups groups(queue, op, indices, n_latents);
  const GroupsView g = groups.view();
  const int64_t tiles = ceil_div(n_latents, kSortThreads);
  const Tensor counts = workspace<uint32_t>(rows, tiles + 1);
  uint32_t* count = mutable_data<uint32_t>(counts);
  queue.launch(count_active, tiles, kSortThreads, 0, g, count);
  const SortPass sums{nullptr, nullptr, nullptr, nullptr, 0, tiles, 0, 1, count, count + tiles};
  queue.launch(sort_sum, 1, kSortThreads, sizeof(SortShared), sums);
  const int64_t active = queue.read(count + tiles);
  Tensor latents = torch::stable::new_empty(indices, {active});
  int32_t* latent = mutable_data<int32_t>(latents);
  if (active) queue.launch(write_active, tiles, kSortThreads, sizeof(SortShared), g, count, latent);
  Tensor out = torch::stable::new_empty(rows, {active, s.D});
  run(op, queue, s, g, values, rows, latent, active, out);
  return {latents, out};
}

}  // namespace
}  // namespace cuda
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, FASTSAE_CUDA_KEY, m) {
  m.impl("sparse_grad_weight_cuda", TORCH_BOX(&fastsae::cuda::sparse_grad_weight_cuda));
  m.impl("sparse_grad_weight_rows_cuda", TORCH_BOX(&fastsae::cuda::sparse_grad_weight_rows_cuda));
}
