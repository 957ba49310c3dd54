// What the kernels from hidden states share: the four products of the pass, who computes which of
// their tiles, and the launches that kernel.cu chooses from.
//
//   logits   z  = h·Wᵀ   [tokens x vocabulary]   ends in running sums (forward) or in dx (backward)
//   hidden   dh = dx·W   [tokens x D]            summed over the vocabulary, chunk by chunk
//   head     dW = dxᵀ·h  [vocabulary x D]        summed over all tokens at once
#pragma once
#include "core/both.h"
#include "core/cuda/launch.h"
#include "token_stats/device.h"

namespace saltire::token_stats {

enum class Role { stats, spread, hidden, head };

// What a block leaves of a token: sums over its range of the vocabulary (device_state.h).
struct TokenPart {
  float max, sum, weighted;
  int at;
  float label;
};

struct Place {
  int row_tile, split;
};

// Tiles of a product: a block owns a row tile and one of `splits` ranges of the column tiles.
// Blocks that run at one time share few row tiles, kBand, which stay in L2, and many ranges.
struct Tiling {
  static constexpr int kBand = 8;
  int rows = 0, columns = 0;  // in tiles
  int splits = 1;

  SALTIRE_BOTH int blocks() const { return rows * splits; }
  SALTIRE_BOTH int begin(int split) const {
    return columns / splits * split + (split < columns % splits ? split : columns % splits);
  }
  SALTIRE_BOTH Place place(int block) const {
    const int band = block / (kBand * splits), in_band = block - band * kBand * splits;
    const int height = rows - band * kBand < kBand ? rows - band * kBand : kBand;
    return {band * kBand + in_band % height, in_band / height};
  }
};

// The tiling that `slots` blocks at a time finish first.
Tiling make_tiling(int row_tiles, int column_tiles, int slots);

struct LinearTask {
  DeviceTokens tokens;
  int M, D, V;
  const void* hidden;
  const void* head;  // [V, D]
  Dtype hidden_dtype, head_dtype;
  const float* bias;
  Tiling tiling;
  TokenPart* parts;  // [splits][M]
  // Backward: `count` rows of the vocabulary from `first` on, padded to `padded`.
  DeviceGradients gradients;
  int first, count, padded;
  void* dx;  // [M, padded], bf16 or f32
  float* d_hidden;
  void* d_head;
  bool add_hidden;  // to what earlier chunks left
};

constexpr int kFloatsTile = 64;
constexpr int kFloatsThreads = 256;
constexpr int kMmaTile = 128;
constexpr int kMmaThreads = 256;
size_t mma_shared_bytes();

constexpr int kSm90Rows = 256, kSm90Columns = 256;  // of a cluster of two blocks
// Of a block: four stages of 64 inputs, and their barriers.
constexpr size_t sm90_shared_bytes() {
  return 4 * (kSm90Rows / 2 + kSm90Columns) * 64 * 2 + 64;
}

void run_floats(Role role, const LinearTask& task, cudaStream_t stream);
void run_mma(Role role, const LinearTask& task, cudaStream_t stream);

// The Hopper kernels enter themselves here when the library is loaded; null where they were not
// built.
using Products = void (*)(Role, const LinearTask&, cudaStream_t);
Products& sm90_products();

}  // namespace saltire::token_stats
