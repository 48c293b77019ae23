#include "isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>

namespace pk {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

std::vector<Isa> isa_compiled() {
#if defined(__x86_64__)
  return {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};
#else
  return {Isa::baseline};
#endif
}

#if defined(__x86_64__)
// AMX with bfloat16: the processor has it, and Linux grants this process the tile registers, which it does on request.
static bool amx_granted() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kAmxBf16 | kAmxTile))) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

static bool supported(Isa isa) {
#if defined(__x86_64__)
  // __builtin_cpu_supports reads cpuid and xgetbv, so a kernel that does not save the registers counts as no.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::avx512) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx512_bf16) return bf16;
  if (isa == Isa::amx) return bf16 && amx_granted();
#endif
  return isa == Isa::baseline;
}

std::vector<Isa> isa_supported() {
  std::vector<Isa> levels;
  for (Isa isa : isa_compiled())
    if (supported(isa)) levels.push_back(isa);
  return levels;
}

static Isa choose() {
  const auto levels = isa_supported();
  const char* forced = std::getenv("POOLFORMER_KERNELS_ISA");
  if (forced == nullptr || *forced == '\0') return levels.back();
  std::string allowed;
  for (Isa isa : levels) {
    if (forced == std::string(isa_name(isa))) return isa;
    allowed += (allowed.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::runtime_error("POOLFORMER_KERNELS_ISA is '" + std::string(forced) + "'; this machine runs: " + allowed);
}

Isa isa_chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace pk
