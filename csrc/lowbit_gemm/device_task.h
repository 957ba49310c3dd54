// What the kernels of the room share: their argument, operands from stored codes, scales, and what
// becomes of a sum. Device code; each file compiles its own copy.
#pragma once
#include "core/cuda/number.h"
#include "core/cuda/ptx.h"
#include "lowbit_gemm/device.h"
#include "lowbit_gemm/stream_k.h"

namespace saltire::lowbit_gemm {

// The problem with 32-bit sizes and what follows from them. K <= 2^20 and a grid's rows fit.
struct Task {
  const int8_t* x;
  const float* x_scale;
  const int32_t* x_sum;
  const unsigned char* codes;
  const unsigned char* tables;
  const float* bias;
  const float* low_rank_x;
  const float* low_rank_w;
  void* out;
  uint32_t* parts;  // workspace
  int M, N, K, slabs, row_blocks, groups, rank;
  int group_steps;  // steps of 32 inputs that share a scale: 1, 2 or 4; 0 per channel
  int padded_groups;
  int line_bytes;
  bool half_table, has_zero;
  Float out_type;
  float middle;  // the symmetric zero: what stored codes are relative to
  int workers;
};

namespace {

using namespace saltire::cuda;

// --- operands -----------------------------------------------------------------------------------

// Products with operands of bytes come out this much too large; x's scale takes it back, exactly.
template <int bits>
constexpr float kByteFactor = bits == 8   ? 1.0f
                              : bits == 4 ? 16.0f
                                          : 64.0f;
// Likewise of 4-bit operands.
template <int bits>
constexpr float kNibbleFactor = bits == 4 ? 1.0f : 4.0f;

// Pieces of a tile's slab a lane holds.
template <int bits>
constexpr int kPieces = bits / 2;

template <int bits>
struct Slab {
  uint4 piece[kPieces<bits>];
};

SALTIRE_DEVICE uint32_t word_of(const uint4& v, int j) {
  return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
}

// a[0..3] of mma.m16n8k32 for a step (a constant after unrolling): none for 8 bits, 3 instructions
// for two words of 4 bits, 7 for a word of 2.
template <int bits>
SALTIRE_DEVICE void byte_operands(const Slab<bits>& w, int step, uint32_t (&a)[4]) {
  if constexpr (bits == 8) {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = word_of(w.piece[step], j);
  } else if constexpr (bits == 4) {
    const uint32_t upper = word_of(w.piece[step / 2], step % 2 * 2);
    const uint32_t lower = word_of(w.piece[step / 2], step % 2 * 2 + 1);
    a[0] = upper << 4 & 0xf0f0f0f0u;
    a[1] = lower << 4 & 0xf0f0f0f0u;
    a[2] = upper & 0xf0f0f0f0u;
    a[3] = lower & 0xf0f0f0f0u;
  } else {
    const uint32_t word = word_of(w.piece[0], step);
#pragma unroll
    for (int p = 0; p < 4; ++p) a[p] = (word << (6 - 2 * p) & 0xc0c0c0c0u) | 0x20202020u;
  }
}

// a[0..3] of mma.m16n8k64 for two steps: the low nibble of each byte is input 4t + i, the high one
// 16 + 4t + i; nibbles_of packs x likewise.
template <int bits>
SALTIRE_DEVICE void nibble_operands(const Slab<bits>& w, int pair, uint32_t (&a)[4]) {
  if constexpr (bits == 4) {
    for (int j = 0; j < 4; ++j) a[j] = word_of(w.piece[pair], j);
  } else {
    for (int s = 0; s < 2; ++s) {
      const uint32_t word = word_of(w.piece[0], 2 * pair + s);
      a[2 * s] = (word << 2 & 0xccccccccu) | 0x22222222u;
      a[2 * s + 1] = (word & 0xccccccccu) | 0x22222222u;
    }
  }
}

SALTIRE_DEVICE uint32_t nibbles_of(uint32_t low_bytes, uint32_t high_bytes) {
  return (low_bytes & 0x0f0f0f0fu) | (high_bytes << 4 & 0xf0f0f0f0u);
}

// --- scales -------------------------------------------------------------------------------------

struct Pair {
  float upper, lower;  // rows g and g + 8
};

// Entries 2·index and 2·index + 1 of a line.
SALTIRE_DEVICE Pair read_pair(const unsigned char* line, int index, bool half_table) {
  if (half_table) {
    const uint32_t both = reinterpret_cast<const uint32_t*>(line)[index];
    return {to_f32(f16{static_cast<uint16_t>(both & 0xffffu)}),
            to_f32(f16{static_cast<uint16_t>(both >> 16)})};
  }
  const float2 both = reinterpret_cast<const float2*>(line)[index];
  return {both.x, both.y};
}

SALTIRE_DEVICE float read_entry(const unsigned char* line, int index, bool half_table) {
  if (half_table) return to_f32(reinterpret_cast<const f16*>(line)[index]);
  return reinterpret_cast<const float*>(line)[index];
}

// Bytes from a line's scales to its zeros.
SALTIRE_DEVICE int zero_offset(const Task& task) {
  return task.half_table ? kRowBlock * 2 : kRowBlock * 4;
}

// Parts of one sum, as bits.
template <bool grouped>
SALTIRE_DEVICE uint32_t add_parts(uint32_t a, uint32_t b) {
  return grouped ? bits_of(float_of(a) + float_of(b)) : a + b;
}

// --- the end of a sum ---------------------------------------------------------------------------

// A sum over all inputs of one output, as its bits: float where groups were scaled on the way; else
// an integer, which gets its scale and zero here.
template <bool grouped>
SALTIRE_DEVICE float scaled_sum(const Task& task, uint32_t bits, int m, int n, float factor) {
  if constexpr (grouped) {
    return float_of(bits);
  } else {
    const int in_line = place_in_line(n % kRowBlock);
    const unsigned char* const line =
        task.tables + n / kRowBlock * static_cast<int64_t>(task.line_bytes);
    float value = static_cast<float>(static_cast<int32_t>(bits));
    if (task.has_zero) {
      const float zero = read_entry(line + zero_offset(task), in_line, task.half_table);
      value = fmaf(-factor * (zero - task.middle), static_cast<float>(task.x_sum[m]), value);
    }
    return read_entry(line, in_line, task.half_table) * value;
  }
}

template <typename T>
SALTIRE_DEVICE void store(void* out, int64_t at, float y) {
  from_f32(y, static_cast<T*>(out)[at]);
}

SALTIRE_DEVICE void store_output(const Task& task, int m, int n, float y) {
  const int64_t at = static_cast<int64_t>(m) * task.N + n;
  if (task.out_type == Float::f32) {
    store<float>(task.out, at, y);
  } else if (task.out_type == Float::f16) {
    store<f16>(task.out, at, y);
  } else {
    store<bf16>(task.out, at, y);
  }
}

// The rest of the formula, and the output of token m and row n.
template <bool grouped>
SALTIRE_DEVICE void finish(const Task& task, uint32_t bits, int m, int n, float factor) {
  float y = scaled_sum<grouped>(task, bits, m, n, factor) * (task.x_scale[m] * (1.0f / factor));
  for (int r = 0; r < task.rank; ++r) {
    y = fmaf(task.low_rank_x[static_cast<int64_t>(m) * task.rank + r],
             task.low_rank_w[static_cast<int64_t>(r) * task.N + n], y);
  }
  if (task.bias != nullptr) y += task.bias[n];
  store_output(task, m, n, y);
}

// The sums of two rows, `row` and `row` + 8, and tokens `token` + 8·n and the next, as bits.
template <int tiles>
struct TileSums {
  uint32_t bits[tiles][4];
};

// finish for all of them at once, so that a factor of the branch is loaded once for many outputs.
template <bool grouped, int tiles>
SALTIRE_DEVICE void finish_tile(const Task& task, const TileSums<tiles>& tile, int row, int token,
                                float factor) {
  float y[tiles][4];
  int m[tiles][2], n[2];  // the last token and row instead of those beyond, which are not stored
  n[0] = row < task.N ? row : task.N - 1;
  n[1] = row + 8 < task.N ? row + 8 : task.N - 1;
#pragma unroll
  for (int j = 0; j < tiles; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = token + 8 * j + i;
      m[j][i] = at < task.M ? at : task.M - 1;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[j][i] = scaled_sum<grouped>(task, tile.bits[j][i], m[j][i % 2], n[i / 2], factor) *
                (task.x_scale[m[j][i % 2]] * (1.0f / factor));
    }
  }
  for (int r = 0; r < task.rank; ++r) {
    const float* const w = task.low_rank_w + static_cast<int64_t>(r) * task.N;
    const float rows[2] = {w[n[0]], w[n[1]]};
#pragma unroll
    for (int j = 0; j < tiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = task.low_rank_x[static_cast<int64_t>(m[j][i % 2]) * task.rank + r];
        y[j][i] = fmaf(x, rows[i / 2], y[j][i]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < tiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool there = token + 8 * j + i % 2 < task.M && row + 8 * (i / 2) < task.N;
      if (task.bias != nullptr) y[j][i] += task.bias[n[i / 2]];
      if (there) store_output(task, m[j][i % 2], n[i / 2], y[j][i]);
    }
  }
}

}  // namespace
}  // namespace saltire::lowbit_gemm
