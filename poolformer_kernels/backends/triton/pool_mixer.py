"""The token mixer in Triton: kernels, then launchers. Formulas: docs/algebra.md, "Token mixer".

An fp32 x has the sample's mean subtracted before it is pooled. That is exact for numbers near the mean, so a
constant image gives exactly zero. Sums of bfloat16 and float16, which have 8 and 11 bits, are exact in fp32
without it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import memory_format_of
from .config import (
    MAX_ROLLED_POOL,
    OPTIONS,
    PARAMS_CHANNELS,
    PARAMS_SAMPLES,
    ROWS,
    SAMPLE_CHANNELS,
    SAMPLE_PARTIALS,
    ceil_div,
    mixer_launch,
    next_power_of_2,
)
from .device import aligned, on_another_device
from .launch import kernel
from .statistics import limit_partials, merge_partials, tensor_partials
from .tile import (
    advance_window,
    load_or_one,
    load_scalar_or_one,
    round_to,
    row_mask,
    row_window_count,
    tile_lanes,
    window_count,
)

__all__ = ["backward", "forward"]


@kernel(do_not_specialize=["H", "W", "tiles", "T"])
def pool_mixer_fwd(
    x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, drop_ptr, stats_ptr, mean_rstd_ptr, y_stats_ptr,
    H, W, tiles, T, eps, C: tl.constexpr, POOL: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ROLLED: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """y of one tile, and the partial statistics of the rounded y.

    x_ptr: x [B, C, H, W], NCHW or channels_last
    y_ptr: output, like x
    weight_ptr, bias_ptr: GroupNorm's weight and bias [C], or None
    scale_ptr, drop_ptr: LayerScale [C] and drop scale [B], or None
    stats_ptr: partials of x [B, T, 3], fp32
    mean_rstd_ptr: output (mean, rstd) of x [B, 2], fp32
    y_stats_ptr: output partials of y [B, tiles, 3], fp32, or None
    H, W: pixels of an image
    tiles: tiles of a sample
    T: partials of a sample of x
    eps: GroupNorm's epsilon
    C: channels
    POOL: pool size
    RESIDUAL: whether x is added
    CHANNELS_LAST: the layout
    COLUMNS, CHANNELS: columns and channels of a tile
    ROWS: pixels of a column
    EVEN: whether ROWS divides H
    WIDE: whether offsets inside a sample need 64 bits
    ROLLED: whether the window rolls down the strip, unrolled at compile time; else each is looped over
    MERGE: a power of two, at least T
    """
    REACH: tl.constexpr = POOL // 2
    b, tile, c, c_ok, top, w, ok, offsets, base, row_stride, column_stride = tile_lanes(
        tl.program_id(0), H, W, tiles, C, CHANNELS_LAST, COLUMNS, CHANNELS, ROWS, WIDE
    )
    mean, variance = merge_partials(stats_ptr, b, T, MERGE)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    if tile == 0:
        tl.store(mean_rstd_ptr + b * 2, mean)
        tl.store(mean_rstd_ptr + b * 2 + 1, rstd)
    gamma = load_or_one(weight_ptr, c, c_ok)
    # With an infinite gamma or beta eager PyTorch subtracts infinity from infinity. 0 * inf is that NaN too.
    poison = gamma
    if bias_ptr is not None:
        poison += load_or_one(bias_ptr, c, c_ok)
    gain = (gamma + 0.0 * poison) * load_or_one(scale_ptr, c, c_ok) * (load_scalar_or_one(drop_ptr, b) * rstd)

    x_ptr += base
    y_ptr += base
    shift = mean if x_ptr.dtype.element_ty == tl.float32 else None
    horizontal = window_count(w, W, REACH)
    # The mean of y is within a standard deviation of x's, or about 0 without the residual. So sums of squares
    # about this origin lose next to no digits when M2 is computed from them.
    origin = mean if RESIDUAL else 0.0
    s1 = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    s2 = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    rows = ()
    for r in tl.static_range(ROWS):
        x, total, rows = advance_window(
            rows, x_ptr + offsets, ok, top, w, H, W, row_stride, column_stride, shift, r,
            False, POOL, ROWS, EVEN, ROLLED,
        )  # fmt: skip
        size = (row_window_count(top, r, H, EVEN, REACH, ROWS) * horizontal)[:, None]
        centre = x if shift is None else x - shift
        mixed = tl.fma(-size, centre, total) * (1.0 / size) * gain[None, :]
        y = round_to(x + mixed if RESIDUAL else mixed, y_ptr.dtype.element_ty)
        exists = row_mask(ok, top, r, H, EVEN, ROWS)
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


@kernel(do_not_specialize=["H", "W", "tiles"])
def pool_mixer_bwd_reduce(
    grad_ptr, x_ptr, mean_rstd_ptr, partial_ptr, H, W, tiles, C: tl.constexpr, POOL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ROLLED: tl.constexpr,
):  # fmt: skip
    """``sum g (P x - x)`` over the pixels of a tile, for each channel: its part of q / rstd.

    P is applied to x, not its adjoint to g, because the mean of x then cancels.

    grad_ptr: gradient of y [B, C, H, W], in x's layout
    x_ptr: x [B, C, H, W], NCHW or channels_last
    mean_rstd_ptr: (mean, rstd) of x [B, 2], fp32
    partial_ptr: output [B, column tiles, C], fp32
    H, W: pixels of an image
    tiles: tiles of a sample
    C, POOL, CHANNELS_LAST, COLUMNS, CHANNELS, ROWS, EVEN, WIDE, ROLLED: as in `pool_mixer_fwd`
    """
    REACH: tl.constexpr = POOL // 2
    b, tile, c, c_ok, top, w, ok, offsets, base, row_stride, column_stride = tile_lanes(
        tl.program_id(0), H, W, tiles, C, CHANNELS_LAST, COLUMNS, CHANNELS, ROWS, WIDE
    )
    x_ptr += base
    grad_ptr += base
    shift = tl.load(mean_rstd_ptr + b * 2) if x_ptr.dtype.element_ty == tl.float32 else None
    horizontal = window_count(w, W, REACH)
    q = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    rows = ()
    for r in tl.static_range(ROWS):
        exists = row_mask(ok, top, r, H, EVEN, ROWS)
        grad = tl.load(grad_ptr + offsets + r * row_stride, mask=exists, other=0.0).to(tl.float32)
        x, total, rows = advance_window(
            rows, x_ptr + offsets, ok, top, w, H, W, row_stride, column_stride, shift, r,
            False, POOL, ROWS, EVEN, ROLLED,
        )  # fmt: skip
        size = (row_window_count(top, r, H, EVEN, REACH, ROWS) * horizontal)[:, None]
        centre = x if shift is None else x - shift
        q += grad * (tl.fma(-size, centre, total) * (1.0 / size))
    channel_tiles: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    row = b * (tiles // channel_tiles) + tile // channel_tiles
    tl.store(partial_ptr + row * C + c, tl.sum(q, 0), mask=c_ok)


@kernel(do_not_specialize=["N", "T"])
def pool_mixer_bwd_sample(
    partial_ptr, mean_rstd_ptr, weight_ptr, scale_ptr, drop_ptr, q_ptr, k_ptr, ddrop_ptr, N, T,
    C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one sample: q, the k of GroupNorm's backward, and drop_scale's gradient.

    partial_ptr: partials of q / rstd [B, T, C], fp32
    mean_rstd_ptr: (mean, rstd) of x [B, 2], fp32
    weight_ptr: GroupNorm's weight [C], or None
    scale_ptr, drop_ptr: LayerScale [C] and drop scale [B], or None
    q_ptr: output [B, C], fp32
    k_ptr, ddrop_ptr: outputs [B], k in fp32
    N: elements of a sample
    T: partials of a sample
    C: channels
    CHANNELS, BLOCK: channels and partials that are loaded at a time
    """
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
        ddrop += (
            load_or_one(weight_ptr, c, c < C) * load_or_one(scale_ptr, c, c < C) * tl.where(c < C, q_c, 0.0)
        )
    total = tl.sum(ddrop)
    tl.store(ddrop_ptr + b, round_to(total, ddrop_ptr.dtype.element_ty))
    tl.store(k_ptr + b, total * load_scalar_or_one(drop_ptr, b) / N)


@triton.jit
def _parameters(
    pid, q_ptr, weight_ptr, scale_ptr, drop_ptr, dweight_ptr, dbias_ptr, dscale_ptr, B, C: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters for CHANNELS channels, from ``Q = sum_b d_b q_b`` in a fixed order."""
    c = pid * CHANNELS + tl.arange(0, CHANNELS)
    q = tl.zeros([BLOCK, CHANNELS], tl.float32)
    b0 = 0
    while b0 < B:
        b = b0 + tl.arange(0, BLOCK).to(tl.int64)
        ok = (b < B)[:, None] & (c < C)[None, :]
        row = tl.load(q_ptr + b[:, None] * C + c[None, :], mask=ok, other=0.0)
        q += row * load_or_one(drop_ptr, b, b < B)[:, None]
        b0 += BLOCK
    total = tl.sum(q, 0)
    dweight = total * load_or_one(scale_ptr, c, c < C)
    dscale = total * load_or_one(weight_ptr, c, c < C)
    tl.store(dweight_ptr + c, round_to(dweight, dweight_ptr.dtype.element_ty), mask=c < C)
    tl.store(dscale_ptr + c, round_to(dscale, dscale_ptr.dtype.element_ty), mask=c < C)
    if dbias_ptr is not None:  # P - I cancels constants
        tl.store(dbias_ptr + c, tl.zeros([CHANNELS], dbias_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _dx(
    pid, grad_ptr, x_ptr, mean_rstd_ptr, k_ptr, weight_ptr, scale_ptr, drop_ptr, dx_ptr, H, W, tiles,
    C: tl.constexpr, POOL: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ROLLED: tl.constexpr,
):  # fmt: skip
    """dx of one tile: ``g + r (gamma s d e - x_hat k)``, ``e = P^T g - g``; without RESIDUAL no first g."""
    b, _, c, c_ok, top, w, ok, offsets, base, row_stride, column_stride = tile_lanes(
        pid, H, W, tiles, C, CHANNELS_LAST, COLUMNS, CHANNELS, ROWS, WIDE
    )
    mean = tl.load(mean_rstd_ptr + b * 2)
    rstd = tl.load(mean_rstd_ptr + b * 2 + 1)
    correction = tl.load(k_ptr + b) * rstd * rstd
    gain = (
        load_or_one(weight_ptr, c, c_ok)
        * load_or_one(scale_ptr, c, c_ok)
        * (load_scalar_or_one(drop_ptr, b) * rstd)
    )
    grad_ptr += base
    x_ptr += base
    dx_ptr += base
    rows = ()
    for r in tl.static_range(ROWS):
        exists = row_mask(ok, top, r, H, EVEN, ROWS)
        x = tl.load(x_ptr + offsets + r * row_stride, mask=exists, other=0.0).to(tl.float32)
        grad, total, rows = advance_window(
            rows, grad_ptr + offsets, ok, top, w, H, W, row_stride, column_stride, None, r,
            True, POOL, ROWS, EVEN, ROLLED,
        )  # fmt: skip
        dx = (total - grad) * gain[None, :] - (x - mean) * correction
        if RESIDUAL:
            dx += grad
        tl.store(dx_ptr + offsets + r * row_stride, round_to(dx, dx_ptr.dtype.element_ty), mask=exists)


@kernel(do_not_specialize=["H", "W", "tiles", "B"])
def pool_mixer_bwd_dx(
    grad_ptr, x_ptr, mean_rstd_ptr, k_ptr, q_ptr, weight_ptr, scale_ptr, drop_ptr, dx_ptr, dweight_ptr,
    dbias_ptr, dscale_ptr, H, W, tiles, B, C: tl.constexpr, POOL: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ROLLED: tl.constexpr, PARAMETERS: tl.constexpr,
    PARAMETER_CHANNELS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """The first PARAMETERS programs compute the parameters' gradients, each of the others dx of one tile.

    grad_ptr: gradient of y [B, C, H, W], in x's layout
    x_ptr: x [B, C, H, W], NCHW or channels_last
    mean_rstd_ptr: (mean, rstd) of x [B, 2], fp32
    k_ptr, q_ptr: k [B] and q [B, C] of `pool_mixer_bwd_sample`, fp32
    weight_ptr: GroupNorm's weight [C], or None
    scale_ptr, drop_ptr: LayerScale [C] and drop scale [B], or None
    dx_ptr: output, like x
    dweight_ptr, dscale_ptr: outputs [C]: the gradients of GroupNorm's weight and of LayerScale
    dbias_ptr: output [C], zeros: the gradient of GroupNorm's bias; or None
    H, W, B: pixels of an image, samples
    tiles: tiles of a sample
    RESIDUAL: whether x was added to y
    C, POOL, CHANNELS_LAST, COLUMNS, CHANNELS, ROWS, EVEN, WIDE, ROLLED: as in `pool_mixer_fwd`
    PARAMETERS, PARAMETER_CHANNELS: programs for the parameters, channels of one of them
    SAMPLES: samples that it loads at a time
    """
    pid = tl.program_id(0)
    if pid < PARAMETERS:
        _parameters(
            pid, q_ptr, weight_ptr, scale_ptr, drop_ptr, dweight_ptr, dbias_ptr, dscale_ptr, B, C,
            PARAMETER_CHANNELS, SAMPLES,
        )  # fmt: skip
    else:
        _dx(
            pid - PARAMETERS, grad_ptr, x_ptr, mean_rstd_ptr, k_ptr, weight_ptr, scale_ptr, drop_ptr, dx_ptr,
            H, W, tiles, C, POOL, RESIDUAL, CHANNELS_LAST, COLUMNS, CHANNELS, ROWS, EVEN, WIDE, ROLLED,
        )  # fmt: skip


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
    if on_another_device(x):
        with torch.cuda.device_of(x):
            return forward(
                x, weight, bias, layer_scale, drop_scale, stats, pool_size, eps, residual, return_stats
            )
    batch, channels, height, width = x.shape
    fmt = memory_format_of(x)
    channels_last = fmt is torch.channels_last
    x = x.contiguous(memory_format=fmt)
    launch = mixer_launch(channels, height, width, channels_last, pool_size, x.element_size(), aligned(x))
    y = torch.empty_like(x, memory_format=fmt)
    mean_rstd = torch.empty((batch, 2), dtype=torch.float32, device=x.device)
    shape = (batch, launch.tiles, 3) if return_stats else (0,)
    y_stats = torch.empty(shape, dtype=torch.float32, device=x.device)
    if batch == 0:
        return y, mean_rstd, y_stats
    stats = limit_partials(tensor_partials(x) if stats is None else stats.contiguous())
    partials = stats.shape[1]
    pool_mixer_fwd[(batch * launch.tiles,)](
        x, y, _dense(weight), _dense(bias), _dense(layer_scale), _dense(drop_scale), stats, mean_rstd,
        y_stats if return_stats else None,
        height, width, launch.tiles, partials, eps, channels, launch.pool, residual, channels_last,
        launch.columns, launch.channels, ROWS, launch.even, launch.wide, launch.pool <= MAX_ROLLED_POOL,
        next_power_of_2(partials), num_warps=launch.warps, maxnreg=launch.registers, **OPTIONS,
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
) -> tuple[Tensor, ...]:
    """The op ``pool_mixer_triton_backward``: dx, dweight, dbias, dlayer_scale ``[C]``, ddrop_scale ``[B]``.

    Each is of the dtype of what it belongs to, or float32 where that is None.
    """
    if on_another_device(x):
        with torch.cuda.device_of(x):
            return backward(grad, x, mean_rstd, weight, bias, layer_scale, drop_scale, pool_size, residual)
    batch, channels, height, width = x.shape
    fmt = memory_format_of(x)
    channels_last = fmt is torch.channels_last
    x, grad = x.contiguous(memory_format=fmt), grad.contiguous(memory_format=fmt)
    launch = mixer_launch(
        channels, height, width, channels_last, pool_size, x.element_size(), aligned(x, grad)
    )
    dx = torch.empty_like(x, memory_format=fmt)
    vectors = {"dtype": torch.float32, "device": x.device}
    create = torch.empty if batch else torch.zeros
    dweight, dbias, dscale, ddrop = (
        create(size, dtype=torch.float32 if p is None else p.dtype, device=x.device)
        for p, size in ((weight, channels), (bias, channels), (layer_scale, channels), (drop_scale, batch))
    )
    if batch == 0:
        return dx, dweight, dbias, dscale, ddrop
    partial = torch.empty((batch, launch.reduce_column_tiles, channels), **vectors)
    k, q = torch.empty(batch, **vectors), torch.empty((batch, channels), **vectors)
    mean_rstd = mean_rstd.contiguous()
    weight, scale, drop = _dense(weight), _dense(layer_scale), _dense(drop_scale)
    strip = (ROWS, launch.even, launch.wide, launch.pool <= MAX_ROLLED_POOL)
    tiles = launch.reduce_column_tiles * ceil_div(channels, launch.channels)
    pool_mixer_bwd_reduce[(batch * tiles,)](
        grad, x, mean_rstd, partial, height, width, tiles, channels, launch.pool, channels_last,
        launch.reduce_columns, launch.channels, *strip, num_warps=launch.reduce_warps, maxnreg=255, **OPTIONS,
    )  # fmt: skip
    pool_mixer_bwd_sample[(batch,)](
        partial, mean_rstd, weight, scale, drop, q, k, ddrop, x[0].numel(), launch.reduce_column_tiles,
        channels, min(next_power_of_2(channels), SAMPLE_CHANNELS),
        min(next_power_of_2(launch.reduce_column_tiles), SAMPLE_PARTIALS), **OPTIONS,
    )  # fmt: skip
    block = min(next_power_of_2(channels), PARAMS_CHANNELS)
    programs = ceil_div(channels, block)
    pool_mixer_bwd_dx[(programs + batch * launch.tiles,)](
        grad, x, mean_rstd, k, q, weight, scale, drop, dx, dweight, dbias, dscale, height, width,
        launch.tiles, batch, channels, launch.pool, residual, channels_last, launch.columns, launch.channels,
        *strip, programs, block, PARAMS_SAMPLES * launch.warps, num_warps=launch.warps,
        maxnreg=launch.registers, **OPTIONS,
    )  # fmt: skip
    return dx, dweight, dbias, dscale, ddrop


def _dense(p: Tensor | None) -> Tensor | None:
    return p if p is None else p.contiguous()
