// The product with AVX2. vpmaddubsw adds two products u8·s8 into 16 bits, and small operands leave
// room to add many such pairs in 16 bits before widening: 2·15·8 = 240 for 4-bit weights and
// activations, so 136 pairs fit into 32767. That drops the widening multiply of the usual 8-bit
// loop from every step, and its saturation cannot happen.
#include <immintrin.h>

#include "lowbit_gemm/epilogue.h"
#include "lowbit_gemm/op.h"

namespace saltire::lowbit_gemm {
namespace {

constexpr int64_t kPrefetch = 2048;  // bytes ahead of the codes: see avx512.cpp

inline __m256i broadcast_quad(const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, sizeof(quad));
  return _mm256_set1_epi32(quad);
}

inline __m256i load(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

template <int bits, int q>
inline __m256i unpack(__m256i line) {
  constexpr int container = bits == 2 ? 2 : 4;
  const __m256i mask = _mm256_set1_epi8((1 << container) - 1);
  return _mm256_and_si256(q == 0 ? line : _mm256_srli_epi16(line, q * container), mask);
}

// Steps of codes whose products can be added in 16 bits: 32767 over the largest pair, times the
// quads of a step.
int64_t steps_in_16_bits(const Gemm& gemm) {
  const int64_t largest_weight = (1 << container_bits(gemm.layout.bits)) - 1;
  const int64_t largest_pair = 2 * largest_weight * (int64_t{1} << (gemm.act_bits - 1));
  return 32767 / largest_pair / (gemm.layout.step_k() / 4);
}

template <int bits, int rows, int q>
inline void multiply(__m256i half0, __m256i half1, const int8_t*& x, __m256i (&sum)[rows][2]) {
  const __m256i w0 = unpack<bits, q>(half0);
  const __m256i w1 = unpack<bits, q>(half1);
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    const __m256i quad = broadcast_quad(x + 4 * r);
    sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(w0, quad));
    sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(w1, quad));
  }
  x += 4 * rows;
}

inline __m256 table(const WeightLayout& layout, const uint8_t* from, int quarter) {
  if (layout.table == Float::f32)
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from) + quarter * 8);
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + quarter));
}

// Adds `steps` steps of 16 of a block's outputs to dot: w points to their line of the first step.
template <int bits, int rows>
inline void multiply_half(const uint8_t* w, const int8_t* x, int64_t steps, __m256i (*dot)[4]) {
  __m256i sum[rows][2];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
  for (int64_t step = 0; step < steps; ++step, w += 2 * kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch), _MM_HINT_T0);
    const __m256i half0 = load(w);
    const __m256i half1 = load(w + 32);
    multiply<bits, rows, 0>(half0, half1, x, sum);
    multiply<bits, rows, 1>(half0, half1, x, sum);
    if constexpr (bits == 2) {
      multiply<bits, rows, 2>(half0, half1, x, sum);
      multiply<bits, rows, 3>(half0, half1, x, sum);
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    dot[r][0] = _mm256_add_epi32(dot[r][0], _mm256_madd_epi16(sum[r][0], ones));
    dot[r][1] = _mm256_add_epi32(dot[r][1], _mm256_madd_epi16(sum[r][1], ones));
  }
}

template <int bits, int rows>
void multiply_tile(const Gemm& gemm, int64_t tile, int64_t block, int64_t most_steps) {
  const WeightLayout& layout = gemm.layout;
  const int64_t row0 = gemm.tiles.begin(tile);
  const uint8_t* w = gemm.w + block * layout.block_bytes();
  const int8_t* x = gemm.x + row0 * layout.k;
  const float* shift = gemm.shift + row0 * layout.groups();
  const int64_t group_steps = layout.group / layout.step_k();
  const int64_t x_step = layout.step_k() * rows;
  alignas(32) float acc[rows][4][8] = {};
  for (int64_t g = 0; g < layout.groups(); ++g, shift += rows) {
    __m256i dot[rows][4];
    for (auto& row : dot) {
      for (auto& quarter : row) quarter = _mm256_setzero_si256();
    }
    for (int64_t done = 0; done < group_steps;) {
      const int64_t steps = group_steps - done < most_steps ? group_steps - done : most_steps;
      // Both halves of these steps' lines stay in L1 between the two passes.
      for (int half = 0; half < 2; ++half) {
        __m256i part[rows][4];
        for (int r = 0; r < rows; ++r) {
          part[r][0] = dot[r][2 * half];
          part[r][1] = dot[r][2 * half + 1];
        }
        multiply_half<bits, rows>(w + half * kLine, x, steps, part);
        for (int r = 0; r < rows; ++r) {
          dot[r][2 * half] = part[r][0];
          dot[r][2 * half + 1] = part[r][1];
        }
      }
      done += steps;
      w += steps * 2 * kLine;
      x += steps * x_step;
    }
    for (int quarter = 0; quarter < 4; ++quarter) {
      const __m256 scale = table(layout, w, quarter);
      const __m256 zero =
          layout.has_zero ? table(layout, w + layout.table_bytes(), quarter) : _mm256_setzero_ps();
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const __m256 value = _mm256_cvtepi32_ps(dot[r][quarter]);
        const __m256 offset = _mm256_set1_ps(shift[r]);
        const __m256 t =
            layout.has_zero ? _mm256_fnmadd_ps(zero, offset, value) : _mm256_sub_ps(value, offset);
        _mm256_store_ps(acc[r][quarter],
                        _mm256_fmadd_ps(scale, t, _mm256_load_ps(acc[r][quarter])));
      }
    }
    w += layout.table_bytes() * (layout.has_zero ? 2 : 1);
  }
  for (int r = 0; r < rows; ++r) finish_row(gemm, row0 + r, block, acc[r][0]);
}

using TileKernel = void (*)(const Gemm&, int64_t, int64_t, int64_t);

template <int bits>
TileKernel tile_kernel(int64_t rows) {
  static constexpr TileKernel kernels[kAvx2Rows] = {multiply_tile<bits, 1>, multiply_tile<bits, 2>,
                                                    multiply_tile<bits, 3>, multiply_tile<bits, 4>};
  return kernels[rows - 1];
}

}  // namespace

void gemm_avx2(const Gemm& gemm, int64_t block_begin, int64_t block_end, int64_t tile_begin,
               int64_t tile_end) {
  const int64_t most_steps = steps_in_16_bits(gemm);
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t rows = gemm.tiles.begin(tile + 1) - gemm.tiles.begin(tile);
      const TileKernel kernel = gemm.layout.bits == 2 ? tile_kernel<2>(rows) : tile_kernel<4>(rows);
      kernel(gemm, tile, block, most_steps);
    }
  }
}

}  // namespace saltire::lowbit_gemm
