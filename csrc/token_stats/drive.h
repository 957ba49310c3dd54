// Who works on what: the vocabulary is split over threads, tokens into chunks that bound the
// workspace.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "token_stats/op.h"

namespace saltire::token_stats {

struct Plan {
  int64_t tile;   // rows of the head in a tile
  int64_t tiles;  // in the whole head
  int64_t parts;  // ranges of tiles, one a thread
  int64_t group;  // tokens whose dx are held at once
  int64_t chunk;  // tokens whose packed states and gradients are held at once

  int64_t first_tile(int64_t part) const { return tiles * part / parts; }
};

constexpr int64_t kTileBytes = 512 << 10;  // half of a common L2
// Each group reads and writes its tile of dW once, from L3, and column by column at that; 256
// tokens of products hide it. Their dx for a tile of 96 rows is 98 KB.
constexpr int64_t kGroupTokens = 256;
constexpr int64_t kChunkBytes = 24 << 20;  // all threads' partial dh together

inline Plan make_plan(int64_t M, int64_t D, int64_t V, int64_t threads, const Kernels& k) {
  Plan plan;
  const int64_t rows = kTileBytes / (4 * std::max<int64_t>(D, 1)) / k.rows * k.rows;
  plan.tile = std::clamp(rows, 4 * k.rows, 16 * k.rows);
  plan.tiles = (V + plan.tile - 1) / plan.tile;
  plan.parts = std::max<int64_t>(1, std::min(threads, plan.tiles));
  plan.group = std::max<int64_t>(1, kGroupTokens / k.strip) * k.strip;
  const int64_t fits = kChunkBytes / (4 * std::max<int64_t>(D, 1) * plan.parts);
  plan.chunk = std::max<int64_t>(1, fits / plan.group) * plan.group;
  plan.chunk = std::min(plan.chunk, round_up(std::max<int64_t>(M, 1), plan.group));
  return plan;
}

struct FreeFloats {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, FreeFloats>;

inline Floats new_floats(int64_t count) {
  const auto bytes = static_cast<size_t>(round_up(std::max<int64_t>(count, 1) * 4, 64));
  Floats block(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (block == nullptr) throw std::bad_alloc();
  return block;
}

}  // namespace saltire::token_stats
