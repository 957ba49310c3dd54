// One source for ref.cpp, avx2.cpp and avx512.cpp; each compiles it with its own flags.
#pragma once
#include <cstring>

#include "core/cpu/vector16.h"
#include "skip_plan/op.h"

namespace saltire::skip_plan {
namespace {

inline V16 load_up_to(const float* p, int64_t rest) {
  return rest >= kLanes ? load(p) : load_part(p, static_cast<int>(rest));
}

inline float cosine(float dot, float squares, float truth_squares) {
  const float product = squares * truth_squares;
  return product > 0.0f ? dot / __builtin_sqrtf(product) : 0.0f;
}

inline Choice select_row(const float* keep, const float* skip, const float* truth, int64_t D,
                         float* chosen) {
  V16 keep_dot = set1(0.0f), keep_squares = set1(0.0f), skip_dot = set1(0.0f),
      skip_squares = set1(0.0f), truth_squares = set1(0.0f);
  for (int64_t i = 0; i < D; i += kLanes) {
    const V16 k = load_up_to(keep + i, D - i), s = load_up_to(skip + i, D - i),
              t = load_up_to(truth + i, D - i);
    keep_dot = fma(k, t, keep_dot);
    keep_squares = fma(k, k, keep_squares);
    skip_dot = fma(s, t, skip_dot);
    skip_squares = fma(s, s, skip_squares);
    truth_squares = fma(t, t, truth_squares);
  }
  const float all = reduce_add(truth_squares);
  const float with = cosine(reduce_add(keep_dot), reduce_add(keep_squares), all);
  const float without = cosine(reduce_add(skip_dot), reduce_add(skip_squares), all);
  const bool kept = with > without;
  std::memcpy(chosen, kept ? keep : skip, sizeof(float) * static_cast<size_t>(D));
  return {kept ? with : without, kept};
}

}  // namespace
}  // namespace saltire::skip_plan
