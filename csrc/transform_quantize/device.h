// transform_quantize on a CUDA device: problem -> plan -> launch. Torch-free.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "core/cuda/device.h"
#include "transform_quantize/op.h"

namespace saltire::transform_quantize {

struct DeviceProblem {
  int64_t M = 0;
  Transform transform = {};
  Dtype dtype = Dtype::f32;
  const void* x = nullptr;  // [M, K]
  float* y = nullptr;       // [M, K]: the transform alone, unrounded; null: codes, scale and sums
  Rounding rounding = {};
  int8_t* codes = nullptr;  // [M, K]
  float* scale = nullptr;   // [M]
  int32_t* sums = nullptr;  // [M, K / sum_group]
};

// A block rotates and rounds one token.
//   registers: a thread holds `chunks` runs of 8 values; nothing but sums crosses shared memory.
//              For Hadamard blocks up to 256 = 8 values x 32 lanes, without dense factors.
//   shared:    the token lies in shared memory as floats, twice where there is a dense factor.
struct DevicePlan {
  bool in_registers = false;
  bool vector = false;  // 16-byte loads: K and the row starts allow them
  int chunks = 1;       // 1, 2 or 4
  int threads = 32;
  size_t shared_bytes = 0;

  std::string text() const;
};

// Throws if a token does not fit into the device's shared memory.
DevicePlan make_plan(const DeviceProblem& problem, const cuda::Device& device);

void run(const DeviceProblem& problem, const cuda::Device& device, cudaStream_t stream);

}  // namespace saltire::transform_quantize
