#include <immintrin.h>

#include "gptq/kernel.h"

namespace saltire::gptq {
namespace {

struct Avx2 {
  using reg = __m256;
  static constexpr int width = 8;

  static inline reg load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static inline reg set1(float v) { return _mm256_set1_ps(v); }
  static inline reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static inline reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static inline reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static inline reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
  static inline reg minus_product(reg c, reg a, reg b) { return _mm256_fnmadd_ps(a, b, c); }
  static inline reg round_even(reg v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline reg clamp(reg v, reg low, reg high) {
    return _mm256_min_ps(_mm256_max_ps(v, low), high);
  }
};

}  // namespace

Kernel avx2_kernel() {
  return kernel<Avx2>();
}

}  // namespace saltire::gptq
