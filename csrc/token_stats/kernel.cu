// token_stats from hidden states on a CUDA device: the choice of kernels, and the small kernels
// around the products.
#include <algorithm>

#include "core/check.h"
#include "token_stats/device_linear.h"
#include "token_stats/device_state.h"

namespace saltire::token_stats {
namespace {

constexpr int kThreads = 256;

// --- joining ranges of the vocabulary -----------------------------------------------------------

__global__ void __launch_bounds__(kThreads) finish_tokens(const __grid_constant__ LinearTask task,
                                                          const __grid_constant__ DeviceStats out) {
  const int m = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (m >= task.M) return;
  const TokenFacts token = facts_of(task.tokens, m, task.V);
  const float c = token.inverse_temperature * kLog2E;
  Part all = empty_part();
  float label = kMasked;
  for (int split = 0; split < task.tiling.splits; ++split) {
    const TokenPart part = task.parts[static_cast<int64_t>(split) * task.M + m];
    merge(all, {part.max, part.sum, part.weighted, part.at}, c);
    label = max_or_nan(label, part.label);
  }
  if (!(all.max > kMasked)) all.at = 0;  // all masked, or a NaN
  write_stats(out, m, token, all, label, task.tokens.first);
}

// --- db -----------------------------------------------------------------------------------------

// db[first + i] = Σ_m dx[m, i], by 8 threads a column, always in one order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_columns(const __grid_constant__ LinearTask task, float* db) {
  auto* const parts = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int column = static_cast<int>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (column < task.count) {
    const T* const dx = static_cast<const T*>(task.dx) + column;
    for (int m = warp; m < task.M; m += kThreads / 32) {
      sum += to_f32(dx[static_cast<int64_t>(m) * task.padded]);
    }
  }
  parts[threadIdx.x] = sum;
  sync_block();
  if (warp != 0 || column >= task.count) return;
  for (int w = 1; w < kThreads / 32; ++w) sum += parts[w * 32 + lane];
  db[task.first + column] = sum;
}

template <typename Word>
__global__ void __launch_bounds__(kThreads) clear(Word* words, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) words[i] = 0;
}

// --- plans --------------------------------------------------------------------------------------

// Forward parts of at most so many ranges are kept, and dx of at most so much vocabulary.
constexpr int kMostSplits = 256;
constexpr int64_t kChunkBytes = int64_t{128} << 20;
// Filling the copies' pipeline and ending a tile, in tiles.
constexpr double kOverhead = 0.3;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

bool aligned(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

// Whether `route` can do it, and why not.
const char* obstacle(const LinearProblem& p, const cuda::Device& device, LinearRoute route) {
  if (route == LinearRoute::floats) return nullptr;
  if (p.hidden_dtype != Dtype::bf16 || p.head_dtype != Dtype::bf16) {
    return "hidden and head must be bfloat16";
  }
  if (p.D % 8 != 0 || !aligned(p.hidden) || !aligned(p.head)) {
    return "rows must start at multiples of 16 bytes";
  }
  if (route == LinearRoute::mma) return nullptr;
  if (device.sm != 90) return "the device must be of compute capability 9.0";
  return sm90_products() == nullptr ? "the library must be built for sm_90a" : nullptr;
}

const char* name_of(LinearRoute route) {
  return route == LinearRoute::floats ? "floats" : route == LinearRoute::mma ? "mma" : "sm90";
}

int slots_of(const LinearPlan& plan, const cuda::Device& device) {
  if (plan.route == LinearRoute::sm90) return std::max(1, device.multiprocessors / 2);
  const auto fit = static_cast<int64_t>(device.shared_bytes) / (plan.shared_bytes + 1024);
  return device.multiprocessors * (fit >= 2 ? 2 : 1);
}

Tiling tiling_of(const LinearPlan& plan, int64_t rows, int64_t columns) {
  return make_tiling(static_cast<int>(ceil_div(rows, plan.rows)),
                     static_cast<int>(ceil_div(columns, plan.columns)), plan.slots);
}

}  // namespace

Products& sm90_products() {
  static Products run = nullptr;
  return run;
}

Tiling make_tiling(int row_tiles, int column_tiles, int slots) {
  Tiling tiling;
  tiling.rows = row_tiles;
  tiling.columns = column_tiles;
  if (tiling.rows == 0 || tiling.columns == 0) return tiling;
  const int most = std::min(tiling.columns, kMostSplits);
  double least = 0;
  for (int splits = std::min(most, std::max(1, slots / Tiling::kBand)); splits <= most; ++splits) {
    const auto waves = static_cast<double>(ceil_div(int64_t{tiling.rows} * splits, slots));
    const double time = waves * (static_cast<double>(ceil_div(tiling.columns, splits)) + kOverhead);
    if (least != 0 && time >= least) continue;
    least = time;
    tiling.splits = splits;
  }
  return tiling;
}

LinearPlan make_plan(const LinearProblem& p, const cuda::Device& device, LinearRoute route) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 65536;
  SALTIRE_CHECK(p.V <= kMost && p.tokens.M <= kMost && p.D <= kMost,
                "linear_token_stats: M = ", p.tokens.M, ", D = ", p.D, ", V = ", p.V,
                "; a CUDA device takes up to ", kMost, " of each. Split them.");
  const char* const why = obstacle(p, device, route);
  SALTIRE_CHECK(why == nullptr, "linear_token_stats: for ", name_of(route), " ", why,
                ". Choose floats.");
  LinearPlan plan;
  plan.route = route;
  if (route == LinearRoute::mma) {
    plan.rows = plan.columns = kMmaTile;
    plan.shared_bytes = mma_shared_bytes();
  } else if (route == LinearRoute::sm90) {
    plan.rows = kSm90Rows;
    plan.columns = kSm90Columns;
    plan.shared_bytes = sm90_shared_bytes();
  }
  plan.slots = slots_of(plan, device);
  const int64_t M = p.tokens.M;
  const Tiling tiling = tiling_of(plan, M, p.V);
  plan.token_tiles = tiling.rows;
  plan.vocabulary_tiles = tiling.columns;
  plan.splits = tiling.splits;
  plan.forward_bytes = plan.splits * M * static_cast<int64_t>(sizeof(TokenPart));
  const int64_t token_bytes = M * (route == LinearRoute::floats ? 4 : 2);
  const int64_t fit = kChunkBytes / std::max<int64_t>(1, token_bytes) / plan.columns;
  plan.chunk = std::min<int64_t>(std::max<int64_t>(1, fit), plan.vocabulary_tiles) * plan.columns;
  plan.backward_bytes = plan.chunk * token_bytes;
  return plan;
}

LinearPlan make_plan(const LinearProblem& p, const cuda::Device& device) {
  for (const LinearRoute route : {LinearRoute::sm90, LinearRoute::mma}) {
    if (obstacle(p, device, route) == nullptr) return make_plan(p, device, route);
  }
  return make_plan(p, device, LinearRoute::floats);
}

std::string LinearPlan::text() const {
  return std::string(name_of(route)) + " tiles=" + std::to_string(token_tiles) + "x" +
         std::to_string(vocabulary_tiles) + " splits=" + std::to_string(splits) +
         " chunk=" + std::to_string(chunk) + " forward=" + std::to_string(forward_bytes) +
         " backward=" + std::to_string(backward_bytes);
}

// --- launching ----------------------------------------------------------------------------------

namespace {

cuda::Launch blocks(int64_t count, int64_t each, cudaStream_t stream) {
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(ceil_div(count, each)));
  how.block = dim3(kThreads);
  how.stream = stream;
  return how;
}

LinearTask task_of(const LinearProblem& p) {
  LinearTask task = {};
  task.tokens = p.tokens;
  task.M = static_cast<int>(p.tokens.M);
  task.D = static_cast<int>(p.D);
  task.V = static_cast<int>(p.V);
  task.count = task.V;
  task.hidden = p.hidden;
  task.head = p.head;
  task.hidden_dtype = p.hidden_dtype;
  task.head_dtype = p.head_dtype;
  task.bias = p.bias;
  return task;
}

void multiply(Role role, LinearTask& task, const LinearPlan& plan, int64_t rows, int64_t columns,
              cudaStream_t stream) {
  task.tiling = tiling_of(plan, rows, columns);
  if (plan.route == LinearRoute::sm90) return sm90_products()(role, task, stream);
  if (plan.route == LinearRoute::mma) return run_mma(role, task, stream);
  run_floats(role, task, stream);
}

void sum_bias(const LinearTask& task, const LinearPlan& plan, float* db, cudaStream_t stream) {
  cuda::Launch how = blocks(task.count, 32, stream);
  how.shared_bytes = kThreads * sizeof(float);
  if (plan.route != LinearRoute::floats) {
    launch<sum_columns<bf16>>("linear_token_stats bias", how, task, db);
  } else {
    launch<sum_columns<float>>("linear_token_stats bias", how, task, db);
  }
}

// No tokens: the sums over them are 0.
void clear_gradients(const LinearProblem& p, const DeviceLinearGradients& out,
                     cudaStream_t stream) {
  constexpr const char* kName = "linear_token_stats clear";
  const cuda::Launch how = blocks(p.V * p.D, kThreads, stream);
  if (out.head != nullptr && p.head_dtype == Dtype::f32) {
    launch<clear<uint32_t>>(kName, how, static_cast<uint32_t*>(out.head), p.V * p.D);
  } else if (out.head != nullptr) {
    launch<clear<uint16_t>>(kName, how, static_cast<uint16_t*>(out.head), p.V * p.D);
  }
  if (out.bias != nullptr) {
    launch<clear<uint32_t>>(kName, blocks(p.V, kThreads, stream),
                            reinterpret_cast<uint32_t*>(out.bias), p.V);
  }
}

}  // namespace

void stats_of_linear(const LinearProblem& p, const LinearPlan& plan, const DeviceStats& out,
                     void* workspace, cudaStream_t stream) {
  if (p.tokens.M == 0) return;
  LinearTask task = task_of(p);
  task.parts = static_cast<TokenPart*>(workspace);
  multiply(Role::stats, task, plan, p.tokens.M, p.V, stream);
  launch<finish_tokens>("linear_token_stats finish", blocks(p.tokens.M, kThreads, stream), task,
                        out);
}

void gradient_of_linear(const LinearProblem& p, const LinearPlan& plan,
                        const DeviceGradients& gradients, const DeviceLinearGradients& out,
                        void* workspace, cudaStream_t stream) {
  if (p.tokens.M == 0) return clear_gradients(p, out, stream);
  LinearTask task = task_of(p);
  task.gradients = gradients;
  task.dx = workspace;
  task.d_hidden = out.hidden;
  task.d_head = out.head;
  for (int64_t first = 0; first < p.V; first += plan.chunk) {
    task.first = static_cast<int>(first);
    task.count = static_cast<int>(std::min(plan.chunk, p.V - first));
    task.padded = static_cast<int>(round_up(task.count, plan.columns));
    task.add_hidden = first > 0;
    multiply(Role::spread, task, plan, p.tokens.M, task.count, stream);
    if (out.hidden != nullptr) multiply(Role::hidden, task, plan, p.tokens.M, p.D, stream);
    if (out.head != nullptr) multiply(Role::head, task, plan, task.count, p.D, stream);
    if (out.bias != nullptr) sum_bias(task, plan, out.bias, stream);
  }
}

}  // namespace saltire::token_stats
