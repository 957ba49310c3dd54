// Local search for the ordering objective of op.h: insertion, from several starts, with kicks.
//
// Taking x past its neighbour y changes four kinds of pairs, each by a known number of tokens, so
// with in[y] = Σ_{a before y} W[a][y] and out[y] = Σ_{b behind y} W[y][b] at hand one step costs
// O(1) and all n places of one document O(n). x to the right past y:
//
//   W[y][x] - W[x][y] + s·len_x·(out[y] - (in[y] - W[x][y])) + s·len_y·(in_x - (out_x - W[x][y]))
//
// in_x and out_x are x's own sums where it stands; to the left it is the same with signs turned.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "sequence/random.h"

namespace saltire::sequence {

using Order = std::vector<int64_t>;

class OrderingSearch {
 public:
  // w: [n, n], diagonal 0. s: slope / tokens of all.
  OrderingSearch(const double* w, const double* length, double s, int64_t n)
      : w_(w), length_(length), s_(s), n_(n), in_(size(n)), out_(size(n)) {
    double largest = 0;
    for (int64_t i = 0; i < n * n; ++i) largest = std::max(largest, std::fabs(w[i]));
    // Below this a gain is rounding, and taking it could go round in circles.
    least_gain_ = 1e-12 * largest * static_cast<double>(n);
  }

  double value(const Order& order) const {
    double sum = 0, start_b = 0;
    for (size_t b = 0; b < order.size(); ++b) {
      double start_a = 0;
      for (size_t a = 0; a < b; ++a) {
        start_a += length_[order[a]];
        sum += at(order[a], order[b]) * (1 + s_ * (start_b - start_a));
      }
      start_b += length_[order[b]];
    }
    return sum;
  }

  // Inserts documents where they gain most until none gains.
  void improve(Order& order) {
    for (bool moved = true; moved;) {
      moved = false;
      sum_up(order);
      for (int64_t x = 0; x < n_; ++x) moved |= move_best(order, x);
    }
  }

  // Best of `starts` local optima, each kicked `kicks` times; the first start is greedy.
  Order best(int64_t starts, int64_t kicks, uint64_t seed) {
    Random random(seed);
    Order best;
    double best_value = 0;
    for (int64_t start = 0; start < starts; ++start) {
      Order order = start == 0 ? greedy() : Order(size(n_));
      if (start > 0) {
        std::iota(order.begin(), order.end(), 0);
        random.shuffle(order);
      }
      improve(order);
      double here = value(order);
      for (int64_t kick = 0; kick < kicks && n_ > 3; ++kick) {
        Order other = order;
        const int64_t moves = 2 + random.below(1 + n_ / 8);
        for (int64_t move = 0; move < moves; ++move)
          shift(other, random.below(n_), random.below(n_));
        improve(other);
        const double there = value(other);
        if (there >= here) {
          order.swap(other);
          here = there;
        }
      }
      if (best.empty() || here > best_value) {
        best = order;
        best_value = here;
      }
    }
    return best;
  }

 private:
  static size_t size(int64_t n) { return static_cast<size_t>(n); }
  double at(int64_t a, int64_t b) const { return w_[a * n_ + b]; }

  // First the document that the others follow most: largest row sum less column sum.
  Order greedy() const {
    std::vector<double> lead(size(n_));
    for (int64_t a = 0; a < n_; ++a) {
      for (int64_t b = 0; b < n_; ++b) lead[size(a)] += at(a, b) - at(b, a);
    }
    Order order(size(n_));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return lead[size(a)] > lead[size(b)]; });
    return order;
  }

  static void shift(Order& order, int64_t from, int64_t to) {
    const auto begin = order.begin();
    if (from < to) {
      std::rotate(begin + from, begin + from + 1, begin + to + 1);
    } else {
      std::rotate(begin + to, begin + from, begin + from + 1);
    }
  }

  void sum_up(const Order& order) {
    std::fill(in_.begin(), in_.end(), 0.0);
    std::fill(out_.begin(), out_.end(), 0.0);
    for (size_t b = 0; b < order.size(); ++b) {
      for (size_t a = 0; a < b; ++a) {
        const double weight = at(order[a], order[b]);
        in_[size(order[b])] += weight;
        out_[size(order[a])] += weight;
      }
    }
  }

  bool move_best(Order& order, int64_t x) {
    const int64_t from = std::find(order.begin(), order.end(), x) - order.begin();
    double best_gain = least_gain_;
    int64_t best_to = from;
    double gain = 0, in_x = in_[size(x)], out_x = out_[size(x)];
    for (int64_t to = from + 1; to < n_; ++to) {
      const int64_t y = order[size(to)];
      const double xy = at(x, y), yx = at(y, x);
      out_x -= xy;
      gain +=
          yx - xy +
          s_ * (length_[x] * (out_[size(y)] - (in_[size(y)] - xy)) + length_[y] * (in_x - out_x));
      in_x += yx;
      if (gain > best_gain) {
        best_gain = gain;
        best_to = to;
      }
    }
    gain = 0, in_x = in_[size(x)], out_x = out_[size(x)];
    for (int64_t to = from - 1; to >= 0; --to) {
      const int64_t y = order[size(to)];
      const double xy = at(x, y), yx = at(y, x);
      in_x -= yx;
      gain +=
          xy - yx +
          s_ * (length_[x] * (in_[size(y)] - (out_[size(y)] - yx)) + length_[y] * (out_x - in_x));
      out_x += xy;
      if (gain > best_gain) {
        best_gain = gain;
        best_to = to;
      }
    }
    if (best_to == from) return false;
    const int64_t step = best_to > from ? 1 : -1;
    for (int64_t k = from + step; k != best_to + step; k += step) {
      const int64_t y = order[size(k)];
      const double xy = at(x, y), yx = at(y, x);
      in_[size(y)] -= step * xy;
      out_[size(y)] += step * yx;
      in_[size(x)] += step * yx;
      out_[size(x)] -= step * xy;
    }
    shift(order, from, best_to);
    return true;
  }

  const double* w_;
  const double* length_;
  double s_;
  int64_t n_;
  double least_gain_ = 0;
  std::vector<double> in_, out_;
};

}  // namespace saltire::sequence
