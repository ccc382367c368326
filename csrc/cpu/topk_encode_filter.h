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

  // Scores the pending pairs of a row in fp32 and merges them into its k best.
  void rescore(int64_t row, const float* x) {
    const Pending* pending = f.pending + row * int64_t(f.capacity);
    const int32_t n = f.count[row];
    const In* w[8];
    float score[8];
    for (int32_t i = 0; i < n; i += 8) {
      const int32_t m = std::min(8, n - i);
      for (int32_t t = 0; t < m; ++t) w[t] = e->w_ + int64_t(pending[i + t].index) * e->d_;
      e->kernels_.dots(x, w, m, e->d_, score);
      for (int32_t t = 0; t < m; ++t) {
        const float rank = e->rank_of(score[t], pending[i + t].index);
        if (!(rank <= rows->threshold[row])) rows->add(row, rank, pending[i + t].index);
      }
    }
    f.count[row] = 0;
    rescored.fetch_add(n, std::memory_order_relaxed);
    if (rows->count[row] > e->k_) rows->shrink(row);
    raise(row, rows->threshold[row]);
  }

  void raise(int64_t row, float threshold) {
    if (threshold > f.threshold[row]) f.threshold[row] = threshold;  // false for NaN
  }

  // Raises the threshold to the k-th best lower bound and drops what is below it.
  void prune(int64_t row) {
    Pending* pending = f.pending + row * int64_t(f.capacity);
    const int32_t n = f.count[row];
    const int64_t known = rows->count[row], k = e->k_;
    if (n + known < k) return;
    static thread_local std::vector<float> bounds;
    bounds.clear();
    constexpr float kInf = std::numeric_limits<float>::infinity();
    for (int32_t i = 0; i < n; ++i) {
      const float b = pending[i].lower;
      bounds.push_back(b == b ? b : -kInf);
    }
    for (int64_t i = 0; i < known; ++i) {
      const float b = key_rank<float>(rows->keys[row * rows->capacity + i]);
      bounds.push_back(b == b ? b : kInf);
    }
    std::nth_element(bounds.begin(), bounds.begin() + (k - 1), bounds.end(), std::greater<float>());
    raise(row, bounds[k - 1]);
    int32_t kept = 0;
    for (int32_t i = 0; i < n; ++i) {
      if (!(pending[i].upper < f.threshold[row])) pending[kept++] = pending[i];
    }
    f.count[row] = kept;
  }

  // A row's candidates did not fit: prune, and rescore at once if that frees too little.
  static void full(void* self, int64_t row) {
    Filter* filter = static_cast<Filter*>(self);
    filter->prune(row);
    if (filter->f.count[row] > filter->f.capacity / 2) filter->rescore_row(row);
  }

  void rescore_row(int64_t row) {
    const In* x = e->x_ + (r + row) * e->d_;
    if constexpr (std::is_same<In, float>::value) {
      rescore(row, x);
    } else {
      static thread_local std::vector<float> wide;
      wide.resize(e->d_);
      for (int64_t i = 0; i < e->d_; ++i) wide[i] = widen(x[i]);
      rescore(row, wide.data());
    }
  }

  void finish_chunk(int64_t row) {
    if (f.count[row] == 0) return;
    prune(row);
    rescore_row(row);
  }
};

template <class In>
void Encoder<In>::run_filter(int64_t r, int64_t n) {
  if constexpr (std::is_same<A, float>::value) {
    const int mr = panel_rows(n, kernels_.bf16_max_rows), cols = kernels_.bf16_cols;
    const int64_t panels = (n + mr - 1) / mr, pairs = (d_ + 1) / 2;
    Buffer<uint32_t> a(panels * mr * pairs);
    Buffer<float> err_w(n), err_dw(n), threshold(n);
    Buffer<int32_t> pending_count(n);
    Buffer<Pending> pending(n * pending_capacity());
    std::vector<RowState> states(1);
    init_rows(states[0], n);
    pack_rows_bf16(r, n, mr, a.get(), err_w.get(), err_dw.get());
    // Rounding of the two sums per |x| |w|: at most two roundings per pair of products (2^-23 each,
    // whichever way the instruction rounds), D/16 + 8 in fp32 lanes, and a few in the bound itself.
    const double g = static_cast<double>(2 * pairs) * 0x1p-23 +
                     static_cast<double>(d_ / 16 + 32) * 0x1p-23;
    for (int64_t i = 0; i < n; ++i) {
      const double residual = norm_above(err_dw[i], d_);
      const double norm = norm_above(err_w[i], d_) + residual;  // bounds |x| and |x^|
      err_w[i] = static_cast<float>((residual + g * norm) * (1 + 0x1p-20));
      err_dw[i] = static_cast<float>(norm * (1 + 0x1p-20));
      threshold[i] = -std::numeric_limits<float>::infinity();
      pending_count[i] = 0;
    }
    Filter filter{};
    filter.e = this;
    filter.r = r;
    filter.rows = &states[0].rows;
    filter.f = {pending.get(), pending_count.get(), threshold.get(), err_w.get(), err_dw.get(),
                pending_capacity(), &filter, &Filter::full};

    const int64_t chunk = chunk_latents(true, cols, kChunkBytes);
    Buffer<uint32_t> packed(chunk * pairs);
    Buffer<float> col_store(5 * chunk);
    float* c0 = col_store.get();
    const FilterCols fc{c0, c0 + chunk, c0 + 2 * chunk, c0 + 3 * chunk, c0 + 4 * chunk};
    int64_t next = 0;
    for (int64_t c = 0; c < f_; c = next) {
      // A short first chunk raises the thresholds and shows early whether the filter pays.
      const int64_t len = c == 0 ? std::max<int64_t>(cols, chunk / 4 / cols * cols) : chunk;
      next = std::min(f_, c + len);
      parallel_for(0, (next - c + cols - 1) / cols, 2, [&](int64_t begin, int64_t end) {
        pack_filter(c, next, begin, end, packed.get(), fc);
      });
      const int64_t before = filter.rescored.load();
      parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
        FilterJob job{};
        job.depth = pairs, job.mr = mr, job.panel_begin = begin, job.panel_end = end;
        job.n_rows = n, job.a = a.get(), job.b = packed.get(), job.n_cols = next - c;
        job.first = c, job.cols = fc, job.rows = &filter.f;
        job.block = std::max<int64_t>(1, kBlockBytes / (cols * pairs * 4));
        kernels_.scan_filter(job);
        for (int64_t row = begin * mr; row < std::min(n, end * mr); ++row) filter.finish_chunk(row);
      });
      const int64_t rescored = filter.rescored.load() - before - (c == 0 ? 4 * n * k_ : 0);
      if (next < f_ && static_cast<double>(rescored) > kRescoreLimit * static_cast<double>(n * (next - c))) {
        g_stats[0] = 3;
        break;
      }
    }
    g_stats[3] += filter.rescored.load();
    if (next >= f_) {
      parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
        std::vector<float> wide(d_);
        for (int64_t row = begin; row < end; ++row) {
          write_row(states[0].rows, row, r + row,
                    [&](int64_t i, const int32_t* list, int64_t m, A* out) {
                      const In* x = x_ + (r + i) * d_;
                      for (int64_t t = 0; t < d_; ++t) wide[t] = widen(x[t]);
                      dot_scores(wide.data(), list, m, out);
                    });
        }
      });
      return;
    }
    // The rest goes the plain way. Scores already held are formed again in its order of summation,
    // so that equal latents on both sides still tie.
    const int plain_mr = panel_rows(n, kernels_.max_rows);
    Buffer<A> plain_a((n + plain_mr - 1) / plain_mr * plain_mr * d_);
    pack_rows(r, n, plain_mr, plain_a.get());
    parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> list(capacity_);
      std::vector<A> scores(capacity_);
      for (int64_t row = begin; row < end; ++row) {
        Rows<A>& rows = states[0].rows;
        const int64_t m = rows.count[row];
        Key* keys = rows.keys + row * capacity_;
        for (int64_t i = 0; i < m; ++i) list[i] = key_index<A>(keys[i]);
        plain_scores(plain_a.get(), row, plain_mr, list.data(), m, scores.data());
        for (int64_t i = 0; i < m; ++i) {
          keys[i] = make_key<A>(rank_of(scores[i], list[i]), list[i]);
        }
        rows.threshold[row] = std::numeric_limits<A>::quiet_NaN();
        rows.shrink(row);
      }
    });
    plain_chunks(plain_a.get(), n, plain_mr, next, &states[0].rows);
    write_plain(states, plain_a.get(), plain_mr, r, n);
  } else {
    (void)r, (void)n;
  }
}
