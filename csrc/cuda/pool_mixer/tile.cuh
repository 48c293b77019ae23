// What the token mixer's kernels share: how a sample is cut into tiles, and a thread's elements of a row.
//
// A sample is cut into strips of rows and these into cells: 8 channels x 2 columns in channels_last, 1 channel x 8
// columns in NCHW. A block has a tile of `tile_columns` x `tile_groups` cells for every dtype; the dtype decides how
// wide a thread's loads are. Small batches are cut into more tiles than large ones (`tiling_of`). The output does not
// depend on that; of the statistics handed on, the last bits do.
#pragma once

#include "../core/device.cuh"

namespace pk {
namespace {

constexpr int kStripRows = 7;  // divides the heights of PoolFormer's stages at 224 x 224
constexpr int kTileCells = 128;
constexpr int kCellElements = 8;  // of a cell, along the layout's innermost axis
constexpr int kTileElements = kTileCells * kCellElements;

// Division of numbers below 2^31 by a constant known at the launch: a product and a shift.
struct Divisor {
  uint32_t value = 1, factor = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t by) : value(static_cast<uint32_t>(by)) {
    while ((int64_t{1} << shift) < by) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + value - 1) / value);
  }
  __device__ int divide(int n) const {
    return value == 1 ? n : static_cast<int>(static_cast<uint64_t>(n) * factor >> 32 >> (shift - 1));
  }
};

// How the samples of a call are cut. Cells are counted along two axes: `columns` are the cells of a channel (all
// strips, each across the width), `groups` the cells along the channels.
struct Tiling {
  int channels, height, width;  // of x
  int pool;                     // the window is pool x pool
  int rows;                     // of a strip; the last one may have fewer
  int strips;                   // of a sample
  Divisor width_cells;          // cells across the width
  int columns;                  // cells of a channel: strips * width_cells
  int groups;                   // cells along the channels
  int tile_columns;             // cells of a tile along `columns`
  int tile_groups;              // cells of a tile along `groups`
  int column_tiles;             // tiles of a sample along `columns`
  Divisor group_tiles;          // tiles of a sample along `groups`
  Divisor tiles;                // tiles of a sample
  Divisor split;                // shares of a cell, a thread's work, along the innermost axis of memory
  Divisor fast;                 // shares of a tile along the innermost axis of memory
  int items;                    // shares of a tile
  int pitch;                    // bytes of a row of the tile, with what surrounds it, in shared memory (SharedWalk)
  bool channels_last;           // the layout of x and of the output
  int64_t row, column, channel, sample;  // strides of x and of the output, in elements
};

// Symbols as in docs/algebra.md, "Token mixer". Images are [B, C, H, W] of T, in the layout that `tiling` describes.
struct PoolMixerParams {
  Tiling tiling;
  const void* x;        // images: the input
  const void* grad;     // images: dL/dy, for the backward
  void* out;            // images: y in the forward, dx in the backward
  const float* stats;   // [B, partials, 3]: count, mean and M2 of parts of x, for the forward
  int64_t partials;     // of a sample
  float* mean_rstd;     // [B, 2]: of each sample of x; written by the forward, read by the backward
  float* y_stats;       // [B, slots, 3]: count, mean and M2 of y by tiles, or null
  int64_t slots;        // of a sample, no fewer than its tiles; those left over count nothing
  Vector weight;        // [C]: GroupNorm's
  Vector bias;          // [C]: GroupNorm's, which cancels unless it is infinite or NaN
  Vector layer_scale;   // [C]
  Vector drop_scale;    // [B]
  float* q_partials;    // [B, column_tiles, C]: q / rstd, by tiles
  float* q;             // [B, C]
  float* k;             // [B]
  float* dweight;       // [C]
  float* dlayer_scale;  // [C]
  float* ddrop_scale;   // [B]
  int64_t batch;        // B
  float eps;            // GroupNorm's
  bool residual;        // whether y includes x
};

// ---- where a thread is

// The tile of a block.
struct Tile {
  int64_t b;   // its sample
  int tile;    // its number in the sample
  int column;  // its first cell along `columns`
  int group;   // its first cell along `groups`
};

__device__ inline Tile tile_at(const Tiling& tiling, unsigned block) {
  const int b = tiling.tiles.divide(block), tile = block - b * tiling.tiles.value;
  const int column = tiling.group_tiles.divide(tile), group = tile - column * tiling.group_tiles.value;
  return {b, tile, column * tiling.tile_columns, group * tiling.tile_groups};
}

// A thread's share of a tile: its first element, and the rows from there on.
struct Place {
  int channel, w, top;
  int rows;        // 0: nothing to do
  int64_t offset;  // of the first element, in the tensor
};

// Where share `item` of a tile is, CO columns by `width` channels.
template <int CO>
__device__ inline Place place_of(const Tiling& tiling, const Tile& t, int item, int width) {
  const int slow = tiling.fast.divide(item), fast = item - slow * tiling.fast.value;
  const int cell = tiling.split.divide(fast), part = fast - cell * tiling.split.value;
  Place place;
  int column;
  if (tiling.channels_last) {
    place.channel = (t.group + cell) * kCellElements + part * width;
    column = t.column + slow;
  } else {
    place.channel = t.group + slow;
    column = t.column + cell;
  }
  const int strip = tiling.width_cells.divide(column), cell_w = column - strip * tiling.width_cells.value;
  place.w = tiling.channels_last ? cell_w * CO : cell_w * kCellElements + part * CO;
  place.top = strip * tiling.rows;
  const bool exists =
      item < tiling.items && strip < tiling.strips && place.w < tiling.width && place.channel < tiling.channels;
  place.rows = exists ? min(tiling.rows, tiling.height - place.top) : 0;
  place.offset =
      t.b * tiling.sample + place.top * tiling.row + place.w * tiling.column + place.channel * tiling.channel;
  return place;
}

// How many channels a tile has, and the first of them.
__device__ inline int channels_of(const Tiling& tiling, const Tile& t, int& first) {
  const int each = tiling.channels_last ? kCellElements : 1;
  first = t.group * each;
  return min(tiling.tile_groups * each, tiling.channels - first);
}

// ---- a thread's part of a row: V channels x 2 columns, or (ALONG, NCHW) V columns of one channel

template <class T, int V, bool ALONG>
struct RowElements {
  static constexpr int CH = ALONG ? 1 : V, CO = ALONG ? V : 2, N = CH * CO;
  Pack<T, V> pack[ALONG ? 1 : 2];

  // Element i of column j.
  __device__ float value(int j, int i) const { return ALONG ? element(pack[0], j) : element(pack[ALONG ? 0 : j], i); }
  __device__ void load_from(const T* source, int64_t column, bool second) {
    pack[0] = load<T, V>(source);
    if constexpr (!ALONG)
      if (second) pack[1] = load<T, V>(source + column);
  }
};

// A thread's elements of a row and its neighbours left and right. Positions outside the image keep what `fill` and
// `fill_sides` wrote: loads leave them alone.
template <class T, int V, bool ALONG>
struct Row {
  using Elements = RowElements<T, V, ALONG>;
  static constexpr int CH = Elements::CH, CO = Elements::CO, N = Elements::N;
  Elements own;
  Pack<T, ALONG ? 1 : V> left, right;

  // Column j, -1 to CO.
  __device__ float value(int j, int i) const {
    return j < 0 ? element(left, i) : j < CO ? own.value(j, i) : element(right, i);
  }
  __device__ void fill(uint32_t packed32) {
#pragma unroll
    for (auto& pack : own.pack)
#pragma unroll
      for (uint32_t& each : pack.packed32) each = packed32;
    fill_sides(packed32, true, true);
  }
  __device__ void fill_sides(uint32_t packed32, bool at_left, bool at_right) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof left.packed32 / 4); ++i) {
      if (at_left) left.packed32[i] = packed32;
      if (at_right) right.packed32[i] = packed32;
    }
  }
};

// Which columns around a thread's first one lie inside the image.
struct Columns {
  bool left, second, right;
  int64_t stride;

  template <class R>
  __device__ static Columns existing(const Tiling& tiling, int w) {
    return {w > 0, w + 1 < tiling.width, w + R::CO < tiling.width, tiling.column};
  }
  template <class T, int V, bool ALONG>
  __device__ void load_row(Row<T, V, ALONG>& row, const T* source) const {
    constexpr int kSide = ALONG ? 1 : V;
    if (left) row.left = load<T, kSide>(source - stride);
    row.own.load_from(source, stride, second);
    if (right) row.right = load<T, kSide>(source + Row<T, V, ALONG>::CO * stride);
  }
  template <class T, int V, bool ALONG>
  __device__ void fill_missing(Row<T, V, ALONG>& row, uint32_t packed32) const {
    row.fill_sides(packed32, !left, !right);
    if constexpr (!ALONG) {
#pragma unroll
      for (uint32_t& each : row.own.pack[1].packed32)
        if (!second) each = packed32;
    }
  }
};

// Writes weight * layer_scale of the tile's channels to shared memory; a barrier must follow. The gain is NaN where the
// weight or the bias is infinite, because there the definition subtracts infinities.
__device__ inline void gains(const PoolMixerParams& p, const Tile& t, float* gain) {
  int first;
  const int n = channels_of(p.tiling, t, first);
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float gamma = p.weight.at(first + i, 1.0f), poison = gamma + p.bias.at(first + i, 0.0f);
    gain[i] = (gamma + 0.0f * poison) * p.layer_scale.at(first + i, 1.0f);
  }
}

// The gains of a thread's channels, from what `gains` wrote.
template <int CH>
__device__ inline void gains_at(const float* shared, int local, float (&out)[CH]) {
  constexpr int kEach = CH % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < CH; i += kEach) {
    const Pack<float, kEach> some = load<float, kEach>(shared + local + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) out[i + j] = element(some, j);
  }
}

}  // namespace
}  // namespace pk
