// Threads are torch's: its count, its pool. Kernels stay torch-free and take a range of work;
// op.cpp splits the work here.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace saltire {

// Runs body(begin, end) over [0, count) on torch's threads, at least `grain` items a thread.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, grain, body);
}

inline int64_t thread_count() {
  return static_cast<int64_t>(torch::stable::get_num_threads());
}

}  // namespace saltire
