// The MLP's backward with tokens as rows, on AMX tiles (rows_backward_params.h says how its parts are called).
//
// Products are made in blocks of 32 x 32 sums. What is computed from the sums of one block runs between the products of
// the next one, where it costs little. Hidden channels of a block are split, the even ones first: so two vectors of one
// token make 32 neighbours of a row of dh, and two of neighbouring tokens make pairs along tokens, each by one
// instruction (`upper_halves`).
#pragma once

#include "../core/scratch.h"
#include "../product/tile_block.h"
#include "gelu_slope_table.h"
#include "rows_load.h"
#include "rows_parameters.h"

namespace pk {
namespace {

// ---- what is computed from the sums h and dp

// kValue: p, and where that is all, gelu's slope. kGradient: dh. kBoth: all at once.
enum class HiddenWork { kNone, kValue, kGradient, kBoth };

// Where that work stands in a block of 32 tokens x 32 hidden channels; two tokens are done at a time.
struct HiddenBlock {
  const float *h, *dp;  // the sums
  float* slope;         // [32 tokens][32], where value and gradient are separate
  const float* drop;    // of the tokens
  char *p, *dh;         // tiles with tokens along k
  char* dh_rows;        // a tile pair with hidden channels along k
  vf bias[2], sum[2];   // 4 b1 and the sum of dh, of the even and the odd channels
};

template <HiddenWork WORK, bool PARAMETERS, bool DROPPED>
PK_INLINE void two_tokens(const GeluSlopeTable& gelu, HiddenBlock& w) {
  vf slope[4], value[4];  // [token][even, odd]
  if constexpr (WORK != HiddenWork::kGradient) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const GeluAndSlope result = gelu(load(w.h + 16 * i) + w.bias[i % 2]);
      value[i] = result.value, slope[i] = result.slope;
    }
    w.h += 64;
    if constexpr (PARAMETERS) {
      write(w.p, upper_halves(value[0], value[2]));
      write(w.p + kTileBytes, upper_halves(value[1], value[3]));
      w.p += 64;
    }
  }
  if constexpr (WORK == HiddenWork::kValue) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(w.slope + 16 * i, slope[i]);
    w.slope += 64;
  }
  if constexpr (WORK == HiddenWork::kGradient) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) slope[i] = load(w.slope + 16 * i);
    w.slope += 64;
  }
  if constexpr (WORK == HiddenWork::kGradient || WORK == HiddenWork::kBoth) {
    vf dh[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      dh[i] = load(w.dp + 16 * i) * slope[i];
      if constexpr (DROPPED) dh[i] *= splat(w.drop[i / 2]);
    }
    w.dp += 64;
    if constexpr (DROPPED) w.drop += 2;
    write(w.dh_rows, upper_halves(dh[0], dh[1]));
    write(w.dh_rows + 64, upper_halves(dh[2], dh[3]));
    w.dh_rows += 128;
    if constexpr (PARAMETERS) {
      w.sum[0] += dh[0] + dh[2];
      w.sum[1] += dh[1] + dh[3];
      write(w.dh, upper_halves(dh[0], dh[2]));
      write(w.dh + kTileBytes, upper_halves(dh[1], dh[3]));
      w.dh += 64;
    }
  }
}

template <HiddenWork WORK, bool PARAMETERS, bool DROPPED>
PK_INLINE void token_pairs(int64_t pairs, const GeluSlopeTable& gelu, HiddenBlock& w) {
  if constexpr (WORK != HiddenWork::kNone)
    for (int64_t i = 0; i < pairs; ++i) two_tokens<WORK, PARAMETERS, DROPPED>(gelu, w);
}

// ---- products with that work between them

constexpr int64_t kTokenPairs = kRowsSide / 2;  // of a block

// The block's sums over `steps` steps; meanwhile `pairs` pairs of tokens of `work` are done, in the first steps.
template <HiddenWork WORK, bool PARAMETERS, bool DROPPED>
PK_INLINE void multiply_beside(const BlockRows& a, const char* b, int64_t steps, int64_t pairs,
                               const GeluSlopeTable& gelu, HiddenBlock& work, LinesAhead& ahead) {
  const int64_t of_step = (pairs + steps - 1) / steps;
  zero_block();
  const char* rows = a.data;
  for (int64_t k = 0; k < steps; ++k, rows += a.step, b += kTilePair) {
    const int64_t now = least(of_step, pairs), second = now / 2;
    pairs -= now;
    ahead.fetch<4>();
    tile_stream<4>(rows, a.row);
    tile_load<6>(b, 64);
    tile_load<7>(b + kTileBytes, 64);
    tile_stream<5>(rows + a.half, a.row);
    tile_multiply_add<0, 4, 6>();
    tile_multiply_add<1, 4, 7>();
    token_pairs<WORK, PARAMETERS, DROPPED>(now - second, gelu, work);
    tile_multiply_add<2, 5, 6>();
    tile_multiply_add<3, 5, 7>();
    token_pairs<WORK, PARAMETERS, DROPPED>(second, gelu, work);
  }
}

// The block's sums over `steps` steps of whole tiles, added to what the tiles hold.
PK_INLINE void add_products(const char* a, int64_t a_step, const char* b, int64_t b_step, int64_t steps,
                            LinesAhead& ahead) {
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += b_step) {
    ahead.fetch<3>();
    tile_stream<4>(a, 64);
    tile_load<6>(b, 64);
    tile_load<7>(b + kTileBytes, 64);
    tile_stream<5>(a + kTileBytes, 64);
    tile_multiply_add<0, 4, 6>();
    tile_multiply_add<1, 4, 7>();
    tile_multiply_add<2, 5, 6>();
    tile_multiply_add<3, 5, 7>();
  }
}

// ---- hidden

struct RowsHiddenScratch {
  float *h, *dp;      // [2][32, 32] sums of this block and of the one before
  float* slope;       // [subs][32, 32] where h and dp have passes of their own
  char *p, *dh;       // [subs] tile pairs
  float* sums;        // [2][C / 32][32, 32] of the call's last block
  uint16_t *w1, *w2;  // [C / 32] tile pairs where weights are not packed
  int64_t size;       // words of all of them

  RowsHiddenScratch(const RowsBackwardParams& q, packed32* base) {
    ScratchArena arena(base);
    const int64_t subs = q.block_tokens / kRowsSide, parameters = q.parameter_grads ? 1 : 0;
    const auto halves = [&](int64_t n) { return reinterpret_cast<uint16_t*>(arena.words(n / 2)); };
    h = arena.floats(2 * kBlockSums), dp = arena.floats(2 * kBlockSums);
    slope = arena.floats(q.channels >= kRowsTwoPasses ? subs * kBlockSums : 0);
    p = reinterpret_cast<char*>(halves(parameters * subs * kTilePair / 2));
    dh = reinterpret_cast<char*>(halves(parameters * subs * kTilePair / 2));
    sums = arena.floats(parameters * 2 * q.channels * kRowsSide);
    const int64_t weights = q.packed ? 0 : q.channels * kRowsSide;
    w1 = halves(weights), w2 = halves(weights);
    size = arena.taken();
  }
};

// h and dp of hidden channels 32 j .. 32 j + 31 over a block of tokens, and what comes of them.
template <bool PARAMETERS, bool DROPPED>
struct HiddenPass {
  const RowsBackwardParams& q;
  const RowsBlock& block;
  const RowsHiddenScratch& s;
  const char *w1, *w2;  // packed weights of the hidden channels
  const int64_t j, steps;
  HiddenBlock work{};
  LinesAhead ahead;

  PK_INLINE HiddenPass(const RowsBackwardParams& q, const RowsBlock& block, const RowsHiddenScratch& s,
                       const uint16_t* w1, const uint16_t* w2, int64_t j)
      : q(q),
        block(block),
        s(s),
        w1(reinterpret_cast<const char*>(w1)),
        w2(reinterpret_cast<const char*>(w2)),
        j(j),
        steps(q.channels / kRowsSide) {}

  PK_INLINE void begin(int64_t sub) {
    const int64_t sums = sub % 2 * kBlockSums;
    work.h = s.h + sums, work.dp = s.dp + sums, work.slope = s.slope + sub * kBlockSums;
    work.drop = q.drop_rows + sub * kRowsSide;
    work.p = s.p + sub * kTilePair, work.dh = s.dh + sub * kTilePair;
    work.dh_rows = reinterpret_cast<char*>(q.dh_tiles) + (sub * (q.hidden / kRowsSide) + j) * kTilePair;
  }
  PK_INLINE BlockRows normalised(int64_t sub) const {
    return BlockRows::tiles(reinterpret_cast<const char*>(q.n_tiles) + sub * steps * kTilePair);
  }
  PK_INLINE BlockRows gradient(int64_t sub) const {
    const int64_t row = q.out * sizeof(bf16);
    return {static_cast<const char*>(q.g_rows_of(block, sub)), row, 16 * row, kRowsSide * sizeof(bf16)};
  }
  template <HiddenWork WORK>
  PK_INLINE void h_block(int64_t sub, int64_t pairs, const GeluSlopeTable& gelu) {
    multiply_beside<WORK, PARAMETERS, DROPPED>(normalised(sub), w1, steps, pairs, gelu, work, ahead);
    store_block(s.h + sub % 2 * kBlockSums, kRowsSide);
  }
  template <HiddenWork WORK>
  PK_INLINE void dp_block(int64_t sub, int64_t pairs, const GeluSlopeTable& gelu) {
    multiply_beside<WORK, PARAMETERS, DROPPED>(gradient(sub), w2, steps, pairs, gelu, work, ahead);
    store_block(s.dp + sub % 2 * kBlockSums, kRowsSide);
  }
  template <HiddenWork WORK>
  PK_INLINE void rest(const GeluSlopeTable& gelu) {
    token_pairs<WORK, PARAMETERS, DROPPED>(kTokenPairs, gelu, work);
  }

  // h and dp of 32 tokens, then of the next.
  PK_INLINE void one_pass() {
    GeluSlopeTable gelu(kPhiToCut);
    h_block<HiddenWork::kNone>(0, 0, gelu);
    dp_block<HiddenWork::kNone>(0, 0, gelu);
    for (int64_t sub = 1; sub < block.subs(); ++sub) {
      begin(sub - 1);
      h_block<HiddenWork::kBoth>(sub, kTokenPairs / 2, gelu);
      dp_block<HiddenWork::kBoth>(sub, kTokenPairs / 2, gelu);
    }
    begin(block.subs() - 1);
    rest<HiddenWork::kBoth>(gelu);
  }
  // h of all tokens, then dp.
  PK_INLINE void two_passes() {
    GeluSlopeTable gelu(kPhiToCut);
    h_block<HiddenWork::kNone>(0, 0, gelu);
    for (int64_t sub = 1; sub < block.subs(); ++sub) {
      begin(sub - 1);
      h_block<HiddenWork::kValue>(sub, kTokenPairs, gelu);
    }
    begin(block.subs() - 1);
    dp_block<HiddenWork::kValue>(0, kTokenPairs, gelu);
    for (int64_t sub = 1; sub < block.subs(); ++sub) {
      begin(sub - 1);
      dp_block<HiddenWork::kGradient>(sub, kTokenPairs, gelu);
    }
    begin(block.subs() - 1);
    rest<HiddenWork::kGradient>(gelu);
  }
};

template <bool PARAMETERS, bool DROPPED>
__attribute__((noinline)) void rows_hidden_pass(const RowsBackwardParams& q, const RowsBlock& block,
                                                const RowsHiddenScratch& s, const uint16_t* w1, const uint16_t* w2,
                                                int64_t j) {
  HiddenPass<PARAMETERS, DROPPED> pass(q, block, s, w1, w2, j);
  float* db1 = q.db1 + j * kRowsSide;
  const float* bias = q.b1_split + j * kRowsSide;
  for (int i = 0; i < 2; ++i) {
    pass.work.bias[i] = load(bias + 16 * i);
    if (PARAMETERS && block.add) pass.work.sum[i] = load(db1 + 16 * i);
  }
  if (PARAMETERS && block.add)  // the products with tokens along k add to them next
    pass.ahead = LinesAhead(q.sums + j * 2 * q.channels * kRowsSide, 2 * q.channels * kRowsSide * sizeof(float));
  if (q.channels >= kRowsTwoPasses)
    pass.two_passes();
  else
    pass.one_pass();
  if (PARAMETERS)
    for (int i = 0; i < 2; ++i)
      store(db1 + 16 * i, block.last ? pass.work.sum[i] * float(1 / kBeforeCut) : pass.work.sum[i]);
}

// sums [C / 32][32, 32], out = in + a b with the block's tokens along k: a [C / 32][subs of a whole block] tile pairs.
__attribute__((noinline)) void rows_weight_products(const RowsBackwardParams& q, const RowsBlock& block,
                                                    const uint16_t* a, const char* b, const float* in, float* out,
                                                    LinesAhead ahead) {
  const int64_t a_pairs = q.block_tokens / kRowsSide;
  const char* rows = reinterpret_cast<const char*>(a);
  for (int64_t c = 0; c < q.channels; c += kRowsSide) {
    if (block.add)
      load_block(in, kRowsSide);
    else
      zero_block();
    add_products(rows, kTilePair, b, kTilePair, block.subs(), ahead);
    store_block(out, kRowsSide);
    rows += a_pairs * kTilePair, in += kBlockSums, out += kBlockSums;
  }
}

// See RowsBackwardKernels::hidden.
void rows_hidden(const RowsBackwardParams& q, const RowsBlock& block, int64_t j, packed32* scratch) {
  [[maybe_unused]] const MatrixUnit unit;
  const RowsHiddenScratch s(q, scratch);
  const int64_t size = q.channels * kRowsSide, next = (j + 1) * kRowsSide % q.hidden * q.channels;
  const uint16_t *w1 = q.packed ? q.w1_tiles + j * size : s.w1, *w2 = q.packed ? q.w2_tiles + j * size : s.w2;
  if (!q.packed) pack_hidden(q, j, s.w1, s.w2);
  if (!q.parameter_grads)
    return q.dropped ? rows_hidden_pass<false, true>(q, block, s, w1, w2, j)
                     : rows_hidden_pass<false, false>(q, block, s, w1, w2, j);
  if (q.dropped)
    rows_hidden_pass<true, true>(q, block, s, w1, w2, j);
  else
    rows_hidden_pass<true, false>(q, block, s, w1, w2, j);
  LinesAhead ahead1, ahead2;
  if (q.packed && q.channels >= kRowsTwoPasses)
    ahead1 = {q.w1_tiles + next, size * 2}, ahead2 = {q.w2_tiles + next, size * 2};
  float *in = q.sums + j * 2 * size, *out = block.last ? s.sums : in;
  rows_weight_products(q, block, q.g_tiles, s.p, in, out, ahead1);
  rows_weight_products(q, block, q.x_tiles, s.dh, in + size, out + size, ahead2);
  if (!block.last) return;
  q.w1.dtype == 0 ? rows_parameters<float>(q, j, w1, out, out + size)
                  : rows_parameters<bf16>(q, j, w1, out, out + size);
}

// ---- input

// e of 32 tokens x 32 channels at a time. W1's rows for 32 channels stay in L1 while tokens pass, at most
// kRowsInputHidden hidden channels at a time.
PK_INLINE void rows_input_products(const RowsBackwardParams& q, const RowsBlock& block, int64_t first_sub,
                                   int64_t last_sub) {
  const int64_t all = q.hidden / kRowsSide, columns = q.channels / kRowsSide, most = kRowsInputHidden / kRowsSide;
  for (int64_t k = 0; k < all; k += most) {
    const int64_t steps = least(most, all - k);
    const char* b = reinterpret_cast<const char*>(q.w1_rows_tiles) + k * columns * kTilePair;
    for (int64_t c = 0; c < columns; ++c, b += steps * kTilePair) {
      LinesAhead ahead;
      if (q.channels >= kRowsTwoPasses && c + 1 < columns) ahead = {b + steps * kTilePair, steps * kTilePair};
      for (int64_t sub = first_sub; sub < last_sub; ++sub) {
        const char* a = reinterpret_cast<const char*>(q.dh_tiles) + (sub * all + k) * kTilePair;
        float* out = q.e_of(block.first + sub * kRowsSide) + c * kRowsSide;
        if (k > 0)
          load_block(out, q.channels);
        else
          zero_block();
        add_products(a, kTilePair, b, kTilePair, steps, ahead);
        store_block(out, q.channels);
      }
    }
  }
}

// See RowsBackwardKernels::input.
template <class T>
void rows_input(const RowsBackwardParams& q, const RowsBlock& block, int64_t first_sub, int64_t last_sub) {
  [[maybe_unused]] const MatrixUnit unit;
  rows_input_products(q, block, first_sub, last_sub);
  if (!q.norm) return;
  for (int64_t sub = first_sub; sub < last_sub; ++sub) rows_token_sums<T>(q, block, sub);
}

int64_t rows_scratch(const RowsBackwardParams& q) {
  const int64_t hidden = RowsHiddenScratch(q, nullptr).size, load = rows_load_scratch(q);
  return hidden > load ? hidden : load;
}

// T: elements of x.
template <class T>
constexpr RowsBackwardKernels rows_backward_kernels = {rows_scratch, rows_pack,     rows_load<T>,
                                                       rows_hidden,  rows_input<T>, rows_finish<T>};

}  // namespace
}  // namespace pk
