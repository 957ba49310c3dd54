// One block a token, one pass: load, diagonal, Hadamard, dense factors, range, round, sum.
// The same f32 operations in the same order as the CPU's paths, so the codes are the same bits.
#include <cmath>
#include <cstring>

#include "core/check.h"
#include "core/cuda/launch.h"
#include "core/cuda/ptx.h"
#include "core/cuda/token_codes.h"
#include "transform_quantize/device.h"

namespace saltire::transform_quantize {
namespace {

using namespace saltire::cuda;

constexpr int kMostThreads = 1024;

// What the kernel needs of the problem, with 32-bit sizes (a token has fewer than 2^31 values).
struct Task {
  const void* x;
  const float* diag;
  const float* left;
  const float* right;
  float* y;
  int8_t* codes;
  float* scale;
  int32_t* sums;
  int K, A, B, hadamard;
  float norm;  // 1 / √B
  int Q;
  float clip_over_q;
  int sum_group;
};

// --- Hadamard -----------------------------------------------------------------------------------

// 2^stages values a thread, h apart: `stages` stages at once, so that shared memory is read and
// written once for all of them.
template <int stages>
SALTIRE_DEVICE void rotate_shared(float* token, int K, int h) {
  constexpr int kPoints = 1 << stages;
  for (int j = static_cast<int>(threadIdx.x); j < K / kPoints; j += static_cast<int>(blockDim.x)) {
    float* const at = token + j / h * (h * kPoints) + j % h;
    float v[kPoints];
#pragma unroll
    for (int i = 0; i < kPoints; ++i) v[i] = at[i * h];
#pragma unroll
    for (int s = 1; s < kPoints; s *= 2) {
#pragma unroll
      for (int i = 0; i < kPoints; ++i) {
        if ((i & s) == 0) {
          const float a = v[i], b = v[i + s];
          v[i] = a + b;
          v[i + s] = a - b;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPoints; ++i) at[i * h] = v[i];
  }
  sync_block();
}

// The stages from h to B / 2, four at a time.
SALTIRE_DEVICE void rotate_shared_from(float* token, int K, int h, int B) {
  while (h < B) {
    if (8 * h < B) {
      rotate_shared<4>(token, K, h);
      h *= 16;
    } else if (2 * h < B) {
      rotate_shared<2>(token, K, h);
      h *= 4;
    } else {
      rotate_shared<1>(token, K, h);
      h *= 2;
    }
  }
}

// --- dense factors ------------------------------------------------------------------------------

// out[i, j] = Σ_k p(i, k) · q[k, j], p(i, k) = p[i · row + k · depth_step]. A thread computes 8
// rows of a column, so that one load of q serves 8 sums.
SALTIRE_DEVICE void multiply(const float* p, int row, int depth_step, const float* q, float* out,
                             int rows, int depth, int cols) {
  constexpr int kRows = 8;
  const int tasks = (rows + kRows - 1) / kRows * cols;
  for (int j = static_cast<int>(threadIdx.x); j < tasks; j += static_cast<int>(blockDim.x)) {
    const int first = j / cols * kRows, col = j % cols;
    const int count = rows - first < kRows ? rows - first : kRows;
    float sum[kRows] = {};
    for (int k = 0; k < depth; ++k) {
      const float value = q[k * cols + col];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i < count) sum[i] = fmaf(p[(first + i) * row + k * depth_step], value, sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i < count) out[(first + i) * cols + col] = sum[i];
    }
  }
  sync_block();
}

// --- kernels ------------------------------------------------------------------------------------

template <typename T, int chunks>
__global__ void __launch_bounds__(kMostThreads)
    transform_in_registers(const __grid_constant__ Task task) {
  auto* const warps = reinterpret_cast<uint32_t*>(shared_memory());
  const int64_t token = blockIdx.x;
  const int K = task.K, threads = static_cast<int>(blockDim.x);
  const T* const x = static_cast<const T*>(task.x) + token * K;
  wait_for_previous_kernel();
  if (task.y == nullptr) clear_sums(task.sums + token * (K / task.sum_group), K, task.sum_group);
  float v[chunks][kRun] = {};
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int at = (c * threads + static_cast<int>(threadIdx.x)) * kRun;
    if (at < K) load_run(x + at, v[c]);
  }
  let_next_kernel_start();
  const uint32_t largest = transform_runs(task, v);
  if (task.y != nullptr) {
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int at = (c * threads + static_cast<int>(threadIdx.x)) * kRun;
      if (at >= K) break;
      auto* const to = reinterpret_cast<float4*>(task.y + token * K + at);
      to[0] = make_float4(v[c][0], v[c][1], v[c][2], v[c][3]);
      to[1] = make_float4(v[c][4], v[c][5], v[c][6], v[c][7]);
    }
    return;
  }
  round_runs(task, token, largest, v, warps);
}

// Loads the token as floats, with the diagonal and, where 16-byte loads are possible, the
// Hadamard's stages up to 256. Returns the first stage not yet done.
template <typename T, bool vector>
SALTIRE_DEVICE int load_token(const Task& task, const T* x, float* token) {
  const int K = task.K, threads = static_cast<int>(blockDim.x), i = static_cast<int>(threadIdx.x);
  if constexpr (vector) {
    const int padded = (K + kWarpRun - 1) / kWarpRun * kWarpRun;  // whole warps reach the shuffles
    for (int at = i * kRun; at < padded; at += threads * kRun) {
      float v[kRun] = {};
      if (at < K) load_run(x + at, v);
      if (at < K && task.diag != nullptr) scale_run(task.diag + at, v);
      rotate_run(v, task.hadamard, i % 32);
      if (at < K) {
        auto* const to = reinterpret_cast<float4*>(token + at);
        to[0] = make_float4(v[0], v[1], v[2], v[3]);
        to[1] = make_float4(v[4], v[5], v[6], v[7]);
      }
    }
    sync_block();
    return kWarpRun;
  } else {
    for (int at = i; at < K; at += threads) {
      token[at] = to_f32(x[at]) * (task.diag != nullptr ? task.diag[at] : 1.0f);
    }
    sync_block();
    return 1;
  }
}

template <typename T, bool vector>
__global__ void __launch_bounds__(kMostThreads)
    transform_in_shared(const __grid_constant__ Task task) {
  auto* const warps = reinterpret_cast<uint32_t*>(shared_memory());
  auto* now = reinterpret_cast<float*>(warps + 32);
  float* other = now + (task.K + 3) / 4 * 4;
  const int64_t row = blockIdx.x;
  const int K = task.K, threads = static_cast<int>(blockDim.x), i = static_cast<int>(threadIdx.x);
  wait_for_previous_kernel();
  const int stage = load_token<T, vector>(task, static_cast<const T*>(task.x) + row * K, now);
  let_next_kernel_start();
  if (task.right != nullptr) {
    multiply(now, task.B, 1, task.right, other, task.A, task.B, task.B);
    float* const swap = now;
    now = other;
    other = swap;
  } else if (task.hadamard > 1) {
    rotate_shared_from(now, K, stage, task.hadamard);
    for (int k = i; k < K; k += threads) now[k] *= task.norm;
    sync_block();
  }
  if (task.left != nullptr) {
    multiply(task.left, 1, task.A, now, other, task.A, task.A, task.B);
    now = other;
  }
  if (task.y != nullptr) {
    for (int k = i; k < K; k += threads) task.y[row * K + k] = now[k];
    return;
  }
  uint32_t largest = 0;
  for (int k = i; k < K; k += threads) {
    const uint32_t m = magnitude(now[k]);
    largest = m > largest ? m : largest;
  }
  float scale;
  const float inverse = choose_scale(block_max(largest, warps), task.clip_over_q, &scale);
  if (i == 0) task.scale[row] = scale;
  for (int k = i; k < K; k += threads) {
    task.codes[row * K + k] = static_cast<int8_t>(round_code(now[k], inverse, task.Q));
  }
  // A warp sums a group: its lanes read neighbouring values, and no two warps share a sum.
  const int group = task.sum_group;
  for (int g = i / 32; g < K / group; g += threads / 32) {
    int32_t sum = 0;
    for (int k = i % 32; k < group; k += 32) sum += round_code(now[g * group + k], inverse, task.Q);
    sum = warp_sum(sum);
    if (i % 32 == 0) task.sums[row * (K / group) + g] = sum;
  }
}

template <typename T>
void run_as(const Task& task, const DevicePlan& plan, const Launch& how) {
  if (!plan.in_registers) {
    if (plan.vector) {
      launch<transform_in_shared<T, true>>("transform_in_shared", how, task);
    } else {
      launch<transform_in_shared<T, false>>("transform_in_shared", how, task);
    }
  } else if (plan.chunks == 1) {
    launch<transform_in_registers<T, 1>>("transform_in_registers", how, task);
  } else if (plan.chunks == 2) {
    launch<transform_in_registers<T, 2>>("transform_in_registers", how, task);
  } else {
    launch<transform_in_registers<T, 4>>("transform_in_registers", how, task);
  }
}

int round_up(int64_t value, int64_t multiple) {
  return static_cast<int>((value + multiple - 1) / multiple * multiple);
}

}  // namespace

DevicePlan make_plan(const DeviceProblem& p, const cuda::Device& device) {
  constexpr int64_t kWantedThreads = 256;  // several blocks an SM, so that their waits overlap
  constexpr size_t kWarpWords = 32 * sizeof(uint32_t);
  const Transform& t = p.transform;
  const bool dense = t.left != nullptr || t.right != nullptr;
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  DevicePlan plan;
  plan.vector = t.K % kRun == 0 && aligned(p.x) && aligned(t.diag) && aligned(p.y);
  const int64_t runs = t.K / kRun;
  plan.chunks = runs <= kWantedThreads ? 1 : runs <= 2 * kWantedThreads ? 2 : 4;
  plan.threads = round_up((runs + plan.chunks - 1) / plan.chunks, 32);
  plan.in_registers = plan.vector && !dense && t.hadamard <= kWarpRun &&
                      plan.threads <= kMostThreads &&
                      (p.y != nullptr || p.rounding.sum_group % kRun == 0);
  plan.shared_bytes = kWarpWords;
  if (!plan.in_registers) {
    plan.chunks = 1;
    plan.threads = static_cast<int>(round_up(t.K < 8 * 1024 ? (t.K + 31) / 32 * 8 : 1024, 32));
    plan.shared_bytes += static_cast<size_t>(round_up(t.K, 4)) * sizeof(float) * (dense ? 2 : 1);
  }
  SALTIRE_CHECK(plan.shared_bytes <= static_cast<size_t>(device.shared_bytes),
                "transform_quantize: K = ", t.K, " takes ", plan.shared_bytes,
                " bytes of shared memory; this device has ", device.shared_bytes,
                ". Use a Hadamard of at most ", kWarpRun, " without dense factors, or the CPU.");
  return plan;
}

std::string DevicePlan::text() const {
  return std::string(in_registers ? "registers" : "shared") + (vector ? " vector" : " scalar") +
         " threads=" + std::to_string(threads) + " chunks=" + std::to_string(chunks) +
         " shared=" + std::to_string(shared_bytes);
}

void run(const DeviceProblem& p, const cuda::Device& device, cudaStream_t stream) {
  if (p.M == 0) return;
  const DevicePlan plan = make_plan(p, device);
  const Transform& t = p.transform;
  Task task = {};
  task.x = p.x;
  task.diag = t.diag;
  task.left = t.left;
  task.right = t.right;
  task.y = p.y;
  task.codes = p.codes;
  task.scale = p.scale;
  task.sums = p.sums;
  task.K = static_cast<int>(t.K);
  task.A = static_cast<int>(t.A);
  task.B = static_cast<int>(t.B);
  task.hadamard = static_cast<int>(t.hadamard);
  task.norm = 1.0f / std::sqrt(static_cast<float>(t.B));
  task.Q = p.rounding.Q;
  task.clip_over_q = p.rounding.clip_over_q;
  task.sum_group = p.y != nullptr ? task.K : static_cast<int>(p.rounding.sum_group);
  Launch how;
  how.grid = dim3(static_cast<unsigned>(p.M));
  how.block = dim3(static_cast<unsigned>(plan.threads));
  how.shared_bytes = plan.shared_bytes;
  how.stream = stream;
  how.overlap_previous = device.sm >= 90;
  if (p.dtype == Dtype::f32) run_as<float>(task, plan, how);
  if (p.dtype == Dtype::bf16) run_as<bf16>(task, plan, how);
  if (p.dtype == Dtype::f16) run_as<f16>(task, plan, how);
}

}  // namespace saltire::transform_quantize
