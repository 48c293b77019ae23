// The MLP's forward on AMX tiles for channels_last images, with tokens as the rows of its products. So x, the
// normalised x, the hidden activations and y keep their channels innermost, and nothing is transposed but the weights,
// once a call.
//
// A panel of up to kPanelTokens tokens is normalised, then goes through fc1 and fc2 by chunks of the hidden channels.
// Both products go by blocks of 32 rows of a weight, which stay in the L1 cache, while all tokens stream past them. The
// activation of one block of fc1's output is computed between the products of the next one.
#pragma once

#include "../core/scratch.h"
#include "../isa/vec.h"
#include "../product/operands.h"
#include "../product/tile_block.h"
#include "../product/token_tile.h"
#include "../tuning.h"
#include "activations.h"
#include "gelu_table.h"
#include "mlp.h"

namespace pk {
namespace {

constexpr int64_t kBlock = 32;  // rows of a weight, channels, or tokens of a block at most

// ---- packed weights

// 32 elements of a row as bfloat16s.
PK_INLINE __m512i packed_row(const bf16* from) { return read<__m512i>(from); }
template <class Source>
PK_INLINE __m512i packed_row(const Source* from) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(from + kLanes), (__m512)load(from));
}

// Two tiles of 16 rows and 32 columns of a weight, so that a product of tokens and the tiles sums over the columns.
// SPLIT: the first tile has the even ones of the 32 rows, the second one the odd ones, else the first and the last 16.
template <bool SPLIT, class Source>
PK_INLINE void pack_tiles(const Source* from, int64_t step, packed32* out) {
  for (int half = 0; half < 2; ++half) {
    const Source* first = from + (SPLIT ? half : 16 * half) * step;
    __m512i rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = packed_row(first + i * (SPLIT ? 2 : 1) * step);
    transpose_block([&](int64_t i) PK_FORCED { return &rows[i]; }, reinterpret_cast<char*>(out + half * 256), 64);
  }
}

// Calls for narrow_forward.h, and the hidden channels that it computes at a time.
constexpr int64_t kNarrowChannels = 64, kNarrowHidden = 128, kNarrowBlocks = kNarrowHidden / kBlock;
PK_INLINE bool is_narrow(const MlpParams& p) {
  return p.channels == kNarrowChannels && p.out == kNarrowChannels && p.hidden % kNarrowHidden == 0;
}

// How a call is cut up, in blocks.
struct RowsShape {
  int64_t channels, out, hidden;  // of 32 channels each
  int64_t chunk;                  // of hidden channels that are computed and used at a time

  explicit PK_INLINE RowsShape(const MlpParams& p)
      : channels(p.channels / kBlock), out(p.out / kBlock), hidden(p.hidden / kBlock), chunk(kNarrowBlocks) {
    if (is_narrow(p)) return;
    const int64_t chunks = (p.hidden + kRowsHiddenChunk - 1) / kRowsHiddenChunk;
    chunk = (hidden + chunks - 1) / chunks;
  }
  PK_INLINE int64_t chunk_size(int64_t begin) const { return least(chunk, hidden - begin); }
};

// See MlpKernels::rows_pack. Of W1, items are blocks of hidden channels, of W2 blocks of output channels. W1 has tiles
// [hidden][channels]; W2 has, chunk by chunk, tiles [out][hidden of the chunk].
template <class T>
void mlp_rows_pack(const MlpParams& p, int64_t item, packed32* packed) {
  constexpr bool kSplit = __is_same(T, bf16);  // `load_pair` of T gives the even and the odd channels
  const RowsShape shape(p);
  if (item < shape.hidden) {
    packed32* out = packed + item * shape.channels * kStepWords;
    return weight_at(p.w1, item * kBlock, 0, [&](auto* from) PK_FORCED {
      for (int64_t k = 0; k < shape.channels; ++k) pack_tiles<true>(from + k * kBlock, p.w1.step, out + k * kStepWords);
    });
  }
  const int64_t c = item - shape.hidden;
  weight_at(p.w2, c * kBlock, 0, [&](auto* from) PK_FORCED {
    for (int64_t begin = 0; begin < shape.hidden; begin += shape.chunk) {
      const int64_t size = shape.chunk_size(begin);
      packed32* out = packed + (shape.hidden * shape.channels + begin * shape.out + c * size) * kStepWords;
      for (int64_t k = 0; k < size; ++k)
        pack_tiles<kSplit>(from + (begin + k) * kBlock, p.w2.step, out + k * kStepWords);
    }
  });
}

int64_t mlp_rows_packed(const MlpParams& p) { return (p.channels + p.out) * p.hidden / 2; }
int64_t mlp_rows_items(const MlpParams& p) { return (p.hidden + p.out) / kBlock; }

// ---- activations

// Applies an activation to a row of 32 hidden channels, the even ones first, and writes it in their natural order.
template <Activation A>
struct RowActivation {
  static constexpr float kInputScale = 1;  // of the biases
  PK_INLINE void operator()(const float* h, packed32* out, vf even, vf odd) {
    store_pair(reinterpret_cast<bf16*>(out), {activate<A, false>(load(h) + even, Exponential{}).value,
                                              activate<A, false>(load(h + kLanes) + odd, Exponential{}).value});
  }
};
template <>
struct RowActivation<Activation::gelu> {
  static constexpr float kInputScale = GeluTable::kInputScale;
  GeluTable gelu;
  PK_INLINE RowActivation() : gelu(kGeluToCut) {}
  PK_INLINE void operator()(const float* h, packed32* out, vf even, vf odd) {
    write(out, upper_halves(gelu(load(h) * kInputScale + even), gelu(load(h + kLanes) * kInputScale + odd)));
  }
};

// A block of h whose activation is due, and where it goes.
struct DueBlock {
  const float* h = nullptr;
  packed32* p;
  vf even, odd;  // the biases of its hidden channels

  template <int ROWS, class Act>
  PK_INLINE void rows(Act& act, int64_t first) const {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) act(h + (first + i) * kBlock, p + (first + i) * 16, even, odd);
  }
};

// ---- a panel

// Vectors of channels times `factor`; SPLIT: of each 32 the even ones first.
template <bool SPLIT>
PK_INLINE void channel_table(const float* from, int64_t n, float factor, float* to) {
  for (int64_t c = 0; c < n; c += kBlock) {
    vf a = load(from + c) * factor, b = load(from + c + kLanes) * factor;
    if constexpr (SPLIT) {
      const vf low = a;
      typedef int32_t Order __attribute__((vector_size(64)));
      Order even{};
      for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
      a = (vf)_mm512_permutex2var_ps((__m512)low, (__m512i)even, (__m512)b);
      b = (vf)_mm512_permutex2var_ps((__m512)low, (__m512i)(even + 1), (__m512)b);
    }
    store(to + c, a);
    store(to + c + kLanes, b);
  }
}

// Vectors of the call, in the order in which the products leave their channels.
struct ChannelTables {
  float *gamma, *beta, *b1, *b2, *scale;

  ChannelTables(const MlpParams& q, ScratchArena& arena)
      : gamma(arena.floats(q.channels)),
        beta(arena.floats(q.channels)),
        b1(arena.floats(q.hidden)),
        b2(arena.floats(q.out)),
        scale(arena.floats(q.out)) {}

  // `input_scale`: of the hidden channels' biases.
  template <class T>
  PK_INLINE void fill(const MlpParams& q, float input_scale) const {
    constexpr bool kSplit = __is_same(T, bf16);
    if (q.norm) {
      channel_table<kSplit>(q.gamma, q.channels, 1, gamma);
      channel_table<kSplit>(q.beta, q.channels, 1, beta);
    } else {
      for (int64_t c = 0; c < q.channels; ++c) gamma[c] = 1, beta[c] = 0;
    }
    channel_table<true>(q.b1, q.hidden, input_scale, b1);
    channel_table<kSplit>(q.b2, q.out, 1, b2);
    channel_table<kSplit>(q.scale, q.out, 1, scale);
  }
};

struct PanelScratch {
  packed32 *n, *p;  // [blocks of tokens][blocks of channels][rows][32], operands of fc1 and of fc2
  float* h;         // two blocks of sums of fc1
  float* o;         // sums of fc2: of one block, or of all where there are several chunks
  ChannelTables tables;
  int64_t size;  // words of all of them

  PanelScratch(const MlpParams& q, packed32* base) : PanelScratch(q, ScratchArena(base)) {}

 private:
  PanelScratch(const MlpParams& q, ScratchArena arena) : tables(q, arena) {
    const RowsShape shape(q);
    const int64_t blocks = (q.lanes + kBlock - 1) / kBlock;
    n = arena.words(blocks * shape.channels * kStepWords);
    p = arena.words(blocks * shape.chunk * kStepWords);
    h = arena.floats(2 * kBlockSums);
    o = arena.floats((shape.chunk < shape.hidden ? blocks * shape.out : 1) * kBlockSums);
    size = arena.taken();
  }
};

// The tokens of a panel: blocks of 2 `rows` tokens each, two tiles.
struct TokenPanel {
  int64_t first, count;  // tokens
  int64_t blocks, rows;

  PK_INLINE TokenPanel(int64_t first, int64_t count) : first(first), count(count) {
    blocks = (count + kBlock - 1) / kBlock;
    rows = (count + 2 * blocks - 1) / (2 * blocks);
  }
  PK_INLINE int64_t tokens_of(int64_t block) const { return least(2 * rows, count - block * 2 * rows); }
};

// fc1's operand: (x - mean) rstd gamma + beta of the panel's tokens.
template <class T>
__attribute__((noinline)) void normalise_rows(const MlpParams& p, const ChannelTables& tables, packed32* n,
                                              const TokenPanel& panel) {
  const int64_t blocks = p.channels / kBlock, size = 2 * panel.rows;
  const T* x = static_cast<const T*>(p.x) + panel.first * p.channels;
  each_sample(p.pixels, panel.first, panel.count, [&](int64_t b, int64_t, int64_t lane, int64_t run) PK_FORCED {
    const vf mean = splat(p.norm ? p.mean[b] : 0), rstd = splat(p.norm ? p.rstd[b] : 1);
    for (int64_t t = lane; t < lane + run; ++t) {
      packed32* out = n + t / size * blocks * kStepWords + t % size * 16;
      const T* row = x + t * p.channels;
#pragma GCC unroll 2
      for (int64_t k = 0; k < blocks; ++k) {
        const Pair v = load_pair(row + k * kBlock);
        const float *gamma = tables.gamma + k * kBlock, *beta = tables.beta + k * kBlock;
        const vf a = (v.a - mean) * rstd * load(gamma) + load(beta);
        const vf c = (v.b - mean) * rstd * load(gamma + kLanes) + load(beta + kLanes);
        if constexpr (__is_same(T, bf16))
          store_pair(reinterpret_cast<bf16*>(out + k * kStepWords), {a, c});
        else
          write(out + k * kStepWords, _mm512_cvtne2ps_pbh((__m512)c, (__m512)a));
      }
    }
  });
}

// One step of a product over 32 channels: two tiles of tokens times two of the weight. ROWS rows of the block that is
// due are activated meanwhile.
template <int ROWS, class Act>
PK_INLINE void rows_step(const packed32* a, const packed32* w, int64_t rows, Act& act, const DueBlock& due,
                         int64_t first) {
  tile_stream<4>(a, 64);
  tile_load<6>(w, 64);
  tile_load<7>(w + 256, 64);
  tile_stream<5>(a + rows * 16, 64);
  tile_multiply_add<0, 4, 6>();
  tile_multiply_add<1, 4, 7>();
  due.rows<ROWS / 2>(act, first);
  tile_multiply_add<2, 5, 6>();
  tile_multiply_add<3, 5, 7>();
  due.rows<ROWS - ROWS / 2>(act, first + ROWS / 2);
}

// p of hidden blocks begin .. begin + size - 1. ROWS: rows that are activated in one step of a product.
template <int ROWS, class Act>
__attribute__((noinline)) void rows_fc1(const RowsShape& shape, const PanelScratch& s, const TokenPanel& panel,
                                        const packed32* w1, int64_t begin, int64_t size) {
  Act act;  // not const, see GeluTable
  DueBlock due;
  const int64_t steps = shape.channels, rows = panel.rows, active = (2 * rows + ROWS - 1) / ROWS;
  float *sums = s.h, *other = s.h + kBlockSums;
  for (int64_t j = 0; j < size; ++j) {
    const float* bias = s.tables.b1 + (begin + j) * kBlock;
    for (int64_t block = 0; block < panel.blocks; ++block) {
      const packed32 *a = s.n + block * steps * kStepWords, *w = w1 + (begin + j) * steps * kStepWords;
      zero_block();
      int64_t k = 0;
      if (due.h)
        for (; k < active; ++k) rows_step<ROWS>(a + k * kStepWords, w + k * kStepWords, rows, act, due, k * ROWS);
      for (; k < steps; ++k) rows_step<0>(a + k * kStepWords, w + k * kStepWords, rows, act, due, 0);
      store_block(sums, kBlock, rows);
      due.h = sums;
      due.p = s.p + (block * shape.chunk + j) * kStepWords;
      due.even = load(bias), due.odd = load(bias + kLanes);
      sums = other;
      other = s.h + (sums == s.h ? kBlockSums : 0);
    }
  }
  for (int64_t i = 0; i < kBlock; i += 8) due.template rows<8>(act, i);
}

// y = x + d s (o + b2) of one block of tokens and of output channels.
template <class T>
__attribute__((noinline)) void write_block(const MlpParams& p, const ChannelTables& tables, const float* o,
                                           int64_t first, int64_t count, int64_t c) {
  const vf b2_a = load(tables.b2 + c), b2_b = load(tables.b2 + c + kLanes);
  const vf scale_a = load(tables.scale + c), scale_b = load(tables.scale + c + kLanes);
  each_sample(p.pixels, first, count, [&](int64_t b, int64_t, int64_t lane, int64_t run) PK_FORCED {
    const vf drop = splat(p.drop[b]);
    T* y = static_cast<T*>(p.y) + (first + lane) * p.out + c;
    const T* x = static_cast<const T*>(p.residual ? p.x : p.y) + (first + lane) * p.out + c;
#pragma GCC unroll 2
    for (int64_t t = lane; t < lane + run; ++t, x += p.out, y += p.out) {
      const float* row = o + t * kBlock;
      const vf a = (load(row) + b2_a) * scale_a, v = (load(row + kLanes) + b2_b) * scale_b;
      const Pair old = p.residual ? load_pair(x) : Pair{vf{}, vf{}};
      store_pair(y, {old.a + a * drop, old.b + v * drop});
    }
  });
}

// fc2's sums over the hidden blocks of a chunk, and y after the last one.
template <class T, class Act>
__attribute__((noinline)) void rows_fc2(const MlpParams& q, const RowsShape& shape, const PanelScratch& s,
                                        const TokenPanel& panel, const packed32* w2, int64_t begin, int64_t size) {
  Act act;
  const bool first = begin == 0, last = begin + size == shape.hidden;
  const int64_t rows = panel.rows;
  for (int64_t c = 0; c < shape.out; ++c)
    for (int64_t block = 0; block < panel.blocks; ++block) {
      float* sums = s.o + (shape.chunk < shape.hidden ? block * shape.out + c : 0) * kBlockSums;
      const packed32 *a = s.p + block * shape.chunk * kStepWords, *w = w2 + c * size * kStepWords;
      if (first)
        zero_block();
      else
        load_block(sums, kBlock, rows);
#pragma GCC unroll 2
      for (int64_t k = 0; k < size; ++k) rows_step<0>(a + k * kStepWords, w + k * kStepWords, rows, act, DueBlock{}, 0);
      store_block(sums, kBlock, rows);
      if (last) write_block<T>(q, s.tables, sums, panel.first + block * 2 * rows, panel.tokens_of(block), c * kBlock);
    }
}

template <class T, class Act>
__attribute__((noinline)) void rows_forward(const MlpParams& q, int64_t first, int64_t count, packed32* scratch) {
  const PanelScratch s(q, scratch);
  const RowsShape shape(q);
  const TokenPanel panel(first, count);
  const MatrixUnit unit(token_tiles(panel.rows));
  s.tables.fill<T>(q, Act::kInputScale);
  normalise_rows<T>(q, s.tables, s.n, panel);
  const packed32 *w1 = q.packed, *w2 = q.packed + shape.hidden * shape.channels * kStepWords;
  for (int64_t begin = 0; begin < shape.hidden; begin += shape.chunk) {
    const int64_t size = shape.chunk_size(begin);
    if (shape.channels >= 16)
      rows_fc1<2, Act>(shape, s, panel, w1, begin, size);
    else if (shape.channels >= 8)
      rows_fc1<4, Act>(shape, s, panel, w1, begin, size);
    else if (shape.channels >= 4)
      rows_fc1<8, Act>(shape, s, panel, w1, begin, size);
    else if (shape.channels >= 2)
      rows_fc1<16, Act>(shape, s, panel, w1, begin, size);
    else
      rows_fc1<32, Act>(shape, s, panel, w1, begin, size);
    rows_fc2<T, Act>(q, shape, s, panel, w2 + begin * shape.out * kStepWords, begin, size);
  }
  if (q.token_moments)
    row_moments(static_cast<const T*>(q.y) + first * q.out, q.out, count, q.token_moments + 2 * first);
}

}  // namespace
}  // namespace pk
