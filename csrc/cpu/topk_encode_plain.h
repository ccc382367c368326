// The plain path of topk_encode.cpp (part of that file): every score in the accumulation type,
// chunk by chunk of packed latents.

// One row's scores of the latents listed, with the plain path's own order of summation.
template <class In>
void Encoder<In>::plain_scores(const void* a, int64_t row, int mr, const int32_t* latents,
                               int64_t n, A* out) const {
  const bool use_bf16 = plain_bf16();
  const int64_t depth = use_bf16 ? (d_ + 1) / 2 : d_;
  const int cols = use_bf16 ? kernels_.bf16_cols : kernels_.cols;
  Buffer<A> panel(cols * depth), x(depth);
  // One row out of its panel; a bf16 pair is copied as the 4 bytes that it is.
  for (int64_t d = 0; d < depth; ++d) {
    x[d] = static_cast<const A*>(a)[(row / mr) * mr * depth + d * mr + row % mr];
  }
  A ranks[2 * kSlack], threshold;
  int32_t index[2 * kSlack];
  int64_t count;
  for (int64_t i = 0; i < n; i += cols) {
    const In* rows[kMaxCols];
    const int m = static_cast<int>(std::min<int64_t>(cols, n - i));
    for (int c = 0; c < cols; ++c) rows[c] = c < m ? w_ + int64_t(latents[i + c]) * d_ : nullptr;
    PlainJob<A> job{};
    job.depth = depth, job.mr = 1, job.panel_end = 1, job.n_rows = 1;
    job.a = x.get(), job.b = panel.get(), job.n_cols = m, job.block = 1;
    Rows<A> sink{ranks, index, &threshold, &count, kMaxCols + 1, 0, kMaxCols, shrink_any<A>};
    threshold = std::numeric_limits<A>::quiet_NaN();
    count = 0;
    job.rows = &sink;
    if (use_bf16) {
      kernels_.pack_bf16(rows, d_, reinterpret_cast<uint32_t*>(panel.get()), nullptr, nullptr);
      if constexpr (std::is_same<A, float>::value) kernels_.scan_bf16(job);
    } else {
      kernels_.pack(rows, d_, panel.get());
      kernels_.scan(job);
    }
    for (int c = 0; c < m; ++c) out[i + index[c]] = ranks[c];
  }
}

template <class In>
auto Encoder<In>::plain_job(const void* a, int64_t n, int mr, bool use_bf16, Rows<A>* rows) const
    -> PlainJob<A> {
  PlainJob<A> job{};
  job.depth = use_bf16 ? (d_ + 1) / 2 : d_;
  job.mr = mr;
  job.panel_end = (n + mr - 1) / mr;
  job.n_rows = n;
  job.a = a;
  const int cols = use_bf16 ? kernels_.bf16_cols : kernels_.cols;
  job.block = std::max<int64_t>(1, kBlockBytes / (cols * job.depth * int64_t(sizeof(A))));
  job.bias = bias_;
  job.scale = scale_;
  job.rows = rows;
  return job;
}

template <class In>
void Encoder<In>::scan_plain(const PlainJob<A>& job, bool use_bf16) const {
  if constexpr (std::is_same<A, float>::value) {
    if (use_bf16) return kernels_.scan_bf16(job);
  }
  kernels_.scan(job);
}

// Latents [first, F) by the plain path over rows already packed; all rows in one group.
template <class In>
void Encoder<In>::plain_chunks(const void* a, int64_t n, int mr, int64_t first,
                               Rows<A>* rows) const {
  const bool use_bf16 = plain_bf16();
  const int cols = use_bf16 ? kernels_.bf16_cols : kernels_.cols;
  const int64_t chunk = chunk_latents(use_bf16, cols, kChunkBytes);
  const PlainJob<A> base = plain_job(a, n, mr, use_bf16, rows);
  Buffer<A> packed(chunk * base.depth);
  for (int64_t c = first; c < f_; c += chunk) {
    const int64_t c_end = std::min(f_, c + chunk);
    parallel_for(0, (c_end - c + cols - 1) / cols, 2, [&](int64_t begin, int64_t end) {
      pack_.latents(use_bf16, c, c_end, begin, end, packed.get());
    });
    parallel_ranges(base.panel_end, mr * (c_end - c) * d_, [&](int64_t begin, int64_t end) {
      PlainJob<A> job = base;
      job.panel_begin = begin, job.panel_end = end;
      job.b = packed.get(), job.n_cols = c_end - c, job.first = c;
      scan_plain(job, use_bf16);
    });
  }
}

template <class In>
void Encoder<In>::run_plain(int64_t r, int64_t n) {
  const bool use_bf16 = plain_bf16();
  const int widest = use_bf16 ? kernels_.bf16_max_rows : kernels_.max_rows;
  const int mr = panel_rows(n, widest);
  const int64_t panels = (n + mr - 1) / mr, depth = use_bf16 ? (d_ + 1) / 2 : d_;
  Buffer<A> a(panels * mr * depth);
  if (use_bf16) {
    pack_.rows_bf16(r, n, mr, reinterpret_cast<uint32_t*>(a.get()), nullptr, nullptr);
  } else {
    pack_.rows(r, n, mr, a.get());
  }
  const int64_t groups = panels >= 4 * threads_ ? 1 : groups_for(n);
  std::vector<RowState> states(groups);
  for (auto& s : states) init_rows(s, n);
  if (groups == 1) {
    plain_chunks(a.get(), n, mr, 0, &states[0].rows);
  } else {
    const int cols = use_bf16 ? kernels_.bf16_cols : kernels_.cols;
    const int64_t per = round_up((f_ + groups - 1) / groups, cols);
    parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        PlainJob<A> job = plain_job(a.get(), n, mr, use_bf16, &states[g].rows);
        const int64_t chunk = chunk_latents(use_bf16, cols, kBlockBytes);
        Buffer<A> packed(chunk * depth);
        const int64_t g_end = std::min(f_, (g + 1) * per);
        for (int64_t c = g * per; c < g_end; c += chunk) {
          const int64_t c_end = std::min(g_end, c + chunk);
          pack_.latents(use_bf16, c, c_end, 0, (c_end - c + cols - 1) / cols, packed.get());
          job.b = packed.get(), job.n_cols = c_end - c, job.first = c;
          scan_plain(job, use_bf16);
        }
      }
    });
  }
  write_plain(states, a.get(), mr, r, n);
}

template <class In>
void Encoder<In>::write_plain(std::vector<RowState>& states, const void* a, int mr, int64_t r,
                              int64_t n) {
  parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      merge(states, row);
      write_row(states[0].rows, row, r + row,
                [&](int64_t i, const int32_t* list, int64_t m, A* out) {
                  plain_scores(a, i, mr, list, m, out);
                });
    }
  });
}
