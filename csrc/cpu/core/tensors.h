// Tensors of the stable ABI and scratch memory, for the launchers of the CPU operators.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "../../common/chan.h"
#include "../../common/tensors.h"
#include "../tuning.h"
#include "operators.h"
#include "scratch.h"
#include "../product/weight.h"

namespace pk {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kLanesMax = 16;  // floats of a vector at any level

inline Tensor empty(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.begin(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Images images_of(const Tensor& x, bool channels_last) {
  return {x.data_ptr(), x.size(0), x.size(1), x.size(2), x.size(3), channels_last, x.scalar_type()};
}

// The statistics given to an operator, as dense memory; `kept` owns it where a copy is needed.
inline Partials partials_of(const OptionalTensor& stats, const char* name, int64_t batch, Tensor& kept) {
  if (!stats.has_value()) return {};
  kept = in_layout(*stats, false);
  STD_TORCH_CHECK(kept.is_cpu() && kept.scalar_type() == ScalarType::Float && kept.dim() == 3 &&
                      kept.size(0) == batch && kept.size(2) == 3,
                  name, ": stats must be a float32 CPU tensor of shape [B, T, 3]");
  return {static_cast<const float*>(kept.data_ptr()), kept.size(1)};
}

inline float to_float(float value) { return value; }
inline float to_float(Half value) { return static_cast<float>(value); }
inline float to_float(BFloat16 value) {  // written out so that the compiler vectorises loops over it
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <class T>
void copy_floats(const Tensor& t, float* out, int64_t n) {
  const T* data = static_cast<const T*>(t.data_ptr());
  const int64_t stride = t.stride(0);
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(data[i]);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(data[i * stride]);
}

// Writes the parameter's n values to `out`, or `absent` n times where it is None.
inline void read_vector(const OptionalTensor& t, const char* name, float* out, int64_t n, float absent) {
  if (!t.has_value()) {
    std::fill(out, out + n, absent);
    return;
  }
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == n, "poolformer_kernels: ", name,
                  " must be a CPU tensor of ", n, " elements");
  switch (t->scalar_type()) {
    case ScalarType::Float: return copy_floats<float>(*t, out, n);
    case ScalarType::BFloat16: return copy_floats<BFloat16>(*t, out, n);
    case ScalarType::Half: return copy_floats<Half>(*t, out, n);
    default: STD_TORCH_CHECK(false, "poolformer_kernels: ", name, " must be float32, bfloat16 or float16");
  }
}

// ---- scratch memory: a buffer grows to the largest call of its thread and is kept

// The first address of a cache line in `buffer`, with room for n floats and a vector more.
inline float* grown(std::vector<float>& buffer, int64_t n) {
  if (static_cast<int64_t>(buffer.size()) < n + kLanesMax) buffer.resize(n + kLanesMax);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// Where the tables of one call lie, n words of 32 bits: a buffer of the calling thread.
inline float* call_scratch(int64_t n) {
  thread_local std::vector<float> buffer;
  return grown(buffer, n);
}

// Asks for huge pages where [p, p + bytes) has whole ones. With small pages, passes over a megabyte or more wait for
// the translation of addresses, most of all on a virtual machine.
constexpr int64_t kHugePage = 2 << 20;
inline void advise_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Memory whose contents nobody needs when it grows, on huge pages where it is large.
class ScratchMemory {
 public:
  ScratchMemory() = default;
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;
  ~ScratchMemory() { std::free(data_); }

  // Room for n words, which begins with a cache line.
  uint32_t* words(int64_t n) {
    const int64_t bytes = n * sizeof(uint32_t), unit = bytes < kHugePage / 2 ? 4096 : kHugePage;
    if (bytes <= size_) return data_;
    std::free(data_);
    size_ = 0;
    const int64_t size = (bytes + unit - 1) / unit * unit;
    data_ = static_cast<uint32_t*>(std::aligned_alloc(unit, size));
    if (!data_) throw std::bad_alloc();
    size_ = size;
    advise_huge_pages(data_, size);
    return data_;
  }

 private:
  uint32_t* data_ = nullptr;
  int64_t size_ = 0;  // bytes
};

// Where a kernel works that one of torch's threads runs, n words of 32 bits.
inline uint32_t* worker_scratch(int64_t n) {
  thread_local ScratchMemory memory;
  return memory.words(n + kLanesMax);
}

// Calls f(i) for the items 0 .. count - 1, at least `grain` of them on a thread. A thread works off its own share
// first, as with parallel_for, and then takes what is left of the others': items are few and their times differ.
template <class F>
void each_item(int64_t count, int64_t grain, const F& f) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (count + grain - 1) / grain);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) shares[t].next = t * count / threads, shares[t].end = (t + 1) * count / threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t k = 0; k < threads; ++k) {
        Share& share = shares[(t + k) % threads];
        for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) f(i);
      }
  });
}

// Floats of a vector of n parameters with the zeros behind it: kernels read kRowsMax elements at a time.
inline int64_t padded(int64_t n) { return (n + kRowsMax + 15) / 16 * 16; }

inline float* padded_vector(ScratchArena& arena, const OptionalTensor& t, const char* name, int64_t n, float absent) {
  float* out = arena.floats(padded(n));
  read_vector(t, name, out, n, absent);
  std::fill(out + n, out + padded(n), 0.0f);
  return out;
}

inline Moments<double> merged(const float* partials, int64_t n) {
  Moments<double> m;
  for (int64_t i = 0; i < n; ++i) m.merge(partials[3 * i], partials[3 * i + 1], partials[3 * i + 2]);
  return m;
}

// Writes each sample's statistics (count, mean, M2) to out [B, 3]. `moments` [groups, tokens, 2] has the mean and M2 of
// every token's channels, `group` channels in each group but the last.
inline void merge_tokens(const float* moments, int64_t batch, int64_t pixels, int64_t channels, int64_t group,
                         float* out) {
  torch::stable::parallel_for(0, batch, 1 + kGrainTokens / pixels, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const double shift = moments[2 * b * pixels];  // some token's mean, so that a large mean costs no digits below
      double sum = 0, squares = 0, m2 = 0;
      for (int64_t c = 0; c < channels; c += group) {
        const float* at = moments + 2 * (c / group * batch + b) * pixels;
        double means = 0, spread = 0, within = 0;
        for (int64_t t = 0; t < pixels; ++t) {
          const double mean = at[2 * t] - shift;
          means += mean;
          spread += mean * mean;
          within += at[2 * t + 1];
        }
        const double n = std::min(group, channels - c);
        sum += n * means;
        squares += n * spread;
        m2 += within;
      }
      const double count = double(pixels) * channels, mean = shift + sum / count;
      const double rest = squares - sum * (sum / count);
      m2 += rest < 0 ? 0 : rest;  // a NaN is not less than 0, so it stays
      out[3 * b] = count;
      out[3 * b + 1] = mean;
      out[3 * b + 2] = m2;
    }
  });
}

// The same from `partials` [batch, n, 3] of (count, mean, M2).
inline void merge_runs(const float* partials, int64_t batch, int64_t n, float* out) {
  torch::stable::parallel_for(0, batch, 1 + kGrainTokens / n, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float* const first = partials + 3 * b * n;
      const double shift = first[1];  // some mean, so that a large one costs no digits below
      double count = 0, sum = 0, m2 = 0;
      for (const float* at = first; at < first + 3 * n; at += 3) {
        const double mean = at[1] - shift;
        count += at[0];
        sum += at[0] * mean;
        m2 += at[2] + at[0] * mean * mean;
      }
      m2 -= sum * (sum / count);
      out[3 * b] = count;
      out[3 * b + 1] = shift + sum / count;
      out[3 * b + 2] = m2 < 0 ? 0 : m2;  // a NaN is not less than 0, so it stays
    }
  });
}

}  // namespace
}  // namespace pk
