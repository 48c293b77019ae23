// A weight matrix as the kernels read it, in place.
#pragma once

#include <cstdint>

namespace pk {

// Rows of one product at any level, at most, and of a work item that is a number of rows.
constexpr int64_t kRowsMax = 32;

struct Weight {
  const void* data;  // [rows, cols], rows `step` elements apart
  int64_t step;
  int dtype;  // 0 float32, 1 bfloat16, 2 float16
};

}  // namespace pk
