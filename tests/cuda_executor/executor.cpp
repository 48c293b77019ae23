// The executor: a grid's blocks one after another, a block's threads as fibers.
//
// A fiber runs until it waits (barrier, exchange of a warp, asynchronous copy) and the others then have their turn, in
// ascending or descending order of threads, all of them or a warp at a time: results that depend on the order show a
// missing barrier.
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "include/cuda_runtime.h"
#include "include/executor_signals.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace executor {
namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr int kGroup = 128;            // threads of a warpgroup
constexpr uint32_t kDynamic = 1024;    // where a block's shared memory begins: the system's is before it
constexpr uint32_t kStatic = 1 << 20;  // that of the variables of all kernels, more than a block could have

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
  int reads = 0, group_reads = 0;         // exchanges so far, of the warp and of the warpgroup
  int products = 0;
};

struct Meeting {               // of the threads of a warp or of a warpgroup
  std::vector<char> value[2];  // of this exchange and the one before, which slow threads still read
  std::vector<bool> here = std::vector<bool>(kGroup);  // who has arrived
  int arrived = 0, done = 0;                           // exchanges completed
  int asked = -1;                                      // the last for which a thread was the first to ask
};

struct Barrier {
  int arrived = 0, generation = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Meeting> warps, warpgroups;
std::vector<char> shared_memory;
Barrier barriers[16];
char* shared_start;
size_t shared_bytes;
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* kernel;
bool descending = false, by_warp = false, progress = false;
int live;

// The variables declared __shared__ are all that this library keeps for each thread.
struct Static {
  char* begin = nullptr;
  size_t size = 0;
};
Static static_shared() {
  static thread_local volatile char allocates = 0;  // the thread's variables exist from their first use on
  allocates = 1;
  Static found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        bool here = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
          const auto self = reinterpret_cast<uintptr_t>(&dynamic_shared);
          here |= info->dlpi_phdr[i].p_type == PT_LOAD && begin <= self && self < begin + info->dlpi_phdr[i].p_memsz;
        }
        for (int i = 0; here && i < info->dlpi_phnum; ++i)
          if (info->dlpi_phdr[i].p_type == PT_TLS)
            *static_cast<Static*>(out) = {static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
        return here ? 1 : 0;
      },
      &found);
  return found;
}
Static static_memory;  // of the block that runs

void enter() {
  (*kernel)();
  if (current->products != 0) fail("a thread returns while its warpgroup's products are under way");
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

void fail(const char* what) {
  std::fprintf(stderr, "cuda executor: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

uint32_t shared_address(const void* pointer) {
  const char *at = static_cast<const char*>(pointer), *of_static = static_memory.begin;
  if (at >= shared_start && at < shared_start + shared_bytes)
    return kDynamic + static_cast<uint32_t>(at - shared_start);
  if (at >= of_static && at < of_static + static_memory.size) return kStatic + static_cast<uint32_t>(at - of_static);
  fail("an address that is not in shared memory");
}

char* shared_pointer(uint32_t address, size_t bytes) {
  if (address >= kDynamic && address + bytes <= kDynamic + shared_bytes) return shared_start + (address - kDynamic);
  if (address >= kStatic && address + bytes <= kStatic + static_memory.size)
    return static_memory.begin + (address - kStatic);
  fail("an address beyond the block's shared memory");
}

int& products_under_way() { return current->products; }

void wait_until(const std::function<bool()>& ready) {
  while (!ready()) yield();
  progress = true;
}

static const char* meet(Meeting& meeting, unsigned threads, int& reads, const void* value, int bytes) {
  if (bytes > kValue) fail("an exchange of too many bytes");
  const unsigned place = current->thread % threads;
  const int turn = reads++;
  wait_until([&] { return meeting.done >= turn; });
  if (meeting.done != turn || meeting.here[place]) fail("the lanes of a warp met at different exchanges");
  std::vector<char>& values = meeting.value[turn % 2];
  values.resize(threads * kValue);
  if (bytes) std::memcpy(values.data() + place * kValue, value, bytes);
  meeting.here[place] = true;
  if (++meeting.arrived == static_cast<int>(threads)) {
    meeting.here.assign(kGroup, false);
    meeting.arrived = 0;
    ++meeting.done;
  }
  wait_until([&] { return meeting.done > turn; });
  return values.data();
}

static bool is_first(Meeting& meeting, int reads) {
  const bool first = meeting.asked != reads;
  meeting.asked = reads;
  return first;
}

const char* exchange(unsigned mask, const void* value, int bytes) {
  if (mask != 0xffffffffu) fail("an exchange by a part of a warp");
  return meet(warps[current->thread / 32], 32, current->reads, value, bytes);
}

const char* exchange_in_warpgroup(const void* value, int bytes) {
  if (current->thread / kGroup * kGroup + kGroup > blockDim.x) fail("a warpgroup of fewer than four warps");
  return meet(warpgroups[current->thread / kGroup], kGroup, current->group_reads, value, bytes);
}

bool first_of_warp() { return is_first(warps[current->thread / 32], current->reads); }
bool first_of_warpgroup() { return is_first(warpgroups[current->thread / kGroup], current->group_reads); }

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
  if (shared_address(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
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
  shared_bytes = shared;
  static_memory = static_shared();
  shared_start = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared_memory.data()) + 1023) / 1024 * 1024);
  for (unsigned b = 0; b < grid.x; ++b) {
    std::memset(shared_start, 0xff, shared + kGuard - 1024);  // NaN where nothing was written
    if (static_memory.begin != nullptr) std::memset(static_memory.begin, 0xff, static_memory.size);
    warps.assign((block.x + 31) / 32, Meeting{});
    warpgroups.assign((block.x + kGroup - 1) / kGroup, Meeting{});
    signals_begin_block();
    for (Barrier& each : barriers) each = {};
    live = static_cast<int>(block.x);
    blockIdx = dim3(b, 0, 0);
    for (unsigned t = 0; t < block.x; ++t) {
      Fiber& fiber = *fibers[t];
      fiber.thread = t;
      fiber.started = fiber.done = false;
      fiber.groups.clear();
      fiber.reads = fiber.group_reads = fiber.products = 0;
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
    signals_end_block();
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
EXPORT int executor_chosen_architecture() { return executor::architecture; }
EXPORT void executor_shared(int bytes) { executor::shared_of_block = bytes; }
EXPORT int executor_threads() { return static_cast<int>(blockDim.x); }
