// The emulator's instructions: see csrc/core/cuda/ptx.h, to which a test holds this list.
// Bodies are in instructions.cpp, which is not watched: they report what they access themselves.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "core/cuda/number.h"

#define SALTIRE_DEVICE static inline

namespace emulator {

struct Shuffle {
  uint64_t value;
  uint64_t result;
  int from;
};
void shuffle(Shuffle& record);
uint32_t vote(bool condition);
uint32_t warp_max(uint32_t value);
int32_t warp_sum(int32_t value);
void copy_async(void* to, const void* from, int bytes, bool there);
void commit_copies();
void wait_copies(int pending);
int add_and_see(int* counter, int value);
void add_to(float* sum, float value);
void add_to(int32_t* sum, int32_t value);
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);
void mma_integers(int bits, int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_floats(bool brain, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void read_16(void* to, const void* from);
void write_16(void* to, const void* from);
float f16_to_f32(uint16_t bits);
uint16_t f32_to_f16(float x);
uint16_t f32_to_bf16(float x);

template <typename T>
T shuffled(T value, int from) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  Shuffle record{0, 0, from};
  std::memcpy(&record.value, &value, sizeof(T));
  shuffle(record);
  T result;
  std::memcpy(&result, &record.result, sizeof(T));
  return result;
}

}  // namespace emulator

namespace saltire::cuda {

SALTIRE_DEVICE void sync_block() {
  emulator::barrier(0, 0, true);
}
SALTIRE_DEVICE void sync_warp() {
  emulator::sync_warp();
}
SALTIRE_DEVICE void sync_some(int id, int count) {
  emulator::barrier(id, count, true);
}
template <typename T>
SALTIRE_DEVICE T shuffle_xor(T value, int mask) {
  return emulator::shuffled(value, emulator::current->lane ^ mask);
}
template <typename T>
SALTIRE_DEVICE T shuffle(T value, int from) {
  return emulator::shuffled(value, from);
}
SALTIRE_DEVICE uint32_t vote(bool condition) {
  return emulator::vote(condition);
}
SALTIRE_DEVICE uint32_t warp_max(uint32_t value) {
  return emulator::warp_max(value);
}
SALTIRE_DEVICE int32_t warp_sum(int32_t value) {
  return emulator::warp_sum(value);
}
SALTIRE_DEVICE void wait_for_previous_kernel() {}
SALTIRE_DEVICE void let_next_kernel_start() {}

SALTIRE_DEVICE void keep_order() {}
SALTIRE_DEVICE uint4 load_once(const void* from) {
  uint4 v;
  emulator::read_16(&v, from);
  return v;
}
SALTIRE_DEVICE void store_once(void* to, uint4 v) {
  emulator::write_16(to, &v);
}
SALTIRE_DEVICE int add_and_see(int* counter, int value) {
  return emulator::add_and_see(counter, value);
}
SALTIRE_DEVICE void add_to(int32_t* sum, int32_t value) {
  emulator::add_to(sum, value);
}
SALTIRE_DEVICE void add_to(float* sum, float value) {
  emulator::add_to(sum, value);
}
SALTIRE_DEVICE void copy_async_16(void* to_shared, const void* from, bool there) {
  emulator::copy_async(to_shared, from, 16, there);
}
SALTIRE_DEVICE void commit_copies() {
  emulator::commit_copies();
}
template <int pending>
SALTIRE_DEVICE void wait_copies() {
  emulator::wait_copies(pending);
}
SALTIRE_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  emulator::load_matrices(r, row, false);
}
SALTIRE_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulator::load_matrices(r, row, true);
}

SALTIRE_DEVICE int32_t dot4(uint32_t u8x4, uint32_t s8x4, int32_t sum) {
  uint32_t total = static_cast<uint32_t>(sum);
  for (int i = 0; i < 32; i += 8) {
    total += (u8x4 >> i & 255u) * static_cast<uint32_t>(static_cast<int8_t>(s8x4 >> i & 255u));
  }
  return static_cast<int32_t>(total);
}
SALTIRE_DEVICE int32_t dot4_signed(uint32_t a, uint32_t b, int32_t sum) {
  for (int i = 0; i < 32; i += 8) {
    sum += static_cast<int8_t>(a >> i & 255u) * static_cast<int8_t>(b >> i & 255u);
  }
  return sum;
}
SALTIRE_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_integers(8, d, a, b);
}
SALTIRE_DEVICE void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_integers(4, d, a, b);
}
SALTIRE_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_floats(true, d, a, b);
}
SALTIRE_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_floats(false, d, a, b);
}

SALTIRE_DEVICE float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
SALTIRE_DEVICE float reciprocal_fast(float x) {
  return 1.0f / x;
}
SALTIRE_DEVICE float max_or_nan(float a, float b) {
  return a != a || b != b ? a + b : a < b ? b : a;
}
SALTIRE_DEVICE float rsqrt_fast(float x) {
  return 1.0f / std::sqrt(x);
}
SALTIRE_DEVICE int32_t round_to_int(float x) {
  if (!(x == x)) return 0;
  if (x >= 2147483648.0f) return INT32_MAX;
  if (x < -2147483648.0f) return INT32_MIN;
  return static_cast<int32_t>(std::nearbyint(x));
}
SALTIRE_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
SALTIRE_DEVICE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
SALTIRE_DEVICE float to_f32(float x) {
  return x;
}
SALTIRE_DEVICE float to_f32(bf16 x) {
  return float_of(static_cast<uint32_t>(x.bits) << 16);
}
SALTIRE_DEVICE float to_f32(f16 x) {
  return emulator::f16_to_f32(x.bits);
}
SALTIRE_DEVICE void from_f32(float x, float& y) {
  y = x;
}
SALTIRE_DEVICE void from_f32(float x, bf16& y) {
  y.bits = emulator::f32_to_bf16(x);
}
SALTIRE_DEVICE void from_f32(float x, f16& y) {
  y.bits = emulator::f32_to_f16(x);
}
SALTIRE_DEVICE uint32_t pack_bf16(float low, float high) {
  return emulator::f32_to_bf16(low) | static_cast<uint32_t>(emulator::f32_to_bf16(high)) << 16;
}
SALTIRE_DEVICE uint32_t pack_f16(float low, float high) {
  return emulator::f32_to_f16(low) | static_cast<uint32_t>(emulator::f32_to_f16(high)) << 16;
}

}  // namespace saltire::cuda
