"""The MLP's forward in Triton: kernels, then the launcher. Formulas: docs/algebra.md, "MLP".

Tokens are rows ``[B H W, C]`` of channels_last data, numbered through all samples: a tile of them may hold
the end of one sample and the start of the next. Up to FUSED_FORWARD_CHANNELS one kernel computes everything
and the hidden activations stay in registers; above, fc1's kernel writes them (after the activation) and fc2's
reads them.
"""

from math import gcd

import torch
import triton.language as tl
from torch import Tensor

from ....layout import memory_format_of
from ..activation import activate
from ..config import OPTIONS, ceil_div, next_power_of_2, power_of_2_parts
from ..device import as_aligned, device_of, on_another_device
from ..launch import kernel
from ..statistics import limit_partials, merge_partials, tensor_partials
from ..tile import dot, load_or_zero, round_to
from .config import (
    FEW_PIXELS,
    fc1_tiles,
    fc2_tiles,
    fused_forward_tiles,
    mlp_stats_tiles,
    product_precision,
    uses_fused_forward,
)
from .forward_prepare import prepare
from .tile import load_operand, round_hidden, row_stats, store_output, store_stats, token_range

__all__ = ["forward"]


@kernel(do_not_specialize=["batch", "HW", "T", "slots"])
def mlp_fwd(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, gamma_ptr, beta_ptr, scale_ptr, drop_ptr, stats_ptr, mean_rstd_ptr,
    y_ptr, y_stats_ptr, hidden_ptr, batch, HW, T, slots, eps, C: tl.constexpr, HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C0: tl.constexpr,
    C1: tl.constexpr, SAMPLES: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one tile of tokens: norm, fc1, activation and fc2 in one, by chunks of hidden channels.

    x_ptr: x [B HW, C], channels_last
    w1_ptr, b1_ptr: fc1's weight [HIDDEN, C] in the operands' dtype, bias [HIDDEN] or None
    w2_ptr, b2_ptr: fc2's weight [C, HIDDEN] in the operands' dtype, bias [C] or None
    gamma_ptr, beta_ptr: GroupNorm's weight and bias [C], or None
    scale_ptr, drop_ptr: LayerScale [C] and drop scale [B], or None
    stats_ptr: partials of x [B, T, 3], fp32; None: no norm
    mean_rstd_ptr: output (mean, rstd) of x [B, 2], fp32; None without the norm
    y_ptr: output [B HW, C], channels_last
    y_stats_ptr: output partials of y [B, slots, 3], fp32, or None
    hidden_ptr: output of fc1 [B HW, HIDDEN] in the operands' dtype, saved for the backward, or None
    batch, HW: samples, and pixels of one
    T, slots: partials of a sample of x, and of y
    eps: GroupNorm's epsilon
    C, HIDDEN: channels of x and y, hidden channels
    ACTIVATION: its name
    RESIDUAL: whether x is added to y
    BM, BN: tokens of a tile, hidden channels of a chunk
    C0, C1: powers of two that cover C together; C1 may be 0
    SAMPLES: samples that a tile touches at most
    MERGE: a power of two, at least T
    PRECISION: how fp32 operands are multiplied, `product_precision`
    """
    OPERAND: tl.constexpr = w1_ptr.dtype.element_ty
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    NORM: tl.constexpr = stats_ptr is not None
    start, count, first, before = token_range(tl.program_id(0), batch, HW, BM)
    row = tl.arange(0, BM)
    ok = row < count
    sample = (before + row) // HW
    mean = tl.zeros([BM], tl.float32)
    rstd = tl.zeros([BM], tl.float32)
    if NORM:
        for s in tl.static_range(SAMPLES):
            b = tl.minimum(first + s, batch - 1)
            mean_b, variance = merge_partials(stats_ptr, b, T, MERGE)
            rstd_b = 1.0 / tl.sqrt_rn(variance + eps)
            mean = tl.where(sample == s, mean_b, mean)
            rstd = tl.where(sample == s, rstd_b, rstd)
            starts_here = (b == first + s) & (b * HW >= start) & (b * HW < start + BM)
            tl.store(mean_rstd_ptr + b * 2, mean_b, mask=starts_here)
            tl.store(mean_rstd_ptr + b * 2 + 1, rstd_b, mask=starts_here)

    x_ptr += start * C
    y_ptr += start * C
    x_rows = tl.minimum(row, count - 1) * C  # a row that does not exist reads the last one
    c0 = tl.arange(0, C0)
    c0_ok = c0 < C
    n0 = load_operand(x_ptr, x_rows, c0, c0_ok, mean, rstd, gamma_ptr, beta_ptr, OPERAND, NORM)
    acc0 = tl.zeros([BM, C0], tl.float32)
    if C1 > 0:
        c1 = C0 + tl.arange(0, C1)
        c1_ok = c1 < C
        n1 = load_operand(x_ptr, x_rows, c1, c1_ok, mean, rstd, gamma_ptr, beta_ptr, OPERAND, NORM)
        acc1 = tl.zeros([BM, C1], tl.float32)

    for j0 in range(0, HIDDEN, BN):
        j = j0 + tl.arange(0, BN)
        j_ok = j < HIDDEN
        w1 = w1_ptr + j[None, :] * C
        w2 = w2_ptr + j[:, None]
        h = tl.zeros([BM, BN], tl.float32)
        w = tl.load(w1 + c0[:, None], mask=c0_ok[:, None] & j_ok[None, :], other=0.0)
        h = dot(n0, w, h, PRECISION)
        if C1 > 0:
            w = tl.load(w1 + c1[:, None], mask=c1_ok[:, None] & j_ok[None, :], other=0.0)
            h = dot(n1, w, h, PRECISION)
        h += load_or_zero(b1_ptr, j, j_ok)[None, :]
        if hidden_ptr is not None:
            hidden_ptrs = hidden_ptr + start * HIDDEN + row[:, None] * HIDDEN + j[None, :]
            tl.store(hidden_ptrs, round_hidden(h, ACTIVATION, OPERAND), mask=ok[:, None] & j_ok[None, :])
        p = activate(h, ACTIVATION, EXACT)
        if HIDDEN % BN != 0:
            p = tl.where(j_ok[None, :], p, 0.0)
        p = round_to(p, OPERAND)
        v = tl.load(w2 + c0[None, :] * HIDDEN, mask=j_ok[:, None] & c0_ok[None, :], other=0.0)
        acc0 = dot(p, v, acc0, PRECISION)
        if C1 > 0:
            v = tl.load(w2 + c1[None, :] * HIDDEN, mask=j_ok[:, None] & c1_ok[None, :], other=0.0)
            acc1 = dot(p, v, acc1, PRECISION)

    drop = None
    if drop_ptr is not None:
        drop = tl.load(drop_ptr + first + sample, mask=ok, other=0.0).to(tl.float32)
    y0 = store_output(acc0, x_ptr, y_ptr, b2_ptr, scale_ptr, drop, row * C, c0, ok, c0_ok, RESIDUAL)
    y1 = None
    if C1 > 0:
        y1 = store_output(acc1, x_ptr, y_ptr, b2_ptr, scale_ptr, drop, row * C, c1, ok, c1_ok, RESIDUAL)
    else:
        c1_ok = c0_ok
    if y_stats_ptr is not None:
        y_mean, m2 = row_stats(y0, y1, c0_ok, c1_ok, C)
        store_stats(y_stats_ptr, y_mean, m2, C, sample, ok, start, first, 0, HW, slots, 1, BM, SAMPLES)


@kernel(do_not_specialize=["batch", "HW"])
def mlp_fc1(
    x_ptr, w1_ptr, b1_ptr, u_ptr, gamma_ptr, beta_ptr, mean_rstd_ptr, p_ptr, hidden_ptr, batch, HW,
    C: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p = activation(h) of one tile of tokens and hidden channels.

    x_ptr: x [B HW, C], channels_last
    w1_ptr, b1_ptr: fc1's weight [HIDDEN, C] in the operands' dtype, bias [HIDDEN] or None; with u_ptr
        the results of `mlp_prepare`
    u_ptr: the folded weight's row sums [HIDDEN], fp32; None: the norm is not folded
    gamma_ptr, beta_ptr: GroupNorm's weight and bias [C], or None
    mean_rstd_ptr: (mean, rstd) of x [B, 2], fp32; None: no norm
    p_ptr: output activations [B HW, HIDDEN] in the operands' dtype
    hidden_ptr: output of fc1 [B HW, HIDDEN] in the operands' dtype, saved for the backward, or None
    batch, HW: samples, and pixels of one
    C, HIDDEN: channels of x, hidden channels
    ACTIVATION: its name
    BM, BN, BK: tokens and hidden channels of a tile, channels of one step
    PRECISION: how fp32 operands are multiplied, `product_precision`
    """
    OPERAND: tl.constexpr = w1_ptr.dtype.element_ty
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    NORM: tl.constexpr = mean_rstd_ptr is not None
    TILES: tl.constexpr = (HIDDEN + BN - 1) // BN
    start, count, first, before = token_range(tl.program_id(0) // TILES, batch, HW, BM)
    row = tl.minimum(tl.arange(0, BM), count - 1)  # a row that does not exist reads the last one
    mean = tl.zeros([BM], tl.float32)
    rstd = tl.zeros([BM], tl.float32)
    if NORM:
        mean_ptrs = mean_rstd_ptr + (first + (before + row) // HW) * 2
        mean = tl.load(mean_ptrs)
        rstd = tl.load(mean_ptrs + 1)
    j = tl.program_id(0) % TILES * BN + tl.arange(0, BN)
    j_ok = j < HIDDEN
    w1_ptr += (j if HIDDEN % BN == 0 else tl.minimum(j, HIDDEN - 1))[None, :] * C
    x_ptr += start * C
    h = tl.zeros([BM, BN], tl.float32)
    for k in range(0, C, BK):
        c = k + tl.arange(0, BK)
        n = load_operand(
            x_ptr, row * C, c, c < C, mean, rstd, gamma_ptr, beta_ptr, OPERAND, NORM and u_ptr is None
        )
        h = dot(n, tl.load(w1_ptr + c[:, None], mask=(c < C)[:, None], other=0.0), h, PRECISION)
    if u_ptr is not None:
        h = (h - mean[:, None] * load_or_zero(u_ptr, j, j_ok)[None, :]) * rstd[:, None]
    h += load_or_zero(b1_ptr, j, j_ok)[None, :]
    row = tl.arange(0, BM)
    offsets = start * HIDDEN + row[:, None] * HIDDEN + j[None, :]
    mask = (row < count)[:, None] & j_ok[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + offsets, round_hidden(h, ACTIVATION, OPERAND), mask=mask)
    tl.store(p_ptr + offsets, round_to(activate(h, ACTIVATION, EXACT), OPERAND), mask=mask)


@kernel(do_not_specialize=["batch", "HW", "slots"])
def mlp_fc2(
    p_ptr, w2_ptr, b2_ptr, scale_ptr, drop_ptr, x_ptr, y_ptr, y_stats_ptr, batch, HW, slots,
    HIDDEN: tl.constexpr, OUT: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, SAMPLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y, N0 + N1 columns of it, and the partials of its samples.

    p_ptr: activations [B HW, HIDDEN] in the operands' dtype
    w2_ptr, b2_ptr: fc2's weight [OUT, HIDDEN] in the operands' dtype, bias [OUT] or None
    scale_ptr, drop_ptr: LayerScale [OUT] and drop scale [B], or None
    x_ptr: x [B HW, OUT], channels_last; None without the residual
    y_ptr: output [B HW, OUT], channels_last
    y_stats_ptr: output partials of y [B, slots, column tiles, 3], fp32, or None
    batch, HW: samples, and pixels of one
    slots: partials of a sample of y for each tile of columns
    HIDDEN, OUT: hidden channels, channels of y
    RESIDUAL: whether x is added to y
    BM, BK: tokens of a tile, hidden channels of one step
    N0, N1: powers of two, columns of a tile together; N1 may be 0
    SAMPLES: samples that a tile touches at most
    PRECISION: how fp32 operands are multiplied, `product_precision`
    """
    TILES: tl.constexpr = (OUT + N0 + N1 - 1) // (N0 + N1)
    column = tl.program_id(0) % TILES
    start, tokens, first, before = token_range(tl.program_id(0) // TILES, batch, HW, BM)
    row = tl.arange(0, BM)
    ok = row < tokens
    sample = (before + row) // HW
    c0 = column * (N0 + N1) + tl.arange(0, N0)
    c0_ok = c0 < OUT
    acc0 = tl.zeros([BM, N0], tl.float32)
    w0 = w2_ptr + (c0 if OUT % (N0 + N1) == 0 else tl.minimum(c0, OUT - 1))[None, :] * HIDDEN
    if N1 > 0:
        c1 = column * (N0 + N1) + N0 + tl.arange(0, N1)
        c1_ok = c1 < OUT
        acc1 = tl.zeros([BM, N1], tl.float32)
        w1 = w2_ptr + (c1 if OUT % (N0 + N1) == 0 else tl.minimum(c1, OUT - 1))[None, :] * HIDDEN
    p_ptr += start * HIDDEN
    p_rows = tl.minimum(row, tokens - 1)[:, None] * HIDDEN  # a row that does not exist reads the last one
    for k in range(0, HIDDEN, BK):
        j = k + tl.arange(0, BK)
        p = tl.load(p_ptr + p_rows + j[None, :], mask=(j < HIDDEN)[None, :], other=0.0)
        acc0 = dot(p, tl.load(w0 + j[:, None], mask=(j < HIDDEN)[:, None], other=0.0), acc0, PRECISION)
        if N1 > 0:
            acc1 = dot(p, tl.load(w1 + j[:, None], mask=(j < HIDDEN)[:, None], other=0.0), acc1, PRECISION)

    drop = None
    if drop_ptr is not None:
        drop = tl.load(drop_ptr + first + sample, mask=ok, other=0.0).to(tl.float32)
    if RESIDUAL:
        x_ptr += start * OUT
    y_ptr += start * OUT
    y0 = store_output(acc0, x_ptr, y_ptr, b2_ptr, scale_ptr, drop, row * OUT, c0, ok, c0_ok, RESIDUAL)
    y1 = None
    if N1 > 0:
        y1 = store_output(acc1, x_ptr, y_ptr, b2_ptr, scale_ptr, drop, row * OUT, c1, ok, c1_ok, RESIDUAL)
    else:
        c1_ok = c0_ok
    if y_stats_ptr is not None:
        count = tl.minimum(OUT - column * (N0 + N1), N0 + N1).to(tl.float32)
        mean, m2 = row_stats(y0, y1, c0_ok, c1_ok, count)
        store_stats(
            y_stats_ptr, mean, m2, count, sample, ok, start, first, column, HW, slots, TILES, BM, SAMPLES
        )  # fmt: skip


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    stats: Tensor | None,
    activation: str,
    eps: float,
    norm: bool,
    residual: bool,
    return_stats: bool,
    save_hidden: bool,
    operand: torch.dtype,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``mlp_triton``: y, (mean, rstd) of x ``[B, 2]``, partials of y ``[B, T, 3]``, fc1's output.

    The last three are empty (0,) where there is no norm, ``return_stats`` or ``save_hidden``; fc1's output is
    ``[B H W, hidden]`` flat, in the operands' dtype.
    """
    if on_another_device(x):
        with torch.cuda.device_of(x):
            return forward(
                x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, stats, activation, eps,
                norm, residual, return_stats, save_hidden, operand, allow_tf32,
            )  # fmt: skip
    batch, channels, height, width = x.shape
    hidden, out = w1.shape[0], w2.shape[0]
    pixels, fmt = height * width, memory_format_of(x)
    fp32 = {"dtype": torch.float32, "device": x.device}
    partials = 0
    if return_stats:
        partials = mlp_stats_tiles((batch, out, height, width), fmt == torch.channels_last, hidden)
    y = torch.empty((batch, out, height, width), dtype=x.dtype, device=x.device, memory_format=fmt)
    mean_rstd = torch.empty((batch, 2) if norm else (0,), **fp32)
    stats_by_tile = return_stats and (pixels >= FEW_PIXELS or y.numel() == 0)
    y_stats = torch.empty((batch, partials, 3) if stats_by_tile else (0,), **fp32)
    size = batch * pixels * hidden if save_hidden else 0
    saved = torch.empty((size,), dtype=operand, device=x.device)
    if y.numel() == 0:
        return y, mean_rstd, y_stats, saved

    x = as_aligned(x.contiguous(memory_format=torch.channels_last))
    last = y.is_contiguous(memory_format=torch.channels_last)  # as images of one pixel are in either layout
    y_last = y if last else torch.empty_like(y, memory_format=torch.channels_last)
    if norm:
        stats = limit_partials(tensor_partials(x) if stats is None else stats.contiguous())
    precision = product_precision(operand, allow_tf32)
    fused = uses_fused_forward(channels, out, pixels, operand.itemsize, precision)
    launch = _launch_fused if fused else _launch_pair
    w1, w2 = (as_aligned(w.flatten(1).contiguous()) for w in (w1, w2))
    launch(
        x, w1, _dense(b1), w2, _dense(b2),
        _dense(norm_weight), _dense(norm_bias), _dense(layer_scale), _dense(drop_scale), stats,
        mean_rstd if norm else None, y_last, y_stats if stats_by_tile else None,
        saved if save_hidden else None, activation, eps, residual, operand, precision,
    )  # fmt: skip
    if return_stats and not stats_by_tile:
        y_stats = tensor_partials(y_last)
    return y if y_last is y else y.copy_(y_last), mean_rstd, y_stats, saved


def _launch_fused(
    x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, stats, mean_rstd, y, y_stats, saved,
    activation, eps, residual, operand, precision,
) -> None:  # fmt: skip
    batch, channels, height, width = x.shape
    pixels, hidden = height * width, w1.shape[0]
    w1, b1, _, w2 = prepare(x, w1, b1, w2, None, None, None, None, eps, operand)
    tiles = fused_forward_tiles(channels, w1.element_size(), device_of(x), precision)
    partials = 1 if stats is None else stats.shape[1]
    mlp_fwd[(ceil_div(batch * pixels, tiles.rows),)](
        x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, stats, mean_rstd, y, y_stats,
        saved, batch, pixels, partials, 0 if y_stats is None else y_stats.shape[1], eps, channels, hidden,
        activation, residual, tiles.rows, tiles.hidden, *power_of_2_parts(channels),
        _samples_per_tile(pixels, tiles.rows), next_power_of_2(partials), precision, num_warps=tiles.warps,
        num_stages=tiles.stages,
        maxnreg=tiles.registers if saved is None else 255,  # saving fc1's output takes registers
        **OPTIONS,
    )  # fmt: skip


def _launch_pair(
    x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, stats, mean_rstd, y, y_stats, saved,
    activation, eps, residual, operand, precision,
) -> None:  # fmt: skip
    batch, channels, height, width = x.shape
    pixels, hidden, out = height * width, w1.shape[0], w2.shape[0]
    w1, b1, u, w2 = prepare(x, w1, b1, w2, norm_weight, norm_bias, stats, mean_rstd, eps, operand)
    p = torch.empty((batch * pixels, hidden), dtype=w1.dtype, device=x.device)
    device = device_of(x)
    tiles = fc1_tiles(x.element_size(), w1.element_size(), device, precision)
    mlp_fc1[(ceil_div(batch * pixels, tiles.rows) * ceil_div(hidden, tiles.columns[0]),)](
        x, w1, b1, u, norm_weight, norm_bias, mean_rstd, p, saved, batch, pixels, channels, hidden,
        activation, tiles.rows, tiles.columns[0], tiles.depth, precision, num_warps=tiles.warps,
        num_stages=tiles.stages,
        # ptxas by itself takes fewer for IEEE float32, and spills
        maxnreg=128 if w1.element_size() == 4 and precision == "ieee" else None,
        **OPTIONS,
    )  # fmt: skip
    tiles = fc2_tiles(out, w2.element_size(), device, precision)
    column_tiles = ceil_div(out, sum(tiles.columns))
    mlp_fc2[(ceil_div(batch * pixels, tiles.rows) * column_tiles,)](
        p, w2, b2, layer_scale, drop_scale, x if residual else None, y, y_stats, batch, pixels,
        0 if y_stats is None else y_stats.shape[1] // column_tiles, hidden, out, residual, tiles.rows,
        tiles.depth, *tiles.columns, _samples_per_tile(pixels, tiles.rows), precision,
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip


def _samples_per_tile(pixels: int, rows: int) -> int:
    """The most samples of ``pixels`` tokens that a tile of ``rows`` tokens can touch."""
    return (pixels - gcd(pixels, rows) + rows - 1) // pixels + 1


def _dense(p: Tensor | None) -> Tensor | None:
    return p if p is None else p.contiguous()
