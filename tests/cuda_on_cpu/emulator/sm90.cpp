// sm_90a: barriers that count bytes, the copy engine, warpgroup products. A product is done when it
// is waited for, from the registers as they are then: results that are read earlier, and operands
// that are overwritten earlier, come out wrong.
#include "core/cuda/sm90.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace emulator {
namespace {

struct State {
  int arrivals = 0;
  int missing = 0;  // arrivals
  int bytes = 0;    // still to come
  int phase = 0;
  std::vector<Thread*> waiting;
};

State& state_of(uint64_t* barrier) {
  static std::map<uint64_t*, State> states;
  return states[barrier];
}

void end_phase_if_complete(State& s) {
  if (s.missing > 0 || s.bytes > 0) return;
  ++s.phase;
  s.missing = s.arrivals;
  for (Thread* t : s.waiting) wake(t);
  s.waiting.clear();
}

void start_copy(void* to, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    stop("the copy engine writes at an address that is not a multiple of 16");
  }
  writes(to, bytes);
  std::memset(to, 0xff, bytes);
  mark_pending(to, bytes, true);
}

void finish_copy(void* to, const std::vector<unsigned char>& data, uint64_t* barrier) {
  std::memcpy(to, data.data(), data.size());
  written_by_unit(to, data.size());
  State& s = state_of(barrier);
  s.bytes -= static_cast<int>(data.size());
  end_phase_if_complete(s);
}

}  // namespace

void make_barrier(uint64_t* barrier, int arrivals) {
  writes(barrier, sizeof(*barrier));
  State& s = state_of(barrier);
  s = State{};
  s.arrivals = s.missing = arrivals;
}

void arrive(uint64_t* barrier, int bytes) {
  reads(barrier, sizeof(*barrier));
  State& s = state_of(barrier);
  if (s.missing == 0) stop("more arrivals at a barrier than it was made for");
  release(barrier);
  s.bytes += bytes;
  --s.missing;
  end_phase_if_complete(s);
}

void wait_for(uint64_t* barrier, int parity) {
  reads(barrier, sizeof(*barrier));
  State& s = state_of(barrier);
  while (s.phase % 2 == parity) {
    s.waiting.push_back(current);
    sleep("a phase of the barrier at byte " +
          std::to_string(saltire::cuda::shared_address(barrier)));
  }
  acquire(barrier);
}

void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    stop("the copy engine copies multiples of 16 bytes from multiples of 16");
  }
  reads(from, static_cast<size_t>(bytes));
  start_copy(to, static_cast<size_t>(bytes));
  const auto* data = static_cast<const unsigned char*>(from);
  later([=] { finish_copy(to, std::vector<unsigned char>(data, data + bytes), barrier); });
}

void copy_box(void* to, const saltire::cuda::TensorMap& map, int row, int column,
              uint64_t* barrier) {
  if (saltire::cuda::shared_address(to) % 1024 != 0)
    stop("a swizzled box starts off a multiple of 1,024");
  if (reinterpret_cast<uintptr_t>(map.base) % 16 != 0 || map.columns % 16 != 0) {
    stop("a tensor map needs a base and rows that are multiples of 16 bytes");
  }
  std::vector<unsigned char> data(static_cast<size_t>(map.box_rows) * 128, 0);
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < 8; ++c) {
      const int64_t at = column + c * 16;
      if (row + r >= map.rows || at >= map.columns) continue;
      const unsigned char* const from = map.base + (row + r) * map.columns + at;
      reads(from, 16);
      std::memcpy(data.data() + r * 128 + (c ^ (r & 7)) * 16, from, 16);
    }
  }
  start_copy(to, data.size());
  later([=] { finish_copy(to, data, barrier); });
}

void begin_products() {
  current->registers_ready = true;
}

void multiply_128(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
  if (!current->registers_ready) stop("a product before begin_products");
  current->open_products.push_back({d, a, b, add});
}

void commit_products() {
  current->products.push_back(std::move(current->open_products));
  current->open_products.clear();
  current->registers_ready = false;
}

namespace {

// The products of one warp at a place in its queue: 16 rows x 128 columns x 32 inputs each.
void multiply(void** records) {
  const auto queue = [&](int l) -> std::vector<Product>& {
    return *static_cast<std::vector<Product>*>(records[l]);
  };
  for (size_t i = 0; i < queue(0).size(); ++i) {
    const uint64_t operand = queue(0)[i].b;
    if ((operand >> 62) != 1 || (operand >> 32 & 0x3fff) != 64) stop("a malformed operand B");
    const auto start = static_cast<uint32_t>(operand & 0x3fff) << 4;
    int8_t a[16][32], b[128][32];
    for (int n = 0; n < 128; ++n) {
      for (int c = 0; c < 2; ++c) {
        // The swizzle is of addresses: bits 4..6 are xored with bits 7..9.
        const uint32_t plain = start + static_cast<uint32_t>(n * 128 + c * 16);
        const unsigned char* const from = shared_memory() + (plain ^ (plain >> 7 & 7) << 4);
        reads(from, 16);
        std::memcpy(b[n] + 16 * c, from, 16);
      }
    }
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; ++r) {
        const uint32_t word = queue(l)[i].a[r];
        std::memcpy(a[g + 8 * (r % 2)] + 4 * t + 16 * (r / 2), &word, 4);
      }
    }
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      const Product& mine = queue(l)[i];
      for (int j = 0; j < 64; ++j) {
        const int8_t* const row = a[g + 8 * (j % 4 / 2)];
        const int8_t* const column = b[j / 4 * 8 + 2 * t + j % 2];
        int32_t sum = 0;
        for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
        mine.d[j] = mine.add ? mine.d[j] + sum : sum;
      }
    }
  }
}

}  // namespace

void wait_products(int pending) {
  while (current->products.size() > static_cast<size_t>(pending)) {
    std::vector<Product> queue = std::move(current->products.front());
    current->products.erase(current->products.begin());
    collective("a wait for products", &queue, multiply);
  }
}

}  // namespace emulator
