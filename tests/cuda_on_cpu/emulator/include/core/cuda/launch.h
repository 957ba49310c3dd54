// The emulator's launch: see csrc/core/cuda/launch.h.
#pragma once
#include <cuda_runtime.h>

#include "core/check.h"

namespace saltire::cuda {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool overlap_previous = false;
  unsigned cluster = 1;
};

inline unsigned char* shared_memory() {
  return emulator::shared_memory();
}

template <auto kernel, typename... Arguments>
void launch(const char* name, const Launch& how, const Arguments&... arguments) {
  emulator::run_grid(name, how.grid, how.block, how.cluster, how.shared_bytes,
                     [&] { kernel(arguments...); });
}

}  // namespace saltire::cuda
