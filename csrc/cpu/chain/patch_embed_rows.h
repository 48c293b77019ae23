// The convolution between stages with tokens as rows of products, for the levels from AVX-512 on: windows are read from
// a padded image (patch_embed_image.h), so no patch is gathered or transposed, and y's rows are written as they are
// summed. Weights are packed in every call (patch_embed_weights.h), 32 rows at a time.
//
// A tile is a run of tokens in a row of y; of narrow rows, several of them one below the other, with the pixels between
// them computed in vain.
#pragma once

#include "../core/scratch.h"
#include "../isa/vec.h"
#include "patch_embed.h"
#include "patch_embed_image.h"
#include "patch_embed_weights.h"

namespace pk {
namespace {

template <class T>
struct RowsPlan {
  using Op = typename OperandOf<T>::Op;
  using E = typename Op::Element;
  ConvolutionWeights<T> weights;
  ConvolutionImage<T, E> image;
  int64_t runs, run;  // tiles of a row of y, tokens of one
  int64_t pitch;      // tokens from a row of y to the next, as they are read from the image
  int64_t together;   // rows of y in a tile
  int64_t tile;       // rows of a tile
  int64_t blocks;     // of columns
  int64_t panel;      // blocks that are packed at a time

  RowsPlan(const PatchEmbedParams& p, int64_t rows_of_y, int64_t samples)
      : weights(p),
        image(p, rows_of_y, samples, PK_LEVEL == 4 && p.out_w <= kTileRows / 2),
        blocks((p.out + kColumns - 1) / kColumns) {
    runs = (p.out_w + kTileRows - 1) / kTileRows;
    run = (p.out_w + runs - 1) / runs;
    pitch = image.row / (p.stride * p.channels);
    together = !image.alternate ? 1 : 1 + (kTileRows - run) / pitch;
    tile = (together - 1) * pitch + run;
    const int64_t most = clamped(kPanelBytes / (4 * kColumns * weights.k), 1, blocks);
    panel = (blocks + (blocks + most - 1) / most - 1) / ((blocks + most - 1) / most);
  }

  static int64_t clamped(int64_t n, int64_t low, int64_t high) { return n < low ? low : n > high ? high : n; }

  // Elements behind the image that tiles read: their last rows and steps may be beyond it.
  int64_t beyond(const PatchEmbedParams& p) const {
    return (together * pitch + kTileRows) * p.stride * p.channels + weights.words * Op::kPer;
  }
  // Whether windows are read with more elements than they have, which meet zeros of the weights.
  bool neighbours() const { return weights.row != weights.words * Op::kPer; }
};

// What is copied at a time: whole samples, or of larger ones some rows of y of one sample.
struct RowsExtent {
  int64_t samples, rows;
};

// As much as stays in the cache. Where the weights are packed in parts, it should be much: each part passes over all.
template <class T>
RowsExtent rows_extent(const PatchEmbedParams& p) {
  using E = typename RowsPlan<T>::E;
  const RowsPlan<T> one(p, p.out_h, 1);
  const int64_t bytes = one.image.size(0) * sizeof(E);
  const int64_t most = one.panel < one.blocks ? kImageBytes : kCacheBytes;
  if (bytes <= most) return {least(most / bytes, p.batch), p.out_h};
  const int64_t rows = most * p.out_h / bytes - p.kernel_h / p.stride;
  return {1, rows < 1 ? 1 : rows};
}

template <class T>
struct RowsScratch {
  using E = typename RowsPlan<T>::E;
  E* image;
  packed32 *weights, *planar;
  float* sums;  // two blocks
  E* windows;   // of two tiles, where they are copied
  int64_t* runs_at;
  int64_t size;

  RowsScratch(const PatchEmbedParams& p, packed32* base) {
    ScratchArena arena(base);
    const RowsExtent extent = rows_extent<T>(p);
    const RowsPlan<T> plan(p, extent.rows, extent.samples);
    image = reinterpret_cast<E*>(arena.words(plan.image.size(plan.beyond(p)) * sizeof(E) / 4 + 1));
    weights = arena.words(plan.panel * plan.weights.k * kColumns);
    planar = arena.words(plan.weights.scratch());
    sums = arena.floats(2 * 2 * plan.tile * kColumns);
    windows = reinterpret_cast<E*>(arena.words(plan.neighbours() ? 2 * plan.tile * plan.weights.k : 0));
    runs_at = reinterpret_cast<int64_t*>(arena.words(2 * p.kernel_h));
    size = arena.taken();
  }
};

// Count, mean and M2 of rows of kColumns floats, of which the first `columns` count. Each column is shifted by its
// first value, so that a large mean costs no digits.
struct ShiftedMoments {
  vf shift[2]{}, sum[2]{}, squares[2]{};

  PK_INLINE void add(bool first, vf low, vf high) {
    if (first) shift[0] = low, shift[1] = high;
    const vf a = low - shift[0], b = high - shift[1];
    sum[0] += a, sum[1] += b;
    squares[0] += a * a, squares[1] += b * b;
  }
  PK_INLINE void write(int64_t n, int64_t columns, float* out) const {
    const float some = ((__m512)shift[0])[0];
    vf from_some[2];  // of each column's mean
    for (int i = 0; i < 2; ++i) from_some[i] = (shift[i] - splat(some)) + sum[i] / float(n);
    const float middle = total(from_some[0], from_some[1], columns) / columns;
    vf m2[2];
    for (int i = 0; i < 2; ++i) {
      const vf within = squares[i] - sum[i] * (sum[i] / float(n)), off = from_some[i] - splat(middle);
      m2[i] = (within < 0.0f ? vf{} : within) + off * off * float(n);
    }
    out[0] = n * columns;
    out[1] = some + middle;
    out[2] = total(m2[0], m2[1], columns);
  }

 private:
  static PK_INLINE float total(vf low, vf high, int64_t columns) {
    const __m512 a = _mm512_maskz_mov_ps(lanes_below(least(columns, kLanes)), (__m512)low);
    const int64_t rest = columns > kLanes ? columns - kLanes : 0;
    return _mm512_reduce_add_ps(_mm512_add_ps(a, _mm512_maskz_mov_ps(lanes_below(rest), (__m512)high)));
  }
};

#if PK_LEVEL >= 3
// The same of bfloat16, by dot products and without a shift; `write` returns false where the mean is so large that this
// costs digits. Columns that do not count are zero.
struct QuickMoments {
  __m512 sum{}, squares{};

  PK_INLINE void add(__m512i row) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)_mm512_set1_epi16(0x3f80));
    squares = _mm512_dpbf16_ps(squares, (__m512bh)row, (__m512bh)row);
  }
  PK_INLINE bool write(int64_t n, int64_t columns, float* out) const {
    const float first = _mm512_reduce_add_ps(sum), second = _mm512_reduce_add_ps(squares);
    out[0] = n * columns;
    out[1] = first / out[0];
    out[2] = second - first * out[1];
    return out[2] > second / 16;
  }
};
#endif

// Adds the bias to n rows of sums and writes them to y, whose rows are `step` elements apart, and their moments if
// `moments` is not null.
template <class T>
PK_INLINE void write_tokens(const float* sums, const float* bias, int64_t n, int64_t columns, T* y, int64_t step,
                            float* moments) {
  const vf bias_low = load(bias), bias_high = load(bias + kLanes);
  const auto low = [&](int64_t i) PK_FORCED { return load(sums + i * kColumns) + bias_low; };
  const auto high = [&](int64_t i) PK_FORCED { return load(sums + i * kColumns + kLanes) + bias_high; };
#if PK_LEVEL >= 3
  if constexpr (__is_same(T, bf16)) {
    QuickMoments quick;
    const __mmask32 valid = (__mmask32)((uint64_t{1} << columns) - 1);
    for (int64_t i = 0; i < n; ++i) {
      const __m512i row = (__m512i)_mm512_cvtne2ps_pbh((__m512)high(i), (__m512)low(i));
      _mm512_mask_storeu_epi16(y + i * step, valid, row);
      if (moments) quick.add(_mm512_maskz_mov_epi16(valid, row));
    }
    if (!moments || quick.write(n, columns, moments)) return;
  } else
#endif
  {
    const int64_t first = least(columns, kLanes), second = columns - first;
    for (int64_t i = 0; i < n; ++i) {
      store(y + i * step, low(i), first);
      if (second > 0) store(y + i * step + kLanes, high(i), second);
    }
    if (!moments) return;
  }
  ShiftedMoments exact;
  for (int64_t i = 0; i < n; ++i) exact.add(i == 0, rounded(low(i), y), rounded(high(i), y));
  exact.write(n, columns, moments);
}

// Where the rows of a tile go.
template <class T>
struct TilePlace {
  int64_t lines = 0, count = 0;  // rows of y, tokens of each
  T* y[kTileRows];
  float* moments[kTileRows];  // or null
};

// Rows first_row .. first_row + rows - 1 of y of `samples` samples, channels of blocks first_block .. last_block - 1.
template <class T>
struct RowsPiece {
  using Plan = RowsPlan<T>;
  using Op = typename Plan::Op;
  using E = typename Plan::E;
  const PatchEmbedParams& p;
  const RowsScratch<T>& s;
  Plan plan;
  int64_t sample, samples, first_row, rows;
  bool copied = false;  // whether windows are copied: where a pixel is infinite, its neighbours' would meet it

  RowsPiece(const PatchEmbedParams& p, const RowsScratch<T>& s, int64_t sample, int64_t samples, int64_t first_row,
            int64_t rows)
      : p(p), s(s), plan(p, rows, samples), sample(sample), samples(samples), first_row(first_row), rows(rows) {
    const int64_t beyond = plan.beyond(p);
    if constexpr (__is_same(E, bf16)) {
      if (plan.neighbours())
        copied = plan.image.template fill<true>(p, sample, first_row, s.image, beyond);
      else
        plan.image.template fill<false>(p, sample, first_row, s.image, beyond);
    } else {
      plan.image.template fill<false>(p, sample, first_row, s.image, beyond);
    }
    for (int64_t kh = 0; kh < p.kernel_h; ++kh)
      s.runs_at[kh] = copied ? kh * plan.weights.words * 4 : plan.image.kernel_row(p, kh) * int64_t(sizeof(E));
  }

  int64_t lines() const { return rows * samples; }  // rows of y

  // A tile: its first row of y, counted in lines, which is row h of sample s, and its run. Going on from one to the
  // next spares divisions.
  struct Cursor {
    int64_t line = 0, h = 0, s = 0, run = 0;
  };
  PK_INLINE void next_line(int64_t& h, int64_t& s) const {
    if (plan.image.alternate) {
      if (++s == samples) s = 0, ++h;
    } else {
      if (++h == rows) h = 0, ++s;
    }
  }
  PK_INLINE void next_tile(Cursor& at) const {
    if (++at.run < plan.runs) return;
    at.run = 0;
    at.line += plan.together;
    for (int64_t r = 0; r < plan.together; ++r) next_line(at.h, at.s);
  }

  PK_INLINE const E* window(const Cursor& at) const {
    return s.image + plan.image.window(at.h, at.s) + at.run * plan.run * p.stride * p.channels;
  }

  // Copies the windows of a tile, with zeros behind the elements of each of their rows.
  const E* copy_windows(const E* from, E* out) const {
    const int64_t row = plan.weights.row, whole = plan.weights.words * Op::kPer;
    for (int64_t i = 0; i < plan.tile; ++i)
      for (int64_t kh = 0; kh < p.kernel_h; ++kh) {
        E* to = out + (i * p.kernel_h + kh) * whole;
        __builtin_memset(to + row, 0, (whole - row) * sizeof(E));
        copy_bytes(from + i * p.stride * p.channels + plan.image.kernel_row(p, kh), to, row * sizeof(E));
      }
    return out;
  }

  PK_INLINE void place(const Cursor& at, TilePlace<T>& to) const {
    const int64_t begin = at.run * plan.run;
    to.lines = least(plan.together, lines() - at.line);
    to.count = least(plan.run, p.out_w - begin);
    int64_t h = at.h, b = at.s;
    for (int64_t r = 0; r < to.lines; ++r, next_line(h, b)) {
      const int64_t line = (sample + b) * p.out_h + first_row + h;
      to.y[r] = static_cast<T*>(p.y) + (line * p.out_w + begin) * p.out;
      to.moments[r] = p.run_moments ? p.run_moments + 3 * (line * plan.runs + at.run) * plan.blocks : nullptr;
    }
  }

  PK_INLINE void write_tile(const TilePlace<T>& to, int64_t block, const float* sums) const {
    const int64_t column = block * kColumns;
    for (int64_t r = 0; r < to.lines; ++r)
      write_tokens(sums + r * plan.pitch * kColumns, p.bias + column, to.count, least(kColumns, p.out - column),
                   to.y[r] + column, p.out, to.moments[r] ? to.moments[r] + 3 * block : nullptr);
  }

  void multiply(int64_t first_block, int64_t last_block) const {
    const int64_t block_words = plan.weights.k * kColumns, tile_sums = plan.tile * kColumns;
    TokenRows a{{}, p.stride * p.channels * int64_t(sizeof(E)), s.runs_at, p.kernel_h, plan.weights.words};
    if (copied) a.step = plan.weights.k * 4;
    TilePlace<T> places[2][2];    // of two pairs of tiles in turn
    const float* done = nullptr;  // sums that wait to be written
    const bool stream = 4 * (last_block - first_block) * block_words > kLoopBytes;
    int64_t done_block = 0, done_pair = 0;
    float* sums = s.sums;
    const auto finish = [&]() PK_FORCED {
      if (!done) return;
      write_tile(places[done_pair][0], done_block, done);
      write_tile(places[done_pair][1], done_block, done + tile_sums);
    };
    Cursor at;
    for (int64_t pair = 0; at.line < lines(); pair ^= 1) {
      for (int64_t i = 0; i < 2; ++i, next_tile(at)) {
        place(at, places[pair][i]);
        a.tile[i] = a.tile[0];
        if (at.line >= lines()) continue;  // the last tile has no other: it is multiplied twice
        const E* from = window(at);
        if (copied) from = copy_windows(from, s.windows + i * plan.tile * plan.weights.k * Op::kPer);
        a.tile[i] = reinterpret_cast<const char*>(from);
      }
      for (int64_t block = first_block; block < last_block; ++block) {
        const packed32* w = s.weights + (block - first_block) * block_words;
        if (stream)
          multiply_rows<Op, true>(a, w, plan.tile, sums, finish);
        else
          multiply_rows<Op, false>(a, w, plan.tile, sums, finish);
        done = sums, done_block = block, done_pair = pair;
        sums = s.sums + (sums == s.sums ? 2 * tile_sums : 0);
      }
    }
    finish();
  }
};

// Rows first_row .. last_row - 1 of y, counted in all samples, channels of blocks first_block .. last_block - 1.
template <class T>
void patch_embed_rows(const PatchEmbedParams& p, int64_t first_row, int64_t last_row, int64_t first_block,
                      int64_t last_block, packed32* scratch) {
  const RowsScratch<T> s(p, scratch);
  const RowsPlan<T> plan(p, 1, 1);
  const RowsExtent most = rows_extent<T>(p);
  const int64_t block_words = plan.weights.k * kColumns;
#if PK_LEVEL == 4
  const MatrixUnit unit(token_tiles(plan.tile));
#endif
  int64_t packed = -1;  // the first block of those that are packed
  for (int64_t row = first_row; row < last_row;) {
    const int64_t sample = row / p.out_h, from = row % p.out_h, left = last_row - row;
    const bool whole = from == 0 && left >= p.out_h && most.rows == p.out_h;
    const int64_t samples = whole ? least(most.samples, left / p.out_h) : 1;
    const int64_t rows = whole ? p.out_h : least(least(most.rows, p.out_h - from), left);
    const RowsPiece<T> piece(p, s, sample, samples, from, rows);
    for (int64_t first = first_block; first < last_block; first += plan.panel) {
      const int64_t last = least(first + plan.panel, last_block);
      if (packed != first)
        for (int64_t block = first; block < last; ++block)
          plan.weights.pack(block, s.weights + (block - first) * block_words, s.planar);
      packed = first;
      piece.multiply(first, last);
    }
    row += samples * rows;
  }
}

template <class T>
int64_t patch_embed_rows_scratch(const PatchEmbedParams& p) {
  return RowsScratch<T>(p, nullptr).size;
}

// See PatchEmbedKernels. Weights are packed for few tokens, too, and steps of a product filled up.
template <class T>
int64_t patch_embed_row_runs(const PatchEmbedParams& p) {
  if (p.out_h * p.out_w < kRowsTokens || p.out_w < kRowsWidth) return 0;
  const RowsPlan<T> plan(p, 1, 1);
  return 2 * plan.weights.row < plan.weights.words * RowsPlan<T>::Op::kPer ? 0 : plan.runs;
}

}  // namespace
}  // namespace pk
