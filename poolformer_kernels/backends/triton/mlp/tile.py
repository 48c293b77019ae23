"""Device functions of the MLP: where a tile's tokens are, fc1's operand, and the results of a tile.

Tokens are pixels, numbered through the batch. A tile of channels_last data may hold the end of one sample and
the start of the next. A tile of nchw data stays inside a sample, where its pixels are neighbours in memory;
only the backward has such tiles.
"""

import triton
import triton.language as tl

from ..tile import load_or_one, load_or_zero, round_to

__all__ = [
    "image_pointers",
    "load_normalised",
    "load_operand",
    "round_hidden",
    "row_stats",
    "sample_values",
    "store_dx",
    "store_output",
    "store_stats",
    "tile_mask",
    "token_range",
    "token_tile",
]


@triton.jit
def _sample_of(token, HW):
    """(the sample that a token of channels_last data belongs to, how many of its tokens come before it)."""
    b = token // HW
    return b, (token - b * HW).to(tl.int32)


@triton.jit
def token_range(tile, batch, HW, BM: tl.constexpr):
    """(first token, number of tokens, first sample, its tokens before the tile) of a channels_last tile."""
    start = tile.to(tl.int64) * BM
    count = tl.minimum(batch * HW.to(tl.int64) - start, BM).to(tl.int32)
    first, before = _sample_of(start, HW)
    return start, count, first, before


@triton.jit
def token_tile(tile, HW, T, TOKENS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(number of the first token, which tokens exist, their samples) of a tile."""
    i = tl.arange(0, TOKENS)
    if CHANNELS_LAST:
        start = tile.to(tl.int64) * TOKENS
        b, before = _sample_of(start, HW)
        return start, i < T - start, b + (before + i) // HW
    else:
        tiles = tl.cdiv(HW, TOKENS)
        b = (tile // tiles).to(tl.int64)
        first = tile % tiles * TOKENS
        return b * HW + first, i < HW - first, b + tl.zeros([TOKENS], tl.int64)


@triton.jit
def image_pointers(ptr, start, c, HW, C: tl.constexpr, TOKENS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Pointers ``[TOKENS, channels]`` to channels c of an image's tokens from ``start`` on."""
    i = tl.arange(0, TOKENS)
    if CHANNELS_LAST:
        return ptr + start * C + i[:, None] * C + c[None, :]
    else:
        b = start // HW
        return ptr + b * HW * C + (start - b * HW) + i[:, None] + c[None, :].to(tl.int64) * HW


@triton.jit
def tile_mask(ok, c, C: tl.constexpr, END: tl.constexpr):
    """The mask of a tile of tokens, ``ok`` where they exist, and of channels c, all of them below ``END``."""
    mask = ok[:, None]
    if END > C:
        mask = mask & (c < C)[None, :]
    return mask


@triton.jit
def sample_values(mean_rstd_ptr, drop_ptr, b, ok, NORM: tl.constexpr):
    """(mean, rstd, drop scale) of each token's sample; 0 for a token that does not exist."""
    mean = tl.zeros(b.shape, tl.float32)
    rstd = tl.zeros(b.shape, tl.float32)
    if NORM:
        mean = tl.load(mean_rstd_ptr + b * 2, mask=ok, other=0.0)
        rstd = tl.load(mean_rstd_ptr + b * 2 + 1, mask=ok, other=0.0)
    return mean, rstd, load_or_one(drop_ptr, b, ok)


@triton.jit
def load_operand(
    x_ptr, rows, c, c_ok, mean, rstd, gamma_ptr, beta_ptr, OPERAND: tl.constexpr, NORM: tl.constexpr
):
    """fc1's operand in the forward: a tile of x, normalised where NORM.

    ``rows``: the offset of each token's first channel. What stands for channels beyond C does not
    matter: fc1's weight is 0 there.
    """
    x = tl.load(x_ptr + rows[:, None] + c[None, :], mask=c_ok[None, :], other=0.0)
    if NORM:
        x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        x = x * load_or_one(gamma_ptr, c, c_ok)[None, :] + load_or_zero(beta_ptr, c, c_ok)[None, :]
    return x if x.dtype == OPERAND else round_to(x.to(tl.float32), OPERAND)


@triton.jit
def load_normalised(ptrs, mask, mean, rstd, gamma, beta, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """fc1's operand in the backward: GroupNorm's output, or x itself, in the operands' dtype.

    `load_operand` multiplies by rstd and gamma in turn, this by their product: the last bits may differ.
    """
    x = tl.load(ptrs, mask=mask, other=0.0)
    if NORM:
        x = (x.to(tl.float32) - mean[:, None]) * (rstd[:, None] * gamma[None, :]) + beta[None, :]
    return x if x.dtype == DTYPE else round_to(x.to(tl.float32), DTYPE)


@triton.jit
def round_hidden(h, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """fc1's output in the dtype that it is saved in for the backward.

    In float16 a finite value beyond the largest number is clamped to it: the slope of the activation is the
    same there, 0 or 1. relu_squared has the slope 2 h, so its large values become infinite, as in eager
    float16.
    """
    if dtype == tl.float16:
        largest: tl.constexpr = float("inf") if ACTIVATION == "relu_squared" else 65504.0
        h = tl.where(tl.abs(h) < float("inf"), tl.minimum(tl.maximum(h, -65504.0), largest), h)
    return round_to(h, dtype)


@triton.jit
def store_output(acc, x_ptr, y_ptr, b2_ptr, scale_ptr, drop, rows, c, ok, c_ok, RESIDUAL: tl.constexpr):
    """Writes ``y = x + d s (acc + b2)``, without x where not RESIDUAL; returns the rounded y in fp32.

    ``rows``: the offset of each token's first channel; ``drop``: d of each token, or None.
    """
    y = (acc + load_or_zero(b2_ptr, c, c_ok)[None, :]) * load_or_one(scale_ptr, c, c_ok)[None, :]
    if drop is not None:
        y *= drop[:, None]
    offsets = rows[:, None] + c[None, :]
    mask = ok[:, None] & c_ok[None, :]
    if RESIDUAL:
        y += tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = round_to(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=mask)
    return y.to(tl.float32)


@triton.jit
def row_stats(y0, y1, c0_ok, c1_ok, count):
    """(mean, M2) of each row of the tiles y0 and y1 (or None), which have ``count`` columns together."""
    total = tl.sum(tl.where(c0_ok[None, :], y0, 0.0), 1)
    if y1 is not None:
        total += tl.sum(tl.where(c1_ok[None, :], y1, 0.0), 1)
    mean = total / count
    deviation = tl.where(c0_ok[None, :], y0 - mean[:, None], 0.0)
    m2 = tl.sum(deviation * deviation, 1)
    if y1 is not None:
        deviation = tl.where(c1_ok[None, :], y1 - mean[:, None], 0.0)
        m2 += tl.sum(deviation * deviation, 1)
    return mean, m2


@triton.jit
def store_stats(
    y_stats_ptr, mean, m2, count, sample, ok, start, first, column, HW, slots, COLUMNS: tl.constexpr,
    BM: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Writes the partial of every sample in a tile of y, from the (mean, M2) of its rows.

    A sample has ``slots`` partials for each of the COLUMNS column tiles. It may need fewer: its last tile
    writes zeros to the others.

    count: columns of the tile
    sample: each row's sample, counted from ``first``, the tile's first sample
    start: the tile's first token
    column: the tile's number among the COLUMNS
    """
    lane = tl.arange(0, 32)
    for s in tl.static_range(SAMPLES):
        mine = ok & (sample == s)
        rows = tl.sum(mine.to(tl.float32))
        average = tl.sum(tl.where(mine, mean, 0.0)) / tl.maximum(rows, 1.0)
        deviation = tl.where(mine, mean - average, 0.0)
        total_m2 = tl.sum(tl.where(mine, m2, 0.0)) + count * tl.sum(deviation * deviation)
        b = first + s
        slot = (start // BM - b * HW // BM).to(tl.int32)
        slots_ptr = y_stats_ptr + (b * slots * COLUMNS + column) * 3
        partial_ptr = slots_ptr + slot * (COLUMNS * 3)
        tl.store(partial_ptr, count * rows, mask=rows > 0)
        tl.store(partial_ptr + 1, average, mask=rows > 0)
        tl.store(partial_ptr + 2, total_m2, mask=rows > 0)
        end = tl.where((rows > 0) & ((b + 1) * HW <= start + BM), slots, 0)
        slot += 1
        while slot < end:
            unused_ptr = slots_ptr + (slot + lane) * (COLUMNS * 3)
            for i in tl.static_range(3):
                tl.store(unused_ptr + i, tl.zeros([32], tl.float32), mask=slot + lane < end)
            slot += 32


@triton.jit
def store_dx(
    dn, x_ptr, grad_ptr, dx_ptr, gamma_ptr, sums_ptr, start, ok, c, HW, mean, rstd, k0, k1,
    C: tl.constexpr, END: tl.constexpr, TOKENS: tl.constexpr, CHANNELS_LAST: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Writes dx of a tile from dn, the gradient of fc1's input: through the norm, plus that of the residual.

    ``sums_ptr``, where given, gets the sums over the tile's tokens of ``dn x_hat`` ``[C]`` and of ``dn``
    ``[C]``. k0 and k1 are the two means over a sample, of ``gamma dn`` and of ``gamma dn x_hat``.
    """
    mask = tile_mask(ok, c, C, END)
    dx = dn
    if NORM:
        x_ptrs = image_pointers(x_ptr, start, c, HW, C, TOKENS, CHANNELS_LAST)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        xhat = (x - mean[:, None]) * rstd[:, None]
        if sums_ptr is not None:
            tl.store(sums_ptr + c, tl.sum(dn * xhat, 0), mask=c < C)
            tl.store(sums_ptr + C + c, tl.sum(dn, 0), mask=c < C)
        gamma = load_or_one(gamma_ptr, c, c < C)
        dx = rstd[:, None] * (gamma[None, :] * dn - k0[:, None] - xhat * k1[:, None])
    if RESIDUAL:
        grad_ptrs = image_pointers(grad_ptr, start, c, HW, C, TOKENS, CHANNELS_LAST)
        grad = tl.load(grad_ptrs, mask=mask, other=0.0)
        dx += grad.to(tl.float32)
    dx_ptrs = image_pointers(dx_ptr, start, c, HW, C, TOKENS, CHANNELS_LAST)
    tl.store(dx_ptrs, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)
