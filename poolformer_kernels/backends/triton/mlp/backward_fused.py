"""The MLP's backward where C is small: the hidden activations stay in registers and are computed twice.

`mlp_bwd_wgrad` walks over the tokens with a block of hidden channels, whose weight gradients it keeps in
registers (transposed, so that the activations are the register operand of the products). It also writes, for
each token, the two sums that GroupNorm's backward needs. `mlp_bwd_dx` reads their totals and writes dx.
Formulas: docs/algebra.md, "MLP".

C and the output's channels are covered by one or two parts, each a power of two: P0 and P1, Q0 and Q1.
"""

import torch
import triton
import triton.language as tl

from ..activation import activate_with_derivative
from ..config import OPTIONS, ceil_div, power_of_2_parts
from ..launch import kernel
from ..tile import dot, load_or_one, round_to
from .backward_shared import Partials, Problem, is_operand, prepare, sample_sums
from .config import FusedBackward
from .tile import sample_values, store_dx, token_tile

__all__ = ["compute_partials"]


@triton.jit
def _load_parts(
    ptr, ok, ROWS: tl.constexpr, EVEN: tl.constexpr, C: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr
):
    """ROWS rows of a matrix with C columns, in parts of P0 and P1 columns.

    ``ok``: which of the rows exist; ``EVEN``: all of them do.
    """
    out = ()
    for i in tl.static_range(2 if P1 > 0 else 1):
        c = i * P0 + tl.arange(0, P1 if i else P0)
        ptrs = ptr + tl.arange(0, ROWS)[:, None] * C + c[None, :]
        if i * P0 + (P1 if i else P0) > C:
            tile = tl.load(ptrs, mask=ok[:, None] & (c < C)[None, :], other=0.0)
        elif EVEN:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=ok[:, None], other=0.0)
        out = out + (tile,)  # noqa: RUF005
    return out


@triton.jit
def _sum_products(a, b, acc, PRECISION: tl.constexpr):
    """``acc + sum a_i b_i^T`` over the parts of a and b."""
    for i in tl.static_range(len(a)):
        acc = dot(a[i], tl.trans(b[i]), acc, PRECISION)
    return acc


@triton.jit
def _accumulate(acc, a, b, PRECISION: tl.constexpr):
    """``acc_i + a b_i`` for each part of acc and b."""
    out = ()
    for i in tl.static_range(len(b)):
        out = out + (dot(a, b[i], acc[i], PRECISION),)  # noqa: RUF005
    return out


@triton.jit
def _zeros(ROWS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Accumulators for ROWS rows in parts of P0 and P1 columns."""
    out = (tl.zeros([ROWS, P0], tl.float32),)
    if P1 > 0:
        out = out + (tl.zeros([ROWS, P1], tl.float32),)  # noqa: RUF005
    return out


@kernel(do_not_specialize=["HW", "T", "tiles", "per_split"])
def mlp_bwd_wgrad(
    n_ptr, g_ptr, drop_ptr, hidden_ptr, w1_ptr, w2t_ptr, table_ptr, token_sums_ptr, dw1_ptr, dw2_ptr,
    db1_ptr, HW, T, tiles, per_split,
    C: tl.constexpr, O: tl.constexpr, J: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,  # noqa: E741
    Q0: tl.constexpr, Q1: tl.constexpr, TOKENS: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    NORM: tl.constexpr, DROP: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights' gradients from a block of hidden channels and a split of the tokens, and sums per token.

    n_ptr: fc1's input [T, C] in the operands' dtype
    g_ptr: gradient of y [T, O] in the operands' dtype
    drop_ptr: drop scale [B], or None
    hidden_ptr: output of fc1 [T, J] as the forward saved it, or None: it is computed again
    w1_ptr: fc1's weight [J, C] in the operands' dtype
    w2t_ptr, table_ptr: [J, O] and [4, J] of `mlp_bwd_prepare`
    token_sums_ptr: output [3, blocks, T], fp32: sums over a block's hidden channels of dh u, dh (h - v), p dp
    dw1_ptr, dw2_ptr, db1_ptr: outputs [splits, J, C], [splits, O, J] and [splits, J], fp32, or None
    HW, T: tokens of a sample, and of all
    tiles, per_split: tiles of all tokens, and of a split
    C, O, J: channels of x and of y, hidden channels
    P0, P1, Q0, Q1: parts of C and of O
    TOKENS, HIDDEN: tokens of a tile, hidden channels of a block
    ACTIVATION: its name
    NORM, DROP: whether the first two sums per token are needed, and the third
    SCALED: whether `mlp_bwd_prepare` divided the rows of w2t
    PRECISION: how fp32 operands are multiplied, `product_precision`
    """
    BLOCKS: tl.constexpr = (J + HIDDEN - 1) // HIDDEN
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    block = tl.program_id(0) % BLOCKS
    split = tl.program_id(0) // BLOCKS
    plane = T.to(tl.int64)
    j = block * HIDDEN + tl.arange(0, HIDDEN)
    j_ok = j < J
    w1 = _load_parts(w1_ptr + block * HIDDEN * C, j_ok, HIDDEN, J % HIDDEN == 0, C, P0, P1)
    w2 = _load_parts(w2t_ptr + block * HIDDEN * O, j_ok, HIDDEN, J % HIDDEN == 0, O, Q0, Q1)
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
        drop = load_or_one(drop_ptr, b, ok)
        n = _load_parts(n_ptr + start * C, ok, TOKENS, False, C, P0, P1)
        g = _load_parts(g_ptr + start * O, ok, TOKENS, False, O, Q0, Q1)
        i = tl.arange(0, TOKENS)
        if hidden_ptr is None:
            h = _sum_products(w1, n, tl.zeros([HIDDEN, TOKENS], tl.float32), PRECISION) + b1[:, None]
        else:
            hidden_ptrs = hidden_ptr + start * J + i[None, :] * J + j[:, None]
            h = tl.load(hidden_ptrs, mask=ok[None, :] & j_ok[:, None], other=0.0).to(tl.float32)
        p, slope = activate_with_derivative(h, ACTIVATION, EXACT)
        if dw1_ptr is not None:
            scaled = p if drop_ptr is None else p * drop[None, :]
            dw2 = _accumulate(dw2, round_to(scaled, DTYPE), g, PRECISION)
        dp = _sum_products(w2, g, tl.zeros([HIDDEN, TOKENS], tl.float32), PRECISION)
        if SCALED:
            dp *= peak[:, None]
        dh = dp * slope
        if drop_ptr is not None:
            dh *= drop[None, :]
        if NORM or DROP:
            sum_ptrs = token_sums_ptr + (start + block * plane) + i
        if NORM:
            tl.store(sum_ptrs, tl.sum(dh * u[:, None], 0), mask=ok)
            tl.store(sum_ptrs + BLOCKS * plane, tl.sum(dh * (h - v[:, None]), 0), mask=ok)
        if DROP:
            tl.store(sum_ptrs + 2 * BLOCKS * plane, tl.sum(p * dp, 0), mask=ok)
        if dw1_ptr is not None:
            db1 += tl.sum(dh, 1)
            dw1 = _accumulate(dw1, round_to(dh, DTYPE), n, PRECISION)
    if dw1_ptr is not None:
        tl.store(db1_ptr + split * J + j, db1, mask=j_ok)
        base = split.to(tl.int64) * J
        for k in tl.static_range(len(dw1)):
            c = k * P0 + tl.arange(0, P1 if k else P0)
            ptrs = dw1_ptr + base * C + j[:, None] * C + c[None, :]
            tl.store(ptrs, dw1[k], mask=j_ok[:, None] & (c < C)[None, :])
        for k in tl.static_range(len(dw2)):
            o = k * Q0 + tl.arange(0, Q1 if k else Q0)
            ptrs = dw2_ptr + base * O + o[None, :] * J + j[:, None]
            tl.store(ptrs, dw2[k], mask=j_ok[:, None] & (o < O)[None, :])


@kernel(do_not_specialize=["HW", "T"])
def mlp_bwd_dx(
    n_ptr, g_ptr, grad_ptr, x_ptr, mean_rstd_ptr, gamma_ptr, drop_ptr, hidden_ptr, w1_ptr, w2t_ptr,
    table_ptr, k_ptr, dx_ptr, norm_sums_ptr, grad_sums_ptr, HW, T,
    C: tl.constexpr, O: tl.constexpr, J: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,  # noqa: E741
    Q0: tl.constexpr, Q1: tl.constexpr, TOKENS: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of a tile of tokens, and sums over its tokens.

    n_ptr: fc1's input [T, C] in the operands' dtype
    g_ptr: gradient of y [T, O] in the operands' dtype
    grad_ptr, x_ptr: gradient of y [B, O, H, W] and x [B, C, H, W], in one layout
    mean_rstd_ptr: (mean, rstd) of x [B, 2], fp32
    gamma_ptr, drop_ptr: GroupNorm's weight [C] and drop scale [B], or None
    hidden_ptr: output of fc1 [T, J] as the forward saved it, or None: it is computed again
    w1_ptr: fc1's weight [J, C] in the operands' dtype
    w2t_ptr, table_ptr: [J, O] and [4, J] of `mlp_bwd_prepare`
    k_ptr: (k0, k1) of `mlp_bwd_sample` [B, 2], fp32; None without the norm
    dx_ptr: output, like x
    norm_sums_ptr: output [tiles, 2, C], fp32: sums of dn x_hat and of dn; or None
    grad_sums_ptr: output [tiles, O], fp32: sums of d g; or None
    HW, T: tokens of a sample, and of all
    C, O, J: channels of x and of y, hidden channels
    P0, P1, Q0, Q1: parts of C and of O
    TOKENS, HIDDEN: tokens of a tile, hidden channels that are computed at a time
    ACTIVATION: its name
    CHANNELS_LAST: whether the layout is channels_last
    NORM, RESIDUAL: whether there is a norm, and whether x was added to y
    SCALED: whether `mlp_bwd_prepare` divided the rows of w2t
    PRECISION: how fp32 operands are multiplied, `product_precision`
    """
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    tile = tl.program_id(0)
    start, ok, b = token_tile(tile, HW, T, TOKENS, CHANNELS_LAST)
    mean, rstd, drop = sample_values(mean_rstd_ptr, drop_ptr, b, ok, NORM)
    n = _load_parts(n_ptr + start * C, ok, TOKENS, False, C, P0, P1)
    g = _load_parts(g_ptr + start * O, ok, TOKENS, False, O, Q0, Q1)
    i = tl.arange(0, TOKENS)
    dn = _zeros(TOKENS, P0, P1)
    for j0 in range(0, J, HIDDEN):
        j = j0 + tl.arange(0, HIDDEN)
        j_ok = j < J
        w1 = _load_parts(w1_ptr + j0 * C, j_ok, HIDDEN, J % HIDDEN == 0, C, P0, P1)
        w2 = _load_parts(w2t_ptr + j0 * O, j_ok, HIDDEN, J % HIDDEN == 0, O, Q0, Q1)
        if hidden_ptr is None:
            b1 = tl.load(table_ptr + j, mask=j_ok, other=0.0)
            h = _sum_products(n, w1, tl.zeros([TOKENS, HIDDEN], tl.float32), PRECISION) + b1[None, :]
        else:
            hidden_ptrs = hidden_ptr + start * J + i[:, None] * J + j[None, :]
            h = tl.load(hidden_ptrs, mask=ok[:, None] & j_ok[None, :], other=0.0).to(tl.float32)
        dp = _sum_products(g, w2, tl.zeros([TOKENS, HIDDEN], tl.float32), PRECISION)
        if SCALED:
            dp *= tl.load(table_ptr + J + j, mask=j_ok, other=0.0)[None, :]
        _, slope = activate_with_derivative(h, ACTIVATION, EXACT)
        dh = dp * slope
        if drop_ptr is not None:
            dh *= drop[:, None]
        dn = _accumulate(dn, round_to(dh, DTYPE), w1, PRECISION)
    k0 = mean
    k1 = mean
    if NORM:
        k0 = tl.load(k_ptr + b * 2, mask=ok, other=0.0)
        k1 = tl.load(k_ptr + b * 2 + 1, mask=ok, other=0.0)
    if norm_sums_ptr is not None:
        norm_sums_ptr += tile.to(tl.int64) * (2 * C)
    for k in tl.static_range(len(dn)):
        c = k * P0 + tl.arange(0, P1 if k else P0)
        store_dx(
            dn[k], x_ptr, grad_ptr, dx_ptr, gamma_ptr, norm_sums_ptr, start, ok, c, HW, mean, rstd, k0, k1,
            C, k * P0 + (P1 if k else P0), TOKENS, CHANNELS_LAST, NORM, RESIDUAL,
        )  # fmt: skip
    if grad_sums_ptr is not None:
        for k in tl.static_range(len(g)):
            o = k * Q0 + tl.arange(0, Q1 if k else Q0)
            total = tl.sum(g[k].to(tl.float32) * drop[:, None], 0)
            tl.store(grad_sums_ptr + tile.to(tl.int64) * O + o, total, mask=o < O)


def compute_partials(problem: Problem, launch: FusedBackward) -> Partials:
    """Writes dx of the whole call; returns the sums over tokens that the other gradients come from."""
    x = problem.x
    batch, _, height, width = x.shape
    pixels = height * width
    channels, out, hidden = sizes = problem.sizes
    vectors = {"dtype": torch.float32, "device": x.device}
    n = g = None
    if problem.norm or not is_operand(problem):
        n = torch.empty((batch * pixels, channels), dtype=problem.w1.dtype, device=x.device)
    if not is_operand(problem):
        g = torch.empty((batch * pixels, out), dtype=problem.w1.dtype, device=x.device)
    prepare(problem, n, g, None)
    n, g = x if n is None else n, problem.grad if g is None else g
    blocks = ceil_div(hidden, launch.weight_hidden)
    tiles = ceil_div(batch * pixels, launch.weight_tokens)
    per_split = ceil_div(tiles, max(1, launch.programs // blocks))
    splits = ceil_div(tiles, per_split)
    dw1 = dw2 = db1 = k = token_sums = None
    ddrop = problem.empty_drop_grad()
    if problem.parameter_grads:
        dw1 = torch.empty((splits, hidden, channels), **vectors)
        dw2 = torch.empty((splits, out, hidden), **vectors)
        db1 = torch.empty((splits, hidden), **vectors)
    if problem.norm or problem.drop_grad:
        token_sums = torch.empty((3, blocks, batch * pixels), **vectors)
    shape = (*sizes, *power_of_2_parts(channels), *power_of_2_parts(out))
    if token_sums is not None or problem.parameter_grads:
        mlp_bwd_wgrad[(splits * blocks,)](
            n, g, problem.drop, problem.hidden, problem.w1, problem.w2t, problem.table, token_sums,
            dw1, dw2, db1, pixels, batch * pixels, tiles, per_split, *shape, launch.weight_tokens,
            launch.weight_hidden, problem.activation, problem.norm, problem.drop_grad, problem.scaled,
            problem.precision,
            num_warps=launch.weight_warps, num_stages=launch.weight_stages,
            maxnreg=255 if problem.drop_grad else launch.registers, **OPTIONS,
        )  # fmt: skip
    if token_sums is not None:
        k = sample_sums(problem, token_sums, g, ddrop)
    tiles = problem.tiles(launch.tokens)
    dnorm = grad_sums = None
    if problem.parameter_grads:
        dnorm = torch.empty((tiles, 2 * channels), **vectors) if problem.norm else None
        grad_sums = torch.empty((tiles, out), **vectors)
    mlp_bwd_dx[(tiles,)](
        n, g, problem.grad, x, problem.mean_rstd, problem.gamma, problem.drop, problem.hidden, problem.w1,
        problem.w2t, problem.table, k, problem.dx, dnorm, grad_sums, pixels, batch * pixels,
        *shape, launch.tokens, launch.hidden, problem.activation, problem.channels_last, problem.norm,
        problem.residual, problem.scaled, problem.precision, num_warps=launch.warps, num_stages=launch.stages,
        maxnreg=launch.registers, **OPTIONS,
    )  # fmt: skip
    return Partials(dw1, dw2, db1, dnorm, grad_sums, ddrop)
