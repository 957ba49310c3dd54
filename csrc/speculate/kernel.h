// One source for ref.cpp, avx2.cpp and avx512.cpp; each compiles it with its own flags.
#pragma once
#include "core/cpu/vector16.h"
#include "speculate/op.h"

namespace saltire::speculate {
namespace {

inline float largest(const float* x, int64_t count) {
  V16 most = set1(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) most = max(load(x + i), most);
  float value = reduce_max(most);
  for (; i < count; ++i) value = x[i] > value ? x[i] : value;
  return value;
}

inline float exponentials(const float* x, int64_t count, float most, float factor, float* out) {
  V16 sum = set1(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const V16 e = exp(mul(sub(load(x + i), set1(most)), set1(factor)));
    store(out + i, e);
    sum = add(sum, e);
  }
  float total = reduce_add(sum);
  for (; i < count; ++i) {
    out[i] = exp((x[i] - most) * factor);
    total += out[i];
  }
  return total;
}

}  // namespace
}  // namespace saltire::speculate
