// decoder_layer: one step of a decoder (Llama, Mistral, Qwen2, Qwen3) for M tokens. Torch-free.
//
//   h = embedding[token]                                     kept in f32 throughout
//   for each layer whose bit is set:
//     x = norm(h);  q, k, v = x·Wᵀ + b;  (norm of each head of q, k)  rotate q, k by position
//     k, v go to their slot of the cache;  h += softmax(q·Kᵀ / √head_dim)·V · Woᵀ
//     x = norm(h);  h += (silu(x·Wgᵀ) ∘ x·Wuᵀ)·Wdᵀ
//   logits = norm(h)·headᵀ for the wanted rows
//
// A row's result depends on nothing but the row, its cache and the mode: never on how many other
// rows there are or on the number of threads. So a verified draft gives exactly the logits that
// decoding one token at a time gives. The modes differ in the order of sums over K:
//   decode:   16 partial sums (lane = k mod 16), then a fixed tree; weights are read once a pass
//             of up to 8 rows, in the rows they have in the checkpoint
//   prefill:  k ascending; weights are transposed in panels of 32 outputs, for many rows
//
// One token, D hidden, F ffn, L layers, V vocabulary: reads every kept weight once, so the floor is
// bytes(weights) / DRAM rate. SmolLM2-135M: 106 M weights in layers and 28 M in the head: 269 MB in
// bf16, 9 ms at 30 GB/s; 2 FLOP a weight, 0.27 GFLOP, 1.2 ms on two AVX-512 cores.
#pragma once
#include <cstdint>
#include <vector>

namespace saltire::decoder_layer {

// u8, u4, u2: codes of a cache; see CacheHead.
enum class Format : int32_t { f32 = 0, bf16 = 1, f16 = 2, u8 = 3, u4 = 4, u2 = 5 };

constexpr int64_t format_bits(Format format) {
  switch (format) {
    case Format::f32:
      return 32;
    case Format::u8:
      return 8;
    case Format::u4:
      return 4;
    case Format::u2:
      return 2;
    default:
      return 16;
  }
}

constexpr bool is_coded(Format format) {
  return format_bits(format) < 16;
}

// Outputs of a panel in prefill, and of an item of work in decode.
constexpr int64_t kPanel = 32;
// Slots of the cache that share a block of transposed keys.
constexpr int64_t kSlotBlock = 16;
// Slots over which attention keeps scores before it folds them into the running sum.
constexpr int64_t kChunk = 128;
// Rows are staged with K rounded up to this, zeros behind.
constexpr int64_t kStageMultiple = 32;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// y[m, n] = x[m, :]·w[n, :] + bias[n], w row-major [N, K].
struct Dense {
  Format format = Format::f32;
  int64_t n = 0;
  int64_t k = 0;
  const void* w = nullptr;
  const float* bias = nullptr;
};

struct DenseRows {
  int64_t rows = 0;
  const float* x = nullptr;  // staged by Kernels::stage, x_stride apart
  int64_t x_stride = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// The cache of one sequence and one head of K and V.
//   keys:   [T / 16][head_dim][16]   so that 16 slots are the lanes of a product with q
//   values: [T][head_dim]
//
// In codes of b bits, c = 8 / b in a byte, keys and values are rotated by a Hadamard matrix, each
// slot rounded to a grid of its own, x = code · scale + low; scale and low are f16. No byte is
// shared by two slots, so that threads may append side by side.
//   keys:   [T / 16][head_dim / c][16]; byte i of a slot: its dimensions c·i, c·i + 1, ... from the
//           lowest bit on
//   values: [T][head_dim / 16][16 / c]; byte j of 16 dimensions: j, j + 16/c, ... likewise
//   Worked byte: u4, dimensions 0 and 1 of a key with codes 9 and 3 make 0x39; so do dimensions 0
//   and 8 of a value.
struct CacheHead {
  Format format = Format::f32;
  int64_t head_dim = 0;
  void* keys = nullptr;
  void* values = nullptr;
  int64_t slots = 0;              // T
  uint16_t* key_grids = nullptr;  // scales [T], then lows [T]; null without codes
  uint16_t* value_grids = nullptr;
};

// One head of one row: sees slots [start, prefix), slots prefix + i where bit i of `tree` is set,
// and, if own_key is given, its own key and value, which are in no slot.
struct Query {
  const float* q = nullptr;  // rotated, times 1 / √head_dim
  float* out = nullptr;
  int64_t start = 0;
  int64_t prefix = 0;
  uint64_t tree = 0;
  const float* own_key = nullptr;
  const float* own_value = nullptr;
};

// Largest logit of a range: its value, its first index, and Σ e^(logit - value).
struct Best {
  float value;
  int32_t index;
  float sum;
};

struct Kernels {
  // out = x / sqrt(mean(x²) + eps) · gain
  void (*norm)(const float* x, const float* gain, float eps, int64_t count, float* out);
  // x [K] -> the order that `dense` reads for this format of weights, zeros up to the multiple.
  void (*stage)(Format format, const float* x, int64_t k, float* out);
  // Outputs [begin, end) of all rows, the decode way.
  void (*dense)(const Dense& w, const DenseRows& rows, int64_t begin, int64_t end);
  // The prefill way; x is f32 in natural order. scratch: K · kPanel floats.
  void (*dense_panel)(const Dense& w, const DenseRows& rows, int64_t begin, int64_t end,
                      float* scratch);
  // a = silu(a) ∘ b
  void (*swiglu)(float* a, const float* b, int64_t count);
  // Writes one key and value to a slot.
  void (*append)(const CacheHead& cache, int64_t slot, const float* key, const float* value);
  // Rotates a head by a Hadamard matrix of the largest power of two in head_dim; its own inverse.
  void (*rotate_head)(float* head, int64_t head_dim);
  // scratch: attention_scratch(head_dim) floats.
  void (*attend)(const CacheHead& cache, const Query* queries, int64_t count, float* scratch);
  Best (*best)(const float* logits, int64_t count);
  // out[r] = Σ_k x[k]·w[k, r]
  void (*low_rank)(const float* x, const float* w, int64_t k, int64_t r, float* out);
};

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxQueries = 4;  // that share each load of the cache

constexpr int64_t attention_scratch(int64_t head_dim) {
  return kMaxQueries * (kChunk + head_dim);
}

Kernels ref_kernels();
#if defined(SALTIRE_X86)
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

}  // namespace saltire::decoder_layer
