// How many FLOPs a second the processor's multipliers do just now: a host may throttle them, and a time means little
// beside another one unless both were taken at the same rate. Nothing is computed here that anybody needs.
#pragma once

#include <cstdint>

namespace pk {

enum class Isa;  // isa/isa.h

constexpr int64_t kRateWords = 8192;  // the operands: 32 KiB, which an L1 cache holds

struct RateKernel {
  // Multiplies the same two blocks so many times, always adding to the same sums; returns what depends on the sums.
  // The operands are kRateWords random words of 32 bits, each a float or a pair of bfloat16.
  float (*run)(const uint32_t* operands, int64_t passes);
  int64_t flops;  // of a pass
};

// Products of float32 and, where a level has instructions for them, of bfloat16. amx.cpp has the latter only.
extern const RateKernel rate_baseline[1];
extern const RateKernel rate_avx2[1];
extern const RateKernel rate_avx512[1];
extern const RateKernel rate_avx512_bf16[2];
extern const RateKernel rate_amx[1];

// FLOPs a second of all of torch's threads together, which run for so many seconds at once, each by its own clock.
// Other dtypes than bfloat16 are multiplied as float32, as it is itself below avx512_bf16. `isa` must be supported.
double multiply_rate(Isa isa, bool bfloat16, double seconds);

}  // namespace pk
