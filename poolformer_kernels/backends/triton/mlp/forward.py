"""The MLP's forward in Triton: kernels, then the launcher. Formulas: algebra, "MLP sub-block".

Tokens are rows ``[B H W, C]`` of channels_last data, numbered through all samples: a tile of them may hold
the end of one sample and the start of the next. Up to 192 channels (96 in fp32) one kernel does it all and
the hidden activations stay in registers; above, fc1's kernel writes them (after the activation) and fc2's
reads them.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....layout import memory_format_of
from ..activation import activate
from ..config import OPTIONS, next_power_of_2, pieces
from ..device import device_of
from ..statistics import few, flat_stats, merged
from ..tile import dot, rounded, shift, vector
from .config import FEW_PIXELS, FOLD_DEPTH, FOLD_ROWS, fc1, fc2, fused, fuses, mlp_stats_tiles
from .tile import kept, operand_of, row_stats, store_stats, stored, tokens

__all__ = ["forward"]


@triton.jit(do_not_specialize=["batch", "HW", "T", "slots"])
def mlp_fwd(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, gamma_ptr, beta_ptr, scale_ptr, drop_ptr, stats_ptr, mean_rstd_ptr,
    y_ptr, y_stats_ptr, hidden_ptr, batch, HW, T, slots, eps, C: tl.constexpr, HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C0: tl.constexpr,
    C1: tl.constexpr, SEGMENTS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """y of one tile, C = C0 + C1 channels: norm, fc1, activation and fc2, HIDDEN chunk by chunk."""
    OPERAND: tl.constexpr = w1_ptr.dtype.element_ty
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    NORM: tl.constexpr = stats_ptr is not None
    start, left, first, before = tokens(tl.program_id(0), batch, HW, BM)
    row = tl.arange(0, BM)
    ok = row < left
    local = (before + row) // HW
    mean = tl.zeros([BM], tl.float32)
    rstd = tl.zeros([BM], tl.float32)
    if NORM:
        for s in tl.static_range(SEGMENTS):
            b = tl.minimum(first + s, batch - 1)
            mean_b, variance = merged(stats_ptr, b, T, MERGE)
            rstd_b = 1.0 / tl.sqrt_rn(variance + eps)
            mean = tl.where(local == s, mean_b, mean)
            rstd = tl.where(local == s, rstd_b, rstd)
            starts_here = (b == first + s) & (b * HW >= start) & (b * HW < start + BM)
            tl.store(mean_rstd_ptr + b * 2, mean_b, mask=starts_here)
            tl.store(mean_rstd_ptr + b * 2 + 1, rstd_b, mask=starts_here)

    x_ptr += start * C
    y_ptr += start * C
    at = tl.minimum(row, left - 1) * C
    c0 = tl.arange(0, C0)
    c0_ok = c0 < C
    n0 = operand_of(x_ptr, at, c0, c0_ok, mean, rstd, gamma_ptr, beta_ptr, OPERAND, NORM)
    acc0 = tl.zeros([BM, C0], tl.float32)
    if C1 > 0:
        c1 = C0 + tl.arange(0, C1)
        c1_ok = c1 < C
        n1 = operand_of(x_ptr, at, c1, c1_ok, mean, rstd, gamma_ptr, beta_ptr, OPERAND, NORM)
        acc1 = tl.zeros([BM, C1], tl.float32)

    for j0 in range(0, HIDDEN, BN):
        j = j0 + tl.arange(0, BN)
        j_ok = j < HIDDEN
        w1 = w1_ptr + j[None, :] * C
        w2 = w2_ptr + j[:, None]
        h = tl.zeros([BM, BN], tl.float32)
        h = dot(n0, tl.load(w1 + c0[:, None], mask=c0_ok[:, None] & j_ok[None, :], other=0.0), h)
        if C1 > 0:
            h = dot(n1, tl.load(w1 + c1[:, None], mask=c1_ok[:, None] & j_ok[None, :], other=0.0), h)
        h += shift(b1_ptr, j, j_ok)[None, :]
        if hidden_ptr is not None:
            saved = hidden_ptr + start * HIDDEN + row[:, None] * HIDDEN + j[None, :]
            tl.store(saved, kept(h, ACTIVATION, OPERAND), mask=ok[:, None] & j_ok[None, :])
        p = activate(h, ACTIVATION, EXACT)
        if HIDDEN % BN != 0:
            p = tl.where(j_ok[None, :], p, 0.0)
        p = rounded(p, OPERAND)
        v = tl.load(w2 + c0[None, :] * HIDDEN, mask=j_ok[:, None] & c0_ok[None, :], other=0.0)
        acc0 = dot(p, v, acc0)
        if C1 > 0:
            v = tl.load(w2 + c1[None, :] * HIDDEN, mask=j_ok[:, None] & c1_ok[None, :], other=0.0)
            acc1 = dot(p, v, acc1)

    drop = None
    if drop_ptr is not None:
        drop = tl.load(drop_ptr + first + local, mask=ok, other=0.0).to(tl.float32)
    y0 = stored(acc0, x_ptr, y_ptr, b2_ptr, scale_ptr, drop, row * C, c0, ok, c0_ok, RESIDUAL)
    y1 = None
    if C1 > 0:
        y1 = stored(acc1, x_ptr, y_ptr, b2_ptr, scale_ptr, drop, row * C, c1, ok, c1_ok, RESIDUAL)
    else:
        c1_ok = c0_ok
    if y_stats_ptr is not None:
        y_mean, m2 = row_stats(y0, y1, c0_ok, c1_ok, C)
        store_stats(y_stats_ptr, y_mean, m2, C, local, ok, start, first, 0, HW, slots, 1, BM, SEGMENTS)


@triton.jit(do_not_specialize=["T"])
def mlp_prepare(
    stats_ptr, mean_rstd_ptr, w1_ptr, b1_ptr, gamma_ptr, beta_ptr, folded_ptr, u_ptr, v_ptr, T, eps,
    C: tl.constexpr, HIDDEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FOLDS: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """GroupNorm folded into fc1, BN rows of it a program; programs from FOLDS on: (mean, rstd) of a sample.

    The folded weight is W1 diag(gamma), rounded; u, its row sums after the rounding, takes out what x's mean
    adds to a product to fp32's precision; v = b1 + W1 beta.
    """
    pid = tl.program_id(0)
    if pid >= FOLDS:
        b = (pid - FOLDS).to(tl.int64)
        mean, variance = merged(stats_ptr, b, T, MERGE)
        tl.store(mean_rstd_ptr + b * 2, mean)
        tl.store(mean_rstd_ptr + b * 2 + 1, 1.0 / tl.sqrt_rn(variance + eps))
    elif FOLDS > 0:
        j = pid * BN + tl.arange(0, BN)
        u = tl.zeros([BN], tl.float32)
        v = shift(b1_ptr, j, j < HIDDEN)
        for k in range(0, C, BK):
            c = k + tl.arange(0, BK)
            ok = (j < HIDDEN)[:, None] & (c < C)[None, :]
            at = j[:, None] * C + c[None, :]
            w = tl.load(w1_ptr + at, mask=ok, other=0.0).to(tl.float32)
            folded = rounded(w * vector(gamma_ptr, c, c < C)[None, :], folded_ptr.dtype.element_ty)
            tl.store(folded_ptr + at, folded, mask=ok)
            u += tl.sum(folded.to(tl.float32), 1)
            v += tl.sum(w * shift(beta_ptr, c, c < C)[None, :], 1)
        tl.store(u_ptr + j, u, mask=j < HIDDEN)
        tl.store(v_ptr + j, v, mask=j < HIDDEN)


@triton.jit(do_not_specialize=["batch", "HW"])
def mlp_fc1(
    x_ptr, w1_ptr, b1_ptr, u_ptr, gamma_ptr, beta_ptr, mean_rstd_ptr, p_ptr, hidden_ptr, batch, HW,
    C: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """p = activation(h) of one tile; the norm is folded into w1, b1 and u where u is given."""
    OPERAND: tl.constexpr = w1_ptr.dtype.element_ty
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    NORM: tl.constexpr = mean_rstd_ptr is not None
    TILES: tl.constexpr = (HIDDEN + BN - 1) // BN
    start, left, first, before = tokens(tl.program_id(0) // TILES, batch, HW, BM)
    row = tl.minimum(tl.arange(0, BM), left - 1)
    mean = tl.zeros([BM], tl.float32)
    rstd = tl.zeros([BM], tl.float32)
    if NORM:
        of = mean_rstd_ptr + (first + (before + row) // HW) * 2
        mean = tl.load(of)
        rstd = tl.load(of + 1)
    j = tl.program_id(0) % TILES * BN + tl.arange(0, BN)
    j_ok = j < HIDDEN
    w1_ptr += (j if HIDDEN % BN == 0 else tl.minimum(j, HIDDEN - 1))[None, :] * C
    x_ptr += start * C
    h = tl.zeros([BM, BN], tl.float32)
    for k in range(0, C, BK):
        c = k + tl.arange(0, BK)
        n = operand_of(
            x_ptr, row * C, c, c < C, mean, rstd, gamma_ptr, beta_ptr, OPERAND, NORM and u_ptr is None
        )
        h = dot(n, tl.load(w1_ptr + c[:, None], mask=(c < C)[:, None], other=0.0), h)
    if u_ptr is not None:
        h = (h - mean[:, None] * shift(u_ptr, j, j_ok)[None, :]) * rstd[:, None]
    h += shift(b1_ptr, j, j_ok)[None, :]
    row = tl.arange(0, BM)
    at = start * HIDDEN + row[:, None] * HIDDEN + j[None, :]
    ok = (row < left)[:, None] & j_ok[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + at, kept(h, ACTIVATION, OPERAND), mask=ok)
    tl.store(p_ptr + at, rounded(activate(h, ACTIVATION, EXACT), OPERAND), mask=ok)


@triton.jit(do_not_specialize=["batch", "HW", "slots"])
def mlp_fc2(
    p_ptr, w2_ptr, b2_ptr, scale_ptr, drop_ptr, x_ptr, y_ptr, y_stats_ptr, batch, HW, slots,
    HIDDEN: tl.constexpr, OUT: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """One tile of y, N0 + N1 columns of it, and the partials of its samples."""
    TILES: tl.constexpr = (OUT + N0 + N1 - 1) // (N0 + N1)
    column = tl.program_id(0) % TILES
    start, left, first, before = tokens(tl.program_id(0) // TILES, batch, HW, BM)
    row = tl.arange(0, BM)
    ok = row < left
    local = (before + row) // HW
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
    from_row = tl.minimum(row, left - 1)[:, None] * HIDDEN
    for k in range(0, HIDDEN, BK):
        j = k + tl.arange(0, BK)
        p = tl.load(p_ptr + from_row + j[None, :], mask=(j < HIDDEN)[None, :], other=0.0)
        acc0 = dot(p, tl.load(w0 + j[:, None], mask=(j < HIDDEN)[:, None], other=0.0), acc0)
        if N1 > 0:
            acc1 = dot(p, tl.load(w1 + j[:, None], mask=(j < HIDDEN)[:, None], other=0.0), acc1)

    drop = None
    if drop_ptr is not None:
        drop = tl.load(drop_ptr + first + local, mask=ok, other=0.0).to(tl.float32)
    if RESIDUAL:
        x_ptr += start * OUT
    y_ptr += start * OUT
    y0 = stored(acc0, x_ptr, y_ptr, b2_ptr, scale_ptr, drop, row * OUT, c0, ok, c0_ok, RESIDUAL)
    y1 = None
    if N1 > 0:
        y1 = stored(acc1, x_ptr, y_ptr, b2_ptr, scale_ptr, drop, row * OUT, c1, ok, c1_ok, RESIDUAL)
    else:
        c1_ok = c0_ok
    if y_stats_ptr is not None:
        count = tl.minimum(OUT - column * (N0 + N1), N0 + N1).to(tl.float32)
        mean, m2 = row_stats(y0, y1, c0_ok, c1_ok, count)
        store_stats(
            y_stats_ptr, mean, m2, count, local, ok, start, first, column, HW, slots, TILES, BM, SEGMENTS
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``mlp_triton``: y, (mean, rstd) of x ``[B, 2]``, partials of y ``[B, T, 3]``, fc1's output.

    The last three are empty (0,) where there is no norm, ``return_stats`` or ``save_hidden``; fc1's output is
    ``[B H W, hidden]`` flat, in the operands' dtype.
    """
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(x):
            return forward(
                x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, stats, activation, eps,
                norm, residual, return_stats, save_hidden,
            )  # fmt: skip
    batch, channels, height, width = x.shape
    hidden, out = w1.shape[0], w2.shape[0]
    pixels, fmt = height * width, memory_format_of(x)
    operand = w1.dtype if x.dtype == torch.float32 else x.dtype
    new = {"dtype": torch.float32, "device": x.device}
    partials = mlp_stats_tiles((batch, out, height, width), fmt == torch.channels_last, hidden)
    y = torch.empty((batch, out, height, width), dtype=x.dtype, device=x.device, memory_format=fmt)
    mean_rstd = torch.empty((batch, 2) if norm else (0,), **new)
    stats_by_tile = return_stats and (pixels >= FEW_PIXELS or y.numel() == 0)
    y_stats = torch.empty((batch, partials, 3) if stats_by_tile else (0,), **new)
    size = batch * pixels * hidden if save_hidden else 0
    saved = torch.empty((size,), dtype=operand, device=x.device)
    if y.numel() == 0:
        return y, mean_rstd, y_stats, saved

    x = x.contiguous(memory_format=torch.channels_last)
    last = y if fmt is torch.channels_last else torch.empty_like(y, memory_format=torch.channels_last)
    if norm:
        stats = few(flat_stats(x) if stats is None else stats.contiguous())
    launch = _fused if fuses(channels, out, pixels, operand.itemsize) else _pair
    launch(
        x, _matrix(w1, operand), _dense(b1), _matrix(w2, operand), _dense(b2), _dense(norm_weight),
        _dense(norm_bias), _dense(layer_scale), _dense(drop_scale), stats, mean_rstd if norm else None, last,
        y_stats if stats_by_tile else None, saved if save_hidden else None,
        activation, eps, residual,
    )  # fmt: skip
    if return_stats and not stats_by_tile:
        y_stats = flat_stats(last)
    return y if last is y else y.copy_(last), mean_rstd, y_stats, saved


def _fused(
    x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, stats, mean_rstd, y, y_stats, saved,
    activation, eps, residual,
) -> None:  # fmt: skip
    batch, channels, height, width = x.shape
    pixels, hidden = height * width, w1.shape[0]
    tiles = fused(channels, w1.element_size(), device_of(x))
    partials = 1 if stats is None else stats.shape[1]
    mlp_fwd[(triton.cdiv(batch * pixels, tiles.rows),)](
        x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, stats, mean_rstd, y, y_stats,
        saved, batch, pixels, partials, 0 if y_stats is None else y_stats.shape[1], eps, channels, hidden,
        activation, residual, tiles.rows, tiles.hidden, *pieces(channels), _segments(pixels, tiles.rows),
        next_power_of_2(partials), num_warps=tiles.warps, num_stages=tiles.stages,
        maxnreg=tiles.registers if saved is None else 255, **OPTIONS,
    )  # fmt: skip


def _pair(
    x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, stats, mean_rstd, y, y_stats, saved,
    activation, eps, residual,
) -> None:  # fmt: skip
    batch, channels, height, width = x.shape
    pixels, hidden, out = height * width, w1.shape[0], w2.shape[0]
    u = None
    if stats is not None:
        folds, folded, v = 0, w1, b1
        # A bf16 x needs no centring before the product, and bf16 holds W1 diag(gamma) whatever gamma's size.
        if x.dtype == torch.bfloat16:
            folds = triton.cdiv(hidden, FOLD_ROWS)
            folded = torch.empty_like(w1)
            u, v = torch.empty((2, hidden), dtype=torch.float32, device=x.device)
        mlp_prepare[(folds + batch,)](
            stats, mean_rstd, w1, b1, norm_weight, norm_bias, folded, u, v, stats.shape[1], eps, channels,
            hidden, FOLD_ROWS, FOLD_DEPTH, folds, next_power_of_2(stats.shape[1]), **OPTIONS,
        )  # fmt: skip
        w1, b1 = folded, v
    p = torch.empty((batch * pixels, hidden), dtype=w1.dtype, device=x.device)
    device = device_of(x)
    tiles = fc1(x.element_size(), w1.element_size(), device)
    mlp_fc1[(triton.cdiv(batch * pixels, tiles.rows) * triton.cdiv(hidden, tiles.columns[0]),)](
        x, w1, b1, u, norm_weight, norm_bias, mean_rstd, p, saved, batch, pixels, channels, hidden,
        activation, tiles.rows, tiles.columns[0], tiles.depth, num_warps=tiles.warps,
        num_stages=tiles.stages, maxnreg=128 if w1.element_size() == 4 else None, **OPTIONS,
    )  # fmt: skip
    tiles = fc2(out, w2.element_size(), device)
    column_tiles = triton.cdiv(out, sum(tiles.columns))
    mlp_fc2[(triton.cdiv(batch * pixels, tiles.rows) * column_tiles,)](
        p, w2, b2, layer_scale, drop_scale, x if residual else None, y, y_stats, batch, pixels,
        0 if y_stats is None else y_stats.shape[1] // column_tiles, hidden, out, residual, tiles.rows,
        tiles.depth, *tiles.columns, _segments(pixels, tiles.rows), num_warps=tiles.warps,
        num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip


def _segments(pixels: int, rows: int) -> int:
    """The most samples that a tile of so many rows can touch."""
    return (pixels - gcd(pixels, rows) + rows - 1) // pixels + 1


def _matrix(w: Tensor, dtype: torch.dtype) -> Tensor:
    return w.flatten(1).to(dtype).contiguous()


def _dense(p: Tensor | None) -> Tensor | None:
    return p if p is None else p.contiguous()
