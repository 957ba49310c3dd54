// The emulator's tensor map: see csrc/core/cuda/tensor_map.h.
#pragma once
#include <cstdint>

namespace saltire::cuda {

struct alignas(128) TensorMap {
  const unsigned char* base;
  int64_t rows, columns;
  int box_rows;
};

inline TensorMap map_bytes(const void* base, int64_t rows, int64_t columns, int box_rows) {
  return {static_cast<const unsigned char*>(base), rows, columns, box_rows};
}

}  // namespace saltire::cuda
