// The design "stream" of topk_encode, for few rows: W_enc as it lies goes through L1 once, a panel
// at a time.
#pragma once

#include "cpu/topk_encode_problem.h"

namespace fastsae {
namespace topk {

// Rows r.. of the output. Every thread has latents of its own, which it reads once.
template <class In>
void select_stream(const Problem<In>& p, int64_t r, int64_t n) {
  using A = acc_t<In>;
  const Panels<A> x = p.pack_rows(r, n);
  const int64_t bytes = n * p.row_stride() * int64_t(sizeof(A) + 4);
  const int64_t groups =
      std::max<int64_t>(1, std::min(p.threads, std::min(p.f / 256, (16 << 20) / bytes)));
  std::vector<RowState<A>> states;
  for (int64_t g = 0; g < groups; ++g) states.push_back(p.new_rows(n));
  const int64_t per = round_up((p.f + groups - 1) / groups, kMaxCols);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> scores(x.panels * x.mr * p.kernels.cols);
    for (int64_t g = begin; g < end; ++g) {
      StreamJob<A, In> job{};
      job.d = p.d, job.n_rows = n, job.mr = x.mr, job.a = x.places.get(), job.w = p.w;
      job.begin = std::min(p.f, g * per), job.end = std::min(p.f, (g + 1) * per);
      job.to = {p.bias, p.scale, &states[g].rows}, job.c = scores.get();
      p.kernels.scan_stream(job);
    }
  });
  p.write(states, r, n);
}

}  // namespace topk
}  // namespace fastsae
