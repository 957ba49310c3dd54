// A few dozen tokens: mma.m16n8k32 with the weights as the 16 rows and tokens as the 8 columns.
// Workers share the stream of units evenly (stream_k.h); four stages of units are under way as
// asynchronous copies. Warps 0..3 take the first slab of a unit, 4..7 the second, a tile each; a
// lane reads back only the weights that it copied itself, so barriers are for the tokens.
#include "core/cuda/launch.h"
#include "lowbit_gemm/device_routes.h"
#include "lowbit_gemm/device_task.h"

namespace saltire::lowbit_gemm {
namespace {

constexpr int kUnitInputs = kUnitSlabs * kSlab;

// Which thread does what, and where a stage's parts lie.
struct Position {
  int thread, lane, g, t, tile, half;
  StreamK stream;
  MmaStage stage;
  int first_token;
};

SALTIRE_DEVICE unsigned char* stage_of(const Position& at, int unit) {
  return shared_memory() + unit % kMmaStages * at.stage.bytes();
}

template <int bits>
SALTIRE_DEVICE void copy_weights(const Task& task, const Position& at, int unit) {
  const int block = unit / at.stream.stages, stage = unit % at.stream.stages;
  const int slab = stage * kUnitSlabs + at.half;
  unsigned char* const to = stage_of(at, unit);
  const int64_t from =
      ((static_cast<int64_t>(block) * task.slabs + slab) * 4 + at.tile) * kPieces<bits> * kPiece;
#pragma unroll
  for (int q = 0; q < kPieces<bits>; ++q) {
    copy_async_16(to + (q * kMmaThreads + at.thread) * 16,
                  task.codes + from + q * kPiece + at.lane * 16, slab < task.slabs);
  }
  if (task.group_steps == 0) return;
  const int per_unit = kUnitSlabs * 4 / task.group_steps, first = stage * per_unit;
  const unsigned char* const lines =
      task.tables + (static_cast<int64_t>(block) * task.padded_groups + first) * task.line_bytes;
  const int there = (task.padded_groups - first) * task.line_bytes;
  for (int i = at.thread * 16; i < at.stage.tables; i += kMmaThreads * 16) {
    copy_async_16(to + at.stage.codes + i, lines + i, i < there);
  }
}

// 16-byte piece c of token r lies at piece c ^ (r % 8), so that ldmatrix meets no bank twice.
template <int tokens>
SALTIRE_DEVICE void copy_tokens(const Task& task, const Position& at, int unit) {
  constexpr int kPiecesOfToken = kUnitInputs / 16;
  const int k = unit % at.stream.stages * kUnitInputs;
  unsigned char* const to = stage_of(at, unit) + at.stage.codes + at.stage.tables;
  for (int i = at.thread; i < tokens * kPiecesOfToken; i += kMmaThreads) {
    const int r = i / kPiecesOfToken, c = i % kPiecesOfToken, m = at.first_token + r;
    copy_async_16(to + r * kUnitInputs + (c ^ (r & 7)) * 16,
                  task.x + static_cast<int64_t>(m) * task.K + k + c * 16,
                  m < task.M && k + c * 16 < task.K);
  }
}

template <int tiles>
struct Sums {
  int32_t dot[tiles][4] = {};
  float sum[tiles][4] = {};
};

// Scales what a group has summed up: rows g and g + 8, tokens 2t and 2t + 1 of every tile.
template <int bits, int tiles>
SALTIRE_DEVICE void end_group(const Task& task, const Position& at, const unsigned char* line,
                              int group, Sums<tiles>& s) {
  const int entry = at.tile * (kTileRows / 2) + at.g;
  const Pair scale = read_pair(line, entry, task.half_table);
  Pair zero = {};
  if (task.has_zero) zero = read_pair(line + zero_offset(task), entry, task.half_table);
#pragma unroll
  for (int n = 0; n < tiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float value = static_cast<float>(s.dot[n][i]);
      if (task.has_zero) {
        const int m = at.first_token + 8 * n + 2 * at.t + i % 2;
        const bool known = m < task.M && group < task.groups;
        const float x_sum = known ? static_cast<float>(task.x_sum[m * task.groups + group]) : 0.0f;
        value =
            fmaf(task.middle - (i < 2 ? zero.upper : zero.lower), kByteFactor<bits> * x_sum, value);
      }
      s.sum[n][i] = fmaf(i < 2 ? scale.upper : scale.lower, value, s.sum[n][i]);
      s.dot[n][i] = 0;
    }
  }
}

template <int bits, int tiles, bool grouped>
SALTIRE_DEVICE void multiply_unit(const Task& task, const Position& at, int unit, Sums<tiles>& s) {
  const int slab = unit % at.stream.stages * kUnitSlabs + at.half;
  if (slab >= task.slabs) return;
  const unsigned char* const from = stage_of(at, unit);
  const unsigned char* const x = from + at.stage.codes + at.stage.tables;
  Slab<bits> w;
#pragma unroll
  for (int q = 0; q < kPieces<bits>; ++q) {
    w.piece[q] = reinterpret_cast<const uint4*>(from)[q * kMmaThreads + at.thread];
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    // Matrix l / 8 of a tile of tokens: its 16 inputs from 16·(l / 8) of these 64.
    uint32_t b[tiles][4];
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
      const int r = 8 * n + at.lane % 8, c = (at.half * 2 + pair) * 4 + at.lane / 8;
      load_matrices(b[n], x + r * kUnitInputs + (c ^ (r & 7)) * 16);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int step = 2 * pair + i;
      uint32_t a[4];
      byte_operands<bits>(w, step, a);
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        const uint32_t operand[2] = {b[n][2 * i], b[n][2 * i + 1]};
        mma_s8(s.dot[n], a, operand);
      }
      if constexpr (grouped) {
        if (((step + 1) & (task.group_steps - 1)) == 0) {
          const int in_slab = (step + 1) / task.group_steps - 1;
          const int per_slab = 4 / task.group_steps;
          end_group<bits>(task, at,
                          from + at.stage.codes + (at.half * per_slab + in_slab) * task.line_bytes,
                          slab * per_slab + in_slab, s);
        }
      }
    }
  }
}

// Adds the two halves and either finishes the block's outputs or leaves them for the second kernel.
template <int bits, int tiles, bool grouped>
SALTIRE_DEVICE void end_block(const Task& task, const Position& at, int block, Sums<tiles>& s) {
  auto* const parts = reinterpret_cast<uint32_t*>(shared_memory() + kMmaStages * at.stage.bytes());
  for (int half = 1; half >= 0; --half) {
    if (at.half == half) {
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t* const to = parts + (8 * n + 2 * at.t + i % 2) * kPartStride +
                               at.tile * kTileRows + at.g + i / 2 * 8;
          const uint32_t mine = grouped ? bits_of(s.sum[n][i]) : static_cast<uint32_t>(s.dot[n][i]);
          *to = half == 1 ? mine : add_parts<grouped>(mine, *to);
          s.sum[n][i] = 0.0f;
          s.dot[n][i] = 0;
        }
      }
    }
    sync_block();
  }
  const bool split = at.stream.is_split(block);
  const int worker = static_cast<int>(blockIdx.x);
  const int64_t slot =
      static_cast<int64_t>(blockIdx.y) * at.stream.workers * 2 + at.stream.slot(worker, block);
  for (int i = at.thread; i < tiles * 8 * kRowBlock; i += kMmaThreads) {
    const int r = i / kRowBlock, row = i % kRowBlock;
    const uint32_t total = parts[r * kPartStride + row];
    const int m = at.first_token + r, n = block * kRowBlock + row;
    if (split) {
      task.parts[slot * (tiles * 8 * kRowBlock) + i] = total;
    } else if (m < task.M && n < task.N) {
      finish<grouped>(task, total, m, n, kByteFactor<bits>);
    }
  }
}

template <int bits, int tiles, bool grouped>
__global__ void __launch_bounds__(kMmaThreads, tiles <= 4 ? 2 : 1)
    multiply_stream(const __grid_constant__ Task task) {
  Position at;
  at.thread = static_cast<int>(threadIdx.x);
  at.lane = at.thread % 32;
  at.g = at.lane / 4;
  at.t = at.lane % 4;
  at.tile = at.thread / 32 % 4;
  at.half = at.thread / 128;
  const int stages = (task.slabs + kUnitSlabs - 1) / kUnitSlabs;
  at.stream = {task.row_blocks * stages, stages, task.workers};
  at.stage = mma_stage(bits, 8 * tiles, task.group_steps, task.line_bytes);
  at.first_token = static_cast<int>(blockIdx.y) * 8 * tiles;
  const int begin = at.stream.begin(static_cast<int>(blockIdx.x));
  const int end = at.stream.begin(static_cast<int>(blockIdx.x) + 1);
  // Nothing on the stream writes weights; the tokens come from the kernel before.
#pragma unroll
  for (int i = 0; i < kMmaStages - 1; ++i) {
    if (begin + i < end) copy_weights<bits>(task, at, begin + i);
  }
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < kMmaStages - 1; ++i) {
    if (begin + i < end) copy_tokens<8 * tiles>(task, at, begin + i);
    commit_copies();
  }
  let_next_kernel_start();
  Sums<tiles> s;
  for (int unit = begin; unit < end; ++unit) {
    wait_copies<kMmaStages - 2>();
    sync_block();  // the tokens are there, and everybody is done with the stage before
    if (unit + kMmaStages - 1 < end) {
      copy_weights<bits>(task, at, unit + kMmaStages - 1);
      copy_tokens<8 * tiles>(task, at, unit + kMmaStages - 1);
    }
    commit_copies();
    multiply_unit<bits, tiles, grouped>(task, at, unit, s);
    if (unit % stages == stages - 1 || unit == end - 1) {
      end_block<bits, tiles, grouped>(task, at, unit / stages, s);
    }
  }
}

// Adds up a row block that several workers did, in their order, and finishes it.
template <int bits, bool grouped>
__global__ void __launch_bounds__(kMmaThreads)
    add_split_blocks(const __grid_constant__ Task task, int tokens) {
  const int stages = (task.slabs + kUnitSlabs - 1) / kUnitSlabs;
  const StreamK stream = {task.row_blocks * stages, stages, task.workers};
  const int block = static_cast<int>(blockIdx.x), y = static_cast<int>(blockIdx.y);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (!stream.is_split(block)) return;
  const int first = stream.first_worker(block), last = stream.last_worker(block);
  for (int i = static_cast<int>(threadIdx.x); i < tokens * kRowBlock; i += kMmaThreads) {
    const int m = y * tokens + i / kRowBlock, n = block * kRowBlock + i % kRowBlock;
    if (m >= task.M || n >= task.N) continue;
    uint32_t total = 0;
    for (int worker = first; worker <= last; ++worker) {
      const int64_t slot =
          static_cast<int64_t>(y) * stream.workers * 2 + stream.slot(worker, block);
      const uint32_t part = task.parts[slot * (tokens * kRowBlock) + i];
      total = worker == first ? part : add_parts<grouped>(total, part);
    }
    finish<grouped>(task, total, m, n, kByteFactor<bits>);
  }
}

template <int bits, bool grouped>
void run_as(const Task& task, const DevicePlan& plan, const cuda::Launch& how) {
  constexpr const char* kName = "lowbit_gemm mma";
  switch (plan.tokens) {
    case 8:
      cuda::launch<multiply_stream<bits, 1, grouped>>(kName, how, task);
      break;
    case 16:
      cuda::launch<multiply_stream<bits, 2, grouped>>(kName, how, task);
      break;
    case 32:
      cuda::launch<multiply_stream<bits, 4, grouped>>(kName, how, task);
      break;
    default:
      cuda::launch<multiply_stream<bits, 8, grouped>>(kName, how, task);
  }
  if (!plan.fix_up) return;
  cuda::Launch second = how;
  second.grid = dim3(static_cast<unsigned>(task.row_blocks), how.grid.y);
  second.shared_bytes = 0;
  cuda::launch<add_split_blocks<bits, grouped>>("lowbit_gemm add_split_blocks", second, task,
                                                plan.tokens);
}

template <int bits>
void run_with(const Task& task, const DevicePlan& plan, const cuda::Launch& how) {
  if (task.group_steps != 0) return run_as<bits, true>(task, plan, how);
  run_as<bits, false>(task, plan, how);
}

}  // namespace

void run_mma(const Task& task, const DevicePlan& plan, int container, const cuda::Launch& how) {
  if (container == 8) return run_with<8>(task, plan, how);
  if (container == 4) return run_with<4>(task, plan, how);
  run_with<2>(task, plan, how);
}

}  // namespace saltire::lowbit_gemm
