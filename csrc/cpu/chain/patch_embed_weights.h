// The weights of a convolution as blocks of packed words, for one instruction-set level: [k words][kColumns], where a
// column is a row of the weight and k runs along the rows of the kernel, each filled up with zeros to whole steps.
#pragma once

#include "../isa/vec.h"
#include "../product/operands.h"
#include "../product/row_tiles.h"
#include "../product/token_tile.h"
#include "patch_embed.h"

namespace pk {
namespace {

template <class T>
struct ConvolutionWeights {
  using Op = typename OperandOf<T>::Op;
  using E = typename Op::Element;
  static constexpr int64_t kPer = Op::kPer;
  const PatchEmbedParams& p;
  int64_t row;    // elements that one row of the kernel meets
  int64_t words;  // of them, in whole steps
  int64_t k;      // words of a column

  explicit ConvolutionWeights(const PatchEmbedParams& p)
      : p(p), row(p.kernel_w * p.channels), words(words_of<Op>(row)), k(words * p.kernel_h) {}

  // Words that `pack` needs beside its output.
  int64_t scratch() const { return p.planar_w ? (p.patch_size() + kPer - 1) / kPer * 16 : 0; }

  // Block `block` of columns to `out`.
  void pack(int64_t block, packed32* out, packed32* scratch) const {
    for (int64_t half = 0; half < kColumns / 16; ++half) {
      const int64_t first = block * kColumns + half * 16, valid = p.out > first ? least(16, p.out - first) : 0;
      if (p.planar_w) {
        transpose(first, valid, 0, p.patch_size(), [&](int64_t i) PK_FORCED { return scratch + i * 16; }, 16);
        gather_planar(scratch, out, half);
        continue;
      }
      for (int64_t kh = 0; kh < p.kernel_h; ++kh) {
        const auto at = [&](int64_t i) PK_FORCED { return out + packed_at(kh * words + i, half); };
        transpose(first, valid, kh * row, row, at, kWordStep);
        for (int64_t i = (row + kPer - 1) / kPer; i < words; ++i) clear_words(at(i), 16);
      }
    }
  }

 private:
  // at(i)[r] = word i of elements begin .. begin + n - 1 of the weight's row `first` + r, 16 rows of which `valid` are
  // there; a last word that is not whole has a zero. Words i of 16, from a multiple of 16 on, are `step` words apart.
  template <class At>
  PK_INLINE void transpose(int64_t first, int64_t valid, int64_t begin, int64_t n, const At& at, int64_t step) const {
    const T* w = static_cast<const T*>(p.w.data) + first * p.w.step + begin;
    constexpr int64_t kBlock = 16 * kPer;
    for (int64_t i = 0; i < n; i += kBlock) {
      packed32* const out = at(i / kPer);
      if (__is_same(T, E) && valid == 16 && n - i >= kBlock) {
        transpose_block([&](int64_t r) PK_FORCED { return reinterpret_cast<const char*>(w + r * p.w.step + i); },
                        reinterpret_cast<char*>(out), step * sizeof(packed32));
        continue;
      }
      packed32 rows[16][16] = {}, block[16][16];
      const int64_t count = least(kBlock, n - i);
      for (int64_t r = 0; r < valid; ++r) convert_row(w + r * p.w.step + i, reinterpret_cast<E*>(rows[r]), count);
      transpose_block([&](int64_t r) PK_FORCED { return reinterpret_cast<const char*>(rows[r]); },
                      reinterpret_cast<char*>(block), sizeof block[0]);
      for (int64_t j = 0; j < (count + kPer - 1) / kPer; ++j)
        __builtin_memcpy(out + j * step, block[j], sizeof block[j]);
    }
  }

  // Of the transposed words of rows [C][kernel_h][kernel_w], those of rows [kernel_h][kernel_w][C].
  void gather_planar(const packed32* planar, packed32* out, int64_t half) const {
    const int64_t taps = p.kernel_h * p.kernel_w;
    for (int64_t kh = 0; kh < p.kernel_h; ++kh) {
      int64_t tap = kh * p.kernel_w, c = 0;  // of the next element
      const auto next = [&]() PK_FORCED {
        const int64_t at = c * taps + tap;
        if (++c == p.channels) c = 0, ++tap;
        return at;
      };
      for (int64_t i = 0; i < words; ++i) {
        packed32* const to = out + packed_at(kh * words + i, half);
        const int64_t left = row - i * kPer;
        if (left <= 0)
          clear_words(to, 16);
        else if constexpr (kPer == 1)
          __builtin_memcpy(to, planar + next() * 16, 64);
        else {
          const int64_t low = next();
          merge(planar, low, left > 1 ? next() : -1, to);
        }
      }
    }
  }

  // Words of element `low` and element `high`, or 0 for -1.
  static PK_INLINE void merge(const packed32* planar, int64_t low, int64_t high, packed32* out) {
    vu a = read<vu>(planar + low / 2 * 16), b = high < 0 ? vu{} : read<vu>(planar + high / 2 * 16);
    a = low % 2 ? a >> 16 : a & 0xffffu;
    b = high % 2 ? b & 0xffff0000u : b << 16;
    write(out, a | b);
  }
};

}  // namespace
}  // namespace pk
