// GELU by table for one instruction-set level of AVX-512: three lookups and two multiply-adds for a vector, where its
// polynomial (common/activation_math.h) takes ten instructions. It is as exact as half precision needs.
#pragma once

#include "../isa/vec.h"

#if PK_LEVEL >= 2

namespace pk {
namespace {

// Of z = 4 h, gelu(h) = a + z (b + c z) around every integer from -14 to 14, interpolated at Chebyshev's three points;
// entry m + 16 belongs to the integer m. The entries of -15 and 15 are for what lies beyond: z (b + c clamp(z)), which
// is exactly 0 on the left and h on the right once z is clamped. The error is below 2.2e-4.
// tests/test_gelu_table.py computes the numbers.
struct GeluEntries {
  float a[32], b[32], c[32];
};
// clang-format off
alignas(64) constexpr GeluEntries kGelu = {
    {0.0f, 0.0f, -0.0660078079f, -0.113897108f, -0.180306882f, -0.260790348f, -0.34279114f, -0.406600565f,
     -0.431081414f, -0.4030689f, -0.325894743f, -0.220977619f, -0.11933431f, -0.0465374961f, -0.0104582096f,
     -0.000611852214f, 0.0f, -0.000611852214f, -0.0104582096f, -0.0465374961f, -0.11933431f, -0.220977619f,
     -0.325894743f, -0.4030689f, -0.431081414f, -0.406600565f, -0.34279114f, -0.260790348f, -0.180306882f,
     -0.113897108f, -0.0660078079f, 0.0f},
    {0.0f, 0.000446041115f, -0.00859559979f, -0.0157086179f, -0.0263573267f, -0.0403762162f, -0.0560026281f,
     -0.0694092065f, -0.0750876442f, -0.0674708113f, -0.0435267799f, -0.00517228339f, 0.0401354432f, 0.0817168057f,
     0.110362783f, 0.123081096f, 0.125f, 0.126918897f, 0.139637217f, 0.168283194f, 0.209864557f, 0.255172282f,
     0.293526769f, 0.317470819f, 0.325087637f, 0.319409192f, 0.306002617f, 0.290376216f, 0.276357323f, 0.265708625f,
     0.258595586f, 0.249553964f},
    {0.0f, 2.88933516e-05f, -0.000281350949f, -0.000545504503f, -0.000972435635f, -0.00158299506f, -0.00232759304f,
     -0.00303194253f, -0.00336125027f, -0.0028434759f, -0.000985465362f, 0.00252215913f, 0.00757630216f,
     0.0135241551f, 0.0192287527f, 0.0233695302f, 0.0248852782f, 0.0233695302f, 0.0192287527f, 0.0135241551f,
     0.00757630216f, 0.00252215913f, -0.000985465362f, -0.0028434759f, -0.00336125027f, -0.00303194253f,
     -0.00232759304f, -0.00158299506f, -0.000972435635f, -0.000545504503f, -0.000281350949f, 2.88933516e-05f}};
// clang-format on
// The same, times kBeforeCut. Results become bfloat16 by cutting off their lower halves (`upper_halves`), which makes
// them smaller by 0.72 / 256 of themselves on average; what is a bfloat16 stays one.
constexpr double kBeforeCut = 1 + 0.72 / 256;
// clang-format off
alignas(64) constexpr GeluEntries kGeluToCut = {
    {0.0f, 0.0f, -0.066193454f, -0.114217445f, -0.180813998f, -0.261523813f, -0.343755245f, -0.40774411f,
     -0.432293832f, -0.404202521f, -0.326811314f, -0.221599117f, -0.119669937f, -0.0466683842f, -0.0104876235f,
     -0.000613573007f, 0.0f, -0.000613573007f, -0.0104876235f, -0.0466683842f, -0.119669937f, -0.221599117f,
     -0.326811314f, -0.404202521f, -0.432293832f, -0.40774411f, -0.343755245f, -0.261523813f, -0.180813998f,
     -0.114217445f, -0.066193454f, 0.0f},
    {0.0f, 0.000447306316f, -0.00861977413f, -0.0157527998f, -0.0264314581f, -0.0404897742f, -0.0561601333f,
     -0.0696044192f, -0.0752988309f, -0.0676605776f, -0.0436492004f, -0.00518683018f, 0.040248327f, 0.0819466338f,
     0.110673182f, 0.123427264f, 0.125351563f, 0.127275869f, 0.140029937f, 0.168756485f, 0.210454807f, 0.255889952f,
     0.294352323f, 0.318363696f, 0.326001942f, 0.320307553f, 0.306863248f, 0.291192889f, 0.277134567f, 0.266455919f,
     0.259322912f, 0.250255823f},
    {0.0f, 2.89753079e-05f, -0.000282142224f, -0.00054703874f, -0.000975170638f, -0.00158744724f, -0.00233413931f,
     -0.00304046972f, -0.00337070366f, -0.00285147317f, -0.000988236978f, 0.00252925279f, 0.00759761035f,
     0.0135621922f, 0.0192828327f, 0.0234352574f, 0.0249552689f, 0.0234352574f, 0.0192828327f, 0.0135621922f,
     0.00759761035f, 0.00252925279f, -0.000988236978f, -0.00285147317f, -0.00337070366f, -0.00304046972f,
     -0.00233413931f, -0.00158744724f, -0.000975170638f, -0.00054703874f, -0.000282142224f, 2.89753079e-05f}};
// clang-format on

// The table in registers. Objects of it must not be const: gcc 12 keeps a const object with a constructor in memory,
// and loads all of it again for every vector.
struct GeluTable {
  __m512 a0, a1, b0, b1, c0, c1, end, round;
  static constexpr float kInputScale = 4;  // z = kInputScale h

  explicit PK_INLINE GeluTable(const GeluEntries& t)
      : a0(_mm512_load_ps(t.a)),
        a1(_mm512_load_ps(t.a + 16)),
        b0(_mm512_load_ps(t.b)),
        b1(_mm512_load_ps(t.b + 16)),
        c0(_mm512_load_ps(t.c)),
        c1(_mm512_load_ps(t.c + 16)),
        end(_mm512_set1_ps(15.4375f)),            // of 8 bits, so that products with an end's c, of 12 bits, are exact
        round(_mm512_set1_ps(0x1.8p23f + 16)) {}  // z + round has the entry's index in its last five bits

  PK_INLINE vf operator()(vf z) const {
    const __m512 x = (__m512)z, clamped = _mm512_range_ps(x, end, 2);  // 2: the smaller magnitude, with the sign of x
    const __m512i entry = (__m512i)_mm512_add_ps(clamped, round);
    const __m512 linear =
        _mm512_fmadd_ps(_mm512_permutex2var_ps(c0, entry, c1), clamped, _mm512_permutex2var_ps(b0, entry, b1));
    return (vf)_mm512_fmadd_ps(linear, x, _mm512_permutex2var_ps(a0, entry, a1));
  }
};

// Word i of the result: the upper halves of a[i] and b[i], which are bfloat16s, the former in the word's lower half.
PK_INLINE vu upper_halves(vf a, vf b) {
  const __m512i low = (__m512i)a;
  return (vu)_mm512_mask_alignr_epi8((__m512i)b, 0x3333333333333333ull, low, low, 2);
}

}  // namespace
}  // namespace pk

#endif
