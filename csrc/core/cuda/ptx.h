// Every instruction that C++ has no word for, behind a name, with the reason to use it.
// tests/cuda_on_cpu has a header of the same name that does the same on a CPU; a test holds the two
// to one list of functions.
//
// Fragments of mma.m16n8k32 (8-bit), lane = 4·g + t:
//   a[0] = A[g, 4t..4t+3]   a[1] = A[g+8, 4t..]   a[2] = A[g, 16+4t..]   a[3] = A[g+8, 16+4t..]
//   b[0] = B[4t.., g]       b[1] = B[16+4t.., g]
//   d[0], d[1] = D[g, 2t], D[g, 2t+1]             d[2], d[3] = D[g+8, 2t], D[g+8, 2t+1]
// m16n8k64 (4-bit) is the same with 8t.. and 32+8t..; m16n8k16 (16-bit) with pairs 2t.. and 8+2t..
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core/cuda/number.h"

namespace saltire::cuda {

#define SALTIRE_DEVICE static __device__ __forceinline__

// --- threads ------------------------------------------------------------------------------------

// Waits for the block; orders its shared and global memory.
SALTIRE_DEVICE void sync_block() {
  __syncthreads();
}

// Waits for the warp and orders its memory; shuffles alone do not.
SALTIRE_DEVICE void sync_warp() {
  __syncwarp();
}

// Waits for `count` threads of the block at barrier `id` (1..15): some warps without the others.
SALTIRE_DEVICE void sync_some(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// The value of the lane whose number differs in the bits of `mask`: a butterfly in registers.
template <typename T>
SALTIRE_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of lane `from`.
template <typename T>
SALTIRE_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}

// One bit a lane: whose `condition` holds.
SALTIRE_DEVICE uint32_t vote(bool condition) {
  return __ballot_sync(0xffffffffu, condition);
}

// The greatest of 32 values, in one instruction instead of five shuffles.
SALTIRE_DEVICE uint32_t warp_max(uint32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}

// The sum of 32 values, likewise.
SALTIRE_DEVICE int32_t warp_sum(int32_t value) {
  return __reduce_add_sync(0xffffffffu, value);
}

// sm_90: until the kernel before this one on the stream has ended and its writes are visible.
// Returns at once where the launch did not ask to overlap it.
SALTIRE_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// sm_90: lets the next kernel on the stream start its prologue as soon as SMs have room for it.
SALTIRE_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// No instruction; but the compiler moves no memory access across it, which keeps it from loading
// early what it has no registers for.
SALTIRE_DEVICE void keep_order() {
  asm volatile("" ::: "memory");
}

// --- memory -------------------------------------------------------------------------------------

// 16 bytes that are read once: past L1, which they would only sweep clean.
SALTIRE_DEVICE uint4 load_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// 16 bytes that nobody on this SM reads soon.
SALTIRE_DEVICE void store_once(void* to, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Adds and returns what was there; everything the block wrote before is visible to whoever sees the
// sum, and the other way round. For "the last block to arrive finishes the work".
SALTIRE_DEVICE int add_and_see(int* counter, int value) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(counter), "r"(value)
               : "memory");
  return old;
}

// Integer sums are the same in any order.
SALTIRE_DEVICE void add_to(int32_t* sum, int32_t value) {
  atomicAdd(sum, value);
}

// Floating sums whose order does not matter to the caller.
SALTIRE_DEVICE void add_to(float* sum, float value) {
  atomicAdd(sum, value);
}

// Starts copying 16 bytes to shared memory without registers; zeros where `there` is false (then
// `from` is not read). Done after commit_copies and wait_copies; other threads see it only after a
// barrier as well.
SALTIRE_DEVICE void copy_async_16(void* to_shared, const void* from, bool there) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}

SALTIRE_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's newest groups are under way.
template <int pending>
SALTIRE_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8-row x 16-byte matrices: lane l gives the address of row l % 8 of matrix l / 8 and gets, of
// matrix i, the 4 bytes at row g, column 4t: four mma operands in one instruction.
SALTIRE_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// The same for matrices that lie transposed (16-bit elements).
SALTIRE_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// --- integers -----------------------------------------------------------------------------------

// sum + Σ of four products of unsigned and signed bytes: 4 multiply-adds an instruction.
SALTIRE_DEVICE int32_t dot4(uint32_t u8x4, uint32_t s8x4, int32_t sum) {
  int32_t d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(u8x4), "r"(s8x4), "r"(sum));
  return d;
}

// The same of signed bytes on both sides.
SALTIRE_DEVICE int32_t dot4_signed(uint32_t a, uint32_t b, int32_t sum) {
  int32_t d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sum));
  return d;
}

// D += A·B of signed bytes, on the tensor cores.
SALTIRE_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// D += A·B of signed 4-bit integers. Native on sm_80, 86 and 89 only; elsewhere a
// long emulation, so code for other chips must not call it.
SALTIRE_DEVICE void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 900
  __trap();
#else
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// --- floats -------------------------------------------------------------------------------------

// D += A·B, bf16 operands, f32 sums.
SALTIRE_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// D += A·B, f16 operands, f32 sums.
SALTIRE_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x to 2 ulp, results below 2^-126 as 0: one instruction, where expf takes eight.
SALTIRE_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp: no slow path, hence no call beside tensor cores.
SALTIRE_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The greater one; NaN if either is, where fmaxf would drop it.
SALTIRE_DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// 1 / √x to 2 ulp.
SALTIRE_DEVICE float rsqrt_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To the nearest integer, ties to even; saturates at the ends of int32.
SALTIRE_DEVICE int32_t round_to_int(float x) {
  return __float2int_rn(x);
}

SALTIRE_DEVICE uint32_t bits_of(float x) {
  return __float_as_uint(x);
}

SALTIRE_DEVICE float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}

SALTIRE_DEVICE float to_f32(float x) {
  return x;
}

SALTIRE_DEVICE float to_f32(bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

SALTIRE_DEVICE float to_f32(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

SALTIRE_DEVICE void from_f32(float x, float& y) {
  y = x;
}

SALTIRE_DEVICE void from_f32(float x, bf16& y) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

SALTIRE_DEVICE void from_f32(float x, f16& y) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

// Two at once, the first in the low half.
SALTIRE_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

SALTIRE_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

}  // namespace saltire::cuda
