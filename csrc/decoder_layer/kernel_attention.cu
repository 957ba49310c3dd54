// Attention over the static cache: a block for four queries of one head of keys and a split of the
// slots. A warp takes 16 slots at a time: their scores (lanes share dimensions and slots), then
// their values (lanes share dimensions). Everything is f32; sums have one order.
#include "core/both.h"
#include "core/check.h"
#include "core/cuda/launch.h"
#include "decoder_layer/device.h"
#include "decoder_layer/device_cache.h"
#include "decoder_layer/device_query.h"

namespace saltire::decoder_layer {
namespace {

using namespace saltire::cuda;

constexpr int kQ = kTileQueries;
constexpr int kWarps = kAttendWarps;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlots = static_cast<int>(kSlotBlock);
constexpr int kSplit = static_cast<int>(kSplitSlots);
constexpr float kLog2E = 1.44269504f;
constexpr int kAhead = 4;  // loads of a lane under way

struct Task {
  const float* queries;
  const float* own;
  RowView rows;
  const uint8_t* data;
  const uint16_t* grids;
  int* counters;
  float* parts;  // [tiles, kv_heads, splits, kQ, head_dim + 2]
  void* out;
  int64_t slots;
  int head_dim, sequences, splits;
  bool prompt, out_bf16;
};

// Query i of the tile. Of a prompt, queries of a head of keys lie row after row; else a row's fill
// tiles of their own.
SALTIRE_DEVICE Query find_query(const Task& task, int tile, int g, int i) {
  const int group = task.rows.heads / task.rows.kv_heads, of_row = (group + kQ - 1) / kQ;
  if (task.prompt) return query_of_prompt(task.rows, g, tile * kQ + i);
  const int h = tile % of_row * kQ + i;
  return h < group ? query_of_row(task.rows, tile / of_row, g, h) : no_query();
}

// --- shared memory ------------------------------------------------------------------------------

struct Shared {
  float4* q;       // [head_dim]: the four queries' values of a dimension
  float4* shares;  // [kWarps, 16]: the four queries' shares of a slot
  float* parts;    // [kWarps, kQ, head_dim + 2]: sums, then the largest score and the sum of shares
  float* whole;    // [kQ, head_dim + 2]
  Query* queries;  // [kQ]
  float* own;      // [kQ]: scores of the rows' own keys
  int* flag;
};

SALTIRE_BOTH int64_t shared_bytes(int64_t d) {
  const int64_t part = kQ * (d + 2) * 4;
  return d * 16 + kWarps * kSlots * 16 + (kWarps + 1) * part +
         kQ * static_cast<int64_t>(sizeof(Query)) + kQ * 4 + 16;
}

SALTIRE_DEVICE Shared share_out(int d) {
  Shared s;
  s.q = reinterpret_cast<float4*>(shared_memory());
  s.shares = s.q + d;
  s.queries = reinterpret_cast<Query*>(s.shares + kWarps * kSlots);
  s.parts = reinterpret_cast<float*>(s.queries + kQ);
  s.whole = s.parts + kWarps * kQ * (d + 2);
  s.own = s.whole + kQ * (d + 2);
  s.flag = reinterpret_cast<int*>(s.own + kQ);
  return s;
}

// --- a warp's part ------------------------------------------------------------------------------

// What a warp has found for the four queries. Sums are the lane's own until the end.
struct Found {
  float most[kQ], sum[kQ], low[kQ];
  float acc[kQ][kLaneValues];
};

struct Head {
  const uint8_t* keys;
  const uint8_t* values;
  const f16* key_grids;  // scales [slots], then lows
  const f16* value_grids;
};

template <Format format>
SALTIRE_DEVICE Head find_head(const Task& task, int64_t sequence, int g) {
  const int64_t place = sequence * task.rows.kv_heads + g;
  const int64_t values = place + int64_t{task.sequences} * task.rows.kv_heads;
  const int64_t bytes = task.slots * task.head_dim * DeviceElement<format>::bits / 8;
  const auto* const grids = reinterpret_cast<const f16*>(task.grids);
  return {task.data + place * bytes, task.data + values * bytes, grids + place * 2 * task.slots,
          grids + values * 2 * task.slots};
}

// Scores of the 16 slots from `slot`: the lane gets those of one slot (two lanes get the same).
template <Format format>
SALTIRE_DEVICE void score(const Head& head, const Shared& shared, int d, int slot, int lane,
                          float (&scores)[kQ]) {
  using Element = DeviceElement<format>;
  constexpr int kRowBytes = kSlots * (Element::bits < 8 ? 8 : Element::bits) / 8;
  const int rows = d / Element::per, first = lane / 2;
  const uint8_t* const from = head.keys + int64_t{slot} / kSlots * rows * kRowBytes +
                              first * kRowBytes + lane % 2 * (kRowBytes / 2);
  float sums[kQ][kLaneValues] = {};
  for (int row = 0; row < rows; row += 16 * kAhead) {
    uint32_t raw[kAhead][Element::words] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + 16 * i + first < rows) load_words(from + (row + 16 * i) * kRowBytes, raw[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + 16 * i + first >= rows) continue;
#pragma unroll
      for (int place = 0; place < Element::per; ++place) {
        const float4 q = shared.q[(row + 16 * i + first) * Element::per + place];
        float k[kLaneValues];
        read_keys<format>(raw[i], place, k);
#pragma unroll
        for (int s = 0; s < kLaneValues; ++s) {
          sums[0][s] = fmaf(q.x, k[s], sums[0][s]);
          sums[1][s] = fmaf(q.y, k[s], sums[1][s]);
          sums[2][s] = fmaf(q.z, k[s], sums[2][s]);
          sums[3][s] = fmaf(q.w, k[s], sums[3][s]);
        }
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kQ; ++q) scores[q] = scatter_sum(sums[q], lane);
}

// Scores become shares e^(score - most); what was found before is scaled to the new `most`.
SALTIRE_DEVICE void fold(float (&scores)[kQ], Found& found, bool counts) {
#pragma unroll
  for (int q = 0; q < kQ; ++q) {
    float most = scores[q];
    for (int mask = 16; mask > 0; mask /= 2) {
      const float other = shuffle_xor(most, mask);
      most = other > most ? other : most;
    }
    most = found.most[q] > most ? found.most[q] : most;
    if (most == -INFINITY) {  // nothing seen yet
      scores[q] = 0.0f;
      continue;
    }
    if (most != found.most[q]) {
      const float factor = exp2_fast(found.most[q] - most);
      found.most[q] = most;
      found.sum[q] *= factor;
      found.low[q] *= factor;
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) found.acc[q][i] *= factor;
    }
    scores[q] = exp2_fast(scores[q] - most);
    if (counts) found.sum[q] += scores[q];
  }
}

// acc += Σ share · value over 16 slots; as many slots at a time as a warp's lanes cover.
template <Format format>
SALTIRE_DEVICE void add_values(const Head& head, const float4* shares, int d, int slot, int lane,
                               Found& found) {
  using Element = DeviceElement<format>;
  const int lanes = d / kLaneValues, at_once = 32 / lanes;
  const int v = lane % lanes, first = lane / lanes;
  const int slot_bytes = d * Element::bits / 8;
  const uint8_t* const from =
      head.values + (int64_t{slot} + first) * slot_bytes + value_offset<format>(v);
  for (int t = 0; t < kSlots; t += at_once * kAhead) {
    uint32_t raw[kAhead][Element::words] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = t + at_once * i;
      if (first < at_once && at + first < kSlots) {
        load_value<format>(from + at * slot_bytes, raw[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = t + at_once * i + first;
      if (first >= at_once || at >= kSlots) continue;
      const float4 share = shares[at];
      float x[kLaneValues];
      read_value<format>(raw[i], v, x);
#pragma unroll
      for (int j = 0; j < kLaneValues; ++j) {
        found.acc[0][j] = fmaf(share.x, x[j], found.acc[0][j]);
        found.acc[1][j] = fmaf(share.y, x[j], found.acc[1][j]);
        found.acc[2][j] = fmaf(share.z, x[j], found.acc[2][j]);
        found.acc[3][j] = fmaf(share.w, x[j], found.acc[3][j]);
      }
    }
  }
}

// 16 slots from `slot`. Coded values are code · scale + low: shares take the scale, and Σ share ·
// low is the same for all dimensions; keys likewise, with Σ q.
template <Format format>
SALTIRE_DEVICE void visit(const Head& head, const Shared& shared, const float (&q_sums)[kQ],
                          int64_t slots, int d, int slot, int warp, int lane, Found& found) {
  float scores[kQ];
  score<format>(head, shared, d, slot, lane, scores);
  const int in_block = lane % 2 * kLaneValues + lane / 4;
  const int64_t at = slot + in_block;
  const bool counts = (lane & 2) == 0;  // its twin holds the same slot
#pragma unroll
  for (int q = 0; q < kQ; ++q) {
    if constexpr (is_coded(format)) {
      const float low = to_f32(head.key_grids[slots + at]) * q_sums[q];
      scores[q] = fmaf(scores[q], to_f32(head.key_grids[at]), low);
    }
    if (!sees(shared.queries[q], static_cast<int>(at))) scores[q] = -INFINITY;
  }
  fold(scores, found, counts);
  if constexpr (is_coded(format)) {
    const float scale = to_f32(head.value_grids[at]), low = to_f32(head.value_grids[slots + at]);
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
      if (counts) found.low[q] = fmaf(scores[q], low, found.low[q]);
      scores[q] *= scale;
    }
  }
  float4* const shares = shared.shares + warp * kSlots;
  if (counts) shares[in_block] = make_float4(scores[0], scores[1], scores[2], scores[3]);
  sync_warp();
  add_values<format>(head, shares, d, slot, lane, found);
  sync_warp();
}

// Adds the lanes' sums up and leaves them in the warp's part.
SALTIRE_DEVICE void leave(const Shared& shared, int d, int warp, int lane, Found& found) {
  const int lanes = d / kLaneValues, at_once = 32 / lanes;
#pragma unroll
  for (int q = 0; q < kQ; ++q) {
    float sum = found.sum[q], low = found.low[q];
    for (int mask = 16; mask > 0; mask /= 2) {
      sum += shuffle_xor(sum, mask);
      low += shuffle_xor(low, mask);
    }
    float* const part = shared.parts + (warp * kQ + q) * (d + 2);
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      float all = found.acc[q][i];
      for (int s = 1; s < at_once; ++s) {
        const int from = lane + s * lanes;
        all += shuffle(found.acc[q][i], from < 32 ? from : 31);
      }
      if (lane < lanes) part[lane * kLaneValues + i] = all + low;
    }
    if (lane == 0) {
      part[d] = found.most[q];
      part[d + 1] = sum;
    }
  }
}

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
