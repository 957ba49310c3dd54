// The first largest logit of each row and its probability, in one read; logits become f32 on the
// way.
#include "core/cuda/launch.h"
#include "core/cuda/ptx.h"
#include "decoder_layer/device.h"

namespace saltire::decoder_layer {
namespace {

using namespace saltire::cuda;

constexpr int kThreads = 256;
constexpr int kEach = static_cast<int>(kLogitsOfBlock) / kThreads;
constexpr float kLog2E = 1.44269504f;

struct Found {
  float value;
  int index;
};

SALTIRE_DEVICE Found better(Found a, Found b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

SALTIRE_DEVICE Found warp_best(Found mine) {
  for (int mask = 16; mask > 0; mask /= 2) {
    mine = better(mine, {shuffle_xor(mine.value, mask), shuffle_xor(mine.index, mask)});
  }
  return mine;
}

struct Task {
  const void* y;
  float* logits;
  int* counters;  // [M]
  float4* parts;  // [M, splits]: value, Σ e^(logit - value), index
  int64_t* best;
  float* share;
  int V;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) best_logits(const __grid_constant__ Task task) {
  constexpr int kWarps = kThreads / 32;
  auto* const found = reinterpret_cast<Found*>(shared_memory());
  auto* const sums = reinterpret_cast<float*>(found + kWarps);
  auto* const flag = reinterpret_cast<int*>(sums + kWarps);
  const int i = static_cast<int>(threadIdx.x), lane = i % 32, warp = i / 32;
  const int first = static_cast<int>(blockIdx.x) * kThreads * kEach;
  const int64_t m = blockIdx.y, row = m * task.V;
  wait_for_previous_kernel();
  let_next_kernel_start();
  float x[kEach];
  Found mine = {-INFINITY, first};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int at = first + j * kThreads + i;
    x[j] = -INFINITY;
    if (at >= task.V) continue;
    x[j] = to_f32(static_cast<const T*>(task.y)[row + at]);
    task.logits[row + at] = x[j];
    if (x[j] > mine.value) mine = {x[j], at};
  }
  mine = warp_best(mine);
  if (lane == 0) found[warp] = mine;
  sync_block();
  mine = found[0];
  for (int w = 1; w < kWarps; ++w) mine = better(mine, found[w]);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (x[j] != -INFINITY) sum += exp2_fast((x[j] - mine.value) * kLog2E);
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0) sums[warp] = sum;
  sync_block();
  const int splits = static_cast<int>(gridDim.x);
  float4* const parts = task.parts + m * splits;
  if (i == 0) {
    for (int w = 1; w < kWarps; ++w) sum += sums[w];
    parts[blockIdx.x] =
        make_float4(mine.value, sum, float_of(static_cast<uint32_t>(mine.index)), 0.0f);
    *flag = add_and_see(task.counters + m, 1) == splits - 1 ? 1 : 0;
  }
  sync_block();
  if (*flag == 0 || i != 0) return;
  Found all = {-INFINITY, 0};
  for (int s = 0; s < splits; ++s) {
    all = better(all, {parts[s].x, static_cast<int>(bits_of(parts[s].z))});
  }
  float total = 0.0f;
  for (int s = 0; s < splits; ++s) {
    if (parts[s].x != -INFINITY) {
      total = fmaf(parts[s].y, exp2_fast((parts[s].x - all.value) * kLog2E), total);
    }
  }
  task.best[m] = all.index;
  task.share[m] = 1.0f / total;
  task.counters[m] = 0;  // as the next launch expects it
}

}  // namespace

int64_t splits_of(const LogitsProblem& p) {
  return (p.V + kLogitsOfBlock - 1) / kLogitsOfBlock;
}

void run(const LogitsProblem& p, const Device& device, cudaStream_t stream) {
  if (p.M == 0) return;
  Task task = {};
  task.y = p.y;
  task.logits = p.logits;
  task.counters = p.counters;
  task.parts = static_cast<float4*>(p.parts);
  task.best = p.best;
  task.share = p.share;
  task.V = static_cast<int>(p.V);
  Launch how;
  how.grid = dim3(static_cast<unsigned>(splits_of(p)), static_cast<unsigned>(p.M));
  how.block = dim3(kThreads);
  how.shared_bytes = kThreads / 32 * (sizeof(Found) + sizeof(float)) + sizeof(int);
  how.stream = stream;
  how.overlap_previous = device.sm >= 90;
  if (p.dtype == Number::f32) {
    launch<best_logits<float>>("best_logits", how, task);
  } else {
    launch<best_logits<bf16>>("best_logits", how, task);
  }
}

}  // namespace saltire::decoder_layer
