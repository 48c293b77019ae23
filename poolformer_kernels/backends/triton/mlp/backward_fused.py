"""The MLP's backward where C is small: the hidden activations stay in registers and are computed twice.

One kernel walks over the tokens with a block of hidden channels, whose weight gradients it keeps in
registers (transposed, so that the activations are the register operand of the products), and leaves
GroupNorm's two sums per token. The other has those sums and writes dx. Formulas: algebra, "MLP sub-block".
"""

import torch
import triton
import triton.language as tl

from ..activation import activate_with_derivative
from ..config import OPTIONS, pieces
from ..device import aligned
from ..tile import dot, rounded, vector
from .backward_shared import Partials, Problem, direct, sample_sums, to_tokens
from .config import FusedBackward
from .tile import finished, sample_values, token_tile

__all__ = ["partials"]


@triton.jit
def _rows(
    ptr, ok, ROWS: tl.constexpr, EVEN: tl.constexpr, C: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr
):
    """The pieces of ROWS rows ``[ROWS, C]`` of a matrix; ``EVEN``: all of them exist."""
    out = ()
    for i in tl.static_range(2 if P1 > 0 else 1):
        c = i * P0 + tl.arange(0, P1 if i else P0)
        at = ptr + tl.arange(0, ROWS)[:, None] * C + c[None, :]
        if i * P0 + (P1 if i else P0) > C:
            tile = tl.load(at, mask=ok[:, None] & (c < C)[None, :], other=0.0)
        elif EVEN:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=ok[:, None], other=0.0)
        out = out + (tile,)  # noqa: RUF005
    return out


@triton.jit
def _products(a, b, acc):
    """``acc + sum a_i b_i^T`` over the pieces."""
    for i in tl.static_range(len(a)):
        acc = dot(a[i], tl.trans(b[i]), acc)
    return acc


@triton.jit
def _accumulated(acc, a, b):
    """``acc_i + a b_i`` for the pieces."""
    out = ()
    for i in tl.static_range(len(b)):
        out = out + (dot(a, b[i], acc[i]),)  # noqa: RUF005
    return out


@triton.jit
def _zeros(ROWS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    out = (tl.zeros([ROWS, P0], tl.float32),)
    if P1 > 0:
        out = out + (tl.zeros([ROWS, P1], tl.float32),)  # noqa: RUF005
    return out


@triton.jit(do_not_specialize=["HW", "T", "tiles", "per_split"])
def mlp_bwd_wgrad(
    n_ptr, g_ptr, drop_ptr, hidden_ptr, w1_ptr, w2t_ptr, table_ptr, rows_ptr, dw1_ptr, dw2_ptr,
    db1_ptr, HW, T, tiles, per_split,
    C: tl.constexpr, O: tl.constexpr, J: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,  # noqa: E741
    Q0: tl.constexpr, Q1: tl.constexpr, TOKENS: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    NORM: tl.constexpr, DROP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Of a block of hidden channels and a split of the tokens: dw1, ``G2`` and db1; sums per token."""
    BLOCKS: tl.constexpr = (J + HIDDEN - 1) // HIDDEN
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    block = tl.program_id(0) % BLOCKS
    split = tl.program_id(0) // BLOCKS
    plane = T.to(tl.int64)
    j = block * HIDDEN + tl.arange(0, HIDDEN)
    j_ok = j < J
    w1 = _rows(w1_ptr + block * HIDDEN * C, j_ok, HIDDEN, J % HIDDEN == 0, C, P0, P1)
    w2 = _rows(w2t_ptr + block * HIDDEN * O, j_ok, HIDDEN, J % HIDDEN == 0, O, Q0, Q1)
    b1 = tl.load(table_ptr + j, mask=j_ok, other=0.0)
    peak = tl.load(table_ptr + J + j, mask=j_ok, other=0.0)
    u = tl.load(table_ptr + 2 * J + j, mask=j_ok, other=0.0)
    v = tl.load(table_ptr + 3 * J + j, mask=j_ok, other=0.0)
    dw1 = _zeros(HIDDEN, P0, P1)
    dw2 = _zeros(HIDDEN, Q0, Q1)
    db1 = tl.zeros([HIDDEN], tl.float32)
    first = split * per_split
    for step in range(tl.minimum(per_split, tiles - first)):
        start, ok, b = token_tile(first + step, HW, T, TOKENS, True)
        drop = vector(drop_ptr, b, ok)
        n = _rows(n_ptr + start * C, ok, TOKENS, False, C, P0, P1)
        g = _rows(g_ptr + start * O, ok, TOKENS, False, O, Q0, Q1)
        i = tl.arange(0, TOKENS)
        if hidden_ptr is None:
            h = _products(w1, n, tl.zeros([HIDDEN, TOKENS], tl.float32)) + b1[:, None]
        else:
            at = hidden_ptr + start * J + i[None, :] * J + j[:, None]
            h = tl.load(at, mask=ok[None, :] & j_ok[:, None], other=0.0).to(tl.float32)
        p, slope = activate_with_derivative(h, ACTIVATION, EXACT)
        if dw1_ptr is not None:
            scaled = p if drop_ptr is None else p * drop[None, :]
            dw2 = _accumulated(dw2, rounded(scaled, DTYPE), g)
        dp = _products(w2, g, tl.zeros([HIDDEN, TOKENS], tl.float32))
        if SCALED:
            dp *= peak[:, None]
        dh = dp * slope
        if drop_ptr is not None:
            dh *= drop[None, :]
        if NORM or DROP:
            row = rows_ptr + (start + block * plane) + i
        if NORM:
            tl.store(row, tl.sum(dh * u[:, None], 0), mask=ok)
            tl.store(row + BLOCKS * plane, tl.sum(dh * (h - v[:, None]), 0), mask=ok)
        if DROP:
            tl.store(row + 2 * BLOCKS * plane, tl.sum(p * dp, 0), mask=ok)
        if dw1_ptr is not None:
            db1 += tl.sum(dh, 1)
            dw1 = _accumulated(dw1, rounded(dh, DTYPE), n)
    if dw1_ptr is not None:
        tl.store(db1_ptr + split * J + j, db1, mask=j_ok)
        base = split.to(tl.int64) * J
        for k in tl.static_range(len(dw1)):
            c = k * P0 + tl.arange(0, P1 if k else P0)
            at = dw1_ptr + base * C + j[:, None] * C + c[None, :]
            tl.store(at, dw1[k], mask=j_ok[:, None] & (c < C)[None, :])
        for k in tl.static_range(len(dw2)):
            o = k * Q0 + tl.arange(0, Q1 if k else Q0)
            at = dw2_ptr + base * O + o[None, :] * J + j[:, None]
            tl.store(at, dw2[k], mask=j_ok[:, None] & (o < O)[None, :])


@triton.jit(do_not_specialize=["HW", "T"])
def mlp_bwd_dx(
    n_ptr, g_ptr, grad_ptr, x_ptr, mean_rstd_ptr, gamma_ptr, drop_ptr, hidden_ptr, w1_ptr, w2t_ptr,
    table_ptr, k_ptr, dx_ptr, norm_sums_ptr, grad_sums_ptr, HW, T,
    C: tl.constexpr, O: tl.constexpr, J: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,  # noqa: E741
    Q0: tl.constexpr, Q1: tl.constexpr, TOKENS: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """dx of a tile of tokens, and its sums over tokens: ``dn x_hat``, ``dn`` and ``d g``."""
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    tile = tl.program_id(0)
    start, ok, b = token_tile(tile, HW, T, TOKENS, LAST)
    mean, rstd, drop = sample_values(mean_rstd_ptr, drop_ptr, b, ok, NORM)
    n = _rows(n_ptr + start * C, ok, TOKENS, False, C, P0, P1)
    g = _rows(g_ptr + start * O, ok, TOKENS, False, O, Q0, Q1)
    i = tl.arange(0, TOKENS)
    dn = _zeros(TOKENS, P0, P1)
    for j0 in range(0, J, HIDDEN):
        j = j0 + tl.arange(0, HIDDEN)
        j_ok = j < J
        w1 = _rows(w1_ptr + j0 * C, j_ok, HIDDEN, J % HIDDEN == 0, C, P0, P1)
        w2 = _rows(w2t_ptr + j0 * O, j_ok, HIDDEN, J % HIDDEN == 0, O, Q0, Q1)
        if hidden_ptr is None:
            b1 = tl.load(table_ptr + j, mask=j_ok, other=0.0)
            h = _products(n, w1, tl.zeros([TOKENS, HIDDEN], tl.float32)) + b1[None, :]
        else:
            at = hidden_ptr + start * J + i[:, None] * J + j[None, :]
            h = tl.load(at, mask=ok[:, None] & j_ok[None, :], other=0.0).to(tl.float32)
        dp = _products(g, w2, tl.zeros([TOKENS, HIDDEN], tl.float32))
        if SCALED:
            dp *= tl.load(table_ptr + J + j, mask=j_ok, other=0.0)[None, :]
        _, slope = activate_with_derivative(h, ACTIVATION, EXACT)
        dh = dp * slope
        if drop_ptr is not None:
            dh *= drop[:, None]
        dn = _accumulated(dn, rounded(dh, DTYPE), w1)
    k0 = mean
    k1 = mean
    if NORM:
        k0 = tl.load(k_ptr + b * 2, mask=ok, other=0.0)
        k1 = tl.load(k_ptr + b * 2 + 1, mask=ok, other=0.0)
    if norm_sums_ptr is not None:
        norm_sums_ptr += tile.to(tl.int64) * (2 * C)
    for k in tl.static_range(len(dn)):
        c = k * P0 + tl.arange(0, P1 if k else P0)
        finished(
            dn[k], x_ptr, grad_ptr, dx_ptr, gamma_ptr, norm_sums_ptr, start, ok, c, HW, mean, rstd, k0, k1,
            C, k * P0 + (P1 if k else P0), TOKENS, LAST, NORM, RESIDUAL,
        )  # fmt: skip
    if grad_sums_ptr is not None:
        for k in tl.static_range(len(g)):
            o = k * Q0 + tl.arange(0, Q1 if k else Q0)
            total = tl.sum(g[k].to(tl.float32) * drop[:, None], 0)
            tl.store(grad_sums_ptr + tile.to(tl.int64) * O + o, total, mask=o < O)


def partials(problem: Problem, p: FusedBackward) -> Partials:
    """Writes dx; returns the sums over tokens."""
    x = problem.x
    batch, _, height, width = x.shape
    pixels = height * width
    channels, out, hidden = sizes = problem.sizes
    vectors = {"dtype": torch.float32, "device": x.device}
    n, g = x, problem.grad
    if problem.norm or not direct(problem):
        n = torch.empty((batch * pixels, channels), dtype=problem.w1.dtype, device=x.device)
        to_tokens(problem, x, n, norm=problem.norm)
    if not direct(problem):
        g = torch.empty((batch * pixels, out), dtype=problem.w1.dtype, device=x.device)
        to_tokens(problem, problem.grad, g)
    blocks = triton.cdiv(hidden, p.weight_hidden)
    tiles = triton.cdiv(batch * pixels, p.weight_tokens)
    per_split = triton.cdiv(tiles, max(1, p.programs // blocks))
    splits = triton.cdiv(tiles, per_split)
    dw1 = dw2 = db1 = k = ddrop = rows = None
    if problem.parameter_grads:
        dw1 = torch.empty((splits, hidden, channels), **vectors)
        dw2 = torch.empty((splits, out, hidden), **vectors)
        db1 = torch.empty((splits, hidden), **vectors)
    if problem.norm or problem.drop_grad:
        rows = torch.empty((3, blocks, batch * pixels), **vectors)
    shape = (*sizes, *pieces(channels), *pieces(out))
    if rows is not None or problem.parameter_grads:
        mlp_bwd_wgrad[(splits * blocks,)](
            n, g, problem.drop, problem.hidden, problem.w1, problem.w2t, problem.table, rows, dw1, dw2, db1,
            pixels, batch * pixels, tiles, per_split, *shape, p.weight_tokens, p.weight_hidden,
            problem.activation, problem.norm, problem.drop_grad, problem.scaled,
            num_warps=p.weight_warps, num_stages=p.weight_stages,
            maxnreg=255 if problem.drop_grad else p.registers, **OPTIONS,
        )  # fmt: skip
    if rows is not None:
        k, ddrop = sample_sums(problem, rows, g)
    tiles = problem.tiles(p.tokens)
    dnorm = grad_sums = None
    if problem.parameter_grads:
        dnorm = torch.empty((tiles, 2 * channels), **vectors) if problem.norm else None
        grad_sums = torch.empty((tiles, out), **vectors)
    mlp_bwd_dx[(tiles,)](
        n, g, problem.grad, x, problem.mean_rstd, problem.gamma, problem.drop, problem.hidden, problem.w1,
        problem.w2t, problem.table, k, problem.dx, dnorm, grad_sums, pixels, batch * pixels,
        *shape, p.tokens, p.hidden, problem.activation, problem.last, problem.norm, problem.residual,
        problem.scaled, num_warps=p.warps, num_stages=p.stages,
        maxnreg=p.registers if aligned(x, problem.grad, problem.w1) else 255, **OPTIONS,
    )  # fmt: skip
    return Partials(dw1, dw2, db1, dnorm, grad_sums, ddrop)
