// The executor: a grid's blocks one after another, a block's threads as fibers.
//
// A fiber runs until it waits (barrier, exchange of a warp, asynchronous copy) and the others then have their turn, in
// ascending or descending order of threads, all of them or a warp at a time: results that depend on the order show a
// missing barrier.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "include/cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace executor {
namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr int kValue = 128;

struct Copy {
  void* to;
  const void* from;
  bool exists;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned thread;
  bool started = false, done = false;
  std::vector<std::vector<Copy>> groups;  // committed; the open one is last
  int reads = 0;                          // exchanges so far
};

struct Warp {
  char value[2][32 * kValue];  // of this exchange and the one before, which slow lanes still read
  unsigned arrived = 0;
  int done = 0;  // exchanges completed
};

struct Barrier {
  int arrived = 0, generation = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<char> shared_memory;
Barrier barriers[16];
char* shared_start;
size_t shared_bytes;
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* kernel;
bool descending = false, by_warp = false, progress = false;
int live;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda executor: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

void enter() {
  (*kernel)();
  current->done = true;
  --live;
  progress = true;
  _longjmp(scheduler, 1);
}

void yield() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber* fiber) {
  current = fiber;
  threadIdx = dim3(fiber->thread, 0, 0);
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->resume, 1);
  fiber->started = true;
  progress = true;
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack.get();
  fiber->start.uc_stack.ss_size = kStack;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, enter, 0);
  setcontext(&fiber->start);
}

void land(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.exists)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
}

}  // namespace

int architecture = 90, shared_of_block = 227 * 1024;

char* dynamic_shared() { return shared_start; }

void wait_until(const std::function<bool()>& ready) {
  while (!ready()) yield();
  progress = true;
}

const char* exchange(unsigned mask, const void* value, int bytes) {
  Fiber* self = current;
  const unsigned thread = self->thread, lane = thread % 32;
  Warp& warp = warps[thread / 32];
  if (bytes > kValue || mask != 0xffffffffu) fail("an exchange of too many bytes, or by a part of a warp");
  const int turn = self->reads++;
  wait_until([&] { return warp.done >= turn; });
  if (warp.done != turn || (warp.arrived >> lane & 1)) fail("the lanes of a warp met at different exchanges");
  if (bytes) std::memcpy(warp.value[turn % 2] + lane * kValue, value, bytes);
  warp.arrived |= 1u << lane;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.done;
  }
  wait_until([&] { return warp.done > turn; });
  return warp.value[turn % 2];
}

void barrier(int id, int threads) {
  if (id < 0 || id > 15) fail("barriers are numbered 0 to 15");
  Barrier& b = barriers[id];
  const int size = static_cast<int>(blockDim.x);
  if (threads == 0 && live != size) fail("__syncthreads after a thread of the block has returned");
  const int generation = b.generation;
  if (++b.arrived == (threads ? threads : size)) {
    b.arrived = 0;
    ++b.generation;
  }
  wait_until([&] { return b.generation != generation; });
}

void copy_async(void* to, const void* from, bool exists) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0)
    fail("an asynchronous copy of 16 bytes that are not aligned");
  if (current->groups.empty()) current->groups.emplace_back();
  current->groups.back().push_back({to, from, exists});
}

void copy_commit() {
  if (current->groups.empty()) current->groups.emplace_back();
  current->groups.emplace_back();
}

void copy_wait(int groups_under_way) {
  auto& groups = current->groups;
  while (static_cast<int>(groups.size()) > groups_under_way + 1) {
    land(groups.front());
    groups.erase(groups.begin());
  }
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  if (block.y != 1 || block.z != 1 || grid.y != 1 || grid.z != 1) {
    std::fprintf(stderr, "cuda executor: grids and blocks have one dimension\n");
    std::abort();
  }
  kernel = &body;
  blockDim = block;
  gridDim = grid;
  while (fibers.size() < block.x) fibers.push_back(std::make_unique<Fiber>());
  shared_memory.resize(shared + kGuard + 1024);
  shared_start = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared_memory.data()) + 1023) / 1024 * 1024);
  for (unsigned b = 0; b < grid.x; ++b) {
    std::memset(shared_start, 0xff, shared + kGuard - 1024);  // NaN where nothing was written
    warps.assign((block.x + 31) / 32, Warp{});
    for (Barrier& each : barriers) each = {};
    live = static_cast<int>(block.x);
    blockIdx = dim3(b, 0, 0);
    for (unsigned t = 0; t < block.x; ++t) {
      Fiber& fiber = *fibers[t];
      fiber.thread = t;
      fiber.started = fiber.done = false;
      fiber.groups.clear();
      fiber.reads = 0;
    }
    const unsigned all = block.x, step = by_warp ? 32 : all;
    while (live > 0) {
      bool moved = false;
      for (unsigned first = 0; first < all; first += step) {  // a warp as far as it gets alone, or all in turn
        do {
          progress = false;
          for (unsigned i = first; i < min(first + step, all); ++i) {
            Fiber* fiber = fibers[descending ? all - 1 - i : i].get();
            if (!fiber->done) resume(fiber);
          }
          moved = moved || progress;
        } while (progress && by_warp);
      }
      if (!moved) fail("the threads of a block wait for each other forever");
    }
    for (size_t i = shared; i < shared + kGuard - 1024; ++i)
      if (static_cast<unsigned char>(shared_start[i]) != 0xff) fail("a write past the block's shared memory");
  }
}

}  // namespace executor

#define EXPORT extern "C" __attribute__((visibility("default")))

// For tests: the order in which threads have their turn (1: descending, 2: warp by warp), the device's architecture
// (80, 90 ...) and shared memory of a block, the threads of the last launch's blocks.
EXPORT void executor_order(int bits) {
  executor::descending = bits & 1;
  executor::by_warp = bits & 2;
}
EXPORT void executor_architecture(int number) { executor::architecture = number; }
EXPORT void executor_shared(int bytes) { executor::shared_of_block = bytes; }
EXPORT int executor_threads() { return static_cast<int>(blockDim.x); }
