// The 16-bit floats as plain bits, so that kernels need no CUDA header for them.
#pragma once
#include <cstdint>

namespace saltire::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What a kernel reads or writes; the order is the one that every room's op.h uses.
enum class Number : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

constexpr int64_t bytes_of(Number type) {
  return type == Number::f32 ? 4 : 2;
}

}  // namespace saltire::cuda
