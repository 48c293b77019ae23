"""Device functions of the MLP's forward: where a tile's tokens are, fc1's operand, y and its statistics."""

import triton
import triton.language as tl

from ..tile import rounded, shift, vector

__all__ = ["kept", "operand_of", "row_stats", "store_stats", "stored", "tokens"]


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
