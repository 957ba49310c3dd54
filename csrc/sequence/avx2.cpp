#include <immintrin.h>

#include "sequence/exact.h"

namespace saltire::sequence {
namespace {

struct Avx2 {
  using reg = __m256d;
  static constexpr int width = 4;
  static constexpr int bits = 2;

  static inline reg load(const double* p) { return _mm256_loadu_pd(p); }
  static inline void store(double* p, reg v) { _mm256_storeu_pd(p, v); }
  static inline reg set1(double v) { return _mm256_set1_pd(v); }
  static inline reg first(double v, double others) {
    return _mm256_setr_pd(v, others, others, others);
  }
  static inline reg add(reg a, reg b) { return _mm256_add_pd(a, b); }
  static inline reg mul(reg a, reg b) { return _mm256_mul_pd(a, b); }
  static inline reg max(reg a, reg b) { return _mm256_max_pd(a, b); }

  template <int j>
  static inline reg drop(reg v) {
    const reg never = _mm256_set1_pd(kNever);
    if constexpr (j == 0) return _mm256_blend_pd(never, _mm256_movedup_pd(v), 0b1010);
    return _mm256_blend_pd(never, _mm256_permute2f128_pd(v, v, 0x00), 0b1100);
  }
};

}  // namespace

Kernels avx2_kernels() {
  return {&fill_ordering<Avx2>, &fill_path<Avx2>};
}

}  // namespace saltire::sequence
