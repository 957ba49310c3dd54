// Many tokens before Hopper: mma tiles of 128 rows x 128 tokens, three stages of asynchronous
// copies. Warp w computes row block w / 4 of the tile (64 rows) times 32 tokens. Codes of at most 4
// bits are multiplied by the 4-bit tensor cores: a stored word is an operand as it is, and x's
// bytes become nibbles on their way from shared memory.
#include "core/cuda/launch.h"
#include "lowbit_gemm/device_routes.h"
#include "lowbit_gemm/device_task.h"

namespace saltire::lowbit_gemm {
namespace {

constexpr int kThreads = 256;
constexpr int kRowTiles = 4;    // of 16 rows, a warp
constexpr int kTokenTiles = 4;  // of 8 tokens, a warp
constexpr int kTileBlocks = 2;  // row blocks of a tile

struct Position {
  int thread, lane, g, t, block_in_tile, first_in_tile;
  int first_block, first_token;
  MmaStage stage;
};

template <int bits>
SALTIRE_DEVICE void copy_stage(const Task& task, const Position& at, int slab) {
  unsigned char* const to = shared_memory() + slab % kSm80Stages * at.stage.bytes();
  if (slab < task.slabs) {
    constexpr int kPiecesOfBlock = 4 * kPieces<bits>;
    for (int i = at.thread; i < kTileBlocks * kPiecesOfBlock * 32; i += kThreads) {
      const int block = at.first_block + i / (kPiecesOfBlock * 32);
      const int64_t from =
          (static_cast<int64_t>(block) * task.slabs + slab) * kPiecesOfBlock * kPiece +
          i % (kPiecesOfBlock * 32) * 16;
      copy_async_16(to + i * 16, task.codes + from, block < task.row_blocks);
    }
    if (task.group_steps != 0) {
      const int lines = 4 / task.group_steps, bytes = lines * task.line_bytes;
      for (int i = at.thread * 16; i < kTileBlocks * bytes; i += kThreads * 16) {
        const int block = at.first_block + i / bytes;
        const int64_t line = static_cast<int64_t>(block) * task.padded_groups + slab * lines;
        copy_async_16(to + at.stage.codes + i, task.tables + line * task.line_bytes + i % bytes,
                      block < task.row_blocks);
      }
    }
    unsigned char* const x = to + at.stage.codes + at.stage.tables;
    for (int i = at.thread; i < kTileTokens * (kSlab / 16); i += kThreads) {
      const int r = i / (kSlab / 16), c = i % (kSlab / 16), m = at.first_token + r;
      const int k = slab * kSlab + c * 16;
      copy_async_16(x + r * kSlab + (c ^ (r & 7)) * 16,
                    task.x + static_cast<int64_t>(m) * task.K + k, m < task.M && k < task.K);
    }
  }
  commit_copies();
}

template <bool grouped>
struct Sums {
  int32_t dot[kRowTiles][kTokenTiles][4] = {};
  float sum[grouped ? kRowTiles : 1][grouped ? kTokenTiles : 1][4] = {};
};

SALTIRE_DEVICE int token_of(const Position& at, int n, int i) {
  return at.first_token + at.first_in_tile + 8 * n + 2 * at.t + i % 2;
}

SALTIRE_DEVICE void end_group(const Task& task, const Position& at, const unsigned char* line,
                              int group, float factor, Sums<true>& s) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int entry = r * (kTileRows / 2) + at.g;
    const Pair scale = read_pair(line, entry, task.half_table);
    Pair zero = {};
    if (task.has_zero) zero = read_pair(line + zero_offset(task), entry, task.half_table);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float value = static_cast<float>(s.dot[r][n][i]);
        if (task.has_zero) {
          const int m = token_of(at, n, i);
          const bool known = m < task.M && group < task.groups;
          const float x_sum =
              known ? static_cast<float>(task.x_sum[m * task.groups + group]) : 0.0f;
          value = fmaf(task.middle - (i < 2 ? zero.upper : zero.lower), factor * x_sum, value);
        }
        s.sum[r][n][i] = fmaf(i < 2 ? scale.upper : scale.lower, value, s.sum[r][n][i]);
        s.dot[r][n][i] = 0;
      }
    }
  }
}

template <int bits, bool nibbles, bool grouped>
__global__ void __launch_bounds__(kThreads, 1) multiply_tiles(const __grid_constant__ Task task) {
  constexpr float kFactor = nibbles ? kNibbleFactor<bits> : kByteFactor<bits>;
  Position at;
  at.thread = static_cast<int>(threadIdx.x);
  at.lane = at.thread % 32;
  at.g = at.lane / 4;
  at.t = at.lane % 4;
  at.block_in_tile = at.thread / 128;
  at.first_in_tile = at.thread / 32 % 4 * 8 * kTokenTiles;
  at.first_block = static_cast<int>(blockIdx.x) * kTileBlocks;
  at.first_token = static_cast<int>(blockIdx.y) * kTileTokens;
  at.stage = sm80_stage(bits, task.group_steps, task.line_bytes);
  for (int slab = 0; slab < kSm80Stages - 1; ++slab) copy_stage<bits>(task, at, slab);
  Sums<grouped> s;
  for (int slab = 0; slab < task.slabs; ++slab) {
    wait_copies<kSm80Stages - 2>();
    sync_block();
    copy_stage<bits>(task, at, slab + kSm80Stages - 1);
    const unsigned char* const from = shared_memory() + slab % kSm80Stages * at.stage.bytes();
    const unsigned char* const x = from + at.stage.codes + at.stage.tables;
    const auto* const codes =
        reinterpret_cast<const uint4*>(from) + at.block_in_tile * 4 * kPieces<bits> * 32 + at.lane;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[kTokenTiles][4];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const int r = at.first_in_tile + 8 * n + at.lane % 8, c = pair * 4 + at.lane / 8;
        load_matrices(b[n], x + r * kSlab + (c ^ (r & 7)) * 16);
      }
      Slab<bits> w[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        // The pieces of these two steps.
        constexpr int kOfPair = bits == 8 ? 2 : 1;
#pragma unroll
        for (int i = 0; i < kOfPair; ++i) {
          const int q = bits == 2 ? 0 : pair * kOfPair + i;
          w[r].piece[q] = codes[(r * kPieces<bits> + q) * 32];
        }
      }
      if constexpr (nibbles) {
        uint32_t packed[kTokenTiles][2];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          packed[n][0] = nibbles_of(b[n][0], b[n][1]);
          packed[n][1] = nibbles_of(b[n][2], b[n][3]);
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          uint32_t a[4];
          nibble_operands<bits>(w[r], pair, a);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) mma_s4(s.dot[r][n], a, packed[n]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int step = 2 * pair + i;
        if constexpr (!nibbles) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            uint32_t a[4];
            byte_operands<bits>(w[r], step, a);
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
              const uint32_t operand[2] = {b[n][2 * i], b[n][2 * i + 1]};
              mma_s8(s.dot[r][n], a, operand);
            }
          }
        }
        if constexpr (grouped) {
          if (((step + 1) & (task.group_steps - 1)) == 0) {
            const int lines = 4 / task.group_steps, line = (step + 1) / task.group_steps - 1;
            end_group(task, at,
                      from + at.stage.codes + (at.block_in_tile * lines + line) * task.line_bytes,
                      slab * lines + line, kFactor, s);
          }
        }
      }
    }
  }
  const int first_row = (at.first_block + at.block_in_tile) * kRowBlock + at.g;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    TileSums<kTokenTiles> tile;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (grouped) {
          tile.bits[n][i] = bits_of(s.sum[r][n][i]);
        } else {
          tile.bits[n][i] = static_cast<uint32_t>(s.dot[r][n][i]);
        }
      }
    }
    finish_tile<grouped, kTokenTiles>(task, tile, first_row + r * kTileRows, token_of(at, 0, 0),
                                      kFactor);
  }
}

template <int bits, bool nibbles>
void run_as(const Task& task, const cuda::Launch& how) {
  if (task.group_steps != 0) {
    cuda::launch<multiply_tiles<bits, nibbles, true>>("lowbit_gemm sm80", how, task);
  } else {
    cuda::launch<multiply_tiles<bits, nibbles, false>>("lowbit_gemm sm80", how, task);
  }
}

void run_sm80(const Task& task, const DevicePlan& plan, const cuda::Device&, cudaStream_t stream) {
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.token_blocks));
  how.block = dim3(kThreads);
  how.shared_bytes = plan.shared_bytes;
  how.stream = stream;
  if (task.middle == symmetric_zero(8)) return run_as<8, false>(task, how);
  if (task.middle == symmetric_zero(2)) {
    if (plan.four_bit_mma) return run_as<2, true>(task, how);
    return run_as<2, false>(task, how);
  }
  if (plan.four_bit_mma) return run_as<4, true>(task, how);
  run_as<4, false>(task, how);
}

const bool registered = (prefills().sm80 = run_sm80, true);

}  // namespace
}  // namespace saltire::lowbit_gemm
