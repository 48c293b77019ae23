// gelu and its slope from three lookups in tables of 32 entries, for AVX-512 (docs/algebra.md, "MLP").
//
// The argument is z = 4 h, so that the cells of the table are those around the integers. In the cell of the integer m
// the normal distribution's Phi is close to a + z (b + c z), so that 4 gelu(h) = z Phi and gelu'(h) = Phi + z (b + 2 c
// z).
#pragma once

#include "../isa/vec.h"
#include "gelu_table.h"

#if PK_LEVEL >= 2

namespace pk {
namespace {

constexpr double kGeluEnd = 15.4375;            // of |z|, from where on Phi is 0 or 1
constexpr double kLastCurve = 1.5 / (1 << 14);  // of the parabolas before it

constexpr double exponential_of(double x) {  // x >= 0, at most about 7
  double sum = 1, term = 1;
  for (int i = 1; i < 64; ++i) sum += term *= x / i;
  return sum;
}

// The normal distribution's density, and its integral up to x.
constexpr double normal_density(double x) { return 0.3989422804014327 / exponential_of(x * x / 2); }
constexpr double normal_phi(double x) {
  double sum = x, term = x;
  for (int i = 3; i < 160; i += 2) sum += term *= x * x / i;
  return 0.5 + normal_density(x) * sum;
}

struct PhiCoefficients {
  alignas(64) float a[32], b[32], c[32];  // of the cells of the integers -16 .. 15

  // In the cells b + 2 c z equals Phi's slope at two points, which makes the largest error of the slope least, and Phi
  // is exact in the middle. In those of -15 and 15 parabolas end in 0 and 1, with slope 0: exactly, as their
  // coefficients have few bits.
  constexpr explicit PhiCoefficients(double factor) : a{}, b{}, c{} {
    constexpr double kPoint = 0.35355339059327373;  // from the middle: Chebyshev's points
    for (int i = 2; i < 31; ++i) {
      const double m = i - 16, low = normal_density((m - kPoint) / 4) / 4, high = normal_density((m + kPoint) / 4) / 4;
      const double curve = (high - low) / (2 * kPoint) / 2, slope = (low + high) / 2 - 2 * curve * m;
      a[i] = (normal_phi(m / 4) - m * (slope + curve * m)) * factor;
      b[i] = slope * factor;
      c[i] = curve * factor;
    }
    c[1] = kLastCurve, b[1] = 2 * kLastCurve * kGeluEnd, a[1] = kLastCurve * kGeluEnd * kGeluEnd;
    c[31] = -c[1], b[31] = b[1], a[31] = factor - a[1];
  }
};
constexpr PhiCoefficients kPhiToCut(kBeforeCut);
static_assert(alignof(PhiCoefficients) == 64);
static_assert(float(kLastCurve * kGeluEnd * kGeluEnd) == kLastCurve * kGeluEnd * kGeluEnd);

struct GeluAndSlope {
  vf value, slope;  // 4 gelu(z / 4) and gelu'(z / 4), both times the table's factor
};

// Its constants are to stay in registers. So an object must not be const: gcc 12 leaves those in memory.
struct GeluSlopeTable {
  __m512 a0, a1, b0, b1, c0, c1, end, shift;

  explicit PK_INLINE GeluSlopeTable(const PhiCoefficients& phi)
      : a0(_mm512_load_ps(phi.a)),
        a1(_mm512_load_ps(phi.a + 16)),
        b0(_mm512_load_ps(phi.b)),
        b1(_mm512_load_ps(phi.b + 16)),
        c0(_mm512_load_ps(phi.c)),
        c1(_mm512_load_ps(phi.c + 16)),
        end(_mm512_set1_ps(kGeluEnd)),
        shift(_mm512_set1_ps(0x1.8p23f + 16)) {}

  // A NaN stays one, as it is z that is multiplied and not its clamped value, which is a number.
  PK_INLINE GeluAndSlope operator()(vf argument) const {
    constexpr int kSmallerMagnitude = 2;
    const __m512 z = (__m512)argument, clamped = _mm512_range_ps(z, end, kSmallerMagnitude);
    const __m512i cell = (__m512i)_mm512_add_ps(clamped, shift);  // in the low 5 bits
    const __m512 c = _mm512_permutex2var_ps(c0, cell, c1), b = _mm512_permutex2var_ps(b0, cell, b1);
    const __m512 line = _mm512_fmadd_ps(c, clamped, b);
    const __m512 phi = _mm512_fmadd_ps(line, clamped, _mm512_permutex2var_ps(a0, cell, a1));
    return {(vf)_mm512_mul_ps(z, phi), (vf)_mm512_fmadd_ps(_mm512_fmadd_ps(c, clamped, line), z, phi)};
  }
};

}  // namespace
}  // namespace pk

#endif
