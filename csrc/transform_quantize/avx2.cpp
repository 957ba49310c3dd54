#include <immintrin.h>

#include "core/cpu/half.h"
#include "transform_quantize/kernel.h"

namespace saltire::transform_quantize {
namespace {

struct Avx2 {
  using reg = __m256;
  static constexpr int64_t width = 8;

  static inline reg load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static inline reg set1(float f) { return _mm256_set1_ps(f); }
  static inline reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static inline reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static inline reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static inline reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }

  static inline reg load(const void* x, int64_t k, Dtype dtype) {
    if (dtype == Dtype::f32) return load(static_cast<const float*>(x) + k);
    const __m128i half =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + k));
    if (dtype == Dtype::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  static inline float load_one(const void* x, int64_t k, Dtype dtype) {
    if (dtype == Dtype::f32) return static_cast<const float*>(x)[k];
    const uint16_t half = static_cast<const uint16_t*>(x)[k];
    return dtype == Dtype::f16 ? f16_to_f32(half) : bf16_to_f32(half);
  }

  // Lane i meets lane i ^ h: the lower of the two gets the sum, the upper the difference.
  template <int h>
  static inline reg butterfly(reg v) {
    if constexpr (h == 1) {
      const reg other = _mm256_permute_ps(v, 0xB1);
      return _mm256_blend_ps(_mm256_add_ps(v, other), _mm256_sub_ps(other, v), 0xAA);
    } else if constexpr (h == 2) {
      const reg other = _mm256_permute_ps(v, 0x4E);
      return _mm256_blend_ps(_mm256_add_ps(v, other), _mm256_sub_ps(other, v), 0xCC);
    } else {
      const reg other = _mm256_permute2f128_ps(v, v, 0x01);
      return _mm256_blend_ps(_mm256_add_ps(v, other), _mm256_sub_ps(other, v), 0xF0);
    }
  }

  static inline uint32_t largest_magnitude(const float* y, int64_t K) {
    const __m256i no_sign = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + 8 <= K; k += 8) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(y + k));
      most = _mm256_max_epu32(most, _mm256_and_si256(no_sign, v));
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
    uint32_t largest = 0;
    for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
    for (; k < K; ++k) {
      const uint32_t bits = f32_to_bits(y[k]) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    return largest;
  }

  static inline int32_t round_codes(const float* y, int64_t count, float inverse, int Q,
                                    int8_t* codes) {
    const __m256 scale = _mm256_set1_ps(inverse);
    const __m256 high = _mm256_set1_ps(static_cast<float>(Q));
    const __m256 low = _mm256_set1_ps(static_cast<float>(-Q));
    __m256i sums = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
      __m256 v = _mm256_mul_ps(_mm256_loadu_ps(y + k), scale);
      v = _mm256_max_ps(_mm256_min_ps(v, high), low);
      const __m256i code = _mm256_cvtps_epi32(v);
      sums = _mm256_add_epi32(sums, code);
      const __m128i words =
          _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + k), _mm_packs_epi16(words, words));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
    int32_t sum = 0;
    for (int32_t lane : lanes) sum += lane;
    for (; k < count; ++k) {
      float v = y[k] * inverse;
      v = v > Q ? Q : (v < -Q ? -Q : v);
      codes[k] = static_cast<int8_t>(std::nearbyint(v));
      sum += codes[k];
    }
    return sum;
  }
};

}  // namespace

Kernels avx2_kernels() {
  return {Vectorised<Avx2>::transform, Vectorised<Avx2>::round_token};
}

}  // namespace saltire::transform_quantize
