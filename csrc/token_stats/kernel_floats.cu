// The products of the linear form in f32, for every mix of dtypes: tiles of 64 x 64, 16 inputs
// deep, 4 x 4 sums a thread. 16 neighbouring lanes share their rows, so a token's sums need
// shuffles only.
#include "token_stats/device_linear.h"
#include "token_stats/device_state.h"

namespace saltire::token_stats {
namespace {

constexpr int kTile = kFloatsTile;
constexpr int kDepth = 16;
constexpr int kStride = kTile + 4;  // floats; keeps float4 aligned and lanes off one bank
constexpr int kLanes = 16;          // that share rows
constexpr int kEach = 4;            // rows, and columns, of a thread

// Element (i, k) of an operand, 0 beyond its ends.
struct Values {
  const void* base;
  Dtype dtype;
  int64_t row_stride, depth_stride;
  int rows, depth;
};

SALTIRE_DEVICE float value_at(const Values& v, int i, int k) {
  if (i >= v.rows || k >= v.depth) return 0.0f;
  const int64_t at = i * v.row_stride + k * v.depth_stride;
  if (v.dtype == Dtype::f32) return static_cast<const float*>(v.base)[at];
  if (v.dtype == Dtype::f16) return to_f32(static_cast<const f16*>(v.base)[at]);
  return to_f32(static_cast<const bf16*>(v.base)[at]);
}

// Neighbouring threads read neighbouring values, along k or along rows.
SALTIRE_DEVICE void load_tile(const Values& v, int row, int depth, float* to) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int n = 0; n < kTile * kDepth / kFloatsThreads; ++n) {
    const int at = n * kFloatsThreads + thread;
    const bool along_depth = v.depth_stride == 1;
    const int i = along_depth ? at / kDepth : at % kTile;
    const int k = along_depth ? at % kDepth : at / kTile;
    to[k * kStride + i] = value_at(v, row + i, depth + k);
  }
}

struct Sums {
  float at[kEach][kEach];
};

SALTIRE_DEVICE Sums multiply(const Values& a, const Values& b, int row, int column) {
  auto* const a_tile = reinterpret_cast<float*>(shared_memory());
  float* const b_tile = a_tile + kDepth * kStride;
  const int y = static_cast<int>(threadIdx.x) / kLanes * kEach;
  const int x = static_cast<int>(threadIdx.x) % kLanes;
  Sums sums = {};
  for (int k0 = 0; k0 < a.depth; k0 += kDepth) {
    sync_block();  // everybody is done with the tiles before
    load_tile(a, row, k0, a_tile);
    load_tile(b, column, k0, b_tile);
    sync_block();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const float4 four = *reinterpret_cast<const float4*>(a_tile + k * kStride + y);
      const float rows[kEach] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const float column_value = b_tile[k * kStride + x + kLanes * j];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          sums.at[i][j] = fmaf(rows[i], column_value, sums.at[i][j]);
        }
      }
    }
  }
  return sums;
}

template <Role role>
SALTIRE_DEVICE void operands(const LinearTask& t, Values& a, Values& b) {
  const Values hidden = {t.hidden, t.hidden_dtype, t.D, 1, t.M, t.D};
  const int64_t skipped =
      static_cast<int64_t>(t.first) * t.D * (t.head_dtype == Dtype::f32 ? 4 : 2);
  const void* const head = static_cast<const unsigned char*>(t.head) + skipped;
  if constexpr (role == Role::stats || role == Role::spread) {
    a = hidden;
    b = {head, t.head_dtype, t.D, 1, t.count, t.D};
  } else if constexpr (role == Role::hidden) {
    a = {t.dx, Dtype::f32, t.padded, 1, t.M, t.count};
    b = {head, t.head_dtype, 1, t.D, t.D, t.count};
  } else {
    a = {t.dx, Dtype::f32, 1, t.padded, t.count, t.M};
    b = {t.hidden, t.hidden_dtype, 1, t.D, t.D, t.M};
  }
}

// --- what becomes of the sums -------------------------------------------------------------------

SALTIRE_DEVICE float logit_of(const LinearTask& t, float sum, int column) {
  if (column >= t.count) return kMasked;
  const float x = t.bias != nullptr ? sum + t.bias[t.first + column] : sum;
  return t.tokens.softcap != 0 ? cap(x, t.tokens.softcap) : x;
}

// The running sums of a thread's rows; its 15 neighbours hold the same.
struct Running {
  Part part[kEach];
  float c[kEach], label[kEach];
  int wanted[kEach];  // the label
};

SALTIRE_DEVICE void begin_stats(const LinearTask& t, int row, Running& r) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    r.part[i] = empty_part();
    r.label[i] = kMasked;
    TokenFacts token = {0.0f, -1, true};
    if (row + i < t.M) token = facts_of(t.tokens, row + i, t.V);
    r.c[i] = token.inverse_temperature * kLog2E;
    r.wanted[i] = token.label;
  }
}

SALTIRE_DEVICE void add_stats(const LinearTask& t, const Sums& sums, int column, Running& r) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    Part tile = empty_part();
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int at = column + kLanes * j;
      const float x[1] = {logit_of(t, sums.at[i][j], at)};
      if (at == r.wanted[i]) r.label[i] = x[0];
      add_logits(tile, x, r.c[i], at);
    }
    merge(r.part[i], merge_lanes<kLanes>(tile, r.c[i]), r.c[i]);
  }
}

SALTIRE_DEVICE void end_stats(const LinearTask& t, int row, int split, Running& r) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      r.label[i] = max_or_nan(r.label[i], shuffle_xor(r.label[i], mask));
    }
    if (row + i >= t.M || threadIdx.x % kLanes != 0) continue;
    const Part& p = r.part[i];
    t.parts[static_cast<int64_t>(split) * t.M + row + i] = {p.max, p.sum, p.weighted, p.at,
                                                            r.label[i]};
  }
}

SALTIRE_DEVICE void store_spread(const LinearTask& t, const Sums& sums, int row, int column) {
  const float inverse_cap = t.tokens.softcap != 0 ? reciprocal_fast(t.tokens.softcap) : 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (row + i >= t.M) break;
    const GradientFacts facts = gradient_facts(t.tokens, t.gradients, row + i, t.V);
    float* const to = static_cast<float*>(t.dx) + static_cast<int64_t>(row + i) * t.padded;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int at = column + kLanes * j;
      const float x = logit_of(t, sums.at[i][j], at);
      const float d = gradient_of(facts, x, t.first + at == facts.label, inverse_cap);
      to[at] = facts.live ? d : 0.0f;
    }
  }
}

SALTIRE_DEVICE void store_hidden(const LinearTask& t, const Sums& sums, int row, int column) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int d = column + kLanes * j;
      if (row + i >= t.M || d >= t.D) continue;
      float& to = t.d_hidden[static_cast<int64_t>(row + i) * t.D + d];
      to = t.add_hidden ? to + sums.at[i][j] : sums.at[i][j];
    }
  }
}

SALTIRE_DEVICE void store_head(const LinearTask& t, const Sums& sums, int row, int column) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int d = column + kLanes * j;
      if (row + i >= t.count || d >= t.D) continue;
      const int64_t at = static_cast<int64_t>(t.first + row + i) * t.D + d;
      if (t.head_dtype == Dtype::f32) static_cast<float*>(t.d_head)[at] = sums.at[i][j];
      if (t.head_dtype == Dtype::f16) from_f32(sums.at[i][j], static_cast<f16*>(t.d_head)[at]);
      if (t.head_dtype == Dtype::bf16) from_f32(sums.at[i][j], static_cast<bf16*>(t.d_head)[at]);
    }
  }
}

template <Role role>
__global__ void __launch_bounds__(kFloatsThreads, 2)
    multiply_floats(const __grid_constant__ LinearTask task) {
  const Place place = task.tiling.place(static_cast<int>(blockIdx.x));
  const int row0 = place.row_tile * kTile;
  const int row = row0 + static_cast<int>(threadIdx.x) / kLanes * kEach;
  const int x = static_cast<int>(threadIdx.x) % kLanes;
  Values a, b;
  operands<role>(task, a, b);
  Running running;
  if constexpr (role == Role::stats) begin_stats(task, row, running);
  const int end = task.tiling.begin(place.split + 1);
  for (int tile = task.tiling.begin(place.split); tile < end; ++tile) {
    const Sums sums = multiply(a, b, row0, tile * kTile);
    const int column = tile * kTile + x;
    if constexpr (role == Role::stats) add_stats(task, sums, column, running);
    if constexpr (role == Role::spread) store_spread(task, sums, row, column);
    if constexpr (role == Role::hidden) store_hidden(task, sums, row, column);
    if constexpr (role == Role::head) store_head(task, sums, row, column);
  }
  if constexpr (role == Role::stats) end_stats(task, row, place.split, running);
}

}  // namespace

void run_floats(Role role, const LinearTask& task, cudaStream_t stream) {
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(task.tiling.blocks()));
  how.block = dim3(kFloatsThreads);
  how.shared_bytes = 2 * kDepth * kStride * sizeof(float);
  how.stream = stream;
  constexpr const char* kName = "linear_token_stats floats";
  switch (role) {
    case Role::stats:
      return launch<multiply_floats<Role::stats>>(kName, how, task);
    case Role::spread:
      return launch<multiply_floats<Role::spread>>(kName, how, task);
    case Role::hidden:
      return launch<multiply_floats<Role::hidden>>(kName, how, task);
    case Role::head:
      return launch<multiply_floats<Role::head>>(kName, how, task);
  }
}

}  // namespace saltire::token_stats
