// What one warp of attention over the static cache does: 16 slots at a time, their scores (lanes
// share dimensions and slots), then their values (lanes share dimensions).
#pragma once
#include "core/both.h"
#include "core/check.h"
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

}  // namespace
}  // namespace saltire::decoder_layer
