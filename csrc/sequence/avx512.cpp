#include <immintrin.h>

#include "sequence/exact.h"

namespace saltire::sequence {
namespace {

struct Avx512 {
  using reg = __m512d;
  static constexpr int width = 8;
  static constexpr int bits = 3;

  static inline reg load(const double* p) { return _mm512_loadu_pd(p); }
  static inline void store(double* p, reg v) { _mm512_storeu_pd(p, v); }
  static inline reg set1(double v) { return _mm512_set1_pd(v); }
  static inline reg first(double v, double others) {
    return _mm512_mask_mov_pd(_mm512_set1_pd(others), 1, _mm512_set1_pd(v));
  }
  static inline reg add(reg a, reg b) { return _mm512_add_pd(a, b); }
  static inline reg mul(reg a, reg b) { return _mm512_mul_pd(a, b); }
  static inline reg max(reg a, reg b) { return _mm512_max_pd(a, b); }

  template <int j>
  static inline reg drop(reg v) {
    const reg never = _mm512_set1_pd(kNever);
    if constexpr (j == 0) return _mm512_mask_movedup_pd(never, 0xAA, v);
    if constexpr (j == 1) return _mm512_mask_permutex_pd(never, 0xCC, v, 0x44);
    return _mm512_mask_shuffle_f64x2(never, 0xF0, v, v, 0x44);
  }
};

}  // namespace

Kernels avx512_kernels() {
  return {&fill_ordering<Avx512>, &fill_path<Avx512>};
}

}  // namespace saltire::sequence
