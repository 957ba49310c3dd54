// Temperature, top-k, top-p and min-p: a block a row. Nothing is sorted: the k-th largest value,
// and the value down to which the mass is top_p, are found two bits of the float at a time, by sums
// over the row for three thresholds at once. Where the row fits, it stays in shared memory between
// the 15 passes of a search.
#include <cmath>

#include "core/check.h"
#include "core/cuda/launch.h"
#include "speculate/device.h"
#include "speculate/device_block.h"

namespace saltire::speculate {
namespace {

constexpr int kMostThreads = 1024;
constexpr float kLog2E = 1.44269504f;

constexpr int kFew = 1024;  // values that top-k may leave for a search of their own

struct Memory {
  BlockWords<double> sums;
  BlockWords<int> counts;
  BlockWords<float> most;
  BlockTriples<double> three_sums;
  BlockTriples<int> three_counts;
  float few[kFew];
};

// The row's values e = 2^((logit - largest)·log2(e)/T), the largest 1; `turn`s of the memory.
struct Row {
  float* e;
  int V;
  Memory* memory;
  int sums = 0, counts = 0, three_sums = 0, three_counts = 0;
};

SALTIRE_DEVICE double total(double own, Row& row) {
  return block_reduce<Add>(own, row.memory->sums, row.sums);
}
SALTIRE_DEVICE int total(int own, Row& row) {
  return block_reduce<Add>(own, row.memory->counts, row.counts);
}
SALTIRE_DEVICE void totals(double (&own)[3], Row& row) {
  block_sums(own, row.memory->three_sums, row.three_sums);
}
SALTIRE_DEVICE void totals(int (&own)[3], Row& row) {
  block_sums(own, row.memory->three_counts, row.three_counts);
}

// What a search sums: how many values there are, or their mass.
template <typename T>
SALTIRE_DEVICE T measure(float e) {
  if constexpr (sizeof(T) == sizeof(int)) return 1;
  return static_cast<T>(e);
}

// Sum of measure over the values that are at least `least`.
template <typename T>
SALTIRE_DEVICE T sum_from(float least, Row& row) {
  T own = 0;
  for (int i = thread_index(); i < row.V; i += static_cast<int>(blockDim.x)) {
    const float e = row.e[i];
    if (e >= least) own += measure<T>(e);
  }
  return total(own, row);
}

// The greatest value t for which the measure of all values >= t reaches `wanted`; 0 if none does.
// Values are in [0, 1], so their bits are below 2^30 and rise with them.
template <typename T>
SALTIRE_DEVICE float search(T wanted, Row& row) {
  uint32_t bits = 0;
  for (int shift = 28; shift >= 0; shift -= 2) {
    float least[3];
#pragma unroll
    for (int j = 0; j < 3; ++j) least[j] = float_of(bits | static_cast<uint32_t>(j + 1) << shift);
    T sums[3] = {};
    for (int i = thread_index(); i < row.V; i += static_cast<int>(blockDim.x)) {
      const float e = row.e[i];
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        if (e >= least[j]) sums[j] += measure<T>(e);
      }
    }
    totals(sums, row);
    uint32_t reached = 0;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      if (sums[j] >= wanted) reached = static_cast<uint32_t>(j + 1);
    }
    bits |= reached << shift;
  }
  return float_of(bits);
}

// Zeroes the values below `least`.
SALTIRE_DEVICE void drop_below(float least, const Row& row) {
  for (int i = thread_index(); i < row.V; i += static_cast<int>(blockDim.x)) {
    if (row.e[i] < least) row.e[i] = 0.0f;
  }
}

// act(i, n) for each i whose value is `wanted`'s, n of them before it. Each thread walks a stretch
// of its own, after learning how many lie before it.
template <typename Wanted, typename Act>
SALTIRE_DEVICE void number(Row& row, const Wanted& wanted, const Act& act) {
  const int each = (row.V + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int first = thread_index() * each, last = first + each < row.V ? first + each : row.V;
  int own = 0;
  for (int i = first; i < last; ++i) own += wanted(row.e[i]) ? 1 : 0;
  // Counts are far below 2^53.
  int before = static_cast<int>(sum_before(own, row.memory->sums, row.sums));
  for (int i = first; i < last; ++i) {
    if (wanted(row.e[i])) act(i, before++);
  }
}

// The fewest largest whose mass is top_p or more; of equal ones those with the lower index. count:
// of values above 0, where they may be few enough to be searched by themselves.
SALTIRE_DEVICE void keep_top_p(float top_p, int count, Row& row) {
  float* const all = row.e;
  const int V = row.V;
  if (count <= kFew) {
    float* const few = row.memory->few;
    number(row, [](float e) { return e > 0.0f; }, [&](int i, int n) { few[n] = all[i]; });
    row.e = few;
    row.V = count;
    sync_block();
  }
  const double wanted = static_cast<double>(top_p) * sum_from<double>(0.0f, row);
  const float least = search(wanted, row);
  const float next = float_of(bits_of(least) + 1);
  const int equal = sum_from<int>(least, row) - sum_from<int>(next, row);
  const double above = sum_from<double>(next, row);
  row.e = all;
  row.V = V;
  if (least == 0.0f) return;
  int needed = static_cast<int>(ceil((wanted - above) / static_cast<double>(least)));
  needed = needed < 1 ? 1 : needed;
  drop_below(least, row);
  sync_block();
  if (needed < equal) {
    number(
        row, [=](float e) { return e == least; },
        [&](int i, int n) {
          if (n >= needed) row.e[i] = 0.0f;
        });
  }
  sync_block();
}

__global__ void __launch_bounds__(kMostThreads, 1)
    warp_rows(const __grid_constant__ WarpProblem problem, bool in_shared) {
  auto& memory = *reinterpret_cast<Memory*>(shared_memory());
  const int64_t m = blockIdx.x;
  const int V = static_cast<int>(problem.V), threads = static_cast<int>(blockDim.x);
  const float* const logits = problem.logits + m * problem.V;
  float* const p = problem.p + m * problem.V;
  Row row = {in_shared ? reinterpret_cast<float*>(&memory + 1) : p, V, &memory};
  float most = -INFINITY;
  for (int i = thread_index(); i < V; i += threads) most = max_or_nan(most, logits[i]);
  // A NaN is greater than nothing: it must not be lost among the warps.
  int turn = 0;
  const int bad = total(most == most ? 0 : 1, row);
  most = block_reduce<Most>(most, memory.most, turn);
  if (bad != 0 || !(fabsf(most) < INFINITY)) {
    for (int i = thread_index(); i < V; i += threads) p[i] = float_of(0x7fc00000u);
    return;
  }
  const float factor = kLog2E / problem.warp.temperature;
  for (int i = thread_index(); i < V; i += threads) {
    row.e[i] = exp2_fast((logits[i] - most) * factor);
  }
  sync_block();
  const int64_t k = problem.warp.top_k;
  int count = kFew + 1;  // not known
  if (k > 0 && k < V) {
    const float least = search(static_cast<int>(k), row);
    count = sum_from<int>(least > 0.0f ? least : float_of(1u), row);
    drop_below(least, row);
    sync_block();
  }
  if (problem.warp.top_p < 1.0f) keep_top_p(problem.warp.top_p, count, row);
  const float least = problem.warp.min_p;
  const double factor_of_p = 1.0 / sum_from<double>(least, row);
  for (int i = thread_index(); i < V; i += threads) {
    const float e = row.e[i];
    p[i] = e < least ? 0.0f : static_cast<float>(static_cast<double>(e) * factor_of_p);
  }
}

}  // namespace

WarpPlan make_plan(const WarpProblem& problem, const cuda::Device& device) {
  WarpPlan plan;
  const int64_t wanted = (problem.V + 127) / 128 * 32;  // four values a thread at least
  plan.threads = static_cast<int>(wanted > kMostThreads ? kMostThreads : wanted);
  const auto with_row = static_cast<int64_t>(sizeof(Memory)) + 4 * problem.V;
  plan.in_shared = with_row <= device.shared_bytes;
  plan.shared_bytes = plan.in_shared ? static_cast<size_t>(with_row) : sizeof(Memory);
  return plan;
}

std::string WarpPlan::text() const {
  return "threads=" + std::to_string(threads) + (in_shared ? " shared" : " global") +
         " bytes=" + std::to_string(shared_bytes);
}

void warp(const WarpProblem& problem, const cuda::Device& device, cudaStream_t stream) {
  if (problem.M == 0) return;
  const WarpPlan plan = make_plan(problem, device);
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(problem.M));
  how.block = dim3(static_cast<unsigned>(plan.threads));
  how.shared_bytes = plan.shared_bytes;
  how.stream = stream;
  launch<warp_rows>("warp_logits", how, problem, plan.in_shared);
}

}  // namespace saltire::speculate
