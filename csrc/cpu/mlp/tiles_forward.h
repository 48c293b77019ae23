// The MLP's forward on AMX tiles with tokens as the columns of its products, as in forward.h, for any shape and layout:
// weights are the rows. 32 of them at a time are copied to whole tiles, which stay in the L1 cache while all tokens of
// the tile stream past them. The activation of one block of fc1's output is computed between the products of the next.
#pragma once

#include "../product/tile_block.h"
#include "forward.h"

namespace pk {
namespace {

// The words of channels 2 i and 2 i + 1 in one step of a block, for lanes 0 to 31.
struct StepWords {
  packed32* at;
  PK_INLINE packed32* word(int64_t i, int64_t l) const { return at + l / 16 * 256 + i * 16; }
  PK_INLINE void put(int64_t i, int64_t l, Pair v) const { store_pair(reinterpret_cast<bf16*>(word(i, l)), v); }
};

// Operands of products as whole tiles that follow each other: [32 lanes][16 words][2][16 words][16 lanes].
struct TileBlocks {
  packed32* data;
  int64_t steps;  // of 16 words, which a product sums over

  static int64_t words(int64_t steps, int64_t lanes) { return (lanes + 31) / 32 * steps * kStepWords; }
  PK_INLINE packed32* block(int64_t lane) const { return data + lane / 32 * steps * kStepWords; }
  PK_INLINE packed32* word(int64_t i, int64_t l) const {
    return StepWords{block(l) + i / 16 * kStepWords}.word(i % 16, l % 32);
  }
  PK_INLINE void put(int64_t i, int64_t l, Pair v) const { store_pair(reinterpret_cast<bf16*>(word(i, l)), v); }
};
PK_INLINE void clear_rows(const TileBlocks& tile, int64_t channels, int64_t lanes) {
  for (int64_t i = (channels + 1) / 2; i < tile.steps * 16; ++i)
    for (int64_t l = 0; l < lanes; l += kLanes) clear_words(tile.word(i, l), kLanes);
}

// Rows row .. row + 31 of w, columns col .. col + k - 1, as tiles [steps][2][16 rows][32 columns], with zeros behind
// the k columns and in rows from `valid` on.
__attribute__((noinline)) void copy_panel(const Weight& w, int64_t row, int64_t valid, int64_t col, int64_t k,
                                          packed32* out) {
  const int64_t steps = (k + 31) / 32;
  weight_at(w, row, col, [&](auto* from) PK_FORCED {
    for (int64_t r = 0; r < 32; ++r, from += w.step)
      for (int64_t i = 0; i < steps; ++i) {
        bf16* to = reinterpret_cast<bf16*>(out + i * kStepWords + r * 16);
        const int64_t n = r < valid ? least(32, k - i * 32) : 0;
        if (n == 32) {
          convert_row(from + i * 32, to, 32);
        } else {
          clear_words(out + i * kStepWords + r * 16, 16);
          if (n > 0) convert_row(from + i * 32, to, n);
        }
      }
  });
}

struct TilesScratch {
  packed32* x;      // the tile of x, and then of y
  TileBlocks n;     // the normalised tile, fc1's operand
  TileBlocks p;     // a chunk's activations, fc2's operand
  packed32* panel;  // 32 rows of a weight
  float* h;         // two blocks of fc1's sums, [32][32]
  float* o;         // [rows, lanes] fc2's sums: of 32 output channels, or of all where there are several chunks
  LaneValues values;
  int64_t size;  // words of all of them

  static PK_INLINE int64_t chunk(int64_t hidden) {
    const int64_t chunks = (hidden + kTilesHiddenChunk - 1) / kTilesHiddenChunk;
    return rounded_up((hidden + chunks - 1) / chunks, 32);
  }

  TilesScratch() = default;
  TilesScratch(const MlpParams& q, packed32* base) {
    ScratchArena arena(base);
    const int64_t wide = q.channels > q.out ? q.channels : q.out, most = chunk(q.hidden);
    n.steps = (q.channels + 31) / 32, p.steps = most / 32;
    x = arena.words(Tile<float>::rows(wide) * q.lanes);
    n.data = arena.words(TileBlocks::words(n.steps, q.lanes));
    p.data = arena.words(TileBlocks::words(p.steps, q.lanes));
    panel = arena.words((n.steps > p.steps ? n.steps : p.steps) * kStepWords);
    h = arena.floats(2 * kBlockSums);
    o = arena.floats((q.hidden > most ? rounded_up(q.out, 32) : 32) * q.lanes);
    values = {arena.floats(q.lanes), arena.floats(q.lanes), arena.floats(q.lanes)};
    size = arena.taken();
  }
};

// A block of h, 32 hidden channels of 32 lanes, whose activation is due, and where it goes.
struct DuePairs {
  const float* h = nullptr;
  const float* bias;
  StepWords p;

  template <int PAIRS, class Act>
  PK_INLINE void pairs(Act& act, int64_t first) const {
#pragma GCC unroll 16
    for (int64_t i = first; i < first + PAIRS; ++i) {
      const Pair scaled = {splat(bias[2 * i] * act.kInputScale), splat(bias[2 * i + 1] * act.kInputScale)};
      const float* row = h + 2 * i * 32;
      act({load(row), load(row + 32)}, scaled, p, i, 0);
      act({load(row + 16), load(row + 48)}, scaled, p, i, 16);
    }
  }
};

// One step of a product over 32 channels: two tiles of weights times COLUMNS of tokens. PAIRS pairs of rows of the
// block that is due are activated meanwhile.
template <int COLUMNS, int PAIRS, class Act>
PK_INLINE void columns_step(const packed32* w, const packed32* b, Act& act, const DuePairs& due, int64_t first) {
  tile_load<4>(w, 64);
  tile_stream<6>(b, 64);
  if constexpr (COLUMNS == 2) tile_stream<7>(b + 256, 64);
  tile_load<5>(w + 256, 64);
  tile_multiply_add<0, 4, 6>();
  if constexpr (COLUMNS == 2) tile_multiply_add<1, 4, 7>();
  due.pairs<PAIRS - PAIRS / 2>(act, first);
  tile_multiply_add<2, 5, 6>();
  if constexpr (COLUMNS == 2) tile_multiply_add<3, 5, 7>();
  due.pairs<PAIRS / 2>(act, first + PAIRS - PAIRS / 2);
}

// The share of a block, whose first token is token `lane` of `count`, in prefetching the next 32 rows of a weight.
struct PrefetchShare {
  PrefetchRows next;
  int64_t rows;

  PK_INLINE PrefetchShare(const PrefetchRows& all, int64_t lane, int64_t count) {
    const int64_t blocks = (count + 31) / 32, first = lane / 32 * 32 / blocks;
    rows = (lane / 32 + 1) * 32 / blocks - first;
    next = all.after(first, 0);
  }
  PK_INLINE void fetch(int64_t step) const { next.fetch(step * 16, rows); }
};

template <int COLUMNS, int PAIRS, class Act>
PK_INLINE void columns_block(const packed32* w, const packed32* b, int64_t steps, Act& act, const DuePairs& due,
                             const PrefetchShare& next) {
  int64_t k = 0;
  if (due.h)
    for (; k < 16 / PAIRS; ++k) {
      next.fetch(k);
      columns_step<COLUMNS, PAIRS>(w + k * kStepWords, b + k * kStepWords, act, due, k * PAIRS);
    }
  for (; k < steps; ++k) {
    next.fetch(k);
    columns_step<COLUMNS, 0>(w + k * kStepWords, b + k * kStepWords, act, due, 0);
  }
}

// Saves h + b1 of a block for the backward, its first `count` lanes.
__attribute__((noinline)) void save_block(const MlpParams& p, const float* h, int64_t row, int64_t first,
                                          int64_t count) {
  for (int64_t r = 0; r < 32 && row + r < p.hidden; ++r) {
    const vf bias = splat(p.b1[row + r]);
    bf16* to = static_cast<bf16*>(p.saved) + (row + r) * p.tokens + first;
    for (int64_t l = 0; l < count; l += kLanes) {
      const vf v = load(h + r * 32 + l) + bias;
      if (count - l >= kLanes)
        store(to + l, v);
      else
        store(to + l, v, count - l);
    }
  }
}

// p of hidden channels begin .. begin + size - 1, which are channels `at` and so on of s.p. `after`: what is read next.
template <int PAIRS, class Act>
__attribute__((noinline)) void columns_fc1(const MlpParams& p, const TilesScratch& s, int64_t first, int64_t count,
                                           int64_t begin, int64_t size, int64_t at, const PrefetchRows& after) {
  Act act;  // not const, see GeluTable
  DuePairs due;
  float *sums = s.h, *other = s.h + kBlockSums;
  for (int64_t r = 0; r < size; r += 32) {
    copy_panel(p.w1, begin + r, size - r, 0, p.channels, s.panel);
    const PrefetchRows next = r + 32 < size ? prefetch_rows(p.w1, begin + r + 32, 0) : after;
    for (int64_t l = 0; l < count; l += 32) {
      const PrefetchShare now(next, l, count);
      zero_block();
      if (count - l > 16)
        columns_block<2, PAIRS>(s.panel, s.n.block(l), s.n.steps, act, due, now);
      else
        columns_block<1, PAIRS>(s.panel, s.n.block(l), s.n.steps, act, due, now);
      store_block(sums, 32);
      // An infinite x leaves NaN in the rows beyond the last hidden channel.
      if (size - r < 32) __builtin_memset(sums + (size - r) * 32, 0, (32 - (size - r)) * 32 * sizeof(float));
      if (p.saved) save_block(p, sums, begin + r, first + l, least(32, count - l));
      due.h = sums;
      due.bias = p.b1 + begin + r;
      due.p.at = s.p.block(l) + (at + r) / 32 * kStepWords;
      float* const done = sums;
      sums = other;
      other = done;
    }
  }
  for (int64_t i = 0; i < 16; i += 4) due.template pairs<4>(act, i);
}

// Calls columns_fc1 with the number of pairs that suits the product's length.
template <class Act, class... Args>
PK_INLINE void columns_hidden(const MlpParams& p, const TilesScratch& s, const Args&... args) {
  if (s.n.steps >= 16) return columns_fc1<1, Act>(p, s, args...);
  if (s.n.steps >= 8) return columns_fc1<2, Act>(p, s, args...);
  if (s.n.steps >= 4) return columns_fc1<4, Act>(p, s, args...);
  if (s.n.steps >= 2) return columns_fc1<8, Act>(p, s, args...);
  columns_fc1<16, Act>(p, s, args...);
}

// fc2's sums over hidden channels begin .. begin + size - 1, which are channels `at` and so on of s.p, of output
// channels c .. c + 31, added to what is there if `add`.
PK_INLINE void columns_fc2(const MlpParams& p, const TilesScratch& s, int64_t count, int64_t c, int64_t begin,
                           int64_t size, int64_t at, float* o, int64_t lanes, bool add, const PrefetchRows& next) {
  Activate<Activation::relu, false, bf16> act;  // never called: no block is due
  const DuePairs none{};
  copy_panel(p.w2, c, p.out - c, begin, size, s.panel);
  for (int64_t l = 0; l < count; l += 32) {
    const PrefetchShare now(next, l, count);
    const packed32* b = s.p.block(l) + at / 32 * kStepWords;
    const bool two = count - l > 16;
    if (!add)
      zero_block();
    else if (two)
      load_block(o + l, lanes);
    else
      load_left_tiles(o + l, lanes);
    if (two)
      columns_block<2, 1>(s.panel, b, (size + 31) / 32, act, none, now);
    else
      columns_block<1, 1>(s.panel, b, (size + 31) / 32, act, none, now);
    if (two)
      store_block(o + l, lanes);
    else
      store_left_tiles(o + l, lanes);
  }
}

// See `products` in forward.h.
template <class Act, class Sums, class Done>
PK_INLINE void columns_products(const MlpParams& p, const TilesScratch& s, int64_t first, int64_t count,
                                const Sums& sums, const Done& done) {
  const int64_t lanes = rounded_up(count, kLanes), chunk = s.p.steps * 32;
  for (int64_t j = 0; j < p.hidden; j += chunk) {
    const int64_t size = least(chunk, p.hidden - j);
    columns_hidden<Act>(p, s, first, count, j, size, int64_t{0}, prefetch_rows(p.w2, 0, j));
    const bool last = j + size == p.hidden;
    for (int64_t c = 0; c < p.out; c += 32) {
      const PrefetchRows next =
          c + 32 < p.out ? prefetch_rows(p.w2, c + 32, j) : prefetch_rows(p.w1, last ? 0 : j + size, 0);
      columns_fc2(p, s, count, c, j, size, 0, sums(c), lanes, j > 0, next);
      if (last) done(c);
    }
  }
}

// Calls f with the activation as a type, see Activate.
template <class F>
PK_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::gelu: return f(Activate<Activation::gelu, false, bf16>());
    case Activation::gelu_tanh: return f(Activate<Activation::gelu_tanh, false, bf16>());
    case Activation::relu: return f(Activate<Activation::relu, false, bf16>());
    case Activation::relu_squared: return f(Activate<Activation::relu_squared, false, bf16>());
    case Activation::silu: return f(Activate<Activation::silu, false, bf16>());
  }
}

// Loads the tile of x and normalises it to fc1's operand.
template <class T>
void load_columns(const MlpParams& p, const TilesScratch& s, int64_t first, int64_t count) {
  const int64_t lanes = rounded_up(count, kLanes);
  const Tile<T> x{s.x, lanes};
  load_tile(static_cast<const T*>(p.x), {p.channels, p.pixels, p.channels_last}, first, count, x);
  s.values.fill(p, first, count, lanes);
  normalise(p, x, s.values, lanes, s.n);
}

// See MlpKernels::forward.
template <class T>
void mlp_tiles_forward(const MlpParams& p, int64_t first, int64_t count, packed32* scratch) {
  const MatrixUnit unit;
  const TilesScratch s(p, scratch);
  const int64_t lanes = rounded_up(count, kLanes);
  const Tile<T> x{s.x, lanes};
  load_columns<T>(p, s, first, count);
  if (p.channels_last) {  // the products take long enough for the next tile and y's lines to be fetched
    const int64_t bytes = p.channels * sizeof(T), next = least(p.tokens - first - count, count);
    prefetch<0>(static_cast<const T*>(p.x) + (first + count) * p.channels, next * bytes);
    prefetch<1>(static_cast<T*>(p.y) + first * p.out, count * p.out * sizeof(T));
  }
  const bool chunked = p.hidden > TilesScratch::chunk(p.hidden);
  const auto sums = [&](int64_t c) PK_FORCED { return chunked ? s.o + c * lanes : s.o; };
  with_activation(p.activation, [&](auto act) PK_FORCED {
    columns_products<decltype(act)>(
        p, s, first, count, sums, [&](int64_t c) PK_FORCED { write_rows(p, sums(c), 32, lanes, s.values.drop, c, x); });
  });
  write_tile<T, bf16>(p, x, first, count);
}

int64_t mlp_tiles_scratch(const MlpParams& p) {
  const TilesScratch s(p, nullptr);
  return s.size;
}

}  // namespace
}  // namespace pk
