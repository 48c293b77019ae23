// mbarriers and bulk copies, by the PTX ISA manual's rules.
#include "include/executor_signals.h"

#include <vector>

#include "include/cuda_runtime.h"

namespace executor {
namespace {

struct Signal {               // an mbarrier's phase
  int16_t expected, missing;  // arrivals
  int32_t bytes_and_parity;   // bytes that are still missing, times two, and the phase's parity
};
static_assert(sizeof(Signal) == 8);

struct Copy {
  void* to;
  const void* from;
  int bytes;
  uint64_t* signal;
};

constexpr int kMostBytes = (1 << 20) - 1;  // that a phase can wait for

std::vector<Copy> under_way;
bool unready = false;  // a signal was initialised, and copies do not see it yet

Signal read(const uint64_t* signal) {
  if (shared_address(signal) % 8 != 0) fail("an mbarrier that is not aligned to 8 bytes");
  Signal s;
  std::memcpy(&s, signal, sizeof s);
  if (s.expected <= 0 || s.missing < 0 || s.missing > s.expected) fail("an mbarrier that was not initialised");
  return s;
}

void update(uint64_t* signal, int arrivals, int bytes) {
  Signal s = read(signal);
  s.missing = static_cast<int16_t>(s.missing - arrivals);
  s.bytes_and_parity += 2 * bytes;
  const int missing = s.bytes_and_parity >> 1;
  if (s.missing < 0) fail("more arrivals at an mbarrier than its phase expects");
  if (missing > kMostBytes || missing < -kMostBytes) fail("an mbarrier that waits for too many bytes");
  if (s.missing == 0 && missing < 0) fail("more bytes arrived at an mbarrier than its phase expects");
  if (s.missing == 0 && missing == 0) {
    s.missing = s.expected;
    s.bytes_and_parity ^= 1;
  }
  std::memcpy(signal, &s, sizeof s);
}

void land_copies(const uint64_t* signal) {
  for (size_t i = 0; i < under_way.size();) {
    const Copy copy = under_way[i];
    if (copy.signal != signal) {
      ++i;
      continue;
    }
    under_way.erase(under_way.begin() + static_cast<long>(i));
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    update(copy.signal, 0, -copy.bytes);
  }
}

}  // namespace

void signal_init(uint64_t* signal, int arrivals) {
  if (arrivals < 1 || arrivals > 1024) fail("an mbarrier of fewer than 1 or more than 1024 arrivals");
  const Signal s{static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0};
  if (shared_address(signal) % 8 != 0) fail("an mbarrier that is not aligned to 8 bytes");
  std::memcpy(signal, &s, sizeof s);
  unready = true;
}

void signals_ready() { unready = false; }

void signal_arrive(uint64_t* signal, int bytes) { update(signal, 1, bytes); }

void signal_wait(uint64_t* signal, int parity) {
  wait_until([&] {
    land_copies(signal);
    return (read(signal).bytes_and_parity & 1) != parity;
  });
}

void copy_bulk(void* to, const void* from, int bytes, uint64_t* signal) {
  if (bytes <= 0 || bytes % 16 != 0) fail("a bulk copy whose size is no multiple of 16 bytes");
  if (shared_address(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("a bulk copy that is not aligned to 16 bytes");
  shared_pointer(shared_address(to), static_cast<size_t>(bytes));
  read(signal);
  if (unready) fail("a bulk copy with an mbarrier before fence.mbarrier_init");
  under_way.push_back({to, from, bytes, signal});
}

void signals_begin_block() {
  under_way.clear();
  unready = false;
}

void signals_end_block() {
  if (!under_way.empty()) fail("the block has returned and a bulk copy is under way");
}

}  // namespace executor
