// The prepacked layout of CUDA kernels: operands of tensor cores in the order in which lanes read
// them, so that one 16-byte load feeds mma.m16n8k32, m16n8k64 (4-bit), wgmma and dp4a alike.
//
// Rows come in blocks of 64 = 4 tiles of 16, inputs in slabs of 128 = 4 steps of 32:
//
//   codes   [row block][slab][tile][16-byte pieces][32 lanes][4 words]     4 pieces (8 bits), 2, 1
//   tables  [row block][group]{64 scales, 64 zeros (only with zero points)}
//   tail    80 bytes + 16 for zero points + 32 for f16 tables: the length alone tells what the
//           buffer holds, so that no call waits for a read of device memory
//
// Lane 4·g + t holds rows g and g + 8 of its tile and, of each step, inputs 4t + i and 16 + 4t + i.
//
//   8 bits, word j of piece q: step q, row g + 8·(j % 2)
//     byte i:  input 16·(j / 2) + 4t + i                                      code: u - 128, signed
//   4-bit container, word j of piece q: step 2q + j/2, row g + 8·(j % 2)
//     byte i:  bits 7..4 = input 16 + 4t + i    bits 3..0 = input 4t + i        code: u - z0,
//     signed
//   2 bits, word j: step j
//     byte i:  7..6 = row g + 8, input 16 + 4t + i    5..4 = row g, the same input
//              3..2 = row g + 8, input 4t + i         1..0 = row g                  code: u - 2,
//              signed
//
// z0 is the symmetric zero (8, or 4 for 3 bits). 8 bits are an operand as they are. Other codes are
// signed so that a mask alone makes an operand: 4 bits, w & 0xf0f0f0f0 = 16·(u - z0) in each byte;
// 2 bits, w & 0xc0c0c0c0 | 0x20202020 = 64·(u - 1.5). The factor leaves with the scale of x.
// Symmetric weights then need no sums of x. Worked byte: row 0 with u[0] = 9, u[16] = 3 (4 bits):
// block, slab, piece, lane, word 0, byte 0 = (3 - 8 & 15) << 4 | (9 - 8) = 0xb1.
//
// Scales lie in pairs of rows g and g + 8, for one load: entry 16·tile + 2g is row g, + 1 row g
// + 8. K is padded to whole slabs (codes 0, and kernels fill x with zeros), N to whole blocks.
#pragma once
#include <cstdint>

#include "core/both.h"
#include "lowbit_gemm/op.h"

namespace saltire::lowbit_gemm {

constexpr int kRowBlock = 64;
constexpr int kTileRows = 16;
constexpr int kSlab = 128;
constexpr int kStep = 32;
constexpr int kPiece = 512;  // bytes that a warp loads at once
constexpr int kTail = 80;

struct DeviceLayout {
  int64_t n = 0;
  int64_t k = 0;
  int64_t group = 0;  // 32, 64 or 128; K when per channel
  int bits = 4;
  bool has_zero = false;
  Float table = Float::f32;

  bool per_channel() const { return group == k; }
  int pieces() const { return container_bits(bits) / 2; }  // of a tile's slab
  int64_t row_blocks() const { return (n + kRowBlock - 1) / kRowBlock; }
  int64_t slabs() const { return (k + kSlab - 1) / kSlab; }
  int64_t groups() const { return k / group; }
  int64_t padded_groups() const { return per_channel() ? 1 : slabs() * (kSlab / group); }
  int64_t code_bytes() const { return row_blocks() * slabs() * 4 * pieces() * kPiece; }
  int64_t line_bytes() const { return kRowBlock * float_bytes(table) * (has_zero ? 2 : 1); }
  int64_t table_bytes() const { return row_blocks() * padded_groups() * line_bytes(); }
  int64_t tail_bytes() const {
    return kTail + (has_zero ? 16 : 0) + (table == Float::f16 ? 32 : 0);
  }
  int64_t bytes() const { return code_bytes() + table_bytes() + tail_bytes(); }
};

// Where a code lies: which byte of the buffer, from which bit.
struct CodePlace {
  int64_t byte;
  int bit;
};

static SALTIRE_BOTH CodePlace place_of_code(int container, int64_t slabs, int64_t row, int64_t k) {
  const int pieces = container / 2;
  const int64_t block = row / kRowBlock, slab = k / kSlab;
  const int in_block = static_cast<int>(row % kRowBlock), in_slab = static_cast<int>(k % kSlab);
  const int tile = in_block / kTileRows, r = in_block % kTileRows;
  const int g = r % 8, lower = r / 8;  // lower: row g + 8
  const int step = in_slab / kStep, in_step = in_slab % kStep;
  const int high = in_step / 16, t = in_step % 16 / 4, i = in_step % 4;
  const int lane = 4 * g + t;
  const int piece = container == 8 ? step : container == 4 ? step / 2 : 0;
  const int word = container == 8 ? 2 * high + lower : container == 4 ? step % 2 * 2 + lower : step;
  const int bit = container == 8 ? 0 : container == 4 ? 4 * high : 2 * (2 * high + lower);
  const int64_t start = ((block * slabs + slab) * 4 + tile) * pieces + piece;
  return {start * kPiece + lane * 16 + word * 4 + i, bit};
}

// Position of a row of a block in a line of scales.
static SALTIRE_BOTH int place_in_line(int row) {
  return row / kTileRows * kTileRows + row % 8 * 2 + row % kTileRows / 8;
}

// What is stored for a code u, and back: signed, in the container's bits.
static SALTIRE_BOTH int stored_code(int bits, int u) {
  return bits == 8 ? u ^ 128 : bits == 2 ? u ^ 2 : (u - (bits == 4 ? 8 : 4)) & 15;
}
static SALTIRE_BOTH int code_of_stored(int bits, int stored) {
  return bits == 8 ? stored ^ 128 : bits == 2 ? stored ^ 2 : (stored + (bits == 4 ? 8 : 4)) & 15;
}

}  // namespace saltire::lowbit_gemm
