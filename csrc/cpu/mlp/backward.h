// The MLP's backward for one instruction-set level (docs/algebra.md, "MLP"), tokens along vectors as in the forward.
//
// It works on a block of tokens at a time:
// - `prepare`, by tiles of tokens, writes the block's operands;
// - `hidden`, by kItemRows hidden channels, computes h again, its gradient, and the block's part of the products that
//   the weights' gradients are made from;
// - `input`, by tiles of tokens, computes the gradient of the normalised input.
// When a group of samples is done, `reduce` and `finish` go through GroupNorm's backward, which needs sums over whole
// samples. At last `weights`, by channels, turns the products into the parameters' gradients. Each gradient is written
// by one thread, in a fixed order of sums.
#pragma once

#include "../core/scratch.h"
#include "../isa/vec.h"
#include "../product/gemm.h"
#include "../product/operands.h"
#include "../product/token_tile.h"
#include "../tuning.h"
#include "activations.h"
#include "forward.h"
#include "mlp.h"

namespace pk {
namespace {

// Rows of w^T in operand words: panel[i] is column row + i of w, for i < rows, with k elements in words along w's rows.
// There are zeros where w has no such column (it has `cols`), and behind the k elements.
template <class Op>
void columns_panel(const Weight& w, int64_t row, int64_t rows, int64_t cols, int64_t k, packed32* panel) {
  using E = typename Op::Element;
  constexpr int kUnit = 16 * Op::kPer;  // rows of w in a block of words
  const int64_t words = words_of<Op>(k);
  packed32 block[16 * 16];
  const Tile<E> tile{block, 16};
  weight_at(w, 0, row, [&](auto* first) PK_FORCED {
    for (int64_t c = 0; c < rows; c += 16) {
      const int64_t n = cols - row - c < 16 ? cols - row - c : 16, panels = rows - c < 16 ? rows - c : 16;
      for (int64_t i = 0; i < words * Op::kPer; i += kUnit) {
        const auto* from = first + i * w.step + c;
        if (n == 16 && k - i >= kUnit) {
          for (int64_t r = 0; r < kUnit; r += 2, from += 2 * w.step)
            for (int64_t l = 0; l < 16; l += kLanes) tile.put(r / 2, l, {load(from + l), load(from + w.step + l)});
        } else {
          clear_words(block, 256);
          for (int64_t r = 0; r < k - i && r < kUnit; r += 2, from += 2 * w.step)
            for (int64_t l = 0; l < n; l += kLanes) {
              const int64_t left = n - l < kLanes ? n - l : kLanes;
              tile.put(r / 2, l, {load(from + l, left), r + 1 < k - i ? load(from + w.step + l, left) : vf{}});
            }
        }
        const int64_t left = words - i / Op::kPer < 16 ? words - i / Op::kPer : 16;
        transpose_words(block, 64, panel + c * words + i / Op::kPer, words * 4, left, panels);
      }
    }
  });
}

// ---- prepare

// Turns a tile, whose words hold neighbouring channels, into `out` [out_tokens / kPer, channels], whose words hold
// neighbouring tokens. `rows` [count, channels] is scratch. There are zeros from token `count` on.
template <class E>
void along_tokens(const Tile<E>& tile, int64_t channels, int64_t count, E* rows, packed32* out, int64_t out_tokens) {
  store_tile(tile, {channels, count, true}, 0, count, rows);
  if constexpr (sizeof(E) == 4) {
    __builtin_memcpy(out, rows, count * channels * sizeof(E));
    clear_words(out + count * channels, (out_tokens - count) * channels);
  } else {
    for (int64_t t = 0; t < out_tokens; t += 2, out += channels) {
      const uint16_t *even = &rows[t * channels].bits, *odd = even + channels;
      if (t + 1 < count)
        for (int64_t c = 0; c < channels; ++c) out[c] = even[c] | packed32{odd[c]} << 16;
      else if (t < count)
        for (int64_t c = 0; c < channels; ++c) out[c] = even[c];
      else
        clear_words(out, channels);
    }
  }
}

template <class T, class Op>
struct PrepareScratch {
  packed32* tile;     // of x, then of dL/dy
  packed32* operand;  // a tile of the operands' elements
  packed32* rows;     // tokens as rows of channels
  LaneValues values;
  int64_t size;  // words of all of them

  PrepareScratch(const MlpBackwardParams& q, packed32* base) {
    ScratchArena arena(base);
    const int64_t wide = (q.channels > q.out ? q.channels : q.out) + 1;
    tile = arena.words(Tile<T>::rows(wide) * q.lanes);
    operand = arena.words(Tile<typename Op::Element>::rows(wide) * q.lanes);
    rows = arena.words((wide * (q.lanes + 1) + Op::kPer - 1) / Op::kPer);
    values = {arena.floats(q.lanes), arena.floats(q.lanes), arena.floats(q.lanes)};
    size = arena.taken();
  }
};

// See MlpKernels::prepare.
template <class T, class S>
void mlp_prepare(const MlpBackwardParams& p, int64_t first, int64_t count, int64_t lane, int64_t lanes, float* g_sums,
                 packed32* scratch) {
  using Op = typename OperandOf<S>::Op;
  using E = typename Op::Element;
  const PrepareScratch<T, Op> s(p, scratch);
  const Tile<T> raw{s.tile, lanes};
  const Tile<E> operand{s.operand, lanes};
  E* rows = reinterpret_cast<E*>(s.rows);
  const int64_t block = p.block_lanes, words = lanes / Op::kPer;
  s.values.fill(p, first, count, lanes);
  __builtin_memcpy(p.drop_lanes + lane, s.values.drop, lanes * sizeof(float));

  load_tile(static_cast<const T*>(p.x), {p.channels, p.pixels, p.channels_last}, first, count, raw);
  normalise(p, raw, s.values, lanes, Tile<E>{p.n + lane, block});
  if (p.parameter_grads) {
    for (int64_t i = 0; i < (p.channels + 1) / 2; ++i)
      for (int64_t l = 0; l < lanes; l += kLanes) {
        const vf mean = load(s.values.mean + l), rstd = load(s.values.rstd + l);
        const Pair v = raw.get(i, l);
        operand.put(i, l, {(v.a - mean) * rstd, (v.b - mean) * rstd});
      }
    along_tokens(operand, p.channels, count, rows, p.x_tokens + lane / Op::kPer * p.channels, words * Op::kPer);
  }

  load_tile(static_cast<const T*>(p.grad), {p.out, p.pixels, p.channels_last}, first, count, raw);
  const Tile<E> g{p.g + lane, block};
  clear_rows(g, p.out, lanes);
  if (p.drop_grad) __builtin_memset(p.drop_rows + lane, 0, lanes * sizeof(float));
  for (int64_t i = 0; i < (p.out + 1) / 2; ++i) {
    const vf scale_a = splat(p.scale[2 * i]), scale_b = splat(p.scale[2 * i + 1]);
    const vf bias_a = splat(p.b2[2 * i]), bias_b = splat(p.b2[2 * i + 1]);
    Pair sum{};
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const vf d = load(s.values.drop + l);
      const Pair v = raw.get(i, l), scaled = {v.a * scale_a, v.b * scale_b}, dropped = {v.a * d, v.b * d};
      g.put(i, l, scaled);
      operand.put(i, l, dropped);
      sum = {sum.a + dropped.a, sum.b + dropped.b};
      if (p.drop_grad) {
        float* at = p.drop_rows + lane + l;
        store(at, load(at) + scaled.a * bias_a + scaled.b * bias_b);
      }
    }
    g_sums[2 * i] = hsum(sum.a);
    if (2 * i + 1 < p.out) g_sums[2 * i + 1] = hsum(sum.b);
  }
  if (p.parameter_grads)
    along_tokens(operand, p.out, count, rows, p.g_tokens + lane / Op::kPer * p.out, words * Op::kPer);
}

// ---- hidden

constexpr int64_t kItemRows = kRowsMax;  // hidden channels of a work item

template <class Op>
struct HiddenScratch {
  packed32* a1;   // the item's rows of W1, where they had to be converted
  packed32* a2;   // the item's columns of W2
  packed32* p;    // [kItemRows, block] activations, in words along tokens
  packed32* dh;   // [kItemRows, block] gradient of h, in words along tokens
  float *h, *dp;  // [kItemRows, lanes] of one tile
  int64_t size;   // words of all of them

  HiddenScratch(const MlpBackwardParams& q, packed32* base) {
    ScratchArena arena(base);
    a1 = arena.words(kItemRows * words_of<Op>(q.channels));
    a2 = arena.words(kItemRows * words_of<Op>(q.out));
    p = arena.words(kItemRows * (q.block_lanes / Op::kPer));
    dh = arena.words(kItemRows * (q.block_lanes / Op::kPer));
    h = arena.floats(kItemRows * q.lanes);
    dp = arena.floats(kItemRows * q.lanes);
    size = arena.taken();
  }
};

// From h and dp = W2^T s g of a tile: p = act(h) and dh = d dp act'(h), in the item's rows, and dh as an operand.
template <Activation A, bool EXACT, class Op>
__attribute__((noinline)) void hidden_gradient(const MlpBackwardParams& p, const HiddenScratch<Op>& s, int64_t row,
                                               int64_t lane, int64_t lanes) {
  using E = typename Op::Element;
  const Tile<E> dh_tile{p.dh + lane, p.block_lanes};
  E *p_rows = reinterpret_cast<E*>(s.p) + lane, *dh_rows = reinterpret_cast<E*>(s.dh) + lane;
  float* drop_row = p.drop_rows + (1 + row / kItemRows) * p.block_lanes + lane;
  for (int64_t r = 0; r < kItemRows; r += 2) {
    const float *h = s.h + r * lanes, *dp = s.dp + r * lanes;
    const vf bias_a = splat(p.saved ? 0 : p.b1[row + r]), bias_b = splat(p.saved ? 0 : p.b1[row + r + 1]);
    Pair sum{};
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const vf d = load(p.drop_lanes + lane + l);
      const auto a = activate<A, EXACT>(load(h + l) + bias_a, Exponential{});
      const auto b = activate<A, EXACT>(load(h + lanes + l) + bias_b, Exponential{});
      const vf dp_a = load(dp + l), dp_b = load(dp + lanes + l);
      const Pair dh = {dp_a * d * a.slope, dp_b * d * b.slope};
      dh_tile.put((row + r) / 2, l, dh);
      if (p.parameter_grads) {
        E* at = p_rows + r * p.block_lanes + l;
        store(at, a.value);
        store(at + p.block_lanes, b.value);
        at = dh_rows + r * p.block_lanes + l;
        store(at, dh.a);
        store(at + p.block_lanes, dh.b);
        sum = {sum.a + dh.a, sum.b + dh.b};
      }
      if (p.drop_grad) {
        const vf before = r ? load(drop_row + l) : vf{};
        store(drop_row + l, before + a.value * dp_a + b.value * dp_b);
      }
    }
    if (p.parameter_grads) {
      p.db1[row + r] += hsum(sum.a);
      p.db1[row + r + 1] += hsum(sum.b);
    }
  }
}

template <bool EXACT, class... Args>
PK_INLINE void hidden_gradient(Activation activation, const Args&... args) {
  switch (activation) {
    case Activation::gelu: return hidden_gradient<Activation::gelu, EXACT>(args...);
    case Activation::gelu_tanh: return hidden_gradient<Activation::gelu_tanh, EXACT>(args...);
    case Activation::relu: return hidden_gradient<Activation::relu, EXACT>(args...);
    case Activation::relu_squared: return hidden_gradient<Activation::relu_squared, EXACT>(args...);
    case Activation::silu: return hidden_gradient<Activation::silu, EXACT>(args...);
  }
}

// See MlpKernels::hidden. There are zeros in rows beyond the last hidden channel.
template <class T, class S>
void mlp_hidden(const MlpBackwardParams& p, int64_t row, int64_t first, int64_t tokens, packed32* scratch) {
  using Op = typename OperandOf<S>::Op;
  constexpr bool kExact = !__is_same(S, bf16);
  [[maybe_unused]] const MatrixUnit unit;
  const HiddenScratch<Op> s(p, scratch);
  const int64_t block = p.block_lanes, k1 = words_of<Op>(p.channels), k2 = words_of<Op>(p.out);
  const int64_t valid = p.hidden - row < kItemRows ? p.hidden - row : kItemRows;
  const Panel a1 = rows_panel<Op>(p.w1, row, kItemRows, valid, 0, p.channels, s.a1);
  columns_panel<Op>(p.w2, row, kItemRows, p.hidden, p.out, s.a2);
  for (int64_t lane = 0; lane < block; lane += p.lanes) {
    const int64_t lanes = block - lane < p.lanes ? block - lane : p.lanes;
    if (p.saved) {
      const int64_t count = tokens - lane < lanes ? tokens - lane : lanes;
      __builtin_memset(s.h, 0, kItemRows * lanes * sizeof(float));
      for (int64_t r = 0; r < valid; ++r) {
        const S* from = static_cast<const S*>(p.saved) + (row + r) * p.tokens + first + lane;
        convert_row(from, s.h + r * lanes, count);
        if (lane + lanes < block) prefetch<0>(from + lanes, lanes * sizeof(S));
      }
    } else {
      multiply<Op>(a1.data, a1.row, kItemRows, p.n + lane, block, lanes, k1, s.h, lanes, false);
      if (valid < kItemRows) __builtin_memset(s.h + valid * lanes, 0, (kItemRows - valid) * lanes * sizeof(float));
    }
    multiply<Op>(s.a2, k2, kItemRows, p.g + lane, block, lanes, k2, s.dp, lanes, false);
    hidden_gradient<kExact>(p.activation, p, s, row, lane, lanes);
  }
  if (!p.parameter_grads) return;
  const int64_t k = block / Op::kPer, wide_in = rounded_up(p.channels, kLanes), wide_out = rounded_up(p.out, kLanes);
  multiply<Op>(s.p, k, kItemRows, p.g_tokens, p.out, wide_out, k, p.g_p + row * wide_out, wide_out, p.add);
  multiply<Op>(s.dh, k, kItemRows, p.x_tokens, p.channels, wide_in, k, p.x_dh + row * wide_in, wide_in, p.add);
}

// ---- input

// See MlpKernels::pack_input.
template <class T, class S>
void mlp_pack_input(const MlpBackwardParams& p, int64_t first_row, int64_t last_row) {
  using Op = typename OperandOf<S>::Op;
  for (int64_t c = first_row; c < last_row; c += kItemRows)
    columns_panel<Op>(p.w1, c, kItemRows, p.channels, p.hidden, p.w1t + c * words_of<Op>(p.hidden));
}

// See MlpKernels::input; `at` is the tile's first token in the group.
template <class T, class S>
void mlp_input(const MlpBackwardParams& p, int64_t at, int64_t count, int64_t lane, int64_t lanes, packed32* scratch) {
  using Op = typename OperandOf<S>::Op;
  constexpr int64_t kRows = Op::kRows;
  [[maybe_unused]] const MatrixUnit unit;
  float* out = reinterpret_cast<float*>(scratch);
  const int64_t k = words_of<Op>(p.hidden);
  for (int64_t c = 0; c < p.channels; c += kRows) {
    float* rows = out + c * lanes;
    multiply<Op>(p.w1t + c * k, k, kRows, p.dh + lane, p.block_lanes, lanes, k, rows, lanes, false);
    for (int64_t r = 0; r < kRows; ++r) {
      const vf gamma = splat(p.gamma[c + r]);
      for (int64_t l = 0; l < lanes; l += kLanes) store(rows + r * lanes + l, load(rows + r * lanes + l) * gamma);
    }
  }
  store_tile(Tile<float>{scratch, lanes}, {p.channels, p.pixels, p.channels_last}, at, count, p.e);
}

// ---- GroupNorm's backward, over elements of a sample as they lie in memory

// See MlpKernels::reduce.
template <class T>
void mlp_reduce(const void* x, const float* e, float mean, int64_t n, double* sums) {
  const T* in = static_cast<const T*>(x);
  vf first{}, second{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf v = load(e + i);
    first += v;
    second += v * (load(in + i) - mean);
  }
  if (i < n) {
    const vf v = load(e + i, n - i);
    first += v;
    second += v * (load(in + i, n - i) - mean);
  }
  sums[0] = hsum(first);
  sums[1] = hsum(second);
}

// See MlpKernels::finish.
template <class T>
void mlp_finish(const void* x, const void* grad, const float* e, float mean, float rstd, float k0, float k1, int64_t n,
                void* dx) {
  const T *in = static_cast<const T*>(x), *g = static_cast<const T*>(grad);
  T* out = static_cast<T*>(dx);
  const auto value = [&](vf v, vf input) PK_FORCED { return (v * rstd - k0) - (input - mean) * k1; };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf v = load(e + i), own = in ? value(v, load(in + i)) : v;
    store(out + i, g ? own + load(g + i) : own);
  }
  if (i < n) {
    const vf v = load(e + i, n - i), own = in ? value(v, load(in + i, n - i)) : v;
    store(out + i, g ? own + load(g + i, n - i) : own, n - i);
  }
}

// ---- weights

// Input channels c .. c + n - 1. With M = x_dh: dW1 = M diag(gamma) + db1 beta^T, dgamma = sum_j W1 M,
// dbeta = W1^T db1.
template <class W>
void input_channels(const MlpBackwardParams& p, int64_t c, int64_t n) {
  constexpr int kVecs = kInputChannels / kLanes;
  const int64_t wide = rounded_up(p.channels, kLanes);
  vf dgamma[kVecs] = {}, dbeta[kVecs] = {};
  for (int64_t first = 0; first < p.hidden; first += kSummedHidden) {
    const int64_t last = first + kSummedHidden < p.hidden ? first + kSummedHidden : p.hidden;
    vf dgamma_part[kVecs] = {}, dbeta_part[kVecs] = {};
    for (int64_t j = first; j < last; ++j) {
      const vf db1 = splat(p.db1[j]);
      const float* row = p.x_dh + j * wide + c;
      const W* weights = static_cast<const W*>(p.w1.data) + j * p.w1.step + c;
      W* out = static_cast<W*>(p.dw1) + j * p.channels + c;
      for (int v = 0; v < kVecs && v * kLanes < n; ++v) {
        const int64_t at = v * kLanes, left = n - at;
        const vf m = load(row + at), value = m * load(p.gamma + c + at) + db1 * load(p.beta + c + at);
        const vf w = left >= kLanes ? load(weights + at) : load(weights + at, left);
        dgamma_part[v] += w * m;
        dbeta_part[v] += w * db1;
        if (left >= kLanes)
          store(out + at, value);
        else
          store(out + at, value, left);
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      dgamma[v] += dgamma_part[v];
      dbeta[v] += dbeta_part[v];
    }
  }
  for (int v = 0; v < kVecs && v * kLanes < n; ++v) {
    const int64_t at = v * kLanes, left = n - at < kLanes ? n - at : kLanes;
    store(p.dgamma + c + at, dgamma[v], left);
    store(p.dbeta + c + at, dbeta[v], left);
  }
}

// Output channels c .. c + n - 1. With G = g_p: dW2 = diag(s) G, ds = sum_j W2 G + b2 t, db2 = s t.
template <class W>
void output_channels(const MlpBackwardParams& p, int64_t c, int64_t n) {
  const int64_t wide = rounded_up(p.out, kLanes);
  float rows[kOutputChannels * kTransposedHidden];
  vf sum[kOutputChannels] = {};
  for (int64_t j = 0; j < p.hidden; j += kTransposedHidden) {
    const int64_t size = p.hidden - j < kTransposedHidden ? p.hidden - j : kTransposedHidden,
                  whole = size / kLanes * kLanes;
    transpose_words(p.g_p + j * wide + c, wide * 4, rows, kTransposedHidden * 4, size, n);
    for (int64_t i = 0; i < n; ++i) {
      const vf scale = splat(p.scale[c + i]);
      const float* row = rows + i * kTransposedHidden;
      const W* weights = static_cast<const W*>(p.w2.data) + (c + i) * p.w2.step + j;
      W* out = static_cast<W*>(p.dw2) + (c + i) * p.hidden + j;
      for (int64_t l = 0; l < whole; l += kLanes) {
        const vf g = load(row + l);
        sum[i] += g * load(weights + l);
        store(out + l, g * scale);
      }
      if (whole < size) {
        const vf g = load(row + whole, size - whole);
        sum[i] += g * load(weights + whole, size - whole);
        store(out + whole, g * scale, size - whole);
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    p.dscale[c + i] = hsum(sum[i]) + p.b2[c + i] * p.t[c + i];
    p.db2[c + i] = p.scale[c + i] * p.t[c + i];
  }
}

// Work items of the input's channels come first, then those of the output's.
template <class W>
void weight_gradients(const MlpBackwardParams& p, int64_t item) {
  const int64_t inputs = (p.channels + kInputChannels - 1) / kInputChannels;
  if (item < inputs) {
    const int64_t c = item * kInputChannels;
    input_channels<W>(p, c, least(kInputChannels, p.channels - c));
  } else {
    const int64_t c = (item - inputs) * kOutputChannels;
    output_channels<W>(p, c, least(kOutputChannels, p.out - c));
  }
}

int64_t mlp_weight_items(const MlpBackwardParams& p) {
  return (p.channels + kInputChannels - 1) / kInputChannels + (p.out + kOutputChannels - 1) / kOutputChannels;
}

PK_INLINE void mlp_weights(const MlpBackwardParams& p, int64_t item) {
  if (p.w1.dtype == 0) return weight_gradients<float>(p, item);
  if (p.w1.dtype == 1) return weight_gradients<bf16>(p, item);
  weight_gradients<fp16>(p, item);
}

// See MlpKernels::backward_scratch.
template <class T, class S>
int64_t mlp_backward_scratch(const MlpBackwardParams& p) {
  using Op = typename OperandOf<S>::Op;
  const int64_t prepare = PrepareScratch<T, Op>(p, nullptr).size;
  const int64_t hidden = HiddenScratch<Op>(p, nullptr).size;
  const int64_t input = rounded_up(p.channels, kItemRows) * p.input_lanes;
  const int64_t most = prepare > hidden ? prepare : hidden;
  return most > input ? most : input;
}

}  // namespace
}  // namespace pk
