// The two recurrences of op.h over a vector type; every instruction set does the same f64
// operations in the same order, so all tables are bit-equal.
//
// V has: reg, width (a power of two, at most 8), bits = log2 width, load, store, set1, add, mul,
// max, and drop<j>(v): lane i takes lane i - 2^j, or -infinity where bit j of i is 0.
#pragma once
#include <limits>

#include "sequence/op.h"

namespace saltire::sequence {

constexpr int kLowBits = 6;  // α of the low bits: n · 64 doubles, 12 KB at n = 24: in L1
constexpr int64_t kLow = int64_t{1} << kLowBits;
constexpr double kNever = -std::numeric_limits<double>::infinity();

// Sums of `term` [n, n] over the members of each subset of the lowest bits: low [n, 64].
inline void fill_low(const double* term, int64_t n, double* low) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t s = 0; s < kLow; ++s) {
      double sum = 0;
      for (int64_t i = 0; i < kLowBits && i < n; ++i) {
        if (s >> i & 1) sum += term[i * n + j];
      }
      low[j * kLow + s] = sum;
    }
  }
}

// The same for the members above the lowest bits, one subset at a time: high [n].
inline void fill_high(const double* term, const double* start, int64_t n, int64_t subset,
                      double* high) {
  for (int64_t j = 0; j < n; ++j) high[j] = start == nullptr ? 0 : start[j];
  for (int64_t i = kLowBits; i < n; ++i) {
    if ((subset >> i & 1) == 0) continue;
    for (int64_t j = 0; j < n; ++j) high[j] += term[i * n + j];
  }
}

template <typename V, bool kDistance>
struct OrderingTable {
  using reg = typename V::reg;

  const Ordering& problem;
  double* best;
  double alpha_low[kMaxOrdering * kLow], gamma_low[kMaxOrdering * kLow], length_low[kLow];
  double alpha_high[kMaxOrdering], gamma_high[kMaxOrdering], length_high = 0;

  // added_j of the subsets high + low..low+w-1 (j inside or not: the diagonals are 0).
  inline reg added(int64_t j, int64_t low, reg length) const {
    const reg alpha = V::add(V::set1(alpha_high[j]), V::load(alpha_low + j * kLow + low));
    if constexpr (!kDistance) return alpha;
    const reg gamma = V::add(V::set1(gamma_high[j]), V::load(gamma_low + j * kLow + low));
    return V::add(alpha, V::mul(length, gamma));
  }

  template <int j>
  inline void inside(reg& value, int64_t low, reg length) const {
    if constexpr (j < V::bits) {
      value = V::max(value, V::add(V::template drop<j>(value), added(j, low, length)));
    }
  }

  void fill() {
    const int64_t n = problem.n;
    const int64_t count = int64_t{1} << n;
    fill_low(problem.alpha, n, alpha_low);
    if constexpr (kDistance) fill_low(problem.gamma, n, gamma_low);
    for (int64_t s = 0; s < kLow; ++s) {
      length_low[s] = 0;
      for (int64_t i = 0; i < kLowBits && i < n; ++i) {
        if (s >> i & 1) length_low[s] += problem.length[i];
      }
    }
    for (int64_t base = 0; base < count; base += kLow) {
      fill_high(problem.alpha, nullptr, n, base, alpha_high);
      if constexpr (kDistance) {
        fill_high(problem.gamma, problem.gamma0, n, base, gamma_high);
        length_high = 0;
        for (int64_t i = kLowBits; i < n; ++i) {
          if (base >> i & 1) length_high += problem.length[i];
        }
      }
      for (int64_t low = 0; low < kLow && base + low < count; low += V::width) {
        const int64_t subset = base + low;
        const reg length = V::add(V::set1(length_high), V::load(length_low + low));
        reg value = subset == 0 ? V::first(0.0, kNever) : V::set1(kNever);
        for (int64_t left = subset >> V::bits << V::bits; left != 0; left &= left - 1) {
          const int64_t j = __builtin_ctzll(static_cast<unsigned long long>(left));
          const reg before = V::load(best + subset - (int64_t{1} << j));
          value = V::max(value, V::add(before, added(j, low, length)));
        }
        // A lane's best predecessor may be a lane that itself waits for one: as many rounds as the
        // vector has bits settle all.
        for (int round = 0; round < V::bits; ++round) {
          inside<0>(value, low, length);
          inside<1>(value, low, length);
          inside<2>(value, low, length);
        }
        V::store(best + subset, value);
      }
    }
  }
};

template <typename V>
void fill_ordering(const Ordering& problem, double* best) {
  if (problem.distance) {
    OrderingTable<V, true>{problem, best}.fill();
  } else {
    OrderingTable<V, false>{problem, best}.fill();
  }
}

// Columns of `row` in registers: `regs` vectors from column `from` on.
template <typename V, int regs>
void path_columns(const double* w, int64_t n, int64_t subset, int64_t from, double* best) {
  using reg = typename V::reg;
  const int64_t stride = padded(n);
  reg value[regs];
  for (int r = 0; r < regs; ++r) value[r] = V::set1(kNever);
  for (int64_t left = subset; left != 0; left &= left - 1) {
    const int64_t i = __builtin_ctzll(static_cast<unsigned long long>(left));
    const reg before = V::set1(best[(subset - (int64_t{1} << i)) * stride + i]);
    for (int r = 0; r < regs; ++r) {
      const reg step = V::load(w + i * stride + from + r * V::width);
      value[r] = V::max(value[r], V::add(before, step));
    }
  }
  for (int r = 0; r < regs; ++r) V::store(best + subset * stride + from + r * V::width, value[r]);
}

template <typename V>
void fill_path(const double* w, int64_t n, double* best) {
  constexpr int kRegs = 8 / V::width > 1 ? 8 / V::width : 1;  // one padded row of 8
  const int64_t stride = padded(n);
  for (int64_t j = 0; j < stride; ++j) best[j] = 0;
  for (int64_t subset = 1; subset < int64_t{1} << n; ++subset) {
    if (stride == 8) {
      path_columns<V, kRegs>(w, n, subset, 0, best);
    } else if (stride == 16) {
      path_columns<V, 2 * kRegs>(w, n, subset, 0, best);
    } else {
      path_columns<V, 3 * kRegs>(w, n, subset, 0, best);
    }
  }
}

}  // namespace saltire::sequence
