// steer over tokens: gather the list's activations, then write the edits. Once per CPU level.

namespace fastsae {
namespace FASTSAE_NS {

template <class T>
Vec<acc_t<T>> steer_load(const T* p, int64_t left) {
  using V = Vec<acc_t<T>>;
  return left >= V::kLanes ? V::load(p) : V::load_n(p, static_cast<int>(left));
}

// u = the normalised x in the accumulation type; returns 1/s.
template <class T>
acc_t<T> steer_input(const T* x, int64_t D, int norm, acc_t<T> eps, acc_t<T>* u) {
  using A = acc_t<T>;
  using V = Vec<A>;
  V sum = V::zero(), squares = V::zero();
  for (int64_t d = 0; d < D; d += V::kLanes) sum = sum + steer_load(x + d, D - d);
  const A mean = norm == kNormLayer ? sum.sum() / static_cast<A>(D) : A(0);
  const V shift = V::set1(mean);
  int64_t d = 0;
  for (; d + V::kLanes <= D; d += V::kLanes) {
    const V v = V::load(x + d) - shift;
    squares = V::fma(v, v, squares);
    v.store(u + d);
  }
  A total = squares.sum();
  for (; d < D; ++d) {
    u[d] = widen(x[d]) - mean;
    total += u[d] * u[d];
  }
  const A n = static_cast<A>(norm == kNormLayer ? (D > 1 ? D - 1 : 1) : D);
  const A back = std::sqrt(total / n), divisor = back + (norm == kNormLayer ? eps : A(0));
  for (d = 0; d < D; ++d) u[d] /= divisor;
  return back;
}

// <row, u>; u is x itself or its normalised form.
template <class T, class U>
acc_t<T> steer_dot(const T* row, const U* u, int64_t D) {
  using V = Vec<acc_t<T>>;
  V even = V::zero(), odd = V::zero();
  int64_t d = 0;
  for (; d + 2 * V::kLanes <= D; d += 2 * V::kLanes) {
    even = V::fma(V::load(row + d), V::load(u + d), even);
    odd = V::fma(V::load(row + d + V::kLanes), V::load(u + d + V::kLanes), odd);
  }
  for (; d < D; d += V::kLanes) {
    even = V::fma(steer_load(row + d, D - d), steer_load(u + d, D - d), even);
  }
  return (even + odd).sum();
}

// out = x + delta row; the next lines are independent of each other, so two run at a time.
template <class T>
void steer_write_one(const T* x, acc_t<T> delta, const T* row, int64_t D, T* out) {
  using V = Vec<acc_t<T>>;
  const V weight = V::set1(delta);
  int64_t d = 0;
  for (; d + 2 * V::kLanes <= D; d += 2 * V::kLanes) {
    const V a = V::fma(weight, V::load(row + d), V::load(x + d));
    const V b = V::fma(weight, V::load(row + d + V::kLanes), V::load(x + d + V::kLanes));
    a.store(out + d);
    b.store(out + d + V::kLanes);
  }
  for (; d < D; d += V::kLanes) {
    const int n = static_cast<int>(D - d < V::kLanes ? D - d : V::kLanes);
    V::fma(weight, V::load_n(row + d, n), V::load_n(x + d, n)).store_n(out + d, n);
  }
}

// out = x + sum_j delta_j rows[j], rounded once; entries whose delta is zero are not read.
template <class T>
void steer_write(const T* x, const acc_t<T>* delta, int64_t count, const T* rows, int64_t D,
                 T* out) {
  using V = Vec<acc_t<T>>;
  if (count == 1) return steer_write_one(x, delta[0], rows, D, out);
  for (int64_t d = 0; d < D; d += V::kLanes) {
    V sum = steer_load(x + d, D - d);
    for (int64_t o = 0; o < count; ++o) {
      if (delta[o] == acc_t<T>(0)) continue;
      sum = V::fma(V::set1(delta[o]), steer_load(rows + o * D + d, D - d), sum);
    }
    if (D - d >= V::kLanes) {
      sum.store(out + d);
    } else {
      sum.store_n(out + d, static_cast<int>(D - d));
    }
  }
}

// One token's edits: delta[o] for the `count` entries of its list. Returns whether any is not zero.
template <class T>
bool steer_deltas(const T* x, const T* enc, const acc_t<T>* param, const int32_t* code,
                  const bool* member, int norm, acc_t<T> eps, int64_t count, int64_t D, acc_t<T>* u,
                  acc_t<T>* f, acc_t<T>* delta) {
  using A = acc_t<T>;
  const A back = norm == kNormNone ? A(1) : steer_input(x, D, norm, eps, u);
  for (int64_t o = 0; o < count; ++o) {
    const int32_t* c = code + o * kSteerCodes;
    A p = 0;
    if (c[kSteerOp] != kSteerAdd) {
      const bool raw = norm == kNormNone || (c[kSteerFlags] & kSteerRaw);
      p = raw ? steer_dot(enc + o * D, x, D) : steer_dot(enc + o * D, u, D);
    }
    f[o] = steer_activation(p, param + o * kSteerParams, c[kSteerFlags], member && member[o]);
  }
  bool touched = false;
  for (int64_t o = 0; o < count; ++o) {
    const int32_t* c = code + o * kSteerCodes;
    const A* q = param + o * kSteerParams;
    const int32_t gate = c[kSteerGate];
    const bool open = gate < 0 || (gate < count && f[gate] > q[kSteerTau]);
    delta[o] = open ? steer_delta(c[kSteerOp], f[o], q[kSteerValue]) : A(0);
    touched |= delta[o] != A(0);
    if (!(c[kSteerFlags] & kSteerRaw)) delta[o] *= back;
  }
  return touched;
}

// Tokens [begin, end); `run` of them share a sequence's slot. scratch: D + 2 O.
template <class T>
void steer_rows(const T* x, const T* enc, const T* dec, const acc_t<T>* param, const int32_t* code,
                const int32_t* slots, const bool* mask, const bool* member, int norm, acc_t<T> eps,
                T* out, int64_t O, int64_t D, int64_t run, int64_t begin, int64_t end,
                acc_t<T>* scratch) {
  acc_t<T>*u = scratch, *f = scratch + D, *delta = f + O;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t slot = slots[m / run];
    bool touched = false;
    if (slot >= 0 && !(mask && !mask[m])) {
      const int32_t* c = code + slot * O * kSteerCodes;
      int64_t count = 0;  // entries before END
      while (count < O && c[count * kSteerCodes + kSteerOp] != kSteerEnd) ++count;
      touched = count &&
                steer_deltas(x + m * D, enc + slot * O * D, param + slot * O * kSteerParams, c,
                             member ? member + m * O : nullptr, norm, eps, count, D, u, f, delta);
      if (touched) steer_write(x + m * D, delta, count, dec + slot * O * D, D, out + m * D);
    }
    if (!touched && out != x) std::memcpy(out + m * D, x + m * D, D * sizeof(T));
  }
}

}  // namespace FASTSAE_NS
}  // namespace fastsae
