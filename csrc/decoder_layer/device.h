// The parts of a layer on a CUDA device: problem -> plan -> launch. Torch-free.
//
// A step is a chain of these kernels and of the products of its linear layers:
//
//   embed              state = embedding[token]
//   residual_norm      state += delta;  y = norm(state)·gain, as numbers or at once as codes
//   (q·k·v)
//   append_heads       norm of heads, rotation; keys and values go to the cache
//   attend_heads
//   (o)  residual_norm  (gate·up)
//   swiglu             y = silu(gate) ∘ up, as numbers or at once as codes
//   (down)
//   best_logits        the largest of what the head gave, and its probability
//
// All that changes from step to step (tokens, positions, slots, what a row sees) is read from
// `rows` in device memory, so that a captured step can be replayed. The cache lies as on the CPU
// (op.h). A row's result depends on nothing but the row and its cache, not on the other rows of a
// step.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "core/cuda/device.h"
#include "core/cuda/number.h"
#include "decoder_layer/op.h"

namespace saltire::decoder_layer {

// Columns of `rows`, int64 [M, 6]; ops/decoder_layer.py says what they mean.
enum RowColumn { kToken, kSequence, kPosition, kSlot, kPrefix, kTree, kRowColumns };

// --- tokens -------------------------------------------------------------------------------------

// How a token's values become codes; Q = 0: they do not, and `y` takes them.
struct DeviceRounding {
  const float* diag = nullptr;  // [K] or null
  int hadamard = 1;             // a power of two up to 256 that divides K
  int Q = 0;
  float clip_over_q = 0.0f;
  int64_t sum_group = 0;    // a multiple of 8 that divides K
  int8_t* codes = nullptr;  // [M, K]
  float* scale = nullptr;   // [M]
  int32_t* sums = nullptr;  // [M, K / sum_group]
};

struct TokenProblem {
  int64_t M = 0;
  int64_t K = 0;                           // a multiple of 8
  cuda::Number dtype = cuda::Number::f32;  // of delta, gate_up and y: f32 or bf16
  float* state = nullptr;                  // [M, K]; null: swiglu of gate_up
  const void* delta = nullptr;             // [M, K] or null
  const float* gain = nullptr;             // [K]
  float eps = 0.0f;
  float* trace = nullptr;         // [M, K] or null: a copy of the new state
  const void* gate_up = nullptr;  // [M, 2K]: gates, then ups
  DeviceRounding rounding;
  void* y = nullptr;  // [M, K]
};

// A block a token: a thread holds `chunks` runs of 8 values.
struct TokenPlan {
  int threads = 32;
  int chunks = 1;  // 1, or 2 of a norm and 4 of a gate
  std::string text() const;
};
TokenPlan make_plan(const TokenProblem& problem);
void run(const TokenProblem& problem, const cuda::Device& device, cudaStream_t stream);

struct EmbedProblem {
  int64_t M = 0, D = 0;
  const int64_t* rows = nullptr;
  const void* embedding = nullptr;  // [V, D]
  cuda::Number dtype = cuda::Number::f32;
  float* state = nullptr;  // [M, D]
};
void run(const EmbedProblem& problem, const cuda::Device& device, cudaStream_t stream);

// --- heads --------------------------------------------------------------------------------------

// One layer of the cache: [2, B, kv_heads, T, head_dim · bits], and f16 grids [2, B, kv_heads, 2,
// T].
struct DeviceCache {
  Format format = Format::f32;
  int64_t sequences = 0, kv_heads = 0, slots = 0, head_dim = 0;
  uint8_t* data = nullptr;
  uint16_t* grids = nullptr;

  int64_t head_bytes() const { return slots * head_dim * format_bits(format) / 8; }
};

struct AppendProblem {
  int64_t M = 0, heads = 0;
  cuda::Number dtype = cuda::Number::f32;  // of qkv: f32 or bf16
  const void* qkv = nullptr;               // [M, (heads + 2 kv_heads) · head_dim]
  const int64_t* rows = nullptr;
  const float* rotation = nullptr;  // [positions, 2, head_dim / 2]
  const float* q_norm = nullptr;    // [head_dim] or null
  const float* k_norm = nullptr;
  float eps = 0.0f;
  DeviceCache cache;
  float* queries = nullptr;  // [M, heads, head_dim], times 1 / √head_dim
  float* own = nullptr;      // [2, M, kv_heads, head_dim]: the rows' keys, then values
};
void run(const AppendProblem& problem, const cuda::Device& device, cudaStream_t stream);

struct AttendProblem {
  int64_t M = 0, heads = 0, window = 0;
  // All rows are of one sequence, each in a slot, and there are many: blocks walk the cache alone,
  // and queries of neighbouring rows share it.
  bool prompt = false;
  const float* queries = nullptr;
  const float* own = nullptr;
  const int64_t* rows = nullptr;
  DeviceCache cache;
  int* counters = nullptr;  // [plan.counters], 0 before and after
  float* parts = nullptr;   // [plan.parts]
  void* out = nullptr;      // [M, heads, head_dim]
  cuda::Number out_dtype = cuda::Number::f32;
};

constexpr int kTileQueries = 4;  // that share each load of the cache
constexpr int kAttendWarps = 8;
// Slots of a split, one block of 16 a warp. A constant, and splits start at its multiples, so that
// the order of a row's sums depends on nothing else.
constexpr int kSplitSlots = kAttendWarps * kSlotBlock;

// tiles x kv_heads x splits blocks; a block whose slots no query of its tile sees leaves at once.
// The last of a tile's blocks to end adds up what they found, always in the order of the slots.
struct AttendPlan {
  int tiles = 0;
  int splits = 1;
  int64_t shared_bytes = 0;
  int64_t counters = 0, parts = 0;  // memory that the blocks of a tile meet in; none for one split
  std::string text() const;
};
AttendPlan make_plan(const AttendProblem& problem);
void run(const AttendProblem& problem, const AttendPlan& plan, const cuda::Device& device,
         cudaStream_t stream);
// A prompt over a bf16 cache with heads of 64 or 128 dimensions, on the tensor cores; false for any
// other problem, which run() then does without them.
bool run_prompt(const AttendProblem& problem, const cuda::Device& device, cudaStream_t stream);

// --- logits -------------------------------------------------------------------------------------

constexpr int64_t kLogitsOfBlock = 4096;

struct LogitsProblem {
  int64_t M = 0, V = 0;
  const void* y = nullptr;                 // [M, V], what the head gave
  cuda::Number dtype = cuda::Number::f32;  // of y: f32 or bf16
  float* logits = nullptr;                 // [M, V]: the same as f32
  int* counters = nullptr;                 // [M], 0 before and after
  void* parts = nullptr;                   // [M, splits_of] of 16 bytes
  int64_t* best = nullptr;                 // [M] first index of the largest
  float* share = nullptr;                  // [M] its probability
};
int64_t splits_of(const LogitsProblem& problem);
void run(const LogitsProblem& problem, const cuda::Device& device, cudaStream_t stream);

}  // namespace saltire::decoder_layer
