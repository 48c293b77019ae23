// Small kernels for test_executor.py: what the executor does with instructions, and with mistakes.
#include <string_view>

#include "../../../csrc/common/activation_math.h"
#include "../../../csrc/cuda/core/ptx.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace pk {
namespace {

template <class Params>
void launch(void (*kernel)(Params), unsigned blocks, unsigned threads, Params params, size_t shared = 0) {
  executor::run(dim3(blocks), dim3(threads), shared, [&] { kernel(params); });
}

// ---- d = a b of a warp; a is [16, 16], b is [16, 8], row by row

struct MmaParams {
  const bf16 *a, *b;
  float* d;
};

uint32_t two(bf16 low, bf16 high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }

void mma_kernel(MmaParams p) {
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  const auto a = [&](int row, int column) { return two(p.a[row * 16 + column], p.a[row * 16 + column + 1]); };
  const auto b = [&](int row) { return two(p.b[row * 8 + g], p.b[(row + 1) * 8 + g]); };
  const uint32_t left[4] = {a(g, 2 * q), a(g + 8, 2 * q), a(g, 2 * q + 8), a(g + 8, 2 * q + 8)};
  float d[4] = {};
  mma<bf16>(d, left, b(2 * q), b(2 * q + 8));
  for (int i = 0; i < 4; ++i) p.d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = d[i];
}

// ---- four matrices [8, 8] of 16 bits, row by row: lane l gets column l / 4, rows 2 (l % 4) and the next one

struct LoadParams {
  const uint16_t* matrices;
  uint32_t* out;  // [32, 4]
  int shift;      // bytes
};

void load_kernel(LoadParams p) {
  PK_SHARED(memory);
  uint16_t* const all = reinterpret_cast<uint16_t*>(memory);
  for (int i = threadIdx.x; i < 256; i += 32) all[i] = p.matrices[i];
  __syncthreads();
  uint32_t out[4];
  load_matrices_transposed(out, memory + threadIdx.x * 16 + p.shift);
  for (int m = 0; m < 4; ++m) p.out[threadIdx.x * 4 + m] = out[m];
}

// ---- d = a b of a warpgroup: a is [64, 16], b is [16, 32], row by row, 32 columns from 8 `first` on of 64

struct WgmmaParams {
  const bf16 *a, *b;  // b has 64 columns
  float* d;           // [64, 32]
  int first;
  std::string_view mistake;
};

void wgmma_kernel(WgmmaParams p) {
  PK_SHARED(memory);
  bf16* const b = reinterpret_cast<bf16*>(memory);  // [k / 8][column][k % 8]
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int i = threadIdx.x; i < 16 * 64; i += 128) b[i / 512 * 512 + i % 64 * 8 + i % 512 / 64] = p.b[i];
  __syncthreads();
  if (p.mistake == "a warp that is missing" && warp == 3) return;
  const auto a = [&](int row, int column) {
    const bf16* at = p.a + (warp * 16 + row) * 16 + column;
    return two(at[0], at[1]);
  };
  const uint32_t left[4] = {a(g, 2 * q), a(g + 8, 2 * q), a(g, 2 * q + 8), a(g + 8, 2 * q + 8)};
  uint64_t descriptor = operand_descriptor(b + p.first * 64, 64 * 16);
  if (p.mistake == "strides exchanged")
    descriptor = (descriptor & 0x3fff) | (descriptor >> 32 & 0x3fff) << 16 | (descriptor >> 16 & 0x3fff) << 32;
  if (p.mistake == "swizzling") descriptor |= uint64_t{1} << 62;
  if (p.mistake == "a base offset") descriptor |= uint64_t{1} << 49;
  if (p.mistake == "reserved bits") descriptor |= uint64_t{1} << 14;
  if (p.mistake == "bytes, not units of 16") descriptor = (descriptor & ~uint64_t{0x3fff}) | (descriptor & 0x3ff) << 4;
  if (p.mistake == "a descriptor of its own" && warp == 2) descriptor += 8;
  float d[4][4];
  if (p.mistake != "no fence") products_begin();
  if (p.mistake != "a warp without the product" || warp != 1) multiply_async<bf16, 32>(d, left, descriptor, false);
  products_commit();
  if (p.mistake == "no wait") return;
  products_wait<0>(d);
  for (int i = 0; i < 16; ++i) p.d[(warp * 16 + g + i % 4 / 2 * 8) * 32 + i / 4 * 8 + 2 * q + i % 2] = d[i / 4][i % 4];
}

// ---- 64 bytes from global to shared memory

struct CopyParams {
  const char* source;
  char* out;
  std::string_view mistake;
};

void copy_kernel(CopyParams p) {
  PK_SHARED(memory);
  uint64_t* const signal = reinterpret_cast<uint64_t*>(memory + 128);
  const auto is = [&](const char* mistake) { return p.mistake == mistake; };
  if (threadIdx.x == 0) {
    if (!is("no mbarrier")) signal_init(signal, 1);
    if (!is("no fence")) signals_ready();
    const int expected = is("more than expected") ? 48 : is("less than expected") ? 80 : 64;
    if (is("a size of 24")) {
      copy_bulk(memory, p.source, 24, signal);
    } else if (is("a source that is not aligned")) {
      copy_bulk(memory, p.source + 8, 64, signal);
    } else if (is("a target that is not aligned")) {
      copy_bulk(memory + 8, p.source, 64, signal);
    } else if (is("a target beyond the block's memory")) {
      copy_bulk(memory + 128, p.source, 64, signal);
    } else {
      signal_arrive_expecting(signal, expected);
      start_copy_bulk(memory, p.source, 64, signal);
    }
    if (is("two arrivals")) signal_arrive(signal);
  }
  __syncthreads();
  if (is("no wait")) return;
  signal_wait(signal, 0);
  if (threadIdx.x < 64) p.out[threadIdx.x] = memory[threadIdx.x];
}

// ---- what a block finds in a variable that the block before it wrote

struct StaticParams {
  float* out;  // [blocks]
};

void static_kernel(StaticParams p) {
  __shared__ float left;
  if (threadIdx.x == 0) p.out[blockIdx.x] = left;
  left = 1.0f;
}

}  // namespace
}  // namespace pk

using namespace pk;

EXPORT void probe_mma(const bf16* a, const bf16* b, float* d) { launch(mma_kernel, 1, 32, MmaParams{a, b, d}); }
EXPORT void probe_load(const uint16_t* matrices, uint32_t* out, int shift) {
  launch(load_kernel, 1, 32, LoadParams{matrices, out, shift}, 1024);
}
EXPORT void probe_wgmma(const bf16* a, const bf16* b, float* d, int first, const char* mistake) {
  launch(wgmma_kernel, 1, 128, WgmmaParams{a, b, d, first, mistake}, 8192);
}
EXPORT void probe_copy(const char* source, char* out, const char* mistake) {
  launch(copy_kernel, 1, 64, CopyParams{source, out, mistake}, 144);
}
EXPORT void probe_static(float* out, int blocks) { launch(static_kernel, static_cast<unsigned>(blocks), 32, {out}); }
EXPORT float probe_unit_interval(float x) { return unit_interval(x); }
EXPORT float probe_inverse(float x) { return inverse(x); }
