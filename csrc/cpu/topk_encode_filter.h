// The filter path of topk_encode.cpp (part of that file).
//
// With x^, w^ the bf16 roundings, s~ the fp32 sum of their products and e the fp32 score that a
// survivor gets, for every pair
//   |s~ - e| <= |x - x^| |w| + |x^| |w - w^| + g |x| |w|        (Cauchy-Schwarz, twice)
// where g holds the rounding of both sums. The norms are measured and rounded up, so this is a
// proof: T, the k-th largest lower bound s~ - m of a row, is at most the k-th largest e, and a pair
// with s~ + m < T is not among the k best. Norms that overflow or are NaN give an infinite bound:
// such pairs are always rescored.

template <class In>
struct Encoder<In>::Filter {
  const Encoder* e;
  int64_t r;  // first row of x
  Rows<A>* rows;
  FilterRows f;
  std::atomic<int64_t> rescored{0};

  // Scores the candidates [begin, end) of a row in fp32 and merges them into its k best.
  void rescore(int64_t row, int64_t begin, int64_t end) {
    static thread_local std::vector<A> store;
    const A* x = e->places(r + row, store);
    const int32_t* index = f.index + row * f.stride;
    A score[kBatch];
    for (int64_t i = begin; i < end; i += kBatch) {
      const int64_t m = std::min(kBatch, end - i);
      e->scores(x, index + i, m, score);
      for (int64_t t = 0; t < m; ++t) {
        const A rank = e->rank_of(score[t], index[i + t]);
        if (!(rank <= rows->threshold[row])) rows->add(row, rank, index[i + t]);
      }
    }
    rescored.fetch_add(end - begin, std::memory_order_relaxed);
  }

  void prune(int64_t row) {
    e->kernels_.prune(f, row, rows->rank + row * rows->stride, rows->count[row], e->k_);
  }

  // All candidates of a row, at once.
  void flush(int64_t row) {
    rescore(row, 0, f.count[row]);
    f.count[row] = 0;
    if (rows->count[row] > e->k_) rows->shrink(*rows, row);
    const float t = rows->threshold[row];
    if (t > f.threshold[row]) f.threshold[row] = t;  // false for NaN
  }

  // Prunes; the next time comes k candidates later, and when they no longer fit they are rescored.
  static void full(void* self, int64_t row) {
    Filter* filter = static_cast<Filter*>(self);
    const int64_t capacity = filter->e->pending_capacity();
    const int64_t step = std::max<int64_t>(filter->e->k_, 64);
    filter->prune(row);
    if (filter->f.count[row] + step > capacity) filter->flush(row);
    filter->f.limit[row] = static_cast<int32_t>(std::min(capacity, filter->f.count[row] + step));
  }
};

// Sums of squares of rows and of their residuals to the factors of |w| and |w - w^| in the bound.
template <class In>
void Encoder<In>::row_errors(int64_t n, float* err_w, float* err_dw) const {
  // Rounding of the two sums per |x| |w|: of products of bf16 at most two roundings per pair (2^-23
  // each, whichever way the instruction rounds), of the score one of 2^-24 for every element of d,
  // and a few in the bound itself.
  const double one = static_cast<double>(d_) * 0x1p-24;
  const double g = static_cast<double>(round_up(d_, 2) + 32) * 0x1p-23 + one / (1 - one);
  for (int64_t i = 0; i < n; ++i) {
    const double residual = norm_above(err_dw[i], d_);
    const double norm = norm_above(err_w[i], d_) + residual;  // bounds |x| and |x^|
    err_w[i] = static_cast<float>((residual + g * norm) * (1 + 0x1p-20));
    err_dw[i] = static_cast<float>(norm * (1 + 0x1p-20));
  }
}

// Rescores what waits, in chunks of latents that the caches hold: a row of W serves all rows of x
// that want it while it is near.
template <class In>
void Encoder<In>::rescore_all(Filter& filter, int64_t n, int64_t n_latents) const {
  FilterRows& f = filter.f;
  const int64_t chunk =
      std::max<int64_t>(256, kRescoreBytes / (d_ * static_cast<int64_t>(sizeof(In))));
  Buffer<int32_t> done(n);
  for (int64_t c = 0; c < n_latents; c += chunk) {
    parallel_ranges(n, chunk * d_, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (c == 0) {
          filter.prune(row);
          done[row] = 0;
        }
        const int32_t* index = f.index + row * f.stride;
        const int32_t from = done[row];
        int32_t to = from;
        while (to < f.count[row] && index[to] < c + chunk) ++to;
        done[row] = to;
        filter.rescore(row, from, to);
      }
    });
  }
}

template <class In>
void Encoder<In>::run_filter(int64_t r, int64_t n) {
  if constexpr (std::is_same<A, float>::value) {
    const int mr = panel_rows(n, kernels_.max_rows), cols = kernels_.cols;
    const int64_t panels = (n + mr - 1) / mr, pairs = (d_ + 1) / 2;
    Buffer<float> a(panels * mr * pairs);
    Buffer<float> err_w(n), err_dw(n), threshold(n);
    const int64_t stride = pending_stride();
    Buffer<int32_t> count(n), limit(n), index(n * stride);
    Buffer<float> lower(n * stride), upper(n * stride);
    std::vector<RowState> states(1);
    init_rows(states[0], n);
    pack_.rows_bf16(r, n, mr, a.get(), err_w.get(), err_dw.get());
    row_errors(n, err_w.get(), err_dw.get());
    for (int64_t i = 0; i < n; ++i) {
      threshold[i] = -std::numeric_limits<float>::infinity();
      count[i] = 0;
      limit[i] = static_cast<int32_t>(std::min(pending_capacity(), 2 * std::max<int64_t>(k_, 32)));
    }
    Filter filter{};
    filter.e = this;
    filter.r = r;
    filter.rows = &states[0].rows;
    filter.f = {lower.get(), upper.get(),  index.get(), count.get(), limit.get(),  threshold.get(),
                err_w.get(), err_dw.get(), stride,      &filter,     &Filter::full};

    const int64_t chunk = chunk_latents(2 * round_up(d_, 2));
    Buffer<float> packed(chunk * pairs);
    Buffer<float> col_store(5 * chunk);
    float* c0 = col_store.get();
    const FilterCols fc{c0, c0 + chunk, c0 + 2 * chunk, c0 + 3 * chunk, c0 + 4 * chunk};
    int64_t next = 0;
    for (int64_t c = 0; c < f_; c = next) {
      // A short first chunk raises the thresholds and shows early whether the filter pays.
      const int64_t len = c == 0 ? std::max<int64_t>(cols, chunk / 4 / cols * cols) : chunk;
      next = std::min(f_, c + len);
      parallel_for(0, (next - c + cols - 1) / cols, 2, [&](int64_t begin, int64_t end) {
        pack_.filter(c, next, begin, end, packed.get(), fc);
      });
      std::atomic<int64_t> waiting{0};
      parallel_ranges(panels, mr * (next - c) * d_, [&](int64_t begin, int64_t end) {
        FilterJob job{};
        job.depth = pairs, job.mr = mr, job.panel_begin = begin, job.panel_end = end;
        job.n_rows = n, job.a = a.get(), job.b = packed.get(), job.n_cols = next - c;
        job.first = c, job.cols = fc, job.rows = &filter.f;
        job.block = std::max<int64_t>(1, kBlockBytes / (cols * pairs * 4));
        kernels_.scan_filter(job);
        int64_t total = 0;
        for (int64_t row = begin * mr; row < std::min(n, end * mr); ++row) total += count[row];
        waiting += total;
      });
      const double share = static_cast<double>(filter.rescored + waiting - 4 * n * k_) /
                           static_cast<double>(n * next);
      if (next < f_ && share > kRescoreLimit) {
        g_stats[0] = 3;
        break;
      }
    }
    rescore_all(filter, n, next);
    g_stats[3] += filter.rescored.load();
    if (next < f_) scan_chunks(pack_rows(r, n), n, next, &states[0].rows);
    write(states, r, n);
  } else {
    (void)r, (void)n;
  }
}

// Both bounds and the fp32 score of every pair [N, F], for the test of the proof.
template <class In>
void Encoder<In>::bounds(float* lower, float* upper, float* exact) {
  if (n_ == 0) return;
  if constexpr (std::is_same<In, float>::value) {
    const int mr = panel_rows(n_, kernels_.max_rows), cols = kernels_.cols;
    const int64_t panels = (n_ + mr - 1) / mr, pairs = (d_ + 1) / 2, stride = f_ + 2 * kSlack;
    const int64_t chunk = round_up(f_, cols);
    Buffer<float> a(panels * mr * pairs), packed(chunk * pairs);
    Buffer<float> err_w(n_), err_dw(n_), threshold(n_), lo(n_ * stride), up(n_ * stride);
    Buffer<int32_t> index(n_ * stride), count(n_), limit(n_);
    Buffer<float> store(5 * chunk);
    float* c0 = store.get();
    const FilterCols fc{c0, c0 + chunk, c0 + 2 * chunk, c0 + 3 * chunk, c0 + 4 * chunk};
    pack_.rows_bf16(0, n_, mr, a.get(), err_w.get(), err_dw.get());
    row_errors(n_, err_w.get(), err_dw.get());
    pack_.filter(0, f_, 0, chunk / cols, packed.get(), fc);
    std::fill_n(threshold.get(), n_, -std::numeric_limits<float>::infinity());
    std::fill_n(count.get(), n_, 0);
    std::fill_n(limit.get(), n_, std::numeric_limits<int32_t>::max());
    FilterRows rows{lo.get(),    up.get(),        index.get(), count.get(),
                    limit.get(), threshold.get(), err_w.get(), err_dw.get(),
                    stride,      nullptr,         nullptr};
    FilterJob job{pairs, mr, 0, panels, n_, a.get(), packed.get(), f_, 0, 4, fc, &rows};
    kernels_.scan_filter(job);
    std::vector<int32_t> all(f_);
    for (int64_t j = 0; j < f_; ++j) all[j] = static_cast<int32_t>(j);
    for (int64_t i = 0; i < n_; ++i) {
      std::copy_n(lo.get() + i * stride, f_, lower + i * f_);
      std::copy_n(up.get() + i * stride, f_, upper + i * f_);
      scores(x_ + i * d_, all.data(), f_, exact + i * f_);
      for (int64_t j = 0; j < f_; ++j) exact[i * f_ + j] = rank_of(exact[i * f_ + j], j);
    }
  } else {
    (void)lower, (void)upper, (void)exact;
  }
}
