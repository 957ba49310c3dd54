// factored_linear: two low-bit factors, the ranks between them rounded where they lie.
//
//   z[m, r] = x_scale[m] · Σ_g scale[r, g] · (Σ_k∈g x[m, k]·u[r, k] - zero·x_sum[m, g])   in f32
//   c, s    = transform_quantize(z)
//   y[m, n] = the same product of c and the second factor, plus bias[n]                   in f32
//
// Rows go in blocks of at most kRankBytes of z. A block passes through all of its phases before the
// next one starts, its outputs split over the threads in each:
//
//   pack x | z = x·downᵀ | round and pack z | y = z·upᵀ
//
// z is rounded once and is never seen outside; a block's z, its codes and x's codes lie in L2 and
// L3 throughout. Every value is what the two ops of the chain would give, to the bit.
//
// M rows, K inputs, R ranks, N outputs at 4 bits: reads R·(K + N)/2 bytes of weights a block. With
// R = K/4 and N = K that is half of a dense W4 layer's bytes and operations.
#pragma once
#include <cstdint>

namespace saltire::factored_linear {

constexpr int64_t kRankBytes = 512 << 10;
constexpr int64_t kPanel = 32;  // outputs of an item of work, what QuantKernels::multiply takes

}  // namespace saltire::factored_linear
