// The packing of topk_encode: rows of x and of W_enc into the panels that the kernels read, and
// with them the measured norms of the filter's error bound.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/topk_encode.h"

namespace fastsae {
namespace topk {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows per panel: the smallest microkernel that needs no more panels than the widest.
inline int panel_rows(int64_t n, int widest) {
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

// All panels lie one after another; past the last row or latent they repeat it.
template <class In>
class Packing {
 public:
  using A = acc_t<In>;

  // bias, scale: [F] or null.
  Packing(const Kernels<A, In>& kernels, const In* x, const In* w, int64_t d, const A* bias,
          const A* scale)
      : kernels_(kernels), x_(x), w_(w), d_(d), bias_(bias), scale_(scale) {}

  int64_t depth() const { return (d_ + kernels_.per - 1) / kernels_.per; }

  // Rows r.. of x as [panels][depth][mr].
  void rows(int64_t r, int64_t n, int mr, A* out) const {
    const int64_t panels = (n + mr - 1) / mr, depth = this->depth();
    torch::stable::parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
      alignas(64) A tmp[kPackDepth * kMaxCols];
      for (int64_t p = begin; p < end; ++p) {
        const In* rows[kMaxCols];
        panel_rows_of(r, n, mr, p, rows);
        for (int64_t d = 0; d < depth; d += kPackDepth) {
          const int64_t count = std::min(kPackDepth, depth - d);
          kernels_.pack(rows, d, d + count, d_, tmp);
          copy_panel(tmp, count, mr, out + (p * depth + d) * mr);
        }
      }
    });
  }

  // Rounded to pairs of bf16, [panels][pairs][mr], with square and residual [n].
  void rows_bf16(int64_t r, int64_t n, int mr, float* out, float* square, float* residual) const {
    const int64_t pairs = (d_ + 1) / 2, panels = (n + mr - 1) / mr;
    torch::stable::parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
      Buffer<float> tmp(pairs * kMaxCols);
      float sq[kMaxCols], re[kMaxCols];
      for (int64_t p = begin; p < end; ++p) {
        const In* rows[kMaxCols];
        panel_rows_of(r, n, mr, p, rows);
        kernels_.pack_bf16(rows, d_, tmp.get(), sq, re);
        copy_panel(tmp.get(), pairs, mr, out + p * mr * pairs);
        for (int i = 0; i < mr && p * mr + i < n; ++i) {
          square[p * mr + i] = sq[i];
          residual[p * mr + i] = re[i];
        }
      }
    });
  }

  void latent_rows(int64_t first, int64_t end, int cols, const In** rows) const {
    for (int i = 0; i < cols; ++i) rows[i] = w_ + std::min(first + i, end - 1) * d_;
  }

  // Latents [begin, end) into panels of `out`; q_begin.. q_end of those panels.
  void latents(int64_t begin, int64_t end, int64_t q_begin, int64_t q_end, A* out) const {
    const In* rows[kMaxCols];
    const int cols = kernels_.cols;
    for (int64_t q = q_begin; q < q_end; ++q) {
      latent_rows(begin + q * cols, end, cols, rows);
      kernels_.pack(rows, 0, depth(), d_, out + q * cols * depth());
    }
  }

  // The same for the filter, with the per-latent side of the error bound.
  void filter(int64_t begin, int64_t end, int64_t q_begin, int64_t q_end, float* out,
              const FilterCols& fc) const {
    const int cols = kernels_.cols;
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
  static constexpr int64_t kPackDepth = 64;

  // The rows of panel p.
  void panel_rows_of(int64_t r, int64_t n, int mr, int64_t p, const In** rows) const {
    for (int i = 0; i < kMaxCols; ++i) {
      rows[i] = x_ + (r + std::min(p * mr + std::min(i, mr - 1), n - 1)) * d_;
    }
  }

  // The first mr columns of tmp [depth][cols].
  void copy_panel(const A* tmp, int64_t depth, int mr, A* out) const {
    for (int64_t d = 0; d < depth; ++d) {
      for (int i = 0; i < mr; ++i) out[d * mr + i] = tmp[d * kernels_.cols + i];
    }
  }

  const Kernels<A, In>& kernels_;
  const In *x_, *w_;
  int64_t d_;
  const A *bias_, *scale_;
};

}  // namespace topk
}  // namespace fastsae
