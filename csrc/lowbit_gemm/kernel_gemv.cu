// A few tokens: dp4a. A block owns a tile of 16 rows; its warps take slabs in turn, so K is split
// within the block and no workspace is needed. Weights go from memory to registers, several slabs
// ahead; tokens and scales lie in shared memory.
#include "core/cuda/launch.h"
#include "lowbit_gemm/device_routes.h"
#include "lowbit_gemm/device_task.h"

namespace saltire::lowbit_gemm {
namespace {

// Slabs a warp has under way: 4 KiB at 8 and 4 bits.
template <int bits>
constexpr int kAhead = bits == 8 ? 2 : 4;
constexpr int kWordsOfLane = 8;

template <int bits>
SALTIRE_DEVICE Slab<bits> load_slab(const unsigned char* tile, int slab, int lane) {
  Slab<bits> w;
#pragma unroll
  for (int q = 0; q < kPieces<bits>; ++q) {
    w.piece[q] =
        load_once(tile + (static_cast<int64_t>(slab) * 4 * kPieces<bits> + q) * kPiece + lane * 16);
  }
  return w;
}

// Tokens to shared memory, [token][slab][t][8 words]: a lane's eight words of a slab lie together.
// Inputs past K become 0.
template <int tokens>
SALTIRE_DEVICE void stage_tokens(const Task& task, uint32_t* to) {
  const int words = task.slabs * (kSlab / 4);
  for (int i = static_cast<int>(threadIdx.x) * 4; i < tokens * words;
       i += static_cast<int>(blockDim.x) * 4) {
    const int m = i / words, word = i % words;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (m < task.M && word * 4 < task.K) {
      v = *reinterpret_cast<const uint4*>(task.x + static_cast<int64_t>(m) * task.K + word * 4);
    }
    // Words 4j .. 4j + 3 of a slab are those of t = 0 .. 3, step j / 2, half j % 2.
    uint32_t* const at = to + m * words + word / 32 * 32 + word % 32 / 4;
    at[0] = v.x;
    at[kWordsOfLane] = v.y;
    at[2 * kWordsOfLane] = v.z;
    at[3 * kWordsOfLane] = v.w;
  }
}

// This tile's scales and zeros, line after line, 16 entries each.
SALTIRE_DEVICE void stage_tables(const Task& task, const unsigned char* lines, int tile,
                                 unsigned char* to) {
  const int entry = task.half_table ? 2 : 4, kinds = task.has_zero ? 2 : 1;
  const int pieces = kTileRows * entry / 16;  // of 16 bytes, of a kind
  const int count = task.padded_groups * kinds * pieces;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const int kind = i / pieces;  // group · kinds + (0 for scales, 1 for zeros)
    const unsigned char* const from =
        lines + kind * (kRowBlock * entry) + tile * (kTileRows * entry) + i % pieces * 16;
    reinterpret_cast<uint4*>(to)[i] = *reinterpret_cast<const uint4*>(from);
  }
}

template <int tokens>
struct Sums {
  int32_t dot[tokens][2] = {};  // rows g and g + 8
  float sum[tokens][2] = {};
};

// Scales what a group has summed up. Lanes t = 0 alone know of the zero point.
template <int bits, int tokens>
SALTIRE_DEVICE void end_group(const Task& task, const unsigned char* tables, int group, int g,
                              int t, Sums<tokens>& s) {
  const int line = kTileRows * (task.half_table ? 2 : 4);
  const unsigned char* const at = tables + group * (task.has_zero ? 2 : 1) * line;
  const Pair scale = read_pair(at, g, task.half_table);
  Pair zero = {};
  const bool shift = task.has_zero && t == 0 && group < task.groups;
  if (shift) zero = read_pair(at + line, g, task.half_table);
#pragma unroll
  for (int m = 0; m < tokens; ++m) {
    float upper = static_cast<float>(s.dot[m][0]), lower = static_cast<float>(s.dot[m][1]);
    if (shift && m < task.M) {
      const float x_sum =
          kByteFactor<bits> * static_cast<float>(task.x_sum[m * task.groups + group]);
      upper = fmaf(task.middle - zero.upper, x_sum, upper);
      lower = fmaf(task.middle - zero.lower, x_sum, lower);
    }
    s.sum[m][0] = fmaf(scale.upper, upper, s.sum[m][0]);
    s.sum[m][1] = fmaf(scale.lower, lower, s.sum[m][1]);
    s.dot[m][0] = s.dot[m][1] = 0;
  }
}

template <int bits, int tokens, bool grouped>
__global__ void __launch_bounds__(kGemvThreads) gemv(const __grid_constant__ Task task) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const int block = static_cast<int>(blockIdx.x) / 4, tile = static_cast<int>(blockIdx.x) % 4;
  auto* const x = reinterpret_cast<uint32_t*>(shared_memory());
  unsigned char* const tables = shared_memory() + tokens * task.slabs * kSlab;
  auto* const parts =
      reinterpret_cast<uint32_t*>(tables + gemv_table_bytes(task.group_steps, task.padded_groups,
                                                            task.half_table, task.has_zero));
  const unsigned char* const codes =
      task.codes + (static_cast<int64_t>(block) * task.slabs * 4 + tile) * kPieces<bits> * kPiece;
  // Nothing on the stream writes weights, so they are asked for before the kernel that makes the
  // tokens has ended.
  Slab<bits> w[kAhead<bits>];
#pragma unroll
  for (int u = 0; u < kAhead<bits>; ++u) {
    const int slab = warp + u * warps;
    if (slab < task.slabs) w[u] = load_slab<bits>(codes, slab, lane);
  }
  if constexpr (grouped) {
    stage_tables(task,
                 task.tables + static_cast<int64_t>(block) * task.padded_groups * task.line_bytes,
                 tile, tables);
  }
  wait_for_previous_kernel();
  stage_tokens<tokens>(task, x);
  sync_block();
  let_next_kernel_start();

  Sums<tokens> s;
  for (int first = warp; first < task.slabs; first += kAhead<bits> * warps) {
#pragma unroll
    for (int u = 0; u < kAhead<bits>; ++u) {
      const int slab = first + u * warps;
      if (slab >= task.slabs) break;
      const Slab<bits> now = w[u];
      const int next = slab + kAhead<bits> * warps;
      if (next < task.slabs) w[u] = load_slab<bits>(codes, next, lane);
      uint4 values[tokens][2];
#pragma unroll
      for (int m = 0; m < tokens; ++m) {
        const auto* const at = reinterpret_cast<const uint4*>(
            x + (m * task.slabs + slab) * (kSlab / 4) + t * kWordsOfLane);
        values[m][0] = at[0];
        values[m][1] = at[1];
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t a[4];
        byte_operands<bits>(now, step, a);
#pragma unroll
        for (int m = 0; m < tokens; ++m) {
          const uint32_t low = word_of(values[m][step / 2], step % 2 * 2);
          const uint32_t high = word_of(values[m][step / 2], step % 2 * 2 + 1);
          s.dot[m][0] = dot4_signed(a[0], low, dot4_signed(a[2], high, s.dot[m][0]));
          s.dot[m][1] = dot4_signed(a[1], low, dot4_signed(a[3], high, s.dot[m][1]));
        }
        if constexpr (grouped) {
          const int done = slab * 4 + step + 1;
          if ((done & (task.group_steps - 1)) == 0) {
            end_group<bits>(task, tables, done / task.group_steps - 1, g, t, s);
          }
        }
      }
    }
  }

  // Lanes t of a row, then warps.
#pragma unroll
  for (int m = 0; m < tokens; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t bits_of_sum;
      if constexpr (grouped) {
        float v = s.sum[m][r];
        v += shuffle_xor(v, 1);
        v += shuffle_xor(v, 2);
        bits_of_sum = bits_of(v);
      } else {
        int32_t v = s.dot[m][r];
        v += shuffle_xor(v, 1);
        v += shuffle_xor(v, 2);
        bits_of_sum = static_cast<uint32_t>(v);
      }
      if (t == 0) parts[(warp * tokens + m) * kTileRows + g + 8 * r] = bits_of_sum;
    }
  }
  sync_block();
  const int i = static_cast<int>(threadIdx.x);
  const int m = i / kTileRows, n = static_cast<int>(blockIdx.x) * kTileRows + i % kTileRows;
  if (i >= tokens * kTileRows || m >= task.M || n >= task.N) return;
  uint32_t total = parts[i];
  for (int other = 1; other < warps; ++other) {
    total = add_parts<grouped>(total, parts[other * tokens * kTileRows + i]);
  }
  finish<grouped>(task, total, m, n, kByteFactor<bits>);
}

template <int bits, int tokens>
void run_as(const Task& task, const cuda::Launch& how) {
  if (task.group_steps != 0) {
    cuda::launch<gemv<bits, tokens, true>>("lowbit_gemm gemv", how, task);
  } else {
    cuda::launch<gemv<bits, tokens, false>>("lowbit_gemm gemv", how, task);
  }
}

template <int bits>
void run_with(const Task& task, const DevicePlan& plan, const cuda::Launch& how) {
  if (plan.tokens == 1) return run_as<bits, 1>(task, how);
  if (plan.tokens == 2) return run_as<bits, 2>(task, how);
  run_as<bits, 4>(task, how);
}

}  // namespace

void run_gemv(const Task& task, const DevicePlan& plan, int container, const cuda::Launch& how) {
  if (container == 8) return run_with<8>(task, plan, how);
  if (container == 4) return run_with<4>(task, plan, how);
  run_with<2>(task, plan, how);
}

}  // namespace saltire::lowbit_gemm
