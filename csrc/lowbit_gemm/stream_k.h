// How workers share the stream of units evenly, and which of them worked on a row block.
//
// A row block is `stages` units; unit u belongs to block u / stages. Worker w of `workers` does
// units [begin(w), begin(w + 1)): the end of one block, whole blocks, and the start of another. A
// block that one worker does alone is finished at once; of the others each worker leaves its part
// in one of its two slots: 2w for the block it begins with, 2w + 1 for the one it ends with.
#pragma once
#include <cstdint>

#include "core/both.h"

namespace saltire::lowbit_gemm {

// Products of units and workers must stay below 2^31: a device divides 64 bits by a call.
struct StreamK {
  int units;
  int stages;  // units of a row block
  int workers;

  SALTIRE_BOTH int begin(int worker) const { return units * worker / workers; }
  // The worker that does a unit: the greatest w with begin(w) <= unit.
  SALTIRE_BOTH int owner(int unit) const { return ((unit + 1) * workers - 1) / units; }
  SALTIRE_BOTH int first_worker(int block) const { return owner(block * stages); }
  SALTIRE_BOTH int last_worker(int block) const { return owner((block + 1) * stages - 1); }
  SALTIRE_BOTH bool is_split(int block) const { return first_worker(block) != last_worker(block); }
  // Where worker leaves its part of a split block.
  SALTIRE_BOTH int slot(int worker, int block) const {
    return 2 * worker + (begin(worker) >= block * stages ? 0 : 1);
  }
  bool splits_any() const { return units % workers != 0 || units / workers % stages != 0; }
};

}  // namespace saltire::lowbit_gemm
