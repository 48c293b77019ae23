// The token mixer's kernels in channels_last, for one instruction-set level: a work item is a strip of rows.
#pragma once

#include "../../common/window_count.h"
#include "../isa/vec.h"
#include "pool_mixer.h"
#include "tasks.h"

namespace pk {
namespace {

// The output rows that one sweep computes. For a pool of 3: SWEEP_ROWS of them; ABOVE and BELOW say whether the image
// has a row before and behind them. SWEEP_ROWS == 0 stands for one row with any other pool (ANY).
template <int SWEEP_ROWS, bool HAS_ABOVE, bool HAS_BELOW>
struct SweptRows {
  static constexpr int ROWS = SWEEP_ROWS ? SWEEP_ROWS : 1;
  static constexpr bool ABOVE = HAS_ABOVE, BELOW = HAS_BELOW, ANY = SWEEP_ROWS == 0;
  // Rows of the window around swept row `row` that are inside the image, for a pool of 3.
  static constexpr int window_rows(int row) { return 1 + (row > 0 || ABOVE) + (row < ROWS - 1 || BELOW); }
};

// One column of a sweep: a pair of vectors of channels for each row.
template <int ROWS>
struct ColumnRows {
  Pair row[ROWS];
};

#define PK_EACH_ROW _Pragma("GCC unroll 2") for (int r = 0; r < ROWS; ++r)

// The windows' vertical sums in one column, and the column itself. at(row) loads a Pair, for row from h - half to
// h + ROWS - 1 + half as far as they are inside the image.
template <class W, class At>
PK_INLINE void column_sums(const PoolMixerParams& p, int64_t h, const At& at, ColumnRows<W::ROWS>& sum,
                           ColumnRows<W::ROWS>& center) {
  if constexpr (W::ANY) {
    const int64_t half = p.half_h, first = h > half ? h - half : 0, count = window_count(h, p.height, p.pool);
    Pair total = at(first);
    if (first == h) center.row[0] = total;
    for (int64_t row = first + 1; row < first + count; ++row) {
      const Pair v = at(row);
      if (row == h) center.row[0] = v;
      total.a += v.a;
      total.b += v.b;
    }
    sum.row[0] = total;
  } else {
    center.row[0] = at(h);
    Pair middle = center.row[0];
    if constexpr (W::ROWS == 2) {
      center.row[1] = at(h + 1);
      middle.a += center.row[1].a;
      middle.b += center.row[1].b;
      sum.row[1] = middle;
    }
    sum.row[0] = middle;
    if constexpr (W::ABOVE) {
      const Pair v = at(h - 1);
      sum.row[0].a += v.a;
      sum.row[0].b += v.b;
    }
    if constexpr (W::BELOW) {
      const Pair v = at(h + W::ROWS);
      sum.row[W::ROWS - 1].a += v.a;
      sum.row[W::ROWS - 1].b += v.b;
    }
  }
}

// Adds up columns to windows: calls emit(w, sum, center, border) for each w, from what column(w, sum, center) writes.
// `border` is True where the window may reach beyond the image, else False. `half`: columns left and right of w, and
// `scratch` is used by pools other than 3 only.
template <class W, class Column, class Emit>
PK_INLINE void sweep(int64_t width, int64_t half, float* scratch, const Column& column, const Emit& emit) {
  constexpr int ROWS = W::ROWS;
  if constexpr (!W::ANY) {
    ColumnRows<ROWS> center{}, next_center{}, previous{}, current{}, next{}, sum;
    column(0, current, center);
    if (width == 1) return emit(0, current, center, True{});
    column(1, next, next_center);
    PK_EACH_ROW sum.row[r] = {current.row[r].a + next.row[r].a, current.row[r].b + next.row[r].b};
    emit(0, sum, center, True{});
    for (int64_t w = 1; w < width - 1; ++w) {
      previous = current;
      current = next;
      center = next_center;
      column(w + 1, next, next_center);
      PK_EACH_ROW sum.row[r] = {(previous.row[r].a + current.row[r].a) + next.row[r].a,
                                (previous.row[r].b + current.row[r].b) + next.row[r].b};
      emit(w, sum, center, False{});
    }
    PK_EACH_ROW sum.row[r] = {current.row[r].a + next.row[r].a, current.row[r].b + next.row[r].b};
    emit(width - 1, sum, next_center, True{});
  } else {
    constexpr int64_t kPair = 2 * kLanes;
    float* columns = scratch;  // [half + width + half] pairs of vectors, zero outside the image
    float* centers = scratch + (width + 2 * half) * kPair;
    __builtin_memset(columns, 0, half * kPair * sizeof(float));
    __builtin_memset(columns + (half + width) * kPair, 0, half * kPair * sizeof(float));
    ColumnRows<1> sum{}, center{};
    for (int64_t w = 0; w < width; ++w) {
      column(w, sum, center);
      write(columns + (half + w) * kPair, sum.row[0]);
      write(centers + w * kPair, center.row[0]);
    }
    for (int64_t w = 0; w < width; ++w) {
      Pair total = read<Pair>(columns + w * kPair);
      for (int64_t k = 1; k <= 2 * half; ++k) {
        const Pair v = read<Pair>(columns + (w + k) * kPair);
        total.a += v.a;
        total.b += v.b;
      }
      sum.row[0] = total;
      center.row[0] = read<Pair>(centers + w * kPair);
      emit(w, sum, center, True{});
    }
  }
}

// 1 in the lanes of the first n elements in the order of load_pair(T*), 0 in the others.
template <class T>
PK_INLINE Pair lanes_pair(int64_t n, const T* tag) {
  float ones[2 * kLanes];
  for (int64_t i = 0; i < n; ++i) ones[i] = 1;
  return floats_pair(ones, n, tag);
}

template <bool PARTIAL, class T>
PK_INLINE Pair get_pair(const T* p, int64_t n) {
  if constexpr (PARTIAL) return load_pair(p, n);
  return load_pair(p);
}
template <bool PARTIAL, class T>
PK_INLINE void put_pair(T* p, Pair v, int64_t n) {
  if constexpr (PARTIAL)
    store_pair(p, v, n);
  else
    store_pair(p, v);
}

// Two rows share the sum of what both windows contain; with only 16 registers they would spill.
constexpr int kSweepRows = PK_LEVEL >= 2 ? 2 : 1;

// Calls kernel.rows<SweptRows<...>>(h) until all of the strip's rows are swept.
template <class Kernel>
PK_INLINE void for_rows(const PoolMixerParams& p, int64_t strip, Kernel& kernel) {
  const int64_t begin = strip * p.strip_rows, end = begin + p.strip_rows < p.height ? begin + p.strip_rows : p.height;
  int64_t h = begin;
  if (p.pool != 3) {
    for (; h < end; ++h) kernel.template rows<SweptRows<0, false, false>>(h);
    return;
  }
  if constexpr (kSweepRows == 2)
    for (; h + 2 <= end; h += 2) {
      const bool above = h > 0, below = h + 2 < p.height;
      if (above && below)
        kernel.template rows<SweptRows<2, true, true>>(h);
      else if (below)
        kernel.template rows<SweptRows<2, false, true>>(h);
      else if (above)
        kernel.template rows<SweptRows<2, true, false>>(h);
      else
        kernel.template rows<SweptRows<2, false, false>>(h);
    }
  for (; h < end; ++h) {
    const bool above = h > 0, below = h + 1 < p.height;
    if (above && below)
      kernel.template rows<SweptRows<1, true, true>>(h);
    else if (below)
      kernel.template rows<SweptRows<1, false, true>>(h);
    else if (above)
      kernel.template rows<SweptRows<1, true, false>>(h);
    else
      kernel.template rows<SweptRows<1, false, false>>(h);
  }
}

template <class T, Task TASK, bool PARTIAL>
struct PoolChannelsLast {
  const PoolMixerParams& p;
  const T* x;     // the sample, from the block's first channel on
  const T* grad;  // for Task::reduce
  T* y;
  int64_t n;  // channels of the block
  Pair coef;  // gamma * layer_scale * drop_scale * rstd
  vf shift;
  float y_shift;
  bool residual;
  float* scratch;
  YMoments moments{};
  Pair q{};

  template <class W>
  __attribute__((noinline)) void rows(int64_t h) {
    constexpr int ROWS = W::ROWS;
    const int64_t channels = p.channels, row = p.width * channels, lanes = n;
    const T *in = x, *gradient = grad + h * row;
    T* out = y + h * row;
    const float* col_count = p.col_counts;
    const vf around = splat(y_shift), sub = shift;
    const vu mask = vu{} + (residual ? 0xffffffffu : 0u);
    const Pair scale = coef;
    const float* inv[ROWS];
    vf row_count[ROWS];
    ColumnRows<ROWS> inner;
    PK_EACH_ROW {
      const int64_t count = W::ANY ? window_count(h, p.height, p.pool) : W::window_rows(r);
      inv[r] = p.inv + count * p.width;
      row_count[r] = splat(float(count));
      const vf whole = splat(p.width > 2 ? inv[r][1] : 0);
      inner.row[r] = {scale.a * whole, scale.b * whole};
    }
    YMoments local;
    Pair total{};
    const auto column = [&](int64_t w, ColumnRows<ROWS>& sum, ColumnRows<ROWS>& center) PK_FORCED {
      const T* here = in + w * channels;
      column_sums<W>(
          p, h,
          [&](int64_t r) PK_FORCED {
            Pair v = get_pair<PARTIAL>(here + r * row, lanes);
            if constexpr (kShifted<T>) v = {v.a - sub, v.b - sub};
            return v;
          },
          sum, center);
    };
    const auto emit = [&](int64_t w, const ColumnRows<ROWS>& sum, const ColumnRows<ROWS>& center, auto border)
                          PK_FORCED {
                            PK_EACH_ROW {
                              Pair c = inner.row[r];
                              vf full = row_count[r] * 3.0f;
                              if constexpr (decltype(border)::value) {
                                const vf here = splat(inv[r][w]);
                                c = {scale.a * here, scale.b * here};
                                full = row_count[r] * splat(col_count[w]);
                              }
                              const Pair s = sum.row[r], m = center.row[r];
                              const Pair difference = {s.a - full * m.a, s.b - full * m.b};
                              if constexpr (TASK == Task::reduce) {
                                const Pair g = get_pair<PARTIAL>(gradient + r * row + w * channels, lanes);
                                total.a += (c.a * difference.a) * g.a;
                                total.b += (c.b * difference.b) * g.b;
                              } else {
                                Pair base = m;
                                if constexpr (kShifted<T>)
                                  base = get_pair<PARTIAL>(in + (h + r) * row + w * channels, lanes);
                                const Pair value = {c.a * difference.a + (vf)((vu)base.a & mask),
                                                    c.b * difference.b + (vf)((vu)base.b & mask)};
                                put_pair<PARTIAL>(out + r * row + w * channels, value, lanes);
                                if constexpr (TASK == Task::forward_stats) {
                                  Pair d = {rounded(value.a, out) - around, rounded(value.b, out) - around};
                                  if constexpr (PARTIAL) {
                                    const Pair used = lanes_pair(lanes, out);
                                    d = {d.a * used.a, d.b * used.b};
                                  }
                                  local.add(d.a);
                                  local.add(d.b);
                                }
                              }
                            }
                          };
    sweep<W>(p.width, p.half_w, scratch, column, emit);
    if constexpr (TASK == Task::forward_stats) moments.add(local);
    if constexpr (TASK == Task::reduce) q = {q.a + total.a, q.b + total.b};
  }
};

template <class T, Task TASK, bool PARTIAL>
PK_INLINE void pool_channels(const PoolMixerParams& p, int64_t b, int64_t strip, int64_t c, int64_t n, float* scratch,
                             YMoments& moments) {
  const int64_t offset = b * p.channels * p.height * p.width + c;
  const T* tag = nullptr;
  const vf scale = splat(p.scale[b]), one = splat(1);
  const Pair coef = floats_pair(p.coef + c, n, tag);
  PoolChannelsLast<T, TASK, PARTIAL> kernel{
      p,
      static_cast<const T*>(p.x) + offset,
      static_cast<const T*>(p.grad) + offset,
      static_cast<T*>(p.out) + offset,
      n,
      TASK == Task::reduce ? Pair{one, one} : Pair{coef.a * scale, coef.b * scale},
      splat(p.mean[b]),
      p.residual ? p.mean[b] : 0,
      p.residual,
      scratch};
  for_rows(p, strip, kernel);
  if constexpr (TASK == Task::forward_stats) moments.add(kernel.moments);
  if constexpr (TASK == Task::reduce)
    store_floats(p.q_partials + (b * p.strips + strip) * p.channels + c, kernel.q, n, tag);
}

template <class T, Task TASK>
void pool_channels_last(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  for (int64_t strip = first; strip < last; ++strip) {
    YMoments moments;
    int64_t c = 0;
    for (; c + 2 * kLanes <= p.channels; c += 2 * kLanes)
      pool_channels<T, TASK, false>(p, b, strip, c, 2 * kLanes, scratch, moments);
    if (c < p.channels) pool_channels<T, TASK, true>(p, b, strip, c, p.channels - c, scratch, moments);
    if constexpr (TASK == Task::forward_stats) {
      const int64_t begin = strip * p.strip_rows;
      const int64_t rows = begin + p.strip_rows < p.height ? p.strip_rows : p.height - begin;
      moments.write_partial(p.y_partials + (b * p.strips + strip) * 3, rows * p.width * p.channels,
                            p.residual ? p.mean[b] : 0);
    }
  }
}

// dx = g + scale e - (x - mean) correct, where e = P^T g - g (without a residual there is no g).
template <class T, bool PARTIAL>
struct BackwardChannelsLast {
  const PoolMixerParams& p;
  const T* x;  // the sample, from the block's first channel on
  const T* grad;
  T* dx;
  int64_t n;
  Pair coef;
  vf mean, correct;
  bool residual;
  float* scratch;

  template <class W>
  __attribute__((noinline)) void rows(int64_t h) {
    constexpr int ROWS = W::ROWS;
    const int64_t channels = p.channels, row = p.width * channels, lanes = n;
    const T *gradient = grad, *input = x + h * row;
    T* out = dx + h * row;
    const float *row_weight = p.row_weight, *col_weight = p.col_weight;
    const Pair scale = coef;
    const vf center_x = mean, k = correct, area = splat(p.area);
    const vf kept = splat(residual);
    const auto column = [&](int64_t w, ColumnRows<ROWS>& sum, ColumnRows<ROWS>& center) PK_FORCED {
      const T* here = gradient + w * channels;
      const vf across = splat(col_weight[w]);
      column_sums<W>(
          p, h,
          [&](int64_t r) PK_FORCED {
            const Pair v = get_pair<PARTIAL>(here + r * row, lanes);
            const vf weight = across * splat(row_weight[r]);
            return Pair{v.a * weight, v.b * weight};
          },
          sum, center);
    };
    const auto emit = [&](int64_t w, const ColumnRows<ROWS>& sum, const ColumnRows<ROWS>&, auto) PK_FORCED {
      PK_EACH_ROW {
        const int64_t here = r * row + w * channels;
        const Pair g = get_pair<PARTIAL>(gradient + h * row + here, lanes), in = get_pair<PARTIAL>(input + here, lanes);
        const Pair s = sum.row[r], e = {s.a - area * g.a, s.b - area * g.b}, d = {in.a - center_x, in.b - center_x};
        const Pair value = {kept * g.a + (scale.a * e.a - d.a * k), kept * g.b + (scale.b * e.b - d.b * k)};
        put_pair<PARTIAL>(out + here, value, lanes);
      }
    };
    sweep<W>(p.width, p.half_w, scratch, column, emit);
  }
};

template <class T, bool PARTIAL>
PK_INLINE void backward_channels(const PoolMixerParams& p, int64_t b, int64_t strip, int64_t c, int64_t n,
                                 float* scratch) {
  const int64_t offset = b * p.channels * p.height * p.width + c;
  const vf scale = splat(p.scale[b] / p.area);
  const Pair coef = floats_pair(p.coef + c, n, static_cast<const T*>(nullptr));
  BackwardChannelsLast<T, PARTIAL> kernel{p,
                                          static_cast<const T*>(p.x) + offset,
                                          static_cast<const T*>(p.grad) + offset,
                                          static_cast<T*>(p.out) + offset,
                                          n,
                                          {coef.a * scale, coef.b * scale},
                                          splat(p.mean[b]),
                                          splat(p.correct[b]),
                                          p.residual,
                                          scratch};
  for_rows(p, strip, kernel);
}

template <class T>
void backward_channels_last(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  for (int64_t strip = first; strip < last; ++strip) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= p.channels; c += 2 * kLanes)
      backward_channels<T, false>(p, b, strip, c, 2 * kLanes, scratch);
    if (c < p.channels) backward_channels<T, true>(p, b, strip, c, p.channels - c, scratch);
  }
}

}  // namespace
}  // namespace pk
