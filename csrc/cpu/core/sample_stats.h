// The statistics kernel for one instruction-set level, see stats.h.
#pragma once

#include "../isa/vec.h"
#include "stats.h"

namespace pk {
namespace {

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

#if PK_LEVEL >= 3
// Sums by bfloat16 dot products, which takes a third of the instructions. No shift is subtracted; returns false where
// the mean is so large that this costs digits.
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
void sample_stats(const void* sample, int64_t size, int64_t first_chunk, int64_t last_chunk, float* partials) {
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t begin = chunk * kStatsChunk, n = begin + kStatsChunk < size ? kStatsChunk : size - begin;
    const T* x = static_cast<const T*>(sample) + begin;
    float* out = partials + chunk * 3;
#if PK_LEVEL >= 3
    if constexpr (__is_same(T, bf16))
      if (quick_moments(x, n, out)) continue;
#endif
    // The mean of the first elements is subtracted: squares - sum^2 / n then loses at most log2(n / head) bits.
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

}  // namespace
}  // namespace pk
