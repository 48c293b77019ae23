"""Device functions of the MLP: where a tile's tokens are, fc1's operand, y and its statistics, dx from dn.

Tokens are pixels, numbered through the batch. A tile of channels_last runs across samples; one of nchw stays
inside a sample, where its pixels are neighbours in memory.
"""

import triton
import triton.language as tl

from ..tile import rounded, shift, vector

__all__ = [
    "finished",
    "image",
    "inside",
    "kept",
    "normalised",
    "operand_of",
    "row_stats",
    "sample_values",
    "store_stats",
    "stored",
    "token_tile",
    "tokens",
]


@triton.jit
def tokens(tile, batch, HW, BM: tl.constexpr):
    """Of a tile: first row, rows left from there, first sample, its rows that come before the tile."""
    start = tile.to(tl.int64) * BM
    left = tl.minimum(batch * HW.to(tl.int64) - start, BM).to(tl.int32)
    first = start // HW
    return start, left, first, (start - first * HW).to(tl.int32)


@triton.jit
def kept(h, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """fc1's output as the backward finds it: float16 leaves finite what is, if the slope is 0 or 1 out there.

    That of relu_squared is 2 h above, so h is infinite beyond float16's range, as it is in eager float16.
    """
    if dtype == tl.float16:
        most: tl.constexpr = float("inf") if ACTIVATION == "relu_squared" else 65504.0
        h = tl.where(tl.abs(h) < float("inf"), tl.minimum(tl.maximum(h, -65504.0), most), h)
    return rounded(h, dtype)


@triton.jit
def operand_of(
    x_ptr, at, c, c_ok, mean, rstd, gamma_ptr, beta_ptr, OPERAND: tl.constexpr, NORM: tl.constexpr
):
    """fc1's operand: a tile of x, normalised where NORM, with zeros where C ends."""
    x = tl.load(x_ptr + at[:, None] + c[None, :], mask=c_ok[None, :], other=0.0)
    if NORM:
        x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        x = x * vector(gamma_ptr, c, c_ok)[None, :] + shift(beta_ptr, c, c_ok)[None, :]
    return x if x.dtype == OPERAND else rounded(x.to(tl.float32), OPERAND)


@triton.jit
def stored(acc, x_ptr, y_ptr, b2_ptr, scale_ptr, drop, at, c, ok, c_ok, RESIDUAL: tl.constexpr):
    """Writes ``x + d s (acc + b2)`` and returns it in fp32 as it was rounded."""
    y = (acc + shift(b2_ptr, c, c_ok)[None, :]) * vector(scale_ptr, c, c_ok)[None, :]
    if drop is not None:
        y *= drop[:, None]
    at = at[:, None] + c[None, :]
    ok = ok[:, None] & c_ok[None, :]
    if RESIDUAL:
        y += tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    y = rounded(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=ok)
    return y.to(tl.float32)


@triton.jit
def row_stats(y0, y1, c0_ok, c1_ok, count):
    """(mean, M2) of each row of the tiles y0 and y1 (or None), of ``count`` columns in all."""
    total = tl.sum(tl.where(c0_ok[None, :], y0, 0.0), 1)
    if y1 is not None:
        total += tl.sum(tl.where(c1_ok[None, :], y1, 0.0), 1)
    mean = total / count
    off = tl.where(c0_ok[None, :], y0 - mean[:, None], 0.0)
    m2 = tl.sum(off * off, 1)
    if y1 is not None:
        off = tl.where(c1_ok[None, :], y1 - mean[:, None], 0.0)
        m2 += tl.sum(off * off, 1)
    return mean, m2


@triton.jit
def store_stats(
    y_stats_ptr, mean, m2, count, local, ok, start, first, column, HW, slots, COLUMNS: tl.constexpr,
    BM: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Partials of every sample in a tile; a sample's last tile also clears the slots left over."""
    lane = tl.arange(0, 32)
    for s in tl.static_range(SEGMENTS):
        inside = ok & (local == s)
        rows = tl.sum(inside.to(tl.float32))
        average = tl.sum(tl.where(inside, mean, 0.0)) / tl.maximum(rows, 1.0)
        off = tl.where(inside, mean - average, 0.0)
        spread = tl.sum(tl.where(inside, m2, 0.0)) + count * tl.sum(off * off)
        b = first + s
        slot = (start // BM - b * HW // BM).to(tl.int32)
        out = y_stats_ptr + (b * slots * COLUMNS + column) * 3
        at = out + slot * (COLUMNS * 3)
        tl.store(at, count * rows, mask=rows > 0)
        tl.store(at + 1, average, mask=rows > 0)
        tl.store(at + 2, spread, mask=rows > 0)
        end = tl.where((rows > 0) & ((b + 1) * HW <= start + BM), slots, 0)
        slot += 1
        while slot < end:
            left_over = out + (slot + lane) * (COLUMNS * 3)
            for i in tl.static_range(3):
                tl.store(left_over + i, tl.zeros([32], tl.float32), mask=slot + lane < end)
            slot += 32


@triton.jit
def token_tile(tile, HW, T, TOKENS: tl.constexpr, LAST: tl.constexpr):
    """(number of the first token, which tokens exist, their samples) of a tile."""
    i = tl.arange(0, TOKENS)
    if LAST:
        start = tile.to(tl.int64) * TOKENS
        b = start // HW
        within = (start - b * HW).to(tl.int32)
        return start, i < T - start, b + (within + i) // HW
    else:
        tiles = tl.cdiv(HW, TOKENS)
        b = (tile // tiles).to(tl.int64)
        first = tile % tiles * TOKENS
        return b * HW + first, i < HW - first, b + tl.zeros([TOKENS], tl.int64)


@triton.jit
def image(ptr, start, c, HW, C: tl.constexpr, TOKENS: tl.constexpr, LAST: tl.constexpr):
    """Pointers ``[TOKENS, channels]`` to channels c of an image's tokens from ``start`` on."""
    i = tl.arange(0, TOKENS)
    if LAST:
        return ptr + start * C + i[:, None] * C + c[None, :]
    else:
        b = start // HW
        return ptr + b * HW * C + (start - b * HW) + i[:, None] + c[None, :].to(tl.int64) * HW


@triton.jit
def inside(ok, c, C: tl.constexpr, END: tl.constexpr):
    """The mask of a tile of tokens ``ok`` and channels c, which end before ``END``."""
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
    return mean, rstd, vector(drop_ptr, b, ok)


@triton.jit
def normalised(at, mask, mean, rstd, gamma, beta, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """x as fc1 reads it: GroupNorm's output in the operands' dtype."""
    x = tl.load(at, mask=mask, other=0.0)
    if NORM:
        x = (x.to(tl.float32) - mean[:, None]) * (rstd[:, None] * gamma[None, :]) + beta[None, :]
    return x if x.dtype == DTYPE else rounded(x.to(tl.float32), DTYPE)


@triton.jit
def finished(
    dn, x_ptr, grad_ptr, dx_ptr, gamma_ptr, sums_ptr, start, ok, c, HW, mean, rstd, k0, k1,
    C: tl.constexpr, END: tl.constexpr, TOKENS: tl.constexpr, LAST: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Stores dx of a tile, and its sums over tokens ``dn x_hat`` and ``dn`` where ``sums_ptr`` is given."""
    mask = inside(ok, c, C, END)
    dx = dn
    if NORM:
        x = tl.load(image(x_ptr, start, c, HW, C, TOKENS, LAST), mask=mask, other=0.0).to(tl.float32)
        xhat = (x - mean[:, None]) * rstd[:, None]
        if sums_ptr is not None:
            tl.store(sums_ptr + c, tl.sum(dn * xhat, 0), mask=c < C)
            tl.store(sums_ptr + C + c, tl.sum(dn, 0), mask=c < C)
        gamma = vector(gamma_ptr, c, c < C)
        dx = rstd[:, None] * (gamma[None, :] * dn - k0[:, None] - xhat * k1[:, None])
    if RESIDUAL:
        grad = tl.load(image(grad_ptr, start, c, HW, C, TOKENS, LAST), mask=mask, other=0.0)
        dx += grad.to(tl.float32)
    at = image(dx_ptr, start, c, HW, C, TOKENS, LAST)
    tl.store(at, rounded(dx, dx_ptr.dtype.element_ty), mask=mask)
