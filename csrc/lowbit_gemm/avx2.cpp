// The product with AVX2. vpmaddubsw adds two products u8·s8 into 16 bits, and small operands leave
// room to add many such pairs in 16 bits before widening: 2·15·8 = 240 for 4-bit weights and
// activations, so 136 pairs fit into 32767. That drops the widening multiply of the usual 8-bit
// loop from every step, and its saturation cannot happen. 8-bit weights leave no such room: even
// and odd inputs are widened to 16 bits and multiplied there.
#include <immintrin.h>

#include <utility>

#include "lowbit_gemm/epilogue.h"
#include "lowbit_gemm/op.h"

namespace saltire::lowbit_gemm {
namespace {

#define SALTIRE_INLINE __attribute__((always_inline)) inline

constexpr int64_t kPrefetch = 2048;  // bytes ahead of the codes: see avx512.cpp

SALTIRE_INLINE __m256i broadcast_quad(const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, sizeof(quad));
  return _mm256_set1_epi32(quad);
}

SALTIRE_INLINE __m256i load(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

template <int bits, int q>
SALTIRE_INLINE __m256i unpack(__m256i line) {
  constexpr int container = bits == 2 ? 2 : 4;
  const __m256i mask = _mm256_set1_epi8((1 << container) - 1);
  return _mm256_and_si256(q == 0 ? line : _mm256_srli_epi16(line, q * container), mask);
}

// Steps of one pass over first lines, then second: as many as can be added in 16 bits, 32767 over
// the largest pair, times the quads of a step. 8-bit codes are added in 32 bits; 8 KB of them stay
// in L1.
int64_t steps_of_a_pass(const Gemm& gemm) {
  if (gemm.layout.bits == 8) return 64;
  const int64_t largest_weight = (1 << container_bits(gemm.layout.bits)) - 1;
  const int64_t largest_pair = 2 * largest_weight * (int64_t{1} << (gemm.act_bits - 1));
  return 32767 / largest_pair / (gemm.layout.step_k() / 4);
}

// 16-bit sums of a tile: [row][8 outputs]. All indices are constants, by folds over a pack of row
// numbers, so that the sums live in registers.
template <int rows>
using Sums = __m256i[rows][2];

template <int... r>
using Rows = std::integer_sequence<int, r...>;

SALTIRE_INLINE void add_products(__m256i& sum, __m256i w, __m256i quad) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, quad));
  // Without this GCC adds the products of two quads first, for which there are no registers.
  asm("" : "+x"(sum));
}

SALTIRE_INLINE void multiply_row(__m256i (&sum)[2], __m256i w0, __m256i w1, const int8_t* x) {
  const __m256i quad = broadcast_quad(x);
  add_products(sum[0], w0, quad);
  add_products(sum[1], w1, quad);
}

// Multiplies quad q of 16 outputs by the rows' activations.
template <int bits, int q, int... r>
SALTIRE_INLINE void multiply_quad(const uint8_t* w, const int8_t* x, Sums<sizeof...(r)>& sum,
                                  Rows<r...>) {
  const __m256i w0 = unpack<bits, q>(load(w));
  const __m256i w1 = unpack<bits, q>(load(w + 32));
  (multiply_row(sum[r], w0, w1, x + 4 * (q * static_cast<int>(sizeof...(r)) + r)), ...);
}

// 8-bit codes, or four activations, as 16-bit inputs 0 and 2, and 1 and 3: pairs that vpmaddwd
// multiplies and adds into 32 bits.
struct Bytes {
  __m256i even, odd;
};

SALTIRE_INLINE void add_bytes(__m256i& sum, const Bytes& w, const Bytes& x) {
  const __m256i products =
      _mm256_add_epi32(_mm256_madd_epi16(w.even, x.even), _mm256_madd_epi16(w.odd, x.odd));
  sum = _mm256_add_epi32(sum, products);
}

SALTIRE_INLINE void multiply_row_of_bytes(__m256i (&sum)[2], const Bytes& w0, const Bytes& w1,
                                          const int8_t* x) {
  const __m256i quad = broadcast_quad(x);
  const Bytes wide = {_mm256_srai_epi16(_mm256_slli_epi16(quad, 8), 8), _mm256_srai_epi16(quad, 8)};
  add_bytes(sum[0], w0, wide);
  add_bytes(sum[1], w1, wide);
}

SALTIRE_INLINE Bytes widen_bytes(__m256i line) {
  return {_mm256_and_si256(line, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(line, 8)};
}

// multiply_half for weights of 8 bits.
template <int... r>
SALTIRE_INLINE void multiply_half_of_bytes(const uint8_t* w, const int8_t* x, int64_t steps,
                                           __m256i* dot, Rows<r...>) {
  constexpr int rows = sizeof...(r);
  Sums<rows> sum;
  ((sum[r][0] = dot[4 * r], sum[r][1] = dot[4 * r + 1]), ...);
  for (const uint8_t* const end = w + steps * 2 * kLine; w != end; w += 2 * kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch), _MM_HINT_T0);
    const Bytes w0 = widen_bytes(load(w)), w1 = widen_bytes(load(w + 32));
    (multiply_row_of_bytes(sum[r], w0, w1, x + 4 * r), ...);
    x += rows * 4;
  }
  ((dot[4 * r] = sum[r][0], dot[4 * r + 1] = sum[r][1]), ...);
}

SALTIRE_INLINE void widen(const __m256i (&sum)[2], __m256i* dot) {
  const __m256i ones = _mm256_set1_epi16(1);
  dot[0] = _mm256_add_epi32(dot[0], _mm256_madd_epi16(sum[0], ones));
  dot[1] = _mm256_add_epi32(dot[1], _mm256_madd_epi16(sum[1], ones));
}

// Adds `steps` steps to dot, int32 [row][32]. w points to the first step's line of 16 outputs.
template <int bits, int... r>
SALTIRE_INLINE void multiply_half(const uint8_t* w, const int8_t* x, int64_t steps, __m256i* dot,
                                  Rows<r...> all) {
  if constexpr (bits == 8) return multiply_half_of_bytes(w, x, steps, dot, all);
  constexpr int rows = sizeof...(r);
  Sums<rows> sum;
  ((sum[r][0] = sum[r][1] = _mm256_setzero_si256()), ...);
  for (const uint8_t* const end = w + steps * 2 * kLine; w != end; w += 2 * kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch), _MM_HINT_T0);
    multiply_quad<bits, 0>(w, x, sum, all);
    multiply_quad<bits, 1>(w, x, sum, all);
    if constexpr (bits == 2) {
      multiply_quad<bits, 2>(w, x, sum, all);
      multiply_quad<bits, 3>(w, x, sum, all);
    }
    x += rows * step_inputs(bits);
  }
  (widen(sum[r], dot + 4 * r), ...);
}

inline __m256 table(const WeightLayout& layout, const uint8_t* from, int quarter) {
  if (layout.table == Float::f32)
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from) + quarter * 8);
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + quarter));
}

template <int bits, int rows>
void multiply_tile(const Gemm& gemm, int64_t tile, int64_t block, int64_t most_steps) {
  constexpr auto all = std::make_integer_sequence<int, rows>();
  const WeightLayout& layout = gemm.layout;
  const int64_t row0 = gemm.tiles.begin(tile);
  const uint8_t* w = gemm.w + block * layout.block_bytes();
  const int8_t* x = gemm.x + row0 * layout.k;
  const float* shift = gemm.shift + row0 * layout.groups();
  const int64_t group_steps = layout.group / layout.step_k();
  alignas(32) float acc[rows][kBlock] = {};
  for (int64_t g = 0; g < layout.groups(); ++g, shift += rows) {
    __m256i dot[rows][4];
    for (int r = 0; r < rows; ++r) {
      for (auto& quarter : dot[r]) quarter = _mm256_set1_epi32(first_sum(bits, shift[r]));
    }
    for (int64_t done = 0; done < group_steps;) {
      const int64_t left = group_steps - done;
      const int64_t steps = left < most_steps ? left : most_steps;
      // These steps stay in L1 between the passes over their first and second lines.
      multiply_half<bits>(w, x, steps, dot[0], all);
      multiply_half<bits>(w + kLine, x, steps, dot[0] + 2, all);
      done += steps;
      w += steps * 2 * kLine;
      x += steps * layout.step_k() * rows;
    }
    // Sums and results stay in L1: see avx512.cpp.
    asm volatile("" : : "r"(dot), "r"(acc) : "memory");
    for (int quarter = 0; quarter < 4; ++quarter) {
      const __m256 scale = table(layout, w, quarter);
      const __m256 centre = _mm256_set1_ps(static_cast<float>(sum_centre(bits)));
      const __m256 zero =
          layout.has_zero ? _mm256_sub_ps(table(layout, w + layout.table_bytes(), quarter), centre)
                          : _mm256_setzero_ps();
      for (int r = 0; r < rows; ++r) {
        const __m256 value = _mm256_cvtepi32_ps(dot[r][quarter]);
        const __m256 offset = _mm256_set1_ps(shift[r]);
        const __m256 t = layout.has_zero         ? _mm256_fnmadd_ps(zero, offset, value)
                         : sum_centre(bits) != 0 ? value
                                                 : _mm256_sub_ps(value, offset);
        float* at = acc[r] + quarter * 8;
        _mm256_store_ps(at, _mm256_fmadd_ps(scale, t, _mm256_load_ps(at)));
      }
    }
    w += layout.table_bytes() * (layout.has_zero ? 2 : 1);
  }
  for (int r = 0; r < rows; ++r) finish_row(gemm, row0 + r, block, acc[r]);
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
  const int64_t most_steps = steps_of_a_pass(gemm);
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t rows = gemm.tiles.begin(tile + 1) - gemm.tiles.begin(tile);
      const TileKernel kernel = gemm.layout.bits == 8   ? tile_kernel<8>(rows)
                                : gemm.layout.bits == 2 ? tile_kernel<2>(rows)
                                                        : tile_kernel<4>(rows);
      kernel(gemm, tile, block, most_steps);
    }
  }
}

}  // namespace saltire::lowbit_gemm
