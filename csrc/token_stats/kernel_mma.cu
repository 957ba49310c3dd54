// The products of the linear form on bf16 tensor cores: tiles of 128 x 128, 32 inputs a stage, four
// stages of asynchronous copies that run on from one tile into the next. Eight warps, 64 x 32 each.
//
// An operand that lies along its depth is kept as rows of 64 bytes, one that lies along its rows as
// 32 depths of 256 bytes, and ldmatrix transposes it; 16-byte pieces are exchanged by a xor so that
// eight addresses of one ldmatrix never share a bank.
//
// 75 KB of shared memory and 128 registers: two blocks a multiprocessor on sm_80, so that the end
// of one block's tile runs beside the other's products.
#include "token_stats/device_linear.h"
#include "token_stats/device_state.h"

namespace saltire::token_stats {
namespace {

constexpr int kTile = kMmaTile;
constexpr int kDepth = 32;
constexpr int kStages = 4;
constexpr int kOperandBytes = kTile * kDepth * 2;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kAcross = kTile / kWarpColumns;  // warps that share rows
constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;
static_assert(kTile / kWarpRows * kAcross * 32 == kMmaThreads, "a warp for each part of a tile");

// Hopper's compiler needs more than 128 registers; there sm90_linear.cu does this work anyway.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kBlocksAtOnce = 1;
#else
constexpr int kBlocksAtOnce = 2;
#endif

// Behind the stages: what is known of the tile's 128 tokens.
struct StatsMemory {
  float c[kTile];
  int wanted[kTile];  // the label
  float label[kTile];
  Part running[kTile];
  Part parts[kAcross][kTile];
};
struct SpreadMemory {
  GradientFacts facts[kTile];
};
constexpr size_t kTokenBytes = sizeof(StatsMemory) > sizeof(SpreadMemory) ? sizeof(StatsMemory)
                                                                          : sizeof(SpreadMemory);

// An operand: element (i, k) at base[i·stride + k], or base[k·stride + i] if it lies along rows.
struct Matrix {
  const uint16_t* base;
  int64_t stride;
  int rows, depth;
};

struct Position {
  int thread, lane, row, column;  // the last two: of the warp, in the tile
};

// --- copying ------------------------------------------------------------------------------------

template <bool along_rows>
SALTIRE_DEVICE void copy_operand(const Matrix& m, const Position& at, int row, int depth,
                                 unsigned char* to) {
#pragma unroll
  for (int n = 0; n < kOperandBytes / 16 / kMmaThreads; ++n) {
    const int piece = n * kMmaThreads + at.thread;
    if constexpr (along_rows) {
      const int k = piece / (kTile / 8), c = piece % (kTile / 8);
      copy_async_16(to + k * (kTile * 2) + (c ^ (k & 7)) * 16,
                    m.base + (depth + k) * m.stride + row + c * 8,
                    depth + k < m.depth && row + c * 8 < m.rows);
    } else {
      const int i = piece / (kDepth / 8), c = piece % (kDepth / 8);
      copy_async_16(to + i * (kDepth * 2) + (c ^ (i >> 1 & 3)) * 16,
                    m.base + (row + i) * m.stride + depth + c * 8,
                    row + i < m.rows && depth + c * 8 < m.depth);
    }
  }
}

// --- products -----------------------------------------------------------------------------------

// a[0..3] of mma.m16n8k16: rows row .. row + 15, inputs 16·step .. 16·step + 15 of the stage.
template <bool along_rows>
SALTIRE_DEVICE void load_a(uint32_t (&a)[4], const unsigned char* from, int lane, int row,
                           int step) {
  if constexpr (along_rows) {
    const int k = 16 * step + lane % 8 + lane / 16 * 8, c = row / 8 + lane / 8 % 2;
    load_matrices_transposed(a, from + k * (kTile * 2) + (c ^ (k & 7)) * 16);
  } else {
    const int i = row + lane % 16, c = 2 * step + lane / 16;
    load_matrices(a, from + i * (kDepth * 2) + (c ^ (i >> 1 & 3)) * 16);
  }
}

// b[0..1] of two tiles of 8 columns.
template <bool along_rows>
SALTIRE_DEVICE void load_b(uint32_t (&b)[4], const unsigned char* from, int lane, int column,
                           int step) {
  if constexpr (along_rows) {
    const int k = 16 * step + lane % 16, c = column / 8 + lane / 16;
    load_matrices_transposed(b, from + k * (kTile * 2) + (c ^ (k & 7)) * 16);
  } else {
    const int i = column + lane % 8 + lane / 16 * 8, c = 2 * step + lane / 8 % 2;
    load_matrices(b, from + i * (kDepth * 2) + (c ^ (i >> 1 & 3)) * 16);
  }
}

struct Sums {
  float at[kRowTiles][kColumnTiles][4];
};

template <bool a_along_rows, bool b_along_rows>
SALTIRE_DEVICE void multiply_stage(const unsigned char* from, const Position& at, Sums& sums) {
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t b[kColumnTiles / 2][4];
#pragma unroll
    for (int n = 0; n < kColumnTiles / 2; ++n) {
      load_b<b_along_rows>(b[n], from + kOperandBytes, at.lane, at.column + 16 * n, step);
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      uint32_t a[4];
      load_a<a_along_rows>(a, from, at.lane, at.row + 16 * r, step);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const uint32_t operand[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
        mma_bf16(sums.at[r][n], a, operand);
      }
    }
  }
}

SALTIRE_DEVICE void clear(Sums& sums) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.at[r][n][i] = 0.0f;
    }
  }
}

// --- what becomes of the sums -------------------------------------------------------------------
// Sum at[r][n][i] is of row 16r + g + 8·(i / 2) and column 8n + 2t + i % 2 of the warp.

template <typename Memory>
SALTIRE_DEVICE Memory& token_memory() {
  return *reinterpret_cast<Memory*>(shared_memory() + kStages * kStageBytes);
}

SALTIRE_DEVICE float logit_of(const LinearTask& t, float sum, int column) {
  if (column >= t.count) return kMasked;
  const float x = t.bias != nullptr ? sum + t.bias[t.first + column] : sum;
  return t.tokens.softcap != 0 ? cap(x, t.tokens.softcap) : x;
}

SALTIRE_DEVICE void begin_stats(const LinearTask& t, const Position& at, int row0) {
  if (at.thread >= kTile) return;
  auto& memory = token_memory<StatsMemory>();
  TokenFacts token = {0.0f, -1, true};
  if (row0 + at.thread < t.M) token = facts_of(t.tokens, row0 + at.thread, t.V);
  memory.c[at.thread] = token.inverse_temperature * kLog2E;
  memory.wanted[at.thread] = token.label;
  memory.label[at.thread] = kMasked;
  memory.running[at.thread] = empty_part();
}

// Joins the tile's columns; thread i < 128 adds them to token i's running sums.
SALTIRE_DEVICE void add_stats(const LinearTask& t, const Position& at, const Sums& sums,
                              int column0) {
  auto& memory = token_memory<StatsMemory>();
  const int g = at.lane / 4, first = column0 + at.column + at.lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row + 16 * r + 8 * half + g;
      const float c = memory.c[row];
      const int wanted = memory.wanted[row];
      float x[2 * kColumnTiles];
#pragma unroll
      for (int j = 0; j < 2 * kColumnTiles; ++j) {
        const int column = first + j / 2 * 8 + j % 2;
        x[j] = logit_of(t, sums.at[r][j / 2][2 * half + j % 2], column);
        if (column == wanted) memory.label[row] = x[j];
      }
      Part part = empty_part();
      add_logits(part, x, c, 0);
      // The first of these equal to the largest.
      part.at = 0x7fffffff;
#pragma unroll
      for (int j = 2 * kColumnTiles - 1; j >= 0; --j) {
        if (x[j] == part.max) part.at = first + j / 2 * 8 + j % 2;
      }
      part = merge_lanes<4>(part, c);
      if (at.lane % 4 == 0) memory.parts[at.column / kWarpColumns][row] = part;
    }
  }
  sync_block();
  if (at.thread >= kTile) return;
  Part running = memory.running[at.thread];
#pragma unroll
  for (int w = 0; w < kAcross; ++w) {
    merge(running, memory.parts[w][at.thread], memory.c[at.thread]);
  }
  memory.running[at.thread] = running;
}

SALTIRE_DEVICE void end_stats(const LinearTask& t, const Position& at, int row0, int split) {
  sync_block();
  if (at.thread >= kTile || row0 + at.thread >= t.M) return;
  const auto& memory = token_memory<StatsMemory>();
  const Part& all = memory.running[at.thread];
  t.parts[static_cast<int64_t>(split) * t.M + row0 + at.thread] = {all.max, all.sum, all.weighted,
                                                                   all.at, memory.label[at.thread]};
}

SALTIRE_DEVICE void begin_spread(const LinearTask& t, const Position& at, int row0) {
  if (at.thread >= kTile) return;
  token_memory<SpreadMemory>().facts[at.thread] =
      gradient_facts(t.tokens, t.gradients, row0 + at.thread, t.V);
}

SALTIRE_DEVICE void store_spread(const LinearTask& t, const Position& at, const Sums& sums,
                                 int row0, int column0) {
  const float inverse_cap = t.tokens.softcap != 0 ? reciprocal_fast(t.tokens.softcap) : 0.0f;
  const int g = at.lane / 4, first = column0 + at.column + at.lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row + 16 * r + 8 * half + g;
      if (row0 + row >= t.M) continue;
      const GradientFacts& facts = token_memory<SpreadMemory>().facts[row];
      auto* const to = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(t.dx) +
                                                   static_cast<int64_t>(row0 + row) * t.padded);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        float d[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = first + 8 * n + i;
          const float x = logit_of(t, sums.at[r][n][2 * half + i], column);
          const float value = gradient_of(facts, x, t.first + column == facts.label, inverse_cap);
          d[i] = facts.live ? value : 0.0f;
        }
        to[(first + 8 * n) / 2] = pack_bf16(d[0], d[1]);
      }
    }
  }
}

// dh in floats, added to what earlier chunks left; dW in bf16, rounded once. D is even.
template <Role role>
SALTIRE_DEVICE void store_product(const LinearTask& t, const Position& at, const Sums& sums,
                                  int row0, int column0) {
  const int rows = role == Role::hidden ? t.M : t.count;
  const int g = at.lane / 4, first = column0 + at.column + at.lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + at.row + 16 * r + 8 * half + g;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const int d = first + 8 * n;
        if (row >= rows || d >= t.D) continue;
        float low = sums.at[r][n][2 * half], high = sums.at[r][n][2 * half + 1];
        if constexpr (role == Role::hidden) {
          auto& to = *reinterpret_cast<float2*>(t.d_hidden + static_cast<int64_t>(row) * t.D + d);
          if (t.add_hidden) {
            const float2 old = to;
            low += old.x;
            high += old.y;
          }
          to = make_float2(low, high);
        } else {
          const int64_t to = static_cast<int64_t>(t.first + row) * t.D + d;
          *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(t.d_head) + to) =
              pack_bf16(low, high);
        }
      }
    }
  }
}

// --- the kernel ---------------------------------------------------------------------------------

template <Role role>
SALTIRE_DEVICE void operands(const LinearTask& t, Matrix& a, Matrix& b) {
  const auto* const hidden = static_cast<const uint16_t*>(t.hidden);
  const auto* const head =
      static_cast<const uint16_t*>(t.head) + static_cast<int64_t>(t.first) * t.D;
  const auto* const dx = static_cast<const uint16_t*>(t.dx);
  if constexpr (role == Role::stats || role == Role::spread) {
    a = {hidden, t.D, t.M, t.D};
    b = {head, t.D, t.count, t.D};
  } else if constexpr (role == Role::hidden) {
    a = {dx, t.padded, t.M, t.padded};
    b = {head, t.D, t.D, t.count};
  } else {
    a = {dx, t.padded, t.padded, t.M};
    b = {hidden, t.D, t.D, t.M};
  }
}

// A step of the block's work: a stage of a column tile.
struct Step {
  int tile, depth;
};

template <Role role>
__global__ void __launch_bounds__(kMmaThreads, kBlocksAtOnce)
    multiply_tiles(const __grid_constant__ LinearTask task) {
  constexpr bool kARows = role == Role::head;
  constexpr bool kBRows = role == Role::head || role == Role::hidden;
  Position at;
  at.thread = static_cast<int>(threadIdx.x);
  at.lane = at.thread % 32;
  at.row = at.thread / 32 / kAcross * kWarpRows;
  at.column = at.thread / 32 % kAcross * kWarpColumns;
  const Place place = task.tiling.place(static_cast<int>(blockIdx.x));
  const int row0 = place.row_tile * kTile, end = task.tiling.begin(place.split + 1);
  Matrix a, b;
  operands<role>(task, a, b);
  if constexpr (role == Role::stats) begin_stats(task, at, row0);
  if constexpr (role == Role::spread) begin_spread(task, at, row0);
  Step copied = {task.tiling.begin(place.split), 0}, now = copied;
  int copy_slot = 0, slot = 0;
  const auto copy_next = [&] {
    if (copied.tile < end) {
      unsigned char* const to = shared_memory() + copy_slot * kStageBytes;
      copy_operand<kARows>(a, at, row0, copied.depth, to);
      copy_operand<kBRows>(b, at, copied.tile * kTile, copied.depth, to + kOperandBytes);
      copied.depth += kDepth;
      if (copied.depth >= a.depth) copied = {copied.tile + 1, 0};
      copy_slot = copy_slot + 1 == kStages ? 0 : copy_slot + 1;
    }
    commit_copies();
  };
  for (int i = 0; i < kStages - 1; ++i) copy_next();
  Sums sums;
  clear(sums);
  while (now.tile < end) {
    wait_copies<kStages - 2>();
    sync_block();  // the stage is there, and everybody is done with the one before
    copy_next();
    multiply_stage<kARows, kBRows>(shared_memory() + slot * kStageBytes, at, sums);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    now.depth += kDepth;
    if (now.depth < a.depth) continue;
    const int column0 = now.tile * kTile;
    if constexpr (role == Role::stats) add_stats(task, at, sums, column0);
    if constexpr (role == Role::spread) store_spread(task, at, sums, row0, column0);
    if constexpr (role == Role::hidden || role == Role::head) {
      store_product<role>(task, at, sums, row0, column0);
    }
    clear(sums);
    now = {now.tile + 1, 0};
  }
  if constexpr (role == Role::stats) end_stats(task, at, row0, place.split);
}

}  // namespace

size_t mma_shared_bytes() {
  return kStages * kStageBytes + kTokenBytes;
}

void run_mma(Role role, const LinearTask& task, cudaStream_t stream) {
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(task.tiling.blocks()));
  how.block = dim3(kMmaThreads);
  how.shared_bytes = mma_shared_bytes();
  how.stream = stream;
  constexpr const char* kName = "linear_token_stats mma";
  switch (role) {
    case Role::stats:
      return launch<multiply_tiles<Role::stats>>(kName, how, task);
    case Role::spread:
      return launch<multiply_tiles<Role::spread>>(kName, how, task);
    case Role::hidden:
      return launch<multiply_tiles<Role::hidden>>(kName, how, task);
    case Role::head:
      return launch<multiply_tiles<Role::head>>(kName, how, task);
  }
}

}  // namespace saltire::token_stats
