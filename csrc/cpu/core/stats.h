// The statistics kernel: an operator starts with it where it is not given its input's statistics.
#pragma once

#include <cstdint>

#include "../tuning.h"

namespace pk {

// Writes (count, mean, M2) of chunks first .. last - 1 of a sample to partials[chunk][3]. The sample is one contiguous
// run of `size` elements in both layouts.
using StatsKernel = void (*)(const void* sample, int64_t size, int64_t first, int64_t last, float* partials);

}  // namespace pk
