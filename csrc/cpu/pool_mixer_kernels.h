// The token mixer's kernels for one instruction-set level (algebra.md, "Token mixer sub-block"). Included after vec.h.
//
// The pool is separable. In channels_last a row is swept along w with a vector of channels: the vertical sum of the
// next column is loaded, the last three stay in registers. In NCHW a strip of a plane is widened into zero-padded
// float rows first. Both pool differences, sum - count * x: exact for half inputs, and for float inputs the sample's
// mean is subtracted on load, so a large mean costs no digits.

template <class T>
constexpr bool kShifted = sizeof(T) == 4;

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

// ---- statistics of the input: partials of a sample, which is one contiguous run in both layouts

PK_INLINE float plain_sum(const float* p, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += p[i];
  return sum;
}

template <class T>
void stats(const PoolMixerParams& p, int64_t b, int64_t first_chunk, int64_t last_chunk) {
  const int64_t size = p.channels * p.height * p.width;
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t begin = chunk * kChunk, n = begin + kChunk < size ? kChunk : size - begin;
    const T* x = static_cast<const T*>(p.x) + b * size + begin;
    // Deviations from the mean of the first elements: a difference of sums then loses at most log2(n / head) bits.
    const int64_t head = n < 256 ? n : 256, whole = n / kLanes * kLanes;
    vf sum{};
    int64_t i = 0;
    for (; i + kLanes <= head; i += kLanes) sum += load(x + i);
    if (i < head) sum += load(x + i, head - i);
    const float shift = hsum(sum) / head;
    constexpr int kWays = 4;
    vf s1[kWays] = {}, s2[kWays] = {};
    for (i = 0; i + kWays * kLanes <= n; i += kWays * kLanes)
      for (int k = 0; k < kWays; ++k) {
        const vf d = load(x + i + k * kLanes) - splat(shift);
        s1[k] += d;
        s2[k] += d * d;
      }
    for (; i < whole; i += kLanes) {
      const vf d = load(x + i) - splat(shift);
      s1[0] += d;
      s2[0] += d * d;
    }
    float first = hsum((s1[0] + s1[1]) + (s1[2] + s1[3])), second = hsum((s2[0] + s2[1]) + (s2[2] + s2[3]));
    if (i < n) {
      float tail[kLanes], tail2[kLanes];
      const vf d = load(x + i, n - i) - splat(shift);
      write(tail, d);
      write(tail2, d * d);
      first += plain_sum(tail, n - i);
      second += plain_sum(tail2, n - i);
    }
    float* out = p.x_partials + (b * p.chunks + chunk) * 3;
    const float m2 = second - first * (first / n);
    out[0] = n;
    out[1] = shift + first / n;
    out[2] = m2 < 0 ? 0 : m2;
  }
}

// ---- what both layouts share

struct YMoments {  // of the rounded output, around a shift
  vf first{}, second{};
  PK_INLINE void add(vf deviation) {
    first += deviation;
    second += deviation * deviation;
  }
  PK_INLINE void add(const YMoments& other) {
    first += other.first;
    second += other.second;
  }
  PK_INLINE void write_partial(float* out, int64_t n, float shift) const {
    const float sum = hsum(first), m2 = hsum(second) - sum * (sum / n);
    out[0] = n;
    out[1] = shift + sum / n;
    out[2] = m2 < 0 ? 0 : m2;
  }
};

PK_INLINE vf keep(bool condition, vf v) { return (vf)((vu)v & (vu{} + (condition ? 0xffffffffu : 0u))); }

template <bool PARTIAL, class T>
PK_INLINE vf get(const T* p, int64_t n) {
  if constexpr (PARTIAL) return load(p, n);
  return load(p);
}
template <bool PARTIAL, class T>
PK_INLINE void put(T* p, vf v, int64_t n) {
  if constexpr (PARTIAL)
    store(p, v, n);
  else
    store(p, v);
}
// `a` in the lanes in use, zero in the others.
template <bool PARTIAL>
PK_INLINE vf splat_lanes(float a, int64_t n) {
  if constexpr (!PARTIAL) return splat(a);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = a;
  return read<vf>(lanes);
}

// ---- channels_last


// Horizontal sums over `pool` columns: emit(w, sum, center, True or False) for each w, True if w may lack taps, from column(w, &center).
template <int POOL, class Column, class Emit>
PK_INLINE void sweep(int64_t width, int64_t pool, float* scratch, const Column& column, const Emit& emit) {
  if constexpr (POOL == 3) {
    vf center{}, next_center{}, previous, current, next;
    current = column(0, center);
    if (width == 1) return emit(0, current, center, True{});
    next = column(1, next_center);
    emit(0, current + next, center, True{});
    for (int64_t w = 1; w < width - 1; ++w) {
      previous = current;
      current = next;
      center = next_center;
      next = column(w + 1, next_center);
      emit(w, (previous + current) + next, center, False{});
    }
    emit(width - 1, current + next, next_center, True{});
  } else {
    const int64_t half = pool / 2;
    float* columns = scratch;  // [half + width + half] vectors, zero outside the row
    float* centers = scratch + (width + 2 * half) * kLanes;
    for (int64_t i = 0; i < half; ++i) {
      write(columns + i * kLanes, vf{});
      write(columns + (half + width + i) * kLanes, vf{});
    }
    for (int64_t w = 0; w < width; ++w) {
      vf center{};
      write(columns + (half + w) * kLanes, column(w, center));
      write(centers + w * kLanes, center);
    }
    for (int64_t w = 0; w < width; ++w) {
      vf sum = read<vf>(columns + w * kLanes);
      for (int64_t k = 1; k < pool; ++k) sum += read<vf>(columns + (w + k) * kLanes);
      emit(w, sum, read<vf>(centers + w * kLanes), True{});
    }
  }
}

// The rows under the pool at row h. TAPS and CENTER are their number and the index of row h itself, 0 taps: any.
template <int TAPS, int CENTER>
struct Rows {
  int64_t first, taps, center;
  Rows(const PoolMixerParams& p, int64_t h) {
    first = h > p.pool / 2 ? h - p.pool / 2 : 0;
    taps = TAPS ? TAPS : valid_taps(h, p.height, p.pool);
    center = TAPS ? CENTER : h - first;
  }
};

// Calls f.run<POOL, TAPS, CENTER>() with what holds at row h.
template <class F>
PK_INLINE void with_rows(const PoolMixerParams& p, int64_t h, const F& f) {
  if (p.pool != 3) return f.template run<0, 0, 0>();
  if (h > 0 && h < p.height - 1) return f.template run<3, 3, 1>();
  if (p.height == 1) return f.template run<3, 1, 0>();
  if (h == 0) return f.template run<3, 2, 0>();
  f.template run<3, 2, 1>();
}

// Runs f.block<POOL, TAPS, CENTER, PARTIAL>(h, c, n) for every vector of channels of every row of the strip.
template <class F>
struct RowRunner {
  const PoolMixerParams& p;
  F& f;
  int64_t h;
  template <int POOL, int TAPS, int CENTER>
  PK_INLINE void run() const {
    int64_t c = 0;
    for (; c + kLanes <= p.channels; c += kLanes) f.template block<POOL, TAPS, CENTER, false>(h, c, kLanes);
    if (c < p.channels) f.template block<POOL, TAPS, CENTER, true>(h, c, p.channels - c);
  }
};

template <class F>
PK_INLINE void for_blocks(const PoolMixerParams& p, int64_t strip, F& f) {
  const int64_t begin = strip * p.strip_rows, end = begin + p.strip_rows < p.height ? begin + p.strip_rows : p.height;
  for (int64_t h = begin; h < end; ++h) with_rows(p, h, RowRunner<F>{p, f, h});
}

template <class T, bool STATS>
struct ForwardLast {
  const PoolMixerParams& p;
  const T* x;  // of the sample
  T* y;
  float mean, scale;
  float* scratch;
  YMoments moments{};

  template <int POOL, int TAPS, int CENTER, bool PARTIAL>
  PK_INLINE void block(int64_t h, int64_t c, int64_t n) {
    const Rows<TAPS, CENTER> rows(p, h);
    const int64_t channels = p.channels, row = p.width * channels;
    const T* first = x + rows.first * row + c;
    const T* center_row = x + h * row + c;
    T* out = y + h * row + c;
    const float* count = p.col_taps;
    const float* inv = p.inv + rows.taps * p.width;
    const vf coef = get<PARTIAL>(p.coef + c, n) * splat(scale), shift = splat_lanes<PARTIAL>(mean, n);
    const vf taps = splat(float(rows.taps));
    const vf inner_count = splat(float(rows.taps) * POOL), inner_coef = coef * splat(p.width > 2 ? inv[1] : 0);
    const vf y_shift = keep(p.residual, shift);
    YMoments local;
    const auto column = [&](int64_t w, vf& center) {
      vf sum{};
      for (int64_t r = 0; r < rows.taps; ++r) {
        vf v = get<PARTIAL>(first + r * row + w * channels, n);
        if constexpr (kShifted<T>) v = v - shift;
        sum = r == 0 ? v : sum + v;
        if (r == rows.center) center = v;
      }
      return sum;
    };
    const auto emit = [&](int64_t w, vf sum, vf center, auto border) {
      vf scaled;
      if constexpr (decltype(border)::value)
        scaled = (coef * splat(inv[w])) * (sum - taps * splat(count[w]) * center);
      else
        scaled = inner_coef * (sum - inner_count * center);
      const vf base = kShifted<T> ? get<PARTIAL>(center_row + w * channels, n) : center;
      const vf value = keep(p.residual, base) + scaled;
      put<PARTIAL>(out + w * channels, value, n);
      if constexpr (STATS) local.add(rounded(value, out) - y_shift);
    };
    sweep<POOL>(p.width, p.pool, scratch, column, emit);
    if constexpr (STATS) moments.add(local);
  }
};

template <class T, bool STATS>
PK_INLINE void forward_last(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  const int64_t size = p.channels * p.height * p.width;
  for (int64_t strip = first; strip < last; ++strip) {
    ForwardLast<T, STATS> f{p, static_cast<const T*>(p.x) + b * size, static_cast<T*>(p.out) + b * size,
                            p.mean[b], p.scale[b], scratch};
    for_blocks(p, strip, f);
    if constexpr (STATS) {
      const int64_t begin = strip * p.strip_rows;
      const int64_t rows = begin + p.strip_rows < p.height ? p.strip_rows : p.height - begin;
      f.moments.write_partial(p.y_partials + (b * p.strips + strip) * 3, rows * p.width * p.channels,
                              p.residual ? p.mean[b] : 0);
    }
  }
}

// e = P^T g - g at every element; APPLY writes dx, otherwise q = sum (x - mean) e per channel is accumulated.
template <class T, bool APPLY>
struct BackwardLast {
  const PoolMixerParams& p;
  const T* x;
  const T* grad;
  T* dx;
  float* q;  // [C] of this strip
  float mean, scale, correct;
  float* scratch;

  template <int POOL, int TAPS, int CENTER, bool PARTIAL>
  PK_INLINE void block(int64_t h, int64_t c, int64_t n) {
    const Rows<TAPS, CENTER> rows(p, h);
    const int64_t channels = p.channels, row = p.width * channels, here = h * row + c;
    const T* first = grad + rows.first * row + c;
    const float* row_inv = p.row_inv + rows.first;
    const float* col_inv = p.col_inv;
    const vf shift = splat_lanes<PARTIAL>(mean, n);
    const vf coef = get<PARTIAL>(p.coef + c, n) * splat(scale), k = splat(correct);
    vf total{};
    const auto column = [&](int64_t w, vf& center) {
      vf sum{};
      for (int64_t r = 0; r < rows.taps; ++r) {
        const vf v = get<PARTIAL>(first + r * row + w * channels, n);
        sum += v * splat(row_inv[r]);
        if (r == rows.center) center = v;
      }
      return sum * splat(col_inv[w]);
    };
    const auto emit = [&](int64_t w, vf sum, vf center, auto) {
      const vf e = sum - center, deviation = get<PARTIAL>(x + here + w * channels, n) - shift;
      if constexpr (APPLY)
        put<PARTIAL>(dx + here + w * channels, keep(p.residual, center) + (coef * e - deviation * k), n);
      else
        total += deviation * e;
    };
    sweep<POOL>(p.width, p.pool, scratch, column, emit);
    if constexpr (!APPLY) put<PARTIAL>(q + c, get<PARTIAL>(q + c, n) + total, n);
  }
};

template <class T, bool APPLY>
PK_INLINE void backward_last(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  const int64_t offset = b * p.channels * p.height * p.width;
  for (int64_t strip = first; strip < last; ++strip) {
    float* q = p.q_partials + (b * p.strips + strip) * p.channels;
    if constexpr (!APPLY) __builtin_memset(q, 0, p.channels * sizeof(float));
    BackwardLast<T, APPLY> f{p,
                             static_cast<const T*>(p.x) + offset,
                             static_cast<const T*>(p.grad) + offset,
                             static_cast<T*>(p.out) + offset,
                             q,
                             p.mean[b],
                             p.scale[b],
                             APPLY ? p.correct[b] : 0,
                             scratch};
    for_blocks(p, strip, f);
  }
}

// ---- NCHW: item = channel * strips + strip

// A strip of a plane in `scratch`: padded float rows, and their horizontal sums.
struct Plane {
  int64_t half, stride, first, last, begin, end;  // rows [first, last) are read for rows [begin, end) of the output
  float *rows, *sums;
  Plane(const PoolMixerParams& p, int64_t strip, float* scratch) {
    half = p.pool / 2;
    stride = (p.width + 2 * half + 2 * kLanes - 1) / kLanes * kLanes;
    begin = strip * p.strip_rows;
    end = begin + p.strip_rows < p.height ? begin + p.strip_rows : p.height;
    first = begin > half ? begin - half : 0;
    last = end + half < p.height ? end + half : p.height;
    rows = scratch;
    sums = scratch + (p.strip_rows + 2 * half) * stride;
  }
  PK_INLINE float* row(int64_t h) const { return rows + (h - first) * stride; }
  PK_INLINE float* sum(int64_t h) const { return sums + (h - first) * stride; }

  // Widens every row by value(pointer, w, lanes) and sums it horizontally.
  template <int POOL, class T, class Value>
  PK_INLINE void fill(const T* plane, int64_t width, const Value& value) const {
    for (int64_t h = first; h < last; ++h) {
      float* out = row(h);
      for (int64_t i = 0; i < half; ++i) out[i] = 0;
      const T* in = plane + h * width;
      int64_t w = 0;
      for (; w + kLanes <= width; w += kLanes) write(out + half + w, value(load(in + w), w));
      if (w < width) write(out + half + w, value(load(in + w, width - w), w));
      for (int64_t i = half + width; i < stride; ++i) out[i] = 0;
    }
    const int64_t pool = POOL ? POOL : 2 * half + 1;
    for (int64_t h = first; h < last; ++h) {
      const float* in = row(h);
      for (int64_t w = 0; w < width; w += kLanes) {
        vf total = read<vf>(in + w);
        for (int64_t k = 1; k < pool; ++k) total += read<vf>(in + w + k);
        write(sum(h) + w, total);
      }
    }
  }
};

template <class T, int POOL, bool STATS>
PK_INLINE void forward_plane(const PoolMixerParams& p, int64_t b, int64_t item, float* scratch) {
  const int64_t c = item / p.strips, width = p.width;
  const Plane plane(p, item % p.strips, scratch);
  const int64_t offset = (b * p.channels + c) * p.height * width;
  const T* x = static_cast<const T*>(p.x) + offset;
  T* y = static_cast<T*>(p.out) + offset;
  const float mean = p.mean[b];
  const vf shift = splat(kShifted<T> ? mean : 0), coef = splat(p.coef[c] * p.scale[b]);
  plane.fill<POOL>(x, width, [&](vf v, int64_t) { return kShifted<T> ? v - shift : v; });
  YMoments moments;
  for (int64_t h = plane.begin; h < plane.end; ++h) {
    const int64_t above = h > plane.half ? h - plane.half : 0, taps = valid_taps(h, p.height, p.pool);
    const float* inv = p.inv + taps * width;
    const auto emit = [&](int64_t w, auto partial, int64_t n) {
      constexpr bool kPartial = decltype(partial)::value;
      vf sum = read<vf>(plane.sum(above) + w);
      for (int64_t r = 1; r < taps; ++r) sum += read<vf>(plane.sum(above + r) + w);
      const vf center = read<vf>(plane.row(h) + plane.half + w);
      const vf count = get<kPartial>(p.col_taps + w, n) * splat(float(taps));
      const vf base = kShifted<T> ? get<kPartial>(x + h * width + w, n) : center;
      const vf value = keep(p.residual, base) + (coef * get<kPartial>(inv + w, n)) * (sum - count * center);
      put<kPartial>(y + h * width + w, value, n);
      if constexpr (STATS) {
        const float around = p.residual ? mean : 0;
        const vf deviation = rounded(value, y) - splat(around);
        moments.add(kPartial ? deviation * splat_lanes<kPartial>(1, n) : deviation);
      }
    };
    int64_t w = 0;
    for (; w + kLanes <= width; w += kLanes) emit(w, False{}, kLanes);
    if (w < width) emit(w, True{}, width - w);
  }
  if constexpr (STATS)
    moments.write_partial(p.y_partials + (b * p.channels * p.strips + item) * 3, (plane.end - plane.begin) * width,
                          p.residual ? mean : 0);
}

template <class T, int POOL, bool APPLY>
PK_INLINE void backward_plane(const PoolMixerParams& p, int64_t b, int64_t item, float* scratch) {
  const int64_t c = item / p.strips, width = p.width;
  const Plane plane(p, item % p.strips, scratch);
  const int64_t offset = (b * p.channels + c) * p.height * width;
  const T* x = static_cast<const T*>(p.x) + offset;
  const T* grad = static_cast<const T*>(p.grad) + offset;
  T* dx = static_cast<T*>(p.out) + offset;
  const vf mean = splat(p.mean[b]), coef = splat(p.coef[c] * p.scale[b]), k = splat(APPLY ? p.correct[b] : 0);
  plane.fill<POOL>(grad, width, [&](vf v, int64_t w) { return v * read<vf>(p.col_inv + w); });
  vf total{};
  for (int64_t h = plane.begin; h < plane.end; ++h) {
    const int64_t above = h > plane.half ? h - plane.half : 0, taps = valid_taps(h, p.height, p.pool);
    vf row_total{};
    const auto emit = [&](int64_t w, auto partial, int64_t n) {
      constexpr bool kPartial = decltype(partial)::value;
      vf sum{};
      for (int64_t r = above; r < above + taps; ++r) sum += read<vf>(plane.sum(r) + w) * splat(p.row_inv[r]);
      const vf g = get<kPartial>(grad + h * width + w, n), e = sum - g;
      const vf deviation = get<kPartial>(x + h * width + w, n) - mean;
      if constexpr (APPLY)
        put<kPartial>(dx + h * width + w, keep(p.residual, g) + (coef * e - deviation * k), n);
      else
        row_total += kPartial ? deviation * e * splat_lanes<kPartial>(1, n) : deviation * e;
    };
    int64_t w = 0;
    for (; w + kLanes <= width; w += kLanes) emit(w, False{}, kLanes);
    if (w < width) emit(w, True{}, width - w);
    total += row_total;
  }
  if constexpr (!APPLY) p.q_partials[b * p.channels * p.strips + item] = hsum(total);
}

// ---- entries of the table

template <class T>
void forward(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.channels_last) {
    if (p.y_partials) return forward_last<T, true>(p, b, first, last, scratch);
    return forward_last<T, false>(p, b, first, last, scratch);
  }
  for (int64_t item = first; item < last; ++item) {
    if (p.y_partials)
      p.pool == 3 ? forward_plane<T, 3, true>(p, b, item, scratch) : forward_plane<T, 0, true>(p, b, item, scratch);
    else
      p.pool == 3 ? forward_plane<T, 3, false>(p, b, item, scratch) : forward_plane<T, 0, false>(p, b, item, scratch);
  }
}

template <class T, bool APPLY>
void backward(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.channels_last) return backward_last<T, APPLY>(p, b, first, last, scratch);
  for (int64_t item = first; item < last; ++item)
    p.pool == 3 ? backward_plane<T, 3, APPLY>(p, b, item, scratch) : backward_plane<T, 0, APPLY>(p, b, item, scratch);
}

template <class T>
constexpr PoolMixerKernels kernels() {
  return {stats<T>, forward<T>, backward<T, false>, backward<T, true>};
}
