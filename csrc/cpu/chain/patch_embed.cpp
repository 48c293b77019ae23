// The convolution between stages on the CPU: how torch's threads share the work.
#include "patch_embed.h"

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

void run_patch_embed(const Images& x, const PatchEmbedArguments& args, void* y, float* y_stats) {
  const PatchEmbedKernels& kernels = kernels_for(x.dtype);
  const Tensor& w = args.weight;
  PatchEmbedParams p{};
  p.x = x.data;
  p.y = y;
  p.batch = x.batch, p.channels = x.channels, p.height = x.height, p.width = x.width;
  p.out = w.size(0), p.kernel_h = kernel_size(w, 2), p.kernel_w = kernel_size(w, 3);
  p.stride = args.stride, p.padding = args.padding;
  p.out_h = embedded_size(p.height, p.kernel_h, args), p.out_w = embedded_size(p.width, p.kernel_w, args);
  p.w = {w.data_ptr(), p.patch_size(), dtype_index(x.dtype)};
  p.tokens = p.batch * p.out_h * p.out_w;
  if (p.tokens == 0) return;

  ScratchArena arena(call_scratch(padded(p.out)));
  p.bias = padded_vector(arena, args.bias, "a convolution's bias", p.out, 0);

  // Work items are pairs of a tile of tokens and a group of w's rows. Groups are of one size, so that statistics are
  // the same for any number of threads.
  const int64_t vectors = (p.tokens + kLanesMax - 1) / kLanesMax;
  const int64_t most = std::clamp<int64_t>(kCacheBytes / (x.element_size() * p.patch_size()) / kLanesMax,
                                           kLeastEmbedVectors, kTileTokens / kLanesMax);
  p.group = kEmbedRows;
  const bool serial = double(p.tokens) * p.out * p.patch_size() < kSerialWork;
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
