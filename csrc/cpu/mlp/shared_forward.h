// The MLP's forward on AMX tiles for few tokens and wide weights: threads share the weights, so that each is read from
// memory once. All of a step of shared_plan.h is done before the next one begins; its items may run on any thread. The
// results are those of tiles_forward.h, to the last bit.
#pragma once

#include "shared_plan.h"
#include "tiles_forward.h"

namespace pk {
namespace {

// As tiles_forward.h has it, but with operands that the threads share.
struct SharedScratch : TilesScratch {
  static int64_t input_words(const MlpParams& q) { return TileBlocks::words((q.channels + 31) / 32, q.lanes); }
  static int64_t hidden_words(const MlpParams& q) { return TileBlocks::words((q.hidden + 31) / 32, q.lanes); }

  SharedScratch(const MlpParams& q, packed32* base) {
    ScratchArena arena(base);
    const int64_t wide = q.channels > q.out ? q.channels : q.out;
    n.steps = (q.channels + 31) / 32, p.steps = (q.hidden + 31) / 32;
    n.data = q.shared;
    p.data = q.shared + input_words(q);
    const int64_t all_of_32_lanes = Tile<float>::rows(wide) * 32, lanes_of_32 = 32 * q.lanes;
    x = arena.words(all_of_32_lanes > lanes_of_32 ? all_of_32_lanes : lanes_of_32);
    const int64_t steps = chunk(q.hidden) / 32;
    panel = arena.words((n.steps > steps ? n.steps : steps) * kStepWords);
    h = arena.floats(2 * kBlockSums);
    o = arena.floats(32 * q.lanes);
    values = {arena.floats(q.lanes), arena.floats(q.lanes), arena.floats(q.lanes)};
    size = arena.taken();
  }
};

template <class T>
void shared_input(const MlpParams& p, int64_t item, packed32* scratch) {
  SharedScratch s(p, scratch);
  const int64_t first = item * kSharedTokens;
  s.n.data = s.n.block(first);
  load_columns<T>(p, s, first, least(kSharedTokens, p.tokens - first));
}

void shared_hidden(const MlpParams& p, int64_t item, packed32* scratch) {
  const MatrixUnit unit;
  const SharedScratch s(p, scratch);
  const int64_t begin = item * kSharedHidden, size = least(kSharedHidden, p.hidden - begin);
  const PrefetchRows next = begin + size < p.hidden ? prefetch_rows(p.w1, begin + size, 0) : PrefetchRows{};
  with_activation(p.activation, [&](auto act) PK_FORCED {
    columns_hidden<decltype(act)>(p, s, int64_t{0}, p.tokens, begin, size, begin, next);
  });
}

template <class T>
void shared_output(const MlpParams& p, int64_t item, packed32* scratch) {
  const MatrixUnit unit;
  const SharedScratch s(p, scratch);
  const int64_t lanes = rounded_up(p.tokens, kLanes), chunk = TilesScratch::chunk(p.hidden);
  const int64_t c = item * kSharedOutput;
  const TokenLayout layout{p.out, p.pixels, p.channels_last, c, least(c + kSharedOutput, p.out)};
  const Tile<T> y{s.x, lanes};
  s.values.fill(p, 0, p.tokens, lanes);
  if (p.residual) load_tile(static_cast<const T*>(p.x), layout, 0, p.tokens, y);
  for (int64_t j = 0; j < p.hidden; j += chunk) {
    const int64_t size = least(chunk, p.hidden - j);
    const bool last = j + size == p.hidden;
    const PrefetchRows next = !last                ? prefetch_rows(p.w2, c, j + size)
                              : layout.end < p.out ? prefetch_rows(p.w2, c + kSharedOutput, 0)
                                                   : PrefetchRows{};
    columns_fc2(p, s, p.tokens, c, j, size, j, s.o, lanes, j > 0, next);
  }
  write_rows(p, s.o, kSharedOutput, lanes, s.values.drop, c, y, c);
  store_tile(y, layout, 0, p.tokens, static_cast<T*>(p.y));
}

template <class T>
void shared_moments(const MlpParams& p, int64_t item, packed32* scratch) {
  const int64_t first = item * kSharedTokens, count = least(kSharedTokens, p.tokens - first);
  float* const out = p.token_moments + 2 * first;
  if (p.channels_last && p.out % (2 * kLanes) == 0)
    return row_moments(static_cast<const T*>(p.y) + first * p.out, p.out, count, out);
  const SharedScratch s(p, scratch);
  const Tile<T> y{s.x, rounded_up(count, kLanes)};
  load_tile(static_cast<const T*>(p.y), {p.out, p.pixels, p.channels_last}, first, count, y);
  token_moments(y, p.out, count, out);
}

int64_t shared_scratch(const MlpParams& p) { return SharedScratch(p, nullptr).size; }
int64_t shared_words(const MlpParams& p) { return SharedScratch::input_words(p) + SharedScratch::hidden_words(p); }

template <class T>
constexpr SharedForwardKernels shared_forward_kernels{shared_scratch, shared_words,     shared_input<T>,
                                                      shared_hidden,  shared_output<T>, shared_moments<T>};

}  // namespace
}  // namespace pk
