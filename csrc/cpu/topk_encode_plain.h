// Every score in the accumulation type (part of topk_encode.cpp): of rows of W as they lie, or
// chunk by chunk of packed latents.

template <class In>
auto Encoder<In>::pack_rows(int64_t r, int64_t n) const -> Panels {
  const int mr = panel_rows(n, kernels_.max_rows);
  const int64_t panels = (n + mr - 1) / mr;
  Panels x{mr, panels, Buffer<A>(panels * mr * pack_.depth())};
  pack_.rows(r, n, mr, x.places.get());
  return x;
}

// Few rows: every thread has latents of its own, which it reads once.
template <class In>
void Encoder<In>::run_stream(int64_t r, int64_t n) {
  const Panels x = pack_rows(r, n);
  const int64_t bytes = n * row_stride() * int64_t(sizeof(A) + 4);
  const int64_t groups =
      std::max<int64_t>(1, std::min(threads_, std::min(f_ / 256, (16 << 20) / bytes)));
  std::vector<RowState> states(groups);
  for (auto& s : states) init_rows(s, n);
  const int64_t per = round_up((f_ + groups - 1) / groups, kMaxCols);
  parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> scores(x.panels * x.mr * kernels_.cols);
    for (int64_t g = begin; g < end; ++g) {
      StreamJob<A, In> job{};
      job.d = d_, job.n_rows = n, job.mr = x.mr, job.a = x.places.get(), job.w = w_;
      job.begin = std::min(f_, g * per), job.end = std::min(f_, (g + 1) * per);
      job.bias = bias_, job.scale = scale_, job.rows = &states[g].rows, job.c = scores.get();
      kernels_.scan_stream(job);
    }
  });
  write(states, r, n);
}

// Latents [first, F) chunk by chunk, each packed once for all rows.
template <class In>
void Encoder<In>::scan_chunks(const Panels& x, int64_t n, int64_t first, Rows<A>* rows) const {
  const int cols = kernels_.cols;
  const int64_t depth = pack_.depth(), row_bytes = depth * int64_t(sizeof(A));
  const int64_t chunk = chunk_latents(row_bytes);
  Buffer<A> packed(chunk * depth);
  for (int64_t c = first; c < f_; c += chunk) {
    const int64_t c_end = std::min(f_, c + chunk);
    parallel_for(0, (c_end - c + cols - 1) / cols, 2, [&](int64_t begin, int64_t end) {
      pack_.latents(c, c_end, begin, end, packed.get());
    });
    parallel_ranges(x.panels, x.mr * (c_end - c) * d_, [&](int64_t begin, int64_t end) {
      PlainJob<A> job{};
      job.depth = depth, job.mr = x.mr, job.n_rows = n;
      job.panel_begin = begin, job.panel_end = end;
      job.a = x.places.get(), job.b = packed.get(), job.n_cols = c_end - c, job.first = c;
      job.block = std::max<int64_t>(1, kBlockBytes / (cols * row_bytes));
      job.bias = bias_, job.scale = scale_, job.rows = rows;
      kernels_.scan(job);
    });
  }
}

template <class In>
void Encoder<In>::run_plain(int64_t r, int64_t n) {
  std::vector<RowState> states(1);
  init_rows(states[0], n);
  scan_chunks(pack_rows(r, n), n, 0, &states[0].rows);
  write(states, r, n);
}
