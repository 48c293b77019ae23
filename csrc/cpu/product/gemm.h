// Matrix products for one instruction-set level: out[r][l] = sum_k a[r][k] b[k][l], or that added to out. Operands are
// words of 32 bits: a float, or a pair of bfloat16 that are neighbours along k.
//
// Vectors run along l, and a's words are broadcast. So with tokens along l, the rows of a are rows of a weight, which
// are read as they lie in memory.
#pragma once

#include "../isa/vec.h"
#include "prefetch.h"

#if PK_LEVEL == 4
#include "amx.h"
#else

namespace pk {
namespace {

struct MatrixUnit {};  // there is nothing to set up (amx.h has more)

// A block of `out` as large as the registers allow: they hold kBlockRows * kBlockVecs sums and kBlockVecs vectors of b.
constexpr int kBlockRows = PK_LEVEL >= 2 ? 8 : 4, kBlockVecs = 3;

// What a product's operands are: this or Bf16Pairs.
struct Floats {
  static constexpr int kPer = 1;         // elements of a word
  static constexpr int kStep = 1;        // the words of a row of a are a multiple of it
  static constexpr int kRows = 32;       // the rows of a are a multiple of it
  static constexpr int kSumWords = 128;  // longer sums are made of sums of so many words
  using Element = float;
  static PK_INLINE vf multiply_add(vf sum, packed32 a, vu b) {
    return sum + splat(__builtin_bit_cast(float, a)) * (vf)b;
  }
  static PK_INLINE vf multiply_add(vf sum, vu a, vu b) { return sum + (vf)a * (vf)b; }
};

#if PK_LEVEL == 3
struct Bf16Pairs {
  static constexpr int kPer = 2;
  static constexpr int kStep = 1;
  static constexpr int kRows = kBlockRows;
  static constexpr int kSumWords = 256;
  using Element = bf16;
  static PK_INLINE vf multiply_add(vf sum, packed32 a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
  static PK_INLINE vf multiply_add(vf sum, vu a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class Op, int VECS>
__attribute__((noinline)) void multiply_block(const packed32* a, int64_t a_row, const packed32* b, int64_t b_row,
                                              int64_t k, float* out, int64_t out_row, bool add,
                                              const PrefetchRows& next) {
  vf sum[kBlockRows][VECS];
#pragma GCC unroll 8
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) sum[r][v] = vf{};
  for (int64_t line = 0; line < k; line += 16) {
    next.fetch(line, kBlockRows);
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
                             int64_t k, float* out, int64_t out_row, bool add, const PrefetchRows& next) {
  if (vecs == 1) return multiply_block<Op, 1>(a, a_row, b, b_row, k, out, out_row, add, next);
  if (vecs == 2) return multiply_block<Op, 2>(a, a_row, b, b_row, k, out, out_row, add, next);
  multiply_block<Op, kBlockVecs>(a, a_row, b, b_row, k, out, out_row, add, next);
}

// a: [rows, k] words, rows `a_row` words apart; rows is a multiple of Op::kRows. b: [k, lanes] words, rows `b_row`
// apart; lanes is a multiple of kLanes. out: [rows, lanes] floats, rows `out_row` apart; `add` adds to what is there.
// `next`: rows that another call will multiply, Op::kRows at the most, which are prefetched.
// Sums are made of sums of Op::kSumWords words, since rounding errors grow with the length of a running sum; of Floats,
// so many rows of b, kBlockVecs vectors wide, stay in the L1 cache while all rows of a are multiplied by them.
template <class Op>
void multiply(const packed32* a, int64_t a_row, int64_t rows, const packed32* b, int64_t b_row, int64_t lanes,
              int64_t k, float* out, int64_t out_row, bool add, PrefetchRows next = {}) {
  for (int64_t left = lanes / kLanes; left > 0; next = {}) {
    const int64_t vecs = left == 4 ? 2 : left < kBlockVecs ? left : kBlockVecs;
    for (int64_t i = 0; i < k; i += Op::kSumWords)
      for (int64_t r = 0; r < rows; r += kBlockRows)
        multiply_vecs<Op>(vecs, a + r * a_row + i, a_row, b + i * b_row, b_row, least(Op::kSumWords, k - i),
                          out + r * out_row, out_row, add || i > 0, next.after(r, i));
    b += vecs * kLanes;
    out += vecs * kLanes;
    left -= vecs;
  }
}

}  // namespace
}  // namespace pk
#endif
