// Many tokens on Hopper: Yᵀ = W·Xᵀ by wgmma, the unpacked weights as operand A from registers, the
// tokens as operand B from shared memory, where the copy engine puts them swizzled.
//
// A block works on tiles of 128 or 256 rows x 128 tokens, one after another. One warp asks the copy
// engine for slabs of tokens, codes and scales, up to six ahead; two warpgroups compute 64 rows (or
// twice 64) each. While one unpacks and scales, the other's products keep the tensor cores busy.
#include "core/cuda/launch.h"
#include "core/cuda/sm90.h"
#include "lowbit_gemm/device_routes.h"
#include "lowbit_gemm/device_task.h"

namespace saltire::lowbit_gemm {
namespace {

constexpr int kGroups = 2;              // warpgroups that compute
constexpr int kWarpgroup = 128;         // threads
constexpr int kProducerRegisters = 24;  // 2·128·240 + 128·24 <= 65,536
constexpr int kConsumerRegisters = 240;
static_assert(kSm90Threads == (kGroups + 1) * kWarpgroup, "one more that copies");

// Tiles in bands of eight blocks of tokens: what runs at one time then shares rows and tokens in
// L2.
struct Tile {
  int row, token;  // in tiles
};
SALTIRE_DEVICE Tile tile_at(int index, int rows, int tokens) {
  constexpr int kBand = 8;
  const int band = index / (kBand * rows);
  const int height = tokens - band * kBand < kBand ? tokens - band * kBand : kBand;
  const int in_band = index - band * kBand * rows;
  return {in_band / height, band * kBand + in_band % height};
}

constexpr int lines_of_slab(int steps) {
  return steps == 0 ? 0 : 4 / steps;
}

// Where things lie in shared memory: stages (tokens, codes, tables), then the barriers.
template <int bits, int steps, int halves>
struct Shared {
  static constexpr int kBlocks = kGroups * halves;           // row blocks of a tile
  static constexpr int kCodes = 4 * kPieces<bits> * kPiece;  // bytes of a row block's slab
  static constexpr MmaStage kStage = sm90_stage(kBlocks * kRowBlock, bits, steps);
  static constexpr int kStages = sm90_stages(kStage);
  static_assert(kStage.bytes() % 1024 == 0, "every stage's tokens start where the swizzle does");
};

// The stage at hand; `full` and `empty` barriers of it.
struct Turn {
  int slot = 0, parity = 0;
};

template <typename S>
SALTIRE_DEVICE void advance(Turn& turn) {
  if (++turn.slot == S::kStages) {
    turn.slot = 0;
    turn.parity ^= 1;
  }
}

template <typename S>
SALTIRE_DEVICE unsigned char* memory_of(const Turn& turn) {
  return shared_memory() + turn.slot * S::kStage.bytes();
}

// The copy engine's bytes have come.
template <typename S>
SALTIRE_DEVICE Barrier* full_barrier(int slot) {
  return reinterpret_cast<Barrier*>(shared_memory() + S::kStages * S::kStage.bytes()) + slot;
}

// Every computing warp is done with the stage.
template <typename S>
SALTIRE_DEVICE Barrier* empty_barrier(int slot) {
  return full_barrier<S>(slot) + S::kStages;
}

// --- copying ------------------------------------------------------------------------------------

template <int bits, int steps, int halves>
SALTIRE_DEVICE void ask_for_stage(const Task& task, const TensorMap* x, const Turn& turn, Tile tile,
                                  int slab) {
  using S = Shared<bits, steps, halves>;
  constexpr int kLines = lines_of_slab(steps);
  const int lines = kLines * task.line_bytes;
  unsigned char* const to = memory_of<S>(turn);
  Barrier* const full = full_barrier<S>(turn.slot);
  arrive_and_expect(full, S::kStage.tokens + S::kBlocks * (S::kCodes + lines));
  copy_box(to, x, tile.token * kTileTokens, slab * kSlab, full);
#pragma unroll
  for (int b = 0; b < S::kBlocks; ++b) {
    // Beyond the last block the last one again: its results are not stored.
    const int wanted = tile.row * S::kBlocks + b;
    const int64_t block = wanted < task.row_blocks ? wanted : task.row_blocks - 1;
    copy_bytes(to + S::kStage.tokens + b * S::kCodes,
               task.codes + (block * task.slabs + slab) * S::kCodes, S::kCodes, full);
    if constexpr (kLines > 0) {
      const int64_t line = block * task.padded_groups + slab * kLines;
      copy_bytes(to + S::kStage.tokens + S::kStage.codes + b * kLines * kLongestLine,
                 task.tables + line * task.line_bytes, lines, full);
    }
  }
}

// --- computing ----------------------------------------------------------------------------------

template <int bits>
SALTIRE_DEVICE Slab<bits> read_slab(const unsigned char* codes, int lane) {
  Slab<bits> w;
#pragma unroll
  for (int q = 0; q < kPieces<bits>; ++q) {
    w.piece[q] = reinterpret_cast<const uint4*>(codes + q * kPiece)[lane];
  }
  return w;
}

struct Lane {
  int lane, g, t, tile, group;  // tile: of the row block, the warp of the warpgroup
};

// The sums of groups one after another: scaled as soon as a group is complete.
template <int bits, int steps>
SALTIRE_DEVICE void multiply_groups(const Task& task, const Lane& at, const Slab<bits>& w,
                                    uint64_t b, const unsigned char* lines, float (&sum)[64]) {
#pragma unroll
  for (int part = 0; part < lines_of_slab(steps); ++part) {
    int32_t dot[64];
    uint32_t a[steps][4];
#pragma unroll
    for (int s = 0; s < steps; ++s) byte_operands<bits>(w, part * steps + s, a[s]);
    begin_products();
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      multiply_128(dot, a[s], b + static_cast<uint64_t>((part * steps + s) * 2), s > 0);
    }
    commit_products();
    const unsigned char* const line = lines + part * task.line_bytes;
    const int entry = at.tile * (kTileRows / 2) + at.g;
    const Pair scale = read_pair(line, entry, task.half_table);
    wait_products<0>();
#pragma unroll
    for (int j = 0; j < 64; ++j) {
      sum[j] = fmaf(j % 4 < 2 ? scale.upper : scale.lower, static_cast<float>(dot[j]), sum[j]);
    }
  }
}

// What zero points other than the middle add: Σ_g scale·(middle - zero)·x_sum, after all else, when
// there are registers for it.
template <int bits>
SALTIRE_DEVICE void add_zeros(const Task& task, const Lane& at, int block, int first_token,
                              float (&sum)[64]) {
  if (block >= task.row_blocks) return;
  const unsigned char* line =
      task.tables + static_cast<int64_t>(block) * task.padded_groups * task.line_bytes;
  const int entry = at.tile * (kTileRows / 2) + at.g;
  for (int group = 0; group < task.groups; ++group, line += task.line_bytes) {
    const Pair scale = read_pair(line, entry, task.half_table);
    const Pair zero = read_pair(line + zero_offset(task), entry, task.half_table);
    const float upper = scale.upper * (kByteFactor<bits> * (task.middle - zero.upper));
    const float lower = scale.lower * (kByteFactor<bits> * (task.middle - zero.lower));
#pragma unroll
    for (int j = 0; j < 64; j += 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int wanted = first_token + j * 2 + 2 * at.t + i;
        const int m = wanted < task.M ? wanted : task.M - 1;
        const float x_sum = static_cast<float>(task.x_sum[m * task.groups + group]);
        sum[j + i] = fmaf(upper, x_sum, sum[j + i]);
        sum[j + 2 + i] = fmaf(lower, x_sum, sum[j + 2 + i]);
      }
      keep_order();
    }
  }
}

// A whole slab into one integer sum, left under way.
template <int bits>
SALTIRE_DEVICE void start_slab(const Slab<bits>& w, uint64_t b, bool add, uint32_t (&a)[4][4],
                               int32_t (&dot)[64]) {
#pragma unroll
  for (int s = 0; s < 4; ++s) byte_operands<bits>(w, s, a[s]);
  begin_products();
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    multiply_128(dot, a[s], b + static_cast<uint64_t>(s * 2), add || s > 0);
  }
  commit_products();
}

template <int bits, bool grouped>
SALTIRE_DEVICE void finish_rows(const Task& task, const Lane& at, const uint32_t (&sums)[64],
                                int block, int first_token) {
  constexpr int kChunk = 2;  // tiles of 8 tokens at a time, for registers' sake
  const int row = block * kRowBlock + at.tile * kTileRows + at.g;
#pragma unroll
  for (int first = 0; first < 16; first += kChunk) {
    TileSums<kChunk> tile;
#pragma unroll
    for (int i = 0; i < 4 * kChunk; ++i) tile.bits[i / 4][i % 4] = sums[first * 4 + i];
    finish_tile<grouped, kChunk>(task, tile, row, first_token + 8 * first + 2 * at.t,
                                 kByteFactor<bits>);
    keep_order();
  }
}

template <int bits, int steps, int halves>
SALTIRE_DEVICE void compute_tile(const Task& task, const Lane& at, const Tile& tile, Turn& turn) {
  using S = Shared<bits, steps, halves>;
  constexpr bool kGrouped = steps != 0;
  const int first_token = tile.token * kTileTokens;
  float sum[kGrouped ? halves : 1][64];
  int32_t dot[kGrouped ? 1 : halves][64];
  uint32_t a[kGrouped ? 1 : halves][4][4];
  if constexpr (kGrouped) {
#pragma unroll
    for (int h = 0; h < halves; ++h) {
#pragma unroll
      for (int j = 0; j < 64; ++j) sum[h][j] = 0.0f;
    }
  }
  for (int slab = 0; slab < task.slabs; ++slab) {
    wait_for(full_barrier<S>(turn.slot), turn.parity);
    const unsigned char* const from = memory_of<S>(turn);
    const uint64_t b = operand_of(from);
#pragma unroll
    for (int h = 0; h < halves; ++h) {
      const int block = at.group * halves + h;
      const Slab<bits> w = read_slab<bits>(
          from + S::kStage.tokens + block * S::kCodes + at.tile * kPieces<bits> * kPiece, at.lane);
      if constexpr (kGrouped) {
        const unsigned char* const tables = from + S::kStage.tokens + S::kStage.codes;
        multiply_groups<bits, steps>(task, at, w, b,
                                     tables + block * lines_of_slab(steps) * kLongestLine, sum[h]);
      } else {
        start_slab<bits>(w, b, slab > 0, a[h], dot[h]);
      }
    }
    if constexpr (!kGrouped) wait_products<0>();
    sync_warp();
    if (at.lane == 0) arrive(empty_barrier<S>(turn.slot));
    advance<S>(turn);
  }
#pragma unroll
  for (int h = 0; h < halves; ++h) {
    const int block = (tile.row * kGroups + at.group) * halves + h;
    if constexpr (kGrouped) {
      if (task.has_zero) add_zeros<bits>(task, at, block, first_token, sum[h]);
    }
    uint32_t sums[64];
#pragma unroll
    for (int j = 0; j < 64; ++j) {
      if constexpr (kGrouped) {
        sums[j] = bits_of(sum[h][j]);
      } else {
        sums[j] = static_cast<uint32_t>(dot[h][j]);
      }
    }
    finish_rows<bits, kGrouped>(task, at, sums, block, first_token);
  }
}

// steps: of a group; 0 for one scale a channel.
template <int bits, int steps, int halves>
__global__ void __launch_bounds__(kSm90Threads, 1)
    multiply_tiles(const __grid_constant__ Task task, const __grid_constant__ TensorMap x,
                   int row_tiles, int token_tiles) {
  using S = Shared<bits, steps, halves>;
  const int thread = static_cast<int>(threadIdx.x), tiles = row_tiles * token_tiles;
  if (thread == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      make_barrier(full_barrier<S>(i), 1);
      make_barrier(empty_barrier<S>(i), kGroups * 4);
    }
    fence_barriers();
  }
  sync_block();
  wait_for_previous_kernel();
  let_next_kernel_start();
  Turn turn;
  if (thread >= kGroups * kWarpgroup) {
    shrink_registers<kProducerRegisters>();
    if (thread == kGroups * kWarpgroup) {
      turn.parity = 1;  // every stage begins empty
      for (int index = static_cast<int>(blockIdx.x); index < tiles;
           index += static_cast<int>(gridDim.x)) {
        const Tile tile = tile_at(index, row_tiles, token_tiles);
        for (int slab = 0; slab < task.slabs; ++slab) {
          wait_for(empty_barrier<S>(turn.slot), turn.parity);
          ask_for_stage<bits, steps, halves>(task, &x, turn, tile, slab);
          advance<S>(turn);
        }
      }
    }
  } else {
    grow_registers<kConsumerRegisters>();
    Lane at;
    at.lane = thread % 32;
    at.g = at.lane / 4;
    at.t = at.lane % 4;
    at.tile = thread / 32 % 4;
    at.group = thread / kWarpgroup;
    for (int index = static_cast<int>(blockIdx.x); index < tiles;
         index += static_cast<int>(gridDim.x)) {
      compute_tile<bits, steps, halves>(task, at, tile_at(index, row_tiles, token_tiles), turn);
    }
  }
}

template <int bits, int steps, int halves>
void run_as(const Task& task, const TensorMap& x, const DevicePlan& plan, const cuda::Launch& how) {
  cuda::launch<multiply_tiles<bits, steps, halves>>("lowbit_gemm sm90", how, task, x, plan.blocks,
                                                    plan.token_blocks);
}

template <int bits, int steps>
void run_with(const Task& task, const TensorMap& x, const DevicePlan& plan,
              const cuda::Launch& how) {
  if constexpr (sm90_has_high_tiles(steps)) {
    if (plan.rows == 256) return run_as<bits, steps, 2>(task, x, plan, how);
  }
  run_as<bits, steps, 1>(task, x, plan, how);
}

template <int bits>
void run_bits(const Task& task, const TensorMap& x, const DevicePlan& plan,
              const cuda::Launch& how) {
  if (task.group_steps == 0) return run_with<bits, 0>(task, x, plan, how);
  if (task.group_steps == 1) return run_with<bits, 1>(task, x, plan, how);
  if (task.group_steps == 2) return run_with<bits, 2>(task, x, plan, how);
  run_with<bits, 4>(task, x, plan, how);
}

void run_sm90(const Task& task, const DevicePlan& plan, const cuda::Device& device,
              cudaStream_t stream) {
  const TensorMap x = map_bytes(task.x, task.M, task.K, kTileTokens);
  const int tiles = plan.blocks * plan.token_blocks;
  cuda::Launch how;
  how.grid =
      dim3(static_cast<unsigned>(tiles < device.multiprocessors ? tiles : device.multiprocessors));
  how.block = dim3(kSm90Threads);
  how.shared_bytes = plan.shared_bytes;
  how.stream = stream;
  how.overlap_previous = true;
  if (task.middle == symmetric_zero(8)) return run_bits<8>(task, x, plan, how);
  if (task.middle == symmetric_zero(2)) return run_bits<2>(task, x, plan, how);
  run_bits<4>(task, x, plan, how);
}

const bool registered = (prefills().sm90 = run_sm90, true);

}  // namespace
}  // namespace saltire::lowbit_gemm
