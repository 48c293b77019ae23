// The statistics kernel every operator starts with where it is not given its input's.
#pragma once

#include <cstdint>

namespace pk {

constexpr int64_t kStatsChunk = 8192;  // elements of one partial

// Partials (count, mean, M2) of chunks first .. last - 1 of a sample of `size` elements, one contiguous run in both
// layouts; partials + 3 * chunk is written.
using StatsKernel = void (*)(const void* sample, int64_t size, int64_t first, int64_t last, float* partials);

}  // namespace pk
