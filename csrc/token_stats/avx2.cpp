#include <immintrin.h>

#include "core/cpu/half.h"
#include "token_stats/linear.h"

namespace saltire::token_stats {
namespace {

struct Avx2 {
  using reg = __m256;
  static constexpr int64_t width = 8;
  static constexpr int rows = 6;  // 12 sums, two of B, one broadcast: 15 of 16 registers

  static inline reg load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static inline reg set1(float f) { return _mm256_set1_ps(f); }
  static inline reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static inline reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static inline reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static inline reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
  static inline reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static inline reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
  static inline reg abs(reg a) { return _mm256_andnot_ps(set1(-0.0f), a); }
  static inline reg with_sign_of(reg a, reg b) {
    return _mm256_or_ps(abs(a), _mm256_and_ps(set1(-0.0f), b));
  }
  static inline reg round(reg a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^n, n in [-126, 127], is the number with exponent n + 127.
  static inline reg times_power_of_two(reg a, reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static inline reg where_greater(reg a, reg b, reg yes, reg no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static inline reg where_equal(reg a, reg b, reg yes, reg no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
  }
  static inline uint32_t equal_lanes(reg a, reg b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
  }
  static inline float largest(reg a) {
    alignas(32) float lanes[8];
    store(lanes, a);
    float most = lanes[0];
    for (float lane : lanes) most = lane > most ? lane : most;
    return most;
  }
  static inline float sum(reg a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static inline reg load(const void* x, int64_t k, Dtype dtype) {
    if (dtype == Dtype::f32) return load(static_cast<const float*>(x) + k);
    const __m128i half =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + k));
    if (dtype == Dtype::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static inline void store(void* x, int64_t k, reg v, Dtype dtype) {
    if (dtype == Dtype::f32) return store(static_cast<float*>(x) + k, v);
    store_part(x, k, width, v, dtype);
  }
  static inline reg load_part(const void* x, int64_t k, int64_t n, Dtype dtype, float fill) {
    alignas(32) float lanes[8];
    for (int64_t i = 0; i < width; ++i) {
      lanes[i] = i < n ? Linear<Avx2>::load_one(x, k + i, dtype) : fill;
    }
    return load(lanes);
  }
  static inline void store_part(void* x, int64_t k, int64_t n, reg v, Dtype dtype) {
    alignas(32) float lanes[8];
    store(lanes, v);
    for (int64_t i = 0; i < n; ++i) {
      if (dtype == Dtype::f32) {
        static_cast<float*>(x)[k + i] = lanes[i];
      } else {
        static_cast<uint16_t*>(x)[k + i] =
            dtype == Dtype::f16 ? f32_to_f16(lanes[i]) : f32_to_bf16(lanes[i]);
      }
    }
  }
};

}  // namespace

Kernels avx2_kernels() {
  return make_kernels<Avx2>();
}

}  // namespace saltire::token_stats
