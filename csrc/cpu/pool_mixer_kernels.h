// The token mixer's kernels for one instruction-set level (README, "Algebra"). Included after vec.h.
//
// The pool is separable. In channels_last two rows are swept along w with a block of channels: the vertical sums of the
// next column are loaded, those of the last three stay in registers. In NCHW a strip of a plane is widened into
// zero-padded float rows first. Both pool differences, sum - count * x: exact for half inputs, and for float inputs a
// shift is subtracted on load (the sample's mean; in NCHW that of the plane's first row), so a large mean costs no
// digits.

template <class T>
constexpr bool kShifted = sizeof(T) == 4;

// What a sweep that pools x is for: y, y with its statistics, or the backward's q.
enum class Task { forward, forward_stats, reduce };

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

PK_INLINE void write_moments(float* out, int64_t n, float shift, float sum, float squares) {
  const double m2 = squares - sum * (double(sum) / n);  // where squares is infinite, the product is not
  out[0] = n;
  out[1] = shift + sum / n;
  out[2] = m2 < 0 ? 0 : m2;
}

#if PK_LEVEL == 3
// Sums by bfloat16 dot products, a third of the instructions, and no shift: false where the mean costs digits.
PK_INLINE bool quick_moments(const bf16* x, int64_t n, float* out) {
  constexpr int kWays = 4, kWords = 2 * kLanes;
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512 sum[kWays] = {}, squares[kWays] = {};
  const auto add = [&](int way, __m512i words) PK_FORCED {
    sum[way] = _mm512_dpbf16_ps(sum[way], (__m512bh)words, ones);
    squares[way] = _mm512_dpbf16_ps(squares[way], (__m512bh)words, (__m512bh)words);
  };
  int64_t i = 0;
  for (; i + kWays * kWords <= n; i += kWays * kWords)
    for (int way = 0; way < kWays; ++way) add(way, read<__m512i>(x + i + way * kWords));
  for (; i + kWords <= n; i += kWords) add(0, read<__m512i>(x + i));
  if (i < n) add(0, _mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << (n - i)) - 1), x + i));
  const float first = hsum((vf)((sum[0] + sum[1]) + (sum[2] + sum[3])));
  const float second = hsum((vf)((squares[0] + squares[1]) + (squares[2] + squares[3])));
  write_moments(out, n, 0, first, second);
  return out[2] > second / 16;
}
#endif

template <class T>
void stats(const PoolMixerParams& p, int64_t b, int64_t first_chunk, int64_t last_chunk) {
  const int64_t size = p.channels * p.height * p.width;
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t begin = chunk * kChunk, n = begin + kChunk < size ? kChunk : size - begin;
    const T* x = static_cast<const T*>(p.x) + b * size + begin;
    float* out = p.x_partials + (b * p.chunks + chunk) * 3;
#if PK_LEVEL == 3
    if constexpr (__is_same(T, bf16))
      if (quick_moments(x, n, out)) continue;
#endif
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
      for (int k = 0; k < kWays; k += 2) {
        const Pair v = load_pair(x + i + k * kLanes);
        const vf a = v.a - splat(shift), b = v.b - splat(shift);
        s1[k] += a;
        s2[k] += a * a;
        s1[k + 1] += b;
        s2[k + 1] += b * b;
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
    write_moments(out, n, shift, first, second);
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
    write_moments(out, n, shift, hsum(first), hsum(second));
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

// ---- channels_last: item = strip

// The rows h .. h + ROWS - 1 of the output, for a pool of 3: ABOVE and BELOW say whether their neighbours exist.
// ROWS == 0 is one row of any other pool.
template <int ROWS_, bool ABOVE_, bool BELOW_>
struct Window {
  static constexpr int ROWS = ROWS_ ? ROWS_ : 1;
  static constexpr bool ABOVE = ABOVE_, BELOW = BELOW_, ANY = ROWS_ == 0;
  static constexpr int taps(int row) { return 1 + (row > 0 || ABOVE) + (row < ROWS - 1 || BELOW); }
};

template <int ROWS>
struct Block {
  Pair row[ROWS];
};

#define PK_EACH_ROW _Pragma("GCC unroll 2") for (int r = 0; r < ROWS; ++r)

// Vertical sums of one column, and the column itself: at(row) is a Pair, row from h - half to h + ROWS - 1 + half.
template <class W, class At>
PK_INLINE void column_sums(const PoolMixerParams& p, int64_t h, const At& at, Block<W::ROWS>& sum,
                           Block<W::ROWS>& center) {
  if constexpr (W::ANY) {
    const int64_t half = p.pool / 2, first = h > half ? h - half : 0, taps = valid_taps(h, p.height, p.pool);
    Pair total = at(first);
    if (first == h) center.row[0] = total;
    for (int64_t row = first + 1; row < first + taps; ++row) {
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

// Horizontal sums: emit(w, sum, center, True or False) for each w, from column(w, sum, center). True: w may lack taps.
template <class W, class Column, class Emit>
PK_INLINE void sweep(int64_t width, int64_t pool, float* scratch, const Column& column, const Emit& emit) {
  constexpr int ROWS = W::ROWS;
  if constexpr (!W::ANY) {
    Block<ROWS> center{}, next_center{}, previous{}, current{}, next{}, sum;
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
    const int64_t half = pool / 2;
    constexpr int64_t kPair = 2 * kLanes;
    float* columns = scratch;  // [half + width + half] pairs, zero outside the row
    float* centers = scratch + (width + 2 * half) * kPair;
    __builtin_memset(columns, 0, half * kPair * sizeof(float));
    __builtin_memset(columns + (half + width) * kPair, 0, half * kPair * sizeof(float));
    Block<1> sum{}, center{};
    for (int64_t w = 0; w < width; ++w) {
      column(w, sum, center);
      write(columns + (half + w) * kPair, sum.row[0]);
      write(centers + w * kPair, center.row[0]);
    }
    for (int64_t w = 0; w < width; ++w) {
      Pair total = read<Pair>(columns + w * kPair);
      for (int64_t k = 1; k < pool; ++k) {
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

constexpr int kSweepRows = PK_LEVEL >= 2 ? 2 : 1;  // two rows share a sum; with 16 registers they would spill

// Runs kernel.rows<Window>(h) over the strip's rows.
template <class Kernel>
PK_INLINE void for_rows(const PoolMixerParams& p, int64_t strip, Kernel& kernel) {
  const int64_t begin = strip * p.strip_rows, end = begin + p.strip_rows < p.height ? begin + p.strip_rows : p.height;
  int64_t h = begin;
  if (p.pool != 3) {
    for (; h < end; ++h) kernel.template rows<Window<0, false, false>>(h);
    return;
  }
  if constexpr (kSweepRows == 2)
    for (; h + 2 <= end; h += 2) {
      const bool above = h > 0, below = h + 2 < p.height;
      if (above && below)
        kernel.template rows<Window<2, true, true>>(h);
      else if (below)
        kernel.template rows<Window<2, false, true>>(h);
      else if (above)
        kernel.template rows<Window<2, true, false>>(h);
      else
        kernel.template rows<Window<2, false, false>>(h);
    }
  for (; h < end; ++h) {
    const bool above = h > 0, below = h + 1 < p.height;
    if (above && below)
      kernel.template rows<Window<1, true, true>>(h);
    else if (below)
      kernel.template rows<Window<1, false, true>>(h);
    else if (above)
      kernel.template rows<Window<1, true, false>>(h);
    else
      kernel.template rows<Window<1, false, false>>(h);
  }
}

template <class T, Task TASK, bool PARTIAL>
struct PoolLast {
  const PoolMixerParams& p;
  const T* x;     // of the sample, at the block's first channel
  const T* grad;  // reduce
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
    const float* count = p.col_taps;
    const vf around = splat(y_shift), sub = shift;
    const vu mask = vu{} + (residual ? 0xffffffffu : 0u);
    const Pair scale = coef;
    const float* inv[ROWS];
    vf taps[ROWS];
    Block<ROWS> inner;
    PK_EACH_ROW {
      const int64_t valid = W::ANY ? valid_taps(h, p.height, p.pool) : W::taps(r);
      inv[r] = p.inv + valid * p.width;
      taps[r] = splat(float(valid));
      const vf whole = splat(p.width > 2 ? inv[r][1] : 0);
      inner.row[r] = {scale.a * whole, scale.b * whole};
    }
    YMoments local;
    Pair total{};
    const auto column = [&](int64_t w, Block<ROWS>& sum, Block<ROWS>& center) PK_FORCED {
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
    const auto emit = [&](int64_t w, const Block<ROWS>& sum, const Block<ROWS>& center, auto border) PK_FORCED {
      PK_EACH_ROW {
        Pair c = inner.row[r];
        vf full = taps[r] * 3.0f;
        if constexpr (decltype(border)::value) {
          const vf here = splat(inv[r][w]);
          c = {scale.a * here, scale.b * here};
          full = taps[r] * splat(count[w]);
        }
        const Pair s = sum.row[r], m = center.row[r];
        const Pair difference = {s.a - full * m.a, s.b - full * m.b};
        if constexpr (TASK == Task::reduce) {
          const Pair g = get_pair<PARTIAL>(gradient + r * row + w * channels, lanes);
          total.a += (c.a * difference.a) * g.a;
          total.b += (c.b * difference.b) * g.b;
        } else {
          Pair base = m;
          if constexpr (kShifted<T>) base = get_pair<PARTIAL>(in + (h + r) * row + w * channels, lanes);
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
    sweep<W>(p.width, p.pool, scratch, column, emit);
    if constexpr (TASK == Task::forward_stats) moments.add(local);
    if constexpr (TASK == Task::reduce) q = {q.a + total.a, q.b + total.b};
  }
};

template <class T, Task TASK, bool PARTIAL>
PK_INLINE void pool_block(const PoolMixerParams& p, int64_t b, int64_t strip, int64_t c, int64_t n, float* scratch,
                          YMoments& moments) {
  const int64_t offset = b * p.channels * p.height * p.width + c;
  const T* tag = nullptr;
  const vf scale = splat(p.scale[b]), one = splat(1);
  const Pair coef = floats_pair(p.coef + c, n, tag);
  PoolLast<T, TASK, PARTIAL> kernel{p,
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
void pool_last(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  for (int64_t strip = first; strip < last; ++strip) {
    YMoments moments;
    int64_t c = 0;
    for (; c + 2 * kLanes <= p.channels; c += 2 * kLanes)
      pool_block<T, TASK, false>(p, b, strip, c, 2 * kLanes, scratch, moments);
    if (c < p.channels) pool_block<T, TASK, true>(p, b, strip, c, p.channels - c, scratch, moments);
    if constexpr (TASK == Task::forward_stats) {
      const int64_t begin = strip * p.strip_rows;
      const int64_t rows = begin + p.strip_rows < p.height ? p.strip_rows : p.height - begin;
      moments.write_partial(p.y_partials + (b * p.strips + strip) * 3, rows * p.width * p.channels,
                            p.residual ? p.mean[b] : 0);
    }
  }
}

// dx, from e = P^T g - g at every element.
template <class T, bool PARTIAL>
struct BackwardLast {
  const PoolMixerParams& p;
  const T* x;  // of the sample, at the block's first channel
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
    const float *row_inv = p.row_inv, *col_inv = p.col_inv;
    const Pair scale = coef;
    const vf center_x = mean, k = correct;
    const vu mask = vu{} + (residual ? 0xffffffffu : 0u);
    const auto column = [&](int64_t w, Block<ROWS>& sum, Block<ROWS>& center) PK_FORCED {
      const T* here = gradient + w * channels;
      const vf across = splat(col_inv[w]);
      column_sums<W>(
          p, h,
          [&](int64_t r) PK_FORCED {
            const Pair v = get_pair<PARTIAL>(here + r * row, lanes);
            const vf weight = across * splat(row_inv[r]);
            return Pair{v.a * weight, v.b * weight};
          },
          sum, center);
    };
    const auto emit = [&](int64_t w, const Block<ROWS>& sum, const Block<ROWS>&, auto) PK_FORCED {
      PK_EACH_ROW {
        const int64_t here = r * row + w * channels;
        const Pair g = get_pair<PARTIAL>(gradient + h * row + here, lanes), in = get_pair<PARTIAL>(input + here, lanes);
        const Pair s = sum.row[r], e = {s.a - g.a, s.b - g.b}, d = {in.a - center_x, in.b - center_x};
        const Pair value = {(scale.a * e.a - d.a * k) + (vf)((vu)g.a & mask),
                            (scale.b * e.b - d.b * k) + (vf)((vu)g.b & mask)};
        put_pair<PARTIAL>(out + here, value, lanes);
      }
    };
    sweep<W>(p.width, p.pool, scratch, column, emit);
  }
};

template <class T, bool PARTIAL>
PK_INLINE void backward_block(const PoolMixerParams& p, int64_t b, int64_t strip, int64_t c, int64_t n,
                              float* scratch) {
  const int64_t offset = b * p.channels * p.height * p.width + c;
  const vf scale = splat(p.scale[b]);
  const Pair coef = floats_pair(p.coef + c, n, static_cast<const T*>(nullptr));
  BackwardLast<T, PARTIAL> kernel{p,
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
void backward_last(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  for (int64_t strip = first; strip < last; ++strip) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= p.channels; c += 2 * kLanes) backward_block<T, false>(p, b, strip, c, 2 * kLanes, scratch);
    if (c < p.channels) backward_block<T, true>(p, b, strip, c, p.channels - c, scratch);
  }
}

// ---- NCHW: item = channel * strips + strip

// A strip of planes in `scratch`: float rows with zeros around them. The space behind a row is also that before the
// next.
struct Strip {
  const PoolMixerParams& p;
  int64_t half, stride, begin, end, first, last;  // rows [first, last) are read for rows [begin, end) of the output
  float *rows, *sums;

  Strip(const PoolMixerParams& params, int64_t strip, float* scratch) : p(params), half(params.pool / 2) {
    const int64_t pad = (half + kLanes - 1) / kLanes * kLanes;
    stride = (p.width + kLanes - 1) / kLanes * kLanes + pad;
    begin = strip * p.strip_rows;
    end = begin + p.strip_rows < p.height ? begin + p.strip_rows : p.height;
    first = begin > half ? begin - half : 0;
    last = end + half < p.height ? end + half : p.height;
    rows = scratch + pad;
    sums = rows + (p.strip_rows + 2 * half + 1) * stride;
    for (int64_t h = first - 1; h < last; ++h)
      for (int64_t i = stride - pad; i < stride; i += kLanes) write(row(h) + i, vf{});
  }
  PK_INLINE float* row(int64_t h) const { return rows + (h - first) * stride; }

  // Fills the rows with value(pointer, w, lanes), which is zero beyond `lanes`.
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

  // The pool's sums: use(h, sum, center) for each row of the output, at the vector of columns from w on.
  // WEIGHTED: row h counts 1 / row_taps[h] times.
  template <int POOL, bool WEIGHTED, class Use>
  PK_INLINE void pool(int64_t w, const Use& use) const {
    if constexpr (POOL == 3) {
      const auto across = [&](int64_t h, vf& center) PK_FORCED {
        const float* at = row(h) + w;
        center = read<vf>(at);
        const vf sum = (read<vf>(at - 1) + center) + read<vf>(at + 1);
        return WEIGHTED ? sum * splat(p.row_inv[h]) : sum;
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
        const float* at = row(h) + w - half;
        vf sum = read<vf>(at);
        for (int64_t k = 1; k < p.pool; ++k) sum += read<vf>(at + k);
        write(sums + (h - first) * kLanes, WEIGHTED ? sum * splat(p.row_inv[h]) : sum);
      }
      for (int64_t h = begin; h < end; ++h) {
        const int64_t above = h > half ? h - half : 0, taps = valid_taps(h, p.height, p.pool);
        vf sum{};
        for (int64_t r = above; r < above + taps; ++r) sum += read<vf>(sums + (r - first) * kLanes);
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
struct PoolPlane {
  const PoolMixerParams& p;
  const Strip& strip;
  const T* x;
  const T* grad;  // reduce
  T* y;
  vf coef;
  float mean;
  YMoments moments{};
  vf q{};

  template <bool PARTIAL>
  __attribute__((noinline)) void columns(int64_t w, int64_t n) {
    const vf count = get<PARTIAL>(p.col_taps + w, n), whole_count = count * splat(float(p.pool));
    const int64_t full = p.pool <= p.height ? p.pool : p.height;
    const vf whole_coef = coef * get<PARTIAL>(p.inv + full * p.width + w, n);
    const vf around = splat_lanes<PARTIAL>(p.residual ? mean : 0, n), scale = coef;
    const vu mask = vu{} + (p.residual ? 0xffffffffu : 0u);
    const T *in = x + w, *gradient = grad + w;
    T* out = y + w;
    YMoments local;
    vf sums{};
    strip.template pool<POOL, false>(w, [&](int64_t h, vf sum, vf center) PK_FORCED {
      const int64_t taps = valid_taps(h, p.height, p.pool);
      vf c = whole_coef, all = whole_count;
      if (taps != p.pool) {
        c = scale * get<PARTIAL>(p.inv + taps * p.width + w, n);
        all = count * splat(float(taps));
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
PK_INLINE float row_mean(const T* row, int64_t width) {
  vf sum{};
  int64_t w = 0;
  for (; w + kLanes <= width; w += kLanes) sum += load(row + w);
  if (w < width) sum += load(row + w, width - w);
  return hsum(sum) / width;
}

template <class T, int POOL, Task TASK>
void pool_planes(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  const float mean = p.mean[b];
  for (int64_t item = first; item < last; ++item) {
    const int64_t c = item / p.strips, offset = (b * p.channels + c) * p.height * p.width;
    const Strip strip(p, item % p.strips, scratch);
    const T* x = static_cast<const T*>(p.x) + offset;
    const vf shift = splat(kShifted<T> ? row_mean(x, p.width) : 0);
    strip.fill(x, [&](vf v, int64_t w, auto partial) PK_FORCED {
      if constexpr (!kShifted<T>) return v;
      v = v - shift;
      if constexpr (decltype(partial)::value) v = head(v, p.width - w);
      return v;
    });
    PoolPlane<T, POOL, TASK> kernel{p,
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
struct BackwardPlane {
  const PoolMixerParams& p;
  const Strip& strip;
  const T* x;
  const T* grad;
  T* dx;
  vf coef, mean, correct;

  template <bool PARTIAL>
  __attribute__((noinline)) void columns(int64_t w, int64_t n) {
    const vu mask = vu{} + (p.residual ? 0xffffffffu : 0u);
    const vf scale = coef, k = correct, center_x = mean;
    const T *in = x + w, *gradient = grad + w;
    T* out = dx + w;
    strip.template pool<POOL, true>(w, [&](int64_t h, vf sum, vf) PK_FORCED {
      const int64_t here = h * p.width;
      const vf g = get<PARTIAL>(gradient + here, n), e = sum - g;
      const vf d = get<PARTIAL>(in + here, n) - center_x;
      put<PARTIAL>(out + here, (scale * e - d * k) + (vf)((vu)g & mask), n);
    });
  }
};

template <class T, int POOL>
void backward_planes(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  for (int64_t item = first; item < last; ++item) {
    const int64_t c = item / p.strips, offset = (b * p.channels + c) * p.height * p.width;
    const Strip strip(p, item % p.strips, scratch);
    const T* grad = static_cast<const T*>(p.grad) + offset;
    strip.fill(grad, [&](vf v, int64_t w, auto) PK_FORCED {
      return v * read<vf>(p.col_inv + w);  // zero behind the row
    });
    BackwardPlane<T, POOL> kernel{p,
                                  strip,
                                  static_cast<const T*>(p.x) + offset,
                                  grad,
                                  static_cast<T*>(p.out) + offset,
                                  splat(p.coef[c] * p.scale[b]),
                                  splat(p.mean[b]),
                                  splat(p.correct[b])};
    int64_t w = 0;
    for (; w + kLanes <= p.width; w += kLanes) kernel.template columns<false>(w, kLanes);
    if (w < p.width) kernel.template columns<true>(w, p.width - w);
  }
}

// ---- entries of the table

template <class T, Task TASK>
void pool_x(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.channels_last)
    pool_last<T, TASK>(p, b, first, last, scratch);
  else if (p.pool == 3)
    pool_planes<T, 3, TASK>(p, b, first, last, scratch);
  else
    pool_planes<T, 0, TASK>(p, b, first, last, scratch);
}

template <class T>
void forward(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.y_partials)
    pool_x<T, Task::forward_stats>(p, b, first, last, scratch);
  else
    pool_x<T, Task::forward>(p, b, first, last, scratch);
}

template <class T>
void backward_apply(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.channels_last)
    backward_last<T>(p, b, first, last, scratch);
  else if (p.pool == 3)
    backward_planes<T, 3>(p, b, first, last, scratch);
  else
    backward_planes<T, 0>(p, b, first, last, scratch);
}

template <class T>
constexpr PoolMixerKernels kernels() {
  return {stats<T>, forward<T>, pool_x<T, Task::reduce>, backward_apply<T>};
}
