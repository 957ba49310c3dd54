// token_stats on a CUDA device: problem -> plan -> launch. Torch-free.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "core/cuda/device.h"
#include "token_stats/op.h"

namespace saltire::token_stats {

// What is known of the tokens before the pass; pointers are to device memory. A token whose label
// is out of range or whose temperature is not above 0 gets NaN: saying which would make every call
// wait for the device.
struct DeviceTokens {
  int64_t M = 0;
  const int64_t* labels = nullptr;     // [M] or null
  const float* temperature = nullptr;  // [1], or [M] with own_temperature
  bool own_temperature = false;
  int64_t ignore_index = -100;
  int64_t first = 0;       // vocabulary index of this part's first row
  int64_t vocabulary = 0;  // of all parts; 0: this part is all
  float softcap = 0;       // 0: none
};

struct DeviceStats {  // [M] each
  float* logprob = nullptr;
  float* entropy = nullptr;
  float* logsumexp = nullptr;
  float* max = nullptr;
  float* log_sum = nullptr;
  int64_t* argmax = nullptr;
};

// The saved statistics and the gradients of the outputs; [M] each, null for a gradient of zero.
struct DeviceGradients {
  const float* max = nullptr;
  const float* log_sum = nullptr;
  const float* entropy = nullptr;
  const float* d_logprob = nullptr;
  const float* d_entropy = nullptr;
  const float* d_lse = nullptr;
};

// --- from logits --------------------------------------------------------------------------------

struct RowsProblem {
  DeviceTokens tokens;
  const void* x = nullptr;  // [M, V]
  Dtype dtype = Dtype::f32;
  int64_t V = 0;
  void* dx = nullptr;  // [M, V] of dtype, for the gradient
};

// A block reads one row. vector: dx starts as far from a multiple of 16 bytes as x, so that both
// move in 16-byte pieces; rows themselves may start anywhere.
struct RowsPlan {
  int threads = 32;
  bool vector = true;

  std::string text() const;
};

RowsPlan make_plan(const RowsProblem& problem);
void stats_of_logits(const RowsProblem& problem, const DeviceStats& out, cudaStream_t stream);
void gradient_of_logits(const RowsProblem& problem, const DeviceGradients& gradients,
                        cudaStream_t stream);

// --- from hidden states and the head ------------------------------------------------------------

struct LinearProblem {
  DeviceTokens tokens;
  int64_t D = 0, V = 0;
  const void* hidden = nullptr;  // [M, D]
  const void* head = nullptr;    // [V, D]
  Dtype hidden_dtype = Dtype::f32, head_dtype = Dtype::f32;
  const float* bias = nullptr;  // [V] or null
};

// Where gradients go; null: nobody wants it.
struct DeviceLinearGradients {
  float* hidden = nullptr;  // [M, D]
  void* head = nullptr;     // [V, D] of head_dtype: summed over all tokens before it is rounded
  float* bias = nullptr;    // [V]
};

// floats: products in f32 by plain multiply-adds, for every mix of dtypes.
// mma:    bf16 mma.m16n8k16 tiles of 128 x 128, f32 sums; hidden and head bf16, D a multiple of 8.
// sm90:   the same by wgmma and TMA, tiles of 256 x 256 by clusters of two blocks.
enum class LinearRoute { floats, mma, sm90 };

// Forward: a block takes the tokens of one tile over one of `splits` ranges of the vocabulary and
// keeps their running sums; a second kernel joins the ranges in their order.
// Backward, chunk by chunk of the vocabulary: dx [M, chunk] into the workspace, then
// dh += dx·W and dW = dxᵀ·h.
struct LinearPlan {
  LinearRoute route = LinearRoute::floats;
  int rows = 64, columns = 64;  // of a tile
  int token_tiles = 0;
  int vocabulary_tiles = 0;
  int splits = 1;     // of the vocabulary, forward
  int64_t chunk = 0;  // vocabulary whose dx is held at once, backward
  size_t shared_bytes = 0;
  int slots = 1;              // blocks that run at one time
  int64_t forward_bytes = 0;  // of workspace
  int64_t backward_bytes = 0;

  std::string text() const;
};

LinearPlan make_plan(const LinearProblem& problem, const cuda::Device& device);
// The same by a route of the caller's choice; throws if it cannot do it.
LinearPlan make_plan(const LinearProblem& problem, const cuda::Device& device, LinearRoute route);

// workspace: plan.forward_bytes or plan.backward_bytes, 16-byte aligned.
void stats_of_linear(const LinearProblem& problem, const LinearPlan& plan, const DeviceStats& out,
                     void* workspace, cudaStream_t stream);
void gradient_of_linear(const LinearProblem& problem, const LinearPlan& plan,
                        const DeviceGradients& gradients, const DeviceLinearGradients& out,
                        void* workspace, cudaStream_t stream);

}  // namespace saltire::token_stats
