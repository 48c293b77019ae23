// GELU in float32 by table for one instruction-set level of AVX-512: five lookups and four multiply-adds for a vector,
// without an exponential and a division.
#pragma once

#include "../isa/vec.h"

#if PK_LEVEL >= 2

namespace pk {
namespace {

// The tail T(a) = Phi(-a), a >= 0, around n / 5 is c[0] + c[1] r + .. + c[4] r^4, where r = 5 a - n; entry n belongs to
// n = 0 .. 31. The last one is for what lies beyond, where gelu is taken for 0 or x. tests/test_gelu_exact.py computes
// the numbers.
struct TailEntries {
  float c[5][32];
};
// clang-format off
alignas(64) constexpr TailEntries kTail = {{
    {0.5f, 0.42074028f, 0.34457827f, 0.27425313f, 0.2118554f, 0.15865526f, 0.11506967f, 0.08075666f, 0.054799292f,
     0.03593032f, 0.022750132f, 0.013903447f, 0.008197536f, 0.004661188f, 0.0025551303f, 0.001349898f, 6.8713794e-4f,
     3.3692925e-4f, 1.5910859e-4f, 7.234804e-5f, 3.1671243e-5f, 1.3345749e-5f, 5.412544e-6f, 2.1124547e-6f,
     7.933281e-7f, 2.8665158e-7f, 9.964426e-8f, 3.3320447e-8f, 1.071759e-8f, 3.315746e-9f, 9.865877e-10f, 0.0f},
    {-0.079788454f, -0.078208484f, -0.07365399f, -0.06664491f, -0.05793832f, -0.04839417f, -0.038837247f,
     -0.029945532f, -0.0221842f, -0.015790056f, -0.0107982075f, -0.0070949234f, -0.0044789044f, -0.002716588f,
     -0.0015830832f, -8.8636274e-4f, -4.7681187e-4f, -2.464395e-4f, -1.2237742e-4f, -5.8387483e-5f, -2.6764907e-5f,
     -1.1787973e-5f, -4.9881533e-6f, -2.0279988e-6f, -7.921779e-7f, -2.973067e-7f, -1.07204656e-7f, -3.7140637e-8f,
     -1.2362654e-8f, -3.9536716e-9f, -1.2148311e-9f, 0.0f},
    {-9.941685e-8f, 0.0015641688f, 0.0029461577f, 0.003998691f, 0.004635061f, 0.004839412f, 0.0046604644f,
     0.0041923695f, 0.003549468f, 0.0028422074f, 0.0021596404f, 0.0015608835f, 0.0010749383f, 7.063148e-4f,
     4.4326537e-4f, 2.6591076e-4f, 1.5258142e-4f, 8.379066e-5f, 4.4056735e-5f, 2.2187814e-5f, 1.0706315e-5f,
     4.951153e-6f, 2.1949e-6f, 9.32938e-7f, 3.802743e-7f, 1.486669e-7f, 5.575246e-8f, 2.0058506e-8f, 6.9241217e-9f,
     2.2935287e-9f, 7.2904544e-10f, 0.0f},
    {5.329176e-4f, 4.9963576e-4f, 4.1182924e-4f, 2.8408246e-4f, 1.391554e-4f, 4.025172e-7f, -1.133462e-4f,
     -1.9103815e-4f, -2.3017904e-4f, -2.3540696e-4f, -2.1573878e-4f, -1.8155239e-4f, -1.4216053e-4f, -1.0440908e-4f,
     -7.23037e-5f, -4.738376e-5f, -2.9464161e-5f, -1.7418737e-5f, -9.805349e-6f, -5.2620994e-6f, -2.6948087e-6f,
     -1.3180019e-6f, -6.1604254e-7f, -2.7532977e-7f, -1.1771945e-7f, -4.8169408e-8f, -1.8870088e-8f, -7.0792616e-9f,
     -2.5440692e-9f, -8.759889e-10f, -2.8905953e-10f, 0.0f},
    {-3.185371e-6f, -1.5401469e-5f, -2.7835455e-5f, -3.5124554e-5f, -3.6404563e-5f, -3.222246e-5f, -2.4217108e-5f,
     -1.4537934e-5f, -5.2257947e-6f, 2.2465517e-6f, 7.171823e-6f, 9.551796e-6f, 9.875355e-6f, 8.8456945e-6f,
     7.150146e-6f, 5.3204253e-6f, 3.6859974e-6f, 2.394675e-6f, 1.4659546e-6f, 8.4853934e-7f, 4.6559614e-7f,
     2.426502e-7f, 1.2029612e-7f, 5.6801017e-8f, 2.5569948e-8f, 1.0983325e-8f, 4.504756e-9f, 1.7652221e-9f,
     6.6120887e-10f, 2.368536e-10f, 8.116887e-11f, 0.0f}}};
// clang-format on

// gelu(x) = max(x, 0) - |x| T(|x|): small results on the left keep their digits. The error is below
// 1.3 ulps for positive x. Objects must not be const, see GeluTable.
struct ExactGelu {
  __m512 low[5], high[5], end, scale, round;

  PK_INLINE ExactGelu()
      : end(_mm512_set1_ps(6.2f)),
        scale(_mm512_set1_ps(5)),
        round(_mm512_set1_ps(0x1.8p23f)) {  // 5 a + round has the entry's index in its last five bits
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
      low[i] = _mm512_load_ps(kTail.c[i]);
      high[i] = _mm512_load_ps(kTail.c[i] + 16);
    }
  }

  PK_INLINE vf operator()(vf x) const {
    const __m512 a = _mm512_range_ps((__m512)x, end, 10);  // the smaller magnitude, without a sign
    const __m512 index = _mm512_fmadd_ps(a, scale, round);
    const __m512 r = _mm512_fmsub_ps(a, scale, _mm512_sub_ps(index, round));
    __m512 tail = entry(4, index);
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) tail = _mm512_fmadd_ps(tail, r, entry(i, index));
    const __m512 value = _mm512_fnmadd_ps(a, tail, (__m512)larger(vf{}, x));
    constexpr int kMinusInfinityToNan = 3 << 16;  // as x Phi(x) is in eager mode
    return (vf)_mm512_fixupimm_ps(value, (__m512)x, _mm512_set1_epi32(kMinusInfinityToNan), 0);
  }

 private:
  PK_INLINE __m512 entry(int i, __m512 index) const { return _mm512_permutex2var_ps(low[i], (__m512i)index, high[i]); }
};

}  // namespace
}  // namespace pk

#endif
