// Tiles of tokens for one instruction-set level: tile[c][t], with tokens along vectors. Of half-precision elements a
// word of 32 bits holds two channels.
#pragma once

#include "../isa/vec.h"

namespace pk {
namespace {

#if PK_LEVEL >= 2
// dst[c][r] = row(r)[c] for 16 vectors of words; dst's rows are dst_step bytes apart.
template <class Row>
PK_INLINE void transpose_vectors(const Row& row, char* dst, int64_t dst_step) {
  __m512i r[16], s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = row(i);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // r[i + 2 j + k] has column 4 lane + 2 j + k of rows i .. i + 3
      r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512i low = _mm512_shuffle_i32x4(r[k], r[4 + k], 0x88), high = _mm512_shuffle_i32x4(r[k], r[4 + k], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0xdd);
    write(dst + k * dst_step, _mm512_shuffle_i32x4(low, low2, 0x88));
    write(dst + (4 + k) * dst_step, _mm512_shuffle_i32x4(high, high2, 0x88));
    write(dst + (8 + k) * dst_step, _mm512_shuffle_i32x4(low, low2, 0xdd));
    write(dst + (12 + k) * dst_step, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}
#endif

// dst[c][r] = row(r)[c] for 16 x 16 words, row(r) pointing to them; dst's rows are dst_step bytes apart.
template <class Row>
PK_INLINE void transpose_block(const Row& row, char* dst, int64_t dst_step) {
#if PK_LEVEL >= 2
  transpose_vectors([&](int i) PK_FORCED { return read<__m512i>(row(i)); }, dst, dst_step);
#else
  packed32 block[16][16];
  for (int r = 0; r < 16; ++r) {
    packed32 words[16];
    __builtin_memcpy(words, row(r), sizeof words);
    for (int c = 0; c < 16; ++c) block[c][r] = words[c];
  }
  for (int c = 0; c < 16; ++c) __builtin_memcpy(dst + c * dst_step, block[c], sizeof block[c]);
#endif
}

// dst[c][r] = src[r][c] for words; rows are src_step and dst_step bytes apart.
__attribute__((noinline)) void transpose_words(const void* from, int64_t src_step, void* to, int64_t dst_step,
                                               int64_t rows, int64_t cols) {
  const char* src = static_cast<const char*>(from);
  char* dst = static_cast<char*>(to);
  const int64_t whole_rows = rows / 16 * 16, whole_cols = cols / 16 * 16;
  for (int64_t r = 0; r < whole_rows; r += 16)
    for (int64_t c = 0; c < whole_cols; c += 16)
      transpose_block([&](int64_t i) PK_FORCED { return src + (r + i) * src_step + c * 4; }, dst + c * dst_step + r * 4,
                      dst_step);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_cols : 0; c < cols; ++c)
      __builtin_memcpy(dst + c * dst_step + r * 4, src + r * src_step + c * 4, 4);
}

// A tile of elements T. `get` and `put` read and write channels 2 i and 2 i + 1 of tokens l .. l + kLanes - 1.
template <class T>
struct Tile {
  packed32* data;
  int64_t row;                                // words from a row to the next
  static constexpr int kPer = 4 / sizeof(T);  // channels of a word

  // Rows of a tile of so many channels, which are counted in pairs.
  static int64_t rows(int64_t channels) { return (channels + 1) / 2 * (2 / kPer); }

  // The words of channels 2 i and 2 i + 1, for elements of half precision.
  PK_INLINE packed32* word(int64_t i, int64_t l) const { return data + i * row + l; }

  PK_INLINE Pair get(int64_t i, int64_t l) const {
    if constexpr (kPer == 1) {
      const float* at = reinterpret_cast<const float*>(data) + 2 * i * row + l;
      return {load(at), load(at + row)};
    } else {
      const vu words = read<vu>(data + i * row + l);
      if constexpr (__is_same(T, bf16)) return {(vf)(words << 16), (vf)(words & 0xffff0000u)};
      return {widen(half_words(words & 0xffffu), static_cast<const T*>(nullptr)),
              widen(half_words(words >> 16), static_cast<const T*>(nullptr))};
    }
  }
  PK_INLINE void put(int64_t i, int64_t l, Pair v) const {
    if constexpr (kPer == 1) {
      float* at = reinterpret_cast<float*>(data) + 2 * i * row + l;
      store(at, v.a);
      store(at + row, v.b);
    } else {
      packed32* at = data + i * row + l;
      if constexpr (__is_same(T, bf16)) return store_pair(reinterpret_cast<bf16*>(at), v);
      const T* tag = nullptr;
      write(at, full_words(narrow(v.a, tag)) | full_words(narrow(v.b, tag)) << 16);
    }
  }

 private:
#if PK_LEVEL >= 2
  static PK_INLINE vh half_words(vu v) { return (vh)_mm512_cvtepi32_epi16((__m512i)v); }
  static PK_INLINE vu full_words(vh v) { return (vu)_mm512_cvtepu16_epi32((__m256i)v); }
#else
  static PK_INLINE vh half_words(vu v) { return __builtin_convertvector(v, vh); }
  static PK_INLINE vu full_words(vh v) { return __builtin_convertvector(v, vu); }
#endif
};

// How the tokens of a tensor [B, C, H, W] lie in memory; `pixels` is H * W. A tile has channels begin .. end - 1, of
// which the first one is even.
struct TokenLayout {
  int64_t channels, pixels;
  bool channels_last;
  int64_t begin = 0, end = channels;
};

// Cuts tokens first .. first + count - 1 into runs of one sample, and calls f(sample, pixel, lane, run) for each: the
// first token's pixel and its place among the tokens, and the number of tokens.
template <class F>
PK_INLINE void each_sample(int64_t pixels, int64_t first, int64_t count, const F& f) {
  for (int64_t lane = 0; lane < count;) {
    const int64_t b = (first + lane) / pixels, pixel = first + lane - b * pixels;
    const int64_t run = pixels - pixel < count - lane ? pixels - pixel : count - lane;
    f(b, pixel, lane, run);
    lane += run;
  }
}

// Loads tokens first .. first + count - 1 of x into a tile, with zeros in the lanes behind them.
template <class T>
void load_tile(const T* x, const TokenLayout& layout, int64_t first, int64_t count, const Tile<T>& tile) {
  constexpr int kPer = Tile<T>::kPer;
  const int64_t channels = layout.end - layout.begin, whole = channels / kPer;
  if (layout.channels_last) {
    const T* rows = x + first * layout.channels + layout.begin;
    transpose_words(rows, layout.channels * sizeof(T), tile.data, tile.row * 4, count, whole);
    if (whole * kPer < channels)
      for (int64_t t = 0; t < count; ++t) {
        packed32 last = 0;
        __builtin_memcpy(&last, rows + t * layout.channels + channels - 1, sizeof(T));
        tile.data[whole * tile.row + t] = last;
      }
  } else {
    each_sample(layout.pixels, first, count, [&](int64_t b, int64_t pixel, int64_t lane, int64_t run) {
      const T* plane = x + (b * layout.channels + layout.begin) * layout.pixels + pixel;
      for (int64_t c = 0; c < channels; c += kPer, plane += kPer * layout.pixels) {
        packed32* out = tile.data + c / kPer * tile.row + lane;
        if constexpr (kPer == 1) {
          __builtin_memcpy(out, plane, run * sizeof(packed32));
        } else {
          const uint16_t *low = &plane->bits, *high = c + 1 < channels ? low + layout.pixels : nullptr;
          if (high)
            for (int64_t t = 0; t < run; ++t) out[t] = low[t] | packed32{high[t]} << 16;
          else
            for (int64_t t = 0; t < run; ++t) out[t] = low[t];
        }
      }
    });
  }
  const int64_t used = (channels + kPer - 1) / kPer, rows = Tile<T>::rows(channels);
  if (count < tile.row)
    for (int64_t c = 0; c < used; ++c) clear_words(tile.data + c * tile.row + count, tile.row - count);
  clear_words(tile.data + used * tile.row, (rows - used) * tile.row);
}

// Stores the first `count` tokens of a tile as rows of channels, which are `step` elements apart.
template <class T>
void store_rows(const Tile<T>& tile, int64_t channels, int64_t count, T* rows, int64_t step) {
  constexpr int kPer = Tile<T>::kPer;
  const int64_t whole = channels / kPer;
  transpose_words(tile.data, tile.row * 4, rows, step * sizeof(T), whole, count);
  if (whole * kPer < channels)
    for (int64_t t = 0; t < count; ++t)
      __builtin_memcpy(rows + t * step + channels - 1, tile.data + whole * tile.row + t, sizeof(T));
}

// Stores the first `count` tokens of a tile as tokens first .. first + count - 1 of y.
template <class T>
void store_tile(const Tile<T>& tile, const TokenLayout& layout, int64_t first, int64_t count, T* y) {
  constexpr int kPer = Tile<T>::kPer;
  const int64_t channels = layout.end - layout.begin;
  if (layout.channels_last)
    return store_rows(tile, channels, count, y + first * layout.channels + layout.begin, layout.channels);
  each_sample(layout.pixels, first, count, [&](int64_t b, int64_t pixel, int64_t lane, int64_t run) {
    T* plane = y + (b * layout.channels + layout.begin) * layout.pixels + pixel;
    for (int64_t c = 0; c < channels; c += kPer, plane += kPer * layout.pixels) {
      const packed32* in = tile.data + c / kPer * tile.row + lane;
      if constexpr (kPer == 1) {
        __builtin_memcpy(plane, in, run * sizeof(packed32));
      } else {
        uint16_t* low = &plane->bits;
        for (int64_t t = 0; t < run; ++t) low[t] = uint16_t(in[t]);
        if (c + 1 < channels)
          for (int64_t t = 0; t < run; ++t) low[layout.pixels + t] = in[t] >> 16;
      }
    }
  });
}

// Mean and M2 of every token's channels, out [count, 2]. Sums are taken around the mean of the first channels, so that
// a large mean costs no digits.
template <class T>
__attribute__((noinline)) void token_moments(const Tile<T>& y, int64_t channels, int64_t count, float* out) {
  const float size = channels;
  for (int64_t l = 0; l < count; l += kLanes) {
    const int64_t head = least(channels / 2, 4);
    vf shift = head > 0 ? vf{} : y.get(0, l).a;
    for (int64_t i = 0; i < head; ++i) shift += (y.get(i, l).a + y.get(i, l).b) / float(2 * head);
    vf sum{}, squares{};
    for (int64_t i = 0; i < channels / 2; ++i) {
      const Pair v = y.get(i, l);
      const vf a = v.a - shift, b = v.b - shift;
      sum += a + b;
      squares += a * a;
      squares += b * b;
    }
    if (channels % 2) {
      const vf a = y.get(channels / 2, l).a - shift;
      sum += a;
      squares += a * a;
    }
    float mean[kLanes], m2[kLanes];
    const vf rest = squares - sum * (sum / size);
    write(mean, shift + sum / size);
    write(m2, rest < 0.0f ? vf{} : rest);
    for (int64_t t = 0; t < kLanes && l + t < count; ++t) {
      out[2 * (l + t)] = mean[t];
      out[2 * (l + t) + 1] = m2[t];
    }
  }
}

#if PK_LEVEL >= 2
// The same of tokens as rows of channels, which are a multiple of 2 kLanes.
template <class T>
__attribute__((noinline)) void row_moments(const T* rows, int64_t channels, int64_t count, float* out) {
  const float size = channels;
  for (int64_t t = 0; t < count; ++t, rows += channels) {
    vf a{}, b{};
    for (int64_t c = 0; c < channels; c += 32) {
      const Pair v = load_pair(rows + c);
      a += v.a, b += v.b;
    }
    const float mean = _mm512_reduce_add_ps((__m512)(a + b)) / size;
    a = vf{}, b = vf{};
    for (int64_t c = 0; c < channels; c += 32) {
      const Pair v = load_pair(rows + c);
      a += (v.a - mean) * (v.a - mean), b += (v.b - mean) * (v.b - mean);
    }
    out[2 * t] = mean;
    out[2 * t + 1] = _mm512_reduce_add_ps((__m512)(a + b));
  }
}
#endif

}  // namespace
}  // namespace pk
