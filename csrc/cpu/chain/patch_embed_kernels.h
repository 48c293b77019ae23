// The convolution between stages for one instruction-set level. A token is computed from a patch of x, the pixels under
// the kernel. The patches of a tile of tokens (im2col) are transposed, so that tokens run along vectors, and multiplied
// by weights that are read where they lie.
#pragma once

#include "../core/scratch.h"
#include "../isa/vec.h"
#include "../product/gemm.h"
#include "../product/operands.h"
#include "../product/token_tile.h"
#include "patch_embed.h"
#if PK_LEVEL >= 2
#include "patch_embed_rows.h"
#endif

namespace pk {
namespace {

template <class E, class Op>
struct PatchScratch {
  E* rows;            // [16, k] the patches of 16 tokens, with zeros behind each
  int64_t k;          // elements of a patch, rounded up to whole blocks of the transposition
  packed32* patches;  // [k in words, lanes] the tile's patches
  packed32* y;        // the tile of y's channels of one group
  packed32* panel;    // rows of weights that had to be converted
  float* o;           // [rows of a product, lanes]
  int64_t size;       // words of all of them

  PatchScratch(const PatchEmbedParams& p, packed32* base) {
    ScratchArena arena(base);
    const int64_t words = rounded_up(words_of<Op>(p.patch_size()), 16);
    k = words * Op::kPer;
    rows = reinterpret_cast<E*>(arena.words(16 * words));
    patches = arena.words(words * p.lanes);
    y = arena.words((p.group + 1) * p.lanes);
    panel = arena.words(Op::kRows * words);
    o = arena.floats(Op::kRows * p.lanes);
    size = arena.taken();
  }
};

// Where the patches of up to 16 consecutive tokens begin.
template <class T>
struct Patches {
  const PatchEmbedParams& p;
  const T* image[16];         // the token's sample
  int64_t top[16], left[16];  // the patch's first pixel, which may be outside of the image

  Patches(const PatchEmbedParams& p, int64_t token, int64_t tokens) : p(p) {
    int64_t w = token % p.out_w, h = token / p.out_w % p.out_h;
    const int64_t size = p.height * p.width * p.channels;
    const T* at = static_cast<const T*>(p.x) + token / p.out_w / p.out_h * size;
    for (int64_t i = 0; i < tokens; ++i) {
      image[i] = at, top[i] = h * p.stride - p.padding, left[i] = w * p.stride - p.padding;
      if (++w < p.out_w) continue;
      w = 0;
      if (++h < p.out_h) continue;
      h = 0;
      at += size;
    }
  }
  PK_INLINE const T* at(int64_t i, int64_t h, int64_t w) const { return image[i] + (h * p.width + w) * p.channels; }
};

// Copies each patch to a row of `out`, in the order of the weights, with zeros for pixels outside of the image.
template <class T, class E>
__attribute__((noinline)) void gather_patches(const Patches<T>& patches, int64_t tokens, E* out, int64_t step) {
  const PatchEmbedParams& p = patches.p;
  const int64_t c = p.channels, row = p.kernel_w * c;
  for (int64_t i = 0; i < tokens; ++i, out += step) {
    const int64_t left = patches.left[i], begin = left < 0 ? -left : 0, end = least(p.kernel_w, p.width - left);
    for (int64_t k = 0; k < p.kernel_h; ++k) {
      E* at = out + k * row;
      const int64_t h = patches.top[i] + k;
      const bool inside = h >= 0 && h < p.height && begin < end;
      if (!inside || begin > 0 || end < p.kernel_w) __builtin_memset(at, 0, row * sizeof(E));
      if (inside) convert_row(patches.at(i, h, left + begin), at + begin * c, (end - begin) * c);
    }
  }
}

// The same for pixels that are whole blocks of the transposition, which reads them where they lie. `zeros` is read in
// place of pixels outside of the image.
template <class T>
__attribute__((noinline)) void transpose_patches(const Patches<T>& patches, int64_t tokens, const char* zeros,
                                                 packed32* out, int64_t lanes) {
  const PatchEmbedParams& p = patches.p;
  const int64_t bytes = p.channels * sizeof(T);
  for (int64_t kh = 0; kh < p.kernel_h; ++kh)
    for (int64_t kw = 0; kw < p.kernel_w; ++kw) {
      const char* rows[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t h = patches.top[i] + kh, w = patches.left[i] + kw;
        const bool inside = i < tokens && h >= 0 && h < p.height && w >= 0 && w < p.width;
        rows[i] = inside ? reinterpret_cast<const char*>(patches.at(i, h, w)) : zeros;
      }
      for (int64_t c = 0; c < bytes; c += 64, out += 16 * lanes)
        transpose_block([&](int64_t i) PK_FORCED { return rows[i] + c; }, reinterpret_cast<char*>(out),
                        lanes * sizeof(packed32));
    }
}

// The rows o of a product, with the bias added, into the tile's rows from `row` on.
template <class T>
__attribute__((noinline)) void add_bias(const float* o, const float* bias, int64_t rows, int64_t lanes,
                                        const Tile<T>& y, int64_t row) {
  for (int64_t i = 0; i < rows; i += 2) {
    const vf a = splat(bias[i]), b = splat(bias[i + 1]);
    for (int64_t l = 0; l < lanes; l += kLanes)
      y.put((row + i) / 2, l, {load(o + i * lanes + l) + a, load(o + (i + 1) * lanes + l) + b});
  }
}

template <class T>
void patch_embed_forward(const PatchEmbedParams& p, int64_t first, int64_t count, int64_t first_group,
                         int64_t last_group, packed32* scratch) {
  using Op = typename OperandOf<T>::Op;
  using E = typename Op::Element;
  constexpr int64_t kRows = Op::kRows;
  [[maybe_unused]] const MatrixUnit unit;
  const PatchScratch<E, Op> s(p, scratch);
  const int64_t lanes = rounded_up(count, kLanes), words = s.k / Op::kPer, k = p.patch_size();
  __builtin_memset(s.rows, 0, 16 * words * sizeof(packed32));
  for (int64_t t = 0; t < lanes; t += 16) {
    const int64_t tokens = least(16, count - t);
    const Patches<T> patches(p, first + t, tokens);
    if (__is_same(T, E) && p.channels * sizeof(T) % 64 == 0 && lanes - t >= 16) {
      transpose_patches(patches, tokens, reinterpret_cast<const char*>(s.rows), s.patches + t, lanes);
      continue;
    }
    gather_patches(patches, tokens, s.rows, s.k);
    transpose_words(s.rows, words * sizeof(packed32), s.patches + t, lanes * sizeof(packed32), least(16, lanes - t),
                    words);
  }
  const int64_t image = p.height * p.width * p.channels, begin = (first + count) * image / (p.out_h * p.out_w);
  const int64_t next =
      least(p.batch * image - begin, count * image / (p.out_h * p.out_w));  // elements of the next tile
  prefetch<0>(static_cast<const T*>(p.x) + begin, next * sizeof(T));
  const Tile<T> y{s.y, lanes};
  for (int64_t g = first_group; g < last_group; ++g) {
    const int64_t at = g * p.group, rows = least(p.group, p.out - at);
    for (int64_t r = 0; r < rows; r += kRows) {
      const Panel a = rows_panel<Op>(p.w, at + r, kRows, rows - r, 0, k, s.panel);
      multiply<Op>(a.data, a.row, kRows, s.patches, lanes, lanes, words_of<Op>(k), s.o, lanes, false,
                   prefetch_rows(p.w, at + r + kRows < p.out ? at + r + kRows : 0, 0));
      add_bias(s.o, p.bias + at + r, least(kRows, rows - r), lanes, y, r);
    }
    if (p.token_moments) token_moments(y, rows, count, p.token_moments + 2 * (g * p.tokens + first));
    store_rows(y, rows, count, static_cast<T*>(p.y) + first * p.out + at, p.out);
  }
}

template <class T>
int64_t patch_embed_scratch(const PatchEmbedParams& p) {
  using Op = typename OperandOf<T>::Op;
  return PatchScratch<typename Op::Element, Op>(p, nullptr).size;
}

template <class T>
constexpr PatchEmbedKernels patch_embed_kernels() {
#if PK_LEVEL >= 2
  return {patch_embed_scratch<T>, patch_embed_forward<T>, patch_embed_row_runs<T>, patch_embed_rows_scratch<T>,
          patch_embed_rows<T>};
#else
  return {patch_embed_scratch<T>, patch_embed_forward<T>, nullptr, nullptr, nullptr};
#endif
}

}  // namespace
}  // namespace pk
