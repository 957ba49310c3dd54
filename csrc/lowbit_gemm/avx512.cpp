// The product with AVX-512 VNNI. Weights are vpdpbusd's unsigned operand and are unpacked in
// registers: a mask or a shift and a mask for 64 codes, on ports that vpdpbusd leaves free once a
// tile has a few rows. A tile of 12 rows x 32 outputs keeps 24 of the 32 registers accumulating.
#include <immintrin.h>

#include <utility>

#include "lowbit_gemm/epilogue.h"
#include "lowbit_gemm/op.h"

namespace saltire::lowbit_gemm {
namespace {

#define SALTIRE_INLINE __attribute__((always_inline)) inline

// How far ahead of the codes to fetch, in bytes: memory takes about 100 ns to answer, in which a
// core takes some 2 KB from DRAM. Measured: 1 to 4 KB are alike, 512 bytes and none are slower.
constexpr int64_t kPrefetch = 2048;

// Codes of quad q of a line: each byte holds the codes of several quads, the first lowest.
template <int bits, int q>
SALTIRE_INLINE __m512i unpack(__m512i line) {
  if constexpr (bits == 8) return line;
  constexpr int container = bits == 2 ? 2 : 4;
  const __m512i mask = _mm512_set1_epi8((1 << container) - 1);
  return _mm512_and_si512(q == 0 ? line : _mm512_srli_epi16(line, q * container), mask);
}

// Sums of a tile: [row][half of the block]. Every index into it is a constant, by folds over a
// pack of row numbers: with loops, even unrolled ones, GCC 12 keeps such an array in memory and
// stores it at every step (measured: 0.6 of the speed).
template <int rows>
using Sums = __m512i[rows][2];

template <int... r>
using Rows = std::integer_sequence<int, r...>;

template <int bits, int... r>
SALTIRE_INLINE void begin(Sums<sizeof...(r)>& sum, const float* shift, Rows<r...>) {
  ((sum[r][0] = sum[r][1] = _mm512_set1_epi32(first_sum(bits, shift[r]))), ...);
}

// Written out because GCC 12 has no pattern for vpdpbusd with a broadcast from memory: it loads the
// quad into a register of its own, and with 24 sums there is none to spare.
SALTIRE_INLINE void multiply_row(__m512i (&sum)[2], __m512i w0, __m512i w1, const int8_t* x) {
  struct Quad {
    int8_t code[4];
  };
  const Quad& quad = *reinterpret_cast<const Quad*>(x);
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[0]) : "v"(w0), "m"(quad));
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[1]) : "v"(w1), "m"(quad));
}

// Multiplies quad q of a step by the rows' activations.
template <int bits, int q, int... r>
SALTIRE_INLINE void multiply_quad(__m512i line0, __m512i line1, const int8_t* x,
                                  Sums<sizeof...(r)>& sum, Rows<r...>) {
  const __m512i w0 = unpack<bits, q>(line0);
  const __m512i w1 = unpack<bits, q>(line1);
  (multiply_row(sum[r], w0, w1, x + 4 * (q * static_cast<int>(sizeof...(r)) + r)), ...);
}

SALTIRE_INLINE __m512 table(const WeightLayout& layout, const uint8_t* from, int half) {
  if (layout.table == Float::f32) return _mm512_loadu_ps(from + half * 64);
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + half * 32)));
}

template <int bits, bool has_zero>
SALTIRE_INLINE void scale_row(__m512i sum, __m512 scale, __m512 zero, float shift, float* acc) {
  const __m512 value = _mm512_cvtepi32_ps(sum);
  const __m512 offset = _mm512_set1_ps(shift);
  const __m512 t = has_zero                ? _mm512_fnmadd_ps(zero, offset, value)
                   : sum_centre(bits) != 0 ? value
                                           : _mm512_sub_ps(value, offset);
  _mm512_store_ps(acc, _mm512_fmadd_ps(scale, t, _mm512_load_ps(acc)));
}

// Adds a group's sums to the tile's float32 results; w points to the group's scales.
template <int bits, int half, int... r>
SALTIRE_INLINE void scale_half(const WeightLayout& layout, const uint8_t* w, const float* shift,
                               const Sums<sizeof...(r)>& sum, float* acc, Rows<r...>) {
  const __m512 scale = table(layout, w, half);
  if (layout.has_zero) {
    __m512 zero = table(layout, w + layout.table_bytes(), half);
    if constexpr (sum_centre(bits) != 0) {
      zero = _mm512_sub_ps(zero, _mm512_set1_ps(static_cast<float>(sum_centre(bits))));
    }
    (scale_row<bits, true>(sum[r][half], scale, zero, shift[r], acc + 32 * r + 16 * half), ...);
  } else {
    (scale_row<bits, false>(sum[r][half], scale, scale, shift[r], acc + 32 * r + 16 * half), ...);
  }
}

// One tile of `rows` rows times one block.
template <int bits, int rows>
void multiply_tile(const Gemm& gemm, int64_t tile, int64_t block) {
  constexpr auto all = std::make_integer_sequence<int, rows>();
  const WeightLayout& layout = gemm.layout;
  const int64_t row0 = gemm.tiles.begin(tile);
  const uint8_t* w = gemm.w + block * layout.block_bytes();
  const int8_t* x = gemm.x + row0 * layout.k;
  const float* shift = gemm.shift + row0 * layout.groups();
  const int64_t code_bytes = layout.code_bytes();
  alignas(64) float acc[rows][kBlock] = {};
  for (int64_t g = 0; g < layout.groups(); ++g, shift += rows) {
    Sums<rows> sum;
    begin<bits>(sum, shift, all);
    for (const uint8_t* const end = w + code_bytes; w != end; w += 2 * kLine) {
      _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch + kLine), _MM_HINT_T0);
      const __m512i line0 = _mm512_loadu_si512(w);
      const __m512i line1 = _mm512_loadu_si512(w + kLine);
      multiply_quad<bits, 0>(line0, line1, x, sum, all);
      if constexpr (bits != 8) multiply_quad<bits, 1>(line0, line1, x, sum, all);
      if constexpr (bits == 2) {
        multiply_quad<bits, 2>(line0, line1, x, sum, all);
        multiply_quad<bits, 3>(line0, line1, x, sum, all);
      }
      x += rows * step_inputs(bits);
    }
    // The results stay in L1: without this the compiler keeps copies of them and spills those too.
    asm volatile("" : : "r"(acc) : "memory");
    scale_half<bits, 0>(layout, w, shift, sum, acc[0], all);
    scale_half<bits, 1>(layout, w, shift, sum, acc[0], all);
    w += layout.table_bytes() * (layout.has_zero ? 2 : 1);
  }
  for (int r = 0; r < rows; ++r) finish_row(gemm, row0 + r, block, acc[r]);
}

using TileKernel = void (*)(const Gemm&, int64_t, int64_t);

template <int bits>
TileKernel tile_kernel(int64_t rows) {
  static constexpr TileKernel kernels[kAvx512Rows] = {
      multiply_tile<bits, 1>,  multiply_tile<bits, 2>,  multiply_tile<bits, 3>,
      multiply_tile<bits, 4>,  multiply_tile<bits, 5>,  multiply_tile<bits, 6>,
      multiply_tile<bits, 7>,  multiply_tile<bits, 8>,  multiply_tile<bits, 9>,
      multiply_tile<bits, 10>, multiply_tile<bits, 11>, multiply_tile<bits, 12>};
  return kernels[rows - 1];
}

}  // namespace

void gemm_avx512(const Gemm& gemm, int64_t block_begin, int64_t block_end, int64_t tile_begin,
                 int64_t tile_end) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t rows = gemm.tiles.begin(tile + 1) - gemm.tiles.begin(tile);
      const TileKernel kernel = gemm.layout.bits == 8   ? tile_kernel<8>(rows)
                                : gemm.layout.bits == 2 ? tile_kernel<2>(rows)
                                                        : tile_kernel<4>(rows);
      kernel(gemm, tile, block);
    }
  }
}

}  // namespace saltire::lowbit_gemm
