// A quantised linear layer as rooms that run whole models see it: y = Q(T(x))·Q(W)ᵀ + (x·L)·R + b.
//
// Rooms never include one another, so those that own the kernels put them into this table when the
// library is loaded: transform_quantize the way from a token to codes, lowbit_gemm the product. A
// table with a hole is a room that was not built, and `quant_kernels` says so.
#pragma once
#include <cstdint>

namespace saltire {

// How a token of k floats becomes codes; the meaning of the fields is transform_quantize's.
struct TokenQuantizer {
  int64_t k = 0;
  int64_t hadamard = 1;
  const float* diag = nullptr;
  const float* left = nullptr;
  const float* right = nullptr;
  int64_t right_size = 0;
  int act_bits = 8;
  double clip = 1.0;      // divided by Q before it is rounded to float, as in the op
  int64_t sum_group = 0;  // inputs that share a sum
};

// A buffer of lowbit_prepack, and what its header says.
struct PackedWeight {
  const uint8_t* buffer = nullptr;
  int64_t bytes = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t group = 0;  // K when per channel
  // Weights of one kind and group take the same shifts from `pack`.
  int shift_kind = 0;
  const float* bias = nullptr;
  const float* low_rank_w = nullptr;  // [R, N]
  int64_t rank = 0;
};

// Rows of a product after `pack`.
struct QuantRows {
  int64_t rows = 0;
  int act_bits = 8;
  const int8_t* x = nullptr;          // [M, K], tile by tile
  const float* scale = nullptr;       // [M]
  const float* shift = nullptr;       // [M, K / group], tile by tile
  const float* low_rank_x = nullptr;  // [M, R]
};

struct QuantKernels {
  // One token -> codes [K], scale [1], sums [K / sum_group]. scratch: 3·(K rounded up to 16)
  // floats.
  void (*quantize_token)(const TokenQuantizer& how, const float* x, int8_t* codes, float* scale,
                         int32_t* sums, float* scratch);
  // Reads n, k and group from the header, which must be sound; throws std::runtime_error.
  void (*open_weight)(const char* op, PackedWeight& weight);
  // Tiles of M rows, and the first row of one; `pack` works on one tile at a time.
  int64_t (*tiles)(int64_t rows);
  int64_t (*tile_begin)(int64_t rows, int64_t tile);
  // Codes and sums of a tile's rows, row by row -> x and shift of QuantRows.
  void (*pack)(const PackedWeight& weight, const int8_t* codes, const int32_t* sums, int64_t rows,
               int64_t tile, int8_t* x, float* shift);
  // Outputs [begin, end), begin a multiple of 32, of all rows: y [M, N].
  void (*multiply)(const PackedWeight& weight, const QuantRows& rows, float* y, int64_t begin,
                   int64_t end);
};

// The table to fill in while the library loads.
QuantKernels& quant_kernel_table();
// The table, whole; throws std::runtime_error naming the room that is missing.
const QuantKernels& quant_kernels();

}  // namespace saltire
