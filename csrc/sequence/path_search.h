// Local search for the path objective of op.h: exchanging two neighbouring segments (which contains
// or-opt) and reversing one (2-opt), from several starts, with kicks.
//
// A node of weight 0 to and from every other stands before the first and behind the last document,
// so that ends need no cases. An exchange changes three edges: O(1). A reversal turns the edges
// inside: O(1) with running sums of the order's edges, forward and backward.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "sequence/random.h"

namespace saltire::sequence {

using Order = std::vector<int64_t>;

class PathSearch {
 public:
  // w: [n, n].
  PathSearch(const double* w, int64_t n) : n_(n), m_(n + 1), w_(static_cast<size_t>(m_ * m_)) {
    double largest = 0;
    for (int64_t a = 0; a < n; ++a) {
      for (int64_t b = 0; b < n; ++b) {
        w_[static_cast<size_t>(a * m_ + b)] = w[a * n + b];
        largest = std::max(largest, std::fabs(w[a * n + b]));
      }
    }
    least_gain_ = 1e-12 * largest * static_cast<double>(n);
    // All exchanges cost n³/6 a sweep; past this size the shorter segment holds at most 3.
    longest_ = n <= 128 ? n : 3;
  }

  double value(const Order& order) const {
    double sum = 0;
    for (size_t k = 0; k + 1 < order.size(); ++k) sum += at(order[k], order[k + 1]);
    return sum;
  }

  // Best of `starts` local optima, each kicked `kicks` times. The starts are the best nearest-
  // neighbour walks, then random orders.
  Order best(int64_t starts, int64_t kicks, uint64_t seed) {
    Random random(seed);
    std::vector<Order> walks;
    for (int64_t first = 0; first < n_ && first < 128; ++first) walks.push_back(walk(first));
    std::stable_sort(walks.begin(), walks.end(),
                     [&](const Order& a, const Order& b) { return value(a) > value(b); });
    Order best;
    double best_value = 0;
    for (int64_t start = 0; start < starts; ++start) {
      Order order(static_cast<size_t>(n_));
      if (start < static_cast<int64_t>(walks.size()) && 2 * start <= starts) {
        order = walks[static_cast<size_t>(start)];
      } else {
        std::iota(order.begin(), order.end(), 0);
        random.shuffle(order);
      }
      improve(order);
      double here = value(order);
      for (int64_t kick = 0; kick < kicks && n_ > 3; ++kick) {
        Order other = order;
        // Exchange two neighbouring segments somewhere, whatever it costs.
        int64_t cut[3] = {random.below(n_ + 1), random.below(n_ + 1), random.below(n_ + 1)};
        std::sort(cut, cut + 3);
        std::rotate(other.begin() + cut[0], other.begin() + cut[1], other.begin() + cut[2]);
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

  void improve(Order& order) {
    nodes_.assign(1, n_);
    nodes_.insert(nodes_.end(), order.begin(), order.end());
    nodes_.push_back(n_);
    while (exchange() || reverse()) {
    }
    std::copy(nodes_.begin() + 1, nodes_.end() - 1, order.begin());
  }

 private:
  double at(int64_t a, int64_t b) const { return w_[static_cast<size_t>(a * m_ + b)]; }
  int64_t node(int64_t k) const { return nodes_[static_cast<size_t>(k)]; }

  Order walk(int64_t first) const {
    Order order{first};
    std::vector<char> used(static_cast<size_t>(n_));
    used[static_cast<size_t>(first)] = 1;
    while (static_cast<int64_t>(order.size()) < n_) {
      int64_t next = -1;
      for (int64_t b = 0; b < n_; ++b) {
        if (used[static_cast<size_t>(b)] == 0 &&
            (next < 0 || at(order.back(), b) > at(order.back(), next))) {
          next = b;
        }
      }
      used[static_cast<size_t>(next)] = 1;
      order.push_back(next);
    }
    return order;
  }

  // Segments i..j and j+1..k change places; true if anything was gained.
  bool exchange() {
    bool any = false;
    for (int64_t i = 1; i < n_; ++i) {
      for (int64_t j = i; j < n_; ++j) {
        const int64_t last = j - i < longest_ ? n_ : std::min(n_, j + longest_);
        for (int64_t k = j + 1; k <= last; ++k) {
          const int64_t before = node(i - 1), left = node(i), end = node(j), right = node(j + 1),
                        tail = node(k), behind = node(k + 1);
          const double gain = at(before, right) + at(tail, left) + at(end, behind) -
                              at(before, left) - at(end, right) - at(tail, behind);
          if (gain > least_gain_) {
            const auto begin = nodes_.begin();
            std::rotate(begin + i, begin + j + 1, begin + k + 1);
            any = true;
          }
        }
      }
    }
    return any;
  }

  // Reverses i..j; true if anything was gained.
  bool reverse() {
    bool any = false;
    for (int64_t i = 1; i < n_; ++i) {
      double inside = 0;  // what turning the edges between i and j gains
      for (int64_t j = i + 1; j <= n_; ++j) {
        inside += at(node(j), node(j - 1)) - at(node(j - 1), node(j));
        const double gain = inside + at(node(i - 1), node(j)) + at(node(i), node(j + 1)) -
                            at(node(i - 1), node(i)) - at(node(j), node(j + 1));
        if (gain > least_gain_) {
          std::reverse(nodes_.begin() + i, nodes_.begin() + j + 1);
          inside = -inside;
          any = true;
        }
      }
    }
    return any;
  }

  int64_t n_, m_;
  std::vector<double> w_;
  double least_gain_ = 0;
  int64_t longest_ = 0;
  Order nodes_;
};

}  // namespace saltire::sequence
