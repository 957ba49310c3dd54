// Fibers, barriers, blocks.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>

#include "emulator.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

Thread* current = nullptr;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;
constexpr int kMaxThreads = 1024;
constexpr int kBarriers = 16;   // of a block
constexpr int kMostBlocks = 8;  // of a cluster

struct Barrier {
  int expected = 0;
  std::vector<Thread*> arrived;
  std::vector<int> warps;  // of those that arrived
};

struct Warp {
  const char* name = nullptr;  // the collective under way
  void (*act)(void**) = nullptr;
  void* records[32] = {};
  int arrived = 0;
  std::vector<Thread*> waiting;
};

struct Fiber {
  Thread thread;
  char* stack = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

struct Engine {
  std::mt19937 random{[] {
    const char* seed = std::getenv("EMULATOR_SEED");
    return static_cast<uint32_t>(seed != nullptr ? std::atoi(seed) : 0);
  }()};
  const char* kernel_name = "";
  const std::function<void()>* kernel = nullptr;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  std::vector<Thread*> ready;
  std::vector<std::function<void()>> units;  // work of asynchronous units, not yet done
  std::vector<Barrier> barriers;             // of each block, and one of the cluster
  std::vector<Warp> warps;
  int threads = 0;         // of the cluster
  int block_threads = 0;   // of a block
  std::vector<int> alive;  // of each block
  std::vector<unsigned char*> shared;
  void* host_stack = nullptr;
#if !defined(__x86_64__)
  ucontext_t host_context;
#endif
};

Engine& engine() {
  static Engine* const e = new Engine;
  return *e;
}

// --- switching ----------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack and takes those of the new one.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

Fiber& fiber_of(Thread* thread) {
  return *reinterpret_cast<Fiber*>(thread);  // its first member
}

void to_host() {
  Thread* const me = current;
  current = nullptr;
#if defined(__x86_64__)
  emulator_switch(&me->stack_pointer, engine().host_stack);
#else
  swapcontext(&fiber_of(me).context, &engine().host_context);
#endif
}

void to_fiber(Thread* thread) {
  current = thread;
#if defined(__x86_64__)
  emulator_switch(&engine().host_stack, thread->stack_pointer);
#else
  swapcontext(&engine().host_context, &fiber_of(thread).context);
#endif
}

void fiber_main() {
  (*engine().kernel)();
  bool waited = current->open.empty();
  for (const std::vector<Copy>& group : current->pending) waited = waited && group.empty();
  if (!waited) stop("the thread ends with asynchronous copies that it never waited for");
  if (!current->open_products.empty() || !current->products.empty()) {
    stop("the thread ends with products that it never waited for");
  }
  current->done = true;
  --engine().alive[static_cast<size_t>(current->rank)];
  to_host();
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* const at = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) stop("no memory for a fiber's stack");
    mprotect(at, kGuard, PROT_NONE);
    fiber.stack = static_cast<char*>(at) + kGuard;
  }
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.thread.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack, 0, kStack};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

std::string deadlock() {
  std::map<std::string, int> waiting;
  for (int i = 0; i < engine().threads; ++i) {
    const Thread& t = engine().fibers[static_cast<size_t>(i)].thread;
    ++waiting[t.done ? "(ended)" : t.waits_for];
  }
  std::string text = "deadlock: no thread of the block can go on:";
  for (const auto& [what, count] : waiting) {
    text += "\n  " + std::to_string(count) + " threads: " + what;
  }
  return text;
}

void run_cluster(const std::vector<Index>& blocks, Size grid, Size size) {
  Engine& e = engine();
  e.block_threads = static_cast<int>(size.x * size.y * size.z);
  e.threads = e.block_threads * static_cast<int>(blocks.size());
  e.alive.assign(blocks.size(), e.block_threads);
  e.warps.assign(static_cast<size_t>(e.threads / 32), Warp{});
  e.barriers.assign(kBarriers * blocks.size() + 1, Barrier{});
  e.ready.clear();
  for (int i = 0; i < e.threads; ++i) {
    Fiber& fiber = e.fibers[static_cast<size_t>(i)];
    fiber.thread = Thread{};
    fiber.thread.rank = i / e.block_threads;
    const auto u = static_cast<unsigned>(i % e.block_threads);
    fiber.thread.thread = {u % size.x, u / size.x % size.y, u / (size.x * size.y)};
    fiber.thread.block = blocks[static_cast<size_t>(fiber.thread.rank)];
    fiber.thread.threads = size;
    fiber.thread.blocks = grid;
    fiber.thread.index = i;
    fiber.thread.warp = i / 32;
    fiber.thread.lane = i % 32;
    prepare(fiber);
    e.ready.push_back(&fiber.thread);
  }
  while (!e.ready.empty() || !e.units.empty()) {
    // An asynchronous unit finishes now and then, and at the latest when all threads wait.
    if (!e.units.empty() && (e.ready.empty() || e.random() % 64 == 0)) {
      const size_t pick = e.random() % e.units.size();
      const std::function<void()> work = std::move(e.units[pick]);
      e.units.erase(e.units.begin() + static_cast<std::ptrdiff_t>(pick));
      work();
      continue;
    }
    const size_t pick = e.random() % e.ready.size();
    Thread* const next = e.ready[pick];
    e.ready[pick] = e.ready.back();
    e.ready.pop_back();
    to_fiber(next);
  }
  for (const int alive : e.alive) {
    if (alive > 0) stop(deadlock());
  }
}

}  // namespace

void stop(const std::string& message) {
  std::string where = std::string("kernel ") + engine().kernel_name;
  if (current != nullptr) {
    const auto text = [](unsigned v) { return std::to_string(v); };
    where += ", block (" + text(current->block.x) + ", " + text(current->block.y) + ", " +
             text(current->block.z) + "), thread " + std::to_string(current->index);
  }
  std::fprintf(stderr, "emulator: %s: %s\n", where.c_str(), message.c_str());
  std::fflush(stderr);
  std::_Exit(3);
}

uint32_t random_number() {
  return static_cast<uint32_t>(engine().random());
}

void sleep(const std::string& waits_for) {
  current->waits_for = waits_for;
  to_host();
}

void wake(Thread* thread) {
  engine().ready.push_back(thread);
}

void pause() {
  wake(current);
  sleep("its turn");
}

void later(std::function<void()> work) {
  engine().units.push_back(std::move(work));
}

unsigned char* shared_memory() {
  return engine().shared[static_cast<size_t>(current != nullptr ? current->rank : 0)];
}

void* in_block(int rank, const void* here) {
  if (rank < 0 || rank >= static_cast<int>(engine().alive.size())) {
    stop("block " + std::to_string(rank) + " is not of the cluster");
  }
  if (engine().alive[static_cast<size_t>(rank)] == 0) {
    stop("the shared memory of a block of the cluster that has ended");
  }
  return engine().shared[static_cast<size_t>(rank)] +
         (static_cast<const unsigned char*>(here) - shared_memory());
}

namespace {

// `at`: index of the barrier among all of the cluster's; `name`: what a deadlock calls it.
void meet(size_t at, int expected, bool wait, const std::string& name) {
  Engine& e = engine();
  Barrier& b = e.barriers[at];
  if (b.arrived.empty()) b.expected = expected;
  if (b.expected != expected) {
    stop(name + " with " + std::to_string(expected) + " threads, but others came with " +
         std::to_string(b.expected));
  }
  b.arrived.push_back(wait ? current : nullptr);
  b.warps.push_back(current->warp);
  Thread* const me = current;
  if (static_cast<int>(b.arrived.size()) < expected) {
    if (wait) sleep(name);
    return;
  }
  std::vector<int> warps = std::move(b.warps);
  std::sort(warps.begin(), warps.end());
  for (size_t i = 0; i < warps.size(); ++i) {
    if (warps[i] != warps[i / 32 * 32]) stop(name + " was reached by part of a warp only");
  }
  warps.erase(std::unique(warps.begin(), warps.end()), warps.end());
  warps_were_synchronised(warps);
  const std::vector<Thread*> arrived = std::move(b.arrived);
  b = Barrier{};
  for (Thread* t : arrived) {
    if (t != nullptr && t != me) wake(t);
  }
}

}  // namespace

void barrier(int id, int count, bool wait) {
  const Engine& e = engine();
  if (id < 0 || id >= kBarriers) stop("barrier " + std::to_string(id) + " does not exist");
  const int expected = count == 0 ? e.block_threads : count;
  const auto rank = static_cast<size_t>(current->rank);
  if (expected % 32 != 0) stop("a barrier's count is not a multiple of 32");
  if (count == 0 && e.alive[rank] < e.block_threads) {
    stop("a block barrier after some threads have ended");
  }
  meet(rank * kBarriers + static_cast<size_t>(id), expected, wait, "barrier " + std::to_string(id));
}

// On a device threads that have ended count as arrived; here all must come.
void sync_cluster() {
  meet(engine().barriers.size() - 1, engine().threads, true, "the barrier of the cluster");
}

void collective(const char* name, void* record, void (*act)(void**)) {
  Warp& w = engine().warps[static_cast<size_t>(current->warp)];
  if (w.arrived == 0) {
    w.name = name;
    w.act = act;
  } else if (w.act != act) {
    stop(std::string("the warp diverged: one lane executes ") + name + ", another " + w.name);
  }
  w.records[current->lane] = record;
  if (++w.arrived < 32) {
    w.waiting.push_back(current);
    sleep(std::string("all lanes to reach ") + name);
    return;
  }
  w.arrived = 0;
  const std::vector<Thread*> waiting = std::move(w.waiting);
  w.waiting.clear();
  void* records[32];
  std::copy(w.records, w.records + 32, records);
  act(records);
  for (Thread* t : waiting) wake(t);
}

void sync_warp() {
  collective("a warp barrier", nullptr, [](void**) { warp_was_synchronised(current->warp); });
}

void run_grid(const char* name, Size grid, Size block, unsigned cluster, size_t shared_bytes,
              const std::function<void()>& kernel) {
  Engine& e = engine();
  e.kernel_name = name;
  e.kernel = &kernel;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || threads % 32 != 0) {
    stop("a block of " + std::to_string(threads) +
         " threads; expected 32 to 1024, a multiple of 32");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    stop("a grid of no or too many blocks");
  }
  constexpr size_t kMostShared = 227 * 1024;
  if (shared_bytes > kMostShared) {
    stop(std::to_string(shared_bytes) + " bytes of shared memory; a block may have 232448");
  }
  if (cluster == 0 || cluster > kMostBlocks || threads * cluster > kMaxThreads ||
      grid.x % cluster != 0) {
    stop("clusters of " + std::to_string(cluster) + " blocks of " + std::to_string(threads) +
         " threads in a grid of " + std::to_string(grid.x) +
         "; expected at most 8 blocks and, here, 1024 threads, and whole clusters");
  }
  std::vector<std::vector<Index>> clusters;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        if (x % cluster == 0) clusters.emplace_back();
        clusters.back().push_back({x, y, z});
      }
    }
  }
  std::shuffle(clusters.begin(), clusters.end(), e.random);
  start_launch();
  static std::map<size_t, std::vector<unsigned char*>> shared;  // buffers of each size
  std::vector<unsigned char*>& memory = shared[shared_bytes];
  while (memory.size() < cluster) {
    memory.push_back(
        static_cast<unsigned char*>(allocate("shared memory", shared_bytes, 1024, Fill::poison)));
  }
  e.shared = memory;
  for (const std::vector<Index>& blocks : clusters) {
    start_block(static_cast<int>(threads * cluster / 32));
    for (unsigned b = 0; b < cluster; ++b) forget_shared(memory[b], shared_bytes);
    run_cluster(blocks, grid, block);
  }
  e.kernel_name = "(host code)";
}

}  // namespace emulator
