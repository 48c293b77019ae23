// Border counts of the pool, for host and device. The function has internal linkage, so that each of the CPU's
// instruction-set levels keeps its own.
#pragma once

#include <stdint.h>

#include "host_device.h"

namespace pk {

// The number of positions of the pool's window around i that are inside [0, size), along one direction. The product of
// both directions' is the divisor of count_include_pad=False.
PK_HOST_DEVICE static inline int64_t window_count(int64_t i, int64_t size, int64_t pool) {
  const int64_t half = pool / 2;
  const int64_t first = i > half ? i - half : 0, last = i + half < size - 1 ? i + half : size - 1;
  return last - first + 1;
}

}  // namespace pk
