// The product with AVX-512 VNNI. Weights are vpdpbusd's unsigned operand and are unpacked in
// registers: a mask or a shift and a mask for 64 codes, on ports that vpdpbusd leaves free once a
// tile has a few rows. A tile of 12 rows x 32 outputs keeps 24 of the 32 registers accumulating.
#include <immintrin.h>

#include "lowbit_gemm/epilogue.h"
#include "lowbit_gemm/op.h"

namespace saltire::lowbit_gemm {
namespace {

// How far ahead of the codes to fetch, in bytes: memory takes about 100 ns to answer, in which a
// core takes some 2 KB from DRAM. Measured: 1 to 4 KB are alike, 512 bytes and none are slower.
constexpr int64_t kPrefetch = 2048;

inline __m512i broadcast_quad(const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, sizeof(quad));
  return _mm512_set1_epi32(quad);
}

// Codes of quad q of a line: each byte holds the codes of several quads, the first lowest.
template <int bits, int q>
inline __m512i unpack(__m512i line) {
  constexpr int container = bits == 2 ? 2 : 4;
  const __m512i mask = _mm512_set1_epi8((1 << container) - 1);
  return _mm512_and_si512(q == 0 ? line : _mm512_srli_epi16(line, q * container), mask);
}

// Multiplies quad q of a step by `rows` activations each.
template <int bits, int rows, int q>
inline void multiply(__m512i line0, __m512i line1, const int8_t*& x, __m512i (&sum)[rows][2]) {
  const __m512i w0 = unpack<bits, q>(line0);
  const __m512i w1 = unpack<bits, q>(line1);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const __m512i quad = broadcast_quad(x + 4 * r);
    sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, quad);
    sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, quad);
  }
  x += 4 * rows;
}

inline __m512 table(const WeightLayout& layout, const uint8_t* from, int half) {
  if (layout.table == Float::f32) return _mm512_loadu_ps(from + half * 64);
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + half * 32)));
}

// One tile of `rows` rows times one block.
template <int bits, int rows>
void multiply_tile(const Gemm& gemm, int64_t tile, int64_t block) {
  const WeightLayout& layout = gemm.layout;
  const int64_t row0 = gemm.tiles.begin(tile);
  const uint8_t* w = gemm.w + block * layout.block_bytes();
  const int8_t* x = gemm.x + row0 * layout.k;
  const float* shift = gemm.shift + row0 * layout.groups();
  const int64_t code_bytes = layout.code_bytes();
  alignas(64) float acc[rows][2][16];
  for (auto& row : acc) {
    for (auto& half : row) _mm512_store_ps(half, _mm512_setzero_ps());
  }
  for (int64_t g = 0; g < layout.groups(); ++g, shift += rows) {
    __m512i sum[rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (const uint8_t* const end = w + code_bytes; w != end; w += 2 * kLine) {
      _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch + kLine), _MM_HINT_T0);
      const __m512i line0 = _mm512_loadu_si512(w);
      const __m512i line1 = _mm512_loadu_si512(w + kLine);
      multiply<bits, rows, 0>(line0, line1, x, sum);
      multiply<bits, rows, 1>(line0, line1, x, sum);
      if constexpr (bits == 2) {
        multiply<bits, rows, 2>(line0, line1, x, sum);
        multiply<bits, rows, 3>(line0, line1, x, sum);
      }
    }
    for (int half = 0; half < 2; ++half) {
      const __m512 scale = table(layout, w, half);
      const __m512 zero =
          layout.has_zero ? table(layout, w + layout.table_bytes(), half) : _mm512_setzero_ps();
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const __m512 value = _mm512_cvtepi32_ps(sum[r][half]);
        const __m512 offset = _mm512_set1_ps(shift[r]);
        const __m512 t =
            layout.has_zero ? _mm512_fnmadd_ps(zero, offset, value) : _mm512_sub_ps(value, offset);
        _mm512_store_ps(acc[r][half], _mm512_fmadd_ps(scale, t, _mm512_load_ps(acc[r][half])));
      }
    }
    w += layout.table_bytes() * (layout.has_zero ? 2 : 1);
  }
  for (int r = 0; r < rows; ++r) finish_row(gemm, row0 + r, block, acc[r][0]);
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
      const TileKernel kernel = gemm.layout.bits == 2 ? tile_kernel<2>(rows) : tile_kernel<4>(rows);
      kernel(gemm, tile, block);
    }
  }
}

}  // namespace saltire::lowbit_gemm
