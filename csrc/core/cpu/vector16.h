// Sixteen floats, for kernels written once: one zmm, two ymm, or an array, by the flags that the
// including file is compiled with. The operations and their order are the same for all three, so
// what is built on them gives the same bits on every instruction set.
//
// Everything is in an unnamed namespace: each file keeps its own copy, and no AVX-512 code can
// become the one copy that the linker keeps for everybody.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/cpu/half.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace saltire {
namespace {

constexpr int kLanes = 16;

// Not std::min and std::max: templates of the standard library, compiled here for AVX-512, could be
// the copies that the linker keeps for everybody.
template <typename T>
inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T larger(T a, T b) {
  return a < b ? b : a;
}

#if defined(__AVX512F__)

struct V16 {
  __m512 v;
};
constexpr int kTileRegisters = 24;  // V16 accumulators that fit beside operands

inline V16 set1(float f) {
  return {_mm512_set1_ps(f)};
}
inline V16 load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline void store(float* p, V16 a) {
  _mm512_storeu_ps(p, a.v);
}
inline V16 load_part(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
}
inline V16 add(V16 a, V16 b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline V16 sub(V16 a, V16 b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline V16 mul(V16 a, V16 b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline V16 div(V16 a, V16 b) {
  return {_mm512_div_ps(a.v, b.v)};
}
inline V16 fma(V16 a, V16 b, V16 c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// b where a is NaN
inline V16 max(V16 a, V16 b) {
  return {_mm512_max_ps(a.v, b.v)};
}
inline V16 load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline V16 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
struct Bytes16 {
  __m512i v;  // widened to 32 bits
};
inline Bytes16 load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// The codes of `bits` bits from bit `shift` of each byte on.
template <int bits, int shift>
inline V16 codes_of(Bytes16 a) {
  return {_mm512_cvtepi32_ps(
      _mm512_and_si512(_mm512_srli_epi32(a.v, shift), _mm512_set1_epi32((1 << bits) - 1)))};
}
// 32 bf16: those at even and those at odd places.
inline void load_bf16_pairs(const uint16_t* p, V16& even, V16& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)))};
}
// a where its bit of mask is set, else b.
inline V16 select(uint32_t mask, V16 a, V16 b) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(mask), b.v, a.v)};
}
inline uint32_t less(V16 a, V16 b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ);
}
inline uint32_t equal(V16 a, V16 b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
}
// To the nearest integer, ties to even.
inline V16 round_even(V16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a · 2^n for whole n in [-126, 127].
inline V16 scale_by_power(V16 a, V16 n) {
  const __m512i exponent =
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(exponent))};
}
// lane i + lane i + 8, then the same for 4, 2, 1
inline float reduce_add(V16 a) {
  const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float reduce_max(V16 a) {
  return _mm512_reduce_max_ps(a.v);
}

#elif defined(__AVX2__)

struct V16 {
  __m256 lo, hi;
};
constexpr int kTileRegisters = 5;

inline V16 set1(float f) {
  return {_mm256_set1_ps(f), _mm256_set1_ps(f)};
}
inline V16 load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline void store(float* p, V16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline V16 load_part(const float* p, int count) {
  float full[kLanes] = {};
  std::memcpy(full, p, sizeof(float) * static_cast<size_t>(count));
  return load(full);
}
inline V16 add(V16 a, V16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline V16 sub(V16 a, V16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline V16 mul(V16 a, V16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline V16 div(V16 a, V16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline V16 fma(V16 a, V16 b, V16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline V16 max(V16 a, V16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline __m256 widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline V16 load_bf16(const uint16_t* p) {
  return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline V16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
struct Bytes16 {
  __m256i lo, hi;
};
inline Bytes16 load_bytes(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8))};
}
template <int bits, int shift>
inline V16 codes_of(Bytes16 a) {
  const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(a.lo, shift), mask)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(a.hi, shift), mask))};
}
inline void load_bf16_pairs(const uint16_t* p, V16& even, V16& odd) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  const __m256i high = _mm256_set1_epi32(-65536);
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(a, high)),
         _mm256_castsi256_ps(_mm256_and_si256(b, high))};
}
inline __m256 select8(uint32_t mask, __m256 a, __m256 b) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(on, bits)));
}
inline V16 select(uint32_t mask, V16 a, V16 b) {
  return {select8(mask & 0xff, a.lo, b.lo), select8(mask >> 8 & 0xff, a.hi, b.hi)};
}
inline uint32_t less(V16 a, V16 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)) << 8);
}
inline uint32_t equal(V16 a, V16 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)) << 8);
}
inline V16 round_even(V16 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 scale8_by_power(__m256 a, __m256 n) {
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
inline V16 scale_by_power(V16 a, V16 n) {
  return {scale8_by_power(a.lo, n.lo), scale8_by_power(a.hi, n.hi)};
}
inline float reduce_add(V16 a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float reduce_max(V16 a) {
  const __m256 s = _mm256_max_ps(a.lo, a.hi);
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

#else

struct V16 {
  float f[kLanes];
};
constexpr int kTileRegisters = 8;

template <typename Lane>
inline V16 each(const Lane& lane) {
  V16 out;
  for (int i = 0; i < kLanes; ++i) out.f[i] = lane(i);
  return out;
}
inline V16 set1(float f) {
  return each([&](int) { return f; });
}
inline V16 load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline void store(float* p, V16 a) {
  std::memcpy(p, a.f, sizeof(a.f));
}
inline V16 load_part(const float* p, int count) {
  return each([&](int i) { return i < count ? p[i] : 0.0f; });
}
inline V16 add(V16 a, V16 b) {
  return each([&](int i) { return a.f[i] + b.f[i]; });
}
inline V16 sub(V16 a, V16 b) {
  return each([&](int i) { return a.f[i] - b.f[i]; });
}
inline V16 mul(V16 a, V16 b) {
  return each([&](int i) { return a.f[i] * b.f[i]; });
}
inline V16 div(V16 a, V16 b) {
  return each([&](int i) { return a.f[i] / b.f[i]; });
}
inline V16 fma(V16 a, V16 b, V16 c) {
  return each([&](int i) { return __builtin_fmaf(a.f[i], b.f[i], c.f[i]); });
}
inline V16 max(V16 a, V16 b) {
  return each([&](int i) { return a.f[i] > b.f[i] ? a.f[i] : b.f[i]; });
}
inline V16 load_bf16(const uint16_t* p) {
  return each([&](int i) { return bf16_to_f32(p[i]); });
}
inline V16 load_f16(const uint16_t* p) {
  return each([&](int i) { return f16_to_f32(p[i]); });
}
struct Bytes16 {
  uint8_t b[kLanes];
};
inline Bytes16 load_bytes(const uint8_t* p) {
  Bytes16 out;
  std::memcpy(out.b, p, sizeof(out.b));
  return out;
}
template <int bits, int shift>
inline V16 codes_of(Bytes16 a) {
  return each([&](int i) { return static_cast<float>(a.b[i] >> shift & ((1 << bits) - 1)); });
}
inline void load_bf16_pairs(const uint16_t* p, V16& even, V16& odd) {
  even = each([&](int i) { return bf16_to_f32(p[2 * i]); });
  odd = each([&](int i) { return bf16_to_f32(p[2 * i + 1]); });
}
inline V16 select(uint32_t mask, V16 a, V16 b) {
  return each([&](int i) { return (mask >> i & 1) != 0 ? a.f[i] : b.f[i]; });
}
inline uint32_t less(V16 a, V16 b) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(a.f[i] < b.f[i]) << i;
  return mask;
}
inline uint32_t equal(V16 a, V16 b) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(a.f[i] == b.f[i]) << i;
  return mask;
}
inline V16 round_even(V16 a) {
  return each([&](int i) { return __builtin_nearbyintf(a.f[i]); });
}
inline V16 scale_by_power(V16 a, V16 n) {
  return each([&](int i) {
    return a.f[i] * bits_to_f32(static_cast<uint32_t>(static_cast<int>(n.f[i]) + 127) << 23);
  });
}
inline float reduce_add(V16 a) {
  for (int h = kLanes / 2; h > 0; h /= 2) {
    for (int i = 0; i < h; ++i) a.f[i] += a.f[i + h];
  }
  return a.f[0];
}
inline float reduce_max(V16 a) {
  for (int h = kLanes / 2; h > 0; h /= 2) {
    for (int i = 0; i < h; ++i) a.f[i] = a.f[i] > a.f[i + h] ? a.f[i] : a.f[i + h];
  }
  return a.f[0];
}

#endif

// 16 codes in 2·bits bytes: lane l is in byte l mod n at bit bits·(l / n), n = 2·bits.
template <int bits>
inline V16 load_codes(const uint8_t* p) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const __m128i mask = _mm_set1_epi8(static_cast<char>((1 << bits) - 1));
  __m128i codes;
  if constexpr (bits == 8) {
    codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  } else if constexpr (bits == 4) {
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    codes = _mm_and_si128(_mm_unpacklo_epi64(b, _mm_srli_epi16(b, 4)), mask);
  } else {
    int32_t four;
    std::memcpy(&four, p, sizeof(four));
    const __m128i shifts = _mm_setr_epi32(0, 2, 4, 6);
    codes = _mm_and_si128(_mm_srlv_epi32(_mm_set1_epi32(four), shifts), mask);
  }
#if defined(__AVX512F__)
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes))};
#else
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)))};
#endif
#else
  constexpr int n = 2 * bits;
  return each(
      [&](int l) { return static_cast<float>(p[l % n] >> (l / n * bits) & ((1 << bits) - 1)); });
#endif
}

// e^x within 2 ulp; 0 below -87.3 (e^x would be subnormal), infinity above 88.7, NaN for NaN.
inline V16 exp(V16 x) {
  const V16 low = set1(-87.3f), high = set1(88.72f);
  const uint32_t under = less(x, low);
  const uint32_t over = less(high, x);
  const uint32_t number = equal(x, x);
  const V16 inside = select(under | over | (~number & 0xffff), set1(0.0f), x);
  // x = n·ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, so that r keeps its digits. n is cut to
  // 127 so that 2^n stays finite; r then reaches 1.04, where the polynomial still holds.
  V16 n = round_even(mul(inside, set1(1.44269504f)));
  n = select(less(set1(127.0f), n), set1(127.0f), n);
  V16 r = fma(n, set1(-0.693359375f), inside);
  r = fma(n, set1(2.12194440e-4f), r);
  // e^r = 1 + r + r²·(1/2 + r/6 + r²/24 + ...), near-minimax coefficients of degree 5 inside.
  V16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  const V16 e = add(fma(mul(r, r), p, r), set1(1.0f));
  V16 y = scale_by_power(e, n);
  y = select(under, set1(0.0f), y);
  y = select(over, set1(INFINITY), y);
  return select(number, y, x);
}

inline float exp(float x) {
  float lanes[kLanes];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

}  // namespace
}  // namespace saltire
