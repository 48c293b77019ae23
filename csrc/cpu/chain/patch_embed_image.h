// A copy of samples from which the windows of a convolution are read where they lie, for one instruction-set level:
// with the padding, in the elements of the products, and such that the windows of tokens that are neighbours in a row
// or in a column of y are each a constant step apart.
//
// Padded rows of pixels are sorted by their remainder modulo the stride, so the rows that one row of the kernel meets
// are neighbours. Samples lie one behind the other, or their rows alternate: row 0 of each sample, then row 1.
#pragma once

#include "../isa/vec.h"
#include "../product/operands.h"
#include "patch_embed.h"

namespace pk {
namespace {

// Copies n elements and returns whether one of them is infinite or NaN.
PK_INLINE bool copy_checked(const bf16* from, bf16* to, int64_t n) {
  __m512i largest{};  // magnitudes, times two
  const auto part = [&](int64_t count) PK_FORCED {
    const __mmask32 mask = (__mmask32)((uint64_t{1} << count) - 1);
    const __m512i v = _mm512_maskz_loadu_epi16(mask, from);
    _mm512_mask_storeu_epi16(to, mask, v);
    largest = _mm512_max_epu16(largest, _mm512_add_epi16(v, v));
    from += count, to += count, n -= count;
  };
  part(least(n, 32 - reinterpret_cast<uintptr_t>(to) / 2 % 32));  // stores that cross cache lines are slow
  for (; n >= 32; from += 32, to += 32, n -= 32) {
    const __m512i v = read<__m512i>(from);
    write(to, v);
    largest = _mm512_max_epu16(largest, _mm512_add_epi16(v, v));
  }
  part(n);
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16((short)0xff00)) != 0;
}

template <class T, class E>
struct ConvolutionImage {
  int64_t phases;   // remainders modulo the stride that rows of the kernel meet
  int64_t row;      // elements of a padded row of pixels, whole steps of the stride
  int64_t rows;     // rows of one remainder and one sample that rows_of_y rows of y take
  int64_t samples;  // that lie in the image
  bool alternate;   // whether the samples' rows alternate

  ConvolutionImage(const PatchEmbedParams& p, int64_t rows_of_y, int64_t samples, bool alternate)
      : samples(samples), alternate(alternate) {
    phases = least(p.stride, p.kernel_h);
    row = rounded_up((p.out_w - 1) * p.stride + p.kernel_w, p.stride) * p.channels;
    rows = ((rows_of_y - 1) * p.stride + p.kernel_h + p.stride - 1) / p.stride;
  }

  // Elements; `beyond` the last pixel so many more are read.
  int64_t size(int64_t beyond) const { return phases * rows * samples * row + beyond; }

  // Elements from the windows' first row to that of the kernel's row kh.
  int64_t kernel_row(const PatchEmbedParams& p, int64_t kh) const {
    return (kh % p.stride * rows + kh / p.stride) * (alternate ? samples : 1) * row;
  }
  // Elements before the windows of row h of y, and of sample s, in a row of tokens.
  int64_t window(int64_t h, int64_t s) const { return (alternate ? h * samples + s : s * phases * rows + h) * row; }

  // Copies what rows first_row and following of y are computed from, of sample `sample` and those after it. Returns
  // whether a pixel is infinite or NaN, if CHECK.
  template <bool CHECK>
  bool fill(const PatchEmbedParams& p, int64_t sample, int64_t first_row, E* image, int64_t beyond) const {
    const int64_t pixels = p.width * p.channels, left = least(p.padding * p.channels, row);
    const int64_t inside = least(pixels, row - left);
    bool infinite = false;
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t i = 0; i < phases * rows; ++i) {
        const int64_t h = (first_row + i % rows) * p.stride + i / rows - p.padding;
        E* const to = image + (alternate ? i * samples + s : s * phases * rows + i) * row;
        if (h < 0 || h >= p.height) {
          __builtin_memset(to, 0, row * sizeof(E));
          continue;
        }
        const T* from = static_cast<const T*>(p.x) + ((sample + s) * p.height + h) * pixels;
        __builtin_memset(to, 0, left * sizeof(E));
        if constexpr (CHECK)
          infinite |= copy_checked(from, to + left, inside);
        else if constexpr (__is_same(T, E))
          __builtin_memcpy(to + left, from, inside * sizeof(E));
        else
          convert_row(from, to + left, inside);
        __builtin_memset(to + left + inside, 0, (row - left - inside) * sizeof(E));
      }
    __builtin_memset(image + size(0), 0, beyond * sizeof(E));
    return infinite;
  }
};

}  // namespace
}  // namespace pk
