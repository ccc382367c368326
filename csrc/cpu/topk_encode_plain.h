// The design "plain" of topk_encode: every score in the accumulation type, chunk by chunk of packed
// latents.
#pragma once

#include "cpu/topk_encode_problem.h"

namespace fastsae {
namespace topk {

// Latents [first, F) against packed rows, each packed once for all of them.
template <class In>
void scan_chunks(const Problem<In>& p, const Panels<acc_t<In>>& x, int64_t n, int64_t first,
                 Rows<acc_t<In>>* rows) {
  using A = acc_t<In>;
  const int cols = p.kernels.cols;
  const int64_t depth = p.pack.depth(), row_bytes = depth * int64_t(sizeof(A));
  const int64_t chunk = p.chunk_latents(row_bytes);
  Buffer<A> packed(chunk * depth);
  for (int64_t c = first; c < p.f; c += chunk) {
    const int64_t c_end = std::min(p.f, c + chunk);
    torch::stable::parallel_for(
        0, (c_end - c + cols - 1) / cols, 2,
        [&](int64_t begin, int64_t end) { p.pack.latents(c, c_end, begin, end, packed.get()); });
    parallel_ranges(x.panels, x.mr * (c_end - c) * p.d, [&](int64_t begin, int64_t end) {
      PlainJob<A> job{};
      job.depth = depth, job.mr = x.mr, job.n_rows = n;
      job.panel_begin = begin, job.panel_end = end;
      job.a = x.places.get(), job.b = packed.get(), job.n_cols = c_end - c, job.first = c;
      job.block = std::max<int64_t>(1, kBlockBytes / (cols * row_bytes));
      job.to = {p.bias, p.scale, rows};
      p.kernels.scan(job);
    });
  }
}

// Rows r.. of the output.
template <class In>
void select_plain(const Problem<In>& p, int64_t r, int64_t n) {
  std::vector<RowState<acc_t<In>>> states;
  states.push_back(p.new_rows(n));
  scan_chunks(p, p.pack_rows(r, n), n, 0, &states[0].rows);
  p.write(states, r, n);
}

}  // namespace topk
}  // namespace fastsae
