// What the kernels of the MLP's backward share: parameters, tiles of operands in shared memory, the activation.
// Formulas: docs/algebra.md, "MLP".
#pragma once

#include "../../common/activation.h"
#include "../../common/activation_math.h"
#include "../core/device.cuh"
#include "../core/ptx.cuh"

namespace pk {
namespace {

constexpr int kHiddenBlock = 64;  // hidden channels of a block of mlp_bwd_wgrad

// Matrices are dense, row by row. Tokens are the pixels of all samples, numbered through the batch. T is the operands'
// dtype, bfloat16 or float16; X is float32 where x_float, else T; W is the weights' dtype, T or float32. Pointers that
// are null: not asked for. docs/algebra.md, "MLP", calls the input y.
struct MlpBwdParams {
  const void* x;           // [tokens, C] of X: the input
  const void* grad;        // [tokens, C] of X: dL/dz
  const void* n;           // [tokens, C] of T: x normalised
  const void* g;           // [tokens, C] of T: grad
  void* n_to;              // `n`, where mlp_bwd_tokens writes it, or null: x itself is `n`
  void* g_to;              // `g`, where mlp_bwd_tokens writes it, or null: grad itself is `g`
  const float* mean_rstd;  // [B, 2]: of each sample of x, or null
  const void* w1;          // [hidden, C] of W
  const void* w2;          // [C, hidden] of W
  Vector b1;               // [hidden]
  Vector b2;               // [C]
  Vector gamma;            // [C]: GroupNorm's weight
  Vector beta;             // [C]: GroupNorm's bias
  Vector layer_scale;      // [C]
  Vector drop_scale;       // [B]
  const void* saved;       // [tokens, hidden] of T: fc1's output, or null: it is computed again
  void* w1_rows;           // [hidden, C] of T: W1
  void* w2t;               // [hidden, C] of T: W2^T diag(layer_scale), each row divided by its `peak`
  float* table;            // [4, hidden]: b1, peak, u = W1 gamma, v = b1 + W1 beta
  float* affine;           // [2, C]: gamma and beta
  float* rows;             // [3, hidden / 64, tokens]: sums over 64 hidden channels of dh u, dh (h - v), p dp; or null
  float* k;                // [B, 2]: k0 and k1, the means over a sample of e and of e xhat
  float* partials;         // [splits, width]: dW1 [hidden, C], G^T [hidden, C] and db1 [hidden] of a split; or null
  float* g2t;              // [hidden, C]: G^T, the sum of its partials
  float* columns;          // [tiles, 3 C]: sums over a tile's tokens of dn xhat, dn = W1^T dh and d g; or null
  void* dx;                // [tokens, C] of X
  void* dw1;               // [hidden, C] of W
  void* dw2;               // [C, hidden] of W
  float* db1;              // [hidden]
  float* db2;              // [C]
  float* dgamma;           // [C]
  float* dbeta;            // [C]
  float* dlayer_scale;     // [C]
  float* ddrop_scale;      // [B]
  int64_t tokens;          // B H W
  int64_t pixels;          // H W
  int64_t tiles;           // of mlp_bwd_wgrad: kSplitTokens tokens each
  int64_t tiles_per_split;
  int64_t splits;  // of the tokens: a block of mlp_bwd_wgrad has one
  int hidden;      // hidden channels
  int channels;    // C
  Activation activation;
  bool x_float;    // whether x, grad and dx are float32
  bool norm;       // whether there is GroupNorm
  bool residual;   // whether dx includes grad
  bool divided;    // whether rows of w2t are divided by their peak; without it peak is 1
  bool drop_grad;  // whether drop_scale's gradient is asked for

  // Floats of a split's partials.
  PK_HOST_DEVICE int64_t width() const { return int64_t{2} * hidden * channels + hidden; }
};

__device__ inline int64_t sample_of(int64_t token, const MlpBwdParams& p) {
  if (p.tokens <= 0xffffffffll) return static_cast<uint32_t>(token) / static_cast<uint32_t>(p.pixels);
  return token / p.pixels;
}

// Loads 8 channels of a matrix of float32 or T, from element `offset` on.
template <class T>
__device__ inline void load_channels(const void* source, bool is_float, int64_t offset, float (&out)[8]) {
  if (is_float) {
    const Pack<float, 4> low = load<float, 4>(static_cast<const float*>(source) + offset);
    const Pack<float, 4> high = load<float, 4>(static_cast<const float*>(source) + offset + 4);
#pragma unroll
    for (int e = 0; e < 8; ++e) out[e] = e < 4 ? element(low, e) : element(high, e - 4);
  } else {
    const Pack<T, 8> v = load<T, 8>(static_cast<const T*>(source) + offset);
#pragma unroll
    for (int e = 0; e < 8; ++e) out[e] = element(v, e);
  }
}

// Stores 8 channels. One store statement serves both dtypes: with one in each branch the compiler emits several
// narrow stores.
template <class T>
__device__ inline void store_channels(void* target, bool is_float, int64_t offset, const float (&v)[8]) {
  const float low[4] = {v[0], v[1], v[2], v[3]}, high[4] = {v[4], v[5], v[6], v[7]};
  float* out = static_cast<float*>(target) + (is_float ? offset : offset / 2);
  const Pack<T, 8> halves = packed<T>(v);
  Pack<float, 4> first = packed<float>(low);
#pragma unroll
  for (int i = 0; i < 4; ++i) first.packed32[i] = is_float ? first.packed32[i] : halves.packed32[i];
  store(out, first);
  if (is_float) store(out + 4, packed<float>(high));
}

// ---- tiles of operands in shared memory

// A tile has rows of WIDTH elements. A product sums along a row (multiply_rows, where 8 lanes at a time read rows 2a
// and 2a + 1) or across rows (multiply_across, which reads 8 neighbouring rows at a time). Neither has bank conflicts,
// because rows are padded by 16 bytes and neighbours are 4 rows apart (tile_row).
template <int WIDTH>
struct OperandTile {
  static constexpr int kStride = 2 * WIDTH + 16;  // bytes, an odd multiple of 16
  PK_HOST_DEVICE static constexpr int bytes(int rows) { return rows * kStride; }
};

// Where row `row` is in the tile.
__device__ inline int tile_row(int row) { return (row & ~7) | (row & 7) >> 1 | (row & 1) << 2; }

// Starts the copy of ROWS rows, `stride` elements apart, of which `exist` exist; the others become zeros.
template <class T, int WIDTH, int ROWS, int THREADS>
__device__ inline void copy_rows(char* tile, const T* source, int stride, int exist) {
  constexpr int kPacks = WIDTH / 8, kStep = THREADS / kPacks, kStride = OperandTile<WIDTH>::kStride;
  if constexpr (THREADS % kPacks == 0 && kStep % 8 == 0 && ROWS % kStep == 0) {
    const int first = threadIdx.x / kPacks, c = threadIdx.x % kPacks;
    const T* source_row = source + first * stride + 8 * c;
    char* target = tile + tile_row(first) * kStride + 16 * c;
#pragma unroll
    for (int row = 0; row < ROWS; row += kStep)
      copy_async(target + row * kStride, source_row + row * stride, first + row < exist);
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * kPacks; i += THREADS) {
      const int row = i / kPacks, c = i % kPacks;
      copy_async(tile + tile_row(row) * kStride + 16 * c, source + row * stride + 8 * c, row < exist);
    }
  }
}

// Loads operand a, rows `low_row` and `high_row` of each lane. A product may sum in any order that both operands share:
// of each 32 channels, lane 4 g + q takes 8 q .. 8 q + 7, one pack, whose words 0 and 1 serve the first of two steps of
// 16, words 2 and 3 the second.
template <class T, int C>
__device__ inline void load_a(const T* low_row, const T* high_row, bool low, bool high, uint32_t (&a)[C / 16][4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < C / 32; ++i) {
    Pack<T, 8> v{}, w{};
    if (low) v = load<T, 8>(low_row + 32 * i + 8 * q);
    if (high) w = load<T, 8>(high_row + 32 * i + 8 * q);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      a[2 * i + s][0] = v.packed32[2 * s], a[2 * i + s][1] = w.packed32[2 * s];
      a[2 * i + s][2] = v.packed32[2 * s + 1], a[2 * i + s][3] = w.packed32[2 * s + 1];
    }
  }
}

// d += a b^T for the 8 rows of b of which `row` is the lane's (row lane / 4, at its pack lane % 4).
template <class T, int C>
__device__ inline void multiply_rows(float (&d)[4], const uint32_t (&a)[C / 16][4], const char* row) {
#pragma unroll
  for (int i = 0; i < C / 32; ++i) {
    const uint4 b = *reinterpret_cast<const uint4*>(row + 64 * i);
    mma<T>(d, a[2 * i], b.x, b.y);
    mma<T>(d, a[2 * i + 1], b.z, b.w);
  }
}

// d += a b for 16 rows of b, of which `row` is the one that the lane names (across_offset).
template <class T, int C>
__device__ inline void multiply_across(float (&d)[C / 8][4], const uint32_t (&a)[4], const char* row) {
#pragma unroll
  for (int i = 0; i < C / 16; ++i) {
    uint32_t b[4];
    load_matrices_transposed(b, row + 32 * i);
    mma<T>(d[2 * i], a, b[0], b[1]);
    mma<T>(d[2 * i + 1], a, b[2], b[3]);
  }
}

// The offset in a tile of what a lane reads, in bytes: for multiply_rows, and for multiply_across.
template <int WIDTH>
__device__ inline int along_offset() {
  return tile_row(threadIdx.x % 32 / 4) * OperandTile<WIDTH>::kStride + threadIdx.x % 4 * 16;
}
template <int WIDTH>
__device__ inline int across_offset() {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  return (matrix % 2 * 8 + tile_row(lane % 8)) * OperandTile<WIDTH>::kStride + matrix / 2 * 16;
}

template <class T>
__device__ inline void unpacked(uint32_t packed32, float& low, float& high) {
  Pack<T, 2> v;
  v.packed32[0] = packed32;
  low = element(v, 0);
  high = element(v, 1);
}

// ---- the activation

struct Exp {
  __device__ float operator()(float x) const { return exp2_flushed(x * 1.44269504f); }
};

// gelu's slope is Phi(x) + x phi(x), where phi is the normal density. Its exponential is one instruction: half the work
// of a polynomial for the slope.
template <Activation A>
__device__ inline Activated<float> activated(float x) {
  if constexpr (A == Activation::gelu) {
    const float phi = gelu_phi(x);
    return {x * phi, x * 0.39894228f * exp2_flushed(x * x * -0.72134752f) + phi};
  } else {
    return activate<A, false>(x, Exp{});
  }
}

template <Activation A>
__device__ inline void activate_all(const float (&h)[2][4], float (&value)[2][4], float (&slope)[2][4]) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Activated<float> result = activated<A>(h[t][i]);
      value[t][i] = result.value;
      slope[t][i] = result.slope;
    }
}

// The activation and its slope for all elements of two accumulators.
__device__ inline void activated(Activation activation, const float (&h)[2][4], float (&value)[2][4],
                                 float (&slope)[2][4]) {
  switch (activation) {
    case Activation::gelu: return activate_all<Activation::gelu>(h, value, slope);
    case Activation::gelu_tanh: return activate_all<Activation::gelu_tanh>(h, value, slope);
    case Activation::relu: return activate_all<Activation::relu>(h, value, slope);
    case Activation::relu_squared: return activate_all<Activation::relu_squared>(h, value, slope);
    default: return activate_all<Activation::silu>(h, value, slope);
  }
}

}  // namespace
}  // namespace pk
