"""The token mixer in Triton: kernels, then launchers. Formulas: algebra, "Token mixer sub-block".

fp32 differences are taken after subtracting the sample's mean, exact for nearby numbers, so a constant image
gives exactly zero; sums of 8- and 11-bit halves need no shift to be exact in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import memory_format_of
from .config import MAX_ROLLED_POOL, OPTIONS, ROWS, next_power_of_2, plan
from .device import aligned
from .statistics import few, flat_stats, merged
from .tile import advance, lanes, rounded, row_ok, row_taps, scalar, taps, vector

__all__ = ["backward", "forward"]


@triton.jit(do_not_specialize=["H", "W", "tiles", "T"])
def pool_mixer_fwd(
    x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, drop_ptr, stats_ptr, mean_rstd_ptr, y_stats_ptr,
    H, W, tiles, T, eps, C: tl.constexpr, POOL: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ROLLED: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """y of one tile, and the partial statistics of the rounded y where ``y_stats_ptr`` is given."""
    REACH: tl.constexpr = POOL // 2
    b, tile, c, c_ok, top, w, ok, offsets, base, row_stride, column_stride = lanes(
        H, W, tiles, C, CHANNELS_LAST, COLUMNS, CHANNELS, ROWS, WIDE
    )
    mean, variance = merged(stats_ptr, b, T, MERGE)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    if tile == 0:
        tl.store(mean_rstd_ptr + b * 2, mean)
        tl.store(mean_rstd_ptr + b * 2 + 1, rstd)
    gamma = vector(weight_ptr, c, c_ok)
    poison = (
        gamma  # an infinite gamma or beta is infinity minus infinity in eager: 0 * inf carries the NaN over
    )
    if bias_ptr is not None:
        poison += vector(bias_ptr, c, c_ok)
    gain = (gamma + 0.0 * poison) * vector(scale_ptr, c, c_ok) * (scalar(drop_ptr, b) * rstd)

    x_ptr += base
    y_ptr += base
    shift = mean if x_ptr.dtype.element_ty == tl.float32 else None
    horizontal = taps(w, W, REACH)
    # y's mean is x's to within a deviation, or about 0 in the plain form: sums of squares about this origin
    # lose next to nothing when their mean is taken out.
    origin = mean if RESIDUAL else 0.0
    s1 = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    s2 = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    rows = ()
    for r in tl.static_range(ROWS):
        x, total, rows = advance(
            rows, x_ptr + offsets, ok, top, w, H, W, row_stride, column_stride, shift, r,
            False, POOL, ROWS, EVEN, ROLLED,
        )  # fmt: skip
        size = (row_taps(top, r, H, EVEN, REACH, ROWS) * horizontal)[:, None]
        centre = x if shift is None else x - shift
        mixed = tl.fma(-size, centre, total) * (1.0 / size) * gain[None, :]
        y = rounded(x + mixed if RESIDUAL else mixed, y_ptr.dtype.element_ty)
        exists = row_ok(ok, top, r, H, EVEN, ROWS)
        tl.store(y_ptr + offsets + r * row_stride, y, mask=exists)
        if y_stats_ptr is not None:
            value = y.to(tl.float32) - origin
            if not EVEN:
                value = tl.where(exists, value, 0.0)
            s1 += value
            s2 += value * value

    if y_stats_ptr is not None:
        height = tl.where(top < H, tl.minimum(H - top, ROWS), 0).to(tl.float32)
        count = tl.sum(height) * tl.minimum(C - tl.min(c), CHANNELS).to(tl.float32)
        total = tl.sum(tl.where(ok, s1, 0.0))
        square = tl.sum(tl.where(ok, s2, 0.0)) - total * (total / count)
        out = y_stats_ptr + tl.program_id(0).to(tl.int64) * 3
        tl.store(out, count)
        tl.store(out + 1, origin + total / count)
        tl.store(out + 2, tl.where(square < 0.0, 0.0, square))


@triton.jit(do_not_specialize=["H", "W", "tiles"])
def pool_mixer_bwd_reduce(
    grad_ptr, x_ptr, mean_rstd_ptr, partial_ptr, H, W, tiles, C: tl.constexpr, POOL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ROLLED: tl.constexpr,
):  # fmt: skip
    """Per tile and channel ``sum g (Px - x)`` = q / rstd; with the pool on x the mean drops out."""
    REACH: tl.constexpr = POOL // 2
    b, tile, c, c_ok, top, w, ok, offsets, base, row_stride, column_stride = lanes(
        H, W, tiles, C, CHANNELS_LAST, COLUMNS, CHANNELS, ROWS, WIDE
    )
    x_ptr += base
    grad_ptr += base
    shift = tl.load(mean_rstd_ptr + b * 2) if x_ptr.dtype.element_ty == tl.float32 else None
    horizontal = taps(w, W, REACH)
    q = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    rows = ()
    for r in tl.static_range(ROWS):
        exists = row_ok(ok, top, r, H, EVEN, ROWS)
        grad = tl.load(grad_ptr + offsets + r * row_stride, mask=exists, other=0.0).to(tl.float32)
        x, total, rows = advance(
            rows, x_ptr + offsets, ok, top, w, H, W, row_stride, column_stride, shift, r,
            False, POOL, ROWS, EVEN, ROLLED,
        )  # fmt: skip
        size = (row_taps(top, r, H, EVEN, REACH, ROWS) * horizontal)[:, None]
        centre = x if shift is None else x - shift
        q += grad * (tl.fma(-size, centre, total) * (1.0 / size))
    channel_tiles: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    row = b * (tiles // channel_tiles) + tile // channel_tiles
    tl.store(partial_ptr + row * C + c, tl.sum(q, 0), mask=c_ok)


@triton.jit(do_not_specialize=["N", "T"])
def pool_mixer_bwd_sample(
    partial_ptr, mean_rstd_ptr, weight_ptr, scale_ptr, drop_ptr, q_ptr, k_ptr, ddrop_ptr, N, T,
    C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one sample: q [C] from its partials, k (for GroupNorm's backward) and drop_scale's gradient."""
    b = tl.program_id(0).to(tl.int64)
    rstd = tl.load(mean_rstd_ptr + b * 2 + 1)
    ddrop = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        q = tl.zeros([BLOCK, CHANNELS], tl.float32)
        t0 = 0
        while t0 < T:
            t = t0 + tl.arange(0, BLOCK)
            ok = (t < T)[:, None] & (c < C)[None, :]
            q += tl.load(partial_ptr + (b * T + t)[:, None] * C + c[None, :], mask=ok, other=0.0)
            t0 += BLOCK
        q_c = tl.sum(q, 0) * rstd
        tl.store(q_ptr + b * C + c, q_c, mask=c < C)
        ddrop += vector(weight_ptr, c, c < C) * vector(scale_ptr, c, c < C) * tl.where(c < C, q_c, 0.0)
    total = tl.sum(ddrop)
    tl.store(ddrop_ptr + b, total)
    tl.store(k_ptr + b, total * scalar(drop_ptr, b) / N)


@triton.jit(do_not_specialize=["B"])
def pool_mixer_bwd_params(
    q_ptr, weight_ptr, scale_ptr, drop_ptr, dweight_ptr, dscale_ptr, B, C: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight's and layer_scale's gradients: ``Q = sum_b d_b q_b`` in the order of the samples."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    q = tl.zeros([BLOCK, CHANNELS], tl.float32)
    b0 = 0
    while b0 < B:
        b = b0 + tl.arange(0, BLOCK).to(tl.int64)
        ok = (b < B)[:, None] & (c < C)[None, :]
        row = tl.load(q_ptr + b[:, None] * C + c[None, :], mask=ok, other=0.0)
        q += row * vector(drop_ptr, b, b < B)[:, None]
        b0 += BLOCK
    total = tl.sum(q, 0)
    tl.store(dweight_ptr + c, total * vector(scale_ptr, c, c < C), mask=c < C)
    tl.store(dscale_ptr + c, total * vector(weight_ptr, c, c < C), mask=c < C)


@triton.jit(do_not_specialize=["H", "W", "tiles"])
def pool_mixer_bwd_dx(
    grad_ptr, x_ptr, mean_rstd_ptr, k_ptr, weight_ptr, scale_ptr, drop_ptr, dx_ptr,
    H, W, tiles, C: tl.constexpr, POOL: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ROLLED: tl.constexpr,
):  # fmt: skip
    """``dx = g + r (gamma a e - xhat k)``, ``e = P^T g - g``; without the first g if there is no residual."""
    b, _, c, c_ok, top, w, ok, offsets, base, row_stride, column_stride = lanes(
        H, W, tiles, C, CHANNELS_LAST, COLUMNS, CHANNELS, ROWS, WIDE
    )
    mean = tl.load(mean_rstd_ptr + b * 2)
    rstd = tl.load(mean_rstd_ptr + b * 2 + 1)
    correction = tl.load(k_ptr + b) * rstd * rstd
    gain = vector(weight_ptr, c, c_ok) * vector(scale_ptr, c, c_ok) * (scalar(drop_ptr, b) * rstd)
    grad_ptr += base
    x_ptr += base
    dx_ptr += base
    rows = ()
    for r in tl.static_range(ROWS):
        exists = row_ok(ok, top, r, H, EVEN, ROWS)
        x = tl.load(x_ptr + offsets + r * row_stride, mask=exists, other=0.0).to(tl.float32)
        grad, total, rows = advance(
            rows, grad_ptr + offsets, ok, top, w, H, W, row_stride, column_stride, None, r,
            True, POOL, ROWS, EVEN, ROLLED,
        )  # fmt: skip
        dx = (total - grad) * gain[None, :] - (x - mean) * correction
        if RESIDUAL:
            dx += grad
        tl.store(dx_ptr + offsets + r * row_stride, rounded(dx, dx_ptr.dtype.element_ty), mask=exists)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    stats: Tensor | None,
    pool_size: int,
    eps: float,
    residual: bool,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``pool_mixer_triton``: y, (mean, rstd) of x ``[B, 2]``, partials of y ``[B, T, 3]`` or empty."""
    if _elsewhere(x):
        with torch.cuda.device_of(x):
            return forward(
                x, weight, bias, layer_scale, drop_scale, stats, pool_size, eps, residual, return_stats
            )
    batch, channels, height, width = x.shape
    fmt = memory_format_of(x)
    channels_last = fmt is torch.channels_last
    x = x.contiguous(memory_format=fmt)
    p = plan(channels, height, width, channels_last, pool_size, x.element_size(), aligned(x))
    y = torch.empty_like(x, memory_format=fmt)
    mean_rstd = torch.empty((batch, 2), dtype=torch.float32, device=x.device)
    shape = (batch, p.tiles, 3) if return_stats else (0,)
    y_stats = torch.empty(shape, dtype=torch.float32, device=x.device)
    if batch == 0:
        return y, mean_rstd, y_stats
    stats = few(flat_stats(x) if stats is None else stats.contiguous())
    partials = stats.shape[1]
    pool_mixer_fwd[(batch * p.tiles,)](
        x, y, _dense(weight), _dense(bias), _dense(layer_scale), _dense(drop_scale), stats, mean_rstd,
        y_stats if return_stats else None,
        height, width, p.tiles, partials, eps, channels, p.pool, residual, channels_last,
        p.columns, p.channels, ROWS, p.even, p.wide, p.pool <= MAX_ROLLED_POOL, next_power_of_2(partials),
        num_warps=p.warps, maxnreg=p.registers, **OPTIONS,
    )  # fmt: skip
    return y, mean_rstd, y_stats


def backward(
    grad: Tensor,
    x: Tensor,
    mean_rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    pool_size: int,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``pool_mixer_triton_backward``: dx, dweight and dlayer_scale ``[C]``, ddrop_scale ``[B]``."""
    if _elsewhere(x):
        with torch.cuda.device_of(x):
            return backward(grad, x, mean_rstd, weight, bias, layer_scale, drop_scale, pool_size, residual)
    batch, channels, height, width = x.shape
    fmt = memory_format_of(x)
    channels_last = fmt is torch.channels_last
    x, grad = x.contiguous(memory_format=fmt), grad.contiguous(memory_format=fmt)
    p = plan(channels, height, width, channels_last, pool_size, x.element_size(), aligned(x, grad))
    dx = torch.empty_like(x, memory_format=fmt)
    vectors = {"dtype": torch.float32, "device": x.device}
    if batch == 0:
        return (
            dx,
            torch.zeros(channels, **vectors),
            torch.zeros(channels, **vectors),
            torch.empty(0, **vectors),
        )
    dweight, dscale = torch.empty(channels, **vectors), torch.empty(channels, **vectors)
    ddrop, k = torch.empty(batch, **vectors), torch.empty(batch, **vectors)
    partial = torch.empty((batch, p.reduce_column_tiles, channels), **vectors)
    q = torch.empty((batch, channels), **vectors)
    mean_rstd = mean_rstd.contiguous()
    weight, scale, drop = _dense(weight), _dense(layer_scale), _dense(drop_scale)
    strip = (ROWS, p.even, p.wide, p.pool <= MAX_ROLLED_POOL)
    tiles = p.reduce_column_tiles * triton.cdiv(channels, p.channels)
    pool_mixer_bwd_reduce[(batch * tiles,)](
        grad, x, mean_rstd, partial, height, width, tiles, channels, p.pool, channels_last,
        p.reduce_columns, p.channels, *strip, num_warps=p.reduce_warps, maxnreg=255, **OPTIONS,
    )  # fmt: skip
    block = min(next_power_of_2(channels), 128)
    pool_mixer_bwd_sample[(batch,)](
        partial, mean_rstd, weight, scale, drop, q, k, ddrop, x[0].numel(), p.reduce_column_tiles, channels,
        block, min(next_power_of_2(p.reduce_column_tiles), 16), **OPTIONS,
    )  # fmt: skip
    block = min(next_power_of_2(channels), 32)
    pool_mixer_bwd_params[(triton.cdiv(channels, block),)](
        q, weight, scale, drop, dweight, dscale, batch, channels, block, 64, **OPTIONS
    )
    pool_mixer_bwd_dx[(batch * p.tiles,)](
        grad, x, mean_rstd, k, weight, scale, drop, dx, height, width, p.tiles, channels, p.pool, residual,
        channels_last, p.columns, p.channels, *strip, num_warps=p.warps, maxnreg=p.registers, **OPTIONS,
    )  # fmt: skip
    return dx, dweight, dscale, ddrop


def _elsewhere(x: Tensor) -> bool:
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def _dense(p: Tensor | None) -> Tensor | None:
    return p if p is None else p.contiguous()
