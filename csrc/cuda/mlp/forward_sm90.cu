// The launcher of the MLP's forward for Hopper.
#include "forward_sm90.cuh"

#include "../core/launch.cuh"
#include "forward_sm90.h"

#if defined(PK_EXECUTOR)
#define PK_HAS_SM90A 1
#elif !defined(PK_HAS_SM90A)  // setup.py defines it where 9.0a is among the architectures
#define PK_HAS_SM90A 0
#endif

namespace pk {
namespace {

template <class T, int C>
bool launch(const MlpParams& p, const Tensor& w1, const Tensor& w2, int32_t dtype, const Launcher& launcher) {
  using Config = MlpFwdSm90Config<C>;
  if (!Config::fits(p.hidden)) return false;
  const Tensor dense1 = aligned(w1, false), dense2 = aligned(w2, false);
  Tensor images = empty_on(w1, {int64_t{2} * p.hidden * C}, {1}, dtype);
  const int64_t units = int64_t{2} * p.hidden * C / 8;
  launcher.launch(
      "mlp_pack", mlp_pack<T, C>, (units + 255) / 256, 256,
      MlpPackParams{dense1.data_ptr(), dense2.data_ptr(), images.mutable_data_ptr(), p.hidden, dtype_of(w1) != dtype});
  const int64_t tiles = (p.tokens + kUnit - 1) / kUnit, rounds = (tiles + Config::kGroups - 1) / Config::kGroups;
  const int64_t blocks = std::min<int64_t>(rounds, launcher.attribute(cudaDevAttrMultiProcessorCount));
  launcher.launch("mlp_fwd_sm90", mlp_fwd_sm90<T, C>, blocks, Config::kThreads,
                  MlpSm90Params{p, images.data_ptr(), tiles}, Config::shared(p.hidden));
  return true;
}

template <class T>
bool run(const MlpParams& p, int channels, const Tensor& w1, const Tensor& w2, int32_t dtype,
         const Launcher& launcher) {
  switch (channels) {
    case 64: return launch<T, 64>(p, w1, w2, dtype, launcher);
    case 96: return launch<T, 96>(p, w1, w2, dtype, launcher);
    case 128: return launch<T, 128>(p, w1, w2, dtype, launcher);
    case 192: return launch<T, 192>(p, w1, w2, dtype, launcher);
    default: return false;
  }
}

template <int C>
void list() {
  list_kernels<mlp_fwd_sm90<bf16, C>, mlp_fwd_sm90<f16, C>>(MlpFwdSm90Config<C>::kThreads,
                                                            MlpFwdSm90Config<C>::shared(4 * C));
  list_kernels<mlp_pack<bf16, C>, mlp_pack<f16, C>>(256);
}

}  // namespace

void list_mlp_sm90() {
  list<64>();
  list<96>();
  list<128>();
  list<192>();
}

bool run_mlp_sm90(const MlpParams& p, int64_t channels, const Tensor& w1, const Tensor& w2, int32_t dtype) {
  const Launcher launcher(w1);
  if (!PK_HAS_SM90A || p.activation != Activation::gelu || p.saved != nullptr || p.tokens == 0) return false;
  if (launcher.attribute(cudaDevAttrComputeCapabilityMajor) != 9 ||
      launcher.attribute(cudaDevAttrComputeCapabilityMinor) != 0)
    return false;
  const int c = static_cast<int>(channels);
  return dtype == aoti_torch_dtype_bfloat16() ? run<bf16>(p, c, w1, w2, dtype, launcher)
                                              : run<f16>(p, c, w1, w2, dtype, launcher);
}

}  // namespace pk
