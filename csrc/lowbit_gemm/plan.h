// How a product is split over threads: problem -> plan, a small struct that tests can print.
#pragma once
#include <algorithm>
#include <cstdint>

namespace saltire::lowbit_gemm {

// A grid of `across` ranges of weight blocks times `down` ranges of row tiles, one for each thread.
struct Plan {
  int64_t across = 1;
  int64_t down = 1;

  int64_t parts() const { return across * down; }
};

// A thread is woken for at least this many multiply-adds: about 5 µs of work, twice what waking it
// costs.
constexpr int64_t kWorkPerThread = int64_t{1} << 17;

// The split with the smallest largest share; of equals the one with most ranges of blocks, because
// threads that share blocks read the same weights twice.
inline Plan make_plan(int64_t blocks, int64_t tiles, int64_t work, int64_t threads) {
  threads = std::max<int64_t>(1, std::min(threads, work / kWorkPerThread));
  Plan best;
  int64_t least = blocks * tiles;
  for (int64_t across = 1; across <= std::min(threads, blocks); ++across) {
    const int64_t down = std::min(threads / across, tiles);
    const int64_t share = ((blocks + across - 1) / across) * ((tiles + down - 1) / down);
    if (share <= least) {
      least = share;
      best = {across, down};
    }
  }
  return best;
}

// The begin of range `part` of `parts` nearly equal ranges of [0, count).
inline int64_t range_begin(int64_t count, int64_t parts, int64_t part) {
  return count / parts * part + std::min(part, count % parts);
}

}  // namespace saltire::lowbit_gemm
