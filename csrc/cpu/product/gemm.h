// Matrix products for one instruction-set level, out[r][l] (+)= sum_k a[r][k] b[k][l], of operands in words of 32 bits:
// a word is a float, or a pair of bfloat16 that are neighbours along k.
//
// l runs along vectors, r over scalars that are broadcast: with tokens along l, weights are read as they lie in memory.
#pragma once

#include "../isa/vec.h"
#include "prefetch.h"

#if PK_LEVEL == 4
#include "amx.h"
#else

namespace pk {
namespace {

struct MatrixUnit {};  // nothing to set up at the other levels

constexpr int kBlockRows = PK_LEVEL >= 2 ? 8 : 4;  // kBlockRows * kBlockVecs sums and kBlockVecs vectors of b are
constexpr int kBlockVecs = 3;                      // in registers

struct Floats {
  static constexpr int kPer = 1;            // elements of a word
  static constexpr int kStep = 1;           // k is a multiple of it,
  static constexpr int kRows = kBlockRows;  // and the rows of that
  using Element = float;
  static PK_INLINE vf multiply_add(vf sum, packed32 a, vu b) {
    return sum + splat(__builtin_bit_cast(float, a)) * (vf)b;
  }
};

#if PK_LEVEL == 3
struct Bf16Pairs {
  static constexpr int kPer = 2;
  static constexpr int kStep = 1;
  static constexpr int kRows = kBlockRows;
  using Element = bf16;
  static PK_INLINE vf multiply_add(vf sum, packed32 a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
};
#endif

template <class Op, int VECS>
__attribute__((noinline)) void multiply_block(const packed32* a, int64_t a_row, const packed32* b, int64_t b_row,
                                              int64_t k, float* out, int64_t out_row, bool add,
                                              const PrefetchRows& ahead) {
  vf sum[kBlockRows][VECS];
#pragma GCC unroll 8
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) sum[r][v] = vf{};
  for (int64_t line = 0; line < k; line += 16) {
    ahead.fetch(line, kBlockRows);
    for (int64_t i = line; i < k && i < line + 16; ++i) {
      vu column[VECS];
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) column[v] = read<vu>(b + i * b_row + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) sum[r][v] = Op::multiply_add(sum[r][v], a[r * a_row + i], column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      float* at = out + r * out_row + v * kLanes;
      store(at, add ? sum[r][v] + load(at) : sum[r][v]);
    }
}

template <class Op>
PK_INLINE void multiply_vecs(int64_t vecs, const packed32* a, int64_t a_row, const packed32* b, int64_t b_row,
                             int64_t k, float* out, int64_t out_row, bool add, const PrefetchRows& ahead) {
  if (vecs == 1) return multiply_block<Op, 1>(a, a_row, b, b_row, k, out, out_row, add, ahead);
  if (vecs == 2) return multiply_block<Op, 2>(a, a_row, b, b_row, k, out, out_row, add, ahead);
  multiply_block<Op, kBlockVecs>(a, a_row, b, b_row, k, out, out_row, add, ahead);
}

// A sum of more words is one of sums of so many: float32's rounding errors grow with the longest.
constexpr int64_t kSumWords = 256;

// `rows` (a multiple of Op::kRows) of out, `lanes` (a multiple of kLanes) wide; k counts words. `ahead` are the rows of
// a that another call will multiply, Op::kRows at the most.
template <class Op>
void multiply(const packed32* a, int64_t a_row, int64_t rows, const packed32* b, int64_t b_row, int64_t lanes,
              int64_t k, float* out, int64_t out_row, bool add, PrefetchRows ahead = {}) {
  for (int64_t left = lanes / kLanes; left > 0; ahead = {}) {
    const int64_t vecs = left == 4 ? 2 : left < kBlockVecs ? left : kBlockVecs;
    for (int64_t i = 0; i < k; i += kSumWords)
      for (int64_t r = 0; r < rows; r += kBlockRows)
        multiply_vecs<Op>(vecs, a + r * a_row + i, a_row, b + i * b_row, b_row, k - i < kSumWords ? k - i : kSumWords,
                          out + r * out_row, out_row, add || i > 0, ahead.after(i));
    b += vecs * kLanes;
    out += vecs * kLanes;
    left -= vecs;
  }
}

}  // namespace
}  // namespace pk
#endif
