// The token mixer's operators on CUDA: checks, output tensors, launches.
#include <tuple>

#include "../core/launch.cuh"
#include "any_pool.cuh"

namespace pk {
namespace {

constexpr int kStaticShared = 6 * 1024;  // bytes: no kernel here has more static shared memory

int ceil_div(int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); }

// Rows of a strip. A strip also reads the rows above and below it, so that long strips read less; short strips make
// more blocks. The statistics have room for the partials of `finest_rows`: poolformer_kernels.backends.cuda.stats_tiles
// has the same arithmetic.
int coarsest_rows(int64_t height) { return height < 4 * kStripRows ? kStripRows : 2 * kStripRows; }
int finest_rows(int64_t height) { return height < 64 ? 2 : height < 160 ? 4 : 2 * kStripRows; }

// A tiling whose strips have at most `rows` rows.
Tiling tiling_of(const Tensor& x, bool channels_last, int64_t pool, int rows) {
  Tiling tiling{};
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3), most = (int64_t{1} << 31) - 1;
  STD_TORCH_CHECK(c <= most && h <= most && w <= most && ceil_div(h, 2) * (w + 1) <= most,
                  "pool_mixer_cuda: images of ", c, " x ", h, " x ", w, " are too large");
  tiling.channels = static_cast<int>(c), tiling.height = static_cast<int>(h), tiling.width = static_cast<int>(w);
  tiling.pool = static_cast<int>(std::min(pool, 2 * std::max(h, w) - 1));  // a wider one covers nothing more
  tiling.channels_last = channels_last;
  tiling.strips = ceil_div(h, rows);
  tiling.rows = ceil_div(h, tiling.strips);
  tiling.width_cells = Divisor(ceil_div(w, channels_last ? 2 : kCellElements));
  tiling.columns = tiling.strips * static_cast<int>(tiling.width_cells.value);
  tiling.groups = ceil_div(c, channels_last ? kCellElements : 1);
  if (channels_last) {
    tiling.tile_groups = ceil_div(tiling.groups, ceil_div(tiling.groups, kTileCells));
    tiling.tile_columns = kTileCells / tiling.tile_groups;
  } else {
    tiling.tile_columns = std::min(tiling.columns, kTileCells);
    tiling.tile_groups = kTileCells / tiling.tile_columns;
  }
  tiling.column_tiles = ceil_div(tiling.columns, tiling.tile_columns);
  tiling.group_tiles = Divisor(ceil_div(tiling.groups, tiling.tile_groups));
  tiling.tiles = Divisor(int64_t{tiling.column_tiles} * tiling.group_tiles.value);
  tiling.row = channels_last ? w * c : w;
  tiling.column = channels_last ? c : 1;
  tiling.channel = channels_last ? 1 : h * w;
  tiling.sample = c * h * w;
  return tiling;
}

// The tiling with the longest strips that still give every multiprocessor two blocks, else with the shortest. `slots`
// becomes the number of tiles that the shortest strips give.
Tiling tiling_of(const Tensor& x, bool channels_last, int64_t pool, const Launcher& launcher, int64_t* slots) {
  const int finest = finest_rows(x.size(2)), wanted = 2 * launcher.attribute(cudaDevAttrMultiProcessorCount);
  Tiling fine = tiling_of(x, channels_last, pool, finest);
  *slots = fine.tiles.value;
  for (int rows = coarsest_rows(x.size(2)); rows > finest; rows /= 2) {
    const Tiling coarse = tiling_of(x, channels_last, pool, rows);
    if (x.size(0) * coarse.tiles.value >= wanted) return coarse;
  }
  return fine;
}

// How a thread loads: single elements, 16 bytes of channels, 8 or 4 elements along the width.
enum class Width { scalar, channels, along8, along4 };

Width width_of(const Tiling& tiling, int bytes, std::initializer_list<const void*> tensors) {
  const int whole = 16 / bytes;
  uintptr_t all = 0;
  for (const void* each : tensors) all |= reinterpret_cast<uintptr_t>(each);
  if (tiling.pool != 3) return Width::scalar;
  if (tiling.channels_last) return tiling.channels % whole == 0 && all % 16 == 0 ? Width::channels : Width::scalar;
  if (whole == 8 && tiling.width % 8 == 0 && all % 16 == 0) return Width::along8;
  return tiling.width % 4 == 0 && all % (4 * bytes) == 0 ? Width::along4 : Width::scalar;
}

using Kernel = void (*)(PoolMixerParams);

// A kernel for pools of 3 at each width, and the one for other pools.
struct Kernels {
  const char* name;
  Kernel any, scalar, channels, along8, along4;
};

template <class T>
struct KernelsFor {
  static constexpr int kWhole = 16 / sizeof(T);
  static constexpr Kernels forward = {"pool_mixer_fwd",
                                      pool_mixer_fwd_any<T>,
                                      pool_mixer_fwd<T, 1, false>,
                                      pool_mixer_fwd<T, kWhole, false>,
                                      pool_mixer_fwd<T, kWhole, true>,
                                      pool_mixer_fwd<T, 4, true>};
  static constexpr Kernels reduce = {"pool_mixer_bwd_reduce",
                                     pool_mixer_bwd_reduce_any<T>,
                                     pool_mixer_bwd_reduce<T, 1, false>,
                                     pool_mixer_bwd_reduce<T, kWhole, false>,
                                     pool_mixer_bwd_reduce<T, kWhole, true>,
                                     pool_mixer_bwd_reduce<T, 4, true>};
  static constexpr Kernels apply = {"pool_mixer_bwd_apply",
                                    pool_mixer_bwd_apply_any<T>,
                                    pool_mixer_bwd_apply<T, 1, false>,
                                    pool_mixer_bwd_apply<T, kWhole, false>,
                                    pool_mixer_bwd_apply<T, kWhole, true>,
                                    pool_mixer_bwd_apply<T, 4, true>};
};

// Launches the kernel that fits the pool and the width, a block for each tile. `tensors`: how many the kernel reads.
void launch(const Launcher& launcher, const Kernels& kernels, PoolMixerParams& p, Width width, int bytes, int tensors) {
  Tiling& tiling = p.tiling;
  const int whole = 16 / bytes;
  tiling.pitch = (2 * tiling.tile_columns * tensors + 2) * tiling.tile_groups * kCellElements * bytes + 16;
  int shared = width == Width::channels ? stages_of(tensors) * tiling.pitch : 0;
  if (shared > launcher.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticShared) {
    width = Width::scalar;  // the tile's rows do not fit: many channels on a device with little shared memory
    shared = 0;
  }
  const int share = width == Width::channels ? whole : width == Width::along8 ? 8 : width == Width::along4 ? 4 : 1;
  tiling.split = Divisor(kCellElements / (tiling.channels_last ? share : std::max(share, 2)));
  tiling.fast =
      Divisor(int64_t{tiling.split.value} * (tiling.channels_last ? tiling.tile_groups : tiling.tile_columns));
  tiling.items =
      static_cast<int>(tiling.fast.value) * (tiling.channels_last ? tiling.tile_columns : tiling.tile_groups);
  const Kernel kernel = tiling.pool != 3           ? kernels.any
                        : width == Width::channels ? kernels.channels
                        : width == Width::along8   ? kernels.along8
                        : width == Width::along4   ? kernels.along4
                                                   : kernels.scalar;
  const int threads = std::min(share == 8 ? 128 : 256, ceil_div(tiling.items, 32) * 32);
  launcher.launch(kernels.name, kernel, p.batch * tiling.tiles.value, threads, p, shared);
}

const Kernels& select_dtype(const Tensor& x, const Kernels& f32, const Kernels& b16, const Kernels& h16) {
  const int index = dtype_index(x.scalar_type());
  return index == 0 ? f32 : index == 1 ? b16 : h16;
}

void check(const Tensor& x, int64_t pool, double eps, const char* op) {
  check_images(x, op);
  STD_TORCH_CHECK(pool > 0 && pool % 2 == 1, op, ": pool_size must be odd and positive, got ", pool);
  STD_TORCH_CHECK(eps >= 0, op, ": eps must not be negative, got ", eps);
}

std::tuple<Tensor, Tensor, Tensor> pool_mixer(Tensor input, OptionalTensor weight, OptionalTensor bias,
                                              OptionalTensor layer_scale, OptionalTensor drop_scale,
                                              OptionalTensor stats, int64_t pool_size, double eps, bool residual,
                                              bool return_stats) {
  check(input, pool_size, eps, "pool_mixer_cuda");
  const Launcher launcher(input);
  const bool channels_last = is_channels_last(input);
  const Tensor x = in_layout(input, channels_last);
  const int64_t batch = x.size(0), channels = x.size(1);
  const int bytes = static_cast<int>(x.element_size());
  PoolMixerParams p{};
  p.tiling = tiling_of(x, channels_last, pool_size, launcher, &p.slots);
  Tensor y = empty_like(x, channels_last);
  Tensor mean_rstd = empty_floats(x, {batch, 2});
  Tensor y_stats = return_stats ? empty_floats(x, {batch, p.slots, 3}) : empty_floats(x, {0});
  Tensor given = stats.has_value() ? *stats : norm_stats_cuda(x);
  p.stats = partials_of(x, given, batch, given, p.partials);
  merge_many(batch, given, p.stats, p.partials);
  p.x = x.data_ptr();
  p.out = y.mutable_data_ptr();
  p.mean_rstd = floats(mean_rstd);
  p.y_stats = return_stats ? floats(y_stats) : nullptr;
  p.weight = vector_of(x, weight, "weight", channels);
  p.bias = vector_of(x, bias, "bias", channels);
  p.layer_scale = vector_of(x, layer_scale, "layer_scale", channels);
  p.drop_scale = vector_of(x, drop_scale, "drop_scale", batch);
  p.batch = batch;
  p.eps = static_cast<float>(eps);
  p.residual = residual;
  launch(launcher, select_dtype(x, KernelsFor<float>::forward, KernelsFor<bf16>::forward, KernelsFor<f16>::forward), p,
         width_of(p.tiling, bytes, {p.x, p.out}), bytes, 1);
  return {y, mean_rstd, y_stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pool_mixer_backward(Tensor grad, Tensor input, Tensor mean_rstd,
                                                               OptionalTensor weight, OptionalTensor bias,
                                                               OptionalTensor layer_scale, OptionalTensor drop_scale,
                                                               int64_t pool_size, bool residual) {
  check(input, pool_size, 0, "pool_mixer_cuda_backward");
  STD_TORCH_CHECK(is_beside(input, grad) && grad.scalar_type() == input.scalar_type() && grad.dim() == 4 &&
                      grad.size(0) == input.size(0) && grad.size(1) == input.size(1) && grad.size(2) == input.size(2) &&
                      grad.size(3) == input.size(3),
                  "pool_mixer_cuda_backward: grad must have x's device, dtype and shape");
  const Launcher launcher(input);
  const bool channels_last = is_channels_last(input);
  const Tensor x = in_layout(input, channels_last), g = in_layout(grad, channels_last);
  const Tensor saved = in_layout(mean_rstd, false);
  const int64_t batch = x.size(0), channels = x.size(1);
  const int bytes = static_cast<int>(x.element_size());
  STD_TORCH_CHECK(is_beside(x, saved) && saved.scalar_type() == ScalarType::Float && saved.dim() == 2 &&
                      saved.size(0) == batch && saved.size(1) == 2,
                  "pool_mixer_cuda_backward: mean_rstd must be a float32 CUDA tensor of shape [B, 2]");
  PoolMixerParams p{};
  p.tiling = tiling_of(x, channels_last, pool_size, coarsest_rows(x.size(2)));
  Tensor dx = empty_like(x, channels_last);
  Tensor dweight = empty_floats(x, {channels}), dlayer_scale = empty_floats(x, {channels});
  Tensor ddrop_scale = empty_floats(x, {batch});
  Tensor q_partials = empty_floats(x, {batch, p.tiling.column_tiles, channels});
  Tensor q = empty_floats(x, {batch, channels}), k = empty_floats(x, {batch});
  p.x = x.data_ptr();
  p.grad = g.data_ptr();
  p.out = dx.mutable_data_ptr();
  p.mean_rstd = static_cast<float*>(saved.data_ptr());
  p.weight = vector_of(x, weight, "weight", channels);
  p.bias = vector_of(x, bias, "bias", channels);
  p.layer_scale = vector_of(x, layer_scale, "layer_scale", channels);
  p.drop_scale = vector_of(x, drop_scale, "drop_scale", batch);
  p.q_partials = floats(q_partials);
  p.q = floats(q);
  p.k = floats(k);
  p.dweight = floats(dweight);
  p.dlayer_scale = floats(dlayer_scale);
  p.ddrop_scale = floats(ddrop_scale);
  p.batch = batch;
  p.residual = residual;
  const Width width = width_of(p.tiling, bytes, {p.x, p.grad, p.out});
  const int chunks = ceil_div(channels, kReduceChannels);
  launch(launcher, select_dtype(x, KernelsFor<float>::reduce, KernelsFor<bf16>::reduce, KernelsFor<f16>::reduce), p,
         width, bytes, 2);
  launcher.launch("pool_mixer_bwd_q", pool_mixer_bwd_q, batch * chunks, kReduceThreads, p);
  launcher.launch("pool_mixer_bwd_finish", pool_mixer_bwd_finish, batch + chunks, kReduceThreads, p);
  launch(launcher, select_dtype(x, KernelsFor<float>::apply, KernelsFor<bf16>::apply, KernelsFor<f16>::apply), p, width,
         bytes, 2);
  return {dx, dweight, dlayer_scale, ddrop_scale};
}

// The most dynamic shared memory, in bytes, that a launch asks for, over all shapes.
constexpr int most_shared(int bytes, int tensors) {
  return stages_of(tensors) * ((2 * tensors + 2) * kTileElements * bytes + 16);
}

template <class T>
void list() {
  constexpr int kWhole = 16 / sizeof(T), kBytes = sizeof(T);
  list_kernels<pool_mixer_fwd_any<T>, pool_mixer_fwd<T, 1, false>, pool_mixer_fwd<T, 4, true>,
               pool_mixer_bwd_reduce_any<T>, pool_mixer_bwd_reduce<T, 1, false>, pool_mixer_bwd_reduce<T, 4, true>,
               pool_mixer_bwd_apply_any<T>, pool_mixer_bwd_apply<T, 1, false>, pool_mixer_bwd_apply<T, 4, true>>(256);
  list_kernels<pool_mixer_fwd<T, kWhole, false>>(threads_of<T, kWhole>, most_shared(kBytes, 1));
  list_kernels<pool_mixer_bwd_reduce<T, kWhole, false>, pool_mixer_bwd_apply<T, kWhole, false>>(threads_of<T, kWhole>,
                                                                                                most_shared(kBytes, 2));
  if constexpr (kWhole == 8)
    list_kernels<pool_mixer_fwd<T, 8, true>, pool_mixer_bwd_reduce<T, 8, true>, pool_mixer_bwd_apply<T, 8, true>>(128);
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, PK_DISPATCH_KEY, m) {
  m.impl("pool_mixer_cuda", TORCH_BOX(&pk::pool_mixer));
  m.impl("pool_mixer_cuda_backward", TORCH_BOX(&pk::pool_mixer_backward));
  pk::list<float>();
  pk::list<pk::bf16>();
  pk::list<pk::f16>();
  pk::list_kernels<pk::pool_mixer_bwd_q, pk::pool_mixer_bwd_finish>(pk::kReduceThreads);
}
