// Memory that a kernel works in: one aligned block per thread, kept between calls.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace saltire {

// At least `count` floats, aligned to 64 bytes. Valid until the same thread asks again.
inline float* thread_scratch(size_t count) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> block;
  thread_local size_t size = 0;
  if (size < count) {
    const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
    block.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (block == nullptr) throw std::bad_alloc();
    size = bytes / sizeof(float);
  }
  return block.get();
}

}  // namespace saltire
