#include <cmath>
#include <cstring>

#include "core/cpu/half.h"
#include "core/token_scale.h"
#include "transform_quantize/op.h"

namespace saltire::transform_quantize {
namespace {

float load(const void* x, int64_t k, Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16:
      return bf16_to_f32(static_cast<const uint16_t*>(x)[k]);
    case Dtype::f16:
      return f16_to_f32(static_cast<const uint16_t*>(x)[k]);
    default:
      return static_cast<const float*>(x)[k];
  }
}

void hadamard(float* block, int64_t B) {
  for (int64_t h = 1; h < B; h *= 2) {
    for (int64_t i = 0; i < B; i += 2 * h) {
      for (int64_t j = i; j < i + h; ++j) {
        const float a = block[j], b = block[j + h];
        block[j] = a + b;
        block[j + h] = a - b;
      }
    }
  }
}

void transform(const Transform& t, const void* x, Dtype dtype, float* y, float* scratch) {
  const int64_t K = t.K, A = t.A, B = t.B;
  float* now = t.left != nullptr ? scratch : y;
  for (int64_t k = 0; k < K; ++k) {
    now[k] = load(x, k, dtype) * (t.diag != nullptr ? t.diag[k] : 1.0f);
  }
  if (t.right != nullptr) {
    float* row = scratch + K;
    for (int64_t a = 0; a < A; ++a) {
      std::memcpy(row, now + a * B, sizeof(float) * B);
      for (int64_t j = 0; j < B; ++j) {
        float sum = 0;
        for (int64_t b = 0; b < B; ++b) sum = std::fma(row[b], t.right[b * B + j], sum);
        now[a * B + j] = sum;
      }
    }
  } else if (t.hadamard > 1) {
    const float norm = 1.0f / std::sqrt(static_cast<float>(B));
    for (int64_t a = 0; a < A; ++a) hadamard(now + a * B, B);
    for (int64_t k = 0; k < K; ++k) now[k] *= norm;
  }
  if (t.left != nullptr) {
    for (int64_t i = 0; i < A; ++i) {
      for (int64_t b = 0; b < B; ++b) {
        float sum = 0;
        for (int64_t a = 0; a < A; ++a) sum = std::fma(t.left[a * A + i], now[a * B + b], sum);
        y[i * B + b] = sum;
      }
    }
  }
}

void round_token(const Rounding& r, const float* y, int64_t K, int8_t* codes, float* scale,
                 int32_t* sums) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < K; ++k) {
    uint32_t bits;
    std::memcpy(&bits, y + k, sizeof(bits));
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  const float inverse = choose_scale(largest, r.clip_over_q, scale);
  for (int64_t g = 0; g < K / r.sum_group; ++g) {
    int32_t sum = 0;
    for (int64_t k = g * r.sum_group; k < (g + 1) * r.sum_group; ++k) {
      float v = inverse == 0.0f ? 0.0f : y[k] * inverse;
      v = v > r.Q ? r.Q : (v < -r.Q ? -r.Q : v);
      codes[k] = static_cast<int8_t>(std::nearbyint(v));
      sum += codes[k];
    }
    sums[g] = sum;
  }
}

}  // namespace

Kernels ref_kernels() {
  return {transform, round_token};
}

}  // namespace saltire::transform_quantize
