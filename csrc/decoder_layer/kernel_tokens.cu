// What happens to whole tokens between two products: residual sum, norm, gate, and their codes.
#include <cmath>

#include "core/check.h"
#include "core/cuda/launch.h"
#include "core/cuda/token_codes.h"
#include "decoder_layer/device.h"

namespace saltire::decoder_layer {
namespace {

using namespace saltire::cuda;

constexpr int kMostThreads = 1024;
// Runs of a thread: a norm needs registers for the residual beside them.
constexpr int most_chunks(bool gated) {
  return gated ? 4 : 2;
}
constexpr int kEmbedThreads = 128;

struct Task {
  float* state;
  const void* delta;
  const float* gain;
  float* trace;
  const void* gate_up;
  const float* diag;
  void* y;
  int8_t* codes;
  float* scale;
  int32_t* sums;
  float eps;
  int K, hadamard;
  float norm;  // 1 / √hadamard
  int Q;
  float clip_over_q;
  int sum_group;
};

// --- runs of 8 values ---------------------------------------------------------------------------

// What this kernel itself writes must not be read past the L1: plain loads.
SALTIRE_DEVICE void read_run(const float* from, float (&v)[kRun]) {
  const float4 low = *reinterpret_cast<const float4*>(from);
  const float4 high = *reinterpret_cast<const float4*>(from + 4);
  const float w[kRun] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  for (int i = 0; i < kRun; ++i) v[i] = w[i];
}

SALTIRE_DEVICE void store_run(float* to, const float (&v)[kRun]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

SALTIRE_DEVICE void store_run(bf16* to, const float (&v)[kRun]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                                             pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// The sum of all threads' values, in one order whatever the block; `words` is 32 of shared memory.
SALTIRE_DEVICE float block_sum(float value, float* words) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) words[threadIdx.x / 32] = value;
  sync_block();
  value = lane < static_cast<int>(blockDim.x) / 32 ? words[lane] : 0.0f;
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// --- sources ------------------------------------------------------------------------------------

template <typename T, int chunks>
SALTIRE_DEVICE void load_residual(const Task& task, int64_t token, float* words,
                                  float (&v)[chunks][kRun]) {
  const int K = task.K, threads = static_cast<int>(blockDim.x);
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int at = (c * threads + static_cast<int>(threadIdx.x)) * kRun;
    if (at >= K) continue;
    float* const state = task.state + token * K + at;
    read_run(state, v[c]);
    if (task.delta != nullptr) {
      float more[kRun];
      load_run(static_cast<const T*>(task.delta) + token * K + at, more);
#pragma unroll
      for (int i = 0; i < kRun; ++i) v[c][i] += more[i];
      store_run(state, v[c]);
    }
    if (task.trace != nullptr) store_run(task.trace + token * K + at, v[c]);
#pragma unroll
    for (int i = 0; i < kRun; ++i) squares = fmaf(v[c][i], v[c][i], squares);
  }
  const float mean = block_sum(squares, words) / static_cast<float>(K);
  const float factor = 1.0f / sqrtf(mean + task.eps);
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int at = (c * threads + static_cast<int>(threadIdx.x)) * kRun;
    if (at >= K) continue;
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[c][i] *= factor;
    scale_run(task.gain + at, v[c]);
  }
}

template <typename T, int chunks>
SALTIRE_DEVICE void load_gated(const Task& task, int64_t token, float (&v)[chunks][kRun]) {
  const int K = task.K, threads = static_cast<int>(blockDim.x);
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int at = (c * threads + static_cast<int>(threadIdx.x)) * kRun;
    if (at >= K) continue;
    const T* const gate = static_cast<const T*>(task.gate_up) + token * 2 * K + at;
    float up[kRun];
    load_run(gate, v[c]);
    load_run(gate + K, up);
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[c][i] = v[c][i] / (1.0f + expf(-v[c][i])) * up[i];
  }
}

// --- kernels ------------------------------------------------------------------------------------

template <bool gated, typename T, int chunks>
__global__ void __launch_bounds__(kMostThreads) prepare(const __grid_constant__ Task task) {
  auto* const words = reinterpret_cast<uint32_t*>(shared_memory());  // 32 for each of two sums
  const int64_t token = blockIdx.x;
  const int K = task.K, threads = static_cast<int>(blockDim.x);
  wait_for_previous_kernel();
  if (task.Q != 0) clear_sums(task.sums + token * (K / task.sum_group), K, task.sum_group);
  float v[chunks][kRun] = {};
  if constexpr (gated) {
    load_gated<T, chunks>(task, token, v);
  } else {
    load_residual<T, chunks>(task, token, reinterpret_cast<float*>(words + 32), v);
  }
  let_next_kernel_start();
  if (task.Q == 0) {
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int at = (c * threads + static_cast<int>(threadIdx.x)) * kRun;
      if (at < K) store_run(static_cast<T*>(task.y) + token * K + at, v[c]);
    }
    return;
  }
  const uint32_t largest = transform_runs(task, v);
  round_runs(task, token, largest, v, words);
}

template <typename T>
__global__ void __launch_bounds__(kEmbedThreads)
    embed(const int64_t* rows, const T* embedding, float* state, int D) {
  wait_for_previous_kernel();
  const int64_t token = rows[static_cast<int64_t>(blockIdx.x) * kRowColumns + kToken];
  const T* const from = embedding + token * D;
  float* const to = state + static_cast<int64_t>(blockIdx.x) * D;
  for (int i = static_cast<int>(threadIdx.x); i < D; i += kEmbedThreads) to[i] = to_f32(from[i]);
}

template <bool gated, typename T>
void run_as(const Task& task, const TokenPlan& plan, const Launch& how) {
  const char* name = gated ? "swiglu" : "residual_norm";
  if (plan.chunks == 1) {
    launch<prepare<gated, T, 1>>(name, how, task);
  } else {
    launch<prepare<gated, T, most_chunks(gated)>>(name, how, task);
  }
}

}  // namespace

TokenPlan make_plan(const TokenProblem& p) {
  const bool gated = p.state == nullptr;
  const int most = kRun * kMostThreads * most_chunks(gated);
  SALTIRE_CHECK(p.K % kRun == 0 && p.K <= most, gated ? "swiglu" : "residual_norm", ": tokens of ",
                p.K, " values; expected a multiple of ", kRun, " up to ", most, ".");
  const int64_t runs = p.K / kRun;
  TokenPlan plan;
  plan.chunks = runs <= kMostThreads ? 1 : most_chunks(gated);
  plan.threads = static_cast<int>(round_up((runs + plan.chunks - 1) / plan.chunks, 32));
  return plan;
}

std::string TokenPlan::text() const {
  return "threads=" + std::to_string(threads) + " chunks=" + std::to_string(chunks);
}

void run(const TokenProblem& p, const Device& device, cudaStream_t stream) {
  if (p.M == 0) return;
  const TokenPlan plan = make_plan(p);
  const DeviceRounding& r = p.rounding;
  Task task = {};
  task.state = p.state;
  task.delta = p.delta;
  task.gain = p.gain;
  task.trace = p.trace;
  task.gate_up = p.gate_up;
  task.diag = r.diag;
  task.y = p.y;
  task.codes = r.codes;
  task.scale = r.scale;
  task.sums = r.sums;
  task.eps = p.eps;
  task.K = static_cast<int>(p.K);
  task.hadamard = r.hadamard;
  task.norm = 1.0f / std::sqrt(static_cast<float>(r.hadamard));
  task.Q = r.Q;
  task.clip_over_q = r.clip_over_q;
  task.sum_group = r.Q == 0 ? task.K : static_cast<int>(r.sum_group);
  Launch how;
  how.grid = dim3(static_cast<unsigned>(p.M));
  how.block = dim3(static_cast<unsigned>(plan.threads));
  how.shared_bytes = 2 * 32 * sizeof(uint32_t);
  how.stream = stream;
  how.overlap_previous = device.sm >= 90;
  const bool gated = p.state == nullptr, wide = p.dtype == Number::f32;
  if (gated && wide) run_as<true, float>(task, plan, how);
  if (gated && !wide) run_as<true, bf16>(task, plan, how);
  if (!gated && wide) run_as<false, float>(task, plan, how);
  if (!gated && !wide) run_as<false, bf16>(task, plan, how);
}

void run(const EmbedProblem& p, const Device& device, cudaStream_t stream) {
  if (p.M == 0) return;
  Launch how;
  how.grid = dim3(static_cast<unsigned>(p.M));
  how.block = dim3(kEmbedThreads);
  how.stream = stream;
  how.overlap_previous = device.sm >= 90;
  const int D = static_cast<int>(p.D);
  if (p.dtype == Number::f32) {
    launch<embed<float>>("embed", how, p.rows, static_cast<const float*>(p.embedding), p.state, D);
  } else if (p.dtype == Number::bf16) {
    launch<embed<bf16>>("embed", how, p.rows, static_cast<const bf16*>(p.embedding), p.state, D);
  } else {
    launch<embed<f16>>("embed", how, p.rows, static_cast<const f16*>(p.embedding), p.state, D);
  }
}

}  // namespace saltire::decoder_layer
