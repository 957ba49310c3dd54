// The small kernels of a step, and the table of all; ref.cpp, avx2.cpp and avx512.cpp compile this
// one source, each with its own flags.
#pragma once
#include "core/cpu/vector16.h"
#include "decoder_layer/attention.h"
#include "decoder_layer/dense.h"
#include "decoder_layer/op.h"

namespace saltire::decoder_layer {
namespace {

inline void norm(const float* x, const float* gain, float eps, int64_t count, float* out) {
  V16 squares = set1(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const V16 v = load(x + i);
    squares = fma(v, v, squares);
  }
  if (i < count) {
    const V16 v = load_part(x + i, static_cast<int>(count - i));
    squares = fma(v, v, squares);
  }
  const float mean = reduce_add(squares) / static_cast<float>(count);
  const float factor = 1.0f / __builtin_sqrtf(mean + eps);
  for (i = 0; i < count; ++i) out[i] = x[i] * factor * gain[i];
}

inline V16 silu(V16 x) {
  return div(x, add(set1(1.0f), exp(sub(set1(0.0f), x))));
}

inline void swiglu(float* a, const float* b, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(a + i, mul(silu(load(a + i)), load(b + i)));
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    float lanes[kLanes];
    store(lanes, mul(silu(load_part(a + i, rest)), load_part(b + i, rest)));
    std::memcpy(a + i, lanes, sizeof(float) * static_cast<size_t>(rest));
  }
}

inline Best best(const float* logits, int64_t count) {
  // First the largest value, then its first place: two passes over what lies in L1.
  V16 most = set1(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) most = max(load(logits + i), most);
  float value = reduce_max(most);
  for (; i < count; ++i) value = logits[i] > value ? logits[i] : value;
  Best result{value, 0, 0.0f};
  for (i = 0; i < count; ++i) {
    if (logits[i] == value) {
      result.index = static_cast<int32_t>(i);
      break;
    }
  }
  if (value == -INFINITY) return result;
  V16 sum = set1(0.0f);
  for (i = 0; i + kLanes <= count; i += kLanes) {
    sum = add(sum, exp(sub(load(logits + i), set1(value))));
  }
  result.sum = reduce_add(sum);
  for (; i < count; ++i) result.sum += exp(logits[i] - value);
  return result;
}

inline void low_rank(const float* x, const float* w, int64_t k, int64_t r, float* out) {
  for (int64_t j = 0; j < r; ++j) out[j] = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < r; ++j) out[j] = __builtin_fmaf(x[i], w[i * r + j], out[j]);
  }
}

inline Kernels all_kernels() {
  return {norm, stage, dense, dense_panel, swiglu, append, rotate_head, attend, best, low_rank};
}

}  // namespace
}  // namespace saltire::decoder_layer
