// sm_90a: barriers that count bytes, the copy engine, warpgroup products. A product is done when it
// is waited for, from the registers as they are then: results that are read earlier, and operands
// that are overwritten earlier, come out wrong.
#include "core/cuda/sm90.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "core/cpu/half.h"

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

void arrive_at(uint64_t* barrier, int rank) {
  arrive(static_cast<uint64_t*>(in_block(rank, barrier)), 0);
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

namespace {

// The box's bytes as they come to lie in shared memory.
std::vector<unsigned char> read_box(void* to, const saltire::cuda::TensorMap& map, int row,
                                    int column) {
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
  return data;
}

}  // namespace

void copy_box(void* to, const saltire::cuda::TensorMap& map, int row, int column,
              uint64_t* barrier) {
  const std::vector<unsigned char> data = read_box(to, map, row, column);
  start_copy(to, data.size());
  later([=] { finish_copy(to, data, barrier); });
}

void copy_box_to_both(void* to, const saltire::cuda::TensorMap& map, int row, int column,
                      uint64_t* barrier) {
  const std::vector<unsigned char> data = read_box(to, map, row, column);
  for (int rank = 0; rank < 2; ++rank) {
    void* const there = in_block(rank, to);
    auto* const counts = static_cast<uint64_t*>(in_block(rank, barrier));
    start_copy(there, data.size());
    later([=] { finish_copy(there, data, counts); });
  }
}

void begin_products() {
  current->registers_ready = true;
}

void multiply_128(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
  if (!current->registers_ready) stop("a product before begin_products");
  current->open_products.push_back({d, a, 0, b, add, false, false});
}

void multiply_256(float (&d)[128], uint64_t a, uint64_t b, bool add, bool a_along_rows,
                  bool b_along_rows) {
  if (!current->registers_ready) stop("a product before begin_products");
  current->open_products.push_back({d, nullptr, a, b, add, a_along_rows, b_along_rows});
}

void commit_products() {
  current->products.push_back(std::move(current->open_products));
  current->open_products.clear();
  current->registers_ready = false;
}

namespace {

// 16 bytes of shared memory at an address before the swizzle, which is of addresses: bits 4..6 are
// xored with bits 7..9.
void read_swizzled(void* to, uint32_t plain) {
  const unsigned char* const from = shared_memory() + (plain ^ (plain >> 7 & 7) << 4);
  reads(from, 16);
  std::memcpy(to, from, 16);
}

uint32_t field(uint64_t operand, int shift) {
  return static_cast<uint32_t>(operand >> shift & 0x3fff) << 4;
}

using Queue = std::vector<Product>;

// 16 rows x 128 columns x 32 inputs of signed bytes.
void multiply_bytes(void** records, size_t i) {
  const auto product = [&](int l) -> const Product& {
    return (*static_cast<Queue*>(records[l]))[i];
  };
  const uint32_t start = field(product(0).b, 0);
  int8_t a[16][32], b[128][32];
  for (int n = 0; n < 128; ++n) {
    for (int c = 0; c < 2; ++c) {
      read_swizzled(b[n] + 16 * c, start + static_cast<uint32_t>(n * 128 + c * 16));
    }
  }
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r) {
      const uint32_t word = product(l).a[r];
      std::memcpy(a[g + 8 * (r % 2)] + 4 * t + 16 * (r / 2), &word, 4);
    }
  }
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    auto* const d = static_cast<int32_t*>(product(l).d);
    for (int j = 0; j < 64; ++j) {
      const int8_t* const row = a[g + 8 * (j % 4 / 2)];
      const int8_t* const column = b[j / 4 * 8 + 2 * t + j % 2];
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
      d[j] = product(l).add ? d[j] + sum : sum;
    }
  }
}

// Rows first .. first + rows of a bf16 operand, 16 inputs.
void read_operand(uint64_t operand, bool along_rows, int first, int rows, float (*to)[16]) {
  const uint32_t start = field(operand, 0), box = field(operand, 16), step = field(operand, 32);
  const auto at = [](int v) { return static_cast<uint32_t>(v); };
  uint16_t piece[8];
  for (int i = 0; i < rows; i += along_rows ? 8 : 1) {
    const int row = first + i;
    for (int k = 0; k < 16; k += along_rows ? 1 : 8) {
      read_swizzled(piece, along_rows ? start + at(row / 64) * box + at(k / 8) * step +
                                            at(k % 8 * 128 + row % 64 * 2)
                                      : start + at(row / 8) * step + at(row % 8 * 128 + k * 2));
      for (int e = 0; e < 8; ++e) {
        to[i + (along_rows ? e : 0)][k + (along_rows ? 0 : e)] = saltire::bf16_to_f32(piece[e]);
      }
    }
  }
}

// 16 rows x 256 columns x 16 inputs of bf16.
void multiply_floats(void** records, size_t i) {
  const auto product = [&](int l) -> const Product& {
    return (*static_cast<Queue*>(records[l]))[i];
  };
  static float a[16][16], b[256][16];
  const Product& first = product(0);
  if ((first.a_operand >> 62) != 1) stop("a malformed operand A");
  read_operand(first.a_operand, first.a_along_rows, current->warp % 4 * 16, 16, a);
  read_operand(first.b, first.b_along_rows, 0, 256, b);
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    auto* const d = static_cast<float*>(product(l).d);
    for (int j = 0; j < 128; ++j) {
      const float* const row = a[g + 8 * (j % 4 / 2)];
      const float* const column = b[j / 4 * 8 + 2 * t + j % 2];
      float sum = product(l).add ? d[j] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      d[j] = sum;
    }
  }
}

// The products of one warp at a place in its queue.
void multiply(void** records) {
  const Queue& queue = *static_cast<Queue*>(records[0]);
  for (size_t i = 0; i < queue.size(); ++i) {
    if ((queue[i].b >> 62) != 1 || field(queue[i].b, 32) != 1024) stop("a malformed operand B");
    if (queue[i].a != nullptr) {
      multiply_bytes(records, i);
    } else {
      multiply_floats(records, i);
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
