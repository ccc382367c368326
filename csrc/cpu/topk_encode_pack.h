// The packing of topk_encode.cpp (part of that file): rows of x and of W_enc into the panels that
// the kernels read, and with them the measured norms of the filter's error bound.

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Uninitialised, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n = 0) { resize(n); }
  void resize(int64_t n) {
    if (n <= 0) return;
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(n) * sizeof(T)) != 0) throw std::bad_alloc();
    data_.reset(static_cast<T*>(p));
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  std::unique_ptr<T, Free> data_;
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows per panel: the smallest microkernel that needs no more panels than the widest.
int panel_rows(int64_t n, int widest) {
  const int64_t panels = (n + widest - 1) / widest;
  const int64_t need = (n + panels - 1) / panels;
  for (int mr : {1, 2, 4, 6, 8, 10, 12, 14}) {
    if (mr >= need) return std::min(mr, widest);
  }
  return widest;
}

// sqrt of a sum of `terms` squares accumulated in fp32 lanes, rounded up. Anything that could
// overflow later becomes inf. The constant covers squares that underflowed.
inline float norm_above(float square, int64_t terms) {
  const double rounding = 1.0 + static_cast<double>(terms / 16 + 32) * 0x1p-23;
  const double norm =
      std::sqrt(static_cast<double>(square) * rounding + static_cast<double>(terms) * 0x1p-125) *
      (1 + 0x1p-22);
  return norm <= 0x1p40 ? static_cast<float>(norm) : std::numeric_limits<float>::infinity();
}

// All panels lie one after another; places past the last row or latent hold zeros.
template <class In>
class Packing {
 public:
  using A = acc_t<In>;

  // bias, scale: [F] or null.
  Packing(const Kernels<A, In>& kernels, const In* x, const In* w, int64_t d, const A* bias,
          const A* scale)
      : kernels_(kernels), x_(x), w_(w), d_(d), bias_(bias), scale_(scale) {}

  // Rows r.. of x as [panels][D][mr], zero past n.
  void rows(int64_t r, int64_t n, int mr, A* out) const {
    const int64_t panels = (n + mr - 1) / mr;
    parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        A* panel = out + p * mr * d_;
        for (int i = 0; i < mr; ++i) {
          const int64_t row = p * mr + i;
          const In* src = x_ + (r + row) * d_;
          if (row < n) {
            for (int64_t d = 0; d < d_; ++d) panel[d * mr + i] = widen(src[d]);
          } else {
            for (int64_t d = 0; d < d_; ++d) panel[d * mr + i] = A(0);
          }
        }
      }
    });
  }

  // Rows as bf16 pairs [panels][pairs][mr]; square and residual [n] unless null.
  void rows_bf16(int64_t r, int64_t n, int mr, uint32_t* out, float* square,
                 float* residual) const {
    const int64_t pairs = (d_ + 1) / 2, panels = (n + mr - 1) / mr;
    parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
      Buffer<uint32_t> tmp(pairs * kMaxCols);
      float sq[kMaxCols], re[kMaxCols];
      for (int64_t p = begin; p < end; ++p) {
        const In* rows[kMaxCols] = {};
        for (int i = 0; i < mr && p * mr + i < n; ++i) rows[i] = x_ + (r + p * mr + i) * d_;
        kernels_.pack_bf16(rows, d_, tmp.get(), sq, re);
        uint32_t* panel = out + p * mr * pairs;
        for (int64_t q = 0; q < pairs; ++q) {
          for (int i = 0; i < mr; ++i) panel[q * mr + i] = tmp[q * kMaxCols + i];
        }
        for (int i = 0; square && i < mr && p * mr + i < n; ++i) {
          square[p * mr + i] = sq[i];
          residual[p * mr + i] = re[i];
        }
      }
    });
  }

  void latent_rows(int64_t first, int64_t end, int cols, const In** rows) const {
    for (int i = 0; i < cols; ++i) rows[i] = first + i < end ? w_ + (first + i) * d_ : nullptr;
  }

  // Latents [begin, end) into panels of `out`; q_begin.. q_end of those panels.
  void latents(bool use_bf16, int64_t begin, int64_t end, int64_t q_begin, int64_t q_end,
               void* out) const {
    const In* rows[kMaxCols];
    for (int64_t q = q_begin; q < q_end; ++q) {
      const int cols = use_bf16 ? kernels_.bf16_cols : kernels_.cols;
      latent_rows(begin + q * cols, end, cols, rows);
      if (use_bf16) {
        kernels_.pack_bf16(rows, d_, static_cast<uint32_t*>(out) + q * cols * ((d_ + 1) / 2),
                           nullptr, nullptr);
      } else {
        kernels_.pack(rows, d_, static_cast<A*>(out) + q * cols * d_);
      }
    }
  }

  // The same for the filter, with the per-latent side of the error bound.
  void filter(int64_t begin, int64_t end, int64_t q_begin, int64_t q_end, uint32_t* out,
              const FilterCols& fc) const {
    const int cols = kernels_.bf16_cols;
    const In* rows[kMaxCols];
    float square[kMaxCols], residual[kMaxCols];
    constexpr float kInf = std::numeric_limits<float>::infinity();
    for (int64_t q = q_begin; q < q_end; ++q) {
      latent_rows(begin + q * cols, end, cols, rows);
      kernels_.pack_bf16(rows, d_, out + q * cols * ((d_ + 1) / 2), square, residual);
      for (int i = 0; i < cols; ++i) {
        const int64_t c = q * cols + i, j = begin + c;
        const double scale = scale_ && j < end ? double(scale_[j]) : 1.0;
        const double bias = bias_ && j < end ? double(bias_[j]) : 0.0;
        // Roundings after the sums, and results that flush to zero (at most 2^-126 each).
        const double slack = std::abs(bias) * 0x1p-20 + static_cast<double>(d_ + 8) * 0x1p-124;
        const double dw = norm_above(residual[i], d_), norm = norm_above(square[i], d_) + dw;
        const bool tame = std::abs(scale) <= 0x1p40 && std::abs(bias) <= 0x1p40;
        // Not below 2^-60: the products of norms must not become denormal, which would lose bits.
        const double size = std::max(std::abs(scale), 0x1p-60);
        fc.scale[c] = static_cast<float>(scale);
        fc.upper[c] = static_cast<float>(bias * scale + (slack * size + 0x1p-120));
        fc.lower[c] = static_cast<float>(bias * scale - (slack * size + 0x1p-120));
        fc.norm[c] = tame ? static_cast<float>(norm * size * (1 + 0x1p-20)) : kInf;
        fc.residual[c] = tame ? static_cast<float>(dw * size * (1 + 0x1p-20)) : kInf;
      }
    }
  }

 private:
  const Kernels<A, In>& kernels_;
  const In *x_, *w_;
  int64_t d_;
  const A *bias_, *scale_;
};
