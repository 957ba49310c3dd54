// Threads that work together through many short phases inside one parallel region.
//
// Opening a parallel region costs several µs, as much as a small product; a decoder has some 200
// phases a token. So a region is opened once: its first thread leads, the others wait for phases.
// A phase is a range of items, claimed in chunks, so a helper that is late, or never comes,
// delays nothing but its own chunk, and no thread count has to be known.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace saltire {

class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}

  int64_t threads() const { return threads_; }

  // Leader only. Runs body(begin, end) over [0, count) in chunks of `chunk`; returns when all is
  // done, and throws what a body threw first.
  template <typename Body>
  void run(int64_t count, int64_t chunk, const Body& body) {
    if (count <= 0) return;
    chunk = std::max(chunk, (count + kMaxChunks - 1) / kMaxChunks);
    const int64_t chunks = (count + chunk - 1) / chunk;
    if (chunks == 1 || threads_ == 1) {
      body(0, count);
      return;
    }
    // Nobody reads the job now: the last phase's chunks are all claimed and done.
    call_ = [](const void* context, int64_t begin, int64_t end) {
      (*static_cast<const Body*>(context))(begin, end);
    };
    context_ = &body;
    count_ = count;
    chunk_ = chunk;
    done_.store(0, std::memory_order_relaxed);
    phase_ = (phase_ + 1) & kPhaseMask;
    ticket_.store(make_ticket(phase_, chunks), std::memory_order_release);
    claim();
    while (done_.load(std::memory_order_acquire) != chunks) pause();
    if (failed_.load(std::memory_order_acquire)) {
      failed_.store(false, std::memory_order_relaxed);
      std::exception_ptr error = error_;
      error_ = nullptr;
      std::rethrow_exception(error);
    }
  }

  // Leader only, last: lets the helpers go.
  void dismiss() { stopped_.store(true, std::memory_order_release); }

  // Every other thread of the region.
  void help() {
    uint64_t seen = ticket_phase(ticket_.load(std::memory_order_relaxed));
    // A phase that began before this helper came may still have chunks.
    claim();
    for (int64_t waited = 0; !stopped_.load(std::memory_order_acquire); ++waited) {
      const uint64_t phase = ticket_phase(ticket_.load(std::memory_order_acquire));
      if (phase != seen) {
        seen = phase;
        waited = 0;
        claim();
      } else if (waited < kSpins) {
        pause();
      } else {
        std::this_thread::yield();  // the machine is shared: do not burn what another could use
      }
    }
  }

 private:
  // A ticket is one word, so that a claim tells at once which phase it is of and whether it is
  // good: phase (24 bits) | chunks of the phase (20) | next unclaimed chunk (20).
  static constexpr int64_t kMaxChunks = 4096;
  static constexpr uint64_t kPhaseMask = (1u << 24) - 1;
  static constexpr uint64_t kFieldMask = (1u << 20) - 1;
  static constexpr int64_t kSpins = 4000;  // about 40 µs

  static uint64_t make_ticket(uint64_t phase, int64_t chunks) {
    return phase << 40 | static_cast<uint64_t>(chunks) << 20;
  }
  static uint64_t ticket_phase(uint64_t ticket) { return ticket >> 40; }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  // A good claim pins the job: the phase cannot end before the claimed chunk is done.
  void claim() {
    for (;;) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      do {
        if ((ticket & kFieldMask) >= (ticket >> 20 & kFieldMask)) return;
      } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
      const int64_t begin = static_cast<int64_t>(ticket & kFieldMask) * chunk_;
      try {
        call_(context_, begin, std::min(begin + chunk_, count_));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex_);
        if (error_ == nullptr) error_ = std::current_exception();
        failed_.store(true, std::memory_order_release);
      }
      done_.fetch_add(1, std::memory_order_acq_rel);
    }
  }

  const int64_t threads_;
  uint64_t phase_ = 0;
  void (*call_)(const void*, int64_t, int64_t) = nullptr;
  const void* context_ = nullptr;
  int64_t count_ = 0;
  int64_t chunk_ = 1;
  std::mutex error_mutex_;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  // Each on its own cache line: helpers spin on the ticket while others count chunks.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> stopped_{false};
};

}  // namespace saltire
