// The rounding of op.h over a vector type V: reg, width, load, store, set1, add, sub, mul, div,
// minus_product (c - a·b, rounded once), round_even, clamp.
#pragma once
#include "gptq/op.h"

namespace saltire::gptq {

constexpr int kColumns = 4;  // 4 columns of 2 vectors: 8 sums, enough to hide the latency of one
constexpr int kVectors = 2;

template <typename V>
class Slab {
 public:
  static constexpr int kOutputs = kVectors * V::width;

  Slab(const Problem& problem, int64_t first, float* errors)
      : p_(problem), first_(first), count_(smaller(kOutputs, problem.N - first)), errors_(errors) {}

  void round() {
    for (int64_t j = 0; j < p_.K; j += kColumns) {
      if (j + kColumns <= p_.K) {
        columns<kColumns>(j);
      } else {
        for (int64_t k = j; k < p_.K; ++k) columns<1>(k);
      }
    }
  }

 private:
  using reg = typename V::reg;

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  // Rounds n columns from the j-th on.
  template <int n>
  void columns(int64_t j) {
    reg sum[n][kVectors];
    float column[kOutputs];
    for (int c = 0; c < n; ++c) {
      gather(p_.w, p_.K, p_.order[j + c], 0, column);
      for (int v = 0; v < kVectors; ++v) sum[c][v] = V::load(column + v * V::width);
    }
    const float* row = p_.lower + j * p_.K;
    for (int64_t i = 0; i < j; ++i) {
      reg error[kVectors];
      for (int v = 0; v < kVectors; ++v) error[v] = V::load(errors_ + i * kOutputs + v * V::width);
      for (int c = 0; c < n; ++c) {
        const reg factor = V::set1(row[c * p_.K + i]);
        for (int v = 0; v < kVectors; ++v) {
          sum[c][v] = V::minus_product(sum[c][v], factor, error[v]);
        }
      }
    }
    for (int c = 0; c < n; ++c) {
      reg error[kVectors];
      settle(j + c, sum[c], error);
      for (int later = c + 1; later < n; ++later) {
        const reg factor = V::set1(row[later * p_.K + j + c]);
        for (int v = 0; v < kVectors; ++v) {
          sum[later][v] = V::minus_product(sum[later][v], factor, error[v]);
        }
      }
    }
  }

  // Rounds the j-th column, keeps its codes and what they miss.
  void settle(int64_t j, const reg* value, reg* error) {
    const int64_t k = p_.order[j], group = k / (p_.K / p_.groups);
    if (group != group_) {
      gather(p_.scale, p_.groups, group, 1, scale_);
      gather(p_.zero, p_.groups, group, 0, zero_);
      group_ = group;
    }
    const reg diagonal = V::set1(p_.lower[j * p_.K + j]);
    float codes[kOutputs];
    for (int v = 0; v < kVectors; ++v) {
      const reg scale = V::load(scale_ + v * V::width), zero = V::load(zero_ + v * V::width);
      const reg level = V::add(V::div(value[v], scale), zero);
      const reg code = V::clamp(V::round_even(level), V::set1(0), V::set1(p_.top));
      const reg rounded = V::mul(V::sub(code, zero), scale);
      error[v] = V::div(V::sub(value[v], rounded), diagonal);
      V::store(errors_ + j * kOutputs + v * V::width, error[v]);
      V::store(codes + v * V::width, code);
    }
    for (int64_t n = 0; n < count_; ++n) {
      p_.codes[(first_ + n) * p_.K + k] = static_cast<uint8_t>(codes[n]);
    }
  }

  // Column `column` of the slab's rows of a matrix; `rest` beyond the last row.
  void gather(const float* matrix, int64_t stride, int64_t column, float rest, float* out) const {
    for (int64_t n = 0; n < kOutputs; ++n) {
      out[n] = n < count_ ? matrix[(first_ + n) * stride + column] : rest;
    }
  }

  const Problem& p_;
  const int64_t first_, count_;
  float* errors_;
  int64_t group_ = -1;
  float scale_[kOutputs], zero_[kOutputs];
};

template <typename V>
void round(const Problem& problem, int64_t begin, int64_t end, float* errors) {
  for (int64_t n = begin; n < end; n += Slab<V>::kOutputs) Slab<V>(problem, n, errors).round();
}

template <typename V>
constexpr Kernel kernel() {
  return {Slab<V>::kOutputs, &round<V>};
}

}  // namespace saltire::gptq
