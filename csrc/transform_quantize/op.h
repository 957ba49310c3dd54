// Rotate a token and round it to a few bits, in one pass while it lies in L1.
//
//   Y = leftᵀ · (X ∘ diag) · right      a token seen as X [A, B], row-major, K = A·B
//   scale = clip · max|Y| / Q,  code = clamp(round_half_even(Y / scale), -Q, Q),  Q = 2^(bits-1) -
//   1
//
// `right` is dense [B, B], or the orthonormal Hadamard matrix of size B; `left` is dense [A, A] or
// absent. Every path does the same f32 operations in the same order (butterflies from the nearest
// pair to the farthest, sums by fused multiply-add in rising index), so all are bit-equal.
//
// Work and floor, M = 512, K = 4096, f32 in, B = 64: reads 8 MiB, writes 2 MiB: 0.35 ms at 30 GB/s;
// 6 butterflies + 5 operations an element: 1.4 G operations, 0.1 ms on two AVX-512 cores.
#pragma once
#include <cstdint>

namespace saltire::transform_quantize {

enum class Dtype { f32, bf16, f16 };

struct Transform {
  int64_t K;
  int64_t A, B;        // K = A·B
  const float* diag;   // [K] or null
  const float* left;   // [A, A] or null
  const float* right;  // [B, B] or null; then `hadamard` must be 1
  int64_t hadamard;    // B, or 1 for none
};

struct Rounding {
  int Q;              // largest code
  float clip_over_q;  // clip / Q
  int64_t sum_group;  // divides K
};

// x: one token of K values; scratch: 2·K floats (rounded up to 16 each). Writes Y to y [K].
// Writes codes [K], scale [1] and sums [K / sum_group].
struct Kernels {
  void (*transform)(const Transform&, const void* x, Dtype, float* y, float* scratch);
  void (*round)(const Rounding&, const float* y, int64_t K, int8_t* codes, float* scale,
                int32_t* sums);
};

Kernels ref_kernels();
#if defined(SALTIRE_X86)
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

}  // namespace saltire::transform_quantize
