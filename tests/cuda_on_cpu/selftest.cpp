// The emulator against plain loops, and against kernels with one bug each that it must find.
#include "case.h"
#include "core/cuda/launch.h"
#include "core/cuda/sm90.h"

using namespace saltire::cuda;

namespace {

// --- correct kernels ----------------------------------------------------------------------------

// D [16, 8] = A [16, K] · Bᵀ [8, K], operands packed along K as the instruction takes them.
template <int bits>
__global__ void multiply(const uint32_t* a, const uint32_t* b, int32_t* d, int words) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  int32_t sum[4] = {};
  for (int w = 0; w < words; w += 8) {
    const uint32_t fa[4] = {a[g * words + w + t], a[(g + 8) * words + w + t],
                            a[g * words + w + 4 + t], a[(g + 8) * words + w + 4 + t]};
    const uint32_t fb[2] = {b[g * words + w + t], b[g * words + w + 4 + t]};
    if constexpr (bits == 8) {
      mma_s8(sum, fa, fb);
    } else {
      mma_s4(sum, fa, fb);
    }
  }
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

template <bool brain>
__global__ void multiply_floats(const uint32_t* a, const uint32_t* b, float* d, int words) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  float sum[4] = {};
  for (int w = 0; w < words; w += 8) {
    const uint32_t fa[4] = {a[g * words + w + t], a[(g + 8) * words + w + t],
                            a[g * words + w + 4 + t], a[(g + 8) * words + w + 4 + t]};
    const uint32_t fb[2] = {b[g * words + w + t], b[g * words + w + 4 + t]};
    if constexpr (brain) {
      mma_bf16(sum, fa, fb);
    } else {
      mma_f16(sum, fa, fb);
    }
  }
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

// Copies a 32 x 16-byte tile through shared memory and ldmatrix: out[matrix][row][4 words].
__global__ void matrices(const uint4* in, uint32_t* out, int transposed) {
  auto* tile = reinterpret_cast<uint4*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x);
  copy_async_16(tile + lane, in + lane, true);
  commit_copies();
  wait_copies<0>();
  sync_warp();
  uint32_t r[4];
  if (transposed != 0) {
    load_matrices_transposed(r, tile + lane);
  } else {
    load_matrices(r, tile + lane);
  }
  for (int i = 0; i < 4; ++i) out[i * 32 + lane] = r[i];
}

// Block-wide and warp-wide sums; the last block adds up what all blocks left.
__global__ void sum_all(const float* x, float* partial, int* counter, float* total) {
  auto* warps = reinterpret_cast<float*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  if (i % 32 == 0) warps[i / 32] = v;
  sync_block();
  auto* last = reinterpret_cast<int*>(warps + 8);
  if (i == 0) {
    float sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += warps[w];
    partial[blockIdx.x] = sum;
    *last = add_and_see(counter, 1) == static_cast<int>(gridDim.x) - 1;
  }
  sync_block();
  if (*last != 0 && i == 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *total = sum;
  }
}

// Each block of a pair reads 64 rows of 128 bytes for both; out[block] gets all 128, swizzled.
// hurry: block 0 ends without waiting for what block 1 writes to it.
__global__ void share(const __grid_constant__ TensorMap map, uint4* out, int hurry) {
  unsigned char* const shared = shared_memory();
  auto* const full = reinterpret_cast<Barrier*>(shared + 128 * 128);
  const int i = static_cast<int>(threadIdx.x), rank = static_cast<int>(blockIdx.x) % 2;
  if (i == 0) {
    make_barrier(full, 1);
    fence_barriers();
  }
  sync_cluster();
  if (hurry != 0 && rank == 0) return;
  for (int n = 0; n < 20 * hurry; ++n) sync_block();
  if (i == 0) {
    arrive_and_expect(full, 128 * 128);
    copy_box_to_both(shared + rank * 64 * 128, &map, rank * 64, 0, full);
  }
  wait_for(full, 0);
  for (int n = i; n < 128 * 8; n += 32) {
    out[blockIdx.x * 128 * 8 + n] = reinterpret_cast<const uint4*>(shared)[n];
  }
  sync_cluster();
}

// --- kernels with a bug -------------------------------------------------------------------------

enum Bug {
  kNone,
  kReadBeyond,
  kWriteBefore,
  kReadUnwritten,
  kRaceInBlock,
  kRaceInWarp,
  kRaceOfBlocks,
  kNoWait,
  kNoBarrierAfterWait,
  kDiverge,
  kHalfAWarpAside,
  kDeadlock,
  kPartialBarrier,
  kUnwrittenOutput,
  kMisaligned,
  kUnwaitedCopy,
  kTooManyShared,
};

__global__ void buggy(const uint32_t* in, uint32_t* out, int count, int bug) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  const int at = static_cast<int>(blockIdx.x) * n + i;
  shared[i] = in[at + (bug == kReadBeyond && at == count - 1 ? 1 : 0)];
  if (bug == kDeadlock && i >= 32) return;
  if (bug == kRaceInBlock) {
    sync_warp();
  } else if (bug != kRaceInWarp) {
    sync_block();
  }
  if (bug == kDiverge) {
    if (i % 32 < 16) {
      shuffle(i, 0);
    } else {
      vote(true);
    }
  }
  if (bug == kHalfAWarpAside && i % 32 < 16) shuffle(i, 0);
  if (bug == kPartialBarrier && i % 32 < 16) sync_some(1, n / 2);
  const int from = bug == kRaceInWarp ? i / 32 * 32 + (i + 1) % 32 : (i + 32) % n;
  uint32_t v = shared[from];
  if (bug == kReadUnwritten) v += shared[n];
  if (bug == kNoWait || bug == kNoBarrierAfterWait || bug == kUnwaitedCopy) {
    sync_block();
    if (i % 4 == 0) copy_async_16(shared + i, in + at, true);
    commit_copies();
    if (bug == kNoBarrierAfterWait) wait_copies<0>();
    if (bug == kNoWait && i % 4 == 0) v = shared[i];
    if (bug == kNoBarrierAfterWait) v = shared[from];
  }
  if (bug == kMisaligned) v = reinterpret_cast<const uint2*>(in + 1)->x;
  if (bug == kUnwrittenOutput && at == 3) return;
  const int to = bug == kRaceOfBlocks ? i : bug == kWriteBefore && at == 0 ? -1 : at;
  out[to] = v;
}

void body(emulator::Case& c) {
  const std::string what = c.word("what");
  if (what == "mma") {
    const auto* a = c.pointer<uint32_t>("a");
    const auto* b = c.pointer<uint32_t>("b");
    const int words = static_cast<int>(c.integer("words"));
    const std::string type = c.word("type");
    if (type == "s8") launch<multiply<8>>("s8", {1, 32}, a, b, c.pointer<int32_t>("d"), words);
    if (type == "s4") launch<multiply<4>>("s4", {1, 32}, a, b, c.pointer<int32_t>("d"), words);
    if (type == "bf16") {
      launch<multiply_floats<true>>("bf16", {1, 32}, a, b, c.pointer<float>("d"), words);
    }
    if (type == "f16") {
      launch<multiply_floats<false>>("f16", {1, 32}, a, b, c.pointer<float>("d"), words);
    }
  } else if (what == "matrices") {
    launch<matrices>("matrices", {1, 32, 512}, c.pointer<const uint4>("in"),
                     c.pointer<uint32_t>("out"), static_cast<int>(c.integer("transposed")));
  } else if (what == "sum") {
    const auto blocks = static_cast<unsigned>(c.integer("blocks"));
    launch<sum_all>("sum", {blocks, 256, 64}, c.pointer<const float>("x"),
                    c.pointer<float>("partial"), c.pointer<int>("counter"),
                    c.pointer<float>("total"));
  } else if (what == "share") {
    saltire::cuda::Launch how = {2, 32, 128 * 128 + 64};
    how.cluster = 2;
    launch<share>("share", how, map_bytes(c.pointer<void>("rows"), 128, 128, 64),
                  c.pointer<uint4>("out"), static_cast<int>(c.integer("hurry")));
  } else if (what == "host") {
    c.pointer<uint32_t>("out")[0] = 1;
  } else {
    const int bug = static_cast<int>(c.integer("bug"));
    const int count = static_cast<int>(c.integer("count"));
    const size_t shared = bug == kTooManyShared ? 300 * 1024 : 64 * 4 + 64;
    launch<buggy>("buggy", {dim3(static_cast<unsigned>(count / 64)), 64, shared},
                  c.pointer<const uint32_t>("in"), c.pointer<uint32_t>("out"), count, bug);
  }
}

}  // namespace

int main() {
  return emulator::run_case(body);
}
