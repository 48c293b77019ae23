"""The MLP's backward where C is large: the hidden gradient of a chunk of samples, then matrix products.

Chunks are whole blocks of samples (`chunks`). The products that give the weights' gradients are cuBLAS's for
operands of two bytes, accumulated and written in fp32, one call a block; float32 operands take
`mlp_bwd_outer`, because `torch.mm` would obey the setting of matrix products, and these weights are a
convolution's. ``dn = dh W1`` stays a kernel of ours, which computes dx from its accumulators. cuBLAS would
write dn and another kernel read it: 8 bytes an element of x more in fp32 (4, and a rounding, in bfloat16), a
third of what the kernel moves. Formulas: docs/algebra.md, "MLP".
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import activate_with_derivative
from ..config import OPTIONS, ceil_div
from ..device import memory_of
from ..launch import kernel
from ..tile import dot, load_or_one, round_to
from .backward_shared import Partials, Problem, is_operand, prepare, sample_sums
from .chunks import Chunks, divide
from .config import IMAGE_TOKENS, WORKSPACE_SHARE, BackwardGemms
from .tile import sample_values, store_dx, tile_mask, token_tile

__all__ = ["compute_partials"]


@triton.jit
def _load_tile(ptr, rows, columns, WIDTH: tl.constexpr, ok, EVEN: tl.constexpr):
    """A tile of a row-major matrix of WIDTH columns; ``ok``: which rows exist; ``EVEN``: all columns do."""
    ptrs = ptr + rows[:, None] * WIDTH + columns[None, :]
    mask = ok[:, None]
    if not EVEN:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@kernel(do_not_specialize=["HW", "T"])
def mlp_bwd_hidden(
    n_ptr, g_ptr, drop_ptr, hidden_ptr, w1_ptr, w2t_ptr, table_ptr, p_ptr, dh_ptr,
    token_sums_ptr, db1_ptr, HW, T, C: tl.constexpr, O: tl.constexpr, J: tl.constexpr,  # noqa: E741
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, ACTIVATION: tl.constexpr,
    NORM: tl.constexpr, DROP: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The hidden activation and gradient of a tile, sums per token, and fc1's bias gradient.

    n_ptr: fc1's input [T, C] in the operands' dtype
    g_ptr: gradient of y [T, O] in the operands' dtype
    drop_ptr: drop scale [B], or None
    hidden_ptr: output of fc1 [T, J] as the forward saved it, or None: it is computed again
    w1_ptr: fc1's weight [J, C] in the operands' dtype
    w2t_ptr, table_ptr: [J, O] and [4, J] of `mlp_bwd_prepare`
    p_ptr: output activations times d [T, J] in the operands' dtype, or None
    dh_ptr: output gradient of fc1's output [T, J] in the operands' dtype
    token_sums_ptr: output [3, blocks, T], fp32: sums over a tile's hidden channels of dh u, dh (h - v), p dp
    db1_ptr: output [tiles, J], fp32: sums of dh over a tile's tokens; or None
    HW, T: tokens of a sample, and of the chunk
    C, O, J: channels of x and of y, hidden channels
    TOKENS, HIDDEN, DEPTH: tokens and hidden channels of a tile, channels of one step of a product
    ACTIVATION: its name
    NORM, DROP: whether the first two sums per token are needed, and the third
    SCALED: whether `mlp_bwd_prepare` divided the rows of w2t
    PRECISION: how fp32 operands are multiplied, `product_precision`
    """
    BLOCKS: tl.constexpr = (J + HIDDEN - 1) // HIDDEN
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    block = tl.program_id(0) % BLOCKS
    tile = tl.program_id(0) // BLOCKS
    i = tl.arange(0, TOKENS)
    j = block * HIDDEN + tl.arange(0, HIDDEN)
    j_ok = j < J
    start, ok, b = token_tile(tile, HW, T, TOKENS, True)
    mask = tile_mask(ok, j, J, BLOCKS * HIDDEN)
    offsets = i[:, None] * J + j[None, :]
    if hidden_ptr is None:
        h = tl.zeros([TOKENS, HIDDEN], tl.float32)
        for c0 in range(0, C, DEPTH):
            c = c0 + tl.arange(0, DEPTH)
            n = _load_tile(n_ptr + start * C, i, c, C, ok, C % DEPTH == 0)
            w1 = _load_tile(w1_ptr, j, c, C, j_ok, C % DEPTH == 0)
            h = dot(n, tl.trans(w1), h, PRECISION)
        h += tl.load(table_ptr + j, mask=j_ok, other=0.0)[None, :]
    else:
        h = tl.load(hidden_ptr + start * J + offsets, mask=mask, other=0.0).to(tl.float32)
    drop = load_or_one(drop_ptr, b, ok)
    p, slope = activate_with_derivative(h, ACTIVATION, EXACT)
    if p_ptr is not None:  # stored before dp is computed, which needs the registers of p
        scaled = p if drop_ptr is None else p * drop[:, None]
        tl.store(p_ptr + start * J + offsets, round_to(scaled, DTYPE), mask=mask)
    h = round_to(h, DTYPE)  # needed once more below: in half the registers until then
    dp = tl.zeros([TOKENS, HIDDEN], tl.float32)
    for o0 in range(0, O, DEPTH):
        o = o0 + tl.arange(0, DEPTH)
        g = _load_tile(g_ptr + start * O, i, o, O, ok, O % DEPTH == 0)
        w2 = _load_tile(w2t_ptr, j, o, O, j_ok, O % DEPTH == 0)
        dp = dot(g, tl.trans(w2), dp, PRECISION)
    if SCALED:
        dp *= tl.load(table_ptr + J + j, mask=j_ok, other=0.0)[None, :]
    dh = dp * slope
    if drop_ptr is not None:
        dh *= drop[:, None]
    tl.store(dh_ptr + start * J + offsets, round_to(dh, DTYPE), mask=mask)
    plane = T.to(tl.int64)
    sum_ptrs = token_sums_ptr + (start + block * plane) + i
    if NORM:
        u = tl.load(table_ptr + 2 * J + j, mask=j_ok, other=0.0)
        v = tl.load(table_ptr + 3 * J + j, mask=j_ok, other=0.0)
        tl.store(sum_ptrs, tl.sum(dh * u[None, :], 1), mask=ok)
        tl.store(sum_ptrs + BLOCKS * plane, tl.sum(dh * (h.to(tl.float32) - v[None, :]), 1), mask=ok)
    if DROP:
        tl.store(sum_ptrs + 2 * BLOCKS * plane, tl.sum(p * dp, 1), mask=ok)
    if db1_ptr is not None:
        tl.store(db1_ptr + tile.to(tl.int64) * J + j, tl.sum(dh, 0), mask=j_ok)


@kernel(do_not_specialize=["T", "per_split"])
def mlp_bwd_outer(
    a_ptr, b_ptr, partial_ptr, T, per_split, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``a^T b`` over a split of the tokens: a tile of it.

    a_ptr, b_ptr: [T, M] and [T, N] in the operands' dtype
    partial_ptr: output [splits, M, N], fp32
    T: tokens of the block
    per_split: steps of a split
    M, N: rows and columns of the product
    ROWS, COLUMNS, DEPTH: rows and columns of a tile, tokens of one step
    PRECISION: how fp32 operands are multiplied, `product_precision`
    """
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
        a = _load_tile(a_ptr + start * M, t, m, M, ok, M % ROWS == 0)
        b = _load_tile(b_ptr + start * N, t, n, N, ok, N % COLUMNS == 0)
        acc = dot(tl.trans(a), b, acc, PRECISION)
    ptrs = partial_ptr + split * (M * N) + m[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(ptrs, acc, mask=mask)


@kernel(do_not_specialize=["HW", "T"])
def mlp_bwd_dn(
    dh_ptr, w1_ptr, grad_ptr, x_ptr, mean_rstd_ptr, gamma_ptr, k_ptr, dx_ptr, sums_ptr, HW, T,
    C: tl.constexpr, J: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of a tile from ``dn = dh W1``, and sums over its tokens.

    dh_ptr: gradient of fc1's output [T, J] in the operands' dtype
    w1_ptr: fc1's weight [J, C] in the operands' dtype
    grad_ptr, x_ptr: gradient of y [B, C, H, W] and x [B, C, H, W], in one layout; grad is the residual's
    mean_rstd_ptr: (mean, rstd) of x [B, 2], fp32
    gamma_ptr: GroupNorm's weight [C], or None
    k_ptr: (k0, k1) of `mlp_bwd_sample` [B, 2], fp32; None without the norm
    dx_ptr: output, like x
    sums_ptr: output [tiles, 2, C], fp32: sums of dn x_hat and of dn; or None
    HW, T: tokens of a sample, and of the chunk
    C, J: channels of x, hidden channels
    TOKENS, CHANNELS, DEPTH: tokens and channels of a tile, hidden channels of one step
    CHANNELS_LAST: whether the layout is channels_last
    NORM, RESIDUAL: whether there is a norm, and whether x was added to y
    PRECISION: how fp32 operands are multiplied, `product_precision`
    """
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0) // BLOCKS
    i = tl.arange(0, TOKENS)
    c = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    start, ok, b = token_tile(tile, HW, T, TOKENS, CHANNELS_LAST)
    mean, rstd, _ = sample_values(mean_rstd_ptr, None, b, ok, NORM)
    dn = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for j0 in range(0, J, DEPTH):
        j = j0 + tl.arange(0, DEPTH)
        dh = _load_tile(dh_ptr + start * J, i, j, J, ok, J % DEPTH == 0)
        w1 = _load_tile(w1_ptr, j, c, C, j < J, C % CHANNELS == 0)
        dn = dot(dh, w1, dn, PRECISION)
    k0 = mean
    k1 = mean
    if NORM:
        k0 = tl.load(k_ptr + b * 2, mask=ok, other=0.0)
        k1 = tl.load(k_ptr + b * 2 + 1, mask=ok, other=0.0)
    if sums_ptr is not None:
        sums_ptr += tile.to(tl.int64) * (2 * C)
    store_dx(
        dn, x_ptr, grad_ptr, dx_ptr, gamma_ptr, sums_ptr, start, ok, c, HW, mean, rstd, k0, k1,
        C, BLOCKS * CHANNELS, TOKENS, CHANNELS_LAST, NORM, RESIDUAL,
    )  # fmt: skip


class _Buffers(NamedTuple):
    """Memory for one chunk of T tokens, used again by the next; all but the sums in the operands' dtype."""

    n: Tensor | None  # fc1's input [T, C]; None: x is used as it is
    g: Tensor | None  # gradient of y [T, out]; None: it is used as it is
    p: Tensor | None  # activations times drop scale [T, hidden]; None without parameter gradients
    dh: Tensor  # gradient of fc1's output [T, hidden]
    token_sums: Tensor  # [3 x blocks of hidden channels x T], fp32


def allocate_buffers(problem: Problem, launch: BackwardGemms, tokens: int) -> _Buffers:
    """For chunks of so many tokens."""
    channels, out, hidden = problem.sizes
    operand = {"dtype": problem.w1.dtype, "device": problem.x.device}
    sums = 3 * ceil_div(hidden, launch.hidden) * tokens
    return _Buffers(
        n=torch.empty((tokens, channels), **operand) if problem.norm or not is_operand(problem) else None,
        g=None if is_operand(problem) else torch.empty((tokens, out), **operand),
        p=torch.empty((tokens, hidden), **operand) if problem.parameter_grads else None,
        dh=torch.empty((tokens, hidden), **operand),
        token_sums=torch.empty(sums, dtype=torch.float32, device=problem.x.device),
    )


def compute_partials(problem: Problem, launch: BackwardGemms) -> Partials:
    """Writes dx of the whole call; returns the sums over tokens that the other gradients come from."""
    batch, _, height, width = problem.x.shape
    pixels = height * width
    itemsize = problem.w1.element_size()
    chunks: Chunks | None = divide(
        (batch, pixels, *problem.sizes), itemsize, memory_of(problem.x) // WORKSPACE_SHARE
    )
    while True:
        parts = [
            _select_samples(problem, first, min(first + chunks.chunk, batch))
            for first in range(0, batch, chunks.chunk)
        ]
        rows = [_partial_counts(part, launch, chunks.block) for part in parts]
        try:
            sums = _empty_partials(problem, [sum(each) for each in zip(*rows, strict=True)])
            buffers = allocate_buffers(problem, launch, chunks.chunk * pixels)
            break
        except torch.OutOfMemoryError:
            sums, chunks = None, chunks.halved()
            if chunks is None:
                raise
    if len(parts) == 1:
        _compute_chunk(problem, launch, buffers, chunks.block * pixels, sums, True)
        return sums
    first = [0] * len(sums)
    for part, count in zip(parts, rows, strict=True):
        own = (
            None if t is None else t[start : start + n]
            for t, start, n in zip(sums, first, count, strict=True)
        )
        _compute_chunk(part, launch, buffers, chunks.block * pixels, Partials(*own), part is parts[0])
        first = [start + n for start, n in zip(first, count, strict=True)]
    return sums


def _partial_counts(problem: Problem, launch: BackwardGemms, block: int) -> tuple[int, ...]:
    """How many partials of each kind a chunk has, in the order of `Partials`; ``block``: samples of one."""
    channels, out, hidden = problem.sizes
    batch, _, height, width = problem.x.shape
    tokens, blocks = batch * height * width, ceil_div(batch, block)
    splits = 1, 1
    if not by_cublas(problem.w1.dtype):
        splits = (
            _split_count(launch, hidden, channels, block * height * width),
            _split_count(launch, out, hidden, block * height * width),
        )
    tiles = ceil_div(tokens, launch.tokens), problem.tiles(launch.tokens), problem.tiles(IMAGE_TOKENS)
    return blocks * splits[0], blocks * splits[1], *tiles, batch


def _split_count(launch: BackwardGemms, rows: int, columns: int, tokens: int) -> int:
    """Into how many parts the tokens of a weight gradient's product are split, each with at least 4 steps."""
    tiles = ceil_div(rows, launch.rows) * ceil_div(columns, launch.channels)
    return max(1, min(launch.programs // tiles, tokens // (4 * launch.depth)))


def _empty_partials(problem: Problem, counts: list[int]) -> Partials:
    """Memory for so many partials of each kind, where they are asked for."""
    channels, out, hidden = problem.sizes
    vectors = {"dtype": torch.float32, "device": problem.x.device}
    ddrop = problem.empty_drop_grad()
    if not problem.parameter_grads:
        return Partials(None, None, None, None, None, ddrop)
    dw1, dw2, db1, dnorm, grad, _ = counts
    return Partials(
        dw1=torch.empty((dw1, hidden, channels), **vectors),
        dw2=torch.empty((dw2, out, hidden), **vectors),
        db1=torch.empty((db1, hidden), **vectors),
        dnorm=torch.empty((dnorm, 2 * channels), **vectors) if problem.norm else None,
        grad=torch.empty((grad, out), **vectors),
        ddrop=ddrop,
    )


def _select_samples(problem: Problem, first: int, last: int) -> Problem:
    """The call for its samples ``first`` to ``last - 1`` alone."""
    if last - first == problem.x.shape[0]:
        return problem
    pixels = problem.x.shape[2] * problem.x.shape[3]
    hidden = problem.sizes[2]

    def part(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[first:last]

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


def _compute_chunk(
    problem: Problem, launch: BackwardGemms, buffers: _Buffers, block_tokens: int, sums: Partials, first: bool
) -> None:
    """Writes dx and the partials of a chunk; for the first one also the weights as operands."""
    x = problem.x
    batch, _, height, width = x.shape
    channels, out, hidden = problem.sizes
    pixels = height * width
    tokens = batch * pixels
    blocks = ceil_div(hidden, launch.hidden)
    prepare(problem, buffers.n, buffers.g, sums.grad, first)
    n = x if buffers.n is None else buffers.n
    g = problem.grad if buffers.g is None else buffers.g
    token_sums = buffers.token_sums
    if token_sums.numel() > 3 * blocks * tokens:
        token_sums = token_sums[: 3 * blocks * tokens]
    token_sums = token_sums.view(3, blocks, tokens)
    mlp_bwd_hidden[(ceil_div(tokens, launch.tokens) * blocks,)](
        n, g, problem.drop, problem.hidden, problem.w1, problem.w2t, problem.table,
        buffers.p, buffers.dh, token_sums, sums.db1, pixels, tokens, channels, out, hidden, launch.tokens,
        launch.hidden, launch.depth, problem.activation, problem.norm, problem.drop_grad, problem.scaled,
        problem.precision, num_warps=launch.warps, num_stages=launch.stages, **OPTIONS,
    )  # fmt: skip
    k = None
    if problem.norm or problem.drop_grad:
        k = sample_sums(problem, token_sums, g, sums.ddrop)
    if problem.parameter_grads:
        _weight_product(launch, buffers.dh, _as_rows(n), sums.dw1, tokens, block_tokens, problem.precision)
        _weight_product(launch, _as_rows(g), buffers.p, sums.dw2, tokens, block_tokens, problem.precision)
    tiles = problem.tiles(launch.tokens)
    mlp_bwd_dn[(tiles * ceil_div(channels, launch.columns),)](
        buffers.dh, problem.w1, problem.grad, x, problem.mean_rstd, problem.gamma, k, problem.dx, sums.dnorm,
        pixels, tokens, channels, hidden, launch.tokens, launch.columns, launch.depth, problem.channels_last,
        problem.norm, problem.residual, problem.precision, num_warps=launch.warps, num_stages=launch.stages,
        **OPTIONS,
    )  # fmt: skip


def _as_rows(t: Tensor) -> Tensor:
    """Tokens as the rows of a matrix, from such or from a channels_last image."""
    return t if t.dim() == 2 else t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _weight_product(
    launch: BackwardGemms, a: Tensor, b: Tensor, partials: Tensor, tokens: int, block_tokens: int,
    precision: str,
) -> None:  # fmt: skip
    """``a^T b`` over each block of a chunk's tokens, in fp32, as one or several of the partials [_, m, n]."""
    blocks = ceil_div(tokens, block_tokens)
    splits = partials.shape[0] // blocks
    for i in range(blocks):
        rows = slice(i * block_tokens, min((i + 1) * block_tokens, tokens))
        whole = a.shape[0] == b.shape[0] == rows.stop - rows.start  # a slice takes as long as an allocation
        block_a, block_b = (a, b) if whole else (a[rows], b[rows])
        if by_cublas(a.dtype):
            _bfloat16_product(block_a, block_b, partials[i])
            continue
        out = partials[i * splits : (i + 1) * splits]
        _, m, n = out.shape
        per_split = ceil_div(ceil_div(rows.stop - rows.start, launch.depth), splits)
        tiles = ceil_div(m, launch.rows) * ceil_div(n, launch.channels)
        mlp_bwd_outer[(splits * tiles,)](
            block_a, block_b, out, rows.stop - rows.start, per_split, m, n, launch.rows, launch.channels,
            launch.depth, precision, num_warps=launch.warps, num_stages=launch.stages, **OPTIONS,
        )  # fmt: skip


def by_cublas(operand: torch.dtype) -> bool:
    """Whether cuBLAS computes the weights' gradients of these operands.

    Its float32 products would obey another setting than ours for TF32, and its products of float16 have no
    float32 result where PyTorch's `allow_fp16_accumulation` is set.
    """
    return operand == torch.bfloat16


def _bfloat16_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a^T b`` for bfloat16 operands and an fp32 result."""
    if a.is_cpu:  # interpreted: only CUDA's mm has a result of another dtype
        torch.mm(a.t().float(), b.float(), out=out)
    else:
        torch.mm(a.t(), b, out_dtype=torch.float32, out=out)
