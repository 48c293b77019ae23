// `rows_forward` for 64 channels, where the activations take as long as the products. fc1 of a chunk of hidden channels
// goes on at the same time as fc2 of the chunk before, so that there are products enough to compute activations between
// them. Blocks have 32 tokens. fc1's sums are stored one step of fc2 after their last product: they are ready by then.
#pragma once

#include "rows_forward.h"

namespace pk {
namespace {

constexpr int64_t kNarrowSteps = kNarrowChannels / kBlock;

struct NarrowScratch {
  packed32* n;   // [steps], fc1's operand
  packed32* p;   // [2 chunks][blocks of a chunk], fc2's operand
  float *h, *o;  // two blocks of fc1's sums; fc2's of both blocks of output channels
  ChannelTables tables;
  int64_t size;  // words of all of them

  NarrowScratch(const MlpParams& q, packed32* base) : NarrowScratch(q, ScratchArena(base)) {}

 private:
  NarrowScratch(const MlpParams& q, ScratchArena arena)
      : n(arena.words(kNarrowSteps * kStepWords)),
        p(arena.words(2 * kNarrowBlocks * kStepWords)),
        h(arena.floats(2 * kBlockSums)),
        o(arena.floats(kNarrowSteps * kBlockSums)),
        tables(q, arena),
        size(arena.taken()) {}
};

// One step of fc1 for 16 hidden channels: two tiles of tokens times one of W1. ROWS rows are activated after each
// product.
template <int ROWS, class Act>
PK_INLINE void narrow_fc1_step(const packed32* a, const packed32* w, Act& act, const DueBlock& due, int64_t first) {
  tile_stream<6>(w, 64);
  tile_load<7>(a, 64);
  tile_multiply_add<0, 7, 6>();
  due.rows<ROWS>(act, first);
  tile_load<7>(a + 256, 64);
  tile_multiply_add<1, 7, 6>();
  due.rows<ROWS>(act, first + ROWS);
}

// One step of fc2: two tiles of tokens times two of W2, whose sums are in tiles 2 to 5.
template <int ROWS, class Act>
PK_INLINE void narrow_fc2_step(const packed32* a, const packed32* w, Act& act, const DueBlock& due, int64_t first) {
  tile_stream<6>(w, 64);
  tile_load<7>(a, 64);
  tile_multiply_add<2, 7, 6>();
  due.rows<ROWS>(act, first);
  tile_load<7>(a + 256, 64);
  tile_multiply_add<4, 7, 6>();
  due.rows<ROWS>(act, first + ROWS);
  tile_stream<6>(w + 256, 64);
  tile_multiply_add<5, 7, 6>();
  due.rows<ROWS>(act, first + 2 * ROWS);
  tile_load<7>(a, 64);
  tile_multiply_add<3, 7, 6>();
  due.rows<ROWS>(act, first + 3 * ROWS);
}

PK_INLINE void narrow_load(const float* o) {
  tile_load<2>(o, 128), tile_load<3>(o + 16, 128);
  tile_load<4>(o + 16 * kBlock, 128), tile_load<5>(o + 16 * kBlock + 16, 128);
}
PK_INLINE void narrow_store(float* o) {
  tile_store<2>(o, 128), tile_store<3>(o + 16, 128);
  tile_store<4>(o + 16 * kBlock, 128), tile_store<5>(o + 16 * kBlock + 16, 128);
}

// What an iteration works on: fc1 of one chunk and fc2 of the one before.
struct NarrowChunk {
  const packed32 *n, *w1;  // fc1's operands
  const float* b1;
  packed32* out;           // the activations of fc1's chunk
  const packed32 *p, *w2;  // fc2's operands
  bool first;              // whether fc2's chunk is the first of its tokens
};

// Half of the blocks of fc1, and fc2's sums of output channels 32 c to 32 c + 31.
template <bool FC1, bool FC2, class Act>
PK_INLINE void narrow_half(const NarrowScratch& s, const NarrowChunk& chunk, Act& act, DueBlock& due, int64_t c) {
  float* const o = s.o + c * kBlockSums;
  if constexpr (FC2) {
    if (chunk.first)
      tile_zero<2>(), tile_zero<3>(), tile_zero<4>(), tile_zero<5>();
    else
      narrow_load(o);
  }
  for (int64_t k = 0; k < kNarrowBlocks; ++k) {  // of fc2; of fc1 they are halves of blocks
    const int64_t j = c * (kNarrowBlocks / 2) + k / 2, half = k % 2;
    float* const sums = s.h + j % 2 * kBlockSums + half * 16;
    if constexpr (FC1) {
      const packed32* w = chunk.w1 + j * kNarrowSteps * kStepWords + half * 256;
      tile_zero<0>(), tile_zero<1>();
      narrow_fc1_step<2>(chunk.n, w, act, due, half * 16);
      narrow_fc1_step<2>(chunk.n + kStepWords, w + kStepWords, act, due, half * 16 + 4);
    }
    if constexpr (FC2)
      narrow_fc2_step<FC1 ? 2 : 0>(chunk.p + k * kStepWords, chunk.w2 + (c * kNarrowBlocks + k) * kStepWords, act, due,
                                   half * 16 + 8);
    else
      due.rows<8>(act, half * 16 + 8);
    if constexpr (FC1) {
      tile_store<0>(sums, 128), tile_store<1>(sums + 16 * kBlock, 128);
      if (half == 0) continue;
      due = {sums - 16, chunk.out + j * kStepWords, load(chunk.b1 + j * kBlock), load(chunk.b1 + j * kBlock + kLanes)};
    }
  }
  if constexpr (FC2) narrow_store(o);
}

template <class T, class Act>
__attribute__((noinline)) void narrow_forward(const MlpParams& q, int64_t first, int64_t count, packed32* scratch) {
  const NarrowScratch s(q, scratch);
  const MatrixUnit unit;
  s.tables.fill<T>(q, Act::kInputScale);
  clear_words(s.n, kNarrowSteps * kStepWords);  // the last block may have fewer tokens
  const packed32 *w1 = q.packed, *w2 = q.packed + q.hidden * q.channels / 2;
  const int64_t chunks = q.hidden / kNarrowHidden, blocks = (count + kBlock - 1) / kBlock;
  const int64_t w1_words = kNarrowBlocks * kNarrowSteps * kStepWords, p_words = kNarrowBlocks * kStepWords;
  Act act;                             // not const, see GeluTable
  DueBlock due{s.h, s.p, vf{}, vf{}};  // the first iteration has none: what it writes is overwritten
  for (int64_t i = 0; i <= blocks * chunks; ++i) {
    const int64_t now = i % chunks, before = (i + chunks - 1) % chunks;
    const NarrowChunk chunk{.n = s.n,
                            .w1 = w1 + now * w1_words,
                            .b1 = s.tables.b1 + now * kNarrowHidden,
                            .out = s.p + i % 2 * p_words,
                            .p = s.p + (i + 1) % 2 * p_words,
                            .w2 = w2 + before * w1_words,
                            .first = before == 0};
    const bool more = i < blocks * chunks;
    if (more && now == 0) {
      const int64_t at = i / chunks * kBlock;
      TokenPanel block(first + at, least(kBlock, count - at));
      block.rows = 16;
      normalise_rows<T>(q, s.tables, s.n, block);
    }
    if (!more) due.rows<32>(act, 0);
    for (int64_t c = 0; c < kNarrowSteps; ++c)
      if (i == 0)
        narrow_half<true, false>(s, chunk, act, due, c);
      else if (more)
        narrow_half<true, true>(s, chunk, act, due, c);
      else
        narrow_half<false, true>(s, chunk, act, due, c);
    if (i == 0 || before != chunks - 1) continue;
    const int64_t at = (i - 1) / chunks * kBlock;
    for (int64_t c = 0; c < kNarrowSteps; ++c)
      write_block<T>(q, s.tables, s.o + c * kBlockSums, first + at, least(kBlock, count - at), c * kBlock);
  }
  if (q.token_moments)
    row_moments(static_cast<const T*>(q.y) + first * q.out, q.out, count, q.token_moments + 2 * first);
}

// See MlpKernels::rows_forward.
template <class T, Activation A>
PK_INLINE void rows_or_narrow(const MlpParams& p, int64_t first, int64_t count, packed32* scratch) {
  if (is_narrow(p)) return narrow_forward<T, RowActivation<A>>(p, first, count, scratch);
  rows_forward<T, RowActivation<A>>(p, first, count, scratch);
}
template <class T>
void mlp_rows_forward(const MlpParams& p, int64_t first, int64_t count, packed32* scratch) {
  switch (p.activation) {
    case Activation::gelu: return rows_or_narrow<T, Activation::gelu>(p, first, count, scratch);
    case Activation::gelu_tanh: return rows_or_narrow<T, Activation::gelu_tanh>(p, first, count, scratch);
    case Activation::relu: return rows_or_narrow<T, Activation::relu>(p, first, count, scratch);
    case Activation::relu_squared: return rows_or_narrow<T, Activation::relu_squared>(p, first, count, scratch);
    case Activation::silu: return rows_or_narrow<T, Activation::silu>(p, first, count, scratch);
  }
}

int64_t mlp_rows_scratch(const MlpParams& p) {
  return is_narrow(p) ? NarrowScratch(p, nullptr).size : PanelScratch(p, nullptr).size;
}

}  // namespace
}  // namespace pk
