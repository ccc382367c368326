// The design "bounded" of topk_encode: a filter of bf16 products with a proven error bound, for
// inputs that sum in fp32.
//
// With x^, w^ the bf16 roundings, s~ the fp32 sum of their products and e the fp32 score that a
// survivor gets, for every pair
//   |s~ - e| <= |x - x^| |w| + |x^| |w - w^| + g |x| |w|        (Cauchy-Schwarz, twice)
// where g holds the rounding of both sums. The norms are measured and rounded up, so this is a
// proof: T, the k-th largest lower bound s~ - m of a row, is at most the k-th largest e, and a pair
// with s~ + m < T is not among the k best. Norms that overflow or are NaN give an infinite bound:
// such pairs are always rescored.
#pragma once

#include <atomic>

#include "cpu/topk_encode_plain.h"
#include "cpu/topk_encode_problem.h"

namespace fastsae {
namespace topk {

constexpr int64_t kRescoreBytes = 8 << 20;  // rows of W that rescoring goes over at a time
constexpr double kRescoreLimit = 0.08;      // share of rescored pairs beyond which the filter loses

// Candidates of a row that wait for rescoring; with what is known they must fit kSelect.
template <class In>
int64_t pending_capacity(const Problem<In>& p) {
  return std::min<int64_t>(6 * p.k + 192, kSelect - p.capacity - 64);
}
template <class In>
int64_t pending_stride(const Problem<In>& p) {
  return pending_capacity(p) + 2 * kSlack;
}

// Rows r.. of a problem, with the candidates of each that wait for rescoring.
template <class In>
struct Bounded {
  const Problem<In>& p;
  int64_t r, n;
  Rows<float>* rows;
  FilterRows f;
  std::atomic<int64_t> rescored{0};

  // Scores the candidates [begin, end) of a row in fp32 and merges them into its k best.
  void rescore(int64_t row, int64_t begin, int64_t end) {
    static thread_local std::vector<float> store;
    const float* x = p.places(r + row, store);
    const int32_t* index = f.index + row * f.stride;
    float score[Problem<In>::kBatch];
    for (int64_t i = begin; i < end; i += p.kBatch) {
      const int64_t m = std::min<int64_t>(p.kBatch, end - i);
      p.scores(x, index + i, m, score);
      for (int64_t t = 0; t < m; ++t) {
        const float rank = p.rank_of(score[t], index[i + t]);
        if (!(rank <= rows->threshold[row])) rows->add(row, rank, index[i + t]);
      }
    }
    rescored.fetch_add(end - begin, std::memory_order_relaxed);
  }

  void prune(int64_t row) {
    p.kernels.prune(f, row, rows->rank + row * rows->stride, rows->count[row], p.k);
  }

  // All candidates of a row, at once.
  void flush(int64_t row) {
    rescore(row, 0, f.count[row]);
    f.count[row] = 0;
    if (rows->count[row] > p.k) rows->shrink(*rows, row);
    const float t = rows->threshold[row];
    if (t > f.threshold[row]) f.threshold[row] = t;  // false for NaN
  }

  // Prunes; the next time comes k candidates later, and when they no longer fit they are rescored.
  static void full(void* self, int64_t row) {
    Bounded* waiting_rows = static_cast<Bounded*>(self);
    const int64_t most = pending_capacity(waiting_rows->p),
                  step = std::max<int64_t>(waiting_rows->p.k, 64);
    waiting_rows->prune(row);
    if (waiting_rows->f.count[row] + step > most) waiting_rows->flush(row);
    waiting_rows->f.limit[row] =
        static_cast<int32_t>(std::min(most, waiting_rows->f.count[row] + step));
  }

  // Rescores what waits, in chunks of latents that the caches hold: a row of W serves all rows of x
  // that want it while it is near.
  void rescore_all(int64_t n_latents) {
    const int64_t chunk =
        std::max<int64_t>(256, kRescoreBytes / (p.d * static_cast<int64_t>(sizeof(In))));
    Buffer<int32_t> done(n);
    for (int64_t c = 0; c < n_latents; c += chunk) {
      parallel_ranges(n, chunk * p.d, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          if (c == 0) {
            prune(row);
            done[row] = 0;
          }
          const int32_t* index = f.index + row * f.stride;
          const int32_t from = done[row];
          int32_t to = from;
          while (to < f.count[row] && index[to] < c + chunk) ++to;
          done[row] = to;
          rescore(row, from, to);
        }
      });
    }
  }
};

// Sums of squares of rows and of their residuals to the factors of |w| and |w - w^| in the bound.
inline void row_errors(int64_t n, int64_t d, float* err_w, float* err_dw) {
  // Rounding of the two sums per |x| |w|: of products of bf16 at most two roundings per pair (2^-23
  // each, whichever way the instruction rounds), of the score one of 2^-24 for every element of d,
  // and a few in the bound itself.
  const double one = static_cast<double>(d) * 0x1p-24;
  const double g = static_cast<double>(round_up(d, 2) + 32) * 0x1p-23 + one / (1 - one);
  for (int64_t i = 0; i < n; ++i) {
    const double residual = norm_above(err_dw[i], d);
    const double norm = norm_above(err_w[i], d) + residual;  // bounds |x| and |x^|
    err_w[i] = static_cast<float>((residual + g * norm) * (1 + 0x1p-20));
    err_dw[i] = static_cast<float>(norm * (1 + 0x1p-20));
  }
}

// What the filter did with the rows of a call.
struct BoundedStats {
  int64_t rescored = 0;
  bool gave_up = false;  // too many survived: the rest of the latents were scored in fp32
};

// Rows r.. of the output.
template <class In>
void select_bounded(const Problem<In>& p, int64_t r, int64_t n, BoundedStats& told) {
  const int mr = panel_rows(n, p.kernels.max_rows), cols = p.kernels.cols;
  const int64_t panels = (n + mr - 1) / mr, pairs = (p.d + 1) / 2;
  const int64_t stride = pending_stride(p), first_limit = 2 * std::max<int64_t>(p.k, 32);
  Buffer<float> a(panels * mr * pairs);
  Buffer<float> err_w(n), err_dw(n), threshold(n);
  Buffer<int32_t> count(n), limit(n), index(n * stride);
  Buffer<float> lower(n * stride), upper(n * stride);
  std::vector<RowState<float>> states;
  states.push_back(p.new_rows(n));
  p.pack.rows_bf16(r, n, mr, a.get(), err_w.get(), err_dw.get());
  row_errors(n, p.d, err_w.get(), err_dw.get());
  std::fill_n(threshold.get(), n, -std::numeric_limits<float>::infinity());
  std::fill_n(count.get(), n, 0);
  std::fill_n(limit.get(), n, static_cast<int32_t>(std::min(pending_capacity(p), first_limit)));
  Bounded<In> waiting_rows{p, r, n, &states[0].rows, {}};
  waiting_rows.f = {lower.get(), upper.get(),     index.get(),       count.get(),
                    limit.get(), threshold.get(), err_w.get(),       err_dw.get(),
                    stride,      &waiting_rows,   &Bounded<In>::full};

  const int64_t chunk = p.chunk_latents(2 * round_up(p.d, 2));
  Buffer<float> packed(chunk * pairs);
  Buffer<float> col_store(5 * chunk);
  const FilterCols fc(col_store.get(), chunk);
  int64_t next = 0;
  for (int64_t c = 0; c < p.f; c = next) {
    // A short first chunk raises the thresholds and shows early whether the filter pays.
    const int64_t len = c == 0 ? std::max<int64_t>(cols, chunk / 4 / cols * cols) : chunk;
    next = std::min(p.f, c + len);
    torch::stable::parallel_for(
        0, (next - c + cols - 1) / cols, 2,
        [&](int64_t begin, int64_t end) { p.pack.filter(c, next, begin, end, packed.get(), fc); });
    std::atomic<int64_t> waiting{0};
    parallel_ranges(panels, mr * (next - c) * p.d, [&](int64_t begin, int64_t end) {
      FilterJob job{};
      job.depth = pairs, job.mr = mr, job.panel_begin = begin, job.panel_end = end;
      job.n_rows = n, job.a = a.get(), job.b = packed.get(), job.n_cols = next - c;
      job.first = c, job.to = {fc, &waiting_rows.f};
      job.block = std::max<int64_t>(1, kBlockBytes / (cols * pairs * 4));
      p.kernels.scan_filter(job);
      int64_t total = 0;
      for (int64_t row = begin * mr; row < std::min(n, end * mr); ++row) total += count[row];
      waiting += total;
    });
    const double share = static_cast<double>(waiting_rows.rescored + waiting - 4 * n * p.k) /
                         static_cast<double>(n * next);
    if (next < p.f && share > kRescoreLimit) {
      told.gave_up = true;
      break;
    }
  }
  waiting_rows.rescore_all(next);
  told.rescored += waiting_rows.rescored.load();
  if (next < p.f) scan_chunks(p, p.pack_rows(r, n), n, next, &states[0].rows);
  p.write(states, r, n);
}

// Both bounds and the fp32 score of every pair [N, F], for the test of the proof.
inline void filter_bounds(const Problem<float>& p, float* lower, float* upper, float* exact) {
  const int mr = panel_rows(p.n, p.kernels.max_rows), cols = p.kernels.cols;
  const int64_t panels = (p.n + mr - 1) / mr, pairs = (p.d + 1) / 2, stride = p.f + 2 * kSlack;
  const int64_t chunk = round_up(p.f, cols);
  Buffer<float> a(panels * mr * pairs), packed(chunk * pairs);
  Buffer<float> err_w(p.n), err_dw(p.n), threshold(p.n), lo(p.n * stride), up(p.n * stride);
  Buffer<int32_t> index(p.n * stride), count(p.n), limit(p.n);
  Buffer<float> store(5 * chunk);
  const FilterCols fc(store.get(), chunk);
  p.pack.rows_bf16(0, p.n, mr, a.get(), err_w.get(), err_dw.get());
  row_errors(p.n, p.d, err_w.get(), err_dw.get());
  p.pack.filter(0, p.f, 0, chunk / cols, packed.get(), fc);
  std::fill_n(threshold.get(), p.n, -std::numeric_limits<float>::infinity());
  std::fill_n(count.get(), p.n, 0);
  std::fill_n(limit.get(), p.n, std::numeric_limits<int32_t>::max());
  FilterRows rows{lo.get(),    up.get(),     index.get(), count.get(), limit.get(), threshold.get(),
                  err_w.get(), err_dw.get(), stride,      nullptr,     nullptr};
  FilterJob job{{pairs, mr, 0, panels, p.n, a.get(), packed.get(), p.f, 0, 4}, {fc, &rows}};
  p.kernels.scan_filter(job);
  std::vector<int32_t> all(p.f);
  for (int64_t j = 0; j < p.f; ++j) all[j] = static_cast<int32_t>(j);
  for (int64_t i = 0; i < p.n; ++i) {
    std::copy_n(lo.get() + i * stride, p.f, lower + i * p.f);
    std::copy_n(up.get() + i * stride, p.f, upper + i * p.f);
    p.scores(p.x + i * p.d, all.data(), p.f, exact + i * p.f);
    for (int64_t j = 0; j < p.f; ++j) exact[i * p.f + j] = p.rank_of(exact[i * p.f + j], j);
  }
}

}  // namespace topk
}  // namespace fastsae
