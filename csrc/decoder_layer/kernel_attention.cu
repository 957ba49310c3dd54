// Attention over the static cache: a block for four queries of one head of keys and a split of the
// slots. Its warps share the split (device_attend.h); what they found is joined here. Everything is
// f32; sums have one order.
#include "core/cuda/launch.h"
#include "decoder_layer/device_attend.h"

namespace saltire::decoder_layer {
namespace {

// --- joining parts ------------------------------------------------------------------------------

// whole[q] from `count` parts, `stride` apart, in their order. The block's threads share the
// dimensions; the parts must be visible to all of them.
SALTIRE_DEVICE void join(const float* parts, int count, int64_t stride, int d, float* whole) {
  for (int i = static_cast<int>(threadIdx.x); i < kQ * (d + 1); i += kThreads) {
    const int q = i / (d + 1), dim = i % (d + 1);  // dimension d stands for the sum of shares
    const float* const part = parts + q * (d + 2);
    float most = -INFINITY;
    for (int p = 0; p < count; ++p) {
      const float other = part[p * stride + d];
      most = other > most ? other : most;
    }
    float sum = 0.0f;
    for (int p = 0; p < count; ++p) {
      const float mine = part[p * stride + d];
      const float value = part[p * stride + (dim == d ? d + 1 : dim)];
      if (mine != -INFINITY) sum = fmaf(exp2_fast(mine - most), value, sum);
    }
    whole[q * (d + 2) + (dim == d ? d + 1 : dim)] = sum;
    if (dim == d) whole[q * (d + 2) + d] = most;
  }
}

// A row that is in no slot sees itself: one more score, one more value.
SALTIRE_DEVICE void add_own(const Task& task, const Shared& shared, int g) {
  const int d = task.head_dim, warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (warp < kQ) {
    const Query& q = shared.queries[warp];
    float sum = 0.0f;
    if (q.row >= 0 && q.is_private != 0) {
      const float* const key = task.own + (int64_t{q.row} * task.rows.kv_heads + g) * d;
      const float* const x = reinterpret_cast<const float*>(shared.q) + warp;
      for (int i = lane; i < d; i += 32) sum = fmaf(x[i * kQ], key[i], sum);
    }
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) shared.own[warp] = sum;
  }
  sync_block();
  for (int i = static_cast<int>(threadIdx.x); i < kQ * (d + 1); i += kThreads) {
    const int q = i / (d + 1), dim = i % (d + 1);
    const Query& query = shared.queries[q];
    if (query.row < 0 || query.is_private == 0) continue;
    const float* const whole = shared.whole + q * (d + 2);
    const float own = shared.own[q], before = whole[d];
    const float most = own > before ? own : before;
    const float kept = before == -INFINITY ? 0.0f : exp2_fast(before - most);
    const float share = exp2_fast(own - most);
    const float* const value =
        task.own + ((int64_t{task.rows.M} + query.row) * task.rows.kv_heads + g) * d;
    float* const at = shared.whole + q * (d + 2) + (dim == d ? d + 1 : dim);
    *at = fmaf(*at, kept, dim == d ? share : share * value[dim]);
  }
  sync_block();
}

// Divides by the sum of shares, takes the rotation of coded values back, and writes.
template <Format format>
SALTIRE_DEVICE void finish(const Task& task, const Shared& shared) {
  const int d = task.head_dim;
  float* const whole = shared.whole;
  if constexpr (is_coded(format)) {
    const int block = d & -d;
    const float scale = 1.0f / sqrtf(static_cast<float>(block));
    for (int i = static_cast<int>(threadIdx.x); i < kQ * d; i += kThreads) {
      const float sum = whole[i / d * (d + 2) + d + 1];
      float& at = whole[i / d * (d + 2) + i % d];
      at = sum > 0.0f ? at / sum : at;
    }
    sync_block();
    for (int h = 1; h < block; h *= 2) {
      for (int p = static_cast<int>(threadIdx.x); p < kQ * d / 2; p += kThreads) {
        const int q = p / (d / 2), in_head = p % (d / 2);
        float* const at = whole + q * (d + 2) + in_head / h * 2 * h + in_head % h;
        const float a = at[0], b = at[h];
        at[0] = a + b;
        at[h] = a - b;
      }
      sync_block();
    }
    for (int i = static_cast<int>(threadIdx.x); i < kQ * d; i += kThreads) {
      whole[i / d * (d + 2) + i % d] *= scale;
    }
    sync_block();
  }
  for (int i = static_cast<int>(threadIdx.x); i < kQ * d; i += kThreads) {
    const Query& query = shared.queries[i / d];
    if (query.row < 0) continue;
    const float sum = whole[i / d * (d + 2) + d + 1];
    float value = whole[i / d * (d + 2) + i % d];
    if (!is_coded(format)) value = sum > 0.0f ? value / sum : value;
    const int64_t to = int64_t{query.place} * d + i % d;
    if (task.out_bf16) {
      from_f32(value, static_cast<bf16*>(task.out)[to]);
    } else {
      static_cast<float*>(task.out)[to] = value;
    }
  }
}

template <Format format>
__global__ void __launch_bounds__(kThreads) attend(const __grid_constant__ Task task) {
  const int d = task.head_dim, g = static_cast<int>(blockIdx.y);
  const int split = static_cast<int>(blockIdx.z), i = static_cast<int>(threadIdx.x);
  const int warp = i / 32, lane = i % 32;
  // The last rows of a prompt see most, so they start first.
  const int tile = static_cast<int>(task.prompt ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  const Shared shared = share_out(d);
  wait_for_previous_kernel();
  if (i < kQ) shared.queries[i] = find_query(task, tile, g, i);
  sync_block();
  int begin = static_cast<int>(task.slots), end = 0;
  for (int q = 0; q < kQ; ++q) {
    const Query& query = shared.queries[q];
    if (query.row < 0) continue;
    begin = query.start < begin ? query.start : begin;
    end = query.end > end ? query.end : end;
  }
  const int first = begin / kSplit, after = (end + kSplit - 1) / kSplit;
  const int live = after > first ? after - first : 1;  // splits that see something; at least one
  if (split >= live) return;
  let_next_kernel_start();
  for (int j = i; j < kQ * d; j += kThreads) {
    const Query& query = shared.queries[j / d];
    const float x = query.row < 0 ? 0.0f : task.queries[int64_t{query.place} * d + j % d] * kLog2E;
    reinterpret_cast<float*>(shared.q)[j % d * kQ + j / d] = x;
  }
  sync_block();
  float q_sums[kQ] = {};
  if constexpr (is_coded(format)) {
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
      for (int j = lane; j < d; j += 32) {
        q_sums[q] += reinterpret_cast<const float*>(shared.q)[j * kQ + q];
      }
      for (int mask = 16; mask > 0; mask /= 2) q_sums[q] += shuffle_xor(q_sums[q], mask);
    }
  }
  Found found = {};
  for (int q = 0; q < kQ; ++q) found.most[q] = -INFINITY;
  const int64_t sequence = task.rows.rows[int64_t{shared.queries[0].row} * kRowColumns + kSequence];
  const Head head = find_head<format>(task, sequence, g);
  const int chunks = task.prompt ? live : 1;
  for (int c = 0; c < chunks; ++c) {
    const int slot = (first + split + c) * kSplit + warp * kSlots;
    if (slot >= end || slot + kSlots <= begin) continue;
    visit<format>(head, shared, q_sums, task.slots, d, slot, warp, lane, found);
  }
  leave(shared, d, warp, lane, found);
  sync_block();
  join(shared.parts, kWarps, kQ * (d + 2), d, shared.whole);
  sync_block();
  if (!task.prompt && live > 1) {
    const int64_t place = int64_t{tile} * task.rows.kv_heads + g;
    const int64_t part = kQ * (d + 2);
    float* const parts = task.parts + place * task.splits * part;
    for (int j = i; j < part; j += kThreads) parts[split * part + j] = shared.whole[j];
    sync_block();
    int* const counter = task.counters + place;
    if (i == 0) *shared.flag = add_and_see(counter, 1) == live - 1 ? 1 : 0;
    sync_block();
    if (*shared.flag == 0) return;
    join(parts, live, part, d, shared.whole);
    if (i == 0) *counter = 0;  // as the next launch expects it
    sync_block();
  }
  bool any_private = false;
  for (int q = 0; q < kQ; ++q) any_private = any_private || shared.queries[q].is_private != 0;
  if (any_private) add_own(task, shared, g);
  finish<format>(task, shared);
}

}  // namespace

AttendPlan make_plan(const AttendProblem& p) {
  const int64_t group = p.heads / p.cache.kv_heads;
  AttendPlan plan;
  plan.tiles =
      static_cast<int>(p.prompt ? (p.M * group + kQ - 1) / kQ : p.M * ((group + kQ - 1) / kQ));
  plan.splits = static_cast<int>(p.prompt ? 1 : (p.cache.slots + kSplitSlots - 1) / kSplitSlots);
  plan.shared_bytes = shared_bytes(p.cache.head_dim);
  if (plan.splits > 1) {
    plan.counters = plan.tiles * p.cache.kv_heads;
    plan.parts = plan.counters * plan.splits * kQ * (p.cache.head_dim + 2);
  }
  return plan;
}

std::string AttendPlan::text() const {
  return "tiles=" + std::to_string(tiles) + " splits=" + std::to_string(splits) +
         " shared=" + std::to_string(shared_bytes) + " parts=" + std::to_string(parts);
}

void run(const AttendProblem& p, const AttendPlan& plan, const Device& device,
         cudaStream_t stream) {
  if (p.M == 0 || run_prompt(p, device, stream)) return;
  constexpr int kMostInGrid = 65535;
  SALTIRE_CHECK(plan.splits <= kMostInGrid && p.cache.kv_heads <= kMostInGrid,
                "attend_heads: a cache of ", p.cache.slots, " slots and ", p.cache.kv_heads,
                " heads; a launch has at most ", kMostInGrid, " splits of ", kSplitSlots,
                " slots and as many heads.");
  Task task = {};
  task.queries = p.queries;
  task.own = p.own;
  task.rows = view_of(p);
  task.data = p.cache.data;
  task.grids = p.cache.grids;
  task.counters = p.counters;
  task.parts = p.parts;
  task.out = p.out;
  task.slots = p.cache.slots;
  task.head_dim = static_cast<int>(p.cache.head_dim);
  task.sequences = static_cast<int>(p.cache.sequences);
  task.splits = plan.splits;
  task.prompt = p.prompt;
  task.out_bf16 = p.out_dtype == Number::bf16;
  Launch how;
  how.grid = dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(p.cache.kv_heads),
                  static_cast<unsigned>(plan.splits));
  how.block = dim3(kThreads);
  how.shared_bytes = static_cast<size_t>(plan.shared_bytes);
  how.stream = stream;
  how.overlap_previous = device.sm >= 90;
  switch (p.cache.format) {
    case Format::bf16:
      return launch<attend<Format::bf16>>("attend_heads", how, task);
    case Format::u8:
      return launch<attend<Format::u8>>("attend_heads", how, task);
    case Format::u4:
      return launch<attend<Format::u4>>("attend_heads", how, task);
    case Format::u2:
      return launch<attend<Format::u2>>("attend_heads", how, task);
    default:
      return launch<attend<Format::f32>>("attend_heads", how, task);
  }
}

}  // namespace saltire::decoder_layer
