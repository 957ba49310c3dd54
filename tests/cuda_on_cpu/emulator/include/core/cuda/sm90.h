// The emulator's sm_90a instructions: see csrc/core/cuda/sm90.h, to which a test holds this list.
// Bodies are in sm90.cpp.
#pragma once
#include "core/cuda/ptx.h"
#include "core/cuda/tensor_map.h"

namespace emulator {

void make_barrier(uint64_t* barrier, int arrivals);
void arrive(uint64_t* barrier, int bytes);
void arrive_at(uint64_t* barrier, int rank);
void wait_for(uint64_t* barrier, int parity);
void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier);
void copy_box(void* to, const saltire::cuda::TensorMap& map, int row, int column,
              uint64_t* barrier);
void copy_box_to_both(void* to, const saltire::cuda::TensorMap& map, int row, int column,
                      uint64_t* barrier);
void begin_products();
void commit_products();
void wait_products(int pending);
void multiply_128(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add);
void multiply_256(float (&d)[128], uint64_t a, uint64_t b, bool add, bool a_along_rows,
                  bool b_along_rows);

}  // namespace emulator

namespace saltire::cuda {

using Barrier = uint64_t;

SALTIRE_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - emulator::shared_memory());
}
SALTIRE_DEVICE void make_barrier(Barrier* barrier, int arrivals) {
  emulator::make_barrier(barrier, arrivals);
}
SALTIRE_DEVICE void fence_barriers() {}
SALTIRE_DEVICE void arrive(Barrier* barrier) {
  emulator::arrive(barrier, 0);
}
SALTIRE_DEVICE void arrive_at(Barrier* barrier, int rank) {
  emulator::arrive_at(barrier, rank);
}
SALTIRE_DEVICE void sync_cluster() {
  emulator::sync_cluster();
}
SALTIRE_DEVICE void arrive_and_expect(Barrier* barrier, int bytes) {
  emulator::arrive(barrier, bytes);
}
SALTIRE_DEVICE void wait_for(Barrier* barrier, int parity) {
  emulator::wait_for(barrier, parity);
}
SALTIRE_DEVICE void copy_bytes(void* to_shared, const void* from, int bytes, Barrier* barrier) {
  emulator::copy_bytes(to_shared, from, bytes, barrier);
}
SALTIRE_DEVICE void copy_box(void* to_shared, const TensorMap* map, int row, int column,
                             Barrier* barrier) {
  emulator::copy_box(to_shared, *map, row, column, barrier);
}
SALTIRE_DEVICE void copy_box_to_both(void* to_shared, const TensorMap* map, int row, int column,
                                     Barrier* barrier) {
  emulator::copy_box_to_both(to_shared, *map, row, column, barrier);
}
SALTIRE_DEVICE uint64_t operand_of(const void* shared) {
  return static_cast<uint64_t>(shared_address(shared) >> 4 & 0x3fffu) | uint64_t{1} << 16 |
         uint64_t{64} << 32 | uint64_t{1} << 62;
}
SALTIRE_DEVICE void begin_products() {
  emulator::begin_products();
}
SALTIRE_DEVICE void commit_products() {
  emulator::commit_products();
}
template <int pending>
SALTIRE_DEVICE void wait_products() {
  emulator::wait_products(pending);
}
template <int registers>
SALTIRE_DEVICE void shrink_registers() {}
template <int registers>
SALTIRE_DEVICE void grow_registers() {}
SALTIRE_DEVICE void multiply_128(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulator::multiply_128(d, a, b, add);
}

constexpr int kBoxOfRows = 64 * 128;
SALTIRE_DEVICE uint64_t operand_along_rows(const void* shared) {
  return static_cast<uint64_t>(shared_address(shared) >> 4 & 0x3fffu) |
         uint64_t{kBoxOfRows >> 4} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}
template <bool a_along_rows, bool b_along_rows>
SALTIRE_DEVICE void multiply_256(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  emulator::multiply_256(d, a, b, add, a_along_rows, b_along_rows);
}

}  // namespace saltire::cuda
