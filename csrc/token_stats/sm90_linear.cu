// The products of the linear form on Hopper: wgmma m64n256k16 in bf16, both operands in shared
// memory, where the copy engine puts them swizzled. A cluster of two blocks works on a tile of
// 256 x 256, 64 inputs a stage, four stages. In a block one warp copies; two warpgroups compute 64
// rows each, 128 sums a thread.
//
// 128 x 256 x 64 multiply-adds are 1,024 clocks of tensor core and 48 KB of operands, 48 bytes a
// clock: more than a multiprocessor's share of the L2. So each block reads half of the columns that
// both need, for both: 32 bytes a clock. A stage is free for the copies of either block when both
// have done with it.
//
// A row is shared by four lanes only, so a thread keeps the running sums of its two rows in
// registers over all its tiles, and lanes meet once, at the end of the range.
#include "core/cuda/sm90.h"
#include "token_stats/device_linear.h"
#include "token_stats/device_state.h"

namespace saltire::token_stats {
namespace {

constexpr int kBlocks = 2;                  // of a cluster
constexpr int kRows = kSm90Rows / kBlocks;  // of a block
constexpr int kColumns = kSm90Columns, kDepth = 64;
constexpr int kStages = 4;
constexpr int kGroups = kRows / 64;  // warpgroups that compute
constexpr int kWarpgroup = 128;
constexpr int kThreads = (kGroups + 1) * kWarpgroup;
constexpr int kABytes = kRows * kDepth * 2, kBBytes = kColumns * kDepth * 2;
constexpr int kStageBytes = kABytes + kBBytes;
constexpr int kProducerRegisters = 40;  // 2·128·232 + 128·40 <= 65,536
constexpr int kConsumerRegisters = 232;
constexpr int kSums = 128;

struct Maps {
  TensorMap a, b;
};

SALTIRE_DEVICE Barrier* full_barrier(int slot) {
  return reinterpret_cast<Barrier*>(shared_memory() + kStages * kStageBytes) + slot;
}
SALTIRE_DEVICE Barrier* empty_barrier(int slot) {
  return full_barrier(slot) + kStages;
}

struct Turn {
  int slot = 0, parity = 0;
};

SALTIRE_DEVICE void advance(Turn& turn) {
  if (++turn.slot == kStages) {
    turn.slot = 0;
    turn.parity ^= 1;
  }
}

template <Role role>
constexpr bool kARows = role == Role::head;
template <Role role>
constexpr bool kBRows = role == Role::head || role == Role::hidden;

// --- copying ------------------------------------------------------------------------------------

// 128 rows from `row` on, 64 inputs from `depth` on, for this block or both: one box, or one for
// each 64 rows. Either way 16 KB.
template <bool along_rows, bool for_both>
SALTIRE_DEVICE void ask_for(const TensorMap* map, int row, int depth, unsigned char* to,
                            Barrier* full) {
  const auto copy = [=](unsigned char* box, int matrix_row, int column) {
    if constexpr (for_both) {
      copy_box_to_both(box, map, matrix_row, column * 2, full);
    } else {
      copy_box(box, map, matrix_row, column * 2, full);
    }
  };
  if constexpr (along_rows) {
    for (int i = 0; i < 128; i += 64) copy(to + i / 64 * kBoxOfRows, depth, row + i);
  } else {
    copy(to, row, depth);
  }
}

template <Role role>
SALTIRE_DEVICE void copy_tiles(const LinearTask& task, const Maps& maps, int depth,
                               const Place& place, int rank) {
  const int row = place.row_tile * kSm90Rows + rank * kRows;
  Turn turn;
  turn.parity = 1;  // every stage begins empty
  for (int tile = task.tiling.begin(place.split); tile < task.tiling.begin(place.split + 1);
       ++tile) {
    for (int k = 0; k < depth; k += kDepth) {
      wait_for(empty_barrier(turn.slot), turn.parity);
      unsigned char* const to = shared_memory() + turn.slot * kStageBytes;
      Barrier* const full = full_barrier(turn.slot);
      arrive_and_expect(full, kStageBytes);
      ask_for<kARows<role>, false>(&maps.a, row, k, to, full);
      ask_for<kBRows<role>, true>(&maps.b, tile * kColumns + rank * 128, k,
                                  to + kABytes + rank * (kBBytes / kBlocks), full);
      advance(turn);
    }
  }
}

// --- what becomes of the sums -------------------------------------------------------------------
// Sum j is of row 8·(j % 4 / 2) of the lane's two and column 8·(j / 4) + 2t + j % 2.

struct Lane {
  int lane, row, column;  // row: the upper one of the block's; column: 2t
};

SALTIRE_DEVICE float logit_of(const LinearTask& t, float sum, int column) {
  if (column >= t.count) return kMasked;
  const float x = t.bias != nullptr ? sum + t.bias[t.first + column] : sum;
  return t.tokens.softcap != 0 ? cap(x, t.tokens.softcap) : x;
}

struct Running {
  Part part[2];
  float c[2], label[2];
  int wanted[2];
};

SALTIRE_DEVICE Running begin_stats(const LinearTask& t, int row) {
  Running r;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = row + 8 * half;
    TokenFacts token = {0.0f, -1, true};
    if (m < t.M) token = facts_of(t.tokens, m, t.V);
    r.part[half] = empty_part();
    r.c[half] = token.inverse_temperature * kLog2E;
    r.label[half] = kMasked;
    r.wanted[half] = token.label;
  }
  return r;
}

SALTIRE_DEVICE void add_stats(const LinearTask& t, const float (&sums)[kSums], int first,
                              Running& r) {
  constexpr int kChunk = 16;
#pragma unroll
  for (int j0 = 0; j0 < kSums / 2; j0 += kChunk) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const int column = first + (j0 + j) / 2 * 8 + j % 2;
        x[j] = logit_of(t, sums[(j0 + j) / 2 * 4 + 2 * half + j % 2], column);
        if (column == r.wanted[half]) r.label[half] = x[j];
      }
      const float before = r.part[half].max;
      add_logits(r.part[half], x, r.c[half], 0);
      if (!(r.part[half].max > before)) continue;
#pragma unroll
      for (int j = kChunk - 1; j >= 0; --j) {
        if (x[j] == r.part[half].max) r.part[half].at = first + (j0 + j) / 2 * 8 + j % 2;
      }
    }
    keep_order();
  }
}

SALTIRE_DEVICE void end_stats(const LinearTask& t, const Lane& at, int row, int split, Running& r) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Part all = merge_lanes<4>(r.part[half], r.c[half]);
    float label = r.label[half];
    label = max_or_nan(label, shuffle_xor(label, 1));
    label = max_or_nan(label, shuffle_xor(label, 2));
    const int m = row + 8 * half;
    if (m < t.M && at.lane % 4 == 0) {
      t.parts[static_cast<int64_t>(split) * t.M + m] = {all.max, all.sum, all.weighted, all.at,
                                                        label};
    }
  }
}

SALTIRE_DEVICE void store_spread(const LinearTask& t, const float (&sums)[kSums],
                                 const GradientFacts (&facts)[2], int row, int first) {
  const float inverse_cap = t.tokens.softcap != 0 ? reciprocal_fast(t.tokens.softcap) : 0.0f;
#pragma unroll
  for (int j = 0; j < kSums; j += 2) {
    const int half = j % 4 / 2, m = row + 8 * half, column = first + j / 4 * 8;
    float d[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = logit_of(t, sums[j + i], column + i);
      const bool is_label = t.first + column + i == facts[half].label;
      const float value = gradient_of(facts[half], x, is_label, inverse_cap);
      d[i] = facts[half].live ? value : 0.0f;
    }
    if (m < t.M) {
      const int64_t to = static_cast<int64_t>(m) * t.padded + column;
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(t.dx) + to) = pack_bf16(d[0], d[1]);
    }
    if (j % 16 == 14) keep_order();
  }
}

// dh in floats, added to what earlier chunks left; dW in bf16, rounded once. D is even.
template <Role role>
SALTIRE_DEVICE void store_product(const LinearTask& t, const float (&sums)[kSums], int row,
                                  int first) {
  const int rows = role == Role::hidden ? t.M : t.count;
#pragma unroll
  for (int j = 0; j < kSums; j += 2) {
    const int m = row + j % 4 / 2 * 8, d = first + j / 4 * 8;
    if (m < rows && d < t.D) {
      float low = sums[j], high = sums[j + 1];
      if constexpr (role == Role::hidden) {
        auto& to = *reinterpret_cast<float2*>(t.d_hidden + static_cast<int64_t>(m) * t.D + d);
        if (t.add_hidden) {
          const float2 old = to;
          low += old.x;
          high += old.y;
        }
        to = make_float2(low, high);
      } else {
        const int64_t to = static_cast<int64_t>(t.first + m) * t.D + d;
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(t.d_head) + to) = pack_bf16(low, high);
      }
    }
    if (j % 16 == 14) keep_order();
  }
}

// --- computing ----------------------------------------------------------------------------------

// 16 inputs more: 32 bytes along the depth, or 16 depths of 128 bytes; in units of 16 bytes.
template <bool along_rows>
SALTIRE_DEVICE uint64_t operand(const unsigned char* from) {
  if constexpr (along_rows) return operand_along_rows(from);
  return operand_of(from);
}
template <bool along_rows>
constexpr uint64_t kNextInputs = along_rows ? 128 : 2;

// This warp has done with the stage.
SALTIRE_DEVICE void release(int slot, int lane) {
  if (lane < kBlocks) arrive_at(empty_barrier(slot), lane);
}

template <Role role>
SALTIRE_DEVICE void compute_tiles(const LinearTask& task, int depth, const Place& place, int rank) {
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarpgroup;
  Lane at;
  at.lane = thread % 32;
  at.row = group * 64 + thread / 32 % 4 * 16 + at.lane / 4;
  at.column = at.lane % 4 * 2;
  const int row = place.row_tile * kSm90Rows + rank * kRows + at.row;
  Running running;
  GradientFacts facts[2];
  if constexpr (role == Role::stats) running = begin_stats(task, row);
  if constexpr (role == Role::spread) {
    facts[0] = gradient_facts(task.tokens, task.gradients, row, task.V);
    facts[1] = gradient_facts(task.tokens, task.gradients, row + 8, task.V);
  }
  Turn turn;
  float sums[kSums];
  for (int tile = task.tiling.begin(place.split); tile < task.tiling.begin(place.split + 1);
       ++tile) {
    int before = -1;  // the stage whose products are still under way
    for (int k = 0; k < depth; k += kDepth) {
      wait_for(full_barrier(turn.slot), turn.parity);
      const unsigned char* const from = shared_memory() + turn.slot * kStageBytes;
      // 64 rows of either kind are 8 KB.
      const uint64_t a = operand<kARows<role>>(from + group * kBoxOfRows);
      const uint64_t b = operand<kBRows<role>>(from + kABytes);
      begin_products();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) {
        multiply_256<kARows<role>, kBRows<role>>(
            sums, a + kNextInputs<kARows<role>> * static_cast<uint64_t>(step),
            b + kNextInputs<kBRows<role>> * static_cast<uint64_t>(step), k > 0 || step > 0);
      }
      commit_products();
      wait_products<1>();
      if (before >= 0) release(before, at.lane);
      before = turn.slot;
      advance(turn);
    }
    wait_products<0>();
    sync_warp();
    release(before, at.lane);
    const int first = tile * kColumns + at.column;
    if constexpr (role == Role::stats) add_stats(task, sums, first, running);
    if constexpr (role == Role::spread) store_spread(task, sums, facts, row, first);
    if constexpr (role == Role::hidden || role == Role::head) {
      store_product<role>(task, sums, row, first);
    }
  }
  if constexpr (role == Role::stats) end_stats(task, at, row, place.split, running);
}

template <Role role>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_tiles(const __grid_constant__ LinearTask task, const __grid_constant__ Maps maps,
                   int depth) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      make_barrier(full_barrier(i), 1);
      make_barrier(empty_barrier(i), kBlocks * kGroups * 4);
    }
    fence_barriers();
  }
  sync_cluster();  // the other block's barriers are there too
  const int rank = static_cast<int>(blockIdx.x) % kBlocks;
  const Place place = task.tiling.place(static_cast<int>(blockIdx.x) / kBlocks);
  if (thread >= kGroups * kWarpgroup) {
    shrink_registers<kProducerRegisters>();
    if (thread == kGroups * kWarpgroup) copy_tiles<role>(task, maps, depth, place, rank);
  } else {
    grow_registers<kConsumerRegisters>();
    compute_tiles<role>(task, depth, place, rank);
  }
  sync_warp();
  sync_cluster();  // until then the other block may write to this one's memory
}

// --- launching ----------------------------------------------------------------------------------

// A matrix of bf16 [rows, columns] for boxes of `box_rows` x 64 values.
TensorMap map_of(const void* base, int64_t rows, int64_t columns, int box_rows) {
  return map_bytes(base, rows, columns * 2, box_rows);
}

template <Role role>
void run_as(const LinearTask& t, cudaStream_t stream) {
  const auto* const head =
      static_cast<const uint16_t*>(t.head) + static_cast<int64_t>(t.first) * t.D;
  Maps maps;
  int depth = t.D;
  if constexpr (role == Role::stats || role == Role::spread) {
    maps = {map_of(t.hidden, t.M, t.D, kRows), map_of(head, t.count, t.D, kColumns / kBlocks)};
  } else if constexpr (role == Role::hidden) {
    depth = t.padded;
    maps = {map_of(t.dx, t.M, t.padded, kRows), map_of(head, t.count, t.D, kDepth)};
  } else {
    depth = t.M;
    maps = {map_of(t.dx, t.M, t.padded, kDepth), map_of(t.hidden, t.M, t.D, kDepth)};
  }
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(t.tiling.blocks() * kBlocks));
  how.cluster = kBlocks;
  how.block = dim3(kThreads);
  how.shared_bytes = sm90_shared_bytes();
  how.stream = stream;
  launch<multiply_tiles<role>>("linear_token_stats sm90", how, t, maps, depth);
}

void run_sm90(Role role, const LinearTask& task, cudaStream_t stream) {
  switch (role) {
    case Role::stats:
      return run_as<Role::stats>(task, stream);
    case Role::spread:
      return run_as<Role::spread>(task, stream);
    case Role::hidden:
      return run_as<Role::hidden>(task, stream);
    case Role::head:
      return run_as<Role::head>(task, stream);
  }
}

const bool registered = (sm90_products() = run_sm90, true);

}  // namespace
}  // namespace saltire::token_stats
