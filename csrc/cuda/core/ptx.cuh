// Instructions that C++ has no name for: tensor cores, matrix loads, asynchronous copies.
#pragma once

#include <stdint.h>

#include "device.cuh"

namespace pk {
namespace {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The descriptor of B of a warpgroup's product (`multiply_async`). B lies in shared memory as 8 x 8 matrices of 128
// bytes whose rows (columns of B) are 16 bytes of consecutive k; the matrices of 8 columns each follow one another,
// those of the next 8 k are `k_stride` bytes on.
__device__ inline uint64_t operand_descriptor(const void* pointer, int k_stride) {
  return (shared_address(pointer) & 0x3ffff) >> 4 | static_cast<uint64_t>(k_stride >> 4) << 16 |
         uint64_t{128 >> 4} << 32;
}

}  // namespace
}  // namespace pk

#if defined(PK_EXECUTOR)
#include "executor_ptx.h"  // tests/cuda_executor has the instructions in C++
#else

namespace pk {
namespace {

// blockIdx.x, read again: values computed from it can be computed again, too, and need not stay in registers.
__device__ inline unsigned block_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// d += a b of a warp, 16 x 8 x 16. With g = lane / 4 and q = lane % 4, a lane holds of a (rows) g and g + 8, columns
// 2q, 2q + 1 and those + 8 (words: g low, g + 8 low, g high, g + 8 high); of b column g, rows 2q, 2q + 1 and + 8;
// of d rows g and g + 8, columns 2q and 2q + 1.
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements, transposed: lane i names row i % 8 of matrix i / 8; with g and q as above a
// lane gets of each matrix column g, rows 2q and 2q + 1.
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// 2^x to 2 ulps, 0 where it is below the smallest normal number.
__device__ inline float exp2_flushed(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// 16 bytes from global to shared memory, zeros where not `exists`.
__device__ inline void copy_async(void* target, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(exists ? 16 : 0)
               : "memory");
}

__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups of copies are still under way.
template <int N>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Hopper: products of a warpgroup from shared memory, bulk copies, barriers in shared memory

// d = a b, or d += a b where `add`, 64 x N x 16: warp w of the four has rows 16 w .. 16 w + 15, with fragments as in
// `mma`. Not done before `products_wait`, and until then neither d nor a may change.
#define PK_WGMMA(N, TYPE, REGISTERS, A0, A1, A2, A3, B, ADD, ...)                            \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                   \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS \
               "}, "                                                                         \
               "{" A0 ", " A1 ", " A2 ", " A3 "}, " B ", add, 1, 1, 0;\n}\n"                 \
               : __VA_ARGS__                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

#define PK_ROW(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define PK_ROWS(i) PK_ROW(i), PK_ROW(i + 1), PK_ROW(i + 2), PK_ROW(i + 3)
#define PK_REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PK_REGISTERS_64                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PK_REGISTERS_96                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"

template <class T, int N>
__device__ inline void multiply_async(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(N == 32 || N == 64 || N == 96);
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (N == 32 && kBf16)
    PK_WGMMA("32", "bf16", PK_REGISTERS_32, "%16", "%17", "%18", "%19", "%20", "%21", PK_ROWS(0));
  else if constexpr (N == 32 && !kBf16)
    PK_WGMMA("32", "f16", PK_REGISTERS_32, "%16", "%17", "%18", "%19", "%20", "%21", PK_ROWS(0));
  else if constexpr (N == 64 && kBf16)
    PK_WGMMA("64", "bf16", PK_REGISTERS_64, "%32", "%33", "%34", "%35", "%36", "%37", PK_ROWS(0), PK_ROWS(4));
  else if constexpr (N == 64 && !kBf16)
    PK_WGMMA("64", "f16", PK_REGISTERS_64, "%32", "%33", "%34", "%35", "%36", "%37", PK_ROWS(0), PK_ROWS(4));
  else if constexpr (N == 96 && kBf16)
    PK_WGMMA("96", "bf16", PK_REGISTERS_96, "%48", "%49", "%50", "%51", "%52", "%53", PK_ROWS(0), PK_ROWS(4),
             PK_ROWS(8));
  else if constexpr (N == 96 && !kBf16)
    PK_WGMMA("96", "f16", PK_REGISTERS_96, "%48", "%49", "%50", "%51", "%52", "%53", PK_ROWS(0), PK_ROWS(4),
             PK_ROWS(8));
}

// Call it before the first product, and again after writing a register that a product uses.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps the compiler from moving computations of d below this line, or uses of d above it. It emits nothing: ptxas
// still may.
template <int ROWS>
__device__ inline void computed(float (&d)[ROWS][4]) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i) asm volatile("" : PK_ROW(i)::"memory");
}

// Has d computed above this line, by ptxas too: it cannot know that `never` is false, where d is stored to `shared`.
template <int ROWS>
__device__ inline void computed_here(float (&d)[ROWS][4], bool never, void* shared) {
  static_assert(ROWS == 8);
#define PK_VALUES(i) "f"(d[i][0]), "f"(d[i][1]), "f"(d[i][2]), "f"(d[i][3])
  asm volatile(
      "{\n.reg .pred never;\nsetp.ne.s32 never, %32, 0;\n@!never bra past;\n"
      "st.shared.v4.f32 [%33], {%0, %1, %2, %3};\n"
      "st.shared.v4.f32 [%33 + 16], {%4, %5, %6, %7};\n"
      "st.shared.v4.f32 [%33 + 32], {%8, %9, %10, %11};\n"
      "st.shared.v4.f32 [%33 + 48], {%12, %13, %14, %15};\n"
      "st.shared.v4.f32 [%33 + 64], {%16, %17, %18, %19};\n"
      "st.shared.v4.f32 [%33 + 80], {%20, %21, %22, %23};\n"
      "st.shared.v4.f32 [%33 + 96], {%24, %25, %26, %27};\n"
      "st.shared.v4.f32 [%33 + 112], {%28, %29, %30, %31};\n"
      "past:\n}" ::PK_VALUES(0),
      PK_VALUES(1), PK_VALUES(2), PK_VALUES(3), PK_VALUES(4), PK_VALUES(5), PK_VALUES(6), PK_VALUES(7),
      "r"(static_cast<int>(never)), "r"(shared_address(shared))
      : "memory");
#undef PK_VALUES
}

// Waits until at most UNDER_WAY groups of products are still under way. `d` are the registers of a product that is done
// by then: no use of them may move above the wait.
template <int UNDER_WAY, int ROWS>
__device__ inline void products_wait(float (&d)[ROWS][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(UNDER_WAY) : "memory");
  computed(d);
}

#undef PK_WGMMA
#undef PK_ROW
#undef PK_ROWS
#undef PK_REGISTERS_32
#undef PK_REGISTERS_64
#undef PK_REGISTERS_96

__device__ inline void signal_init(uint64_t* signal, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(signal)), "r"(arrivals) : "memory");
}

// Makes signals visible to bulk copies: call it after the last `signal_init`, before the block's barrier.
__device__ inline void signals_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void signal_arrive(uint64_t* signal) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(signal)) : "memory");
}

// Waits for the end of phase `parity` (0, 1, 0 ...), when all threads and all bytes have arrived.
__device__ inline void signal_wait(uint64_t* signal, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(shared_address(signal)),
      "r"(parity)
      : "memory");
}

// Arrives, and the signal's phase also waits for `bytes` of bulk copies.
__device__ inline void signal_arrive_expecting(uint64_t* signal, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(signal)), "r"(bytes)
               : "memory");
}

// Starts a copy to shared memory of `bytes` that the signal expects, a multiple of 16.
__device__ inline void start_copy_bulk(void* target, const void* source, int bytes, uint64_t* signal) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(target)),
               "l"(source), "r"(bytes), "r"(shared_address(signal))
               : "memory");
}

// Barrier `id` (1 to 15) of `threads` threads.
__device__ inline void group_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// From here on a thread of this warpgroup has N registers: those that only copy give some, those that compute take
// them.
template <int N>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace
}  // namespace pk
#endif

namespace pk {
namespace {

// Arrives, and starts a copy of `bytes`, a multiple of 16, to shared memory that the signal's phase also waits for.
// Both addresses are multiples of 16.
__device__ inline void copy_bulk(void* target, const void* source, int bytes, uint64_t* signal) {
  signal_arrive_expecting(signal, bytes);
  start_copy_bulk(target, source, bytes, signal);
}

}  // namespace
}  // namespace pk
