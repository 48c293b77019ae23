// One vector of floats per instruction-set level, by the compiler's vector extensions, and the few helpers that
// take the place of the standard library's, which may not be used behind level.h.
#pragma once

#include "level.h"

namespace pk {
namespace {

// Floats, integers and half-precision elements of one vector.
template <int kBytes>
struct Types {
  typedef float F __attribute__((vector_size(kBytes)));
  typedef uint32_t U __attribute__((vector_size(kBytes)));
  typedef uint16_t H __attribute__((vector_size(kBytes / 2)));
};

#if PK_LEVEL >= 2
constexpr int kLanes = 16;
#elif PK_LEVEL == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using vf = Types<4 * kLanes>::F;
using vu = Types<4 * kLanes>::U;
using vh = Types<4 * kLanes>::H;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
using packed32 = uint32_t;  // a float, or two elements of half precision

#define PK_INLINE inline __attribute__((always_inline))
#define PK_FORCED __attribute__((always_inline))  // the same for a lambda, behind its parameters

PK_INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
PK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

PK_INLINE vf splat(float a) { return a - vf{}; }

template <class V>
PK_INLINE V read(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
PK_INLINE void write(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

PK_INLINE void clear_words(packed32* p, int64_t n) { __builtin_memset(p, 0, n * sizeof(packed32)); }

// The sum of the lanes.
PK_INLINE float hsum(vf v) {
  float sum[kLanes];
  write(sum, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
}

// max(bound, x) and min(bound, x), which are x where x is a NaN.
#if PK_LEVEL >= 2
PK_INLINE vf larger(vf bound, vf x) { return (vf)_mm512_max_ps((__m512)bound, (__m512)x); }
PK_INLINE vf lesser(vf bound, vf x) { return (vf)_mm512_min_ps((__m512)bound, (__m512)x); }
#elif PK_LEVEL == 1
PK_INLINE vf larger(vf bound, vf x) { return (vf)_mm256_max_ps((__m256)bound, (__m256)x); }
PK_INLINE vf lesser(vf bound, vf x) { return (vf)_mm256_min_ps((__m256)bound, (__m256)x); }
#else
PK_INLINE vf larger(vf bound, vf x) { return bound > x ? bound : x; }
PK_INLINE vf lesser(vf bound, vf x) { return bound < x ? bound : x; }
#endif

// e^x to an ulp or two; 0 below -88 and inf above 88.8.
PK_INLINE vf exponential(vf x) {
  x = lesser(splat(88.8f), larger(splat(-88.1f), x));
  const vf shifted = x * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;  // n in the low bits of `shifted`
  const vf f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = f * (1.0f / 5040) + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * (f * f) + f + 1.0f;
  return p * (vf)(((vu)shifted + 127u) << 23);
}

// `exponential` as an object, whose calls are inlined even without optimisation.
struct Exponential {
  PK_INLINE vf operator()(vf x) const { return exponential(x); }
};

// --- bfloat16 is the upper half of a float, rounded to nearest even

PK_INLINE vu round_bits(vf v) {
  const vu u = (vu)v;
  return v == v ? u + 0x7fffu + ((u >> 16) & 1u) : vu{} + 0x7fc00000u;
}
#if PK_LEVEL >= 2
PK_INLINE vf widen(vh h, const bf16*) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16); }
#elif PK_LEVEL == 1
PK_INLINE vf widen(vh h, const bf16*) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16); }
#else
PK_INLINE vf widen(vh h, const bf16*) { return (vf)(__builtin_convertvector(h, vu) << 16); }
#endif
#if PK_LEVEL >= 3
PK_INLINE vh narrow(vf v, const bf16*) { return (vh)_mm512_cvtneps_pbh((__m512)v); }
PK_INLINE vf rounded(vf v, const bf16* tag) { return widen(narrow(v, tag), tag); }
#elif PK_LEVEL == 2
PK_INLINE vh narrow(vf v, const bf16*) { return (vh)_mm512_cvtepi32_epi16((__m512i)(round_bits(v) >> 16)); }
#else
PK_INLINE vh narrow(vf v, const bf16*) { return __builtin_convertvector(round_bits(v) >> 16, vh); }
#endif
#if PK_LEVEL < 3
PK_INLINE vf rounded(vf v, const bf16*) { return (vf)(round_bits(v) & 0xffff0000u); }
#endif

// --- float16

#if PK_LEVEL >= 2
PK_INLINE vf widen(vh h, const fp16*) { return (vf)_mm512_cvtph_ps((__m256i)h); }
PK_INLINE vh narrow(vf v, const fp16*) { return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif PK_LEVEL == 1
PK_INLINE vf widen(vh h, const fp16*) { return (vf)_mm256_cvtph_ps((__m128i)h); }
PK_INLINE vh narrow(vf v, const fp16*) { return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
PK_INLINE vf widen(vh h, const fp16*) {
  // Scaling by 2^112 turns a half's exponent into a float's, subnormals included; inf and NaN need their own exponent.
  const vu u = __builtin_convertvector(h, vu);
  const vu sign = (u & 0x8000u) << 16, magnitude = (u & 0x7fffu) << 13;
  const vu finite = (vu)((vf)magnitude * 0x1p112f), special = magnitude | 0x7f800000u;
  return (vf)(sign | ((u & 0x7c00u) == 0x7c00u ? special : finite));
}
PK_INLINE vh narrow(vf v, const fp16*) {
  const vu u = (vu)v, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Below 2^-14 halves are spaced 2^-24: adding 0.5 leaves the rounded half in the low bits.
  const vu small = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
  const vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  vu h = magnitude < (113u << 23) ? small : normal;
  h = magnitude >= 0x477ff000u ? vu{} + 0x7c00u : h;  // rounds to inf
  h = magnitude > 0x7f800000u ? vu{} + 0x7e00u : h;   // NaN
  return __builtin_convertvector(sign | h, vh);
}
#endif
PK_INLINE vf rounded(vf v, const fp16* tag) { return widen(narrow(v, tag), tag); }

// --- loads and stores of kLanes elements, and of the first n <= kLanes: the rest read as zero and are not written

PK_INLINE vf load(const float* p) { return read<vf>(p); }
PK_INLINE void store(float* p, vf v) { write(p, v); }
PK_INLINE vf rounded(vf v, const float*) { return v; }

template <class T>
PK_INLINE vf load(const T* p) {
  return widen(read<vh>(p), p);
}
template <class T>
PK_INLINE void store(T* p, vf v) {
  write(p, narrow(v, p));
}

#if PK_LEVEL >= 2
PK_INLINE __mmask16 lanes_below(int64_t n) { return (__mmask16)((1u << n) - 1); }
PK_INLINE vf load(const float* p, int64_t n) { return (vf)_mm512_maskz_loadu_ps(lanes_below(n), p); }
PK_INLINE void store(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, lanes_below(n), (__m512)v); }
template <class T>
PK_INLINE vf load(const T* p, int64_t n) {
  return widen((vh)_mm256_maskz_loadu_epi16(lanes_below(n), p), p);
}
template <class T>
PK_INLINE void store(T* p, vf v, int64_t n) {
  _mm256_mask_storeu_epi16(p, lanes_below(n), (__m256i)narrow(v, p));
}
#else
template <class T>
PK_INLINE vf load(const T* p, int64_t n) {
  T whole[kLanes] = {};
  __builtin_memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <class T>
PK_INLINE void store(T* p, vf v, int64_t n) {
  T whole[kLanes];
  store(whole, v);
  __builtin_memcpy(p, whole, n * sizeof(T));
}
#endif

// --- two vectors at once: 2 kLanes consecutive elements, in the order that is cheapest for the type. In bfloat16 `a`
// has the even elements and `b` the odd ones, so widening is a shift and a mask; otherwise the first and second half.

struct Pair {
  vf a, b;
};

template <class T>
PK_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
PK_INLINE Pair load_pair(const bf16* p) {
  const vu u = read<vu>(p);
  return {(vf)(u << 16), (vf)(u & 0xffff0000u)};
}

template <class T>
PK_INLINE void store_pair(T* p, Pair v) {
  store(p, v.a);
  store(p + kLanes, v.b);
}
PK_INLINE void store_pair(bf16* p, Pair v) {
#if PK_LEVEL >= 3
  typedef uint16_t Words __attribute__((vector_size(64)));
  Words order{};
  for (int i = 0; i < kLanes; ++i) order[2 * i] = i, order[2 * i + 1] = kLanes + i;
  write(p, _mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a)));
#else
  write(p, (round_bits(v.a) >> 16) | (round_bits(v.b) & 0xffff0000u));
#endif
}

template <class T>
PK_INLINE Pair load_pair(const T* p, int64_t n) {
  if (n >= kLanes) return {load(p), load(p + kLanes, n - kLanes)};
  return {load(p, n), vf{}};
}
PK_INLINE Pair load_pair(const bf16* p, int64_t n) {
#if PK_LEVEL >= 2
  const vu u = (vu)_mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << n) - 1), p);
  return {(vf)(u << 16), (vf)(u & 0xffff0000u)};
#else
  bf16 whole[2 * kLanes] = {};
  __builtin_memcpy(whole, p, n * sizeof(bf16));
  return load_pair(whole);
#endif
}
template <class T>
PK_INLINE void store_pair(T* p, Pair v, int64_t n) {
  T whole[2 * kLanes];
  store_pair(whole, v);
  __builtin_memcpy(p, whole, n * sizeof(T));
}

// Loads n floats in the order that load_pair has for elements of the tag's type, and stores them from that order.
PK_INLINE Pair floats_pair(const float* p, int64_t n, const void*) { return load_pair(p, n); }
PK_INLINE Pair floats_pair(const float* p, int64_t n, const bf16*) {
  float even[kLanes] = {}, odd[kLanes] = {};
  for (int64_t i = 0; i < (n + 1) / 2; ++i) even[i] = p[2 * i];
  for (int64_t i = 0; i < n / 2; ++i) odd[i] = p[2 * i + 1];
  return {read<vf>(even), read<vf>(odd)};
}
PK_INLINE void store_floats(float* p, Pair v, int64_t n, const void*) { store_pair(p, v, n); }
PK_INLINE void store_floats(float* p, Pair v, int64_t n, const bf16*) {
  float even[kLanes], odd[kLanes];
  write(even, v.a);
  write(odd, v.b);
  for (int64_t i = 0; i < (n + 1) / 2; ++i) p[2 * i] = even[i];
  for (int64_t i = 0; i < n / 2; ++i) p[2 * i + 1] = odd[i];
}

}  // namespace
}  // namespace pk
