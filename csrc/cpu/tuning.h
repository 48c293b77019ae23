// The numbers of the CPU kernels that were chosen by measurement, each with the benchmark that decides it. The
// assertions at the end say which values are allowed; with all of them results are right. Those that set the order of
// sums depend on nothing but shapes, so that results are the same for any number of threads; a change of them changes
// last digits.
#pragma once

#include <stdint.h>

namespace pk {

// ---- shared by the operators

// Multiply-adds of a product below which a second thread costs more than it brings.
// `poolformer-kernels bench mlp`, `bench model`
constexpr int64_t kSerialWork = 1 << 18;

// Tokens that go through a product together, at most: with more of them each weight is used more often, until the
// tile's activations no longer fit into the L2 cache. `poolformer-kernels bench mlp`
constexpr int64_t kTileTokens = 208;

// Bytes of activations that a thread keeps in its core's L2 cache: a convolution's windows of one tile, and what the
// layers of a chain hand on. `poolformer-kernels bench model`
constexpr int64_t kCacheBytes = 1 << 20;

// Elements that each thread has at least, in passes that do little more than read them: packing weights, the mean over
// pixels. `poolformer-kernels bench model`, `bench training`
constexpr int64_t kGrainElements = 65536;

// Tokens that each thread has at least, where moments of tokens are merged to those of samples.
// `poolformer-kernels bench model`
constexpr int64_t kGrainTokens = 16384;

// Work is shared out by whole samples from so many for each thread on, though one thread may then get one more.
// `poolformer-kernels bench pool-mixer`, `bench model`
constexpr int64_t kSamplesPerThread = 4;

// Elements of one partial of a sample's statistics. `poolformer-kernels bench pool-mixer`
constexpr int64_t kStatsChunk = 8192;

// ---- the token mixer: `poolformer-kernels bench pool-mixer`

constexpr int64_t kSerialElements = 32768;  // elements below which a second thread costs more than it brings
constexpr int64_t kStripElements = 32768;   // elements of a channels_last work item
constexpr int64_t kPlaneElements = 4096;  // elements of an NCHW work item, whose two float copies stay in the L1 cache

// ---- the MLP's forward: `poolformer-kernels bench mlp`

// Hidden channels are computed and used a chunk at a time, whose activations stay in the cache: all of them at once up
// to kHiddenAtOnce, else kHiddenChunk of them.
constexpr int64_t kHiddenAtOnce = 320, kHiddenChunk = 256;

// With at most kTileTokens tokens and at least so many hidden channels, threads share the weights instead of the
// tokens: they compute so many parts of the hidden channels or, on AMX tiles, go by the steps of mlp/shared_plan.h.
constexpr int64_t kPartsHidden = 1024, kParts = 4;

// On AMX tiles, channels_last: tokens are rows of the products up to so many channels, from so many tokens a channel
// on. Beyond that, packing the weights in every call costs more than it brings.
constexpr int64_t kRowsChannels = 320, kRowsTokensPerChannel = 2;

// There: tokens of a panel, and hidden channels that are computed and used at a time, at most.
constexpr int64_t kRowsPanel = 224, kRowsHiddenChunk = 640;

// On AMX tiles, with tokens as columns: tokens that go through a product together, and hidden channels that are
// computed and used at a time, at most.
constexpr int64_t kTilesTokens = 416, kTilesHiddenChunk = 640;

// On float vectors of AVX-512, channels_last (mlp/float_rows.h): tokens of a panel at most, and at least, since each
// panel packs the weights; hidden channels that are computed and used at a time.
constexpr int64_t kFloatRowsPanel = 420, kFloatRowsLeast = 96, kFloatRowsChunk = 128;

// Chunks of statistics (core/stats.h) that each thread has at least.
constexpr int64_t kGrainChunks = 4;

// ---- the MLP's backward: `poolformer-kernels bench training`

// Whole samples whose gradient waits for GroupNorm's sums are a group: so many tokens and elements of the wider of
// input and output at most, but one sample at least.
constexpr int64_t kGroupTokens = 3136, kGroupElements = 1 << 19;

// A group's tokens are worked on in blocks, whose operands stay in the caches: so many tokens and elements at most.
constexpr int64_t kBlockTokens = 1600, kBlockElements = 1 << 18;

// Tokens of a tile of `prepare` and `hidden`, and of a block at least.
constexpr int64_t kBackwardTileTokens = 96;

// Chunks of a sample (core/stats.h) that each thread has at least in GroupNorm's backward.
constexpr int64_t kGrainNormChunks = 2;

// Hidden channels that each thread sums over at least, where products become the gradients of parameters.
constexpr int64_t kGrainHidden = 4096;

// Channels of the input, and of the output, whose parameters' gradients are one work item; hidden channels of the
// output's products that are transposed at a time.
constexpr int64_t kInputChannels = 64, kOutputChannels = 32, kTransposedHidden = 256;

// Hidden channels in a partial sum of dgamma and dbeta: one running sum over thousands would lose a digit.
constexpr int64_t kSummedHidden = 64;

// ---- the MLP's backward with tokens as rows (mlp/rows_backward_params.h): `poolformer-kernels bench training`

// Most input channels and fewest tokens with which it is taken.
constexpr int64_t kRowsBackwardChannels = 768, kRowsBackwardTokens = 256;

// So many tokens and elements of the input make a block, at most: its operands stay in the L2 cache.
constexpr int64_t kRowsBlockTokens = 448, kRowsBlockElements = 1 << 17;

// Up to so many channels weights are packed once a call. With more of them each block of tokens packs them again, so
// blocks are larger.
constexpr int64_t kRowsPackedChannels = 384, kRowsWideBlockElements = 1 << 19;

// From so many channels on the weights of 32 hidden channels for both products of `hidden` do not fit the L1 cache
// together, so they go over the block's tokens one after the other.
constexpr int64_t kRowsTwoPasses = 256;

// Hidden channels of W1 whose rows stay in the L1 cache in the products for the input's gradient; tokens, in units of
// 32, that they are used for at a time.
constexpr int64_t kRowsInputHidden = 640, kRowsInputSubs = 16;

// Floats of the workspace that a thread keeps for its next call, at most.
constexpr int64_t kKeptFloats = 4 << 20;

// Elements of the input of a work item in passes that do little more than read them.
constexpr int64_t kRowsItemElements = 8192;

// ---- the convolution between stages: `poolformer-kernels bench model`

// Rows of the weight that a work item multiplies: they are shared out where tokens are too few for the threads.
constexpr int64_t kEmbedRows = 64;

// Tokens are rows of the products where a sample has so many of them, in rows of so many.
constexpr int64_t kRowsTokens = 32, kRowsWidth = 4;

// Multiply-adds that take as long as an element of weights or of an image that is copied for them.
constexpr int64_t kEmbedCopyWork = 64;

// Where tokens are rows: bytes of packed weights that tokens pass over at a time, and of padded images that pass over
// one such part after the other.
constexpr int64_t kPanelBytes = 768 << 10, kImageBytes = 3 << 20;

// Packed weights up to so many bytes stay in the L1 cache while tokens pass over them.
constexpr int64_t kLoopBytes = 32 << 10;

// Vectors of kLanesMax tokens of a tile, at least, however large the windows of the convolution are.
constexpr int64_t kLeastEmbedVectors = 3;

// ---- allowed values

constexpr int64_t kWidestVector = 16, kMostRows = 32;  // lanes of a vector, rows of a block of a product, at any level
static_assert(kTileTokens % kWidestVector == 0 && kTileTokens >= kLeastEmbedVectors * kWidestVector);
static_assert(kBackwardTileTokens % kWidestVector == 0 && kBlockTokens >= kBackwardTileTokens);
static_assert(kInputChannels % kWidestVector == 0 && kOutputChannels % kWidestVector == 0);
static_assert(kHiddenAtOnce % kMostRows == 0 && kHiddenChunk % kMostRows == 0 && kPartsHidden >= kParts * kMostRows);
static_assert(kFloatRowsChunk % 128 == 0);  // Floats::kSumWords
static_assert(kFloatRowsPanel % 14 == 0);   // kFloatRowsBlock in mlp/mlp.h
static_assert(kTransposedHidden % kWidestVector == 0 && kEmbedRows % kMostRows == 0);
static_assert(kStatsChunk % kWidestVector == 0);
static_assert(kRowsInputHidden % kMostRows == 0 && kRowsBlockTokens >= kMostRows);

}  // namespace pk
