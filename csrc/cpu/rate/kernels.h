// rate.h's kernels for one instruction-set level: the products' own instructions, and nothing around them.
#pragma once

#include "../product/gemm.h"

namespace pk {
namespace {

#if PK_LEVEL == 4

constexpr int64_t kRateSteps = 8, kTileWords = 256;  // steps of a pass; each takes two tiles of either block

// Four products for four loads, all of which hit the L1 cache: then the loads cost no time.
float run_tiles(const uint32_t* operands, int64_t passes) {
  const uint32_t *a = operands, *b = operands + kRateWords / 2;
  static_assert(2 * kRateSteps * kTileWords == kRateWords / 2);
  alignas(64) float sums[kTileWords];
  const MatrixUnit unit;
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t i = 0; i < passes * kRateSteps; ++i) {
    const int64_t at = i % kRateSteps * 2 * kTileWords;
    tile_load<4>(a + at, 64);
    tile_load<6>(b + at, 64);
    tile_multiply_add<0, 4, 6>();
    tile_load<5>(a + at + kTileWords, 64);
    tile_multiply_add<1, 5, 6>();
    tile_load<7>(b + at + kTileWords, 64);
    tile_multiply_add<2, 4, 7>();
    tile_multiply_add<3, 5, 7>();
  }
  tile_store<0>(sums, 64);
  return sums[0];
}

constexpr RateKernel rate_of_tiles() { return {run_tiles, kRateSteps * 4 * 2 * 16 * 16 * 32}; }

#else

constexpr int64_t kRateSteps = 64;  // of a pass; each takes a word of kBlockRows rows and kBlockVecs vectors

template <class Op>
__attribute__((noinline)) float run_vectors(const uint32_t* operands, int64_t passes) {
  const uint32_t *a = operands, *b = operands + kBlockRows * kRateSteps;
  static_assert((kBlockRows + kBlockVecs * kLanes) * kRateSteps <= kRateWords);
  vf sum[kBlockRows][kBlockVecs] = {};
  for (int64_t pass = 0; pass < passes; ++pass) {
    asm volatile("" : : : "memory");  // else the compiler may see that every pass computes the same
    for (int64_t i = 0; i < kRateSteps; ++i) {
      vu column[kBlockVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVecs; ++v) column[v] = read<vu>(b + (i * kBlockVecs + v) * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kBlockVecs; ++v) sum[r][v] = Op::multiply_add(sum[r][v], a[i * kBlockRows + r], column[v]);
    }
  }
  vf total{};
  for (int r = 0; r < kBlockRows; ++r)
    for (int v = 0; v < kBlockVecs; ++v) total += sum[r][v];
  return hsum(total);
}

template <class Op>
constexpr RateKernel rate_of_vectors() {
  return {run_vectors<Op>, kRateSteps * kBlockRows * kBlockVecs * kLanes * 2 * Op::kPer};
}

#endif

}  // namespace
}  // namespace pk
