// Prefetches for one instruction-set level: runs of bytes, and the rows of a matrix that the next product reads.
#pragma once

#include "../isa/vec.h"
#include "weight.h"

namespace pk {
namespace {

// Rows of a matrix that will be multiplied next. They are short and far apart, so the processor's own prefetchers come
// too late for them: products fetch them as they go, a cache line of each row at a time.
struct PrefetchRows {
  const char* rows = nullptr;  // null: there are none
  int64_t step = 0;            // bytes from a row to the next
  // Those from row `row` on, from word `words` on.
  PK_INLINE PrefetchRows after(int64_t row, int64_t words) const {
    return rows ? PrefetchRows{rows + row * step + words * sizeof(packed32), step} : PrefetchRows{};
  }
  // The cache line at word i of the first `count` rows.
  PK_INLINE void fetch(int64_t i, int64_t count) const {
    if (rows)
      for (int64_t r = 0; r < count; ++r) __builtin_prefetch(rows + r * step + i * sizeof(packed32), 0, 2);
  }
};

// WRITE: whether the bytes will be written, not read.
template <int WRITE>
PK_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at, WRITE, 2);
}

// Row `row` of w and those after it, from column `col`.
PK_INLINE PrefetchRows prefetch_rows(const Weight& w, int64_t row, int64_t col) {
  const int64_t size = w.dtype == 0 ? 4 : 2;
  return {static_cast<const char*>(w.data) + (row * w.step + col) * size, w.step * size};
}

}  // namespace
}  // namespace pk
