// The MLP's forward for one instruction-set level (docs/algebra.md, "MLP"). A tile of tokens goes through fc1, the
// activation and fc2 by chunks of the hidden channels, whose activations stay in the cache.
#pragma once

#include "../core/scratch.h"
#include "../isa/vec.h"
#include "../product/gemm.h"
#include "../product/operands.h"
#include "../product/token_tile.h"
#include "../tuning.h"
#include "activations.h"
#include "gelu_exact.h"
#include "gelu_table.h"
#include "mlp.h"

namespace pk {
namespace {

// ---- the tile's tokens and fc1's operand

// What each lane's token takes from its sample; zero in lanes without a token.
struct LaneValues {
  float *mean, *rstd, *drop;  // [lanes]

  void fill(const MlpParams& p, int64_t first, int64_t count, int64_t lanes) const {
    __builtin_memset(mean, 0, lanes * sizeof(float));
    __builtin_memset(rstd, 0, lanes * sizeof(float));
    __builtin_memset(drop, 0, lanes * sizeof(float));
    each_sample(p.pixels, first, count, [&](int64_t b, int64_t, int64_t lane, int64_t run) {
      for (int64_t t = lane; t < lane + run; ++t) {
        mean[t] = p.norm ? p.mean[b] : 0;
        rstd[t] = p.norm ? p.rstd[b] : 1;
        drop[t] = p.drop[b];
      }
    });
  }
};

// Clears the rows between the last channel and the end of a product's sum, which is rounded up to whole steps.
template <class E>
PK_INLINE void clear_rows(const Tile<E>& tile, int64_t channels, int64_t lanes) {
  using Op = typename OperandOf<E>::Op;
  for (int64_t i = (channels + Op::kPer - 1) / Op::kPer; i < words_of<Op>(channels); ++i)
    clear_words(tile.data + i * tile.row, lanes);
}

// n = (x - mean) rstd gamma + beta, rounded to the operand's elements.
template <class T, class N>
__attribute__((noinline)) void normalise(const MlpParams& p, const Tile<T>& x, const LaneValues& values, int64_t lanes,
                                         const N& n) {
  clear_rows(n, p.channels, lanes);
  for (int64_t i = 0; i < (p.channels + 1) / 2; ++i) {
    if (!p.norm) {
      for (int64_t l = 0; l < lanes; l += kLanes) n.put(i, l, x.get(i, l));
      continue;
    }
    const vf gamma_a = splat(p.gamma[2 * i]), gamma_b = splat(p.gamma[2 * i + 1]);
    const vf beta_a = splat(p.beta[2 * i]), beta_b = splat(p.beta[2 * i + 1]);
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const Pair v = x.get(i, l);
      const vf mean = load(values.mean + l), rstd = load(values.rstd + l);
      n.put(i, l, {(v.a - mean) * rstd * gamma_a + beta_a, (v.b - mean) * rstd * gamma_b + beta_b});
    }
  }
}

// ---- fc1's epilogue

// Applies an activation to h + bias and writes pairs of vectors to a tile. `bias` holds kInputScale times the biases.
template <Activation A, bool EXACT, class E>
struct Activate {
  static constexpr float kInputScale = 1;
  template <class P>
  PK_INLINE void operator()(Pair h, Pair bias, const P& p, int64_t i, int64_t l) {
    p.put(
        i, l,
        {activate<A, EXACT>(h.a + bias.a, Exponential{}).value, activate<A, EXACT>(h.b + bias.b, Exponential{}).value});
  }
};
#if PK_LEVEL >= 2
template <class E>
struct Activate<Activation::gelu, false, E> {
  static constexpr float kInputScale = GeluTable::kInputScale;
  static constexpr bool kCut = __is_same(E, bf16);  // else elements stay floats
  GeluTable gelu;
  // Written out: gcc would make an implicit constructor for the baseline, not for this level.
  PK_INLINE Activate() : gelu(kCut ? kGeluToCut : kGelu) {}
  template <class P>
  PK_INLINE void operator()(Pair h, Pair bias, const P& p, int64_t i, int64_t l) {
    const Pair v = {gelu(h.a * kInputScale + bias.a), gelu(h.b * kInputScale + bias.b)};
    if constexpr (kCut)
      write(p.word(i, l), upper_halves(v.a, v.b));
    else
      p.put(i, l, v);
  }
};
template <class E>
struct Activate<Activation::gelu, true, E> {
  static constexpr float kInputScale = 1;
  ExactGelu gelu;
  PK_INLINE Activate() {}
  template <class P>
  PK_INLINE void operator()(Pair h, Pair bias, const P& p, int64_t i, int64_t l) {
    p.put(i, l, {gelu(h.a + bias.a), gelu(h.b + bias.b)});
  }
};
#endif

// p = act(h + bias) over `rows` rows of h, with p's rows from `row` on. Rows from `valid` on are beyond the last hidden
// channel; they are cleared first, since an infinite x leaves NaN in them. With SAVED, h + bias is left in h.
template <Activation A, bool EXACT, bool SAVED, class E>
__attribute__((noinline)) void activate_rows(float* h, int64_t rows, int64_t lanes, const float* bias, int64_t valid,
                                             const Tile<E>& p, int64_t row) {
  if (valid < rows) __builtin_memset(h + valid * lanes, 0, (rows - valid) * lanes * sizeof(float));
  Activate<A, EXACT, E> act;  // not const, see GeluTable
  for (int64_t i = 0; i < rows / 2; ++i) {
    float *row_a = h + 2 * i * lanes, *row_b = row_a + lanes;
    if constexpr (SAVED) {
      const Pair none{};
      const vf bias_a = splat(bias[2 * i]), bias_b = splat(bias[2 * i + 1]);
      for (int64_t l = 0; l < lanes; l += kLanes) {
        const Pair v = {load(row_a + l) + bias_a, load(row_b + l) + bias_b};
        store(row_a + l, v.a);
        store(row_b + l, v.b);
        act(v, none, p, row / 2 + i, l);
      }
    } else {
      const Pair scaled = {splat(bias[2 * i] * act.kInputScale), splat(bias[2 * i + 1] * act.kInputScale)};
      for (int64_t l = 0; l < lanes; l += kLanes) act({load(row_a + l), load(row_b + l)}, scaled, p, row / 2 + i, l);
    }
  }
}

template <bool EXACT, bool SAVED, class... Args>
PK_INLINE void activate_rows(Activation activation, const Args&... args) {
  switch (activation) {
    case Activation::gelu: return activate_rows<Activation::gelu, EXACT, SAVED>(args...);
    case Activation::gelu_tanh: return activate_rows<Activation::gelu_tanh, EXACT, SAVED>(args...);
    case Activation::relu: return activate_rows<Activation::relu, EXACT, SAVED>(args...);
    case Activation::relu_squared: return activate_rows<Activation::relu_squared, EXACT, SAVED>(args...);
    case Activation::silu: return activate_rows<Activation::silu, EXACT, SAVED>(args...);
  }
}

// ---- fc2's epilogue

// y = x + d s (o + b2) for output channels c .. c + rows - 1. With a residual y's tile holds x, which is overwritten.
// The tile's first channel is `begin`.
template <class T>
__attribute__((noinline)) void write_rows(const MlpParams& p, const float* o, int64_t rows, int64_t lanes,
                                          const float* drop, int64_t c, const Tile<T>& y, int64_t begin = 0) {
  for (int64_t i = 0; i < rows / 2 && c + 2 * i < p.out; ++i) {
    const float *row_a = o + 2 * i * lanes, *row_b = row_a + lanes;
    const int64_t channel = c + 2 * i;
    const vf bias_a = splat(p.b2[channel]), bias_b = splat(p.b2[channel + 1]);
    const vf scale_a = splat(p.scale[channel]), scale_b = splat(p.scale[channel + 1]);
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const vf d = load(drop + l);
      const Pair v = {(load(row_a + l) + bias_a) * scale_a, (load(row_b + l) + bias_b) * scale_b};
      const Pair x = p.residual ? y.get((channel - begin) / 2, l) : Pair{vf{}, vf{}};
      y.put((channel - begin) / 2, l, {x.a + v.a * d, x.b + v.b * d});
    }
  }
}

// ---- the tile

// How many of n hidden channels are computed and used at a time.
PK_INLINE int64_t hidden_chunk(int64_t n) { return n <= kHiddenAtOnce ? n : kHiddenChunk; }

// Hidden channels of a part. The last part has the rest.
PK_INLINE int64_t part_channels(const MlpParams& p) {
  return p.parts == 1 ? p.hidden : rounded_up((p.hidden + p.parts - 1) / p.parts, kRowsMax);
}

template <class T, class Op>
struct ForwardScratch {
  packed32* x;      // the tile of x, and then of y
  packed32* n;      // the normalised tile, fc1's operand
  packed32* p;      // a chunk's activations, fc2's operand
  packed32* panel;  // rows of weights that had to be converted
  float* h;         // [rows of a product, lanes] fc1
  float* o;         // [rows, lanes] fc2: of one product, or of all output channels where there are several chunks
  LaneValues values;
  int64_t size;  // words of all of them

  ForwardScratch(const MlpParams& q, packed32* base) {
    ScratchArena arena(base);
    const int64_t lanes = q.lanes, wide = q.channels > q.out ? q.channels : q.out;
    const int64_t chunk = hidden_chunk(part_channels(q));
    const int64_t k1 = words_of<Op>(q.channels), k2 = words_of<Op>(chunk);
    x = arena.words(Tile<T>::rows(wide) * lanes);
    n = arena.words((k1 + 1) * lanes);  // channels are written in pairs: one more where their number is odd
    p = arena.words((k2 + Op::kRows) * lanes);
    panel = arena.words(Op::kRows * (k1 > k2 ? k1 : k2));
    h = arena.floats(Op::kRows * lanes);
    o = arena.floats((q.parts == 1 && q.hidden > chunk ? rounded_up(q.out, Op::kRows) : Op::kRows) * lanes);
    values = {arena.floats(lanes), arena.floats(lanes), arena.floats(lanes)};
    size = arena.taken();
  }
};

// Saves rows of fc1's output, with its bias, for the backward. In float16 values that are too large are clamped, which
// changes no slope: it is 0 or 1 out there. That of relu_squared is 2 h, so its h becomes infinite as in eager mode.
template <class S>
void save_rows(const MlpParams& p, float* h, int64_t rows, int64_t lanes, int64_t row, int64_t first, int64_t count) {
  [[maybe_unused]] const vf most = splat(p.activation == Activation::relu_squared ? __builtin_inff() : 65504.0f);
  for (int64_t r = 0; r < rows && row + r < p.hidden; ++r) {
    float* in = h + r * lanes;
    if constexpr (__is_same(S, fp16))
      for (int64_t l = 0; l < lanes; l += kLanes) {
        const vf v = load(in + l), clamped = lesser(most, larger(splat(-65504), v));
        store(in + l, v - v == 0.0f ? clamped : v);  // infinities and NaN stay
      }
    convert_row(in, static_cast<S*>(p.saved) + (row + r) * p.tokens + first, count);
  }
}

// fc2's sums over hidden channels begin .. end - 1, of a tile whose first token is `first`. Output channels c ..
// c + kRows - 1 are summed at sums(c); done(c) is called once they are complete.
template <class T, class S, class Sums, class Done>
PK_INLINE void products(const MlpParams& p, const ForwardScratch<T, typename OperandOf<S>::Op>& s, int64_t first,
                        int64_t count, int64_t begin, int64_t end, const Sums& sums, const Done& done) {
  using Op = typename OperandOf<S>::Op;
  constexpr bool kExact = !__is_same(S, bf16);
  constexpr int64_t kRows = Op::kRows;
  const int64_t lanes = rounded_up(count, kLanes), k1 = words_of<Op>(p.channels),
                chunk = hidden_chunk(part_channels(p));
  const Tile<typename Op::Element> hidden{s.p, lanes};
  for (int64_t j = begin; j < end; j += chunk) {
    const int64_t size = least(chunk, end - j), k2 = words_of<Op>(size);
    for (int64_t r = 0; r < size; r += kRows) {
      const Panel a = rows_panel<Op>(p.w1, j + r, kRows, size - r, 0, p.channels, s.panel);
      const PrefetchRows next = r + kRows < size ? prefetch_rows(p.w1, j + r + kRows, 0) : prefetch_rows(p.w2, 0, j);
      multiply<Op>(a.data, a.row, kRows, s.n, lanes, lanes, k1, s.h, lanes, false, next);
      if (p.saved) {
        activate_rows<kExact, true>(p.activation, s.h, kRows, lanes, p.b1 + j + r, size - r, hidden, r);
        save_rows<S>(p, s.h, kRows, lanes, j + r, first, count);
      } else {
        activate_rows<kExact, false>(p.activation, s.h, kRows, lanes, p.b1 + j + r, size - r, hidden, r);
      }
    }
    const bool last = j + size == end;
    for (int64_t c = 0; c < p.out; c += kRows) {
      const Panel a = rows_panel<Op>(p.w2, c, kRows, p.out - c, j, size, s.panel);
      const PrefetchRows next =
          c + kRows < p.out ? prefetch_rows(p.w2, c + kRows, j) : prefetch_rows(p.w1, last ? 0 : j + size, 0);
      multiply<Op>(a.data, a.row, kRows, s.p, lanes, lanes, k2, sums(c), lanes, j > begin, next);
      if (last) done(c);
    }
  }
}

// Loads the tile of x and normalises it to fc1's operand.
template <class T, class S>
void load_normalised(const MlpParams& p, const ForwardScratch<T, typename OperandOf<S>::Op>& s, int64_t first,
                     int64_t count) {
  const int64_t lanes = rounded_up(count, kLanes);
  const Tile<T> x{s.x, lanes};
  load_tile(static_cast<const T*>(p.x), {p.channels, p.pixels, p.channels_last}, first, count, x);
  s.values.fill(p, first, count, lanes);
  normalise(p, x, s.values, lanes, Tile<typename OperandOf<S>::Op::Element>{s.n, lanes});
}

// Stores y's tile, and the moments of its tokens where they are asked for.
template <class T, class S>
PK_INLINE void write_tile(const MlpParams& p, const Tile<T>& y, int64_t first, int64_t count) {
#if PK_LEVEL >= 2
  // As rows_forward.h and float_rows.h have them, so that a sample's result does not depend on the other ones.
  constexpr bool kRows = PK_LEVEL == 4 || OperandOf<S>::Op::kPer == 1;
  if (kRows && p.token_moments && p.channels_last && p.out % (2 * kLanes) == 0) {
    store_tile(y, {p.out, p.pixels, true}, first, count, static_cast<T*>(p.y));
    return row_moments(static_cast<const T*>(p.y) + first * p.out, p.out, count, p.token_moments + 2 * first);
  }
#endif
  if (p.token_moments) token_moments(y, p.out, count, p.token_moments + 2 * first);
  store_tile(y, {p.out, p.pixels, p.channels_last}, first, count, static_cast<T*>(p.y));
}

template <class T, class S>
void mlp_forward(const MlpParams& p, int64_t first, int64_t count, packed32* scratch) {
  using Op = typename OperandOf<S>::Op;
  [[maybe_unused]] const MatrixUnit unit;
  const ForwardScratch<T, Op> s(p, scratch);
  const int64_t lanes = rounded_up(count, kLanes);
  const Tile<T> x{s.x, lanes};
  load_normalised<T, S>(p, s, first, count);
  if (p.channels_last) {  // the products take long enough for the next tile and y's lines to be fetched
    const int64_t bytes = p.channels * sizeof(T), next = least(p.tokens - first - count, count);
    prefetch<0>(static_cast<const T*>(p.x) + (first + count) * p.channels, next * bytes);
    prefetch<1>(static_cast<T*>(p.y) + first * p.out, count * p.out * sizeof(T));
  }
  const bool chunked = p.hidden > hidden_chunk(p.hidden);
  const auto sums = [&](int64_t c) PK_FORCED { return chunked ? s.o + c * lanes : s.o; };
  products<T, S>(p, s, first, count, 0, p.hidden, sums,
                 [&](int64_t c) PK_FORCED { write_rows(p, sums(c), Op::kRows, lanes, s.values.drop, c, x); });
  write_tile<T, S>(p, x, first, count);
}

// For few tokens, which are all in one tile: fc2's sums over one part of the hidden channels, so that threads share the
// weights. mlp_forward_join then adds up the parts.
template <class T, class S>
void mlp_forward_part(const MlpParams& p, int64_t part, packed32* scratch) {
  using Op = typename OperandOf<S>::Op;
  [[maybe_unused]] const MatrixUnit unit;
  const ForwardScratch<T, Op> s(p, scratch);
  load_normalised<T, S>(p, s, 0, p.tokens);
  const int64_t lanes = rounded_up(p.tokens, kLanes), size = rounded_up(p.out, kRowsMax) * lanes;
  float* sums = p.part_sums + part * size;
  const int64_t begin = part * part_channels(p), end = least(p.hidden, begin + part_channels(p));
  if (begin >= end) return __builtin_memset(sums, 0, size * sizeof(float)), void();
  products<T, S>(
      p, s, 0, p.tokens, begin, end, [&](int64_t c) PK_FORCED { return sums + c * lanes; }, [](int64_t) PK_FORCED {});
}

// y of tokens first .. first + count - 1, from the sums over the parts, which are added in the order of the parts.
template <class T, class S>
void mlp_forward_join(const MlpParams& p, int64_t first, int64_t count, packed32* scratch) {
  constexpr int64_t kRows = OperandOf<S>::Op::kRows;
  const ForwardScratch<T, typename OperandOf<S>::Op> s(p, scratch);
  const int64_t lanes = rounded_up(count, kLanes), all = rounded_up(p.tokens, kLanes);
  const Tile<T> y{s.x, lanes};
  if (p.residual) load_tile(static_cast<const T*>(p.x), {p.channels, p.pixels, p.channels_last}, first, count, y);
  s.values.fill(p, first, count, lanes);
  for (int64_t c = 0; c < p.out; c += kRows) {
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t l = 0; l < lanes; l += kLanes) {
        const float* at = p.part_sums + (c + r) * all + first + l;
        vf sum = load(at);
        for (int64_t part = 1; part < p.parts; ++part) sum += load(at += rounded_up(p.out, kRowsMax) * all);
        store(s.o + r * lanes + l, sum);
      }
    write_rows(p, s.o, kRows, lanes, s.values.drop, c, y);
  }
  write_tile<T, S>(p, y, first, count);
}

template <class T, class S>
int64_t mlp_forward_scratch(const MlpParams& p) {
  const ForwardScratch<T, typename OperandOf<S>::Op> s(p, nullptr);
  return s.size;
}

}  // namespace
}  // namespace pk
