// A block a row: five sums in one read of three rows, then the better row again, from L1 or L2.
// 15 rows of 576 floats are 69 kB: the launch is most of the time, so a block has few steps: at
// most four values of each row a thread up to D = 4,096.
#include "core/cuda/launch.h"
#include "core/cuda/ptx.h"
#include "skip_plan/device.h"

namespace saltire::skip_plan {
namespace {

using namespace saltire::cuda;

constexpr int kMostThreads = 1024;
constexpr int kSums = 5;  // keep·truth, keep², skip·truth, skip², truth²

struct Sums {
  float of[kSums];
};

SALTIRE_DEVICE void add(Sums& s, float keep, float skip, float truth) {
  s.of[0] = fmaf(keep, truth, s.of[0]);
  s.of[1] = fmaf(keep, keep, s.of[1]);
  s.of[2] = fmaf(skip, truth, s.of[2]);
  s.of[3] = fmaf(skip, skip, s.of[3]);
  s.of[4] = fmaf(truth, truth, s.of[4]);
}

// Over all threads, in one order.
SALTIRE_DEVICE void sum_block(Sums& s) {
  auto* const warps = reinterpret_cast<Sums*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) s.of[i] += shuffle_xor(s.of[i], mask);
  }
  if (thread % 32 == 0) warps[thread / 32] = s;
  sync_block();
  s = warps[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) s.of[i] += warps[w].of[i];
  }
}

SALTIRE_DEVICE float cosine(float dot, float squares, float truth_squares) {
  const float product = squares * truth_squares;
  return product > 0.0f ? dot / sqrtf(product) : 0.0f;
}

template <bool vector>
__global__ void __launch_bounds__(kMostThreads, 1)
    select_rows(const __grid_constant__ DeviceProblem p) {
  const int64_t m = blockIdx.x;
  const int D = static_cast<int>(p.D), threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const float* const keep = p.keep + m * p.D;
  const float* const skip = p.skip + m * p.D;
  float* const chosen = p.chosen + m * p.D;
  Sums s = {};
  wait_for_previous_kernel();
  if constexpr (vector) {
    for (int i = thread; i < D / 4; i += threads) {
      const float4 a = reinterpret_cast<const float4*>(keep)[i];
      const float4 b = reinterpret_cast<const float4*>(skip)[i];
      const float4 t = reinterpret_cast<const float4*>(p.truth)[i];
      add(s, a.x, b.x, t.x);
      add(s, a.y, b.y, t.y);
      add(s, a.z, b.z, t.z);
      add(s, a.w, b.w, t.w);
    }
  } else {
    for (int i = thread; i < D; i += threads) add(s, keep[i], skip[i], p.truth[i]);
  }
  let_next_kernel_start();
  sum_block(s);
  const float with = cosine(s.of[0], s.of[1], s.of[4]);
  const float without = cosine(s.of[2], s.of[3], s.of[4]);
  const bool kept = with > without;
  const float* const from = kept ? keep : skip;
  if constexpr (vector) {
    for (int i = thread; i < D / 4; i += threads) {
      reinterpret_cast<float4*>(chosen)[i] = reinterpret_cast<const float4*>(from)[i];
    }
  } else {
    for (int i = thread; i < D; i += threads) chosen[i] = from[i];
  }
  if (thread == 0) {
    p.kept[m] = kept ? 1 : 0;
    p.cosine[m] = kept ? with : without;
  }
}

}  // namespace

DevicePlan make_plan(const DeviceProblem& p) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  DevicePlan plan;
  plan.vector =
      p.D % 4 == 0 && aligned(p.keep) && aligned(p.skip) && aligned(p.truth) && aligned(p.chosen);
  const int64_t steps = plan.vector ? p.D / 4 : p.D, wanted = (steps + 31) / 32 * 32;
  plan.threads = static_cast<int>(wanted < 32 ? 32 : wanted > kMostThreads ? kMostThreads : wanted);
  return plan;
}

std::string DevicePlan::text() const {
  return "threads=" + std::to_string(threads) + (vector ? " vector" : " scalar");
}

void select(const DeviceProblem& p, cudaStream_t stream) {
  if (p.M == 0) return;
  const DevicePlan plan = make_plan(p);
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(p.M));
  how.block = dim3(static_cast<unsigned>(plan.threads));
  how.shared_bytes = kMostThreads / 32 * sizeof(Sums);
  how.stream = stream;
  if (plan.vector) {
    launch<select_rows<true>>("skip_plan_select", how, p);
  } else {
    launch<select_rows<false>>("skip_plan_select", how, p);
  }
}

}  // namespace saltire::skip_plan
