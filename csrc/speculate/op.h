// speculate: warped distributions, draws from them, and exact speculative acceptance. Torch-free.
//
//   warp:    p = softmax(logits / T); only the top_k largest; then the fewest largest whose mass is
//            top_p or more; then those of at least min_p times the largest; normalised
//   draw:    the token at which the distribution function of p passes u
//   verify:  draft x ~ q is accepted if u < p(x) / q(x); the first rejected one is replaced by a
//            draw from max(p - q, 0), normalised; behind an accepted draft comes a draw from p
//
// Every u is a pure function of (seed, sequence, position, purpose) by Philox4x32-10, so a draw
// depends neither on the batch nor on what was drawn before.
//
// One row of V = 49,152 f32 is 192 kB: read twice and written once from L2, about 30 µs; the rest
// touches only the tokens that are left.
#pragma once
#include <cstdint>

namespace saltire::speculate {

struct Warp {
  float temperature = 1.0f;  // > 0
  int64_t top_k = 0;         // 0: all
  float top_p = 1.0f;
  float min_p = 0.0f;
};

enum class Purpose : uint32_t { draft = 0, accept = 1, replace = 2, plain = 3 };

struct Kernels {
  float (*largest)(const float* x, int64_t count);
  // out = e^((x - most)·factor); returns the sum.
  float (*exponentials)(const float* x, int64_t count, float most, float factor, float* out);
};

Kernels ref_kernels();
#if defined(SALTIRE_X86)
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

}  // namespace saltire::speculate
