// The MLP's forward for Hopper: products of whole warpgroups that run while the cores compute GELU.
//
// A block occupies one multiprocessor and walks over tiles of 64 tokens, one for each of its warpgroups. One more
// warpgroup copies the weights, chunk by chunk of the hidden channels; where all chunks fit in shared memory, only
// once. They were packed beforehand in the order in which the tensor cores read them. A warpgroup starts fc1 of the
// next chunk, then applies GELU to this one, then starts fc2 of this one: the tensor cores always have work, and the
// other warpgroups fill the gaps.
#pragma once

#include "forward_tile.cuh"
#include "../core/ptx.cuh"

namespace pk {
namespace {

struct MlpSm90Params {
  MlpParams mlp;       // its w1 and w2 are not used
  const void* images;  // the chunks of both weights, 2 hidden C elements of T, as mlp_pack writes them
  int64_t tiles;       // of 64 tokens
};

template <int C>
struct MlpFwdSm90Config {
  static constexpr int kGroups = C <= 96 ? 3 : 2, kThreads = 128 * (kGroups + 1);
  static constexpr int kRegisters = kGroups == 3 ? 160 : 240, kCopyRegisters = kGroups == 3 ? 32 : 24;
  static constexpr int kChunk = 64;                                                // hidden channels of a step
  static constexpr int kPart = C == 96 || C == 192 ? 96 : 64, kParts = C / kPart;  // columns of one product of fc2
  static constexpr int kWeight = kChunk * C * 2, kImage = 2 * kWeight;  // bytes of one weight's chunk, of both
  static constexpr int kStages = C == 96 ? 6 : C == 128 ? 5 : 4;
  using Table = Tables<C, kUnit>;
  static constexpr int kSignals = 16 * kStages;
  static int shared(int hidden) { return kStages * kImage + kSignals + kGroups * Table::bytes(hidden); }
  static bool fits(int hidden) { return hidden % kChunk == 0 && shared(hidden) <= 227 * 1024; }
};

// ---- the weights as images: for each chunk of hidden channels W1 [C / 8][kChunk][8], then W2 [kChunk / 8][C][8],
// channels in logical order (memory_channel)

struct MlpPackParams {
  const void* w1;   // [hidden, C], float32 where from_float, else T
  const void* w2;   // [C, hidden], of the same dtype
  void* images;     // 2 hidden C elements of T
  int hidden;       // hidden channels
  bool from_float;  // whether the weights are float32
};

template <class T>
__device__ inline uint32_t weight_pair(const void* w, int64_t offset, bool from_float) {
  if (!from_float) return load<T, 2>(static_cast<const T*>(w) + offset).packed32[0];
  const Pack<float, 2> v = load<float, 2>(static_cast<const float*>(w) + offset);
  return pair<T>(element(v, 0), element(v, 1));
}

template <class T, int C>
__global__ void __launch_bounds__(256) mlp_pack(MlpPackParams p) {
  using Config = MlpFwdSm90Config<C>;
  constexpr int kUnits = Config::kWeight / 16;
  const int i = static_cast<int>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
  const int chunk = i / (2 * kUnits), unit = i % kUnits;
  if (chunk * Config::kChunk >= p.hidden) return;
  const bool first = i % (2 * kUnits) < kUnits;
  const int rows = first ? Config::kChunk : C, row = memory_channel(unit % rows), k = unit / rows * 8;
  Pack<T, 8> out;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int c = memory_channel(k + 2 * e);
    const int64_t offset =
        first ? int64_t{chunk * Config::kChunk + row} * C + c : int64_t{row} * p.hidden + chunk * Config::kChunk + c;
    out.packed32[e] = weight_pair<T>(first ? p.w1 : p.w2, offset, p.from_float);
  }
  store(static_cast<T*>(p.images) + int64_t{i} * 8, out);
}

// ---- the kernel

#if defined(PK_EXECUTOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Starts h = n W1^T of one chunk.
template <class T, int C>
__device__ inline void start_fc1(float (&h)[MlpFwdSm90Config<C>::kChunk / 8][4], const uint32_t (&n)[C / 16][4],
                                 const char* w1) {
  constexpr int kChunk = MlpFwdSm90Config<C>::kChunk;
  products_begin();
#pragma unroll
  for (int s = 0; s < C / 16; ++s)
    multiply_async<T, kChunk>(h, n[s], operand_descriptor(w1 + 2 * s * kChunk * 16, kChunk * 16), s > 0);
  products_commit();
}

// Starts acc = a W2^T of one chunk, or acc += where `add`.
template <class T, int C>
__device__ inline void start_fc2(float (&acc)[MlpFwdSm90Config<C>::kParts][MlpFwdSm90Config<C>::kPart / 8][4],
                                 const uint32_t (&a)[MlpFwdSm90Config<C>::kChunk / 16][4], const char* w2, bool add) {
  using Config = MlpFwdSm90Config<C>;
  products_begin();
#pragma unroll
  for (int s = 0; s < Config::kChunk / 16; ++s)
#pragma unroll
    for (int part = 0; part < Config::kParts; ++part)
      multiply_async<T, Config::kPart>(
          acc[part], a[s], operand_descriptor(w2 + (2 * s * C + part * Config::kPart) * 16, C * 16), add || s > 0);
  products_commit();
}

template <int CHUNK>
__device__ inline void add_gelu(float (&h)[CHUNK / 8][4], const float* b1) {
  b1 += threadIdx.x % 4 * 8;
#pragma unroll
  for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = h[j][i] + b1[j / 4 * 32 + j % 4 * 2 + i % 2];
      h[j][i] = x * gelu_phi(x);
    }
}

template <class T, int CHUNK>
__device__ inline void pack_operand(const float (&h)[CHUNK / 8][4], uint32_t (&a)[CHUNK / 16][4]) {
#pragma unroll
  for (int j = 0; j < CHUNK / 8; ++j) {
    a[j / 2][j % 2 * 2] = pair<T>(h[j][0], h[j][1]);
    a[j / 2][j % 2 * 2 + 1] = pair<T>(h[j][2], h[j][3]);
  }
}

// A position in the ring of stages; `parity` changes with every round.
template <int STAGES>
struct Ring {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// What the warpgroups that compute do.
template <class T, int C>
__device__ inline void consume(const MlpSm90Params& params, char* memory, int group) {
  using Config = MlpFwdSm90Config<C>;
  constexpr int kChunk = Config::kChunk;
  const MlpParams& p = params.mlp;
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory + Config::kStages * Config::kImage);
  uint64_t* const empty = full + Config::kStages;
  const typename Config::Table table(memory + Config::kStages * Config::kImage + Config::kSignals +
                                     group * Config::Table::bytes(p.hidden));
  const int thread = threadIdx.x % 128, warp = thread / 32;
  const int chunks = p.hidden / kChunk;
  const bool resident = chunks <= Config::kStages;
  table.fill(p, thread, 128);

  Ring<Config::kStages> ring;
  for (int64_t tile = int64_t{blockIdx.x} * Config::kGroups + group, first = int64_t{blockIdx.x} * Config::kGroups;
       first < params.tiles;
       tile += int64_t{gridDim.x} * Config::kGroups, first += int64_t{gridDim.x} * Config::kGroups) {
    const int64_t start = tile * kUnit;
    if (tile >= params.tiles) {  // the block's last round has no tile for this warpgroup: the others need the ring
      for (int c = 0; c < chunks && !resident; ++c) {
        signal_wait(&full[ring.stage], ring.parity);
        if (thread % 32 == 0) signal_arrive(&empty[ring.stage]);
        ring.advance();
      }
      continue;
    }
    if (resident) ring = {};
    table.fill_tokens(p, start, warp, 4);
    group_barrier(1 + group, 128);
    uint32_t n[C / 16][4];
    load_operand<T, C>(p, table, start, 16 * warp, n);
    float acc[Config::kParts][Config::kPart / 8][4], h[kChunk / 8][4];
    uint32_t a[kChunk / 16][4];

    const auto finish = [&] {
#pragma unroll
      for (int part = 0; part < Config::kParts; ++part) products_wait<0>(acc[part]);
    };
    const auto release = [&](int stage) {
      if (!resident && thread % 32 == 0) signal_arrive(&empty[stage]);
    };
    signal_wait(&full[ring.stage], ring.parity);
    start_fc1<T, C>(h, n, memory + ring.stage * Config::kImage);
    products_wait<0>(h);
    add_gelu<kChunk>(h, table.b1());
    pack_operand<T, kChunk>(h, a);
    int previous = ring.stage;
    ring.advance();
    if (chunks > 1) signal_wait(&full[ring.stage], ring.parity);
    for (int c = 1; c < chunks; ++c) {
      start_fc1<T, C>(h, n, memory + ring.stage * Config::kImage);
      start_fc2<T, C>(acc, a, memory + previous * Config::kImage + Config::kWeight, c > 1);
      products_wait<1>(h);
      add_gelu<kChunk>(h, table.b1() + c * kChunk);
      computed_here(h, p.pixels < 0, table.y_mean());  // and not below the wait for fc2, `finish`
      const int finished = previous;
      previous = ring.stage;
      ring.advance();
      if (c + 1 < chunks) signal_wait(&full[ring.stage], ring.parity);
      finish();
      release(finished);
      pack_operand<T, kChunk>(h, a);
    }
    start_fc2<T, C>(acc, a, memory + previous * Config::kImage + Config::kWeight, chunks > 1);
    finish();
    release(previous);

    store_rows<T, C>(p, table, start, 16 * warp, reinterpret_cast<float (&)[C / 8][4]>(acc));
    group_barrier(1 + group, 128);  // after it no thread of the group reads this tile's tables
    if (p.y_stats != nullptr && warp < 2) table.store_stats(p, start, 0, warp);
  }
}

// What the copying warpgroup's one thread does.
template <int C>
__device__ inline void produce(const MlpSm90Params& params, char* memory) {
  using Config = MlpFwdSm90Config<C>;
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory + Config::kStages * Config::kImage);
  uint64_t* const empty = full + Config::kStages;
  const int chunks = params.mlp.hidden / Config::kChunk;
  Ring<Config::kStages> ring;
  bool filled = false;  // whether every stage has been filled once
  for (int64_t tile = int64_t{blockIdx.x} * Config::kGroups; tile < params.tiles;
       tile += int64_t{gridDim.x} * Config::kGroups) {
    for (int c = 0; c < chunks; ++c) {
      if (filled) signal_wait(&empty[ring.stage], ring.parity ^ 1);
      copy_bulk(memory + ring.stage * Config::kImage,
                static_cast<const char*>(params.images) + int64_t{c} * Config::kImage, Config::kImage,
                &full[ring.stage]);
      ring.advance();
      filled = filled || ring.stage == 0;
    }
    if (chunks <= Config::kStages) return;
  }
}

#endif

template <class T, int C>
__global__ void __launch_bounds__(MlpFwdSm90Config<C>::kThreads, 1) mlp_fwd_sm90(MlpSm90Params params) {
#if defined(PK_EXECUTOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Config = MlpFwdSm90Config<C>;
  PK_SHARED(memory);
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory + Config::kStages * Config::kImage);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Config::kStages; ++s) {
      signal_init(&full[s], 1);
      signal_init(&full[Config::kStages + s], 4 * Config::kGroups);
    }
    signals_ready();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == Config::kGroups) {
    give_registers<Config::kCopyRegisters>();
    if (threadIdx.x % 128 == 0) produce<C>(params, memory);
  } else {
    take_registers<Config::kRegisters>();
    consume<T, C>(params, memory, group);
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // the launcher runs this kernel on compute capability 9.0 only
#endif
}

}  // namespace
}  // namespace pk
