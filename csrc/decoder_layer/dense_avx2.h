// What AVX2 does in its own way for many rows.
//
// 16 lanes take two registers, so `dense` sums one half of the lanes after the other: they never
// mix before the end, so the bits are those of `dot_tile`, and a tile of 4 rows by 3 outputs keeps
// its 12 sums in registers: 7 loads for 12 products, where 4 rows by 1 output of whole lanes need
// 10 for 8.
#pragma once
#include <cstring>

#include "core/cpu/vector16.h"
#include "decoder_layer/ahead.h"
#include "decoder_layer/op.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

namespace saltire::decoder_layer {
namespace {

constexpr int kHalf = kLanes / 2;
// Rows from which computing, not reading the weights, takes the time.
constexpr int64_t kHalvesFrom = 12;
// Inputs of a pass: 4 rows and 3 outputs of so many lie in L1 together.
constexpr int64_t kPassInputs = 640;
constexpr int kTileRows = 4;
constexpr int kTileOutputs = 3;
constexpr int kTileSums = 2 * kTileRows * kTileOutputs * kHalf;  // floats of both halves
// Tiles of outputs whose sums wait in L1 for the next pass.
constexpr int64_t kWaiting = 8;

// Half h of one operand that Weights<format>::read makes of a step. Operands are read one part
// after the other, though two parts share their bytes: 12 sums, 3 operands and a value are all
// registers.
template <Format format>
struct HalfWeights;

template <>
struct HalfWeights<Format::f32> {
  using type = float;
  static constexpr int64_t step = 16;
  static constexpr int parts = 1;
  template <int part>
  static inline __m256 read(const type* p, int h) {
    return _mm256_loadu_ps(p + h * kHalf);
  }
};
template <>
struct HalfWeights<Format::f16> {
  using type = uint16_t;
  static constexpr int64_t step = 16;
  static constexpr int parts = 1;
  template <int part>
  static inline __m256 read(const type* p, int h) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + h * kHalf)));
  }
};
template <>
struct HalfWeights<Format::bf16> {
  using type = uint16_t;
  static constexpr int64_t step = 32;
  static constexpr int parts = 2;
  template <int part>
  static inline __m256 read(const type* p, int h) {
    __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + h * kLanes));
    if constexpr (part == 1) a = _mm256_srli_epi32(a, 16);  // a mask would take a register
    return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
  }
};

// One part of a step: R rows times C outputs.
template <Format format, int part, int R, int C>
inline void half_step(const typename HalfWeights<format>::type* w, int64_t w_stride, const float* x,
                      int64_t x_stride, int h, __m256 (&acc)[R][C]) {
  __m256 operand[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    operand[c] = HalfWeights<format>::template read<part>(w + c * w_stride, h);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m256 value = _mm256_loadu_ps(x + r * x_stride + part * kLanes + h * kHalf);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = _mm256_fmadd_ps(value, operand[c], acc[r][c]);
  }
}

// Adds inputs [begin, end) of R rows times C outputs to `sums`, f32 [2][R][C][8]; from 0 on it sets
// them.
template <Format format, int R, int C>
inline void half_tile(const Dense& d, const DenseRows& rows, int64_t m0, int64_t n0, int64_t begin,
                      int64_t end, float* sums) {
  using W = HalfWeights<format>;
  const auto* w = static_cast<const typename W::type*>(d.w) + n0 * d.k;
  const float* x = rows.x + m0 * rows.x_stride;
  for (int h = 0; h < 2; ++h) {
    float* half = sums + h * R * C * kHalf;
    __m256 acc[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        acc[r][c] = begin == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(half + (r * C + c) * kHalf);
      }
    }
    for (int64_t k = begin; k < end; k += W::step) {
      half_step<format, 0>(w + k, d.k, x + k, rows.x_stride, h, acc);
      if constexpr (W::parts == 2) half_step<format, 1>(w + k, d.k, x + k, rows.x_stride, h, acc);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) _mm256_storeu_ps(half + (r * C + c) * kHalf, acc[r][c]);
    }
  }
}

template <int R, int C>
inline void finish_tile(const Dense& d, const DenseRows& rows, int64_t m0, int64_t n0,
                        const float* sums) {
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      const float* low = sums + (r * C + c) * kHalf;
      const float sum = reduce_add(V16{_mm256_loadu_ps(low), _mm256_loadu_ps(low + R * C * kHalf)});
      rows.y[(m0 + r) * rows.y_stride + n0 + c] = d.bias != nullptr ? sum + d.bias[n0 + c] : sum;
    }
  }
}

// R rows times C outputs: one pass over the inputs, and the sums if it was the last.
template <Format format, int R, int C>
inline void half_pass(const Dense& d, const DenseRows& rows, int64_t m0, int64_t n0, int64_t begin,
                      int64_t end, float* sums) {
  half_tile<format, R, C>(d, rows, m0, n0, begin, end, sums);
  if (end == d.k) finish_tile<R, C>(d, rows, m0, n0, sums);
}

// R rows times outputs [begin, end) of one panel.
template <Format format, int R>
inline void half_rows(const Dense& d, const DenseRows& rows, int64_t m0, int64_t begin, int64_t end,
                      Ahead& ahead, int64_t lines) {
  float sums[kWaiting][kTileSums];
  const int64_t passes = (d.k + kPassInputs - 1) / kPassInputs;
  const int64_t inputs = round_up((d.k + passes - 1) / passes, HalfWeights<format>::step);
  for (int64_t from = begin; from < end; from += kWaiting * kTileOutputs) {
    const int64_t to = smaller<int64_t>(from + kWaiting * kTileOutputs, end);
    for (int64_t k = 0; k < d.k; k += inputs) {
      const int64_t last = smaller(k + inputs, d.k);
      float (*tile)[kTileSums] = sums;
      for (int64_t n = from; n < to; n += kTileOutputs, ++tile) {
        ahead.ask(lines);
        switch (smaller<int64_t>(kTileOutputs, to - n)) {
          case 3:
            half_pass<format, R, 3>(d, rows, m0, n, k, last, *tile);
            break;
          case 2:
            half_pass<format, R, 2>(d, rows, m0, n, k, last, *tile);
            break;
          default:
            half_pass<format, R, 1>(d, rows, m0, n, k, last, *tile);
            break;
        }
      }
    }
  }
}

// Outputs [begin, end), a panel after another: one stays in L2 for all rows, while the next comes.
template <Format format>
inline void dense_halves(const Dense& d, const DenseRows& rows, int64_t begin, int64_t end) {
  const int64_t bytes = d.k * static_cast<int64_t>(sizeof(typename HalfWeights<format>::type));
  const int64_t tiles = (rows.rows + kTileRows - 1) / kTileRows;
  const int64_t passes = (d.k + kPassInputs - 1) / kPassInputs;
  // All of it within 8 of 11 tiles, so that the last lines do not come late.
  const int64_t lines = kPanel * bytes / 64 / (tiles * passes * 8) + 1;
  const auto* w = static_cast<const char*>(d.w);
  for (int64_t from = begin; from < end; from += kPanel) {
    const int64_t to = smaller(from + kPanel, end);
    Ahead ahead{w + to * bytes, w + smaller(to + kPanel, d.n) * bytes};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m0 = rows.rows * tile / tiles;
      switch (rows.rows * (tile + 1) / tiles - m0) {
        case 4:
          half_rows<format, 4>(d, rows, m0, from, to, ahead, lines);
          break;
        default:
          half_rows<format, 3>(d, rows, m0, from, to, ahead, lines);
          break;
      }
    }
  }
}

// --- prefill ---------------------------------------------------------------------------------

inline void transpose8(__m256 (&a)[kHalf]) {
  __m256 b[kHalf];
#pragma GCC unroll 4
  for (int i = 0; i < kHalf; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kHalf; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) a[i] = b[i];
}

// rows[i], 8 outputs of 16 inputs -> panel[k][8 outputs], lines `stride` floats apart.
inline void store_transposed(const V16 (&rows)[kHalf], float* panel, int64_t stride) {
  __m256 low[kHalf], high[kHalf];
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) low[i] = rows[i].lo, high[i] = rows[i].hi;
  transpose8(low);
  transpose8(high);
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) {
    _mm256_storeu_ps(panel + i * stride, low[i]);
    _mm256_storeu_ps(panel + (i + kHalf) * stride, high[i]);
  }
}

}  // namespace
}  // namespace saltire::decoder_layer

#endif
