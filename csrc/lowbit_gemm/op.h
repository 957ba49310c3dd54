// lowbit_gemm: activations of 3, 4 or 8 bits times weights of 2, 3, 4 or 8 bits. Torch-free.
//
//   y[m, n] = x_scale[m] · Σ_g scale[n, g] · (Σ_k∈g x[m, k]·u[n, k] - zero[n, g]·x_sum[m, g])
//             + Σ_r low_rank_x[m, r]·low_rank_w[r, n] + bias[n]
//
// The sums over k are exact 32-bit integers. Everything after them is float32, in one order that
// every instruction set follows, so that all of them give the same bits:
//
//   t   = float(dot) - zero·x_sum      symmetric: the product rounded, then the difference
//   t   = fma(-zero, x_sum, float(dot))                           explicit zero points
//   8 bits: dot is Σ x·(u - 128), still an integer, and zero - 128 stands for zero: unsigned sums
//   outgrow the 24 bits that float(dot) keeps
//   acc = fma(scale, t, acc)           g ascending, from +0
//   y   = acc · x_scale,  then y = fma(low_rank_x, low_rank_w, y) r ascending,  then y + bias
//
// Prepacked weights: a 64-byte header, then one block after another, each 32 outputs wide and one
// contiguous stream, so that a thread which owns some outputs reads one rising address:
//
//   block  =  group 0 | group 1 | ... | group K/G - 1          (per channel: one group, G = K)
//   group  =  codes | 32 scales (f16 or f32) | 32 zeros (the same type, only with zero points)
//   codes  =  steps of two 64-byte lines: outputs 0..15, then outputs 16..31
//
//   A line's byte 4·o + i belongs to output o and to k = i (mod 4), as vpdpbusd wants it:
//     8 bits, a step of 4 k:    the code of k i
//     4 bits, a step of 8 k:    bits 7..4 = k 4+i    bits 3..0 = k i
//     2 bits, a step of 16 k:   7..6 = k 12+i   5..4 = k 8+i   3..2 = k 4+i   1..0 = k i
//   Worked byte: 4 bits, step 0, line 0, byte 5 = output 1, i = 1: with u[1, 1] = 9 and
//   u[1, 5] = 3 it is 0x39. Unpacking is a mask, or a shift and a mask: nothing crosses a byte.
//
// N is padded to whole blocks with codes 0 and scales 0.
#pragma once
#include <cstdint>

#include "core/formats.h"

namespace saltire::lowbit_gemm {

constexpr int64_t kBlock = 32;      // outputs of a block: two zmm or four ymm of int32
constexpr int64_t kLine = 64;       // bytes of a line: 16 outputs
constexpr int64_t kKMultiple = 32;  // K and G are multiples of it: whole steps at any width
// |dot| <= K·15·128, or K·255·127 for 8 bits, must stay below 2^31.
constexpr int64_t max_k(int bits) {
  return int64_t{1} << (bits == 8 ? 16 : 20);
}

enum class Float : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

constexpr int64_t float_bytes(Float type) {
  return type == Float::f32 ? 4 : 2;
}

// Inputs of a step of two lines: four for each code of a byte.
constexpr int64_t step_inputs(int bits) {
  return 4 * 8 / container_bits(bits);
}

// What integer sums count codes from: 128 for 8 bits, else 0.
constexpr int sum_centre(int bits) {
  return bits == 8 ? 128 : 0;
}

// What the weight is; from it follow all offsets in the prepacked buffer.
struct WeightLayout {
  int64_t n = 0;
  int64_t k = 0;
  int64_t group = 0;  // inputs of a group; K when per channel
  int bits = 4;
  bool has_zero = false;
  Float table = Float::f32;  // the type of scales and zeros: f32 or f16

  int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
  int64_t groups() const { return k / group; }
  int64_t step_k() const { return step_inputs(bits); }  // inputs of a step: 4, 8, 16
  int64_t code_bytes() const { return group * kBlock * container_bits(bits) / 8; }  // of a group
  int64_t table_bytes() const { return kBlock * float_bytes(table); }
  int64_t group_bytes() const { return code_bytes() + table_bytes() * (has_zero ? 2 : 1); }
  int64_t block_bytes() const { return groups() * group_bytes(); }
  int64_t bytes() const;  // of the whole buffer with its header
};

// The first bytes of a prepacked buffer; little-endian.
struct Header {
  uint32_t magic;
  uint32_t version;
  int32_t bits;
  uint32_t flags;
  int64_t n;
  int64_t k;
  int64_t group;  // 0: per channel
  int64_t bytes;  // of the whole buffer
  int64_t block;  // kBlock
  int64_t reserved;
};
static_assert(sizeof(Header) == 64, "codes start on a cache line");
constexpr uint32_t kMagic = 0x57544c53;  // "SLTW"
constexpr uint32_t kVersion = 1;
constexpr uint32_t kFlagZero = 1;
constexpr uint32_t kFlagHalf = 2;

inline int64_t WeightLayout::bytes() const {
  return static_cast<int64_t>(sizeof(Header)) + blocks() * block_bytes();
}

// --- the product ------------------------------------------------------------------------------
// Rows of x in tiles of nearly equal height, none higher than the kernel's registers allow.
struct RowTiles {
  int64_t rows = 0;
  int64_t tiles = 0;

  static RowTiles make(int64_t rows, int64_t most) { return {rows, (rows + most - 1) / most}; }
  int64_t begin(int64_t tile) const {
    const int64_t over = rows % tiles;
    return tile * (rows / tiles) + (tile < over ? tile : over);
  }
};

struct Gemm {
  WeightLayout layout;
  const uint8_t* w = nullptr;  // the buffer, behind its header
  int act_bits = 8;            // |x| <= 2^(act_bits - 1)

  // Tile-major, so that a tile is read at rising addresses: tile t starts at row begin(t), holds
  //   x:     [K / 4][rows of the tile][4] codes        at begin(t) · K
  //   shift: [K / G][rows of the tile]                 at begin(t) · K / G
  // shift is x_sum with explicit zero points or 8 bits, else symmetric_zero · x_sum.
  RowTiles tiles;
  const int8_t* x = nullptr;
  const float* shift = nullptr;

  const float* x_scale = nullptr;     // [M]
  const float* bias = nullptr;        // [N] or null
  const float* low_rank_x = nullptr;  // [M, R] or null
  const float* low_rank_w = nullptr;  // [R, N]
  int64_t rank = 0;
  void* out = nullptr;  // [M, N] of out_type
  Float out_type = Float::f32;
};

// Computes blocks [block_begin, block_end) of tiles [tile_begin, tile_end).
using Kernel = void (*)(const Gemm& gemm, int64_t block_begin, int64_t block_end,
                        int64_t tile_begin, int64_t tile_end);

constexpr int64_t kRefRows = 8;
constexpr int64_t kAvx2Rows = 4;     // 4 rows x 16 outputs: 8 of 16 ymm accumulate
constexpr int64_t kAvx512Rows = 12;  // 12 rows x 32 outputs: 24 of 32 zmm accumulate

void gemm_ref(const Gemm& gemm, int64_t block_begin, int64_t block_end, int64_t tile_begin,
              int64_t tile_end);
void gemm_avx2(const Gemm& gemm, int64_t block_begin, int64_t block_end, int64_t tile_begin,
               int64_t tile_end);
void gemm_avx512(const Gemm& gemm, int64_t block_begin, int64_t block_end, int64_t tile_begin,
                 int64_t tile_end);

}  // namespace saltire::lowbit_gemm
