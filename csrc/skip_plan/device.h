// skip_plan on a CUDA device. Torch-free.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "skip_plan/op.h"

namespace saltire::skip_plan {

struct DeviceProblem {
  int64_t M = 0, D = 0;
  const float* keep = nullptr;   // [M, D]
  const float* skip = nullptr;   // [M, D]
  const float* truth = nullptr;  // [D]
  float* chosen = nullptr;       // [M, D]
  uint8_t* kept = nullptr;       // [M]
  float* cosine = nullptr;       // [M]
};

// A block chooses one row. vector: rows are read 16 bytes at a time.
struct DevicePlan {
  int threads = 32;
  bool vector = false;

  std::string text() const;
};

DevicePlan make_plan(const DeviceProblem& problem);
void select(const DeviceProblem& problem, cudaStream_t stream);

}  // namespace saltire::skip_plan
