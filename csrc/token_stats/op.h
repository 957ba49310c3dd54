// Log-prob of a label, entropy and log-sum-exp of each token's next-token distribution, from logits
// or from hidden states and the head, whose logits [M, V] are then never held as a whole.
//
//   z = cap(x) / T,   x = logits, or h·Wᵀ + b;   cap(x) = c·tanh(x / c), or x
//   one pass over the vocabulary, in blocks, with shifted sums:
//     s = Σ e^(z − m),   u = Σ e^(z − m)·(z − m),   m = the largest z so far
//   log-sum-exp = m + ln s,   ln p_y = (z_y − m) − ln s,   H = ln s − u/s
// u is of the shifted logits, so H keeps its digits near collapse and under any common offset,
// where lse − Σ p·z would subtract two large numbers. A logit of −∞ is masked: it contributes 0.
//
// Backward keeps m, ln s and H of each token (12 bytes) and computes z again:
//   ln p = (z − m) − ln s
//   dz = g_logp·(1[v = y] − p) + g_lse·p − g_H·p·(ln p + H);   dx = dz / T · (1 − (cap(x) / c)²)
//   dh = dx·W,   dW = dxᵀ·h,   db = Σ dx
//
// Work and floor. From logits, M = 512, V = 49,152, f32: 100 MB read forward, 200 MB read and
// written backward: 3.4 and 6.7 ms at 30 GB/s; about 20 operations a value forward: 5 ms on two
// AVX-512 cores. From hidden, M = 4096, D = 576, V = 49,152: 232 GFLOP a product, one forward and
// three backward: 1.0 s each at 2 · 115 GFLOP/s; the exponentials are 16 · 20 / (16 · 576) = 3 % of
// one product.
#pragma once
#include <cstdint>
#include <limits>

namespace saltire::token_stats {

enum class Dtype { f32, bf16, f16 };

// What is known of a token before the pass.
struct Token {
  float inverse_temperature = 1;
  int64_t label = -1;  // index in this part of the vocabulary; -1: none here
  bool ignored = false;
};

// The running sums of a token, over the part of the vocabulary seen so far. Double: a vocabulary is
// summed in blocks in f32, and the blocks in f64.
struct State {
  float max = -std::numeric_limits<float>::infinity();
  float label = -std::numeric_limits<float>::infinity();
  double sum = 0;
  double weighted = 0;
  int64_t argmax = 0;
};

// What backward knows of a token: the saved statistics and the gradients of the outputs.
struct Gradient {
  float max, log_sum, entropy;
  float d_logprob, d_entropy, d_lse;
};

struct Row {
  const void* x;
  Dtype dtype;
  int64_t V;
  float softcap;  // 0: none
};

// A tile of the head: `count` rows from vocabulary index `first` on.
struct HeadTile {
  int64_t first, count;
  const float* packed;  // [count / R][D][R], R = Kernels::rows, padded with zeros
  const float* bias;    // [count] or null
  float softcap;        // 0: none
};

// Consecutive tokens: in strips of S = Kernels::strip, the last one padded with zeros.
struct Tokens {
  int64_t count;
  int64_t D;
  const float* packed;  // [count / S][D][S]
  const float* panels;  // [D / S][`panel` floats]: a panel is [count][S], zeros beyond D
  int64_t panel;
  const Token* token;  // [count]
};

// Where gradients go; a null pointer is one that nobody wants.
struct LinearGradients {
  float* hidden;     // [count / S][D][S], added to
  float* head;       // [tile.count][D]
  float* bias;       // [tile.count], added to
  bool head_is_new;  // overwrite head instead of adding
};

struct Kernels {
  int64_t strip, rows;
  void (*forward_row)(const Row&, const Token&, State*);
  void (*backward_row)(const Row&, const Token&, const Gradient&, void* dx);
  void (*pack_tokens)(const float* plain, int64_t stride, int64_t count, int64_t D, float* packed);
  void (*pack_head)(const void* head, Dtype, int64_t count, int64_t D, float* packed);
  // z: scratch of [tile.count rounded up to `rows`][strip] floats.
  void (*forward_tile)(const HeadTile&, const Tokens&, float* z, State*);
  // z: the same for each strip of the tokens.
  void (*backward_tile)(const HeadTile&, const Tokens&, const Gradient*, float* z,
                        const LinearGradients&);
};

Kernels ref_kernels();
#if defined(SALTIRE_X86)
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

}  // namespace saltire::token_stats
