// From logits: a block reads a row once, 16 bytes at a time, four loads a thread under way. A
// thread keeps sums of its own; the block joins them at the end of the row.
//
// At 3 TB/s a multiprocessor gets 6.5 bf16 logits a clock; a logit takes about 9 instructions of
// 128 lanes and one of 16 exponentials, so memory is the limit by a factor of two.
#include <climits>

#include "core/check.h"
#include "core/cuda/launch.h"
#include "token_stats/device_state.h"

namespace saltire::token_stats {
namespace {

constexpr int kVectors = 4;
constexpr int kMostThreads = 512;

struct RowsTask {
  DeviceTokens tokens;
  DeviceStats out;
  DeviceGradients gradients;
  const void* x;
  void* dx;
  int V;
};

// Logits of 16 bytes.
template <typename T>
constexpr int kRun = 16 / static_cast<int>(sizeof(T));

// A row: `head` logits up to a multiple of 16 bytes, `vectors` of 16 bytes, and a tail.
template <typename T>
struct Row16 {
  const T* x;
  int V, head, vectors;

  __device__ int tail() const { return head + vectors * kRun<T>; }
};

template <typename T>
SALTIRE_DEVICE Row16<T> row_of(const RowsTask& task, int64_t m) {
  const T* const x = static_cast<const T*>(task.x) + m * task.V;
  const int off = static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int wanted = off == 0 ? 0 : kRun<T> - off;
  const int head = wanted < task.V ? wanted : task.V;
  return {x, task.V, head, (task.V - head) / kRun<T>};
}

template <typename T>
SALTIRE_DEVICE void unpack(const uint4& raw, float* v) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      v[i] = float_of(words[i]);
    } else {
      v[2 * i] = to_f32(T{static_cast<uint16_t>(words[i] & 0xffffu)});
      v[2 * i + 1] = to_f32(T{static_cast<uint16_t>(words[i] >> 16)});
    }
  }
}

template <typename T>
SALTIRE_DEVICE uint4 pack(const float (&v)[kRun<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = bits_of(v[i]);
    } else {
      T low, high;
      from_f32(v[2 * i], low);
      from_f32(v[2 * i + 1], high);
      words[i] = low.bits | static_cast<uint32_t>(high.bits) << 16;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool capped, typename T>
SALTIRE_DEVICE float logit(T x, float softcap) {
  if constexpr (capped) return cap(to_f32(x), softcap);
  return to_f32(x);
}

// --- forward ------------------------------------------------------------------------------------

// What a thread reads in turn: chunk -1 is a logit of the head, chunks 0 .. are kVectors vectors
// each, the last one is a logit of the tail. Indices rise from each to the next.
template <typename T>
SALTIRE_DEVICE int chunks_of(const Row16<T>& row, int threads) {
  return (row.vectors + kVectors * threads - 1) / (kVectors * threads);
}

// The lowest index within a thread's chunk of a logit equal to `wanted`.
template <bool capped, typename T>
SALTIRE_DEVICE int find(const Row16<T>& row, int chunk, int threads, float softcap, float wanted) {
  const int i = static_cast<int>(threadIdx.x);
  if (chunk < 0) return i;
  if (chunk == chunks_of(row, threads)) return row.tail() + i;
  for (int j = 0; j < kVectors; ++j) {
    const int vector = (chunk * kVectors + j) * threads + i;
    if (vector >= row.vectors) break;
    const int first = row.head + vector * kRun<T>;
    for (int k = 0; k < kRun<T>; ++k) {
      if (logit<capped>(row.x[first + k], softcap) == wanted) return first + k;
    }
  }
  return 0;  // all masked
}

// partial: some of the chunk's vectors are beyond the row's last one.
template <bool capped, bool partial, typename T>
SALTIRE_DEVICE void read_chunk(const Row16<T>& row, int chunk, int threads, float softcap, float c,
                               Part& part) {
  const int first = chunk * kVectors * threads + static_cast<int>(threadIdx.x);
  uint4 raw[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int vector = first + j * threads;
    // The last vector again instead of those beyond; its logits are masked below.
    const int there = !partial || vector < row.vectors ? vector : row.vectors - 1;
    raw[j] = load_once(row.x + row.head + there * kRun<T>);
  }
#pragma unroll
  for (int j = 0; j < kVectors; j += 2) {
    float x[2 * kRun<T>];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unpack<T>(raw[j + half], x + half * kRun<T>);
      const bool there = !partial || first + (j + half) * threads < row.vectors;
#pragma unroll
      for (int k = 0; k < kRun<T>; ++k) {
        float& v = x[half * kRun<T> + k];
        if constexpr (capped) v = cap(v, softcap);
        if constexpr (partial) v = there ? v : kMasked;
      }
    }
    add_logits(part, x, c, chunk);
  }
}

template <bool capped, typename T>
SALTIRE_DEVICE Part read_row(const Row16<T>& row, int threads, float softcap, float c) {
  const int i = static_cast<int>(threadIdx.x);
  Part part = empty_part();
  if (i < row.head) {
    const float one[1] = {logit<capped>(row.x[i], softcap)};
    add_logits(part, one, c, -1);
  }
  const int chunks = chunks_of(row, threads), whole = row.vectors / (kVectors * threads);
  for (int chunk = 0; chunk < whole; ++chunk) {
    read_chunk<capped, false>(row, chunk, threads, softcap, c, part);
  }
  if (whole < chunks) read_chunk<capped, true>(row, whole, threads, softcap, c, part);
  if (row.tail() + i < row.V) {
    const float one[1] = {logit<capped>(row.x[row.tail() + i], softcap)};
    add_logits(part, one, c, chunks);
  }
  return part;
}

template <typename T, bool capped>
__global__ void __launch_bounds__(kMostThreads, 2)
    stats_of_rows(const __grid_constant__ RowsTask task) {
  auto* const parts = reinterpret_cast<Part*>(shared_memory());  // one a warp
  auto* const places = reinterpret_cast<uint32_t*>(parts + 32);
  const int i = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = i % 32, warps = threads / 32;
  const int64_t m = blockIdx.x;
  const TokenFacts token = facts_of(task.tokens, m, task.V);
  if (token.ignored) {
    if (i == 0) write_stats(task.out, m, token, empty_part(), 0.0f, 0);
    return;
  }
  const float c = token.inverse_temperature * kLog2E, softcap = task.tokens.softcap;
  const Row16<T> row = row_of<T>(task, m);
  float label = kMasked;
  if (i == 0 && token.label >= 0) label = logit<capped>(row.x[token.label], softcap);
  const Part mine = read_row<capped>(row, threads, softcap, c);
  Part all = merge_lanes<32>(mine, c);
  if (lane == 0) parts[i / 32] = all;
  sync_block();
  all = merge_lanes<32>(lane < warps ? parts[lane] : empty_part(), c);
  // Only a thread whose own largest is the row's looks where it was.
  uint32_t place = INT_MAX;
  if (mine.max == all.max) {
    place = static_cast<uint32_t>(find<capped>(row, mine.at, threads, softcap, all.max));
  }
  place = INT_MAX - warp_max(INT_MAX - place);
  if (lane == 0) places[i / 32] = place;
  sync_block();
  if (i >= 32) return;
  all.at = static_cast<int>(INT_MAX - warp_max(INT_MAX - (lane < warps ? places[lane] : INT_MAX)));
  if (i == 0) {
    if (all.max == kMasked || all.max != all.max) all.at = 0;
    write_stats(task.out, m, token, all, label, task.tokens.first);
  }
}

// --- backward -----------------------------------------------------------------------------------

// Logits first + [0, count) of the row.
template <typename T, bool capped, int count>
SALTIRE_DEVICE void to_gradients(float (&v)[count], const GradientFacts& facts, int first,
                                 float softcap, float inverse_cap) {
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const float x = capped ? cap(v[k], softcap) : v[k];
    v[k] = gradient_of(facts, x, first + k == facts.label, inverse_cap);
  }
}

template <typename T, bool capped, bool vector>
__global__ void __launch_bounds__(kMostThreads, 2)
    gradient_of_rows(const __grid_constant__ RowsTask task) {
  const int i = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t m = blockIdx.x;
  const GradientFacts facts = gradient_facts(task.tokens, task.gradients, m, task.V);
  const float softcap = task.tokens.softcap;
  const float inverse_cap = capped ? reciprocal_fast(softcap) : 0.0f;
  T* const dx = static_cast<T*>(task.dx) + m * task.V;
  Row16<T> row = row_of<T>(task, m);
  if (!vector) row.vectors = 0;
  for (int first = 0; first < row.vectors; first += kVectors * threads) {
    uint4 raw[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int at = first + j * threads + i;
      const int there = at < row.vectors ? at : row.vectors - 1;
      raw[j] = load_once(row.x + row.head + there * kRun<T>);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int at = first + j * threads + i;
      if (at >= row.vectors) break;
      float v[kRun<T>];
      unpack<T>(raw[j], v);
      const int index = row.head + at * kRun<T>;
      to_gradients<T, capped>(v, facts, index, softcap, inverse_cap);
#pragma unroll
      for (int k = 0; k < kRun<T>; ++k) v[k] = facts.live ? v[k] : 0.0f;
      store_once(dx + index, pack<T>(v));
    }
  }
  // Head and tail, or the whole row where x and dx start differently.
  const int inside = row.tail() - row.head;
  for (int n = i; n < row.V - inside; n += threads) {
    const int k = n < row.head ? n : n + inside;
    float v[1] = {to_f32(row.x[k])};
    to_gradients<T, capped>(v, facts, k, softcap, inverse_cap);
    from_f32(facts.live ? v[0] : 0.0f, dx[k]);
  }
}

// --- launching ----------------------------------------------------------------------------------

template <typename T>
void run_stats(const RowsTask& task, const cuda::Launch& how) {
  if (task.tokens.softcap != 0) {
    launch<stats_of_rows<T, true>>("token_stats", how, task);
  } else {
    launch<stats_of_rows<T, false>>("token_stats", how, task);
  }
}

template <typename T, bool capped>
void run_gradient(const RowsTask& task, bool vector, const cuda::Launch& how) {
  if (vector) {
    launch<gradient_of_rows<T, capped, true>>("token_stats_backward", how, task);
  } else {
    launch<gradient_of_rows<T, capped, false>>("token_stats_backward", how, task);
  }
}

template <typename T>
void run_gradient(const RowsTask& task, bool vector, const cuda::Launch& how) {
  if (task.tokens.softcap != 0) return run_gradient<T, true>(task, vector, how);
  run_gradient<T, false>(task, vector, how);
}

cuda::Launch blocks_of(const RowsProblem& p, const RowsPlan& plan, cudaStream_t stream) {
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(p.tokens.M));
  how.block = dim3(static_cast<unsigned>(plan.threads));
  how.shared_bytes = 32 * (sizeof(Part) + sizeof(uint32_t));
  how.stream = stream;
  return how;
}

}  // namespace

RowsPlan make_plan(const RowsProblem& p) {
  constexpr int64_t kMostLogits = (int64_t{1} << 31) - 65536;  // so that 32-bit indices stay right
  SALTIRE_CHECK(p.V <= kMostLogits, "token_stats: a vocabulary of ", p.V,
                "; a CUDA device takes up to ", kMostLogits, ". Split it, and merge the parts.");
  const int64_t bytes = p.dtype == Dtype::f32 ? 4 : 2;
  // A thread has one load of 16 bytes at least: rows that are short take few threads, so that
  // many of them are under way on a multiprocessor.
  const int64_t wanted = round_up((p.V * bytes + 15) / 16, 32);
  RowsPlan plan;
  plan.threads = static_cast<int>(wanted < 32 ? 32 : wanted > kMostThreads ? kMostThreads : wanted);
  plan.vector = p.dx == nullptr ||
                reinterpret_cast<uintptr_t>(p.x) % 16 == reinterpret_cast<uintptr_t>(p.dx) % 16;
  return plan;
}

std::string RowsPlan::text() const {
  return "threads=" + std::to_string(threads) + (vector ? " vector" : " scalar");
}

void stats_of_logits(const RowsProblem& p, const DeviceStats& out, cudaStream_t stream) {
  if (p.tokens.M == 0) return;
  const cuda::Launch how = blocks_of(p, make_plan(p), stream);
  RowsTask task = {};
  task.tokens = p.tokens;
  task.out = out;
  task.x = p.x;
  task.V = static_cast<int>(p.V);
  if (p.dtype == Dtype::f32) run_stats<float>(task, how);
  if (p.dtype == Dtype::bf16) run_stats<bf16>(task, how);
  if (p.dtype == Dtype::f16) run_stats<f16>(task, how);
}

void gradient_of_logits(const RowsProblem& p, const DeviceGradients& gradients,
                        cudaStream_t stream) {
  if (p.tokens.M == 0) return;
  const RowsPlan plan = make_plan(p);
  const cuda::Launch how = blocks_of(p, plan, stream);
  RowsTask task = {};
  task.tokens = p.tokens;
  task.gradients = gradients;
  task.x = p.x;
  task.dx = p.dx;
  task.V = static_cast<int>(p.V);
  if (p.dtype == Dtype::f32) run_gradient<float>(task, plan.vector, how);
  if (p.dtype == Dtype::bf16) run_gradient<bf16>(task, plan.vector, how);
  if (p.dtype == Dtype::f16) run_gradient<f16>(task, plan.vector, how);
}

}  // namespace saltire::token_stats
