// Operands of the products for one instruction-set level: which words a dtype is multiplied in, and panels of weights.
//
// Tokens run along vectors, so weights are the scalars that are broadcast and are read where they lie; a few rows at a
// time are copied where their dtype, alignment or padding asks for it. No packed copy can go stale.
#pragma once

#include "../isa/vec.h"
#include "gemm.h"
#include "prefetch.h"
#include "weight.h"

namespace pk {
namespace {

// How the level multiplies operands that are rounded to elements S.
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

// The words of a row of so many elements, in whole steps of a product.
template <class Op>
PK_INLINE int64_t words_of(int64_t elements) {
  return (elements + Op::kPer * Op::kStep - 1) / (Op::kPer * Op::kStep) * Op::kStep;
}

// The first and the last N of n bytes, which may overlap.
template <int N>
PK_INLINE void copy_ends(const char* from, char* to, int64_t n) {
  char head[N], tail[N];
  __builtin_memcpy(head, from, N);
  __builtin_memcpy(tail, from + n - N, N);
  __builtin_memcpy(to, head, N);
  __builtin_memcpy(to + n - N, tail, N);
}

// Copies short runs of any length by moves that overlap: calling memcpy costs more, and so does a masked store.
PK_INLINE void copy_bytes(const void* source, void* target, int64_t n) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(target);
  if (n >= 32) {
    for (int64_t i = 0; i + 64 < n; i += 32) __builtin_memcpy(to + i, from + i, 32);
    return n >= 64 ? copy_ends<32>(from + n - 64, to + n - 64, 64) : copy_ends<32>(from, to, n);
  }
  if (n >= 16) return copy_ends<16>(from, to, n);
  if (n >= 8) return copy_ends<8>(from, to, n);
  if (n >= 4) return copy_ends<4>(from, to, n);
  if (n >= 2) return copy_ends<2>(from, to, n);
}

// Copies n elements, rounded to E.
template <class Source, class E>
PK_INLINE void convert_row(const Source* from, E* to, int64_t n) {
  if constexpr (__is_same(Source, E)) {
    copy_bytes(from, to, n * sizeof(E));
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, n - i), n - i);
  }
}

// Calls f with a pointer to the element at row, col, of the weight's type.
template <class F>
PK_INLINE auto weight_at(const Weight& w, int64_t row, int64_t col, const F& f) {
  const int64_t at = row * w.step + col;
  if (w.dtype == 0) return f(static_cast<const float*>(w.data) + at);
  if (w.dtype == 1) return f(static_cast<const bf16*>(w.data) + at);
  return f(static_cast<const fp16*>(w.data) + at);
}

// T of a pointer `const T*`.
template <class T>
struct Plain;
template <class T>
struct Plain<const T*> {
  using Type = T;
};

// Rows of operand words.
struct Panel {
  const packed32* data;
  int64_t row;  // words from a row to the next
};

constexpr int64_t kAliasBytes = 4096;  // addresses so far apart share a set of the L1 cache

// Rows row .. row + rows - 1 of w, columns col .. col + k - 1, as operand words. They are read where they lie, if they
// are such words and whole steps, and not a multiple of kAliasBytes apart: lines of such rows evict each other from the
// L1 cache. Else they are copied to `copy`, with zeros behind the k columns and in rows from `valid` on.
template <class Op>
__attribute__((noinline)) Panel rows_panel(const Weight& w, int64_t row, int64_t rows, int64_t valid, int64_t col,
                                           int64_t k, packed32* copy) {
  using E = typename Op::Element;
  constexpr int kUnit = Op::kPer * Op::kStep;
  return weight_at(w, row, col, [&](auto* from) PK_FORCED {
    using Source = typename Plain<decltype(from)>::Type;
    if (__is_same(Source, E) && valid >= rows && k % kUnit == 0 && w.step % Op::kPer == 0 &&
        w.step * int64_t{sizeof(E)} % kAliasBytes != 0 && reinterpret_cast<uintptr_t>(from) % sizeof(packed32) == 0)
      return Panel{reinterpret_cast<const packed32*>(from), w.step / Op::kPer};
    const int64_t words = words_of<Op>(k);
    for (int64_t i = 0; i < rows; ++i) {
      packed32* out = copy + i * words;
      if (i >= valid || k % kUnit) clear_words(out, words);
      if (i < valid) convert_row(from + i * w.step, reinterpret_cast<E*>(out), k);
    }
    return Panel{copy, words};
  });
}

}  // namespace
}  // namespace pk
