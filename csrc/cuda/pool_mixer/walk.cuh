// A thread's walk down a strip of rows, for pools of 3: rows on their way while the sums of earlier ones roll on.
#pragma once

#include <type_traits>

#include "tile.cuh"
#include "../core/ptx.cuh"

namespace pk {
namespace {

// A thread's walk down its strip: the horizontal sums of the last two rows roll on. Both kinds of walk have
//   surround(plan, at, word)   what lies outside the image counts as `word`, not zero;
//   down(plan, at, word, sums, visit)   visit(r, centre, other, total) for each row r of the strip, of which `total`
//       are the sums over three rows, and `other` is the second tensor (if any); sums(row, r, out) gives a row's.
template <class R>
struct RollingSums {
  float both[R::N], last[R::N];  // of the rows r - 1 and r, and of r

  __device__ void start(const float (&above)[R::N], const float (&first)[R::N]) {
#pragma unroll
    for (int n = 0; n < R::N; ++n) {
      both[n] = above[n] + first[n];
      last[n] = first[n];
    }
  }
  __device__ void next(const float (&below)[R::N], float (&total)[R::N]) {
#pragma unroll
    for (int n = 0; n < R::N; ++n) {
      total[n] = both[n] + below[n];
      both[n] = last[n] + below[n];
      last[n] = below[n];
    }
  }
};

// Three rows in registers: the centre, the one below it, and one on its way, then replaced by the row after that.
template <class T, int V, bool ALONG>
struct RegisterWalk {
  static constexpr bool kOneItem = false;
  using R = Row<T, V, ALONG>;
  R row[3];
  Own<T, V, ALONG> other[3];
  const T *here, *here_other;  // row r
  int loads;                   // rows at or below the strip's first that it needs and that exist
  Columns columns;
  bool has_second;

  __device__ RegisterWalk(const Plan& p, const Place& at, int, const void* tensor, const void* second, char*)
      : here(static_cast<const T*>(tensor) + at.offset),
        here_other(second ? static_cast<const T*>(second) + at.offset : nullptr),
        loads(min(at.rows + 1, p.height - at.top)),
        columns(Columns::of<R>(p, at.w)),
        has_second(columns.second) {
    if (at.rows == 0) return;
    if (at.top > 0) columns.load_row(row[2], here - p.row);
    columns.load_row(row[0], here);
    if (loads > 1) columns.load_row(row[1], here + p.row);
    for (int r = 0; r < 3; ++r) load_other(p, at, r, r, r);
  }

  __device__ void load_other(const Plan& p, const Place& at, int phase, int row_at, int ahead) {
    if (here_other && row_at < at.rows) other[phase].load_from(here_other + ahead * p.row, p.column, columns.second);
  }

  __device__ void surround(const Plan&, const Place& at, uint32_t word) {
    if (at.top == 0) row[2].fill(word);
    if (loads == 1) row[1].fill(word);
#pragma unroll
    for (R& each : row) columns.fill_missing(each, word);
  }

  // Row r + 3 in the place of row r, which is `ahead` rows below `here`.
  __device__ void fetch(const Plan& p, const Place& at, R& to, int r, int ahead, uint32_t word) {
    if (r + 3 < loads)
      columns.load_row(to, here + ahead * p.row);
    else if (r + 3 == at.rows)
      to.fill(word);
  }

  template <class Sums, class Visit>
  __device__ void down(const Plan& p, const Place& at, uint32_t word, const Sums& sums, const Visit& visit) {
    if (at.rows == 0) return;
    RollingSums<R> rolling;
    float above[R::N], first[R::N];
    sums(row[2], -1, above);
    fetch(p, at, row[2], -1, 2, word);
    sums(row[0], 0, first);
    rolling.start(above, first);
    for (int r = 0;;) {
#pragma unroll
      for (int phase = 0; phase < 3; ++phase) {
        float below[R::N], total[R::N];
        sums(row[(phase + 1) % 3], r + 1, below);
        rolling.next(below, total);
        visit(r, row[phase].own, other[phase], total);
        fetch(p, at, row[phase], r, 3, word);
        load_other(p, at, phase, r + 3, 3);
        here += p.row;
        if (here_other) here_other += p.row;
        if (++r == at.rows) return;
      }
    }
  }
};

// Rows in shared memory of a walk over so many tensors: enough on their way at one block a multiprocessor (batch 1),
// and room for the blocks that the registers allow.
PK_HOST_DEVICE constexpr int stages_of(int tensors) { return tensors == 1 ? 8 : 4; }

// Rows in shared memory, copied asynchronously: 16 bytes of channels x 2 columns would take too many registers. The
// block's threads have one item each and share their columns; its outermost columns bring their neighbours along. At
// row r, the rows r and r + 1 are there and those after them on their way.
template <class T, int V, int TENSORS>
struct SharedWalk {
  static constexpr int kStages = stages_of(TENSORS);
  static constexpr bool kOneItem = true;  // of a thread
  using R = Row<T, V, false>;
  const T *from, *from_other;  // the row to copy
  // What belongs to this thread in the first of the stages, [kStages][pitch]: the tile's columns and two more, the
  // second tensor's columns, and 16 bytes of what lies outside the image.
  char *own, *left, *second, *right, *other, *other_second, *outside;
  int loads;                               // rows at or below the strip's first that it needs and that exist
  bool has_second, halo_left, halo_right;  // columns that exist; those beside the tile that this thread copies

  __device__ SharedWalk(const Plan& p, const Place& at, int item, const void* tensor, const void* with, char* shared)
      : from(static_cast<const T*>(tensor) + at.offset),
        from_other(static_cast<const T*>(with) + (with ? at.offset : 0)),
        outside(shared + p.pitch - 16),
        loads(at.rows > 0 ? min(at.rows + 1, p.height - at.top) : 0) {
    const int column = p.fast.of(item), bytes = p.tile_groups * kCellElements * static_cast<int>(sizeof(T));
    const bool has_right = at.w + 2 < p.width;
    has_second = at.w + 1 < p.width;
    own = shared + (2 * column + 1) * bytes + (item - column * static_cast<int>(p.fast.value)) * 16;
    left = at.w > 0 ? own - bytes : outside;
    second = has_second ? own + bytes : outside;
    right = has_right ? own + 2 * bytes : outside;
    other = own + (2 * p.tile_columns + 1) * bytes;
    other_second = has_second ? other + bytes : other;
    if (loads == 0) own = left = second = right = other = other_second = outside;
    halo_left = column == 0 && at.w > 0;
    halo_right = column == p.tile_columns - 1 && has_right;
    if (loads > 0 && at.top > 0) copy_row(p, -1, from - p.row);
    copy_commit();
#pragma unroll
    for (int r = 0; r < kStages - 1; ++r) fetch(p, at, r, 0);
  }

  // The stage of row r.
  __device__ static int stage(const Plan& p, int r) { return ((r + 1) & (kStages - 1)) * p.pitch; }

  __device__ void copy_row(const Plan& p, int r, const T* row) const {
    const int to = stage(p, r);
    copy_async(own + to, row, true);
    if (has_second) copy_async(second + to, row + p.column, true);
    if (halo_left) copy_async(left + to, row - p.column, true);
    if (halo_right) copy_async(right + to, row + 2 * p.column, true);
  }

  __device__ static void fill(char* to, uint32_t word) {
    Pack<T, V> pack;
#pragma unroll
    for (uint32_t& each : pack.word) each = word;
    store<T, V>(reinterpret_cast<T*>(to), pack);
  }

  __device__ void fill_row(const Plan& p, int r, uint32_t word) const {
    const int to = stage(p, r);
    fill(own + to, word);
    if (has_second) fill(second + to, word);
    if (halo_left) fill(left + to, word);
    if (halo_right) fill(right + to, word);
  }

  // Row r on its way.
  __device__ void fetch(const Plan& p, const Place& at, int r, uint32_t word) {
    if (r < loads) {
      copy_row(p, r, from);
      from += p.row;
    } else if (r == at.rows && r > 0) {
      fill_row(p, r, word);
    }
    if (from_other && r < at.rows) {
      copy_async(other + stage(p, r), from_other, true);
      if (has_second) copy_async(other_second + stage(p, r), from_other + p.column, true);
      from_other += p.row;
    }
    copy_commit();
  }

  __device__ void surround(const Plan& p, const Place& at, uint32_t word) const {
    if (threadIdx.x == 0)
      for (int r = -1; r < kStages - 1; ++r) fill(outside + stage(p, r), word);
    if (loads == 0) return;
    if (at.top == 0) fill_row(p, -1, word);
    if (loads <= at.rows && at.rows < kStages - 1) fill_row(p, at.rows, word);
  }

  __device__ static Pack<T, V> read(const char* at) { return load<T, V>(reinterpret_cast<const T*>(at)); }

  __device__ R row(const Plan& p, int r) const {
    const int to = stage(p, r);
    return {{read(own + to), read(second + to)}, read(left + to), read(right + to)};
  }

  // By the whole block: threads past the end of their strip, or with none, go along.
  template <class Sums, class Visit>
  __device__ void down(const Plan& p, const Place& at, uint32_t word, const Sums& sums, const Visit& visit) {
    copy_wait<kStages - 2>();
    __syncthreads();
    RollingSums<R> rolling;
    float above[R::N], top[R::N];
    sums(row(p, -1), -1, above);
    sums(row(p, 0), 0, top);
    rolling.start(above, top);
#pragma unroll 2
    for (int r = 0; r < p.rows; ++r) {
      copy_wait<kStages - 3>();  // row r + 1 is there
      __syncthreads();           // for every thread, and nobody reads row r - 1 any longer
      fetch(p, at, r + kStages - 1, word);
      float below[R::N], total[R::N];
      sums(row(p, r + 1), r + 1, below);
      rolling.next(below, total);
      if (r >= at.rows) continue;
      const int here = stage(p, r);
      const Own<T, V, false> centre = {read(own + here), read(second + here)};
      Own<T, V, false> with;
      if (from_other) with = {read(other + here), read(other_second + here)};
      visit(r, centre, with, total);
    }
  }
};

// Of a block, at most: a tile has a share for each where loads are 16 bytes.
template <class T, int V>
constexpr int threads_of = V == 8 ? 128 : 256;

template <class T, int V, bool ALONG, int TENSORS>
using Walk = std::conditional_t<!ALONG && V * sizeof(T) == 16, SharedWalk<T, V, TENSORS>, RegisterWalk<T, V, ALONG>>;

// Sums over three columns; neighbours share the sum of two.
template <bool SHIFTED, class R>
__device__ inline void plain_sums(const R& row, float shift, float (&out)[R::N]) {
  const auto value = [&](int j, int i) { return SHIFTED ? row.value(j, i) - shift : row.value(j, i); };
#pragma unroll
  for (int i = 0; i < R::CH; ++i)
#pragma unroll
    for (int j = 0; j < R::CO; j += 2) {
      const float inner = value(j, i) + value(j + 1, i);
      out[j * R::CH + i] = value(j - 1, i) + inner;
      out[(j + 1) * R::CH + i] = inner + value(j + 2, i);
    }
}

// What differs between a thread's columns: each has its own, or (V columns of one channel) the first and the last.
template <class R>
__device__ constexpr int kind_of(int j) {
  return R::CO == 2 ? j : j == 0 ? 0 : j == R::CO - 1 ? 2 : 1;
}
template <class R>
constexpr int kKinds = R::CO == 2 ? 2 : 3;
template <class R>
__device__ inline int column_of(int kind) {
  return kind == 2 ? R::CO - 1 : kind;
}

// How many of three taps around i exist, and what divides by it.
__device__ inline float three_taps(int i, int size) { return 1.0f + (i > 0) + (i + 1 < size); }
__device__ inline float inverse_of(float taps) { return taps == 3.0f ? 1.0f / 3.0f : taps == 2.0f ? 0.5f : 1.0f; }

// Sizes of the pool at a thread's columns, row by row of its strip.
template <class R>
struct Sizes {
  float across[kKinds<R>], size[kKinds<R>];
  float down;
  int grow, shrink;  // rows where the pool's height becomes 3 and 2, or -1

  __device__ Sizes(const Plan& p, const Place& at) {
#pragma unroll
    for (int kind = 0; kind < kKinds<R>; ++kind) across[kind] = three_taps(at.w + column_of<R>(kind), p.width);
    set(three_taps(at.top, p.height));
    grow = p.height > 2 && at.top == 0 ? 1 : -1;
    shrink = p.height > 2 && at.top < p.height - 1 ? p.height - 1 - at.top : -1;
  }
  __device__ void set(float now) {
    down = now;
#pragma unroll
    for (int kind = 0; kind < kKinds<R>; ++kind) size[kind] = across[kind] * now;
  }
  // Of row r; true where they are not those of the row before.
  __device__ bool at_row(int r) {
    if (r != grow && r != shrink) return false;
    set(r == grow ? 3.0f : 2.0f);
    return true;
  }
  __device__ float inverse(int kind) const { return inverse_of(across[kind]) * inverse_of(down); }
};

}  // namespace
}  // namespace pk
