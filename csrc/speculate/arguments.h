// The settings of warp_logits, checked; the same for the CPU and a device.
#pragma once
#include "core/check.h"
#include "speculate/op.h"

namespace saltire::speculate {

inline Warp check_warp(const char* op, double temperature, int64_t top_k, double top_p,
                       double min_p) {
  SALTIRE_CHECK(temperature > 0.0, op, ": temperature = ", temperature,
                "; expected more than 0 (greedy needs no distribution).");
  SALTIRE_CHECK(top_k >= 0, op, ": top_k = ", top_k, "; expected 0 (all) or more.");
  SALTIRE_CHECK(top_p > 0.0 && top_p <= 1.0, op, ": top_p = ", top_p,
                "; expected a share in (0, 1].");
  SALTIRE_CHECK(min_p >= 0.0 && min_p <= 1.0, op, ": min_p = ", min_p,
                "; expected a share in [0, 1].");
  return {static_cast<float>(temperature), top_k, static_cast<float>(top_p),
          static_cast<float>(min_p)};
}

}  // namespace saltire::speculate
