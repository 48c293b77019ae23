// The instructions of csrc/cuda/core/ptx.cuh in C++, written from the PTX ISA manual's tables. Products are computed
// whole: a warp's or a warpgroup's fragments are laid out as matrices first, by the table of each operand.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "../../../csrc/cuda/core/device.cuh"
#include "executor_signals.h"

namespace pk {
namespace {

inline unsigned block_index() { return blockIdx.x; }

// A 16-bit number of a register that has two.
template <class T>
inline float half_of(uint32_t packed32, int i) {
  Pack<T, 2> p;
  p.packed32[0] = packed32;
  return element(p, i);
}

template <class T>
inline T read_as(const char* from) {
  T out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

struct Entry {
  int row, column;
};

// "Matrix Fragments for mma.m16n8k16 with floating point type": where a lane's element a_i (i of 8) or c_i (of 4) is,
// and "Register Fragments for wgmma.mma_async.m64nNk16", of which a warp's 16 rows are the same; c_i then goes on with
// the next 8 columns at every fourth i.
inline Entry entry_of_a(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  const bool upper = (0 <= i && i < 2) || (4 <= i && i < 6);
  return {upper ? group : group + 8, thread_in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
inline Entry entry_of_b(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {thread_in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), group};
}
inline Entry entry_of_c(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {i % 4 < 2 ? group : group + 8, i / 4 * 8 + thread_in_group * 2 + (i & 1)};
}

// The product of matrices, each sum in the order of k.
template <int M, int N>
inline void matrix_product(const float (&a)[M][16], const float (&b)[16][N], float (&c)[M][N]) {
  for (int row = 0; row < M; ++row)
    for (int column = 0; column < N; ++column) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      c[row][column] = sum;
    }
}

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static float c[32][16][8];  // of each warp of the block
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const char* all = executor::exchange(kWarp, mine, sizeof mine);
  auto& result = c[threadIdx.x / 32];
  if (executor::first_of_warp()) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const char* of = all + executor::kValue * lane;
      for (int i = 0; i < 8; ++i) {
        const Entry at = entry_of_a(lane, i);
        left[at.row][at.column] = half_of<T>(read_as<uint32_t>(of + i / 2 * 4), i % 2);
      }
      for (int i = 0; i < 4; ++i) {
        const Entry at = entry_of_b(lane, i);
        right[at.row][at.column] = half_of<T>(read_as<uint32_t>(of + 16 + i / 2 * 4), i % 2);
      }
    }
    matrix_product<16, 8>(left, right, result);
  }
  for (int i = 0; i < 4; ++i) {
    const Entry at = entry_of_c(executor_lane(), i);
    d[i] += result[at.row][at.column];
  }
}

// ldmatrix .x4 .trans: lanes 0-7 have the rows' addresses of matrix 0, 8-15 of matrix 1 and so on. Without .trans, lane
// l would get elements 2 (l % 4) and the next one of row l / 4; .trans exchanges rows and columns.
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const uint32_t mine = shared_address(row);
  const char* all = executor::exchange(kWarp, &mine, sizeof mine);
  for (int m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      const auto address = read_as<uint32_t>(all + executor::kValue * (8 * m + r));
      if (address % 16 != 0) executor::fail("ldmatrix: a row that is not aligned to 16 bytes");
      std::memcpy(matrix[r], executor::shared_pointer(address, 16), 16);
    }
    const int r = executor_lane() / 4, c = executor_lane() % 4 * 2;
    out[m] = matrix[c][r] | static_cast<uint32_t>(matrix[c + 1][r]) << 16;
  }
}

inline float exp2_flushed(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

inline void copy_async(void* to, const void* from, bool exists) { executor::copy_async(to, from, exists); }
inline void copy_commit() { executor::copy_commit(); }
template <int N>
inline void copy_wait() {
  executor::copy_wait(N);
}

// ---- Hopper: products of a warpgroup. They land when they are waited for: until then results are NaN, and operands
// are read when the product lands.

// "Matrix Descriptor Format", and the canonical layout of a K-major matrix without swizzling, in elements of 16 bits:
// ((8, m), (8, 2)) : ((8, SBO), (1, LBO)).
class Descriptor {
 public:
  explicit Descriptor(uint64_t bits) : start_(field(bits, 0)), leading_(field(bits, 16)), stride_(field(bits, 32)) {
    if (bits >> 62 != 0) executor::fail("wgmma: a descriptor with swizzling");
    if ((bits >> 49 & 7) != 0) executor::fail("wgmma: a descriptor with a base offset");
    if ((bits & ~(uint64_t{0x3fff} | uint64_t{0x3fff} << 16 | uint64_t{0x3fff} << 32)) != 0)
      executor::fail("wgmma: a descriptor with reserved bits");
  }
  // Element [k][n] of B.
  uint16_t at(int k, int n) const {
    const int rows = n % 8 * 16 + n / 8 * stride_, elements = k % 8 * 2 + k / 8 * leading_;
    return read_as<uint16_t>(executor::shared_pointer(static_cast<uint32_t>(start_ + rows + elements), 2));
  }

 private:
  static int field(uint64_t bits, int first) { return static_cast<int>(bits >> first & 0x3fff) << 4; }
  int start_, leading_, stride_;
};

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
  uint64_t executed = 0;  // a digest of the warpgroup's instructions: it must be the same in all its threads
  bool fenced = false;    // wgmma.fence since registers may have been written

  void execute(uint64_t instruction) { executed = executed * 0x9e3779b97f4a7c15 + instruction; }

  static Products& mine() {
    static Products of[1024];
    return of[threadIdx.x];
  }
};

template <class T, int N>
inline void land_product(const Products::Product& p, float* d) {
  static float c[8][64][N];  // of each warpgroup of the block
  const char* all = executor::exchange_in_warpgroup(p.a, 16);
  auto& result = c[threadIdx.x / 128];
  if (executor::first_of_warpgroup()) {
    float left[64][16], right[16][N];
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < 8; ++i) {
        const Entry at = entry_of_a(thread % 32, i);
        const auto word = read_as<uint32_t>(all + executor::kValue * thread + i / 2 * 4);
        left[thread / 32 * 16 + at.row][at.column] = half_of<T>(word, i % 2);
      }
    const Descriptor b(p.b);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < N; ++n) right[k][n] = half_of<T>(b.at(k, n), 0);
    matrix_product<64, N>(left, right, result);
  }
  for (int i = 0; i < N / 2; ++i) {
    const Entry at = entry_of_c(executor_lane(), i);
    const float value = result[threadIdx.x % 128 / 32 * 16 + at.row][at.column];
    d[i] = p.add ? d[i] + value : value;
  }
}

template <class T, int N>
inline void multiply_async(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  Products& mine = Products::mine();
  if (!mine.fenced) executor::fail("wgmma: a product without a fence since the last wait");
  mine.execute(b);
  mine.execute(N + add);
  Products::Accumulator& accumulator = mine.accumulators[d[0]];
  if (accumulator.under_way++ == 0) {
    accumulator.value.assign(d[0], d[0] + N / 2);
    std::fill(d[0], d[0] + N / 2, NAN);
  }
  mine.groups.back().push_back({land_product<T, N>, d[0], a, b, add});
  ++executor::products_under_way();
}

inline void products_begin() {
  Products::mine().execute(1);
  Products::mine().fenced = true;
}
inline void products_commit() {
  Products::mine().execute(2);
  Products::mine().groups.emplace_back();
}
template <int ROWS>
inline void computed(float (&)[ROWS][4]) {}
template <int ROWS>
inline void computed_here(float (&)[ROWS][4], bool, void*) {}

template <int UNDER_WAY, int ROWS>
inline void products_wait(float (&)[ROWS][4]) {
  Products& mine = Products::mine();
  mine.execute(3 + UNDER_WAY);
  mine.fenced = false;
  const char* all = executor::exchange_in_warpgroup(&mine.executed, sizeof mine.executed);
  for (int thread = 0; thread < 128; ++thread)
    if (read_as<uint64_t>(all + executor::kValue * thread) != mine.executed)
      executor::fail("wgmma: the threads of a warpgroup executed different instructions");
  while (static_cast<int>(mine.groups.size()) > UNDER_WAY + 1) {
    for (const Products::Product& product : mine.groups.front()) {
      Products::Accumulator& accumulator = mine.accumulators[product.d];
      product.land(product, accumulator.value.data());
      if (--accumulator.under_way == 0) std::copy(accumulator.value.begin(), accumulator.value.end(), product.d);
      --executor::products_under_way();
    }
    mine.groups.erase(mine.groups.begin());
  }
}

inline void signal_init(uint64_t* signal, int arrivals) { executor::signal_init(signal, arrivals); }
inline void signals_ready() { executor::signals_ready(); }
inline void signal_arrive(uint64_t* signal) { executor::signal_arrive(signal, 0); }
inline void signal_wait(uint64_t* signal, int parity) { executor::signal_wait(signal, parity); }
inline void signal_arrive_expecting(uint64_t* signal, int bytes) { executor::signal_arrive(signal, bytes); }
inline void start_copy_bulk(void* to, const void* from, int bytes, uint64_t* signal) {
  executor::copy_bulk(to, from, bytes, signal);
}

inline void group_barrier(int id, int threads) { executor::barrier(id, threads); }

template <int N>
inline void give_registers() {}
template <int N>
inline void take_registers() {}

}  // namespace
}  // namespace pk
