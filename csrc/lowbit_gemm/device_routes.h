// The launches that kernel.cu chooses from, and how much shared memory they take.
#pragma once
#include "core/cuda/launch.h"
#include "lowbit_gemm/device.h"

namespace saltire::lowbit_gemm {

constexpr int kGemvThreads = 256;

// Scales and zeros of a tile's rows; none per channel.
static SALTIRE_BOTH int gemv_table_bytes(int group_steps, int padded_groups, bool half_table,
                                         bool has_zero) {
  return group_steps == 0 ? 0
                          : padded_groups * kTileRows * (half_table ? 2 : 4) * (has_zero ? 2 : 1);
}

static SALTIRE_BOTH int gemv_shared_bytes(int tokens, int slabs, int table_bytes, int warps) {
  return tokens * slabs * kSlab + table_bytes + warps * tokens * kTileRows * 4;
}

// The stream's unit: 64 rows, two slabs, and the tokens of both.
constexpr int kMmaThreads = 256;
constexpr int kMmaStages = 4;
constexpr int kUnitSlabs = 2;
constexpr int kPartStride = kRowBlock + 4;  // words of a token's parts: keeps lanes off one bank

struct MmaStage {
  int codes, tables, tokens;  // bytes
  SALTIRE_BOTH constexpr int bytes() const { return codes + tables + tokens; }
};

static SALTIRE_BOTH MmaStage mma_stage(int container, int tokens, int group_steps, int line_bytes) {
  return {kUnitSlabs * 4 * container / 2 * kPiece,
          group_steps == 0 ? 0 : kUnitSlabs * 4 / group_steps * line_bytes,
          tokens * kUnitSlabs * kSlab};
}

// Tiles of 128 rows and 128 tokens, one slab a stage.
constexpr int kSm80Stages = 3;
constexpr int kTileTokens = 128;

static SALTIRE_BOTH MmaStage sm80_stage(int container, int group_steps, int line_bytes) {
  return {2 * 4 * container / 2 * kPiece, group_steps == 0 ? 0 : 2 * 4 / group_steps * line_bytes,
          kTileTokens * kSlab};
}

// Tiles of 128 or 256 rows and 128 tokens, one slab a stage, as many stages as fit up to six. A
// stage begins with its tokens and is a multiple of 1,024 bytes long, after which the swizzle of
// the copy engine repeats.
constexpr int kSm90Threads = 384;
constexpr int kSm90MostStages = 6;
constexpr int kSm90Barriers = 1024;  // bytes

constexpr int kLongestLine = kRowBlock * 4 * 2;  // bytes: float scales and zeros

// Known to the compiler, which has no registers left for it.
constexpr MmaStage sm90_stage(int rows, int container, int group_steps) {
  const int blocks = rows / kRowBlock;
  return {blocks * 4 * container / 2 * kPiece,
          group_steps == 0 ? 0 : blocks * 4 / group_steps * kLongestLine, kTileTokens * kSlab};
}

// Whether tiles of 256 rows leave registers enough: groups of 32 and 64 do not.
constexpr bool sm90_has_high_tiles(int group_steps) {
  return group_steps == 0 || group_steps == 4;
}

constexpr int sm90_stages(const MmaStage& stage) {
  constexpr int kShared = 227 * 1024 - kSm90Barriers;
  const int fit = kShared / stage.bytes();
  return fit < kSm90MostStages ? fit : kSm90MostStages;
}

void run_gemv(const Task& task, const DevicePlan& plan, int container, const cuda::Launch& how);
void run_mma(const Task& task, const DevicePlan& plan, int container, const cuda::Launch& how);

}  // namespace saltire::lowbit_gemm
