// A thread's walk down a strip of rows, for pools of 3: it loads rows ahead while it sums those that have arrived.
#pragma once

#include <type_traits>

#include "tile.cuh"
#include "../core/ptx.cuh"

namespace pk {
namespace {

// A thread walks down its strip of rows and keeps the horizontal sums of the last two. RegisterWalk and SharedWalk have
// the same functions:
//   surround(tiling, place, packed32)   positions outside the image count as `packed32`, one float32 or two halves,
//       not as zero;
//   for_each_row(tiling, place, packed32, sums, visit)   calls visit(r, centre, other, total) for each row r of the
//       strip: `total` are the sums over three rows, `other` the same elements of the second tensor (if there is one);
//       sums(row, r, out) computes the horizontal sums of a row.
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

// The walk with three rows in registers: the centre, the one below it, and one that is still being loaded.
template <class T, int V, bool ALONG>
struct RegisterWalk {
  static constexpr bool kOneItem = false;
  using R = Row<T, V, ALONG>;
  R row[3];
  RowElements<T, V, ALONG> other[3];
  const T *here, *here_other;  // row r
  int loads;                   // rows to load, from the strip's first one on: the strip's and the one below it, if any
  Columns columns;
  bool has_second;

  __device__ RegisterWalk(const Tiling& tiling, const Place& place, int, const void* tensor, const void* other_tensor,
                          char*)
      : here(static_cast<const T*>(tensor) + place.offset),
        here_other(other_tensor ? static_cast<const T*>(other_tensor) + place.offset : nullptr),
        loads(min(place.rows + 1, tiling.height - place.top)),
        columns(Columns::existing<R>(tiling, place.w)),
        has_second(columns.second) {
    if (place.rows == 0) return;
    if (place.top > 0) columns.load_row(row[2], here - tiling.row);
    columns.load_row(row[0], here);
    if (loads > 1) columns.load_row(row[1], here + tiling.row);
    for (int r = 0; r < 3; ++r) load_other(tiling, place, r, r, r);
  }

  __device__ void load_other(const Tiling& tiling, const Place& place, int phase, int row_index, int rows_ahead) {
    if (here_other && row_index < place.rows)
      other[phase].load_from(here_other + rows_ahead * tiling.row, tiling.column, columns.second);
  }

  __device__ void surround(const Tiling&, const Place& place, uint32_t packed32) {
    if (place.top == 0) row[2].fill(packed32);
    if (loads == 1) row[1].fill(packed32);
#pragma unroll
    for (R& each : row) columns.fill_missing(each, packed32);
  }

  // Loads row r + 3, `rows_ahead` rows below `here`, into `target`, which held row r.
  __device__ void fetch(const Tiling& tiling, const Place& place, R& target, int r, int rows_ahead, uint32_t packed32) {
    if (r + 3 < loads)
      columns.load_row(target, here + rows_ahead * tiling.row);
    else if (r + 3 == place.rows)
      target.fill(packed32);
  }

  template <class Sums, class Visit>
  __device__ void for_each_row(const Tiling& tiling, const Place& place, uint32_t packed32, const Sums& sums,
                               const Visit& visit) {
    if (place.rows == 0) return;
    RollingSums<R> rolling;
    float above[R::N], first[R::N];
    sums(row[2], -1, above);
    fetch(tiling, place, row[2], -1, 2, packed32);
    sums(row[0], 0, first);
    rolling.start(above, first);
    for (int r = 0;;) {
#pragma unroll
      for (int phase = 0; phase < 3; ++phase) {
        float below[R::N], total[R::N];
        sums(row[(phase + 1) % 3], r + 1, below);
        rolling.next(below, total);
        visit(r, row[phase].own, other[phase], total);
        fetch(tiling, place, row[phase], r, 3, packed32);
        load_other(tiling, place, phase, r + 3, 3);
        here += tiling.row;
        if (here_other) here_other += tiling.row;
        if (++r == place.rows) return;
      }
    }
  }
};

// How many rows a walk over this many tensors keeps in shared memory: enough loads under way where a multiprocessor has
// only one block (batch 1), and few enough for as many blocks as the registers allow.
PK_HOST_DEVICE constexpr int stages_of(int tensors) { return tensors == 1 ? 8 : 4; }

// The walk with rows in shared memory, copied there asynchronously: 16 bytes of channels x 2 columns would take too
// many registers. Each thread of the block has one share of the tile and copies its own columns, which its neighbours
// read, too; the threads at the tile's left and right edge also copy the column beside it. When row r is summed, the
// rows r and r + 1 have arrived and those after them are under way.
template <class T, int V, int TENSORS>
struct SharedWalk {
  static constexpr int kStages = stages_of(TENSORS);
  static constexpr bool kOneItem = true;  // a thread has one share of the tile
  using R = Row<T, V, false>;
  const T *source, *source_other;  // the row to copy
  // Where this thread's columns are in the first stage of shared memory, [kStages][pitch]. A stage has the tile's
  // columns and one more on each side, then the second tensor's columns, then 16 bytes that stand for what lies outside
  // the image.
  char *own, *left, *second, *right, *other, *other_second, *outside;
  int loads;                   // rows to copy, from the strip's first one on: the strip's and the one below it, if any
  bool has_second;             // whether the second of the two columns lies inside the image
  bool halo_left, halo_right;  // whether this thread copies the column to the left or right of the tile

  __device__ SharedWalk(const Tiling& tiling, const Place& place, int item, const void* tensor,
                        const void* other_tensor, char* shared)
      : source(static_cast<const T*>(tensor) + place.offset),
        source_other(static_cast<const T*>(other_tensor) + (other_tensor ? place.offset : 0)),
        outside(shared + tiling.pitch - 16),
        loads(place.rows > 0 ? min(place.rows + 1, tiling.height - place.top) : 0) {
    const int column = tiling.fast.divide(item),
              bytes = tiling.tile_groups * kCellElements * static_cast<int>(sizeof(T));
    const bool has_right = place.w + 2 < tiling.width;
    has_second = place.w + 1 < tiling.width;
    own = shared + (2 * column + 1) * bytes + (item - column * static_cast<int>(tiling.fast.value)) * 16;
    left = place.w > 0 ? own - bytes : outside;
    second = has_second ? own + bytes : outside;
    right = has_right ? own + 2 * bytes : outside;
    other = own + (2 * tiling.tile_columns + 1) * bytes;
    other_second = has_second ? other + bytes : other;
    if (loads == 0) own = left = second = right = other = other_second = outside;
    halo_left = column == 0 && place.w > 0;
    halo_right = column == tiling.tile_columns - 1 && has_right;
    if (loads > 0 && place.top > 0) copy_row(tiling, -1, source - tiling.row);
    copy_commit();
#pragma unroll
    for (int r = 0; r < kStages - 1; ++r) fetch(tiling, place, r, 0);
  }

  // The offset of row r's stage, in bytes.
  __device__ static int stage(const Tiling& tiling, int r) { return ((r + 1) & (kStages - 1)) * tiling.pitch; }

  __device__ void copy_row(const Tiling& tiling, int r, const T* row) const {
    const int offset = stage(tiling, r);
    copy_async(own + offset, row, true);
    if (has_second) copy_async(second + offset, row + tiling.column, true);
    if (halo_left) copy_async(left + offset, row - tiling.column, true);
    if (halo_right) copy_async(right + offset, row + 2 * tiling.column, true);
  }

  __device__ static void fill(char* target, uint32_t packed32) {
    Pack<T, V> pack;
#pragma unroll
    for (uint32_t& each : pack.packed32) each = packed32;
    store<T, V>(reinterpret_cast<T*>(target), pack);
  }

  __device__ void fill_row(const Tiling& tiling, int r, uint32_t packed32) const {
    const int offset = stage(tiling, r);
    fill(own + offset, packed32);
    if (has_second) fill(second + offset, packed32);
    if (halo_left) fill(left + offset, packed32);
    if (halo_right) fill(right + offset, packed32);
  }

  // Starts the copies of row r, or fills it where it lies outside the image.
  __device__ void fetch(const Tiling& tiling, const Place& place, int r, uint32_t packed32) {
    if (r < loads) {
      copy_row(tiling, r, source);
      source += tiling.row;
    } else if (r == place.rows && r > 0) {
      fill_row(tiling, r, packed32);
    }
    if (source_other && r < place.rows) {
      copy_async(other + stage(tiling, r), source_other, true);
      if (has_second) copy_async(other_second + stage(tiling, r), source_other + tiling.column, true);
      source_other += tiling.row;
    }
    copy_commit();
  }

  __device__ void surround(const Tiling& tiling, const Place& place, uint32_t packed32) const {
    if (threadIdx.x == 0)
      for (int r = -1; r < kStages - 1; ++r) fill(outside + stage(tiling, r), packed32);
    if (loads == 0) return;
    if (place.top == 0) fill_row(tiling, -1, packed32);
    if (loads <= place.rows && place.rows < kStages - 1) fill_row(tiling, place.rows, packed32);
  }

  __device__ static Pack<T, V> read(const char* memory) { return load<T, V>(reinterpret_cast<const T*>(memory)); }

  __device__ R row(const Tiling& tiling, int r) const {
    const int offset = stage(tiling, r);
    return {{read(own + offset), read(second + offset)}, read(left + offset), read(right + offset)};
  }

  // To be called by the whole block, which meets at barriers: threads that have no rows, or no more, take part.
  template <class Sums, class Visit>
  __device__ void for_each_row(const Tiling& tiling, const Place& place, uint32_t packed32, const Sums& sums,
                               const Visit& visit) {
    copy_wait<kStages - 2>();
    __syncthreads();
    RollingSums<R> rolling;
    float above[R::N], top[R::N];
    sums(row(tiling, -1), -1, above);
    sums(row(tiling, 0), 0, top);
    rolling.start(above, top);
#pragma unroll 2
    for (int r = 0; r < tiling.rows; ++r) {
      copy_wait<kStages - 3>();  // row r + 1 is there
      __syncthreads();           // for every thread, and nobody reads row r - 1 any longer
      fetch(tiling, place, r + kStages - 1, packed32);
      float below[R::N], total[R::N];
      sums(row(tiling, r + 1), r + 1, below);
      rolling.next(below, total);
      if (r >= place.rows) continue;
      const int here = stage(tiling, r);
      const RowElements<T, V, false> centre = {read(own + here), read(second + here)};
      RowElements<T, V, false> others;
      if (source_other) others = {read(other + here), read(other_second + here)};
      visit(r, centre, others, total);
    }
  }
};

// The most threads of a block. With loads of 16 bytes a tile has no more shares than this.
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

// The kinds of a thread's columns, by which window sizes differ: two columns have a kind each; of V columns of one
// channel, the first is of kind 0, the last of kind 2 and all others, which never touch the border, of kind 1.
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

// How many of the three positions around i lie inside [0, size), and the inverse of that count.
__device__ inline float window_count_3(int i, int size) { return 1.0f + (i > 0) + (i + 1 < size); }
__device__ inline float inverse_count(float count) { return count == 3.0f ? 1.0f / 3.0f : count == 2.0f ? 0.5f : 1.0f; }

// The number of elements in the window of each of a thread's columns, row by row of its strip.
template <class R>
struct WindowSizes {
  float width_count[kKinds<R>], size[kKinds<R>];
  float height_count;
  int grow, shrink;  // rows of the strip from which on the window is 3 and 2 rows high, or -1

  __device__ WindowSizes(const Tiling& tiling, const Place& place) {
#pragma unroll
    for (int kind = 0; kind < kKinds<R>; ++kind)
      width_count[kind] = window_count_3(place.w + column_of<R>(kind), tiling.width);
    set(window_count_3(place.top, tiling.height));
    grow = tiling.height > 2 && place.top == 0 ? 1 : -1;
    shrink = tiling.height > 2 && place.top < tiling.height - 1 ? tiling.height - 1 - place.top : -1;
  }
  __device__ void set(float now) {
    height_count = now;
#pragma unroll
    for (int kind = 0; kind < kKinds<R>; ++kind) size[kind] = width_count[kind] * now;
  }
  // Moves on to row r; true where the sizes differ from those of the row before.
  __device__ bool at_row(int r) {
    if (r != grow && r != shrink) return false;
    set(r == grow ? 3.0f : 2.0f);
    return true;
  }
  __device__ float inverse(int kind) const { return inverse_count(width_count[kind]) * inverse_count(height_count); }
};

}  // namespace
}  // namespace pk
