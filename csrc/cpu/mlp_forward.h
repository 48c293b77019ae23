// The MLP's forward for one instruction-set level (README, "Algebra"): a tile of tokens goes through fc1, activation
// and fc2 by chunks of the hidden channels, which stay in the caches. Included after token_tile.h.
//
// Tokens run along vectors, so weights are the scalars that are broadcast and are read where they lie; a few rows at a
// time are copied where their dtype, alignment or padding asks for it. No packed copy can go stale.

// Elements S are what the products' operands are rounded to, where the level multiplies them.
template <class S>
struct OperandOf;
#if PK_LEVEL < 4
template <>
struct OperandOf<float> {
  using Op = Floats;
};
template <>
struct OperandOf<fp16> {
  using Op = Floats;
};
#endif
template <>
struct OperandOf<bf16> {
#if PK_LEVEL >= 3
  using Op = Bf16Pairs;
#else
  using Op = Floats;
#endif
};

template <class Op>
PK_INLINE int64_t words_of(int64_t elements) {
  return (elements + Op::kPer * Op::kStep - 1) / (Op::kPer * Op::kStep) * Op::kStep;
}

PK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PK_INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Cuts scratch memory into arrays of whole cache lines; from a null pointer it measures.
struct Cut {
  word* next;
  word* words(int64_t n) {
    word* p = next;
    next = reinterpret_cast<word*>(reinterpret_cast<uintptr_t>(next) + rounded_up(n, 16) * sizeof(word));
    return p;
  }
  float* floats(int64_t n) { return reinterpret_cast<float*>(words(n)); }
};

// ---- weights

template <class Source, class E>
PK_INLINE void convert_row(const Source* from, E* to, int64_t n) {
  if constexpr (__is_same(Source, E)) {
    __builtin_memcpy(to, from, n * sizeof(E));
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, n - i), n - i);
  }
}

// f(pointer to the element at row, col) with the pointer's type
template <class F>
PK_INLINE auto weight_at(const Weight& w, int64_t row, int64_t col, const F& f) {
  const int64_t at = row * w.step + col;
  if (w.dtype == 0) return f(static_cast<const float*>(w.data) + at);
  if (w.dtype == 1) return f(static_cast<const bf16*>(w.data) + at);
  return f(static_cast<const fp16*>(w.data) + at);
}

template <class T>
struct Plain;
template <class T>
struct Plain<const T*> {
  using Type = T;
};

struct Panel {
  const word* data;
  int64_t row;
};

// Rows row .. row + rows - 1 of w, columns col .. col + k - 1, in operand words: where they lie if they are such words,
// else in `copy`, with zeros beyond k and from row `valid` on.
template <class Op>
__attribute__((noinline)) Panel rows_panel(const Weight& w, int64_t row, int64_t rows, int64_t valid, int64_t col,
                                           int64_t k, word* copy) {
  using E = typename Op::Element;
  constexpr int kUnit = Op::kPer * Op::kStep;
  return weight_at(w, row, col, [&](auto* from) PK_FORCED {
    using Source = typename Plain<decltype(from)>::Type;
    if (__is_same(Source, E) && valid >= rows && k % kUnit == 0 && w.step % Op::kPer == 0 &&
        reinterpret_cast<uintptr_t>(from) % sizeof(word) == 0)
      return Panel{reinterpret_cast<const word*>(from), w.step / Op::kPer};
    const int64_t words = words_of<Op>(k);
    for (int64_t i = 0; i < rows; ++i) {
      word* out = copy + i * words;
      if (i >= valid || k % kUnit) clear_words(out, words);
      if (i < valid) convert_row(from + i * w.step, reinterpret_cast<E*>(out), k);
    }
    return Panel{copy, words};
  });
}

// Panels are short rows far apart: the processor's own prefetchers come too late for them.
PK_INLINE void prefetch_panel(const Weight& w, int64_t row, int64_t rows, int64_t col, int64_t k) {
  const int64_t size = w.dtype == 0 ? 4 : 2;
  for (int64_t i = 0; i < rows; ++i) {
    const char* from = static_cast<const char*>(w.data) + ((row + i) * w.step + col) * size;
    for (int64_t at = 0; at < k * size; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
}

// ---- what a tile needs to know of its tokens

struct Lanes {
  float *mean, *rstd, *drop;  // zero where there is no token

  void fill(const MlpParams& p, int64_t first, int64_t count, int64_t lanes) const {
    __builtin_memset(mean, 0, lanes * sizeof(float));
    __builtin_memset(rstd, 0, lanes * sizeof(float));
    __builtin_memset(drop, 0, lanes * sizeof(float));
    each_sample(p.pixels, first, count, [&](int64_t b, int64_t, int64_t lane, int64_t run) {
      for (int64_t t = lane; t < lane + run; ++t) {
        mean[t] = p.norm ? p.mean[b] : 0;
        rstd[t] = p.norm ? p.rstd[b] : 1;
        drop[t] = p.drop[b];
      }
    });
  }
};

// Zeros from the last channels to the end of a product's k.
template <class E>
PK_INLINE void clear_rows(const Tile<E>& tile, int64_t channels, int64_t lanes) {
  using Op = typename OperandOf<E>::Op;
  for (int64_t i = (channels + Op::kPer - 1) / Op::kPer; i < words_of<Op>(channels); ++i)
    clear_words(tile.data + i * tile.row, lanes);
}

// n = (x - mean) rstd gamma + beta, rounded to the operand's elements.
template <class T, class E>
__attribute__((noinline)) void normalise(const MlpParams& p, const Tile<T>& x, const Lanes& of, int64_t lanes,
                                         const Tile<E>& n) {
  clear_rows(n, p.channels, lanes);
  for (int64_t i = 0; i < (p.channels + 1) / 2; ++i) {
    if (!p.norm) {
      for (int64_t l = 0; l < lanes; l += kLanes) n.put(i, l, x.get(i, l));
      continue;
    }
    const vf gamma_a = splat(p.gamma[2 * i]), gamma_b = splat(p.gamma[2 * i + 1]);
    const vf beta_a = splat(p.beta[2 * i]), beta_b = splat(p.beta[2 * i + 1]);
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const Pair v = x.get(i, l);
      const vf mean = load(of.mean + l), rstd = load(of.rstd + l);
      n.put(i, l, {(v.a - mean) * rstd * gamma_a + beta_a, (v.b - mean) * rstd * gamma_b + beta_b});
    }
  }
}

// ---- fc1's epilogue

// p = act(h + bias) over `rows` rows of h, zero from row `valid` on: where x is infinite, h is not. With SAVED, h +
// bias is left in h.
template <Activation A, bool EXACT, bool SAVED, class E>
__attribute__((noinline)) void activate_rows(float* h, int64_t rows, int64_t lanes, const float* bias, int64_t valid,
                                             const Tile<E>& p, int64_t row) {
  if (valid < rows) __builtin_memset(h + valid * lanes, 0, (rows - valid) * lanes * sizeof(float));
  for (int64_t i = 0; i < rows / 2; ++i) {
    float *row_a = h + 2 * i * lanes, *row_b = row_a + lanes;
    const vf bias_a = splat(bias[2 * i]), bias_b = splat(bias[2 * i + 1]);
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const vf a = load(row_a + l) + bias_a, b = load(row_b + l) + bias_b;
      if constexpr (SAVED) {
        store(row_a + l, a);
        store(row_b + l, b);
      }
      p.put(row / 2 + i, l, {activate<A, EXACT>(a, Exponential{}).value, activate<A, EXACT>(b, Exponential{}).value});
    }
  }
}

template <bool EXACT, bool SAVED, class... Args>
PK_INLINE void activate_rows(Activation activation, const Args&... args) {
  switch (activation) {
    case Activation::gelu: return activate_rows<Activation::gelu, EXACT, SAVED>(args...);
    case Activation::gelu_tanh: return activate_rows<Activation::gelu_tanh, EXACT, SAVED>(args...);
    case Activation::relu: return activate_rows<Activation::relu, EXACT, SAVED>(args...);
    case Activation::silu: return activate_rows<Activation::silu, EXACT, SAVED>(args...);
  }
}

// ---- fc2's epilogue

// Rows c .. c + rows - 1: y = x + d s (o + b2), rounded, over x's words where there is a residual.
template <class T>
__attribute__((noinline)) void write_rows(const MlpParams& p, const float* o, int64_t rows, int64_t lanes,
                                          const float* drop, int64_t c, const Tile<T>& y) {
  for (int64_t i = 0; i < rows / 2 && c + 2 * i < p.out; ++i) {
    const float *row_a = o + 2 * i * lanes, *row_b = row_a + lanes;
    const int64_t channel = c + 2 * i;
    const vf bias_a = splat(p.b2[channel]), bias_b = splat(p.b2[channel + 1]);
    const vf scale_a = splat(p.scale[channel]), scale_b = splat(p.scale[channel + 1]);
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const vf d = load(drop + l);
      Pair v = {(load(row_a + l) + bias_a) * scale_a * d, (load(row_b + l) + bias_b) * scale_b * d};
      if (p.residual) {
        const Pair x = y.get(channel / 2, l);
        v = {x.a + v.a, x.b + v.b};
      }
      y.put(channel / 2, l, v);
    }
  }
}

// Mean and M2 of every token's channels, around the first one.
template <class T>
__attribute__((noinline)) void token_moments(const Tile<T>& y, int64_t channels, int64_t count, float* out) {
  const float size = channels;
  for (int64_t l = 0; l < count; l += kLanes) {
    const vf shift = y.get(0, l).a;
    vf sum{}, squares{};
    for (int64_t i = 0; i < channels / 2; ++i) {
      const Pair v = y.get(i, l);
      const vf a = v.a - shift, b = v.b - shift;
      sum += a + b;
      squares += a * a;
      squares += b * b;
    }
    if (channels % 2) {
      const vf a = y.get(channels / 2, l).a - shift;
      sum += a;
      squares += a * a;
    }
    float mean[kLanes], m2[kLanes];
    const vf rest = squares - sum * (sum / size);
    write(mean, shift + sum / size);
    write(m2, rest < 0.0f ? vf{} : rest);
    for (int64_t t = 0; t < kLanes && l + t < count; ++t) {
      out[2 * (l + t)] = mean[t];
      out[2 * (l + t) + 1] = m2[t];
    }
  }
}

// ---- the tile

template <int WRITE>
PK_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at, WRITE, 2);
}

constexpr int64_t kHiddenChunk = 256;

template <class T, class Op>
struct ForwardScratch {
  word *x, *n, *p, *panel;
  float *h, *o;
  Lanes of;
  word* end;

  ForwardScratch(const MlpParams& q, word* base) {
    Cut cut{base};
    const int64_t lanes = q.lanes, wide = q.channels > q.out ? q.channels : q.out;
    const int64_t chunk = q.hidden < kHiddenChunk ? q.hidden : kHiddenChunk;
    const int64_t k1 = words_of<Op>(q.channels), k2 = words_of<Op>(chunk);
    x = cut.words(Tile<T>::rows(wide) * lanes);
    n = cut.words((k1 + 1) * lanes);  // a last pair of rows may reach one beyond
    p = cut.words((k2 + Op::kRows) * lanes);
    panel = cut.words(Op::kRows * (k1 > k2 ? k1 : k2));
    h = cut.floats(Op::kRows * lanes);
    o = cut.floats((q.hidden > chunk ? rounded_up(q.out, Op::kRows) : Op::kRows) * lanes);
    of = {cut.floats(lanes), cut.floats(lanes), cut.floats(lanes)};
    end = cut.next;
  }
};

// Rows of fc1's output, with its bias, for the backward. What is finite stays so: the slope is 0 or 1 out there.
template <class S>
void save_rows(const MlpParams& p, float* h, int64_t rows, int64_t lanes, int64_t row, int64_t first, int64_t count) {
  for (int64_t r = 0; r < rows && row + r < p.hidden; ++r) {
    float* in = h + r * lanes;
    if constexpr (__is_same(S, fp16))
      for (int64_t l = 0; l < lanes; l += kLanes) {
        const vf v = load(in + l), cut = lesser(splat(65504), larger(splat(-65504), v));
        store(in + l, v - v == 0.0f ? cut : v);
      }
    convert_row(in, static_cast<S*>(p.saved) + (row + r) * p.tokens + first, count);
  }
}

template <class T, class S>
void mlp_forward(const MlpParams& p, int64_t first, int64_t count, word* scratch) {
  using Op = typename OperandOf<S>::Op;
  using E = typename Op::Element;
  constexpr bool kExact = !__is_same(S, bf16);
  constexpr int64_t kRows = Op::kRows;
  [[maybe_unused]] const MatrixUnit unit;
  const ForwardScratch<T, Op> s(p, scratch);
  const int64_t lanes = rounded_up(count, kLanes), k1 = words_of<Op>(p.channels);
  const Tile<T> x{s.x, lanes};
  const Tile<E> n{s.n, lanes}, hidden{s.p, lanes};
  load_tile(static_cast<const T*>(p.x), {p.channels, p.pixels, p.channels_last}, first, count, x);
  s.of.fill(p, first, count, lanes);
  normalise(p, x, s.of, lanes, n);
  if (p.channels_last) {  // the caches fetch the next tile and y's lines meanwhile
    const int64_t bytes = p.channels * sizeof(T),
                  next = p.tokens - first - count < count ? p.tokens - first - count : count;
    prefetch<0>(static_cast<const T*>(p.x) + (first + count) * p.channels, next * bytes);
    prefetch<1>(static_cast<T*>(p.y) + first * p.out, count * p.out * sizeof(T));
  }
  for (int64_t j = 0; j < p.hidden; j += kHiddenChunk) {
    const int64_t size = p.hidden - j < kHiddenChunk ? p.hidden - j : kHiddenChunk, k2 = words_of<Op>(size);
    for (int64_t r = 0; r < size; r += kRows) {
      const Panel a = rows_panel<Op>(p.w1, j + r, kRows, size - r, 0, p.channels, s.panel);
      if (r + 2 * kRows <= size)
        prefetch_panel(p.w1, j + r + kRows, kRows, 0, p.channels);
      else
        prefetch_panel(p.w2, 0, least(kRows, p.out), j, size);
      multiply<Op>(a.data, a.row, kRows, s.n, lanes, lanes, k1, s.h, lanes, false);
      if (p.saved) {
        activate_rows<kExact, true>(p.activation, s.h, kRows, lanes, p.b1 + j + r, size - r, hidden, r);
        save_rows<S>(p, s.h, kRows, lanes, j + r, first, count);
      } else {
        activate_rows<kExact, false>(p.activation, s.h, kRows, lanes, p.b1 + j + r, size - r, hidden, r);
      }
    }
    const bool last = j + size == p.hidden;
    for (int64_t c = 0; c < p.out; c += kRows) {
      float* o = p.hidden > kHiddenChunk ? s.o + c * lanes : s.o;
      const Panel a = rows_panel<Op>(p.w2, c, kRows, p.out - c, j, size, s.panel);
      if (c + 2 * kRows <= p.out)
        prefetch_panel(p.w2, c + kRows, kRows, j, size);
      else if (!last)
        prefetch_panel(p.w1, j + size, least(kRows, p.hidden - j - size), 0, p.channels);
      multiply<Op>(a.data, a.row, kRows, s.p, lanes, lanes, k2, o, lanes, j > 0);
      if (last) write_rows(p, o, kRows, lanes, s.of.drop, c, x);
    }
  }
  if (p.token_moments) token_moments(x, p.out, count, p.token_moments + 2 * first);
  store_tile(x, {p.out, p.pixels, p.channels_last}, first, count, static_cast<T*>(p.y));
}

template <class T, class S>
int64_t forward_scratch(const MlpParams& p) {
  const ForwardScratch<T, typename OperandOf<S>::Op> s(p, nullptr);
  return reinterpret_cast<uintptr_t>(s.end) / sizeof(word);
}
