// Draws and acceptance: a block a row or a sequence. The weights are summed in double, as on the
// CPU but in another order, so that a draw is the CPU's unless u falls within some 1e-13 of a
// token's edge; acceptance compares the same two numbers as the CPU and is always its.
#include <climits>

#include "core/cuda/launch.h"
#include "speculate/device.h"
#include "speculate/device_block.h"
#include "speculate/draw.h"

namespace saltire::speculate {
namespace {

constexpr int kThreads = 1024;

struct Memory {
  BlockWords<double> sums;
  BlockWords<int> indices;
};

// Each warp sums a range of the weights; then the whole block searches the range where the running
// sum passes u times the total.
template <typename Weight>
SALTIRE_DEVICE int draw_block(int V, double u, const Weight& weight, Memory& memory) {
  const int thread = thread_index(), lane = thread % 32, warps = warp_count();
  int sums_turn = 0, indices_turn = 0;
  const int length = (V + warps * 32 - 1) / (warps * 32) * 32;
  const int first = thread / 32 * length, last = first + length < V ? first + length : V;
  double own = 0.0;
#pragma unroll 4
  for (int i = first + lane; i < last; i += 32) own += weight(i);
  own = warp_reduce<Add>(own);
  double* const totals = memory.sums.words[sums_turn];
  sums_turn ^= 1;
  if (lane == 0) totals[thread / 32] = own;
  sync_block();
  double total = 0.0;
  for (int w = 0; w < warps; ++w) total += totals[w];
  const double wanted = u * total;
  // The first range at whose end the sum has passed; if rounding leaves none, the last with weight.
  int range = -1;
  double before = 0.0, start = 0.0, sum = 0.0;
  bool passed = false;
  for (int w = 0; w < warps && !passed; ++w) {
    before = sum;
    sum += totals[w];
    if (!(totals[w] > 0.0)) continue;
    range = w;
    start = before;
    passed = sum > wanted;
  }
  if (range < 0) return 0;
  const int begin = range * length, end = begin + length < V ? begin + length : V;
  const int each = (length + kThreads - 1) / kThreads;
  const int mine = begin + thread * each;
  const int stop = mine + each < end ? mine + each : end;
  double here = 0.0;
  for (int i = mine; i < stop; ++i) here += weight(i);
  double running = start + sum_before(here, memory.sums, sums_turn);
  int found = INT_MAX, positive = -1;
  for (int i = mine; i < stop; ++i) {
    const double w = weight(i);
    if (!(w > 0.0)) continue;
    running += w;
    positive = i;
    if (running > wanted && found == INT_MAX) found = i;
  }
  found = block_reduce<Least>(found, memory.indices, indices_turn);
  positive = block_reduce<Most>(positive, memory.indices, indices_turn);
  return found != INT_MAX ? found : positive;
}

__global__ void __launch_bounds__(kThreads, 1)
    draw_rows(const __grid_constant__ DrawProblem problem) {
  auto& memory = *reinterpret_cast<Memory*>(shared_memory());
  const int64_t m = blockIdx.x;
  const float* const row = problem.p + m * problem.V;
  const double u = uniform(problem.seed, static_cast<uint64_t>(problem.sequences[m]),
                           static_cast<uint64_t>(problem.positions[m]),
                           problem.draft ? Purpose::draft : Purpose::plain);
  const auto weight = [row](int i) { return static_cast<double>(row[i]); };
  const int token = draw_block(static_cast<int>(problem.V), u, weight, memory);
  if (threadIdx.x == 0) problem.tokens[m] = token;
}

// Drafts of the sequences before b, and whether b's own are all there.
struct Drafts {
  int64_t first;
  int count;
  bool good;
};

SALTIRE_DEVICE Drafts drafts_of(const VerifyProblem& p, int64_t b, Memory& memory) {
  int turn = 0;
  // Sums of int64 that are not below 2^53 would be refused by the next line anyway.
  double before = 0.0;
  int bad = 0;
  for (int64_t i = thread_index(); i < b; i += kThreads) {
    const int64_t count = p.counts[i];
    if (count < 0) bad = 1;
    before += static_cast<double>(count);
  }
  before = block_reduce<Add>(before, memory.sums, turn);
  const int64_t count = p.counts[b];
  const double end = before + static_cast<double>(count);
  turn = 0;
  bad = block_reduce<Most>(bad, memory.indices, turn);
  const bool there = count >= 0 && bad == 0 && end <= static_cast<double>(p.S) &&
                     (b + 1 < p.B || end == static_cast<double>(p.S));
  if (!there) return {0, 0, false};
  const auto first = static_cast<int64_t>(before);
  for (int64_t i = thread_index(); i < count; i += kThreads) {
    const int64_t token = p.drafts[first + i];
    if (token < 0 || token >= p.V) bad = 1;
  }
  bad = block_reduce<Most>(bad, memory.indices, turn);
  return {first, static_cast<int>(count), bad == 0};
}

// The first draft that is not accepted; `count` if all are.
SALTIRE_DEVICE int first_rejected(const VerifyProblem& p, int64_t b, const Drafts& drafts,
                                  Memory& memory) {
  int rejected = drafts.count, turn = 0;
  for (int i = thread_index(); i < drafts.count && i < rejected; i += kThreads) {
    const int64_t row = drafts.first + i, x = p.drafts[row];
    const double u = uniform(p.seed, static_cast<uint64_t>(p.sequences[b]),
                             static_cast<uint64_t>(p.positions[b] + i), Purpose::accept);
    const double chance = p.q == nullptr ? 1.0 : static_cast<double>(p.q[row * p.V + x]);
    if (!(u * chance < static_cast<double>(p.p[(row + b) * p.V + x]))) rejected = i;
  }
  sync_block();
  return block_reduce<Least>(rejected, memory.indices, turn);
}

__global__ void __launch_bounds__(kThreads, 1)
    verify_sequences(const __grid_constant__ VerifyProblem p) {
  auto& memory = *reinterpret_cast<Memory*>(shared_memory());
  const int64_t b = blockIdx.x;
  const Drafts drafts = drafts_of(p, b, memory);
  if (!drafts.good) {
    if (threadIdx.x == 0) p.accepted[b] = p.next[b] = -1;
    return;
  }
  const int i = first_rejected(p, b, drafts, memory);
  sync_block();
  const int V = static_cast<int>(p.V);
  const int64_t row = drafts.first + i;
  const float* const target = p.p + (row + b) * p.V;
  const bool all = i == drafts.count;
  const double u =
      uniform(p.seed, static_cast<uint64_t>(p.sequences[b]),
              static_cast<uint64_t>(p.positions[b] + i), all ? Purpose::plain : Purpose::replace);
  const float* const draft = all || p.q == nullptr ? nullptr : p.q + row * p.V;
  const int certain = all || p.q != nullptr ? -1 : static_cast<int>(p.drafts[row]);
  const auto weight = [=](int v) {
    const double minus = draft != nullptr ? static_cast<double>(draft[v])
                         : v == certain   ? 1.0
                                          : 0.0;
    const double rest = static_cast<double>(target[v]) - minus;
    return rest > 0.0 ? rest : 0.0;
  };
  const int token = draw_block(V, u, weight, memory);
  if (threadIdx.x == 0) {
    p.accepted[b] = i;
    p.next[b] = token;
  }
}

cuda::Launch blocks(int64_t count, cudaStream_t stream) {
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(count));
  how.block = dim3(kThreads);
  how.shared_bytes = sizeof(Memory);
  how.stream = stream;
  return how;
}

}  // namespace

void draw(const DrawProblem& problem, cudaStream_t stream) {
  if (problem.M == 0) return;
  launch<draw_rows>("draw_tokens", blocks(problem.M, stream), problem);
}

void verify(const VerifyProblem& problem, cudaStream_t stream) {
  if (problem.B == 0) return;
  launch<verify_sequences>("speculate_verify", blocks(problem.B, stream), problem);
}

}  // namespace saltire::speculate
