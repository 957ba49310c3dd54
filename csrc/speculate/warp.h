// What temperature, top-k, top-p and min-p leave of a distribution.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "speculate/op.h"

namespace saltire::speculate {

// e: e^(logit - largest) over T, so that the largest is 1. Zeroes what top-k drops; ties with the
// k-th stay, as in transformers.
inline void keep_top_k(float* e, int64_t V, int64_t k) {
  if (k <= 0 || k >= V) return;
  std::vector<float> sorted(e, e + V);
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
  const float least = sorted[static_cast<size_t>(k - 1)];
  for (int64_t i = 0; i < V; ++i) e[i] = e[i] < least ? 0.0f : e[i];
}

// Keeps the fewest largest whose mass is top_p or more, of equals those with the lower index. Only
// candidates above a falling threshold are sorted: mostly some tens of them.
inline void keep_top_p(float* e, int64_t V, float top_p) {
  if (top_p >= 1.0f) return;
  double total = 0.0;
  for (int64_t i = 0; i < V; ++i) total += static_cast<double>(e[i]);
  const double wanted = static_cast<double>(top_p) * total;
  std::vector<int64_t> candidates;
  for (float least = 1.0f / 16;; least /= 16) {
    const bool all = least < 1e-30f;
    candidates.clear();
    double mass = 0.0;
    for (int64_t i = 0; i < V; ++i) {
      if (e[i] > 0.0f && (all || e[i] >= least)) {
        candidates.push_back(i);
        mass += static_cast<double>(e[i]);
      }
    }
    if (all || mass >= wanted) break;
  }
  std::sort(candidates.begin(), candidates.end(),
            [&](int64_t a, int64_t b) { return e[a] != e[b] ? e[a] > e[b] : a < b; });
  std::vector<float> kept;
  double mass = 0.0;
  for (const int64_t i : candidates) {
    kept.push_back(e[i]);
    mass += static_cast<double>(e[i]);
    if (mass >= wanted) break;
  }
  std::fill(e, e + V, 0.0f);
  for (size_t i = 0; i < kept.size(); ++i) e[candidates[i]] = kept[i];
}

// Writes p; false if the row holds no finite largest logit or a NaN.
inline bool warp_row(const Kernels& kernels, const Warp& warp, const float* logits, int64_t V,
                     float* p) {
  const float most = kernels.largest(logits, V);
  if (!std::isfinite(most)) return false;
  const float sum = kernels.exponentials(logits, V, most, 1.0f / warp.temperature, p);
  if (!std::isfinite(sum)) return false;
  keep_top_k(p, V, warp.top_k);
  keep_top_p(p, V, warp.top_p);
  double total = 0.0;
  for (int64_t i = 0; i < V; ++i) {
    p[i] = p[i] < warp.min_p ? 0.0f : p[i];  // the largest is 1
    total += static_cast<double>(p[i]);
  }
  const double factor = 1.0 / total;
  for (int64_t i = 0; i < V; ++i) p[i] = static_cast<float>(static_cast<double>(p[i]) * factor);
  return true;
}

}  // namespace saltire::speculate
