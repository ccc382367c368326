// One call of topk_encode, as its designs see it: what is asked, its latents and rows packed, and
// the best so far of every row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/topk_encode.h"
#include "cpu/topk_encode_pack.h"

namespace fastsae {
namespace topk {

constexpr int64_t kChunkBytes = 4 << 20;    // packed latents of one chunk
constexpr int64_t kBlockBytes = 384 << 10;  // packed latents that stay in L2 beside the row panels

// Rows of x as [panels][depth][mr].
template <class A>
struct Panels {
  int mr;
  int64_t panels;
  Buffer<A> places;
};

// The best so far of n rows.
template <class A>
struct RowState {
  Buffer<A> rank;
  Buffer<int32_t> index;
  Buffer<A> threshold;
  Buffer<int64_t> count;
  Rows<A> rows;
};

template <class In>
struct Problem {
  using A = acc_t<In>;
  using Key = typename KeyOf<A>::Key;
  static constexpr int64_t kBatch = 64;  // pairs scored at a time

  Problem(const Kernels<A, In>& kernels, const In* x, const In* w, const In* bias, const In* scale,
          int64_t n, int64_t d, int64_t f, int64_t k, bool relu, In* values, int32_t* indices)
      : kernels(kernels),
        x(x),
        w(w),
        n(n),
        d(d),
        f(f),
        k(k),
        relu(relu),
        values(values),
        indices(indices),
        bias(widened(bias, bias_store_, f)),
        scale(widened(scale, scale_store_, f)),
        pack(this->kernels, x, w, d, this->bias, this->scale),
        threads(std::max<int64_t>(1, torch::stable::get_num_threads())),
        capacity(std::min(k + std::max<int64_t>(k, 64), f + 1)) {}
  Problem(const Problem&) = delete;

  // Whole vectors: the selection reads to the end of the one that holds a row's last candidate.
  int64_t row_stride() const { return round_up(capacity + kSlack, 16); }

  RowState<A> new_rows(int64_t count) const {
    const int64_t stride = row_stride();
    RowState<A> s{Buffer<A>(count * stride),
                  Buffer<int32_t>(count * stride),
                  Buffer<A>(count),
                  Buffer<int64_t>(count),
                  {}};
    std::fill_n(s.threshold.get(), count, std::numeric_limits<A>::quiet_NaN());
    std::fill_n(s.count.get(), count, 0);
    const bool small = kernels.shrink && stride <= kSelect;
    s.rows = {s.rank.get(),
              s.index.get(),
              s.threshold.get(),
              s.count.get(),
              capacity,
              stride,
              k,
              small ? kernels.shrink : shrink_any<A>};
    return s;
  }

  A rank_of(A score, int64_t latent) const {
    if (bias) score += bias[latent];
    return scale ? score * scale[latent] : score;
  }

  // A row of x as places: itself, or a copy in `store`.
  const A* places(int64_t row, std::vector<A>& store) const {
    if constexpr (std::is_same<In, A>::value) {
      (void)store;
      return x + row * d;
    } else {
      store.resize(pack.depth());
      kernels.places(x + row * d, d, store.data());
      return store.data();
    }
  }

  // The scores of listed latents, the row as places.
  void scores(const A* row, const int32_t* latents, int64_t count, A* out) const {
    const In* rows[kBatch];
    for (int64_t i = 0; i < count; i += kBatch) {
      const int64_t m = std::min(kBatch, count - i);
      for (int64_t t = 0; t < m; ++t) rows[t] = w + int64_t(latents[i + t]) * d;
      kernels.scores(&row, rows, m, d, out + i);
    }
  }

  // Rows r.. of x.
  Panels<A> pack_rows(int64_t r, int64_t count) const {
    const int mr = panel_rows(count, kernels.max_rows);
    const int64_t panels = (count + mr - 1) / mr;
    Panels<A> packed{mr, panels, Buffer<A>(panels * mr * pack.depth())};
    pack.rows(r, count, mr, packed.places.get());
    return packed;
  }

  // Latents of which a chunk of kChunkBytes packs so many.
  int64_t chunk_latents(int64_t row_bytes) const {
    const int64_t cols = kernels.cols;
    return std::min(round_up(f, cols), std::max(cols, kChunkBytes / row_bytes / cols * cols));
  }

  // Rows r.. of the output, from states of which later ones hold later latents.
  void write(std::vector<RowState<A>>& states, int64_t r, int64_t count) const {
    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        merge(states, row);
        write_row(states[0].rows, row, r + row);
      }
    });
  }

  const Kernels<A, In> kernels;
  const In *const x, *const w;
  const int64_t n, d, f, k;
  const bool relu;
  In* const values;
  int32_t* const indices;

 private:
  // Bias and scale as A, for the whole of F.
  static const A* widened(const In* p, Buffer<A>& store, int64_t f) {
    if (!p) return nullptr;
    if constexpr (std::is_same<In, A>::value) {
      (void)store, (void)f;
      return p;
    } else {
      store = Buffer<A>(f);
      for (int64_t i = 0; i < f; ++i) store[i] = widen(p[i]);
      return store.get();
    }
  }

  static void merge(std::vector<RowState<A>>& states, int64_t row) {
    for (size_t g = 1; g < states.size(); ++g) {
      const Rows<A>& from = states[g].rows;
      Rows<A>& to = states[0].rows;
      for (int64_t i = 0; i < from.count[row]; ++i) {
        to.add(row, from.rank[row * from.stride + i], from.index[row * from.stride + i]);
      }
    }
  }

  // Sorts row `row` of `rows` and writes it to output row `out`. Scaled ranks say nothing about the
  // values, which are then scored again.
  void write_row(Rows<A>& rows, int64_t row, int64_t out) const {
    rows.shrink(rows, row);
    static thread_local std::vector<Key> keys;
    keys.resize(k);
    for (int64_t i = 0; i < k; ++i) {
      keys[i] = make_key<A>(rows.rank[row * rows.stride + i], rows.index[row * rows.stride + i]);
    }
    std::sort(keys.begin(), keys.end(), std::greater<Key>());
    int32_t* index = indices + out * k;
    for (int64_t i = 0; i < k; ++i) index[i] = key_index<A>(keys[i]);
    static thread_local std::vector<A> store;
    const A* own = scale ? places(out, store) : nullptr;
    A score[kBatch];
    for (int64_t i0 = 0; i0 < k; i0 += kBatch) {
      const int64_t count = std::min(kBatch, k - i0);
      if (scale) {
        scores(own, index + i0, count, score);
        for (int64_t i = 0; bias && i < count; ++i) score[i] += bias[index[i0 + i]];
      } else {
        for (int64_t i = 0; i < count; ++i) score[i] = key_rank<A>(keys[i0 + i]);
      }
      for (int64_t i = 0; i < count; ++i) {
        const A v = relu && score[i] <= A(0) ? A(0) : score[i];  // NaN stays
        values[out * k + i0 + i] = narrow<In>(v);
      }
    }
  }

  Buffer<A> bias_store_, scale_store_;  // made before bias and scale

 public:
  const A *const bias, *const scale;  // [F] or null
  const Packing<In> pack;
  const int64_t threads;
  const int64_t capacity;  // of a row's candidates; it never holds more than F
};

}  // namespace topk
}  // namespace fastsae
