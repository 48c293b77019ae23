// The functions of csrc/cuda/core/ptx.cuh in C++: what PTX says of a warp's fragments, computed lane by lane.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "../../../csrc/cuda/core/device.cuh"

namespace pk {
namespace {

inline unsigned block_index() { return blockIdx.x; }

template <class T>
inline float half_of(uint32_t packed32, int i) {
  Pack<T, 2> p;
  p.packed32[0] = packed32;
  return element(p, i);
}

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const char* all = executor::exchange(kWarp, mine, sizeof mine);
  const auto word = [&](int lane, int i) {
    uint32_t out;
    std::memcpy(&out, all + 128 * lane + 4 * i, 4);
    return out;
  };
  const int g = executor_lane() / 4, q = executor_lane() % 4;
  for (int k = 0; k < 16; ++k) {
    const int from = k % 8 / 2, high = k / 8, part = k % 2;
    for (int i = 0; i < 4; ++i) {
      const float left = half_of<T>(word(g * 4 + from, i / 2 + 2 * high), part);
      d[i] += left * half_of<T>(word((2 * q + i % 2) * 4 + from, 4 + high), part);
    }
  }
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const char* all = executor::exchange(kWarp, &row, sizeof row);
  const int g = executor_lane() / 4, q = executor_lane() % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t part[2];
    for (int i = 0; i < 2; ++i) {
      const char* from;
      std::memcpy(&from, all + 128 * (8 * m + 2 * q + i), sizeof from);
      std::memcpy(&part[i], from + 2 * g, 2);
    }
    std::memcpy(&out[m], part, 4);
  }
}

inline float exp2_flushed(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

inline void copy_async(void* to, const void* from, bool exists) { executor::copy_async(to, from, exists); }
inline void copy_commit() { executor::copy_commit(); }
template <int N>
inline void copy_wait() {
  executor::copy_wait(N);
}

// ---- Hopper. Products and bulk copies land when they are waited for: until then results are NaN, operands are read
// when the product lands, and shared memory has what it had.

inline uint64_t operand_descriptor(const void* pointer, int k_stride) {
  const uint64_t address = static_cast<const char*>(pointer) - executor::dynamic_shared();
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(k_stride >> 4) << 16 | uint64_t{128 >> 4} << 32;
}

// Of a lane: its products under way, by group, and the accumulators that they have.
struct Products {
  struct Product {
    void (*land)(const Product&, float*);
    float* d;
    const uint32_t* a;
    uint64_t b;
    bool add;
  };
  struct Accumulator {
    std::vector<float> value;
    int under_way = 0;
  };
  std::vector<std::vector<Product>> groups{1};
  std::map<float*, Accumulator> accumulators;

  static Products& mine() {
    static Products of[1024];
    return of[threadIdx.x];
  }
};

template <class T, int N>
inline void land_product(const Products::Product& p, float* d) {
  const char* all = executor::exchange(kWarp, p.a, 16);
  const char* base = executor::dynamic_shared() + (p.b & 0x3fff) * 16;
  const int along_k = static_cast<int>(p.b >> 16 & 0x3fff) * 16, along_n = static_cast<int>(p.b >> 32 & 0x3fff) * 16;
  const int g = executor_lane() / 4, q = executor_lane() % 4;
  for (int j = 0; j < N / 8; ++j)
    for (int i = 0; i < 4; ++i) {
      float sum = p.add ? d[4 * j + i] : 0.0f;
      for (int k = 0; k < 16; ++k) {
        uint32_t left, right = 0;
        std::memcpy(&left, all + 128 * (4 * g + k % 8 / 2) + 4 * (i / 2 + k / 8 * 2), 4);
        std::memcpy(&right, base + k / 8 * along_k + j * along_n + (2 * q + i % 2) * 16 + k % 8 * 2, 2);
        sum += half_of<T>(left, k % 2) * half_of<T>(right, 0);
      }
      d[4 * j + i] = sum;
    }
}

template <class T, int N>
inline void multiply_async(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  Products& mine = Products::mine();
  Products::Accumulator& accumulator = mine.accumulators[d[0]];
  if (accumulator.under_way++ == 0) {
    accumulator.value.assign(d[0], d[0] + N / 2);
    std::fill(d[0], d[0] + N / 2, NAN);
  }
  mine.groups.back().push_back({land_product<T, N>, d[0], a, b, add});
}

inline void products_begin() {}
inline void products_commit() { Products::mine().groups.emplace_back(); }
template <int ROWS>
inline void computed(float (&)[ROWS][4]) {}
template <int UNDER_WAY, int ROWS>
inline void products_wait(float (&)[ROWS][4]) {
  Products& mine = Products::mine();
  while (static_cast<int>(mine.groups.size()) > UNDER_WAY + 1) {
    for (const Products::Product& product : mine.groups.front()) {
      Products::Accumulator& accumulator = mine.accumulators[product.d];
      product.land(product, accumulator.value.data());
      if (--accumulator.under_way == 0) std::copy(accumulator.value.begin(), accumulator.value.end(), product.d);
    }
    mine.groups.erase(mine.groups.begin());
  }
  __syncwarp();  // no lane is ahead of the products of its warp
}

// mbarrier: arrivals expected and still missing, bytes still missing, the phase's parity.
struct Signal {
  int16_t expected, missing;
  int32_t bytes_and_parity;
};
static_assert(sizeof(Signal) == 8);

inline void signal_update(uint64_t* signal, int arrivals, int bytes) {
  Signal s;
  std::memcpy(&s, signal, sizeof s);
  s.missing = static_cast<int16_t>(s.missing - arrivals);
  s.bytes_and_parity += 2 * bytes;
  if (s.missing == 0 && s.bytes_and_parity / 2 == 0) {
    s.missing = s.expected;
    s.bytes_and_parity ^= 1;
  }
  std::memcpy(signal, &s, sizeof s);
}

inline void signal_init(uint64_t* signal, int arrivals) {
  const Signal s{static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0};
  std::memcpy(signal, &s, sizeof s);
}
inline void signals_ready() {}
inline void signal_arrive(uint64_t* signal) { signal_update(signal, 1, 0); }

struct BulkCopy {
  void* to;
  const void* from;
  int bytes;
  uint64_t* signal;
};
inline std::vector<BulkCopy>& bulk_copies() {
  static std::vector<BulkCopy> under_way;
  return under_way;
}

inline void signal_wait(uint64_t* signal, int parity) {
  executor::wait_until([&] {
    auto& copies = bulk_copies();
    for (size_t i = 0; i < copies.size();) {
      const BulkCopy copy = copies[i];
      if (copy.signal != signal) {
        ++i;
        continue;
      }
      copies.erase(copies.begin() + static_cast<long>(i));
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
      signal_update(signal, 0, -copy.bytes);
    }
    Signal s;
    std::memcpy(&s, signal, sizeof s);
    return (s.bytes_and_parity & 1) != parity;
  });
}
inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* signal) {
  bulk_copies().push_back({to, from, bytes, signal});
  signal_update(signal, 1, bytes);
}
inline void group_barrier(int id, int threads) { executor::barrier(id, threads); }

template <int N>
inline void give_registers() {}
template <int N>
inline void take_registers() {}

}  // namespace
}  // namespace pk
