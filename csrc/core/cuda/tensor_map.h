// What the copy engine needs to know of a matrix: 128 opaque bytes, made on the host, passed to a
// kernel by value (as a __grid_constant__).
#pragma once
#include <cstdint>

namespace saltire::cuda {

struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// A row-major matrix of bytes, read in boxes of box_rows x 128 bytes with the 128-byte swizzle.
// base and columns: multiples of 16. Throws std::runtime_error.
TensorMap map_bytes(const void* base, int64_t rows, int64_t columns, int box_rows);

}  // namespace saltire::cuda
