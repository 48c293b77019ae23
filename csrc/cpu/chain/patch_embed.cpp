// The convolution between stages on the CPU: how torch's threads share the work.
#include "patch_embed.h"

#include <cmath>

#include "../isa/isa.h"
#include "../tuning.h"
#include "../core/tensors.h"

namespace pk {
namespace {

const PatchEmbedKernels& kernels_for(ScalarType dtype) {
  const int index = dtype_index(dtype);
#if defined(__x86_64__)
  switch (isa_chosen()) {
    case Isa::amx: return index == 1 ? patch_embed_amx[0] : patch_embed_avx512_bf16[index];
    case Isa::avx512_bf16: return patch_embed_avx512_bf16[index];
    case Isa::avx512: return patch_embed_avx512[index];
    case Isa::avx2: return patch_embed_avx2[index];
    default: break;
  }
#endif
  return patch_embed_baseline[index];
}

}  // namespace

namespace {

PatchEmbedParams params_of(const Images& x, const PatchEmbedArguments& args) {
  const Tensor& w = args.weight;
  PatchEmbedParams p{};
  p.batch = x.batch, p.channels = x.channels, p.height = x.height, p.width = x.width;
  p.out = w.size(0), p.kernel_h = kernel_size(w, 2), p.kernel_w = kernel_size(w, 3);
  p.stride = args.stride, p.padding = args.padding;
  p.out_h = embedded_size(p.height, p.kernel_h, args), p.out_w = embedded_size(p.width, p.kernel_w, args);
  p.w = {w.data_ptr(), p.patch_size(), dtype_index(x.dtype)};
  p.planar_w = w.dim() == 4 && !is_dense(w, true);
  p.tokens = p.batch * p.out_h * p.out_w;
  return p;
}

bool is_serial(const PatchEmbedParams& p) { return double(p.tokens) * p.out * p.patch_size() < kSerialWork; }

// How many ways the rows of y and its blocks of channels are shared out, one item for each thread: each item copies
// its rows' images and packs its channels' weights, so that either may be done more than once.
struct Ways {
  int64_t rows, blocks;
};
Ways ways_of(const PatchEmbedParams& p) {
  const int64_t threads = is_serial(p) ? 1 : torch::stable::get_num_threads(), rows = p.batch * p.out_h;
  Ways best{1, 1};
  double least = INFINITY;
  for (int64_t n = 1; n <= std::min(threads, rows); ++n) {
    const Ways ways{n, std::min(threads / n, p.blocks())};
    const double of_rows = double((rows + n - 1) / n) / rows;
    const double of_blocks = double((p.blocks() + ways.blocks - 1) / ways.blocks) / p.blocks();
    const double weights = double(p.out) * p.patch_size(), image = double(p.batch) * p.height * p.width * p.channels;
    const double cost =
        of_rows * of_blocks * p.tokens * weights / kEmbedCopyWork + of_blocks * weights + of_rows * image;
    if (cost < least) least = cost, best = ways;
  }
  return best;
}

void run_rows(PatchEmbedParams& p, const PatchEmbedKernels& kernels, int64_t runs, float* y_stats) {
  const int64_t rows = p.batch * p.out_h, words = kernels.rows_scratch(p);
  std::vector<float> moments(y_stats ? 3 * rows * runs * p.blocks() : 0);
  p.run_moments = y_stats ? moments.data() : nullptr;
  const Ways ways = ways_of(p);
  const int64_t items = ways.rows * ways.blocks;
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    uint32_t* const scratch = worker_scratch(words);
    if (end - begin == items) return kernels.rows(p, 0, rows, 0, p.blocks(), scratch);  // within another parallel_for
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / ways.blocks, c = i % ways.blocks;
      kernels.rows(p, r * rows / ways.rows, (r + 1) * rows / ways.rows, c * p.blocks() / ways.blocks,
                   (c + 1) * p.blocks() / ways.blocks, scratch);
    }
  });
  if (y_stats) merge_runs(p.run_moments, p.batch, p.out_h * runs * p.blocks(), y_stats);
}

}  // namespace

bool patch_embed_takes_planar(const Images& x, const PatchEmbedArguments& args) {
  const PatchEmbedKernels& kernels = kernels_for(x.dtype);
  const PatchEmbedParams p = params_of(x, args);
  return kernels.rows && p.tokens > 0 && kernels.row_runs(p) > 0;
}

void run_patch_embed(const Images& x, const PatchEmbedArguments& args, void* y, float* y_stats) {
  const PatchEmbedKernels& kernels = kernels_for(x.dtype);
  PatchEmbedParams p = params_of(x, args);
  p.x = x.data;
  p.y = y;
  if (p.tokens == 0) return;

  ScratchArena arena(call_scratch(padded(p.out)));
  p.bias = padded_vector(arena, args.bias, "a convolution's bias", p.out, 0);
  if (const int64_t runs = kernels.rows ? kernels.row_runs(p) : 0) return run_rows(p, kernels, runs, y_stats);

  // Work items are pairs of a tile of tokens and a group of w's rows. Groups are of one size, so that statistics are
  // the same for any number of threads.
  const int64_t vectors = (p.tokens + kLanesMax - 1) / kLanesMax;
  const int64_t most = std::clamp<int64_t>(kCacheBytes / (x.element_size() * p.patch_size()) / kLanesMax,
                                           kLeastEmbedVectors, kTileTokens / kLanesMax);
  p.group = kEmbedRows;
  const bool serial = is_serial(p);
  const int64_t round = most * (vectors <= most || serial ? 1 : torch::stable::get_num_threads());
  const int64_t tiles = (vectors + round - 1) / round * (round / most);
  p.lanes = (vectors + tiles - 1) / tiles * kLanesMax;
  std::vector<float> moments(y_stats ? 2 * p.tokens * p.groups() : 0);
  p.token_moments = y_stats ? moments.data() : nullptr;
  const int64_t words = kernels.scratch(p), groups = p.groups();
  torch::stable::parallel_for(0, tiles * groups, serial ? tiles * groups : 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / groups, stop = std::min(end, (i + 1) * groups);
      const int64_t first = i * vectors / tiles * kLanesMax, last = (i + 1) * vectors / tiles * kLanesMax;
      if (first < last)
        kernels.forward(p, first, std::min(last, p.tokens) - first, begin - i * groups, stop - i * groups,
                        worker_scratch(words));
      begin = stop;
    }
  });
  if (y_stats) merge_tokens(p.token_moments, p.batch, p.out_h * p.out_w, p.out, p.group, y_stats);
}

}  // namespace pk
