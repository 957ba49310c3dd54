// Buffers and what is known of every byte of them: is it there, was it written, by whom, when.
//
// Order between threads is kept as vector clocks of warps. A barrier joins the clocks of its warps;
// two accesses to a byte are ordered if the later thread's warp has seen the clock of the earlier
// one. Lanes of one warp are ordered by warp barriers alone. Blocks are unordered, save where one
// acquires what the other released.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "emulator.h"

namespace emulator {
namespace {

constexpr size_t kArena = size_t{256} << 20;
constexpr size_t kGap = 4096;
constexpr int kMaxWarps = 32;

// A stamp tells who touched a byte last: block | atomic | thread | clock of its warp. 0: nobody.
constexpr int kClockBits = 28, kThreadBits = 10;
using Stamp = uint64_t;

struct Who {
  uint64_t block;
  bool atomic;
  int thread;
  uint32_t clock;
};

Stamp pack(const Who& who) {
  return who.block << (kClockBits + kThreadBits + 1) |
         static_cast<uint64_t>(who.atomic) << (kClockBits + kThreadBits) |
         static_cast<uint64_t>(who.thread) << kClockBits | who.clock;
}

Who unpack(Stamp stamp) {
  return {stamp >> (kClockBits + kThreadBits + 1), (stamp >> (kClockBits + kThreadBits) & 1) != 0,
          static_cast<int>(stamp >> kClockBits & ((1 << kThreadBits) - 1)),
          static_cast<uint32_t>(stamp & ((1u << kClockBits) - 1))};
}

enum Flag : uint8_t { kThere = 1, kWritten = 2, kPending = 4 };

struct Buffer {
  std::string name;
  size_t bytes;
};

struct Clock {
  uint32_t seen[kMaxWarps] = {};  // of every warp of the block, the latest moment known of
};

void* reserve(size_t bytes) {
  void* const at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) stop("no address space for the emulator's memory");
  return at;
}

struct Memory {
  unsigned char* base = static_cast<unsigned char*>(reserve(kArena));
  uint8_t* flags = static_cast<uint8_t*>(reserve(kArena));
  Stamp* writer = static_cast<Stamp*>(reserve(kArena * sizeof(Stamp)));
  Stamp* reader = static_cast<Stamp*>(reserve(kArena * sizeof(Stamp)));
  size_t used = 0;
  std::map<size_t, Buffer> buffers;  // by offset

  uint64_t block = 0;         // serial number of the block that runs; 0: none yet
  uint64_t launch_start = 1;  // the first block of this launch
  Clock clocks[kMaxWarps];
  std::map<const void*, Clock> released;
  std::set<uint64_t> acquired;  // blocks whose writes this one may see
  std::map<const void*, std::set<uint64_t>> released_blocks;
};

Memory& memory() {
  static Memory* const m = new Memory;
  return *m;
}

bool inside(const void* at) {
  const auto* p = static_cast<const unsigned char*>(at);
  return p >= memory().base && p < memory().base + kArena;
}

size_t offset_of(const void* at) {
  return static_cast<size_t>(static_cast<const unsigned char*>(at) - memory().base);
}

std::string place(size_t offset) {
  const auto& buffers = memory().buffers;
  auto next = buffers.upper_bound(offset);
  if (next == buffers.begin()) return "before all buffers";
  const auto& [start, buffer] = *--next;
  return "byte " + std::to_string(offset - start) + " of '" + buffer.name + "' (" +
         std::to_string(buffer.bytes) + " bytes)";
}

std::string describe(const Who& who) {
  return "thread " + std::to_string(who.thread) +
         (who.block == memory().block ? " of the same block" : " of another block");
}

bool ordered(Stamp stamp, bool atomic) {
  if (stamp == 0) return true;
  const Memory& m = memory();
  const Who who = unpack(stamp);
  if (who.block < m.launch_start) return true;
  if (atomic && who.atomic) return true;
  if (who.block != m.block) return m.acquired.count(who.block) != 0;
  if (who.thread == current->index) return true;
  return m.clocks[current->warp].seen[who.thread / 32] > who.clock;
}

void check_there(size_t offset, size_t bytes, const char* what) {
  const Memory& m = memory();
  if (current == nullptr) {
    stop(std::string("host code ") + what + " device memory: " + place(offset));
  }
  for (size_t i = 0; i < bytes; ++i) {
    if ((m.flags[offset + i] & kThere) == 0) {
      stop(std::string(what) + " outside of a buffer: " + std::to_string(bytes) + " bytes at " +
           place(offset));
    }
    if ((m.flags[offset + i] & kPending) != 0) {
      stop(std::string(what) +
           " bytes that an asynchronous copy has not delivered yet: " + place(offset + i));
    }
  }
}

Stamp stamp_now(bool atomic) {
  const Memory& m = memory();
  return pack({m.block, atomic, current->index, m.clocks[current->warp].seen[current->warp]});
}

[[noreturn]] void race(const char* what, Stamp other, const char* did, size_t offset) {
  stop(std::string("race: this thread ") + what + ", " + describe(unpack(other)) + " " + did + " " +
       place(offset) + ", and nothing orders the two");
}

void read(size_t offset, size_t bytes, bool atomic) {
  Memory& m = memory();
  check_there(offset, bytes, "reads");
  const Stamp now = stamp_now(atomic);
  for (size_t i = offset; i < offset + bytes; ++i) {
    if ((m.flags[i] & kWritten) == 0) stop("reads what nobody has written: " + place(i));
    if (!ordered(m.writer[i], atomic)) race("reads", m.writer[i], "wrote", i);
    // One reader is remembered; of two that are unordered, either may hide a race.
    if (ordered(m.reader[i], false) || random_number() % 2 == 0) m.reader[i] = now;
  }
}

void write(size_t offset, size_t bytes, bool atomic) {
  Memory& m = memory();
  check_there(offset, bytes, "writes");
  const Stamp now = stamp_now(atomic);
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (!ordered(m.writer[i], atomic)) race("writes", m.writer[i], "wrote", i);
    if (!ordered(m.reader[i], atomic)) race("writes", m.reader[i], "read", i);
    m.writer[i] = now;
    m.flags[i] |= kWritten;
  }
}

void tick(int warp) {
  ++memory().clocks[warp].seen[warp];
}

void join(Clock& into, const Clock& from) {
  for (int w = 0; w < kMaxWarps; ++w) into.seen[w] = std::max(into.seen[w], from.seen[w]);
}

}  // namespace

void* allocate(const std::string& name, size_t bytes, size_t alignment, Fill fill) {
  Memory& m = memory();
  const size_t at = (m.used + kGap + alignment - 1) / alignment * alignment;
  if (at + bytes + kGap > kArena) stop("the emulator's 256 MiB are used up at '" + name + "'");
  m.used = at + bytes;
  m.buffers[at] = {name, bytes};
  std::memset(m.base + at, 0xff, bytes);  // NaN as a float of any size
  std::memset(m.flags + at, kThere | (fill == Fill::given ? kWritten : 0), bytes);
  return m.base + at;
}

void mark_written(const void* from, size_t bytes) {
  Memory& m = memory();
  for (size_t i = offset_of(from); i < offset_of(from) + bytes; ++i) m.flags[i] |= kWritten;
}

size_t count_unwritten(const void* from, size_t bytes) {
  const Memory& m = memory();
  size_t count = 0;
  for (size_t i = offset_of(from); i < offset_of(from) + bytes; ++i) {
    count += (m.flags[i] & kWritten) == 0;
  }
  return count;
}

void reads(const void* from, size_t bytes) {
  if (inside(from)) read(offset_of(from), bytes, false);
}

void writes(void* to, size_t bytes) {
  if (inside(to)) write(offset_of(to), bytes, false);
}

void updates_atomically(void* at, size_t bytes) {
  if (!inside(at)) return;
  read(offset_of(at), bytes, true);
  write(offset_of(at), bytes, true);
}

void mark_pending(void* to, size_t bytes, bool pending) {
  Memory& m = memory();
  if (!inside(to)) stop("an asynchronous copy to memory that is no buffer's");
  for (size_t i = offset_of(to); i < offset_of(to) + bytes; ++i) {
    m.flags[i] = static_cast<uint8_t>(pending ? m.flags[i] | kPending : m.flags[i] & ~kPending);
  }
}

void written_by_unit(void* to, size_t bytes) {
  Memory& m = memory();
  for (size_t i = offset_of(to); i < offset_of(to) + bytes; ++i) {
    m.flags[i] = static_cast<uint8_t>((m.flags[i] | kWritten) & ~kPending);
    m.writer[i] = 0;
  }
}

void release(const void* key) {
  Memory& m = memory();
  join(m.released[key], m.clocks[current->warp]);
  m.released[key].seen[current->warp] = m.clocks[current->warp].seen[current->warp] + 1;
  tick(current->warp);
}

void acquire(const void* key) {
  Memory& m = memory();
  join(m.clocks[current->warp], m.released[key]);
}

void release_block(const void* key) {
  Memory& m = memory();
  std::set<uint64_t>& blocks = m.released_blocks[key];
  blocks.insert(m.acquired.begin(), m.acquired.end());
  blocks.insert(m.block);
}

void acquire_block(const void* key) {
  Memory& m = memory();
  const std::set<uint64_t>& blocks = m.released_blocks[key];
  m.acquired.insert(blocks.begin(), blocks.end());
}

void start_launch() {
  Memory& m = memory();
  m.launch_start = m.block + 1;
  m.released_blocks.clear();
}

void start_block(int warps) {
  Memory& m = memory();
  ++m.block;
  m.acquired.clear();
  m.released.clear();
  for (int w = 0; w < kMaxWarps; ++w) m.clocks[w] = Clock{};
  for (int w = 0; w < warps; ++w) m.clocks[w].seen[w] = 1;
}

void forget_shared(unsigned char* shared, size_t shared_bytes) {
  if (shared_bytes == 0) return;
  Memory& m = memory();
  const size_t at = offset_of(shared);
  std::memset(shared, 0xff, shared_bytes);
  std::memset(m.flags + at, kThere, shared_bytes);
  std::memset(m.writer + at, 0, shared_bytes * sizeof(Stamp));
  std::memset(m.reader + at, 0, shared_bytes * sizeof(Stamp));
}

void warp_was_synchronised(int warp) {
  tick(warp);
}

void warps_were_synchronised(const std::vector<int>& warps) {
  Memory& m = memory();
  Clock all;
  for (int w : warps) {
    tick(w);
    join(all, m.clocks[w]);
  }
  for (int w : warps) join(m.clocks[w], all);
}

}  // namespace emulator

// --- the hooks that -fsanitize=thread calls -----------------------------------------------------

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define SALTIRE_HOOKS(bytes)                     \
  void __tsan_read##bytes(void* at) {            \
    emulator::reads(at, bytes);                  \
  }                                              \
  void __tsan_write##bytes(void* at) {           \
    emulator::writes(at, bytes);                 \
  }                                              \
  void __tsan_unaligned_read##bytes(void* at) {  \
    emulator::reads(at, bytes);                  \
  }                                              \
  void __tsan_unaligned_write##bytes(void* at) { \
    emulator::writes(at, bytes);                 \
  }                                              \
  void __tsan_volatile_read##bytes(void* at) {   \
    emulator::reads(at, bytes);                  \
  }                                              \
  void __tsan_volatile_write##bytes(void* at) {  \
    emulator::writes(at, bytes);                 \
  }
SALTIRE_HOOKS(1)
SALTIRE_HOOKS(2)
SALTIRE_HOOKS(4)
SALTIRE_HOOKS(8)
SALTIRE_HOOKS(16)

void __tsan_read_range(void* at, size_t bytes) {
  emulator::reads(at, bytes);
}
void __tsan_write_range(void* at, size_t bytes) {
  emulator::writes(at, bytes);
}
}
