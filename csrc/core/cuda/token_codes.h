// From a token's values in the registers of a block to codes, a scale and sums: for every room
// whose kernel ends in quantised tokens. The same f32 operations in the same order as the CPU's
// paths, so the codes are the same bits.
#pragma once
#include "core/cuda/ptx.h"
#include "core/token_scale.h"

namespace saltire::cuda {

constexpr int kRun = 8;              // values a thread loads at once: 16 bytes of bf16
constexpr int kWarpRun = 32 * kRun;  // 256: the largest Hadamard within a warp

// --- loading ------------------------------------------------------------------------------------

template <typename T>
SALTIRE_DEVICE void unpack(const uint4& raw, float (&v)[kRun]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = to_f32(T{static_cast<uint16_t>(words[i] & 0xffffu)});
    v[2 * i + 1] = to_f32(T{static_cast<uint16_t>(words[i] >> 16)});
  }
}

SALTIRE_DEVICE void unpack_floats(const uint4& raw, float* v) {
  v[0] = float_of(raw.x);
  v[1] = float_of(raw.y);
  v[2] = float_of(raw.z);
  v[3] = float_of(raw.w);
}

template <typename T>
SALTIRE_DEVICE void load_run(const T* from, float (&v)[kRun]) {
  if constexpr (sizeof(T) == 4) {
    unpack_floats(load_once(from), v);
    unpack_floats(load_once(from + 4), v + 4);
  } else {
    unpack<T>(load_once(from), v);
  }
}

// The diagonal is read by every block, so it should stay in L1: plain loads.
SALTIRE_DEVICE void scale_run(const float* diag, float (&v)[kRun]) {
  const float4 low = *reinterpret_cast<const float4*>(diag);
  const float4 high = *reinterpret_cast<const float4*>(diag + 4);
  const float d[kRun] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  for (int i = 0; i < kRun; ++i) v[i] = v[i] * d[i];
}

// --- Hadamard, within a warp --------------------------------------------------------------------

// Stages h = 1, 2, 4 within a run, then h = 8 .. 128 between lanes, as far as h < B. The lower of
// two lanes keeps a + b, the upper a - b.
SALTIRE_DEVICE void rotate_run(float (&v)[kRun], int B, int lane) {
#pragma unroll
  for (int h = 1; h < kRun; h *= 2) {
    if (h >= B) return;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if ((i & h) == 0) {
        const float a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
    }
  }
  for (int distance = 1; distance < 32 && distance * kRun < B; distance *= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float other = shuffle_xor(v[i], distance);
      v[i] = upper ? other - v[i] : v[i] + other;
    }
  }
}

// --- range and rounding -------------------------------------------------------------------------

SALTIRE_DEVICE uint32_t magnitude(float v) {
  return bits_of(v) & 0x7fffffffu;
}

// The greatest of all threads' values; `warps` is 32 words of shared memory.
SALTIRE_DEVICE uint32_t block_max(uint32_t value, uint32_t* warps) {
  value = warp_max(value);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) warps[threadIdx.x / 32] = value;
  sync_block();
  return warp_max(lane < static_cast<int>(blockDim.x) / 32 ? warps[lane] : 0);
}

SALTIRE_DEVICE int round_code(float v, float inverse, int Q) {
  float scaled = inverse == 0.0f ? 0.0f : v * inverse;
  const float most = static_cast<float>(Q);
  scaled = scaled > most ? most : (scaled < -most ? -most : scaled);
  return round_to_int(scaled);
}

// Codes of a run and their sum.
SALTIRE_DEVICE int32_t store_codes(const float (&v)[kRun], float inverse, int Q, int8_t* to) {
  uint32_t words[2];
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int code = round_code(v[4 * w + i], inverse, Q);
      words[w] |= (static_cast<uint32_t>(code) & 255u) << (8 * i);
    }
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  return dot4(0x01010101u, words[0], dot4(0x01010101u, words[1], 0));
}

// Adds up the runs of a warp (lane l holds the sum of the run at first + 8·l) into the token's
// sums. A group of 256 or more takes whole warps; a smaller power of two, neighbouring lanes.
SALTIRE_DEVICE void add_sums(int32_t* sums, int32_t sum, int first, int K, int group, int lane) {
  if (group % kWarpRun == 0) {
    sum = warp_sum(sum);
    if (lane == 0 && first < K) add_to(sums + first / group, sum);
    return;
  }
  const int at = first + lane * kRun;
  if ((group & (group - 1)) == 0) {
    for (int distance = 1; distance * kRun < group; distance *= 2) {
      sum += shuffle_xor(sum, distance);
    }
    // No other warp holds a part of this group.
    if (at < K && at % group == 0) sums[at / group] = sum;
  } else if (at < K) {
    add_to(sums + at / group, sum);
  }
}

// Whether add_sums adds to memory instead of storing, so that it must start from zero.
SALTIRE_BOTH bool sums_by_adding(int group) {
  return group % kWarpRun == 0 || (group & (group - 1)) != 0;
}

SALTIRE_DEVICE void clear_sums(int32_t* sums, int K, int group) {
  if (!sums_by_adding(group)) return;
  for (int i = static_cast<int>(threadIdx.x); i < K / group; i += static_cast<int>(blockDim.x)) {
    sums[i] = 0;
  }
}

// --- a whole token in the registers of its block
// --------------------------------------------------

// Chunk c of a thread holds the run at (c · threads + thread) · 8. A Task has diag or null,
// hadamard, norm = 1 / √hadamard, K, Q, clip_over_q, sum_group, and where codes, scale and sums go.

// Diagonal, then Hadamard; returns the largest magnitude of the thread's values.
template <int chunks, typename Task>
SALTIRE_DEVICE uint32_t transform_runs(const Task& task, float (&v)[chunks][kRun]) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  uint32_t largest = 0;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int at = (c * threads + thread) * kRun;
    if (task.diag != nullptr && at < task.K) scale_run(task.diag + at, v[c]);
    if (task.hadamard > 1) {
      rotate_run(v[c], task.hadamard, thread % 32);
#pragma unroll
      for (int i = 0; i < kRun; ++i) v[c][i] *= task.norm;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const uint32_t m = magnitude(v[c][i]);
      largest = m > largest ? m : largest;
    }
  }
  return largest;
}

// The token's scale, codes and sums; `warps` is 32 words of shared memory. Sums that are added to
// were cleared by clear_sums.
template <int chunks, typename Task>
SALTIRE_DEVICE void round_runs(const Task& task, int64_t token, uint32_t largest,
                               const float (&v)[chunks][kRun], uint32_t* warps) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int K = task.K, lane = thread % 32;
  int32_t* const sums = task.sums + token * (K / task.sum_group);
  float scale;
  const float inverse = choose_scale(block_max(largest, warps), task.clip_over_q, &scale);
  if (thread == 0) task.scale[token] = scale;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int at = (c * threads + thread) * kRun;
    int32_t sum = 0;
    if (at < K) sum = store_codes(v[c], inverse, task.Q, task.codes + token * K + at);
    add_sums(sums, sum, at - lane * kRun, K, task.sum_group, lane);
  }
}

}  // namespace saltire::cuda
