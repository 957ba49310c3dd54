// The product in plain loops, for any processor. It unpacks a group of a block once and reuses it
// for every row, in an order that compilers vectorise by themselves.
#include <vector>

#include "lowbit_gemm/epilogue.h"
#include "lowbit_gemm/op.h"

namespace saltire::lowbit_gemm {
namespace {

// A block's group as u8 [K of the group][32 outputs].
void unpack_group(const WeightLayout& layout, const uint8_t* codes, uint8_t* out) {
  const int container = container_bits(layout.bits);
  const int mask = (1 << container) - 1;
  for (int64_t k = 0; k < layout.group; ++k) {
    const int64_t in_step = k % layout.step_k();
    const uint8_t* step = codes + k / layout.step_k() * 2 * kLine + in_step % 4;
    const int shift = static_cast<int>(in_step / 4) * container;
    for (int64_t o = 0; o < kBlock; ++o) {
      out[k * kBlock + o] = static_cast<uint8_t>(step[o / 16 * kLine + o % 16 * 4] >> shift & mask);
    }
  }
}

void read_table(const WeightLayout& layout, const uint8_t* from, float* to) {
  for (int64_t o = 0; o < kBlock; ++o) {
    if (layout.table == Float::f32) {
      std::memcpy(to + o, from + 4 * o, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, from + 2 * o, 2);
      to[o] = f16_to_f32(half);
    }
  }
}

}  // namespace

void gemm_ref(const Gemm& gemm, int64_t block_begin, int64_t block_end, int64_t tile_begin,
              int64_t tile_end) {
  const WeightLayout& layout = gemm.layout;
  const int32_t centre = sum_centre(layout.bits);
  const int64_t row_begin = gemm.tiles.begin(tile_begin);
  const int64_t row_end = gemm.tiles.begin(tile_end);
  std::vector<uint8_t> u(static_cast<size_t>(layout.group * kBlock));
  std::vector<float> acc(static_cast<size_t>((row_end - row_begin) * kBlock));
  for (int64_t block = block_begin; block < block_end; ++block) {
    std::memset(acc.data(), 0, acc.size() * sizeof(float));
    const uint8_t* w = gemm.w + block * layout.block_bytes();
    for (int64_t g = 0; g < layout.groups(); ++g, w += layout.group_bytes()) {
      unpack_group(layout, w, u.data());
      float scale[kBlock];
      float zero[kBlock] = {};
      read_table(layout, w + layout.code_bytes(), scale);
      if (layout.has_zero) read_table(layout, w + layout.code_bytes() + layout.table_bytes(), zero);
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        const int64_t row0 = gemm.tiles.begin(tile);
        const int64_t rows = gemm.tiles.begin(tile + 1) - row0;
        for (int64_t r = 0; r < rows; ++r) {
          const float shift = gemm.shift[row0 * layout.groups() + g * rows + r];
          int32_t dot[kBlock];
          for (int32_t& sum : dot) sum = first_sum(layout.bits, shift);
          const int8_t* x = gemm.x + row0 * layout.k + (g * layout.group * rows) + r * 4;
          for (int64_t k = 0; k < layout.group; ++k) {
            const int32_t xk = x[k / 4 * rows * 4 + k % 4];
            for (int64_t o = 0; o < kBlock; ++o) {
              dot[o] += xk * static_cast<int32_t>(u[static_cast<size_t>(k * kBlock + o)]);
            }
          }
          float* sum = acc.data() + (row0 + r - row_begin) * kBlock;
          for (int64_t o = 0; o < kBlock; ++o) {
            const float value = static_cast<float>(dot[o]);
            const float t = layout.has_zero
                                ? fma32(static_cast<float>(centre) - zero[o], shift, value)
                            : centre != 0 ? value
                                          : value - shift;
            sum[o] = fma32(scale[o], t, sum[o]);
          }
        }
      }
    }
    for (int64_t row = row_begin; row < row_end; ++row) {
      finish_row(gemm, row, block, acc.data() + (row - row_begin) * kBlock);
    }
  }
}

}  // namespace saltire::lowbit_gemm
