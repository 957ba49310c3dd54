// Threads are torch's: its count, its pool. Kernels stay torch-free and take a range of work;
// op.cpp splits the work here.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "core/cpu/team.h"

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

// Runs lead(team) on this thread while torch's other threads help it.
template <typename Lead>
void lead_team(const Lead& lead) {
  const int64_t threads = thread_count();
  Team team(threads);
  parallel_for(threads, 1, [&](int64_t begin, int64_t) {
    if (begin != 0) {
      team.help();
      return;
    }
    struct Dismiss {
      Team& team;
      ~Dismiss() { team.dismiss(); }
    } dismiss{team};
    lead(team);
  });
}

}  // namespace saltire
