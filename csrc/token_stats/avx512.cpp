#include <immintrin.h>

#include "core/cpu/half.h"
#include "token_stats/linear.h"

namespace saltire::token_stats {
namespace {

struct Avx512 {
  using reg = __m512;
  static constexpr int64_t width = 16;
  static constexpr int rows = 12;  // 24 sums, two of B, one broadcast: 27 of 32 registers

  static inline reg load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static inline reg set1(float f) { return _mm512_set1_ps(f); }
  static inline reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static inline reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static inline reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static inline reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
  static inline reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static inline reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
  static inline reg abs(reg a) { return _mm512_abs_ps(a); }
  static inline reg with_sign_of(reg a, reg b) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(sign, _mm512_castps_si512(b), _mm512_castps_si512(a), 0xCA));
  }
  static inline reg round(reg a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline reg times_power_of_two(reg a, reg n) { return _mm512_scalef_ps(a, n); }
  static inline reg where_greater(reg a, reg b, reg yes, reg no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
  }
  static inline reg where_equal(reg a, reg b, reg yes, reg no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), no, yes);
  }
  static inline uint32_t equal_lanes(reg a, reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static inline float largest(reg a) { return _mm512_reduce_max_ps(a); }
  static inline float sum(reg a) { return _mm512_reduce_add_ps(a); }

  static inline reg widen(__m256i half, Dtype dtype) {
    if (dtype == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  // bf16: adds half of the last kept bit, less one if that bit is 0, so that ties go to even.
  static inline __m256i narrow(reg v, Dtype dtype) {
    if (dtype == Dtype::f16) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, bits), 16));
  }

  static inline reg load(const void* x, int64_t k, Dtype dtype) {
    if (dtype == Dtype::f32) return load(static_cast<const float*>(x) + k);
    return widen(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + k)),
        dtype);
  }
  static inline void store(void* x, int64_t k, reg v, Dtype dtype) {
    if (dtype == Dtype::f32) return store(static_cast<float*>(x) + k, v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(x) + k),
                        narrow(v, dtype));
  }
  static inline reg load_part(const void* x, int64_t k, int64_t n, Dtype dtype, float fill) {
    const auto lanes = static_cast<__mmask16>((1u << n) - 1);
    if (dtype == Dtype::f32) {
      return _mm512_mask_loadu_ps(set1(fill), lanes, static_cast<const float*>(x) + k);
    }
    const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + k);
    return _mm512_mask_mov_ps(set1(fill), lanes, widen(half, dtype));
  }
  static inline void store_part(void* x, int64_t k, int64_t n, reg v, Dtype dtype) {
    const auto lanes = static_cast<__mmask16>((1u << n) - 1);
    if (dtype == Dtype::f32) {
      return _mm512_mask_storeu_ps(static_cast<float*>(x) + k, lanes, v);
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(x) + k, lanes, narrow(v, dtype));
  }
};

}  // namespace

Kernels avx512_kernels() {
  return make_kernels<Avx512>();
}

}  // namespace saltire::token_stats
