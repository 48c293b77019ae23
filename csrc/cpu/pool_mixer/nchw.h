// The token mixer's kernels in NCHW, for one instruction-set level: work item i is strip i % strips of channel
// i / strips.
#pragma once

#include "../../common/window_count.h"
#include "../isa/vec.h"
#include "pool_mixer.h"
#include "tasks.h"

namespace pk {
namespace {

// A strip of one channel's plane, copied into `scratch` as rows of floats with zeros around them. The zeros behind a
// row are those in front of the next.
struct Strip {
  const PoolMixerParams& p;
  int64_t half_w, stride;  // stride: floats from a row to the next
  int64_t begin, end;      // rows of the output
  int64_t first, last;     // rows of the input that their windows need
  float *rows, *sums;      // the copied rows; sums of pools other than 3, a vector for each row

  Strip(const PoolMixerParams& params, int64_t strip, float* scratch) : p(params), half_w(params.half_w) {
    const int64_t half = p.half_h, pad = (half_w + kLanes - 1) / kLanes * kLanes;
    stride = (p.width + kLanes - 1) / kLanes * kLanes + pad;
    begin = strip * p.strip_rows;
    end = begin + p.strip_rows < p.height ? begin + p.strip_rows : p.height;
    first = begin > half ? begin - half : 0;
    last = end + half < p.height ? end + half : p.height;
    rows = scratch + pad;
    sums = rows + (last - first) * stride;
    for (int64_t h = first - 1; h < last; ++h)
      for (int64_t i = stride - pad; i < stride; i += kLanes) write(row(h) + i, vf{});
  }
  PK_INLINE float* row(int64_t h) const { return rows + (h - first) * stride; }

  // Fills the rows with value(v, w, partial) for each vector v of columns from w on. `partial` is True for the last
  // vector of a row that is not full; the value must then be zero beyond the row.
  template <class T, class Value>
  PK_INLINE void fill(const T* plane, const Value& value) const {
    for (int64_t h = first; h < last; ++h) {
      const T* in = plane + h * p.width;
      float* out = row(h);
      int64_t w = 0;
      for (; w + kLanes <= p.width; w += kLanes) write(out + w, value(load(in + w), w, False{}));
      if (w < p.width) write(out + w, value(load(in + w, p.width - w), w, True{}));
    }
  }

  // Calls use(h, sum, center) with the window's sum for each row of the output, at the vector of columns from w on.
  // WEIGHTED: row h is multiplied by row_weight[h].
  template <int POOL, bool WEIGHTED, class Use>
  PK_INLINE void pool(int64_t w, const Use& use) const {
    if constexpr (POOL == 3) {
      const auto across = [&](int64_t h, vf& center) PK_FORCED {
        const float* at = row(h) + w;
        center = read<vf>(at);
        const vf sum = (read<vf>(at - 1) + center) + read<vf>(at + 1);
        return WEIGHTED ? sum * splat(p.row_weight[h]) : sum;
      };
      vf center, next_center{}, previous{}, next{};
      if (begin > 0) previous = across(begin - 1, center);
      vf current = across(begin, center);
      for (int64_t h = begin; h < end; ++h) {
        next = vf{};
        if (h + 1 < p.height) next = across(h + 1, next_center);
        use(h, (previous + current) + next, center);
        previous = current;
        current = next;
        center = next_center;
      }
    } else {
      for (int64_t h = first; h < last; ++h) {
        const float* at = row(h) + w - half_w;
        vf sum = read<vf>(at);
        for (int64_t k = 1; k <= 2 * half_w; ++k) sum += read<vf>(at + k);
        write(sums + (h - first) * kLanes, WEIGHTED ? sum * splat(p.row_weight[h]) : sum);
      }
      for (int64_t h = begin; h < end; ++h) {
        const int64_t above = h > p.half_h ? h - p.half_h : 0, count = window_count(h, p.height, p.pool);
        vf sum{};
        for (int64_t r = above; r < above + count; ++r) sum += read<vf>(sums + (r - first) * kLanes);
        use(h, sum, read<vf>(row(h) + w));
      }
    }
  }
};

// The lanes [0, n) of v, zero in the others.
PK_INLINE vf head(vf v, int64_t n) {
  float lanes[kLanes];
  write(lanes, v);
  return load(lanes, n);
}

template <class T, int POOL, Task TASK>
struct PoolNchw {
  const PoolMixerParams& p;
  const Strip& strip;
  const T* x;
  const T* grad;  // for Task::reduce
  T* y;
  vf coef;
  float mean;
  YMoments moments{};
  vf q{};

  template <bool PARTIAL>
  __attribute__((noinline)) void columns(int64_t w, int64_t n) {
    const vf count = get<PARTIAL>(p.col_counts + w, n), whole_count = count * splat(float(p.pool));
    const int64_t full = p.pool <= p.height ? p.pool : p.height;
    const vf whole_coef = coef * get<PARTIAL>(p.inv + full * p.width + w, n);
    const vf around = splat_lanes<PARTIAL>(p.residual ? mean : 0, n), scale = coef;
    const vu mask = vu{} + (p.residual ? 0xffffffffu : 0u);
    const T *in = x + w, *gradient = grad + w;
    T* out = y + w;
    YMoments local;
    vf sums{};
    strip.template pool<POOL, false>(w, [&](int64_t h, vf sum, vf center) PK_FORCED {
      const int64_t rows = window_count(h, p.height, p.pool);
      vf c = whole_coef, all = whole_count;
      if (rows != p.pool) {
        c = scale * get<PARTIAL>(p.inv + rows * p.width + w, n);
        all = count * splat(float(rows));
      }
      const vf difference = sum - all * center;
      if constexpr (TASK == Task::reduce) {
        sums += (c * difference) * get<PARTIAL>(gradient + h * p.width, n);
      } else {
        vf base = center;
        if constexpr (kShifted<T>) base = get<PARTIAL>(in + h * p.width, n);
        const vf value = c * difference + (vf)((vu)base & mask);
        put<PARTIAL>(out + h * p.width, value, n);
        if constexpr (TASK == Task::forward_stats)
          local.add(PARTIAL ? head(rounded(value, out), n) - around : rounded(value, out) - around);
      }
    });
    if constexpr (TASK == Task::forward_stats) moments.add(local);
    if constexpr (TASK == Task::reduce) q += sums;
  }
};

template <class T>
PK_INLINE float mean_of(const T* x, int64_t n) {
  vf sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(x + i);
  if (i < n) sum += load(x + i, n - i);
  return hsum(sum) / n;
}

template <class T, int POOL, Task TASK>
void pool_nchw(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  const float mean = p.mean[b];
  for (int64_t item = first; item < last; ++item) {
    const int64_t c = item / p.strips, offset = (b * p.channels + c) * p.height * p.width;
    const Strip strip(p, item % p.strips, scratch);
    const T* x = static_cast<const T*>(p.x) + offset;
    const vf shift = splat(kShifted<T> ? mean_of(x + strip.first * p.width, (strip.last - strip.first) * p.width) : 0);
    strip.fill(x, [&](vf v, int64_t w, auto partial) PK_FORCED {
      if constexpr (!kShifted<T>) return v;
      v = v - shift;
      if constexpr (decltype(partial)::value) v = head(v, p.width - w);
      return v;
    });
    PoolNchw<T, POOL, TASK> kernel{p,
                                   strip,
                                   x,
                                   static_cast<const T*>(p.grad) + offset,
                                   static_cast<T*>(p.out) + offset,
                                   splat(TASK == Task::reduce ? 1 : p.coef[c] * p.scale[b]),
                                   mean};
    int64_t w = 0;
    for (; w + kLanes <= p.width; w += kLanes) kernel.template columns<false>(w, kLanes);
    if (w < p.width) kernel.template columns<true>(w, p.width - w);
    if constexpr (TASK == Task::reduce) p.q_partials[b * p.channels * p.strips + item] = hsum(kernel.q);
    if constexpr (TASK == Task::forward_stats)
      kernel.moments.write_partial(p.y_partials + (b * p.channels * p.strips + item) * 3,
                                   (strip.end - strip.begin) * p.width, p.residual ? mean : 0);
  }
}

template <class T, int POOL>
struct BackwardNchw {
  const PoolMixerParams& p;
  const Strip& strip;
  const T* x;
  const T* grad;
  T* dx;
  vf coef, mean, correct;

  template <bool PARTIAL>
  __attribute__((noinline)) void columns(int64_t w, int64_t n) {
    const vf scale = coef, k = correct, center_x = mean, kept = splat(p.residual), area = splat(p.area);
    const T *in = x + w, *gradient = grad + w;
    T* out = dx + w;
    strip.template pool<POOL, true>(w, [&](int64_t h, vf sum, vf) PK_FORCED {
      const int64_t here = h * p.width;
      const vf g = get<PARTIAL>(gradient + here, n), e = sum - area * g;
      const vf d = get<PARTIAL>(in + here, n) - center_x;
      put<PARTIAL>(out + here, kept * g + (scale * e - d * k), n);
    });
  }
};

template <class T, int POOL>
void backward_nchw(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  for (int64_t item = first; item < last; ++item) {
    const int64_t c = item / p.strips, offset = (b * p.channels + c) * p.height * p.width;
    const Strip strip(p, item % p.strips, scratch);
    const T* grad = static_cast<const T*>(p.grad) + offset;
    strip.fill(grad, [&](vf v, int64_t w, auto) PK_FORCED {
      return v * read<vf>(p.col_weight + w);  // zero behind the row
    });
    BackwardNchw<T, POOL> kernel{p,
                                 strip,
                                 static_cast<const T*>(p.x) + offset,
                                 grad,
                                 static_cast<T*>(p.out) + offset,
                                 splat(p.coef[c] * p.scale[b] / p.area),
                                 splat(p.mean[b]),
                                 splat(p.correct[b])};
    int64_t w = 0;
    for (; w + kLanes <= p.width; w += kLanes) kernel.template columns<false>(w, kLanes);
    if (w < p.width) kernel.template columns<true>(w, p.width - w);
  }
}

}  // namespace
}  // namespace pk
