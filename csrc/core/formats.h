// The low-bit formats, and the letters for sizes used everywhere:
//   M tokens (rows of x) · N outputs · K inputs · G group size along K · R rank of a low-rank
//   branch
//
// Activations: symmetric, one f32 scale a token.
//   code = clamp(round_half_even(x / scale), -Q, Q),  Q = 2^(bits-1) - 1  (7 for 4 bits, 3 for 3,
//   127 for 8) codes lie one a byte, int8 [M, K], whatever the bits: the bytes of activations are
//   few beside those of weights, and CPU and Hopper multiply 8-bit integers anyway.
//
// Weights: unsigned codes u in [0, 2^bits), w = scale * (u - zero), scale and zero per output
// channel (G = K) or per group of G inputs. Without zero points (symmetric) the zero is the middle:
//   8 bits: 128    4 bits: 8    3 bits: 4 (in a 4-bit container)    2 bits: 1.5: levels ±0.5, ±1.5
//
// Checkpoint layout of the codes, the same for every processor: uint8 [N, K * container / 8],
// row-major, lowest bits first.
//
//   8-bit container, byte j:   the code of k = j
//   4-bit container, byte j:   bits 7..4 = code of k = 2j+1   bits 3..0 = code of k = 2j
//   2-bit container, byte j:   7..6 k=4j+3 · 5..4 k=4j+2 · 3..2 k=4j+1 · 1..0 k=4j
//   Worked byte: 4-bit codes 9 (k=0) and 3 (k=1) make 0x39; 2-bit codes 1, 2, 3, 0 make 0b00111001.
#pragma once
#include <cstdint>

namespace saltire {

// The widths that weight codes may have.
constexpr bool are_weight_bits(int64_t bits) {
  return (bits >= 2 && bits <= 4) || bits == 8;
}

// Bits that a weight code occupies in memory: 3-bit codes live in 4-bit containers, so that no code
// crosses a byte.
constexpr int container_bits(int bits) {
  return bits == 3 ? 4 : bits;
}

// The largest activation code: symmetric, so that -Q..Q has no unpaired level.
constexpr int max_activation_code(int bits) {
  return (1 << (bits - 1)) - 1;
}

// True if a code lies outside -Q..Q. A comparison of bytes, which compilers vectorise.
inline bool codes_exceed(const int8_t* codes, int64_t count, int q) {
  unsigned char bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= (codes[i] > q) | (codes[i] < -q);
  return bad != 0;
}

// The zero of a symmetric weight. 2 bits are mid-rise (no code for 0): four levels around zero keep
// more of a bell-shaped weight than -2..1 would.
constexpr float symmetric_zero(int bits) {
  return bits == 2 ? 1.5f : static_cast<float>(1 << (bits - 1));
}

}  // namespace saltire
