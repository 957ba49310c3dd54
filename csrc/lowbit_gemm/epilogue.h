// What comes before and after the sums, one source for every instruction set: each kernel file
// compiles its own copy with its own flags (everything here is `static`, so no copy leaks into
// another file), and the explicit fma and -ffp-contract=off make all copies give the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/cpu/half.h"
#include "lowbit_gemm/op.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace saltire::lowbit_gemm {

// Not std::fma: a template of the standard library, compiled here for AVX-512, could be the one
// copy that the linker keeps for everybody.
static inline float fma32(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}

// What a sum of a row begins with: -centre·Σ x. Wraps where the caller's x_sum is no sum of codes.
static inline int32_t first_sum(int bits, float shift) {
  const int64_t first = -int64_t{sum_centre(bits)} * static_cast<int64_t>(shift);
  return static_cast<int32_t>(static_cast<uint32_t>(first));
}

static inline void store_half(const float* y, uint16_t* out, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(y + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) out[i] = f32_to_f16(y[i]);
}

// Finishes 32 outputs of one row: acc holds Σ_g scale·(...) and is overwritten.
static inline void finish_row(const Gemm& gemm, int64_t row, int64_t block, float* acc) {
  const int64_t n0 = block * kBlock;
  const int64_t n = gemm.layout.n;
  const int64_t count = n - n0 < kBlock ? n - n0 : kBlock;
  const float x_scale = gemm.x_scale[row];
  for (int64_t o = 0; o < kBlock; ++o) acc[o] *= x_scale;
  for (int64_t r = 0; r < gemm.rank; ++r) {
    const float lx = gemm.low_rank_x[row * gemm.rank + r];
    const float* lw = gemm.low_rank_w + r * n + n0;
    if (count == kBlock) {
      for (int64_t o = 0; o < kBlock; ++o) acc[o] = fma32(lx, lw[o], acc[o]);
    } else {
      for (int64_t o = 0; o < count; ++o) acc[o] = fma32(lx, lw[o], acc[o]);
    }
  }
  if (gemm.bias != nullptr) {
    for (int64_t o = 0; o < count; ++o) acc[o] += gemm.bias[n0 + o];
  }
  const int64_t at = row * n + n0;
  if (gemm.out_type == Float::f32) {
    std::memcpy(static_cast<float*>(gemm.out) + at, acc, static_cast<size_t>(count) * 4);
  } else if (gemm.out_type == Float::f16) {
    store_half(acc, static_cast<uint16_t*>(gemm.out) + at, count);
  } else {
    uint16_t* out = static_cast<uint16_t*>(gemm.out) + at;
    for (int64_t o = 0; o < count; ++o) out[o] = f32_to_bf16(acc[o]);
  }
}

}  // namespace saltire::lowbit_gemm
