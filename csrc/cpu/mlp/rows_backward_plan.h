// How the MLP's backward with tokens as rows goes through a call (rows_backward_params.h), whoever shares out the
// items.
#pragma once

#include <algorithm>
#include <vector>

#include "../core/scratch.h"
#include "../tuning.h"
#include "rows_backward_params.h"

namespace pk {
namespace {

// Whether this way is taken. Products run over all of C or hidden at once, by whole tiles, and C's weights must fit
// caches beside the tokens.
inline bool rows_backward_fits(const MlpGradients& p) {
  const auto whole = [](int64_t n) { return n % kRowsSide == 0; };
  return p.channels_last && p.activation == Activation::gelu && p.w1.dtype <= 1 && p.w2.dtype == p.w1.dtype &&
         !p.saved && !p.drop_grad && p.out == p.channels && whole(p.channels) && whole(p.hidden) &&
         p.channels <= kRowsBackwardChannels && p.tokens >= kRowsBackwardTokens;
}

// How the call is cut up, from shapes alone; with `block_tokens` that many tokens make a block.
inline void plan_rows_backward(RowsBackwardParams& p, int64_t block_tokens = 0) {
  const auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  const int64_t elements = p.channels <= kRowsPackedChannels ? kRowsBlockElements : kRowsWideBlockElements;
  const int64_t most = std::max<int64_t>(kRowsSide, std::min(kRowsBlockTokens, elements / p.channels));
  const int64_t blocks = (p.tokens + most - 1) / most;
  p.block_tokens = block_tokens ? block_tokens : up((p.tokens + blocks - 1) / blocks, kRowsSide);
  // Beside a block there is at most all but one token of the sample that it continues.
  p.ring_tokens = up(std::min(p.tokens, p.pixels - 1 + p.block_tokens), kRowsSide);
  p.packed = p.channels <= kRowsPackedChannels && p.tokens > p.block_tokens;
  p.dropped = false;
  for (int64_t b = 0; b < p.batch; ++b) p.dropped |= !(p.drop[b] == 1.0f);
}

// Hands out the arrays; the arena may only measure.
template <class Arena>
void take_rows_backward(Arena& arena, RowsBackwardParams& p) {
  const auto halves = [&](int64_t n) { return reinterpret_cast<uint16_t*>(arena.words((n + 1) / 2)); };
  const int64_t c = p.channels, h = p.hidden, block = p.block_tokens, of_parameters = p.parameter_grads ? 1 : 0;
  p.b1_split = arena.floats(h), p.gamma_split = arena.floats(c), p.beta_split = arena.floats(c);
  p.w1_tiles = halves(p.packed ? h * c : 0), p.w2_tiles = halves(p.packed ? h * c : 0);
  p.w1_rows_tiles = halves(h * c);
  p.n_tiles = halves(block * c);
  p.x_tiles = halves(of_parameters * block * c), p.g_tiles = halves(of_parameters * block * c);
  p.g_copies = halves((p.floats ? block : kRowsSide) * c);
  p.dh_tiles = halves(block * h);
  p.drop_rows = arena.floats(block);
  p.g_sums = arena.floats(of_parameters * block / kRowsSide * c);
  p.e = arena.floats(p.ring_tokens * c), p.e_sum = arena.floats(p.ring_tokens),
  p.e_product = arena.floats(p.ring_tokens);
  p.k0 = arena.floats(p.batch), p.k1 = arena.floats(p.batch);
  p.sums = arena.floats(p.tokens > block ? of_parameters * 2 * h * c : 0);
  p.db1 = arena.floats(of_parameters * h);
  const int64_t parts = of_parameters * h / kRowsSide * c;
  p.scale_sums = arena.floats(parts), p.gamma_sums = arena.floats(parts), p.beta_sums = arena.floats(parts);
  p.t = reinterpret_cast<double*>(arena.words(2 * c));
}

// Calls the kernels. each(count, f) calls f(i, scratch) for i < count, and may share these among `threads` threads.
template <class Each>
class RowsBackwardRun {
 public:
  RowsBackwardRun(const RowsBackwardKernels& kernels, const RowsBackwardParams& params, int64_t worker_count,
                  const Each& each_item)
      : k(kernels), p(params), threads(worker_count), each(each_item) {}

  void operator()() {
    split(p.b1, p.hidden, 4, p.b1_split);
    split(p.gamma, p.channels, 4, p.gamma_split);
    split(p.beta, p.channels, 4, p.beta_split);
    std::fill(p.t, p.t + p.channels, 0.0);
    each(p.hidden / kRowsSide, [&](int64_t j, uint32_t*) { k.pack(p, j); });
    const RowsBlock first = block_at(0);
    start(first);
    each(load_items(first), [&](int64_t i, uint32_t* scratch) { load(first, i, scratch); });
    int64_t done = 0;  // tokens of complete samples
    for (int64_t at = 0; at < p.tokens; at += p.block_tokens) {
      const RowsBlock block = block_at(at);
      sum_gradient(block);
      each(p.hidden / kRowsSide, [&](int64_t j, uint32_t* scratch) { k.hidden(p, block, j, scratch); });
      products_for_input(block);
      done = finish_samples(done, block);
    }
    if (p.parameter_grads) write_vectors();
  }

 private:
  const RowsBackwardKernels& k;
  const RowsBackwardParams& p;
  const int64_t threads;
  const Each& each;

  RowsBlock block_at(int64_t at) const {
    const int64_t tokens = std::min(p.block_tokens, p.tokens - at);
    return {at, tokens, at > 0, at + tokens == p.tokens};
  }

  static void split(const float* from, int64_t n, float factor, float* to) {
    for (int64_t b = 0; b < n; b += 32)
      for (int64_t i = 0; i < 16; ++i)
        to[b + i] = factor * from[b + 2 * i], to[b + 16 + i] = factor * from[b + 2 * i + 1];
  }
  // Where element i of a vector is when it is split.
  static int64_t split_at(int64_t i) { return i / 32 * 32 + i % 2 * 16 + i % 32 / 2; }

  // Writes drop_rows, which is read where `dropped`.
  void start(const RowsBlock& block) const {
    if (!p.dropped) return;
    for (int64_t i = 0; i < block.tokens;) {
      const int64_t b = (block.first + i) / p.pixels, end = std::min(block.tokens, (b + 1) * p.pixels - block.first);
      std::fill(p.drop_rows + i, p.drop_rows + end, p.drop[b]);
      i = end;
    }
    std::fill(p.drop_rows + block.tokens, p.drop_rows + block.subs() * kRowsSide, 0.0f);
  }

  // e of the block, and the next block's operands: items of both are shared out together.
  void products_for_input(const RowsBlock& block) const {
    const int64_t groups =
        std::min(block.subs(), threads * ((block.subs() + threads * kRowsInputSubs - 1) / (threads * kRowsInputSubs)));
    const RowsBlock next = block_at(std::min(p.tokens, block.first + p.block_tokens));
    start(next);
    each(groups + load_items(next), [&](int64_t i, uint32_t* scratch) {
      if (i < groups)
        k.input(p, block, i * block.subs() / groups, (i + 1) * block.subs() / groups);
      else
        load(next, i - groups, scratch);
    });
  }

  // Items of `load` and `finish` are of some tokens, so that each has something to do.
  int64_t item_subs() const { return std::max<int64_t>(1, kRowsItemElements / (kRowsSide * p.channels)); }
  int64_t load_items(const RowsBlock& block) const { return (block.subs() + item_subs() - 1) / item_subs(); }
  void load(const RowsBlock& block, int64_t item, uint32_t* scratch) const {
    k.load(p, block, item * item_subs(), std::min(block.subs(), (item + 1) * item_subs()), scratch);
  }

  void sum_gradient(const RowsBlock& block) const {
    for (int64_t i = 0; p.parameter_grads && i < block.subs(); ++i)
      for (int64_t c = 0; c < p.out; ++c) p.t[c] += p.g_sums[i * p.out + c];
  }

  // dx of the samples from token `done` on that end in this block; returns the first token of the next sample.
  int64_t finish_samples(int64_t done, const RowsBlock& block) const {
    const int64_t complete = (block.first + block.tokens) / p.pixels * p.pixels;
    if (complete == done) return done;
    for (int64_t b = done / p.pixels; b < complete / p.pixels; ++b) group_norm(b);
    const int64_t tokens = item_subs() * kRowsSide;
    each((complete - done + tokens - 1) / tokens, [&](int64_t i, uint32_t*) {
      const int64_t at = done + i * tokens;
      k.finish(p, at, std::min(tokens, complete - at));
    });
    return complete;
  }

  // k0 and k1 of a sample (docs/algebra.md, "MLP").
  void group_norm(int64_t b) const {
    const double rstd = p.rstd[b], size = double(p.pixels) * p.channels;
    p.k0[b] = p.norm ? rstd * ring_sum(p.e_sum, b * p.pixels, p.pixels) / size : 0;
    p.k1[b] = p.norm ? rstd * rstd * rstd * ring_sum(p.e_product, b * p.pixels, p.pixels) / size : 0;
  }
  double ring_sum(const float* values, int64_t first, int64_t count) const {
    constexpr int64_t kWays = 8;  // additions that do not wait for each other
    double sum[kWays] = {};
    for (const int64_t end = first + count; first < end;) {
      const int64_t at = first % p.ring_tokens, run = std::min(end - first, p.ring_tokens - at);
      int64_t i = 0;
      for (; i + kWays <= run; i += kWays)
        for (int64_t way = 0; way < kWays; ++way) sum[way] += values[at + i + way];
      for (; i < run; ++i) sum[0] += values[at + i];
      first += run;
    }
    for (int64_t way = 1; way < kWays; ++way) sum[0] += sum[way];
    return sum[0];
  }

  // The gradients that are vectors, from the sums; they were split.
  void write_vectors() const {
    for (int64_t j = 0; j < p.hidden; ++j) p.db1_out[j] = p.db1[split_at(j)];
    std::vector<double> sums(3 * p.channels);
    double *scale = sums.data(), *gamma = scale + p.channels, *beta = gamma + p.channels;
    for (int64_t i = 0; i < p.hidden / kRowsSide; ++i)
      for (int64_t c = 0; c < p.channels; ++c) {
        scale[c] += p.scale_sums[i * p.channels + c];
        gamma[c] += p.gamma_sums[i * p.channels + c];
        beta[c] += p.beta_sums[i * p.channels + c];
      }
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t at = split_at(c);
      p.db2[c] = p.scale[c] * p.t[at];
      p.dscale[c] = scale[at] + p.b2[c] * p.t[at];
      p.dgamma[c] = gamma[at];
      p.dbeta[c] = beta[at];
    }
  }
};

}  // namespace
}  // namespace pk
