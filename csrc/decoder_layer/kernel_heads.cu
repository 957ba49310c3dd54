// Queries, keys and values of a step: norm of heads, rotation by position, and the way into the
// cache. A warp a head; what needs other lanes' values goes through the warp's shared memory.
#include <cmath>

#include "core/cuda/launch.h"
#include "core/cuda/ptx.h"
#include "decoder_layer/device.h"

namespace saltire::decoder_layer {
namespace {

using namespace saltire::cuda;

constexpr int kWarps = 4;
constexpr int kPairs = static_cast<int>(kMaxHeadDim) / 2 / 32;  // of a lane
constexpr float kMostF16 = 65504.0f;

struct Task {
  const void* qkv;
  const int64_t* rows;
  const float* rotation;
  const float* q_norm;
  const float* k_norm;
  uint8_t* data;
  uint16_t* grids;
  float* queries;
  float* own;
  int64_t slots;
  float eps, scale;
  int M, heads, kv_heads, head_dim, sequences;
  Format format;
};

SALTIRE_DEVICE float warp_total(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// The CPU's butterflies in the CPU's order, on a head in shared memory.
SALTIRE_DEVICE void rotate_head(float* head, int d, int lane) {
  const int block = d & -d;
  for (int h = 1; h < block; h *= 2) {
    for (int p = lane; p < d / 2; p += 32) {
      const int i = p / h * 2 * h + p % h;
      const float a = head[i], b = head[i + h];
      head[i] = a + b;
      head[i + h] = a - b;
    }
    sync_warp();
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(block));
  for (int i = lane; i < d; i += 32) head[i] *= scale;
  sync_warp();
}

// Rounds a head to a grid of its own, as cache.h does: codes take the place of the values.
SALTIRE_DEVICE void round_head(float* head, int d, int bits, int lane, f16* scale, f16* low) {
  float least = head[0], most = head[0];
  bool damaged = false;
  for (int i = lane; i < d; i += 32) {
    const float x = head[i];
    least = x < least ? x : least;
    most = x > most ? x : most;
    damaged = damaged || (bits_of(x) & 0x7f800000u) == 0x7f800000u;
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const float l = shuffle_xor(least, mask), m = shuffle_xor(most, mask);
    least = l < least ? l : least;
    most = m > most ? m : most;
  }
  damaged = vote(damaged) != 0;
  const auto top = static_cast<float>((1 << bits) - 1);
  const float cut = (most - least) * (bits == 2 ? 0.175f : 0.0f);
  const float begin = least + cut, end = most - cut;
  const float step = (end - begin) / top;
  const float origin = begin > kMostF16 ? kMostF16 : (begin < -kMostF16 ? -kMostF16 : begin);
  f16 grid_scale, grid_low;
  from_f32(step > kMostF16 ? kMostF16 : step, grid_scale);
  from_f32(damaged ? float_of(0x7fc00000u) : origin, grid_low);
  if (lane == 0) {
    *scale = grid_scale;
    *low = grid_low;
  }
  const float width = to_f32(grid_scale), zero = to_f32(grid_low);
  sync_warp();  // all lanes have read the first value
  for (int i = lane; i < d; i += 32) {
    int level = width > 0.0f ? round_to_int((head[i] - zero) / width) : 0;
    level = level < 0 ? 0 : level;
    head[i] = level < (1 << bits) ? static_cast<float>(level) : top;
  }
  sync_warp();
}

// The bytes of a head in its slot; op.h draws the layouts.
SALTIRE_DEVICE void store_codes_of_head(const float* head, int d, int bits, bool key, uint8_t* to,
                                        int64_t slot, int lane) {
  const int per = 8 / bits, bytes = d / per, stride = 16 / per;
  constexpr int kBlock = static_cast<int>(kSlotBlock);
  for (int i = lane; i < bytes; i += 32) {
    uint32_t byte = 0;
    for (int j = 0; j < per; ++j) {
      const int dim = key ? i * per + j : i / stride * 16 + i % stride + j * stride;
      byte |= static_cast<uint32_t>(head[dim]) << j * bits;
    }
    const int64_t at =
        key ? (slot / kBlock * bytes + i) * kBlock + slot % kBlock : slot * bytes + i;
    to[at] = static_cast<uint8_t>(byte);
  }
}

template <typename E>
SALTIRE_DEVICE void store_numbers_of_head(const float* head, int d, bool key, E* to, int64_t slot,
                                          int lane) {
  constexpr int kBlock = static_cast<int>(kSlotBlock);
  for (int i = lane; i < d; i += 32) {
    from_f32(head[i], to[key ? (slot / kBlock * d + i) * kBlock + slot % kBlock : slot * d + i]);
  }
}

SALTIRE_DEVICE void store_head(const Task& task, float* head, bool key, int64_t sequence, int g,
                               int64_t slot, int lane) {
  const int d = task.head_dim;
  const int bits = static_cast<int>(format_bits(task.format));
  const int64_t place =
      ((key ? 0 : task.sequences) + sequence) * task.kv_heads + g;  // of the head in the layer
  uint8_t* const to = task.data + place * (task.slots * d * bits / 8);
  if (task.format == Format::f32) {
    store_numbers_of_head(head, d, key, reinterpret_cast<float*>(to), slot, lane);
  } else if (task.format == Format::bf16) {
    store_numbers_of_head(head, d, key, reinterpret_cast<bf16*>(to), slot, lane);
  } else {
    auto* const grids = reinterpret_cast<f16*>(task.grids) + place * 2 * task.slots;
    round_head(head, d, bits, lane, grids + slot, grids + task.slots + slot);
    store_codes_of_head(head, d, bits, key, to, slot, lane);
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) append_heads(const __grid_constant__ Task task) {
  wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int d = task.head_dim, half = d / 2, all = task.heads + 2 * task.kv_heads;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (index >= static_cast<int64_t>(task.M) * all) return;
  const int64_t m = index / all;
  const int h = static_cast<int>(index % all);
  const bool query = h < task.heads, key = !query && h < task.heads + task.kv_heads;
  const int64_t* const row = task.rows + m * kRowColumns;
  const T* const x = static_cast<const T*>(task.qkv) + index * d;
  float* const head = reinterpret_cast<float*>(shared_memory()) + warp * d;
  float a[kPairs] = {}, b[kPairs] = {};
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= half) continue;
    a[p] = to_f32(x[i]);
    b[p] = to_f32(x[i + half]);
    squares = fmaf(b[p], b[p], fmaf(a[p], a[p], squares));
  }
  const float* const gain = query ? task.q_norm : key ? task.k_norm : nullptr;
  const float mean = warp_total(squares) / static_cast<float>(d);
  const float factor = 1.0f / sqrtf(mean + task.eps);
  const float* const cosines = task.rotation + row[kPosition] * d;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= half) continue;
    if (gain != nullptr) {
      a[p] = a[p] * factor * gain[i];
      b[p] = b[p] * factor * gain[i + half];
    }
    if (query || key) {
      const float cosine = cosines[i], sine = cosines[half + i], low = a[p];
      a[p] = low * cosine - b[p] * sine;
      b[p] = b[p] * cosine + low * sine;
    }
    head[i] = a[p];
    head[i + half] = b[p];
  }
  sync_warp();
  if (is_coded(task.format)) rotate_head(head, d, lane);
  if (query) {
    float* const to = task.queries + (m * task.heads + h) * d;
    for (int i = lane; i < d; i += 32) to[i] = head[i] * task.scale;
    return;
  }
  const int g = (h - task.heads) % task.kv_heads;
  float* const own = task.own + ((key ? 0 : task.M) + m) * task.kv_heads * d + g * d;
  for (int i = lane; i < d; i += 32) own[i] = head[i];
  if (row[kSlot] < 0) return;
  sync_warp();  // codes take the place of what other lanes still read
  store_head(task, head, key, row[kSequence], g, row[kSlot], lane);
}

}  // namespace

void run(const AppendProblem& p, const Device& device, cudaStream_t stream) {
  if (p.M == 0) return;
  Task task = {};
  task.qkv = p.qkv;
  task.rows = p.rows;
  task.rotation = p.rotation;
  task.q_norm = p.q_norm;
  task.k_norm = p.k_norm;
  task.data = p.cache.data;
  task.grids = p.cache.grids;
  task.queries = p.queries;
  task.own = p.own;
  task.slots = p.cache.slots;
  task.eps = p.eps;
  task.scale = 1.0f / std::sqrt(static_cast<float>(p.cache.head_dim));
  task.M = static_cast<int>(p.M);
  task.heads = static_cast<int>(p.heads);
  task.kv_heads = static_cast<int>(p.cache.kv_heads);
  task.head_dim = static_cast<int>(p.cache.head_dim);
  task.sequences = static_cast<int>(p.cache.sequences);
  task.format = p.cache.format;
  const int64_t heads = p.M * (p.heads + 2 * p.cache.kv_heads);
  Launch how;
  how.grid = dim3(static_cast<unsigned>((heads + kWarps - 1) / kWarps));
  how.block = dim3(32 * kWarps);
  how.shared_bytes = static_cast<size_t>(kWarps * p.cache.head_dim) * sizeof(float);
  how.stream = stream;
  how.overlap_previous = device.sm >= 90;
  if (p.dtype == Number::f32) {
    launch<append_heads<float>>("append_heads", how, task);
  } else {
    launch<append_heads<bf16>>("append_heads", how, task);
  }
}

}  // namespace saltire::decoder_layer
