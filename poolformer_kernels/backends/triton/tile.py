"""Device functions of the token mixer: where a tile's lanes are, and the pool's window walking down a strip.

A tile is ``COLUMNS x CHANNELS`` lanes. A lane is one channel of one image column inside a strip of ``ROWS``
rows; it walks down its strip and keeps the row sums of the pool's window in registers, so a pixel is read
``POOL`` times (once from memory, then from L1), not ``POOL**2`` times. Columns are numbered through all
strips of a sample, so no lane idles at the end of a row. Both layouts are served alike; only the strides
differ, and with them the axis that neighbouring threads walk along.
"""

import os

import triton
import triton.language as tl

__all__ = ["advance", "dot", "lanes", "rounded", "row_ok", "row_taps", "scalar", "shift", "taps", "vector"]

# The interpreter's bf16 arithmetic and rounding are wrong: `rounded` does by hand what a GPU does itself.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """fp32 to the output's dtype, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(value == value, up, bits | 0x400000)
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def dot(a, b, acc):
    """``acc + a b`` in fp32; the interpreter's bf16 products are wrong, its fp32 ones are not."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def shift(ptr, index, ok):
    """A parameter in fp32, or 0 where there is none."""
    if ptr is None:
        return tl.zeros(index.shape, tl.float32)
    else:
        return tl.load(ptr + index, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def vector(ptr, index, ok):
    """A parameter in fp32, or 1 where there is none."""
    if ptr is None:
        return tl.full(index.shape, 1.0, tl.float32)
    else:
        return tl.load(ptr + index, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def scalar(ptr, index):
    if ptr is None:
        return 1.0
    else:
        return tl.load(ptr + index).to(tl.float32)


@triton.jit
def taps(position, size, REACH: tl.constexpr):
    """How many taps of a pool around ``position`` fall inside [0, size), in fp32, and at least 1."""
    inside = tl.minimum(position, REACH) + tl.minimum(size - 1 - position, REACH) + 1
    return tl.maximum(inside, 1).to(tl.float32)


@triton.jit
def row_taps(top, offset: tl.constexpr, H, EVEN: tl.constexpr, REACH: tl.constexpr, ROWS: tl.constexpr):
    """`taps` of row ``top + offset`` of a strip, constant where the strip hides the border."""
    if EVEN and offset >= REACH and offset + REACH < ROWS:
        return tl.full(top.shape, 2 * REACH + 1, tl.float32)
    else:
        return taps(top + offset, H, REACH)


@triton.jit
def row_ok(ok, top, offset: tl.constexpr, H, EVEN: tl.constexpr, ROWS: tl.constexpr):
    """The lanes whose row ``top + offset`` exists."""
    if offset < 0:
        return ok & (top >= -offset)[:, None]
    elif offset >= ROWS or not EVEN:
        return ok & (top + offset < H)[:, None]
    else:
        return ok


@triton.jit
def _shifted(ptr, ok, shift):
    """(value in fp32, value - shift); a masked lane adds nothing to a sum of the second."""
    if shift is None:
        value = tl.load(ptr, mask=ok, other=0.0).to(tl.float32)
        return value, value
    else:
        value = tl.load(ptr, mask=ok, other=shift)
        return value, value - shift


@triton.jit
def _row(ptr, ok, w, W, column_stride, shift, vertical, REACH: tl.constexpr):
    """(centre, sum over the row's taps); ``vertical`` (1 / row taps): each divided by its own pool's size."""
    centre, total = _shifted(ptr, ok, shift)
    if vertical is not None:
        total *= (vertical / taps(w, W, REACH))[:, None]
    for j in tl.static_range(1, REACH + 1):
        left = _shifted(ptr - j * column_stride, ok & (w >= j)[:, None], shift)[1]
        right = _shifted(ptr + j * column_stride, ok & (w + j < W)[:, None], shift)[1]
        if vertical is None:
            total += left + right
        else:
            total += left * (vertical / taps(w - j, W, REACH))[:, None]
            total += right * (vertical / taps(w + j, W, REACH))[:, None]
    return centre, total


@triton.jit
def _window(
    ptr, ok, h, w, H, W, row_stride, column_stride, shift, ADJOINT: tl.constexpr, REACH: tl.constexpr
):
    """(centre, sum over the window) for pools too large to unroll."""
    centre, total = _shifted(ptr, ok, shift)
    total = tl.zeros(centre.shape, tl.float32)
    for i in range(-REACH, REACH + 1):
        for j in range(-REACH, REACH + 1):
            inside = (h + i >= 0) & (h + i < H) & (w + j >= 0) & (w + j < W)
            value = _shifted(ptr + i * row_stride + j * column_stride, ok & inside[:, None], shift)[1]
            if ADJOINT:
                value /= (taps(h + i, H, REACH) * taps(w + j, W, REACH))[:, None]
            total += value
    return centre, total


@triton.jit
def advance(
    rows, ptr, ok, top, w, H, W, row_stride, column_stride, shift, r: tl.constexpr,
    ADJOINT: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, ROLLED: tl.constexpr,
):  # fmt: skip
    """Row ``r`` of the strip: (its centre, its window's sum, the rows read so far)."""
    REACH: tl.constexpr = POOL // 2
    if ROLLED:
        for i in tl.static_range(-REACH if r == 0 else REACH, REACH + 1):
            vertical = 1.0 / row_taps(top, r + i, H, EVEN, REACH, ROWS) if ADJOINT else None
            exists = row_ok(ok, top, r + i, H, EVEN, ROWS)
            at = ptr + (r + i) * row_stride
            rows = rows + (_row(at, exists, w, W, column_stride, shift, vertical, REACH),)  # noqa: RUF005
        total = rows[r][1]
        for i in tl.static_range(1, POOL):
            total += rows[r + i][1]
        return rows[r + REACH][0], total, rows
    else:
        exists = row_ok(ok, top, r, H, EVEN, ROWS)
        at = ptr + r * row_stride
        centre, total = _window(
            at, exists, top + r, w, H, W, row_stride, column_stride, shift, ADJOINT, REACH
        )
        return centre, total, rows


@triton.jit
def lanes(
    H, W, tiles, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where this program's lanes are: sample, tile, channels, top rows, columns, mask, offsets, strides."""
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    channel_tiles: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    c = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    column = tile // channel_tiles * COLUMNS + tl.arange(0, COLUMNS)
    strip = column // W
    w = column - strip * W
    top = strip * ROWS
    ok = (top < H)[:, None]
    c_ok = c < C
    if C % CHANNELS != 0:
        ok = ok & c_ok[None, :]
    pixel = top * W + w
    row_stride = W
    channel = c
    if WIDE:
        pixel = top.to(tl.int64) * W + w
        row_stride = W.to(tl.int64)
        channel = c.to(tl.int64)
    if CHANNELS_LAST:
        offsets = pixel[:, None] * C + channel[None, :]
        row_stride *= C
        column_stride: tl.constexpr = C
    else:
        offsets = pixel[:, None] + channel[None, :] * H * W
        column_stride: tl.constexpr = 1
    return b, tile, c, c_ok, top, w, ok, offsets, b * H * W * C, row_stride, column_stride
