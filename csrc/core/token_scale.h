// How a token's scale follows from its largest magnitude; the same on every path.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#include "core/both.h"

namespace saltire {

// largest: the greatest of the tokens' bit patterns without their sign. Ordered as integers, they
// are ordered as magnitudes, with infinity and NaN above all numbers: one integer maximum finds the
// range and the damage at once.
//
// Writes the scale and returns its inverse; an inverse of 0 means that all codes are 0: for a token
// of zeros (or so small that the inverse would overflow) with scale 0, for a damaged one with NaN.
static SALTIRE_BOTH float choose_scale(uint32_t largest, float clip_over_q, float* scale) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  if (largest >= kInfinity) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    return 0.0f;
  }
  float max;
  std::memcpy(&max, &largest, sizeof(max));
  const float s = max * clip_over_q;
  if (s < std::numeric_limits<float>::min()) {
    *scale = 0.0f;
    return 0.0f;
  }
  *scale = s;
  return 1.0f / s;
}

}  // namespace saltire
