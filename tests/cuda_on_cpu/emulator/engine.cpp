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
constexpr int kBarriers = 16;

struct Barrier {
  int expected = 0;
  std::vector<Thread*> arrived;
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
  std::vector<Barrier> barriers = std::vector<Barrier>(kBarriers);
  std::vector<Warp> warps;
  int threads = 0;
  int alive = 0;
  unsigned char* shared = nullptr;
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
  --engine().alive;
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

void run_block(Index block, Size grid, Size size) {
  Engine& e = engine();
  e.threads = static_cast<int>(size.x * size.y * size.z);
  e.alive = e.threads;
  e.warps.assign(static_cast<size_t>(e.threads / 32), Warp{});
  e.barriers.assign(kBarriers, Barrier{});
  e.ready.clear();
  for (int i = 0; i < e.threads; ++i) {
    Fiber& fiber = e.fibers[static_cast<size_t>(i)];
    fiber.thread = Thread{};
    const auto u = static_cast<unsigned>(i);
    fiber.thread.thread = {u % size.x, u / size.x % size.y, u / (size.x * size.y)};
    fiber.thread.block = block;
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
  if (e.alive > 0) stop(deadlock());
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
  return engine().shared;
}

void barrier(int id, int count, bool wait) {
  Engine& e = engine();
  if (id < 0 || id >= kBarriers) stop("barrier " + std::to_string(id) + " does not exist");
  const int expected = count == 0 ? e.threads : count;
  if (expected % 32 != 0) stop("a barrier's count is not a multiple of 32");
  if (count == 0 && e.alive < e.threads) stop("a block barrier after some threads have ended");
  Barrier& b = e.barriers[static_cast<size_t>(id)];
  if (b.arrived.empty()) b.expected = expected;
  if (b.expected != expected) {
    stop("barrier " + std::to_string(id) + " with " + std::to_string(expected) +
         " threads, but others came with " + std::to_string(b.expected));
  }
  b.arrived.push_back(wait ? current : nullptr);
  Thread* const me = current;
  static std::vector<int> warps[kBarriers];
  warps[id].push_back(me->warp);
  if (static_cast<int>(b.arrived.size()) < expected) {
    if (wait) sleep("barrier " + std::to_string(id));
    return;
  }
  std::sort(warps[id].begin(), warps[id].end());
  for (size_t i = 0; i < warps[id].size(); ++i) {
    if (warps[id][i] != warps[id][i / 32 * 32]) {
      stop("barrier " + std::to_string(id) + " was reached by part of a warp only");
    }
  }
  warps[id].erase(std::unique(warps[id].begin(), warps[id].end()), warps[id].end());
  warps_were_synchronised(warps[id]);
  warps[id].clear();
  const std::vector<Thread*> arrived = std::move(b.arrived);
  b = Barrier{};
  for (Thread* t : arrived) {
    if (t != nullptr && t != me) wake(t);
  }
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

void run_grid(const char* name, Size grid, Size block, size_t shared_bytes,
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
  std::vector<Index> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    }
  }
  std::shuffle(blocks.begin(), blocks.end(), e.random);
  start_launch();
  static std::map<size_t, unsigned char*> shared;  // one buffer for each size
  unsigned char*& memory = shared[shared_bytes];
  if (memory == nullptr) {
    memory =
        static_cast<unsigned char*>(allocate("shared memory", shared_bytes, 1024, Fill::poison));
  }
  e.shared = memory;
  for (const Index& b : blocks) {
    start_block(static_cast<int>(threads / 32), e.shared, shared_bytes);
    run_block(b, grid, block);
  }
  e.kernel_name = "(host code)";
}

}  // namespace emulator
