#include "isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cctype>
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
#if defined(PK_EMULATE_TILES)
  return true;  // product/amx.h has arrays in their place
#elif defined(__linux__)
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

static std::string joined(const std::vector<Isa>& levels) {
  std::string out;
  for (Isa isa : levels) out += (out.empty() ? "" : ", ") + std::string(isa_name(isa));
  return out;
}

// POOLFORMER_KERNELS_ISA in lower case; empty where it is not set.
static std::string forced_name() {
  const char* given = std::getenv("POOLFORMER_KERNELS_ISA");
  std::string name = given == nullptr ? "" : given;
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

static Isa choose() {
  const auto levels = isa_supported();
  const std::string forced = forced_name();
  if (forced.empty()) return levels.back();
  for (Isa isa : levels)
    if (forced == isa_name(isa)) return isa;
  const std::string given = "POOLFORMER_KERNELS_ISA is '" + std::string(std::getenv("POOLFORMER_KERNELS_ISA")) + "'";
  for (Isa isa : isa_compiled())
    if (forced == isa_name(isa))
      throw std::runtime_error(given + ", which this processor does not run; allowed here: " + joined(levels));
  throw std::runtime_error(given + "; allowed: " + joined(isa_compiled()) + "; of these this processor runs " +
                           joined(levels));
}

Isa isa_chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace pk
