// A weight matrix as the kernels read it.
#pragma once

#include <cstdint>

namespace pk {

constexpr int64_t kRowsMax = 32;  // rows of one product at any level, and of a work item

struct Weight {
  const void* data;  // [rows, cols], rows `step` elements apart
  int64_t step;
  int dtype;  // 0 float32, 1 bfloat16, 2 float16
};

}  // namespace pk
