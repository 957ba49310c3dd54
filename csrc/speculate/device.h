// speculate on a CUDA device: problem -> plan -> launch. Torch-free.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "core/cuda/device.h"
#include "speculate/op.h"

namespace saltire::speculate {

struct WarpProblem {
  int64_t M = 0, V = 0;
  const float* logits = nullptr;  // [M, V]
  float* p = nullptr;             // [M, V]; NaN throughout a row that has no token to draw
  Warp warp;
};

// A block makes one row. in_shared: the row lies in shared memory between the passes, else in p.
struct WarpPlan {
  int threads = 32;
  bool in_shared = false;
  size_t shared_bytes = 0;

  std::string text() const;
};

WarpPlan make_plan(const WarpProblem& problem, const cuda::Device& device);
void warp(const WarpProblem& problem, const cuda::Device& device, cudaStream_t stream);

struct DrawProblem {
  int64_t M = 0, V = 0;
  const float* p = nullptr;            // [M, V]
  const int64_t* sequences = nullptr;  // [M]
  const int64_t* positions = nullptr;  // [M]
  uint64_t seed = 0;
  bool draft = false;
  int64_t* tokens = nullptr;  // [M]
};

void draw(const DrawProblem& problem, cudaStream_t stream);

// A sequence whose count or drafts are out of range gets -1 and -1: naming them would make the call
// wait for the device.
struct VerifyProblem {
  int64_t B = 0, S = 0, V = 0;         // sequences, drafts of all, vocabulary
  const float* p = nullptr;            // [S + B, V]
  const float* q = nullptr;            // [S, V] or null: certain drafts
  const int64_t* drafts = nullptr;     // [S]
  const int64_t* counts = nullptr;     // [B], S in all
  const int64_t* sequences = nullptr;  // [B]
  const int64_t* positions = nullptr;  // [B]
  uint64_t seed = 0;
  int64_t* accepted = nullptr;  // [B]
  int64_t* next = nullptr;      // [B]
};

void verify(const VerifyProblem& problem, cudaStream_t stream);

}  // namespace saltire::speculate
