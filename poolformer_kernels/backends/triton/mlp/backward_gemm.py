"""The MLP's backward where C is large: the hidden gradient of a chunk of samples, then matrix products.

The hidden buffers hold at most WORKSPACE elements each (or one sample); a chunk's weight gradients are added
to the last one's, in order. Formulas: algebra, "MLP sub-block".
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import activate_with_derivative
from ..config import OPTIONS
from ..tile import dot, rounded, vector
from .backward_shared import TOKENS, Partials, Problem, direct, sample_sums, to_tokens
from .config import WORKSPACE, BackwardGemms
from .tile import finished, inside, sample_values, token_tile

__all__ = ["partials"]


@triton.jit
def _matrix(ptr, rows, columns, WIDTH: tl.constexpr, ok, EVEN: tl.constexpr):
    """A tile of a row-major matrix; ``ok``: the rows that exist; ``EVEN``: so do all columns."""
    at = ptr + rows[:, None] * WIDTH + columns[None, :]
    mask = ok[:, None]
    if not EVEN:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["HW", "T"])
def mlp_bwd_hidden(
    n_ptr, g_ptr, drop_ptr, hidden_ptr, w1_ptr, w2t_ptr, table_ptr, p_ptr, dh_ptr,
    rows_ptr, db1_ptr, HW, T, C: tl.constexpr, O: tl.constexpr, J: tl.constexpr,  # noqa: E741
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, ACTIVATION: tl.constexpr,
    NORM: tl.constexpr, DROP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The hidden activation (times d) and gradient ``[T, J]``; sums per token, and over a tile's tokens."""
    BLOCKS: tl.constexpr = (J + HIDDEN - 1) // HIDDEN
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    block = tl.program_id(0) % BLOCKS
    tile = tl.program_id(0) // BLOCKS
    i = tl.arange(0, TOKENS)
    j = block * HIDDEN + tl.arange(0, HIDDEN)
    j_ok = j < J
    start, ok, b = token_tile(tile, HW, T, TOKENS, True)
    mask = inside(ok, j, J, BLOCKS * HIDDEN)
    at = i[:, None] * J + j[None, :]
    if hidden_ptr is None:
        h = tl.zeros([TOKENS, HIDDEN], tl.float32)
        for c0 in range(0, C, DEPTH):
            c = c0 + tl.arange(0, DEPTH)
            n = _matrix(n_ptr + start * C, i, c, C, ok, C % DEPTH == 0)
            w1 = _matrix(w1_ptr, j, c, C, j_ok, C % DEPTH == 0)
            h = dot(n, tl.trans(w1), h)
        h += tl.load(table_ptr + j, mask=j_ok, other=0.0)[None, :]
    else:
        h = tl.load(hidden_ptr + start * J + at, mask=mask, other=0.0).to(tl.float32)
    drop = vector(drop_ptr, b, ok)
    p, slope = activate_with_derivative(h, ACTIVATION, EXACT)
    if p_ptr is not None:  # before dp, which needs its registers
        scaled = p if drop_ptr is None else p * drop[:, None]
        tl.store(p_ptr + start * J + at, rounded(scaled, DTYPE), mask=mask)
    h = rounded(h, DTYPE)  # half the registers: for k1
    dp = tl.zeros([TOKENS, HIDDEN], tl.float32)
    for o0 in range(0, O, DEPTH):
        o = o0 + tl.arange(0, DEPTH)
        g = _matrix(g_ptr + start * O, i, o, O, ok, O % DEPTH == 0)
        w2 = _matrix(w2t_ptr, j, o, O, j_ok, O % DEPTH == 0)
        dp = dot(g, tl.trans(w2), dp)
    if SCALED:
        dp *= tl.load(table_ptr + J + j, mask=j_ok, other=0.0)[None, :]
    dh = dp * slope
    if drop_ptr is not None:
        dh *= drop[:, None]
    tl.store(dh_ptr + start * J + at, rounded(dh, DTYPE), mask=mask)
    plane = T.to(tl.int64)
    row = rows_ptr + (start + block * plane) + i
    if NORM:
        u = tl.load(table_ptr + 2 * J + j, mask=j_ok, other=0.0)
        v = tl.load(table_ptr + 3 * J + j, mask=j_ok, other=0.0)
        tl.store(row, tl.sum(dh * u[None, :], 1), mask=ok)
        tl.store(row + BLOCKS * plane, tl.sum(dh * (h.to(tl.float32) - v[None, :]), 1), mask=ok)
    if DROP:
        tl.store(row + 2 * BLOCKS * plane, tl.sum(p * dp, 1), mask=ok)
    if db1_ptr is not None:
        tl.store(db1_ptr + tile.to(tl.int64) * J + j, tl.sum(dh, 0), mask=j_ok)


@triton.jit(do_not_specialize=["T", "per_split"])
def mlp_bwd_outer(
    a_ptr, b_ptr, partial_ptr, T, per_split, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Adds ``a^T b`` over a split's tokens, ``per_split`` steps of DEPTH, to its partial ``[M, N]``."""
    ROW_TILES: tl.constexpr = (M + ROWS - 1) // ROWS
    COLUMN_TILES: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    m = pid // COLUMN_TILES % ROW_TILES * ROWS + tl.arange(0, ROWS)
    n = pid % COLUMN_TILES * COLUMNS + tl.arange(0, COLUMNS)
    split = (pid // (ROW_TILES * COLUMN_TILES)).to(tl.int64)
    t = tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(per_split):
        start = (split * per_split + step) * DEPTH
        ok = t < T - start
        a = _matrix(a_ptr + start * M, t, m, M, ok, M % ROWS == 0)
        b = _matrix(b_ptr + start * N, t, n, N, ok, N % COLUMNS == 0)
        acc = dot(tl.trans(a), b, acc)
    at = partial_ptr + split * (M * N) + m[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit(do_not_specialize=["HW", "T"])
def mlp_bwd_dn(
    dh_ptr, w1_ptr, grad_ptr, x_ptr, mean_rstd_ptr, gamma_ptr, k_ptr, dx_ptr, sums_ptr, HW, T,
    C: tl.constexpr, J: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    LAST: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """dx from ``dn = dh W1``, and the sums ``dn x_hat`` and ``dn`` over a tile's tokens."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0) // BLOCKS
    i = tl.arange(0, TOKENS)
    c = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    start, ok, b = token_tile(tile, HW, T, TOKENS, LAST)
    mean, rstd, _ = sample_values(mean_rstd_ptr, None, b, ok, NORM)
    dn = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for j0 in range(0, J, DEPTH):
        j = j0 + tl.arange(0, DEPTH)
        dh = _matrix(dh_ptr + start * J, i, j, J, ok, J % DEPTH == 0)
        w1 = _matrix(w1_ptr, j, c, C, j < J, C % CHANNELS == 0)
        dn = dot(dh, w1, dn)
    k0 = mean
    k1 = mean
    if NORM:
        k0 = tl.load(k_ptr + b * 2, mask=ok, other=0.0)
        k1 = tl.load(k_ptr + b * 2 + 1, mask=ok, other=0.0)
    if sums_ptr is not None:
        sums_ptr += tile.to(tl.int64) * (2 * C)
    finished(
        dn, x_ptr, grad_ptr, dx_ptr, gamma_ptr, sums_ptr, start, ok, c, HW, mean, rstd, k0, k1,
        C, BLOCKS * CHANNELS, TOKENS, LAST, NORM, RESIDUAL,
    )  # fmt: skip


def partials(problem: Problem, p: BackwardGemms) -> Partials:
    """Writes dx; returns the sums over tokens."""
    x = problem.x
    batch, _, height, width = x.shape
    channels, out, hidden = problem.sizes
    pixels = height * width
    vectors = {"dtype": torch.float32, "device": x.device}
    step = _samples(batch, pixels, hidden)
    tokens = step * pixels
    operand = {"dtype": problem.w1.dtype, "device": x.device}
    buffers = _Buffers(
        n=torch.empty((tokens, channels), **operand) if problem.norm or not direct(problem) else None,
        g=None if direct(problem) else torch.empty((tokens, out), **operand),
        p=torch.empty((tokens, hidden), **operand) if problem.parameter_grads else None,
        dh=torch.empty((tokens, hidden), **operand),
        rows=torch.empty((3, triton.cdiv(hidden, p.hidden), tokens), **vectors),
    )
    dw1 = dw2 = None
    if problem.parameter_grads:
        dw1 = torch.zeros((_splits(p, hidden, channels, tokens), hidden, channels), **vectors)
        dw2 = torch.zeros((_splits(p, out, hidden, tokens), out, hidden), **vectors)
    sums = []
    for first in range(0, batch, step):
        chunk = _chunk(problem, first, min(first + step, batch))
        sums.append(_chunk_partials(chunk, p, buffers, dw1, dw2))
    db1, dnorm, grad, ddrop = (
        None if parts[0] is None else parts[0] if len(parts) == 1 else torch.cat(parts)
        for parts in zip(*sums, strict=True)
    )
    return Partials(dw1, dw2, db1, dnorm, grad, ddrop)


class _Buffers(NamedTuple):
    """Of one chunk of tokens, row-major: fc1's input, the gradient, activation and hidden gradient, sums."""

    n: Tensor | None
    g: Tensor | None
    p: Tensor | None
    dh: Tensor
    rows: Tensor


def _samples(batch: int, pixels: int, hidden: int) -> int:
    """How many samples a chunk has; whole eights keep vectors that start at a chunk aligned."""
    most = max(1, WORKSPACE // (pixels * hidden))
    if most >= batch:
        return batch
    chunks = triton.cdiv(batch, most)
    even = triton.cdiv(batch, chunks)
    return min(most, triton.cdiv(even, 8) * 8)


def _splits(p: BackwardGemms, rows: int, columns: int, tokens: int) -> int:
    tiles = triton.cdiv(rows, p.rows) * triton.cdiv(columns, p.channels)
    return max(1, min(p.programs // tiles, tokens // (4 * p.depth)))


def _chunk(problem: Problem, first: int, last: int) -> Problem:
    """The call's samples from first to last."""
    if last - first == problem.x.shape[0]:
        return problem
    pixels = problem.x.shape[2] * problem.x.shape[3]
    hidden = problem.sizes[2]
    part = lambda t: None if t is None else t[first:last]  # noqa: E731
    saved = problem.hidden
    if saved is not None:
        saved = saved[first * pixels * hidden : last * pixels * hidden]
    return problem._replace(
        grad=part(problem.grad),
        x=part(problem.x),
        dx=part(problem.dx),
        mean_rstd=part(problem.mean_rstd) if problem.norm else problem.mean_rstd,
        drop=part(problem.drop),
        hidden=saved,
    )


def _chunk_partials(
    problem: Problem, p: BackwardGemms, buffers: _Buffers, dw1: Tensor | None, dw2: Tensor | None
) -> tuple[Tensor | None, ...]:
    """dx of a chunk; adds to dw1 and dw2, returns the chunk's (db1, dnorm, grad, ddrop) of `Partials`."""
    x = problem.x
    batch, _, height, width = x.shape
    channels, out, hidden = problem.sizes
    pixels = height * width
    tokens = batch * pixels
    vectors = {"dtype": torch.float32, "device": x.device}
    tiles = problem.tiles(p.tokens)
    blocks = triton.cdiv(hidden, p.hidden)
    db1 = dnorm = grad_sums = k = ddrop = None
    if problem.parameter_grads:
        db1 = torch.empty((triton.cdiv(tokens, p.tokens), hidden), **vectors)
        dnorm = torch.empty((tiles, 2 * channels), **vectors) if problem.norm else None
        grad_sums = torch.empty((problem.tiles(TOKENS), out), **vectors)
    if buffers.n is not None:
        to_tokens(problem, x, buffers.n, None, problem.norm)
    if buffers.g is not None or grad_sums is not None:
        to_tokens(problem, problem.grad, buffers.g, grad_sums)
    n = x if buffers.n is None else buffers.n
    g = problem.grad if buffers.g is None else buffers.g
    rows = buffers.rows.view(-1)[: 3 * blocks * tokens].view(3, blocks, tokens)
    mlp_bwd_hidden[(triton.cdiv(tokens, p.tokens) * blocks,)](
        n, g, problem.drop, problem.hidden, problem.w1, problem.w2t, problem.table,
        buffers.p, buffers.dh, rows, db1, pixels, tokens, channels, out, hidden, p.tokens, p.hidden, p.depth,
        problem.activation, problem.norm, problem.drop_grad, problem.scaled,
        num_warps=p.warps, num_stages=p.stages, **OPTIONS,
    )  # fmt: skip
    if problem.norm or problem.drop_grad:
        k, ddrop = sample_sums(problem, rows, g)
    if dw1 is not None:
        _add_products(p, buffers.dh, n, dw1, tokens)
        _add_products(p, g, buffers.p, dw2, tokens)
    mlp_bwd_dn[(tiles * triton.cdiv(channels, p.columns),)](
        buffers.dh, problem.w1, problem.grad, x, problem.mean_rstd, problem.gamma, k, problem.dx, dnorm,
        pixels, tokens, channels, hidden, p.tokens, p.columns, p.depth, problem.last, problem.norm,
        problem.residual, num_warps=p.warps, num_stages=p.stages, **OPTIONS,
    )  # fmt: skip
    return db1, dnorm, grad_sums, ddrop


def _add_products(p: BackwardGemms, a: Tensor, b: Tensor, partial: Tensor, tokens: int) -> None:
    """Adds a chunk's ``a^T b`` to the splits of a weight gradient."""
    splits, m, n = partial.shape
    per_split = triton.cdiv(triton.cdiv(tokens, p.depth), splits)
    tiles = triton.cdiv(m, p.rows) * triton.cdiv(n, p.channels)
    mlp_bwd_outer[(splits * tiles,)](
        a, b, partial, tokens, per_split, m, n, p.rows, p.channels, p.depth,
        num_warps=p.warps, num_stages=p.stages, **OPTIONS,
    )  # fmt: skip
