// Scratch memory cut into arrays, by the launchers and by the kernels of every instruction-set level.
#pragma once

#include <stdint.h>

namespace pk {
namespace {

// Hands out arrays of one buffer, one behind the other, each of whole cache lines. On a null pointer it only measures.
class ScratchArena {
 public:
  static constexpr int64_t kLine = 16;  // words of 32 bits

  explicit ScratchArena(void* buffer)
      : begin_(reinterpret_cast<uintptr_t>(buffer)), next_(reinterpret_cast<uintptr_t>(buffer)) {}

  // The words that an array of n takes.
  static int64_t whole_lines(int64_t n) { return (n + kLine - 1) / kLine * kLine; }

  uint32_t* words(int64_t n) {
    const uintptr_t array = next_;
    next_ += whole_lines(n) * sizeof(uint32_t);
    return reinterpret_cast<uint32_t*>(array);
  }
  float* floats(int64_t n) { return reinterpret_cast<float*>(words(n)); }

  int64_t taken() const { return (next_ - begin_) / sizeof(uint32_t); }  // words

 private:
  uintptr_t begin_, next_;
};

}  // namespace
}  // namespace pk
