// Border counts of the pool, for host and device. Internal linkage: each instruction-set level keeps its own copy.
#pragma once

#include <stdint.h>

#include "host_device.h"

namespace pk {

// How many of the pool's taps around position i fall inside [0, size): the divisor of count_include_pad=False.
PK_HOST_DEVICE static inline int64_t window_count(int64_t i, int64_t size, int64_t pool) {
  const int64_t half = pool / 2;
  const int64_t first = i > half ? i - half : 0, last = i + half < size - 1 ? i + half : size - 1;
  return last - first + 1;
}

}  // namespace pk
