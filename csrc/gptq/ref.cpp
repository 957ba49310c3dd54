#include <cmath>

#include "gptq/kernel.h"

namespace saltire::gptq {
namespace {

struct Plain {
  using reg = float;
  static constexpr int width = 1;

  static inline reg load(const float* p) { return *p; }
  static inline void store(float* p, reg v) { *p = v; }
  static inline reg set1(float v) { return v; }
  static inline reg add(reg a, reg b) { return a + b; }
  static inline reg sub(reg a, reg b) { return a - b; }
  static inline reg mul(reg a, reg b) { return a * b; }
  static inline reg div(reg a, reg b) { return a / b; }
  static inline reg minus_product(reg c, reg a, reg b) { return std::fma(-a, b, c); }
  static inline reg round_even(reg v) { return std::nearbyint(v); }
  // The order of AVX's comparisons: what is not a number becomes the low end.
  static inline reg clamp(reg v, reg low, reg high) {
    const reg raised = v > low ? v : low;
    return raised < high ? raised : high;
  }
};

}  // namespace

Kernel ref_kernel() {
  return kernel<Plain>();
}

}  // namespace saltire::gptq
