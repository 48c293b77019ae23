// The instruction-set levels the CPU kernels are compiled for; one is chosen when the extension is loaded.
#pragma once

#include <string>
#include <vector>

namespace pk {

enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };

const char* isa_name(Isa isa);
std::vector<Isa> isa_compiled();
std::vector<Isa> isa_supported();  // compiled, and this CPU and its operating system run it
// The best supported level, or the one POOLFORMER_KERNELS_ISA names. Throws std::runtime_error where it can't be met.
Isa isa_chosen();

}  // namespace pk
