// lowbit_gemm on a CUDA device: the choice of kernel, and the way into and out of its weight
// layout.
#include <algorithm>

#include "core/check.h"
#include "lowbit_gemm/device_routes.h"
#include "lowbit_gemm/device_task.h"

namespace saltire::lowbit_gemm {
namespace {

constexpr int kLayoutThreads = 256;

// What layout kernels need of a DeviceLayout.
struct Shape {
  int64_t n, k, groups, padded_groups, line_bytes;
  int bits, container, slabs;
  int entry;  // bytes of a scale
  bool has_zero;
};

// --- checkpoint layout -> device layout ---------------------------------------------------------

// A thread makes a word. `place_of_code` tells where a code lies; this walks the other way, from
// the word to its codes, with the same picture (device_layout.h); a test holds the two together.
__global__ void __launch_bounds__(kLayoutThreads)
    lay_out_codes(const __grid_constant__ Shape s, const uint8_t* packed, uint32_t* w,
                  int64_t words) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= words) return;
  const int pieces = s.container / 2;
  const int word = static_cast<int>(at % 4), lane = static_cast<int>(at / 4 % 32);
  const int64_t start = at / 128;
  const int piece = static_cast<int>(start % pieces);
  const int tile = static_cast<int>(start / pieces % 4);
  const int64_t slab = start / pieces / 4 % s.slabs, block = start / pieces / 4 / s.slabs;
  const int64_t row0 = block * kRowBlock + tile * kTileRows + lane / 4;
  const int step = s.container == 8 ? piece : s.container == 4 ? 2 * piece + word / 2 : word;
  const int64_t k0 = slab * kSlab + step * kStep + lane % 4 * 4;
  const int per_byte = 8 / s.container;
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) {
    for (int field = 0; field < per_byte; ++field) {
      const int high = s.container == 8 ? word / 2 : s.container == 4 ? field : field / 2;
      const int lower = s.container == 2 ? field % 2 : word % 2;
      const int64_t row = row0 + 8 * lower, k = k0 + i + 16 * high;
      if (row >= s.n || k >= s.k) continue;
      const uint8_t byte = packed[(row * s.k + k) / per_byte];
      const int u = byte >> (k % per_byte * s.container) & ((1 << s.container) - 1);
      value |= static_cast<uint32_t>(stored_code(s.bits, u)) << (8 * i + field * s.container);
    }
  }
  w[at] = value;
}

template <typename Entry>
__global__ void __launch_bounds__(kLayoutThreads)
    lay_out_tables(const __grid_constant__ Shape s, const Entry* scale, const Entry* zero,
                   Entry* lines, int64_t entries) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= entries) return;
  const int per_line = kRowBlock * (s.has_zero ? 2 : 1);
  const int in_line = static_cast<int>(at % per_line) % kRowBlock;
  const bool is_zero = at % per_line >= kRowBlock;
  const int64_t group = at / per_line % s.padded_groups, block = at / per_line / s.padded_groups;
  const int in_tile = in_line % kTileRows;
  const int64_t row =
      block * kRowBlock + in_line / kTileRows * kTileRows + in_tile / 2 + 8 * (in_tile % 2);
  Entry value = 0;
  if (row < s.n && group < s.groups) value = (is_zero ? zero : scale)[row * s.groups + group];
  lines[at] = value;
}

__global__ void __launch_bounds__(kLayoutThreads) clear(uint32_t* words, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) words[i] = 0;
}

// --- and back -----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kLayoutThreads)
    take_codes(const __grid_constant__ Shape s, const uint8_t* w, uint8_t* packed, int64_t bytes) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= bytes) return;
  const int per_byte = 8 / s.container;
  const int64_t row = at * per_byte / s.k, k0 = at * per_byte % s.k;
  int byte = 0;
  for (int i = 0; i < per_byte; ++i) {
    const CodePlace place = place_of_code(s.container, s.slabs, row, k0 + i);
    const int stored = w[place.byte] >> place.bit & ((1 << s.container) - 1);
    byte |= code_of_stored(s.bits, stored) << (i * s.container);
  }
  packed[at] = static_cast<uint8_t>(byte);
}

template <typename Entry>
__global__ void __launch_bounds__(kLayoutThreads)
    take_tables(const __grid_constant__ Shape s, const Entry* lines, Entry* scale, Entry* zero,
                int64_t entries) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= entries) return;
  const int64_t row = at / s.groups, group = at % s.groups;
  const int64_t line = row / kRowBlock * s.padded_groups + group;
  const Entry* const from = lines + line * kRowBlock * (s.has_zero ? 2 : 1) +
                            place_in_line(static_cast<int>(row % kRowBlock));
  scale[at] = from[0];
  if (s.has_zero) zero[at] = from[kRowBlock];
}

Shape shape_of(const DeviceLayout& layout) {
  return {layout.n,
          layout.k,
          layout.groups(),
          layout.padded_groups(),
          layout.line_bytes(),
          layout.bits,
          container_bits(layout.bits),
          static_cast<int>(layout.slabs()),
          static_cast<int>(float_bytes(layout.table)),
          layout.has_zero};
}

cuda::Launch threads(int64_t count, cudaStream_t stream) {
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>((count + kLayoutThreads - 1) / kLayoutThreads));
  how.block = dim3(kLayoutThreads);
  how.stream = stream;
  return how;
}

template <typename Entry>
void tables_out(const DeviceLayout& layout, const void* scale, const void* zero, uint8_t* lines,
                cudaStream_t stream) {
  const int64_t entries = layout.table_bytes() / static_cast<int64_t>(sizeof(Entry));
  cuda::launch<lay_out_tables<Entry>>("lowbit_prepack tables", threads(entries, stream),
                                      shape_of(layout), static_cast<const Entry*>(scale),
                                      static_cast<const Entry*>(zero),
                                      reinterpret_cast<Entry*>(lines), entries);
}

template <typename Entry>
void tables_back(const DeviceLayout& layout, const uint8_t* lines, void* scale, void* zero,
                 cudaStream_t stream) {
  const int64_t entries = layout.n * layout.groups();
  cuda::launch<take_tables<Entry>>("lowbit_unprepack tables", threads(entries, stream),
                                   shape_of(layout), reinterpret_cast<const Entry*>(lines),
                                   static_cast<Entry*>(scale), static_cast<Entry*>(zero), entries);
}

}  // namespace

void prepack(const DeviceLayout& layout, const uint8_t* packed, const void* scale, const void* zero,
             uint8_t* w, cudaStream_t stream) {
  const int64_t words = layout.code_bytes() / 4;
  cuda::launch<lay_out_codes>("lowbit_prepack codes", threads(words, stream), shape_of(layout),
                              packed, reinterpret_cast<uint32_t*>(w), words);
  uint8_t* const lines = w + layout.code_bytes();
  if (layout.table == Float::f32) {
    tables_out<uint32_t>(layout, scale, zero, lines, stream);
  } else {
    tables_out<uint16_t>(layout, scale, zero, lines, stream);
  }
  const int tail = static_cast<int>(layout.tail_bytes() / 4);
  cuda::launch<clear>("lowbit_prepack tail", threads(tail, stream),
                      reinterpret_cast<uint32_t*>(lines + layout.table_bytes()), tail);
}

void unprepack(const DeviceLayout& layout, const uint8_t* w, uint8_t* packed, void* scale,
               void* zero, cudaStream_t stream) {
  const int64_t bytes = layout.n * layout.k * container_bits(layout.bits) / 8;
  cuda::launch<take_codes>("lowbit_unprepack codes", threads(bytes, stream), shape_of(layout), w,
                           packed, bytes);
  const uint8_t* const lines = w + layout.code_bytes();
  if (layout.table == Float::f32) {
    tables_back<uint32_t>(layout, lines, scale, zero, stream);
  } else {
    tables_back<uint16_t>(layout, lines, scale, zero, stream);
  }
}

// --- plans --------------------------------------------------------------------------------------

Prefills& prefills() {
  static Prefills table;
  return table;
}

namespace {

int group_steps(const DeviceLayout& layout) {
  return layout.per_channel() ? 0 : static_cast<int>(layout.group / kStep);
}

int ceil_div(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

void check(const DeviceProblem& p) {
  const DeviceLayout& l = p.layout;
  SALTIRE_CHECK(l.per_channel() || l.group == 32 || l.group == 64 || l.group == 128,
                "lowbit_gemm: group = ", l.group,
                "; on a CUDA device expected 0 (per channel), 32, 64 or 128. Quantise with one of "
                "them, or run on the CPU.");
  // The largest operands of bytes: 128 of a weight, 2^(bits - 1) - 1 of a token.
  const int64_t most = ((int64_t{1} << 31) - 1) / (128 * max_activation_code(p.act_bits));
  SALTIRE_CHECK(!l.per_channel() || l.k <= most, "lowbit_gemm: K = ", l.k, " with ", p.act_bits,
                "-bit activations and one scale a channel; sums are exact only up to K = ", most,
                " on a CUDA device. Use groups, or split the inputs.");
}

DevicePlan plan_gemv(const DeviceProblem& p) {
  const DeviceLayout& l = p.layout;
  DevicePlan plan;
  plan.route = Route::gemv;
  plan.tokens = p.M <= 1 ? 1 : p.M == 2 ? 2 : 4;
  plan.rows = kTileRows;
  plan.blocks = ceil_div(l.n, kTileRows);
  // A warp has two slabs at least, so that half of the reads are under way while it computes.
  plan.threads = l.slabs() >= 16 ? kGemvThreads : kGemvThreads / 2;
  const int tables = gemv_table_bytes(group_steps(l), static_cast<int>(l.padded_groups()),
                                      l.table == Float::f16, l.has_zero);
  plan.shared_bytes = static_cast<size_t>(
      gemv_shared_bytes(plan.tokens, static_cast<int>(l.slabs()), tables, plan.threads / 32));
  return plan;
}

DevicePlan plan_mma(const DeviceProblem& p, const cuda::Device& device) {
  const DeviceLayout& l = p.layout;
  DevicePlan plan;
  plan.route = Route::mma;
  plan.threads = kMmaThreads;
  plan.rows = kRowBlock;
  plan.tokens = p.M <= 8 ? 8 : p.M <= 16 ? 16 : p.M <= 32 ? 32 : 64;
  const auto shared = [&](int tokens) {
    const MmaStage stage =
        mma_stage(container_bits(l.bits), tokens, group_steps(l), static_cast<int>(l.line_bytes()));
    return static_cast<size_t>(kMmaStages * stage.bytes() + tokens * kPartStride * 4);
  };
  while (plan.tokens > 8 && shared(plan.tokens) > static_cast<size_t>(device.shared_bytes)) {
    plan.tokens /= 2;
  }
  plan.shared_bytes = shared(plan.tokens);
  plan.token_blocks = ceil_div(p.M, plan.tokens);
  const int stages = ceil_div(l.slabs(), kUnitSlabs);
  const int64_t all_units = l.row_blocks() * stages;
  SALTIRE_CHECK(all_units * 2 * device.multiprocessors < (int64_t{1} << 31),
                "lowbit_gemm: N = ", l.n, " times K = ", l.k,
                " is too large for a CUDA device. Split the outputs.");
  const int units = static_cast<int>(all_units);
  const bool two = plan.tokens <= 32 && 2 * (plan.shared_bytes + 1024) <=
                                            static_cast<size_t>(device.shared_bytes) + 1024;
  // A worker fills its pipeline once at least, or does a whole block.
  const int most = std::max(1, units / std::min(stages, kMmaStages));
  const int slots = std::max(1, device.multiprocessors * (two ? 2 : 1) / plan.token_blocks);
  plan.blocks = std::min(most, slots);
  plan.fix_up = StreamK{units, stages, plan.blocks}.splits_any();
  if (plan.fix_up) {
    plan.workspace_bytes =
        int64_t{2} * plan.blocks * plan.token_blocks * plan.tokens * kRowBlock * 4;
  }
  return plan;
}

DevicePlan plan_sm80(const DeviceProblem& p) {
  const DeviceLayout& l = p.layout;
  DevicePlan plan;
  plan.route = Route::sm80;
  plan.rows = 128;
  plan.tokens = 128;
  plan.blocks = ceil_div(l.n, plan.rows);
  plan.token_blocks = ceil_div(p.M, plan.tokens);
  // A 4-bit instruction spans 64 inputs, two groups of 32.
  plan.four_bit_mma = l.bits <= 4 && p.act_bits <= 4 && (l.per_channel() || l.group >= 64);
  const MmaStage stage =
      sm80_stage(container_bits(l.bits), group_steps(l), static_cast<int>(l.line_bytes()));
  plan.shared_bytes = static_cast<size_t>(kSm80Stages * stage.bytes());
  return plan;
}

DevicePlan plan_sm90(const DeviceProblem& p, const cuda::Device& device) {
  const DeviceLayout& l = p.layout;
  DevicePlan plan;
  plan.route = Route::sm90;
  plan.tokens = 128;
  plan.token_blocks = ceil_div(p.M, plan.tokens);
  // The higher tile reads tokens half as often; it takes many tiles to be worth the uneven end.
  const bool high = int64_t{ceil_div(l.n, 256)} * plan.token_blocks >= 2 * device.multiprocessors;
  plan.rows = high && sm90_has_high_tiles(group_steps(l)) ? 256 : 128;
  plan.blocks = ceil_div(l.n, plan.rows);
  plan.threads = kSm90Threads;
  const MmaStage stage = sm90_stage(plan.rows, container_bits(l.bits), group_steps(l));
  plan.shared_bytes = static_cast<size_t>(kSm90Barriers + sm90_stages(stage) * stage.bytes());
  return plan;
}

bool fits(const DevicePlan& plan, const cuda::Device& device) {
  return plan.shared_bytes <= static_cast<size_t>(device.shared_bytes);
}

// Clocks of a multiprocessor, from multiply-adds a clock and the share of them that is reached.
double clocks_of_tiles(const DevicePlan& plan, const DeviceProblem& p, const cuda::Device& device,
                       double rate) {
  const int waves = ceil_div(int64_t{plan.blocks} * plan.token_blocks, device.multiprocessors);
  return static_cast<double>(waves) * plan.rows * plan.tokens * static_cast<double>(p.layout.k) /
         rate;
}

double clocks_of_stream(const DevicePlan& plan, const DeviceProblem& p,
                        const cuda::Device& device) {
  constexpr double kRate = 2048 * 0.5;
  return static_cast<double>(plan.token_blocks) * plan.tokens * static_cast<double>(p.layout.n) *
         static_cast<double>(p.layout.k) / device.multiprocessors / kRate;
}

}  // namespace

DevicePlan make_plan(const DeviceProblem& p, const cuda::Device& device, Route route) {
  check(p);
  SALTIRE_CHECK(route != Route::gemv || p.M <= 4, "lowbit_gemm: gemv takes up to 4 tokens, not ",
                p.M, ". Choose mma.");
  SALTIRE_CHECK(route != Route::sm80 || (device.sm >= 80 && device.sm < 90),
                "lowbit_gemm: sm80 runs on compute capability 8, not ", device.sm, ". Choose mma.");
  SALTIRE_CHECK(route != Route::sm90 || device.sm == 90,
                "lowbit_gemm: sm90 runs on compute capability 9.0, not ", device.sm,
                ". Choose mma.");
  const DevicePlan plan = route == Route::gemv   ? plan_gemv(p)
                          : route == Route::mma  ? plan_mma(p, device)
                          : route == Route::sm80 ? plan_sm80(p)
                                                 : plan_sm90(p, device);
  SALTIRE_CHECK(fits(plan, device), "lowbit_gemm: ", plan.text(), " takes more shared memory than ",
                device.shared_bytes, ". Choose mma, or split the inputs.");
  return plan;
}

DevicePlan make_plan(const DeviceProblem& p, const cuda::Device& device) {
  check(p);
  if (p.M <= 4) {
    const DevicePlan plan = plan_gemv(p);
    if (fits(plan, device)) return plan;
  }
  const DevicePlan stream = plan_mma(p, device);
  SALTIRE_CHECK(fits(stream, device), "lowbit_gemm: ", stream.text(), "; this device has ",
                device.shared_bytes, " bytes of shared memory. Run on the CPU.");
  if (p.M <= 64) return stream;
  if (device.sm == 90 && prefills().sm90 != nullptr) {
    const DevicePlan tiles = plan_sm90(p, device);
    constexpr double kRate = 4096 * 0.65;
    if (clocks_of_tiles(tiles, p, device, kRate) < clocks_of_stream(stream, p, device))
      return tiles;
  }
  if (device.sm >= 80 && device.sm < 90 && prefills().sm80 != nullptr) {
    const DevicePlan tiles = plan_sm80(p);
    const double rate = (tiles.four_bit_mma ? 4096 : 2048) * 0.6;
    if (fits(tiles, device) &&
        clocks_of_tiles(tiles, p, device, rate) < clocks_of_stream(stream, p, device)) {
      return tiles;
    }
  }
  return stream;
}

std::string DevicePlan::text() const {
  constexpr const char* kNames[] = {"gemv", "mma", "sm80", "sm90"};
  std::string out = std::string(kNames[static_cast<int>(route)]) + " rows=" + std::to_string(rows) +
                    " tokens=" + std::to_string(tokens) + " blocks=" + std::to_string(blocks) +
                    "x" + std::to_string(token_blocks) + " threads=" + std::to_string(threads) +
                    " shared=" + std::to_string(shared_bytes);
  if (route == Route::sm80) out += four_bit_mma ? " s4" : " s8";
  if (fix_up) out += " split workspace=" + std::to_string(workspace_bytes);
  return out;
}

void run(const DeviceProblem& p, const DevicePlan& plan, const cuda::Device& device,
         void* workspace, cudaStream_t stream) {
  if (p.M == 0) return;
  const DeviceLayout& l = p.layout;
  Task task = {};
  task.x = p.x;
  task.x_scale = p.x_scale;
  task.x_sum = p.x_sum;
  task.codes = p.w;
  task.tables = p.w + l.code_bytes();
  task.bias = p.bias;
  task.low_rank_x = p.low_rank_x;
  task.low_rank_w = p.low_rank_w;
  task.out = p.out;
  task.parts = static_cast<uint32_t*>(workspace);
  task.M = static_cast<int>(p.M);
  task.N = static_cast<int>(l.n);
  task.K = static_cast<int>(l.k);
  task.slabs = static_cast<int>(l.slabs());
  task.row_blocks = static_cast<int>(l.row_blocks());
  task.groups = static_cast<int>(l.groups());
  task.rank = static_cast<int>(p.rank);
  task.group_steps = group_steps(l);
  task.padded_groups = static_cast<int>(l.padded_groups());
  task.line_bytes = static_cast<int>(l.line_bytes());
  task.half_table = l.table == Float::f16;
  task.has_zero = l.has_zero;
  task.out_type = p.out_type;
  task.middle = symmetric_zero(l.bits);
  task.workers = plan.blocks;
  if (plan.route == Route::sm80 || plan.route == Route::sm90) {
    const Prefill prefill = plan.route == Route::sm80 ? prefills().sm80 : prefills().sm90;
    SALTIRE_CHECK(prefill != nullptr, "lowbit_gemm: this build has no kernels for ", plan.text(),
                  ". Build with the architecture of this device in SALTIRE_CUDA_ARCHS.");
    prefill(task, plan, device, stream);
    return;
  }
  cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.token_blocks));
  how.block = dim3(static_cast<unsigned>(plan.threads));
  how.shared_bytes = plan.shared_bytes;
  how.stream = stream;
  how.overlap_previous = device.sm >= 90;
  const int container = container_bits(l.bits);
  if (plan.route == Route::gemv) return run_gemv(task, plan, container, how);
  run_mma(task, plan, container, how);
}

}  // namespace saltire::lowbit_gemm
