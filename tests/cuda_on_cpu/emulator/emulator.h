// Runs CUDA kernels on a CPU, and watches them: every thread of a block is a fiber, blocks (or
// clusters of them) run one after another, fibers and blocks in random order (EMULATOR_SEED).
//
// What it finds, each with the thread, the buffer and the offset: access outside of a buffer; a
// read of bytes that nobody wrote; a read of bytes that an asynchronous copy has not yet delivered;
// two threads touching the same byte, one of them writing, without a barrier between (also across
// blocks); a barrier or warp instruction that not all threads reach; outputs left unwritten; host
// code that touches device memory.
//
// How it sees accesses: kernels are compiled with -fsanitize=thread, which calls a hook before
// every load and store, and linked to our hooks (memory.cpp) in place of ThreadSanitizer's.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Size {
  unsigned x = 1, y = 1, z = 1;
  Size(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool there;
};

// A product of a warpgroup under way: registers stay where they are.
struct Product {
  void* d;            // int32 [64], or float [128] of bf16 operands
  const uint32_t* a;  // registers; null: a_operand names it
  uint64_t a_operand, b;
  bool add, a_along_rows, b_along_rows;
};

struct Thread {
  Index thread, block;
  Size threads, blocks;
  int index = 0, warp = 0, lane = 0;  // of the cluster, as it is one to the race check
  int rank = 0;                       // of the block in its cluster
  bool done = false;
  std::string waits_for;
  void* stack_pointer = nullptr;
  std::vector<Copy> open;                  // copies not yet committed
  std::vector<std::vector<Copy>> pending;  // committed groups, oldest first
  bool registers_ready = false;            // since begin_products
  std::vector<Product> open_products;
  std::vector<std::vector<Product>> products;
};

// The fiber that runs now; null in host code.
extern Thread* current;

// --- running ------------------------------------------------------------------------------------

// cluster: blocks, neighbours in x, that run together.
void run_grid(const char* name, Size grid, Size block, unsigned cluster, size_t shared_bytes,
              const std::function<void()>& kernel);
unsigned char* shared_memory();
// The same place in the shared memory of another block of the cluster.
void* in_block(int rank, const void* here);

// Ends the process with the message and where it happened.
[[noreturn]] void stop(const std::string& message);

// Puts the current fiber to sleep until `wake` names it; `waits_for` is told on a deadlock.
void sleep(const std::string& waits_for);
void wake(Thread* thread);
// Lets others run; the current fiber stays ready.
void pause();

void barrier(int id, int count, bool wait);  // count 0: the whole block
void sync_warp();
void sync_cluster();

// All 32 lanes bring a record; the last one to arrive runs `act` on them all (by lane).
void collective(const char* name, void* record, void (*act)(void** records));

// Work that an asynchronous unit does at some later time, chosen at random.
void later(std::function<void()> work);

uint32_t random_number();

// --- memory -------------------------------------------------------------------------------------

enum class Fill { given, poison };

// A buffer whose end is exact to the byte; nothing lies within 4 KiB of it.
void* allocate(const std::string& name, size_t bytes, size_t alignment, Fill fill);
void mark_written(const void* from, size_t bytes);
size_t count_unwritten(const void* from, size_t bytes);

// What the hooks check, for instructions that the compiler does not see.
void reads(const void* from, size_t bytes);
void writes(void* to, size_t bytes);
void updates_atomically(void* at, size_t bytes);
// Between issue and arrival of an asynchronous copy its target may be neither read nor written.
void mark_pending(void* to, size_t bytes, bool pending);
// An asynchronous unit's write: no thread's, ordered by whatever its completion is waited on with.
void written_by_unit(void* to, size_t bytes);

// Release and acquire through the object at `key`, for one warp (within the block) or the whole
// block (across blocks).
void release(const void* key);
void acquire(const void* key);
void release_block(const void* key);
void acquire_block(const void* key);

// Clocks of the race check; the engine tells when threads were ordered.
void start_launch();
void start_block(int warps);
void forget_shared(unsigned char* shared, size_t shared_bytes);
void warp_was_synchronised(int warp);
void warps_were_synchronised(const std::vector<int>& warps);

}  // namespace emulator
