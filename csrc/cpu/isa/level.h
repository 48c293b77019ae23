// Compiles what follows for the instruction-set level PK_LEVEL: 0 baseline, 1 AVX2, 2 AVX-512, 3 with bfloat16 too,
// 4 and AMX.
// A build gives every source the same flags, so the level is set here, and it holds to the end of the file. Nothing
// that the linker could share between levels may be defined behind this header: no inline function with external
// linkage, so nothing of the standard library. So kernels are in unnamed namespaces, and headers that are not made for
// one level are included here, in front of the pragma.
#pragma once

#ifndef PK_LEVEL
#error "kernels are included by the file of a level (isa/avx2.cpp and such), which defines PK_LEVEL"
#endif

#include <stdint.h>

#if PK_LEVEL > 0
#include <immintrin.h>
#endif

#include "../../common/window_count.h"
#include "../chain/patch_embed.h"
#include "../core/stats.h"
#include "../mlp/mlp.h"
#include "../mlp/rows_backward_params.h"
#include "../pool_mixer/pool_mixer.h"
#include "../product/weight.h"
#include "../rate/rate.h"

#if PK_LEVEL >= 3
#define PK_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"
#elif PK_LEVEL == 2
#define PK_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"
#elif PK_LEVEL == 1
#define PK_TARGET "avx2,fma,f16c"
#endif

#if defined(PK_TARGET)
#define PK_STRING(text) #text
#define PK_PRAGMA(text) _Pragma(PK_STRING(text))
#if defined(__clang__)
PK_PRAGMA(clang attribute push(__attribute__((target(PK_TARGET))), apply_to = function))
#else
PK_PRAGMA(GCC target(PK_TARGET))
#endif
#endif
