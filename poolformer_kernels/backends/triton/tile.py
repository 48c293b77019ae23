"""Device functions: products and parameters for every kernel, and the token mixer's tile and window.

A tile of the token mixer is ``COLUMNS x CHANNELS`` lanes. A lane is one channel of one image column inside a
strip of ``ROWS`` rows; it walks down its strip and keeps the row sums of the pool's window in registers, so a
pixel is read ``POOL`` times (once from memory, then from L1), not ``POOL**2`` times. Columns are numbered
through all strips of a sample, so no lane idles at the end of a row. The two layouts differ only in the
strides, and with them in the axis along which neighbouring threads lie.
"""

import os

import triton
import triton.language as tl

__all__ = [
    "advance_window",
    "dot",
    "load_or_one",
    "load_or_zero",
    "load_scalar_or_one",
    "round_to",
    "row_mask",
    "row_window_count",
    "tile_lanes",
    "window_count",
]

# The interpreter's bf16 arithmetic and rounding are wrong, so `round_to` and `dot` replace them there.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 values in another dtype, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(value == value, nearest, bits | 0x400000)  # NaN stays NaN
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b``, in fp32. PRECISION: `config.product_precision`, for fp32 operands.

    The interpreter gets fp32 operands, as its bf16 products are wrong, and always multiplies in fp32.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_or_zero(ptr, index, ok):
    """Elements of a parameter in fp32, 0 where not ``ok``; all 0 where the parameter is None."""
    if ptr is None:
        return tl.zeros(index.shape, tl.float32)
    else:
        return tl.load(ptr + index, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_or_one(ptr, index, ok):
    """Elements of a parameter in fp32, 0 where not ``ok``; all 1 where the parameter is None."""
    if ptr is None:
        return tl.full(index.shape, 1.0, tl.float32)
    else:
        return tl.load(ptr + index, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_scalar_or_one(ptr, index):
    """One element of a parameter in fp32; 1 where the parameter is None."""
    if ptr is None:
        return 1.0
    else:
        return tl.load(ptr + index).to(tl.float32)


@triton.jit
def window_count(position, size, REACH: tl.constexpr):
    """How many positions of a window around ``position`` lie in [0, size), in fp32, and at least 1.

    The window reaches REACH positions to either side.
    """
    count = tl.minimum(position, REACH) + tl.minimum(size - 1 - position, REACH) + 1
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def row_window_count(
    top, offset: tl.constexpr, H, EVEN: tl.constexpr, REACH: tl.constexpr, ROWS: tl.constexpr
):
    """`window_count` of row ``top + offset`` of a strip; a constant where no window reaches the border."""
    if EVEN and offset >= REACH and offset + REACH < ROWS:
        return tl.full(top.shape, 2 * REACH + 1, tl.float32)
    else:
        return window_count(top + offset, H, REACH)


@triton.jit
def row_mask(ok, top, offset: tl.constexpr, H, EVEN: tl.constexpr, ROWS: tl.constexpr):
    """Which lanes have a row ``top + offset``; ``ok``: which lanes exist."""
    if offset < 0:
        return ok & (top >= -offset)[:, None]
    elif offset >= ROWS or not EVEN:
        return ok & (top + offset < H)[:, None]
    else:
        return ok


@triton.jit
def _load_shifted(ptr, ok, shift):
    """(value in fp32, value - shift); ``shift`` may be None. The second is 0 in a masked lane."""
    if shift is None:
        value = tl.load(ptr, mask=ok, other=0.0).to(tl.float32)
        return value, value
    else:
        value = tl.load(ptr, mask=ok, other=shift)
        return value, value - shift


@triton.jit
def _row_sum(ptr, ok, w, W, column_stride, shift, vertical, REACH: tl.constexpr):
    """(centre, sum over the window's pixels in one row) of each lane.

    For the adjoint pool each pixel is divided by the size of the window around it: ``vertical`` is 1 / its
    rows. For the pool itself ``vertical`` is None.
    """
    centre, total = _load_shifted(ptr, ok, shift)
    if vertical is not None:
        total *= (vertical / window_count(w, W, REACH))[:, None]
    for j in tl.static_range(1, REACH + 1):
        left = _load_shifted(ptr - j * column_stride, ok & (w >= j)[:, None], shift)[1]
        right = _load_shifted(ptr + j * column_stride, ok & (w + j < W)[:, None], shift)[1]
        if vertical is None:
            total += left + right
        else:
            total += left * (vertical / window_count(w - j, W, REACH))[:, None]
            total += right * (vertical / window_count(w + j, W, REACH))[:, None]
    return centre, total


@triton.jit
def _window_sum(
    ptr, ok, h, w, H, W, row_stride, column_stride, shift, ADJOINT: tl.constexpr, REACH: tl.constexpr
):
    """(centre, sum over the window) of each lane, for pools too large to unroll."""
    centre, total = _load_shifted(ptr, ok, shift)
    total = tl.zeros(centre.shape, tl.float32)
    for i in range(-REACH, REACH + 1):
        for j in range(-REACH, REACH + 1):
            inside = (h + i >= 0) & (h + i < H) & (w + j >= 0) & (w + j < W)
            value = _load_shifted(ptr + i * row_stride + j * column_stride, ok & inside[:, None], shift)[1]
            if ADJOINT:
                value /= (window_count(h + i, H, REACH) * window_count(w + j, W, REACH))[:, None]
            total += value
    return centre, total


@triton.jit
def advance_window(
    rows, ptr, ok, top, w, H, W, row_stride, column_stride, shift, r: tl.constexpr,
    ADJOINT: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, ROLLED: tl.constexpr,
):  # fmt: skip
    """Of row ``r`` of the strip: (the pixels, the sums over their windows, the rows read so far).

    Must be called for r = 0, 1, … in turn. ``rows``, () at first, holds what `_row_sum` returned for each row
    that was read; ``shift`` is subtracted from each pixel of the sums. ADJOINT: sums of the adjoint pool.
    """
    REACH: tl.constexpr = POOL // 2
    if ROLLED:
        for i in tl.static_range(-REACH if r == 0 else REACH, REACH + 1):
            vertical = 1.0 / row_window_count(top, r + i, H, EVEN, REACH, ROWS) if ADJOINT else None
            exists = row_mask(ok, top, r + i, H, EVEN, ROWS)
            row_ptr = ptr + (r + i) * row_stride
            rows = rows + (_row_sum(row_ptr, exists, w, W, column_stride, shift, vertical, REACH),)  # noqa: RUF005
        total = rows[r][1]
        for i in tl.static_range(1, POOL):
            total += rows[r + i][1]
        return rows[r + REACH][0], total, rows
    else:
        exists = row_mask(ok, top, r, H, EVEN, ROWS)
        row_ptr = ptr + r * row_stride
        centre, total = _window_sum(
            row_ptr, exists, top + r, w, H, W, row_stride, column_stride, shift, ADJOINT, REACH
        )
        return centre, total, rows


@triton.jit
def tile_lanes(
    pid, H, W, tiles, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the lanes of program ``pid`` are.

    Returns the sample, its tile, the channels and which of them exist, the strips' top rows and the image
    columns, which lanes exist, the offsets of their top pixels from the sample's first element, the offset of
    that element, and the strides of rows and of columns.
    """
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
