#include <immintrin.h>

#include "core/cpu/half.h"
#include "transform_quantize/kernel.h"

namespace saltire::transform_quantize {
namespace {

struct Avx512 {
  using reg = __m512;
  static constexpr int64_t width = 16;

  static inline reg load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static inline reg set1(float f) { return _mm512_set1_ps(f); }
  static inline reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static inline reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static inline reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static inline reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }

  static inline reg load(const void* x, int64_t k, Dtype dtype) {
    if (dtype == Dtype::f32) return load(static_cast<const float*>(x) + k);
    const __m256i half =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + k));
    if (dtype == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  static inline float load_one(const void* x, int64_t k, Dtype dtype) {
    if (dtype == Dtype::f32) return static_cast<const float*>(x)[k];
    const uint16_t half = static_cast<const uint16_t*>(x)[k];
    return dtype == Dtype::f16 ? f16_to_f32(half) : bf16_to_f32(half);
  }

  // Lane i meets lane i ^ h: the lower of the two gets the sum, the upper the difference.
  template <int h>
  static inline reg butterfly(reg v) {
    reg other;
    __mmask16 upper;
    if constexpr (h == 1) {
      other = _mm512_permute_ps(v, 0xB1);
      upper = 0xAAAA;
    } else if constexpr (h == 2) {
      other = _mm512_permute_ps(v, 0x4E);
      upper = 0xCCCC;
    } else if constexpr (h == 4) {
      other = _mm512_shuffle_f32x4(v, v, 0xB1);
      upper = 0xF0F0;
    } else {
      other = _mm512_shuffle_f32x4(v, v, 0x4E);
      upper = 0xFF00;
    }
    return _mm512_mask_sub_ps(_mm512_add_ps(v, other), upper, other, v);
  }

  static inline uint32_t largest_magnitude(const float* y, int64_t K) {
    const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      most = _mm512_max_epu32(most, _mm512_and_si512(no_sign, _mm512_loadu_si512(y + k)));
    }
    if (k < K) {
      const __mmask16 rest = static_cast<__mmask16>((1u << (K - k)) - 1);
      most =
          _mm512_max_epu32(most, _mm512_and_si512(no_sign, _mm512_maskz_loadu_epi32(rest, y + k)));
    }
    return _mm512_reduce_max_epu32(most);
  }

  static inline int32_t round_codes(const float* y, int64_t count, float inverse, int Q,
                                    int8_t* codes) {
    const __m512 scale = _mm512_set1_ps(inverse);
    const __m512 high = _mm512_set1_ps(static_cast<float>(Q));
    const __m512 low = _mm512_set1_ps(static_cast<float>(-Q));
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += 16) {
      const int64_t left = count - k;
      const __mmask16 lanes = left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
      __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, y + k), scale);
      v = _mm512_max_ps(_mm512_min_ps(v, high), low);
      const __m512i code = _mm512_cvtps_epi32(v);
      sum = _mm512_add_epi32(sum, code);
      _mm512_mask_cvtepi32_storeu_epi8(codes + k, lanes, code);
    }
    return _mm512_reduce_add_epi32(sum);
  }
};

}  // namespace

Kernels avx512_kernels() {
  return {Vectorised<Avx512>::transform, Vectorised<Avx512>::round_token};
}

}  // namespace saltire::transform_quantize
