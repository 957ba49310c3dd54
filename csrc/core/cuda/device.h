// What a plan needs to know of a device; plain numbers, so that plans are tested without one.
#pragma once
#include <cstdint>

namespace saltire::cuda {

struct Device {
  int sm = 0;               // compute capability: 80, 86, 89, 90
  int multiprocessors = 0;  // SMs
  int shared_bytes = 0;     // the most a block may have, opted in
  int64_t l2_bytes = 0;     // for benches, which rotate inputs past it
};

// Facts of a device, read once. Throws std::runtime_error with CUDA's message.
Device device_facts(int ordinal);

}  // namespace saltire::cuda
