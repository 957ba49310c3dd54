#include <immintrin.h>

#include "gptq/kernel.h"

namespace saltire::gptq {
namespace {

struct Avx512 {
  using reg = __m512;
  static constexpr int width = 16;

  static inline reg load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static inline reg set1(float v) { return _mm512_set1_ps(v); }
  static inline reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static inline reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static inline reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static inline reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
  static inline reg minus_product(reg c, reg a, reg b) { return _mm512_fnmadd_ps(a, b, c); }
  static inline reg round_even(reg v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline reg clamp(reg v, reg low, reg high) {
    return _mm512_min_ps(_mm512_max_ps(v, low), high);
  }
};

}  // namespace

Kernel avx512_kernel() {
  return kernel<Avx512>();
}

}  // namespace saltire::gptq
