// The MLP's forward on float vectors for channels_last images, with tokens as the rows of its products, for the levels
// of AVX-512. Tokens' words are broadcast and weights run along vectors, so x, the normalised x, the hidden activations
// and y keep their channels innermost: nothing is transposed but the weights.
//
// A panel of tokens is normalised, then goes through fc1 and fc2 by chunks of the hidden channels. Of both weights 32
// rows, and kSumWords columns of them, are packed at a time and stay in the L1 cache, while the tokens pass over them
// in blocks of 14. A block's operands lie in lines: 16 channels of each of its tokens, then the next 16. So a product
// reads one stream of weights and one of tokens. Results are those of forward.h, to the last bit.
#pragma once

#include "../core/scratch.h"
#include "../isa/vec.h"
#include "../product/operands.h"
#include "../product/token_tile.h"
#include "../tuning.h"
#include "forward.h"
#include "mlp.h"

namespace pk {
namespace {

constexpr int64_t kRowTokens = kFloatRowsBlock, kRowColumns = 32;  // of a block of sums
constexpr int64_t kRowLine = kRowTokens * kLanes;                  // floats of a line of 16 channels
constexpr int64_t kRowSums = kRowTokens * kRowColumns;

// 32 rows of a weight from `row` on, and k columns from `col` on, that are packed together.
struct WeightPart {
  const Weight& w;
  int64_t row, col, k;

  void pack(float* out) const {
    weight_at(w, row, col, [&](auto* from) PK_FORCED {
      for (int64_t half = 0; half < kRowColumns; half += kLanes)
        for (int64_t i = 0; i < k; i += kLanes)
          transpose_vectors([&](int64_t r) PK_FORCED { return (__m512i)load(from + (half + r) * w.step + i); },
                            reinterpret_cast<char*>(out + i * kRowColumns + half), kRowColumns * sizeof(float));
    });
  }
  // Prefetches the part'th of `parts`.
  PK_INLINE void fetch(int64_t part, int64_t parts) const {
    const int64_t size = w.dtype == 0 ? 4 : 2;
    for (int64_t r = part * kRowColumns / parts; r < (part + 1) * kRowColumns / parts; ++r)
      prefetch<0>(static_cast<const char*>(w.data) + ((row + r) * w.step + col) * size, k * size);
  }
};

// ---- a panel

struct FloatRowsScratch {
  float* n;      // [blocks] the normalised tokens, fc1's operand
  float* p;      // [blocks] a chunk's activations, fc2's operand
  float* w;      // [kSumWords][32] of a weight
  float* h;      // [blocks][tokens][32] fc1's sums
  float* o;      // [out / 32][blocks][tokens][32] fc2's
  int64_t size;  // words of all of them

  FloatRowsScratch(const MlpParams& q, packed32* base) {
    ScratchArena arena(base);
    const int64_t tokens = rounded_up(q.lanes, kRowTokens);
    n = arena.floats(tokens * q.channels);
    p = arena.floats(tokens * least(kFloatRowsChunk, q.hidden));
    w = arena.floats(Floats::kSumWords * kRowColumns);
    h = arena.floats(tokens * kRowColumns);
    o = arena.floats(tokens * q.out);
    size = arena.taken();
  }
};

// sums [14][32] = or += the products of k words of a block's tokens and of 32 columns of weights.
__attribute__((noinline)) void multiply_float_rows(const float* a, const float* w, int64_t k, float* sums, bool add) {
  vf sum[kRowTokens][2];
#pragma GCC unroll 16
  for (int t = 0; t < kRowTokens; ++t) sum[t][0] = sum[t][1] = vf{};
  for (const float* end = a + k * kRowTokens; a < end; a += kRowLine - kLanes)
    for (int i = 0; i < kLanes; ++i, ++a, w += kRowColumns) {
      vf low = load(w), high = load(w + kLanes);
      asm("" : "+v"(low), "+v"(high));
#pragma GCC unroll 16
      for (int t = 0; t < kRowTokens; ++t) {
        vf token = splat(a[t * kLanes]);
        asm("" : "+v"(token));  // one load, not one for each product
        sum[t][0] += token * low;
        sum[t][1] += token * high;
      }
    }
#pragma GCC unroll 16
  for (int t = 0; t < kRowTokens; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* const at = sums + t * kRowColumns + v * kLanes;
      store(at, add ? load(at) + sum[t][v] : sum[t][v]);
    }
}

// n of a panel, with zeros for tokens behind it.
template <class T>
__attribute__((noinline)) void normalise_float_rows(const MlpParams& p, int64_t first, int64_t count, float* n) {
  const T* x = static_cast<const T*>(p.x) + first * p.channels;
  each_sample(p.pixels, first, count, [&](int64_t b, int64_t, int64_t lane, int64_t run) PK_FORCED {
    const vf mean = splat(p.norm ? p.mean[b] : 0), rstd = splat(p.norm ? p.rstd[b] : 1);
    for (int64_t t = lane; t < lane + run; ++t) {
      float* out = n + t / kRowTokens * kRowTokens * p.channels + t % kRowTokens * kLanes;
      const T* row = x + t * p.channels;
      if (p.norm)
        for (int64_t c = 0; c < p.channels; c += kLanes, out += kRowLine)
          store(out, (load(row + c) - mean) * rstd * load(p.gamma + c) + load(p.beta + c));
      else
        for (int64_t c = 0; c < p.channels; c += kLanes, out += kRowLine) store(out, load(row + c));
    }
  });
  for (int64_t t = count; t % kRowTokens != 0; ++t)
    for (int64_t c = 0; c < p.channels; c += kLanes)
      store(n + t / kRowTokens * kRowTokens * p.channels + t % kRowTokens * kLanes + c * kRowTokens, vf{});
}

// Where an activation puts 32 channels of a token.
struct LinePair {
  float* at;
  PK_INLINE void put(int64_t, int64_t, Pair v) const {
    store(at, v.a);
    store(at + kRowLine, v.b);
  }
};

// The blocks of a panel.
struct FloatPanel {
  const MlpParams& q;
  const FloatRowsScratch& s;
  int64_t first, count, blocks;  // its first token, their number

  PK_INLINE WeightPart part1(int64_t row, int64_t col) const {
    return {q.w1, row, col, least(Floats::kSumWords, q.channels - col)};
  }
  PK_INLINE WeightPart part2(int64_t row, int64_t col, int64_t end) const {
    return {q.w2, row, col, least(Floats::kSumWords, end - col)};
  }

  // p of hidden channels begin .. end - 1.
  template <Activation A, bool EXACT>
  __attribute__((noinline)) void fc1(int64_t begin, int64_t end) const {
    Activate<A, EXACT, float> act;  // not const, see GeluTable
    const bool whole = q.channels <= Floats::kSumWords;
    for (int64_t j = begin; j < end; j += kRowColumns) {
      const Pair bias = {load(q.b1 + j) * act.kInputScale, load(q.b1 + j + kLanes) * act.kInputScale};
      for (int64_t k = 0; k < q.channels; k += Floats::kSumWords) {
        const WeightPart part = part1(j, k);
        const bool last = k + part.k == q.channels;
        const WeightPart next = !last                   ? part1(j, k + part.k)
                                : j + kRowColumns < end ? part1(j + kRowColumns, 0)
                                                        : part2(0, begin, end);
        part.pack(s.w);
        for (int64_t b = 0; b < blocks; ++b) {
          float* const sums = s.h + (whole ? 0 : b * kRowSums);
          next.fetch(b, blocks);
          multiply_float_rows(s.n + (b * q.channels + k) * kRowTokens, s.w, part.k, sums, k > 0);
          if (!last) continue;
          float* const out = s.p + (b * (end - begin) + j - begin) * kRowTokens;
          for (int64_t t = 0; t < kRowTokens; ++t)
            act({load(sums + t * kRowColumns), load(sums + t * kRowColumns + kLanes)}, bias, LinePair{out + t * kLanes},
                0, 0);
        }
      }
    }
  }

  // fc2's sums over these channels, and y after the last of them.
  template <class T>
  __attribute__((noinline)) void fc2(int64_t begin, int64_t end) const {
    for (int64_t c = 0; c < q.out; c += kRowColumns)
      for (int64_t k = begin; k < end; k += Floats::kSumWords) {
        const WeightPart part = part2(c, k, end);
        const WeightPart next = k + part.k < end          ? part2(c, k + part.k, end)
                                : c + kRowColumns < q.out ? part2(c + kRowColumns, begin, end)
                                                          : part1(end < q.hidden ? end : 0, 0);
        part.pack(s.w);
        for (int64_t b = 0; b < blocks; ++b) {
          float* const sums = s.o + (c / kRowColumns * blocks + b) * kRowSums;
          next.fetch(b, blocks);
          multiply_float_rows(s.p + (b * (end - begin) + k - begin) * kRowTokens, s.w, part.k, sums, k > 0);
          if (k + part.k == q.hidden) write<T>(sums, b, c);
        }
      }
  }

  // y = x + d s (o + b2) of one block of tokens, channels c .. c + 31.
  template <class T>
  PK_INLINE void write(const float* sums, int64_t block, int64_t c) const {
    const int64_t begin = first + block * kRowTokens, tokens = least(kRowTokens, count - block * kRowTokens);
    const vf bias_a = load(q.b2 + c), bias_b = load(q.b2 + c + kLanes);
    const vf scale_a = load(q.scale + c), scale_b = load(q.scale + c + kLanes);
    each_sample(q.pixels, begin, tokens, [&](int64_t b, int64_t, int64_t lane, int64_t run) PK_FORCED {
      const vf d = splat(q.drop[b]);
      for (int64_t t = lane; t < lane + run; ++t) {
        const float* row = sums + t * kRowColumns;
        const Pair v = {(load(row) + bias_a) * scale_a, (load(row + kLanes) + bias_b) * scale_b};
        const int64_t at = (begin + t) * q.out + c;
        const T* x = static_cast<const T*>(q.x) + at;
        T* y = static_cast<T*>(q.y) + at;
        const Pair old = q.residual ? Pair{load(x), load(x + kLanes)} : Pair{vf{}, vf{}};
        store(y, old.a + v.a * d);
        store(y + kLanes, old.b + v.b * d);
      }
    });
  }
};

template <class T, Activation A, bool EXACT>
void float_rows_forward(const MlpParams& q, int64_t first, int64_t count, packed32* scratch) {
  const FloatRowsScratch s(q, scratch);
  const FloatPanel panel{q, s, first, count, (count + kRowTokens - 1) / kRowTokens};
  normalise_float_rows<T>(q, first, count, s.n);
  const int64_t chunk = least(kFloatRowsChunk, q.hidden);
  for (int64_t begin = 0; begin < q.hidden; begin += chunk) {
    const int64_t end = least(begin + chunk, q.hidden);
    panel.template fc1<A, EXACT>(begin, end);
    panel.template fc2<T>(begin, end);
  }
  if (q.token_moments)
    row_moments(static_cast<const T*>(q.y) + first * q.out, q.out, count, q.token_moments + 2 * first);
}

// y of tokens first .. first + count - 1, of which there are p.lanes at most.
template <class T, class S>
void mlp_float_rows(const MlpParams& p, int64_t first, int64_t count, packed32* scratch) {
  constexpr bool kExact = !__is_same(S, bf16);
  switch (p.activation) {
    case Activation::gelu: return float_rows_forward<T, Activation::gelu, kExact>(p, first, count, scratch);
    case Activation::gelu_tanh: return float_rows_forward<T, Activation::gelu_tanh, kExact>(p, first, count, scratch);
    case Activation::relu: return float_rows_forward<T, Activation::relu, kExact>(p, first, count, scratch);
    case Activation::relu_squared:
      return float_rows_forward<T, Activation::relu_squared, kExact>(p, first, count, scratch);
    case Activation::silu: return float_rows_forward<T, Activation::silu, kExact>(p, first, count, scratch);
  }
}

int64_t float_rows_scratch(const MlpParams& p) { return FloatRowsScratch(p, nullptr).size; }

}  // namespace
}  // namespace pk
