// Attention of a prompt over a bf16 cache, on the tensor cores: a block takes 64 queries of one
// head of keys, a warp 16 of them, and walks the slots in tiles of 64 that cp.async brings.
// Transposed keys and plain values are both operands that ldmatrix turns as mma takes them. Scores,
// shares' sums and results are f32; queries and shares are rounded to bf16 for the products.
#include "core/cuda/launch.h"
#include "decoder_layer/device.h"
#include "decoder_layer/device_query.h"

namespace saltire::decoder_layer {
namespace {

using namespace saltire::cuda;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 64;  // slots, and queries
constexpr int kStages = 2;
constexpr int kPiece = 16;  // bytes of a copy
constexpr int kSlots = static_cast<int>(kSlotBlock);
constexpr float kLog2E = 1.44269504f;

struct Task {
  const float* queries;
  RowView rows;
  const uint8_t* data;
  void* out;
  int64_t slots;
  int sequences;
  bool out_bf16;
};

// Keys of a tile: [4 blocks][head_dim][16 slots], 2 pieces a row. The half of a row that lies first
// changes every 4 rows, and values' pieces are turned by their slot, so that the 8 rows of a matrix
// lie in different banks.
SALTIRE_DEVICE int key_piece(int row, int half) {
  return 2 * row + (half ^ (row >> 2 & 1));
}
template <int D>
SALTIRE_DEVICE int value_piece(int slot, int piece) {
  constexpr int kPieces = D / 8;
  return slot * kPieces + (kPieces % 8 == 0 ? piece ^ (slot & 7) : piece);
}

// Asks for the keys and values of the 64 slots from `slot`; zeros beyond the cache.
template <int D>
SALTIRE_DEVICE void ask(const Task& task, const uint8_t* keys, const uint8_t* values, int slot,
                        unsigned char* stage) {
  constexpr int kPieces = kTile * D * 2 / kPiece;  // of the keys, and of the values
  unsigned char* const to_values = stage + kPieces * kPiece;
  const int64_t from = int64_t{slot} * D * 2;
  const auto there = static_cast<int>(task.slots - slot);  // slots of the tile that exist
#pragma unroll 4
  for (int p = static_cast<int>(threadIdx.x); p < kPieces; p += kThreads) {
    const int row = p / 2, half = p % 2;  // row: of all blocks' dimensions
    const bool key = row / D * kSlots < there, value = p / (D / 8) < there;
    copy_async_16(stage + key_piece(row, half) * kPiece, keys + from + p * kPiece, key);
    copy_async_16(to_values + value_piece<D>(p / (D / 8), p % (D / 8)) * kPiece,
                  values + from + p * kPiece, value);
  }
  commit_copies();
}

// The lane's two queries of its warp's 16: lane = 4·g + t has rows g and g + 8.
template <int D>
struct Rows {
  Query query[2];
  uint32_t q[D / 16][4];
  float most[2], sum[2];
  float acc[D / 8][4];
};

template <int D>
SALTIRE_DEVICE void load_queries(const Task& task, int t, Rows<D>& rows) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Query& query = rows.query[i % 2];
      const int dim = 16 * k + 8 * (i / 2) + 2 * t;
      float2 x = make_float2(0.0f, 0.0f);
      if (query.row >= 0) {
        x = *reinterpret_cast<const float2*>(task.queries + int64_t{query.place} * D + dim);
      }
      rows.q[k][i] = pack_bf16(x.x * kLog2E, x.y * kLog2E);
    }
  }
}

// Scores of the tile: d[n] are slots 8n + 2t, 8n + 2t + 1 of rows g and g + 8.
template <int D>
SALTIRE_DEVICE void score(const Rows<D>& rows, const unsigned char* stage, int lane,
                          float (&scores)[kTile / 8][4]) {
#pragma unroll
  for (int block = 0; block < kTile / kSlots; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[2 * block][i] = scores[2 * block + 1][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      // Matrices: dimensions 0..7 and 8..15 of slots 0..7, then of slots 8..15.
      const int row = block * D + 16 * k + lane % 16;
      uint32_t b[4];
      load_matrices_transposed(b, stage + key_piece(row, lane / 16) * kPiece);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_bf16(scores[2 * block], rows.q[k], low);
      mma_bf16(scores[2 * block + 1], rows.q[k], high);
    }
  }
}

template <int D>
SALTIRE_DEVICE void fold(Rows<D>& rows, float (&scores)[kTile / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = rows.most[r];
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) most = scores[n][i] > most ? scores[n][i] : most;
    }
    for (int mask = 1; mask <= 2; mask *= 2) {
      const float other = shuffle_xor(most, mask);
      most = other > most ? other : most;
    }
    // Nothing seen yet: any finite reference gives shares of 0.
    const float reference = most == -INFINITY ? 0.0f : most;
    const float factor = exp2_fast(rows.most[r] - reference);
    rows.most[r] = most;
    rows.sum[r] *= factor;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      rows.acc[n][2 * r] *= factor;
      rows.acc[n][2 * r + 1] *= factor;
    }
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        scores[n][i] = exp2_fast(scores[n][i] - reference);
        rows.sum[r] += scores[n][i];
      }
    }
  }
}

template <int D>
SALTIRE_DEVICE void add_values(Rows<D>& rows, const unsigned char* values, int lane,
                               const float (&shares)[kTile / 8][4]) {
#pragma unroll
  for (int block = 0; block < kTile / kSlots; ++block) {
    const float (&low)[4] = shares[2 * block];
    const float (&high)[4] = shares[2 * block + 1];
    const uint32_t a[4] = {pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]),
                           pack_bf16(high[0], high[1]), pack_bf16(high[2], high[3])};
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      // Matrices: slots 0..7 and 8..15 of dimensions 0..7, then of dimensions 8..15.
      const int slot = block * kSlots + lane % 16;
      uint32_t b[4];
      load_matrices_transposed(b, values + value_piece<D>(slot, 2 * n + lane / 16) * kPiece);
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
      mma_bf16(rows.acc[2 * n], a, first);
      mma_bf16(rows.acc[2 * n + 1], a, second);
    }
  }
}

template <int D>
SALTIRE_DEVICE void store(const Task& task, int t, Rows<D>& rows) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r];
    for (int mask = 1; mask <= 2; mask *= 2) sum += shuffle_xor(sum, mask);
    if (rows.query[r].row < 0) continue;
    const float root = sum > 0.0f ? rsqrt_fast(sum) : 0.0f;
    const float inverse = root * root;  // a division would be a call
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int64_t to = int64_t{rows.query[r].place} * D + 8 * n + 2 * t;
      const float x = rows.acc[n][2 * r] * inverse, y = rows.acc[n][2 * r + 1] * inverse;
      if (task.out_bf16) {
        *reinterpret_cast<uint32_t*>(static_cast<bf16*>(task.out) + to) = pack_bf16(x, y);
      } else {
        *reinterpret_cast<float2*>(static_cast<float*>(task.out) + to) = make_float2(x, y);
      }
    }
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 2) attend_prompt(const __grid_constant__ Task task) {
  constexpr int kStageBytes = 2 * kTile * D * 2;
  unsigned char* const shared = shared_memory();
  auto* const bounds = reinterpret_cast<int*>(shared + kStages * kStageBytes);  // [kWarps, 2]
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4, head = static_cast<int>(blockIdx.y);
  // The last rows see most, so they start first.
  const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Rows<D> rows = {};
  int begin = static_cast<int>(task.slots), end = 0;  // what some query of the warp sees
  int all_begin = 0, all_end = begin;                 // what all of them see without a mask
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int flat = tile * kTile + warp * 16 + g + 8 * r;
    rows.query[r] = query_of_prompt(task.rows, head, flat);
    rows.most[r] = -INFINITY;
    const Query& q = rows.query[r];
    if (q.row < 0) continue;
    begin = q.start < begin ? q.start : begin;
    end = q.end > end ? q.end : end;
    all_begin = q.start > all_begin ? q.start : all_begin;
    all_end = q.prefix < all_end ? q.prefix : all_end;
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const int b = shuffle_xor(begin, mask), e = shuffle_xor(end, mask);
    const int ab = shuffle_xor(all_begin, mask), ae = shuffle_xor(all_end, mask);
    begin = b < begin ? b : begin;
    end = e > end ? e : end;
    all_begin = ab > all_begin ? ab : all_begin;
    all_end = ae < all_end ? ae : all_end;
  }
  if (lane == 0) {
    bounds[2 * warp] = begin;
    bounds[2 * warp + 1] = end;
  }
  sync_block();
  int first = bounds[0], last = bounds[1];  // of the block
  for (int w = 1; w < kWarps; ++w) {
    first = bounds[2 * w] < first ? bounds[2 * w] : first;
    last = bounds[2 * w + 1] > last ? bounds[2 * w + 1] : last;
  }
  first = first / kTile * kTile;
  const int64_t place = task.rows.rows[kSequence] * task.rows.kv_heads + head;
  const int64_t bytes = task.slots * D * 2;
  const uint8_t* const keys = task.data + place * bytes;
  const uint8_t* const values = keys + int64_t{task.sequences} * task.rows.kv_heads * bytes;
  load_queries(task, t, rows);
  if (first < last) ask<D>(task, keys, values, first, shared);
  int stage = 0;
  for (int slot = first; slot < last; slot += kTile, stage ^= 1) {
    unsigned char* const here = shared + stage * kStageBytes;
    if (slot + kTile < last) {
      ask<D>(task, keys, values, slot + kTile, shared + (stage ^ 1) * kStageBytes);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    sync_block();
    if (slot < end && slot + kTile > begin) {
      float scores[kTile / 8][4];
      score(rows, here, lane, scores);
      if (slot < all_begin || slot + kTile > all_end) {
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!sees(rows.query[i / 2], slot + 8 * n + 2 * t + i % 2)) scores[n][i] = -INFINITY;
          }
        }
      }
      fold(rows, scores);
      add_values(rows, here + kStageBytes / 2, lane, scores);
    }
    sync_block();  // before the stage is written again
  }
  store(task, t, rows);
}

template <int D>
void launch_for(const Task& task, Launch how) {
  how.shared_bytes = kStages * 2 * kTile * D * 2 + kWarps * 2 * sizeof(int);
  launch<attend_prompt<D>>("attend_prompt", how, task);
}

}  // namespace

bool run_prompt(const AttendProblem& p, const Device& device, cudaStream_t stream) {
  const int64_t d = p.cache.head_dim;
  if (!p.prompt || p.cache.format != Format::bf16 || (d != 64 && d != 128)) return false;
  Task task = {};
  task.queries = p.queries;
  task.rows = view_of(p);
  task.data = p.cache.data;
  task.out = p.out;
  task.slots = p.cache.slots;
  task.sequences = static_cast<int>(p.cache.sequences);
  task.out_bf16 = p.out_dtype == Number::bf16;
  const int64_t queries = p.M * (p.heads / p.cache.kv_heads);
  Launch how;
  how.grid = dim3(static_cast<unsigned>((queries + kTile - 1) / kTile),
                  static_cast<unsigned>(p.cache.kv_heads));
  how.block = dim3(kThreads);
  how.stream = stream;
  how.overlap_previous = device.sm >= 90;
  if (d == 64) {
    launch_for<64>(task, how);
  } else {
    launch_for<128>(task, how);
  }
  return true;
}

}  // namespace saltire::decoder_layer
