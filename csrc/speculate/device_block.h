// Sums, extremes and searches by a whole block. Device code; each file compiles its own copy.
#pragma once
#include "core/cuda/ptx.h"

namespace saltire::speculate {
namespace {

using namespace saltire::cuda;

constexpr int kMostWarps = 32;

// A word for each warp, twice, so that one use may begin while the one before is still read.
template <typename T>
struct BlockWords {
  T words[2][kMostWarps];
};

SALTIRE_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
SALTIRE_DEVICE int warp_count() {
  return static_cast<int>(blockDim.x) / 32;
}

struct Add {
  template <typename T>
  static __device__ T of(T a, T b) {
    return a + b;
  }
};
struct Most {
  template <typename T>
  static __device__ T of(T a, T b) {
    return a < b ? b : a;
  }
};
struct Least {
  template <typename T>
  static __device__ T of(T a, T b) {
    return b < a ? b : a;
  }
};

template <typename Op, typename T>
SALTIRE_DEVICE T warp_reduce(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = Op::of(value, shuffle_xor(value, mask));
  return value;
}

// Of all threads' values, to all threads, in one order. `turn` alternates between 0 and 1 from one
// call to the next.
template <typename Op, typename T>
SALTIRE_DEVICE T block_reduce(T value, BlockWords<T>& memory, int& turn) {
  T* const words = memory.words[turn];
  turn ^= 1;
  value = warp_reduce<Op>(value);
  if (thread_index() % 32 == 0) words[thread_index() / 32] = value;
  sync_block();
  value = words[0];
  for (int w = 1; w < warp_count(); ++w) value = Op::of(value, words[w]);
  return value;
}

// Sums of three values of each thread at once.
template <typename T>
struct BlockTriples {
  T words[2][3][kMostWarps];
};

template <typename T>
SALTIRE_DEVICE void block_sums(T (&values)[3], BlockTriples<T>& memory, int& turn) {
  auto& words = memory.words[turn];
  turn ^= 1;
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    values[j] = warp_reduce<Add>(values[j]);
    if (thread_index() % 32 == 0) words[j][thread_index() / 32] = values[j];
  }
  sync_block();
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    values[j] = words[j][0];
    for (int w = 1; w < warp_count(); ++w) values[j] += words[j][w];
  }
}

// The sum of the values of all threads before this one.
SALTIRE_DEVICE double sum_before(double value, BlockWords<double>& memory, int& turn) {
  double* const words = memory.words[turn];
  turn ^= 1;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  double sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const double other = shuffle(sum, lane >= distance ? lane - distance : lane);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) words[warp] = sum;
  const double before = shuffle(sum, lane > 0 ? lane - 1 : 0);
  sync_block();
  double start = 0.0;
  for (int w = 0; w < warp; ++w) start += words[w];
  return lane > 0 ? start + before : start;
}

}  // namespace
}  // namespace saltire::speculate
