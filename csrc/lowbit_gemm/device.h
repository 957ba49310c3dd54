// lowbit_gemm on a CUDA device: problem -> plan -> launch. Torch-free.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "core/cuda/device.h"
#include "lowbit_gemm/device_layout.h"

namespace saltire::lowbit_gemm {

struct DeviceProblem {
  DeviceLayout layout;
  int64_t M = 0;
  int act_bits = 8;
  const int8_t* x = nullptr;          // [M, K], 16-byte aligned
  const float* x_scale = nullptr;     // [M]
  const int32_t* x_sum = nullptr;     // [M, K / group]
  const uint8_t* w = nullptr;         // device_layout.h
  const float* bias = nullptr;        // [N] or null
  const float* low_rank_x = nullptr;  // [M, R] or null
  const float* low_rank_w = nullptr;  // [R, N]
  int64_t rank = 0;
  void* out = nullptr;  // [M, N] of out_type
  Float out_type = Float::f32;
};

// gemv:   dp4a; a block owns 16 rows, its warps share K. No workspace.
// mma:    mma.m16n8k32; blocks share the stream of (64 rows x 256 inputs) units evenly (stream-K),
//         and a second kernel adds up rows that several blocks worked on, always in one order.
// sm80:   mma tiles of 128 x 128, 4-bit where codes have at most 4 bits; before Hopper.
// sm90:   wgmma, weights from registers, x through TMA.
enum class Route { gemv, mma, sm80, sm90 };

struct DevicePlan {
  Route route = Route::mma;
  int tokens = 1;        // of a block
  int rows = 16;         // of a block (for mma: of a unit)
  int blocks = 1;        // in x; for mma: workers of the stream
  int token_blocks = 1;  // in y
  int threads = 256;
  bool four_bit_mma = false;
  bool fix_up = false;  // some rows are split over workers
  size_t shared_bytes = 0;
  int64_t workspace_bytes = 0;

  std::string text() const;
};

DevicePlan make_plan(const DeviceProblem& problem, const cuda::Device& device);
// The same by a route of the caller's choice, for benches and tests; throws if it cannot do it.
DevicePlan make_plan(const DeviceProblem& problem, const cuda::Device& device, Route route);

// workspace: plan.workspace_bytes, 16-byte aligned.
void run(const DeviceProblem& problem, const DevicePlan& plan, const cuda::Device& device,
         void* workspace, cudaStream_t stream);

// Checkpoint layout <-> device layout; scale and zero [N, K / group] of layout.table.
void prepack(const DeviceLayout& layout, const uint8_t* packed, const void* scale, const void* zero,
             uint8_t* w, cudaStream_t stream);
void unprepack(const DeviceLayout& layout, const uint8_t* w, uint8_t* packed, void* scale,
               void* zero, cudaStream_t stream);

// Kernels that not every architecture has enter themselves here when the library is loaded; null
// where their file was not built.
struct Task;
using Prefill = void (*)(const Task&, const DevicePlan&, const cuda::Device&, cudaStream_t);
struct Prefills {
  Prefill sm80 = nullptr;
  Prefill sm90 = nullptr;
};
Prefills& prefills();

}  // namespace saltire::lowbit_gemm
