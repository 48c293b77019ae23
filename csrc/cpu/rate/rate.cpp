// The rate of the multipliers: which kernel of which level, on torch's threads.
#include "rate.h"

#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <cstring>
#include <random>
#include <vector>

#include "../isa/isa.h"

namespace pk {
namespace {

const RateKernel& kernel_of(Isa isa, bool bfloat16) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::amx: return bfloat16 ? rate_amx[0] : rate_avx512_bf16[0];
    case Isa::avx512_bf16: return rate_avx512_bf16[bfloat16];
    case Isa::avx512: return rate_avx512[0];
    case Isa::avx2: return rate_avx2[0];
    default: break;
  }
#endif
  return rate_baseline[0];
}

// Two random bfloat16 below 1 are a word, which is such a float, too. Zeros would need less power: tiles of them are
// multiplied a quarter faster where the power is the limit.
std::vector<uint32_t> random_words() {
  std::mt19937 random(0);
  std::uniform_real_distribution<float> below_one(-1, 1);
  const auto upper = [&] {
    const float value = below_one(random);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits >> 16;
  };
  std::vector<uint32_t> words(kRateWords + 16);
  for (uint32_t& word : words) word = upper() << 16 | upper();
  return words;
}

// Random words from a multiple of 64 bytes on: tiles are loaded by cache lines.
const uint32_t* operands() {
  static const std::vector<uint32_t> words = random_words();
  return words.data() + (64 - reinterpret_cast<uintptr_t>(words.data()) % 64) % 64 / 4;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// FLOPs a second of the thread that calls it.
double rate_here(const RateKernel& kernel, double seconds) {
  constexpr int64_t kPasses = 64;  // 10 to 30 us, between two looks at the clock
  const uint32_t* words = operands();
  volatile float sum = kernel.run(words, 1);  // now they are in this core's cache
  const auto start = std::chrono::steady_clock::now();
  double taken = 0;
  int64_t passes = 0;
  for (; taken < seconds; taken = seconds_since(start), passes += kPasses) sum = kernel.run(words, kPasses);
  (void)sum;
  return passes * kernel.flops / taken;
}

}  // namespace

double multiply_rate(Isa isa, bool bfloat16, double seconds) {
  const RateKernel& kernel = kernel_of(isa, bfloat16);
  std::vector<double> rates(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, rates.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) rates[t] = rate_here(kernel, seconds);
  });
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

}  // namespace pk
