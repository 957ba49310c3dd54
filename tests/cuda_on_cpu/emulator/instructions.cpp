// Warp instructions, tensor cores and asynchronous copies, from the tables of the PTX manual.
#include <algorithm>
#include <cstring>

#include "core/cpu/half.h"
#include "core/cuda/ptx.h"

namespace emulator {

namespace {

// All the lanes' records, as the instruction's own type.
template <typename Record>
Record& lane(void** records, int l) {
  return *static_cast<Record*>(records[l]);
}

}  // namespace

void shuffle(Shuffle& record) {
  collective("a shuffle", &record, [](void** records) {
    for (int l = 0; l < 32; ++l) {
      Shuffle& mine = lane<Shuffle>(records, l);
      if (mine.from < 0 || mine.from > 31) stop("a shuffle from lane " + std::to_string(mine.from));
      mine.result = lane<Shuffle>(records, mine.from).value;
    }
  });
}

uint32_t vote(bool condition) {
  struct Vote {
    bool condition;
    uint32_t result;
  } record{condition, 0};
  collective("a vote", &record, [](void** records) {
    uint32_t bits = 0;
    for (int l = 0; l < 32; ++l)
      bits |= static_cast<uint32_t>(lane<Vote>(records, l).condition) << l;
    for (int l = 0; l < 32; ++l) lane<Vote>(records, l).result = bits;
  });
  return record.result;
}

uint32_t warp_max(uint32_t value) {
  collective("a maximum over the warp", &value, [](void** records) {
    uint32_t most = 0;
    for (int l = 0; l < 32; ++l) most = std::max(most, lane<uint32_t>(records, l));
    for (int l = 0; l < 32; ++l) lane<uint32_t>(records, l) = most;
  });
  return value;
}

int32_t warp_sum(int32_t value) {
  collective("a sum over the warp", &value, [](void** records) {
    uint32_t sum = 0;  // unsigned: it wraps
    for (int l = 0; l < 32; ++l) sum += lane<uint32_t>(records, l);
    for (int l = 0; l < 32; ++l) lane<uint32_t>(records, l) = sum;
  });
  return value;
}

// --- memory -------------------------------------------------------------------------------------

namespace {

void check_aligned(const void* at, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(at) % alignment != 0) {
    stop(std::string(what) + " at an address that is not a multiple of " +
         std::to_string(alignment));
  }
}

}  // namespace

void read_16(void* to, const void* from) {
  check_aligned(from, 16, "a 16-byte load");
  reads(from, 16);
  std::memcpy(to, from, 16);
}

void write_16(void* to, const void* from) {
  check_aligned(to, 16, "a 16-byte store");
  writes(to, 16);
  std::memcpy(to, from, 16);
}

int add_and_see(int* counter, int value) {
  updates_atomically(counter, sizeof(int));
  release_block(counter);
  acquire_block(counter);
  const int old = *counter;
  *counter = old + value;
  return old;
}

void add_to(int32_t* sum, int32_t value) {
  updates_atomically(sum, sizeof(int32_t));
  *sum = static_cast<int32_t>(static_cast<uint32_t>(*sum) + static_cast<uint32_t>(value));
}

void add_to(float* sum, float value) {
  updates_atomically(sum, sizeof(float));
  *sum += value;
}

void copy_async(void* to, const void* from, int bytes, bool there) {
  check_aligned(to, static_cast<size_t>(bytes), "an asynchronous copy to shared memory");
  if (there) {
    check_aligned(from, static_cast<size_t>(bytes), "an asynchronous copy from global memory");
    reads(from, static_cast<size_t>(bytes));
  }
  writes(to, static_cast<size_t>(bytes));
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  mark_pending(to, static_cast<size_t>(bytes), true);
  current->open.push_back({to, from, bytes, there});
}

void commit_copies() {
  current->pending.push_back(std::move(current->open));
  current->open.clear();
}

void wait_copies(int pending) {
  while (current->pending.size() > static_cast<size_t>(pending)) {
    for (const Copy& c : current->pending.front()) {
      const auto bytes = static_cast<size_t>(c.bytes);
      mark_pending(c.to, bytes, false);
      writes(c.to, bytes);
      if (c.there) {
        std::memcpy(c.to, c.from, bytes);
      } else {
        std::memset(c.to, 0, bytes);
      }
    }
    current->pending.erase(current->pending.begin());
  }
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  struct Load {
    const unsigned char* row;
    bool transposed;
    uint32_t result[4];
  } record{static_cast<const unsigned char*>(row), transposed, {}};
  check_aligned(row, 16, "a row of ldmatrix");
  reads(row, 16);
  collective("ldmatrix", &record, [](void** records) {
    for (int l = 0; l < 32; ++l) {
      Load& mine = lane<Load>(records, l);
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; ++i) {
        const auto row_of = [&](int r) { return lane<Load>(records, 8 * i + r).row; };
        unsigned char bytes[4];
        if (mine.transposed) {
          std::memcpy(bytes, row_of(2 * t) + 2 * g, 2);
          std::memcpy(bytes + 2, row_of(2 * t + 1) + 2 * g, 2);
        } else {
          std::memcpy(bytes, row_of(g) + 4 * t, 4);
        }
        std::memcpy(&mine.result[i], bytes, 4);
      }
    }
  });
  std::memcpy(r, record.result, sizeof(r));
}

// --- tensor cores -------------------------------------------------------------------------------
// Element e of register i of lane (g, t), with p elements a register: the PTX manual's tables for
// m16n8k32 (p = 4), m16n8k64 (p = 8) and m16n8k16 (p = 2) are one rule.
//   A: row g + 8·(i % 2), column p·t + e + 4p·(i / 2)
//   B: row p·t + e + 4p·i, column g
//   D: row g + 8·(i / 2), column 2t + i % 2

namespace {

template <typename D>
struct Mma {
  int bits;
  bool brain;
  const uint32_t* a;
  const uint32_t* b;
  D* d;
};

template <typename D, typename Value, typename A, typename B>
void multiply(void** records, int per_register, A value_of_a, B value_of_b) {
  const int p = per_register, K = 8 * p;
  Value a[16][64], b[64][8];
  for (int l = 0; l < 32; ++l) {
    const Mma<D>& mine = lane<Mma<D>>(records, l);
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < p; ++e) {
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][p * t + e + 4 * p * (i / 2)] = value_of_a(mine.a[i], e);
      }
      for (int i = 0; i < 2; ++i) b[p * t + e + 4 * p * i][g] = value_of_b(mine.b[i], e);
    }
  }
  for (int l = 0; l < 32; ++l) {
    const Mma<D>& mine = lane<Mma<D>>(records, l);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      Value sum = static_cast<Value>(mine.d[i]);
      for (int k = 0; k < K; ++k) sum += a[g + 8 * (i / 2)][k] * b[k][2 * t + i % 2];
      mine.d[i] = static_cast<D>(sum);
    }
  }
}

}  // namespace

void mma_integers(int bits, int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma<int32_t> record{bits, false, a, b, d};
  collective(bits == 8 ? "mma s8" : "mma s4", &record, [](void** records) {
    const int width = lane<Mma<int32_t>>(records, 0).bits;
    const auto value = [width](uint32_t word, int e) {
      const uint32_t v = word >> (width * e) & ((1u << width) - 1);
      return v >> (width - 1) != 0 ? v - (1u << width) : v;
    };
    // Unsigned: sums wrap, as the hardware's do.
    multiply<int32_t, uint32_t>(records, 32 / width, value, value);
  });
}

void mma_floats(bool brain, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma<float> record{16, brain, a, b, d};
  collective(brain ? "mma bf16" : "mma f16", &record, [](void** records) {
    const bool is_brain = lane<Mma<float>>(records, 0).brain;
    const auto value = [is_brain](uint32_t word, int e) {
      const auto half = static_cast<uint16_t>(word >> (16 * e));
      return is_brain ? saltire::bf16_to_f32(half) : saltire::f16_to_f32(half);
    };
    multiply<float, float>(records, 2, value, value);
  });
}

float f16_to_f32(uint16_t bits) {
  return saltire::f16_to_f32(bits);
}
uint16_t f32_to_f16(float x) {
  return saltire::f32_to_f16(x);
}
uint16_t f32_to_bf16(float x) {
  return saltire::f32_to_bf16(x);
}

}  // namespace emulator
