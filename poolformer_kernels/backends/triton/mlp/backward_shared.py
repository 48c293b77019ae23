"""What both forms of the MLP's backward need: the weights are prepared before, the sums finished after.

Every sum over tokens arrives as fp32 partials, which are added here in an order that depends on the shape
alone. Formulas: docs/algebra.md, "MLP".
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import OPTIONS, next_power_of_2
from ..launch import kernel
from ..tile import load_or_one, load_or_zero, round_to
from .config import (
    IMAGE_CHANNELS,
    IMAGE_TOKENS,
    PREPARE_CHANNELS,
    PREPARE_HIDDEN,
    SAMPLE_CHANNELS,
    SAMPLE_TOKENS,
    SAMPLE_VALUES,
    SUM_COLUMNS,
    SUM_GROUP,
    SUM_ROWS,
    WEIGHT_COLUMNS,
    WEIGHT_SPLITS,
)
from .tile import image_pointers, load_normalised, sample_values, tile_mask, token_tile

__all__ = [
    "Partials",
    "Problem",
    "is_operand",
    "prepare_weights",
    "sample_sums",
    "sum_rows",
    "weight_gradient",
    "write_tokens",
]


class Problem(NamedTuple):
    """One call of the operator: dense tensors, and the weights as the products' operands.

    The images (grad, x and dx) have one layout.
    """

    grad: Tensor  # gradient of y [B, out, H, W]
    x: Tensor  # [B, C, H, W]
    dx: Tensor  # output, like x
    mean_rstd: Tensor  # (mean, rstd) of x [B, 2], fp32; empty without the norm
    gamma: Tensor | None  # GroupNorm's weight [C]
    beta: Tensor | None  # GroupNorm's bias [C]
    scale: Tensor | None  # LayerScale [out]
    drop: Tensor | None  # drop scale [B]
    b2: Tensor | None  # fc2's bias [out]
    hidden: Tensor | None  # output of fc1 [B H W hidden], as the forward saved it
    w1: Tensor  # fc1's weight [hidden, C] in the operands' dtype
    w2t: Tensor  # fc2's weight times LayerScale, transposed: [hidden, out] in the operands' dtype
    table: Tensor  # [4, hidden], fp32: b1, the divisors of w2t's rows, W1 gamma, b1 + W1 beta
    activation: str  # its name
    channels_last: bool  # whether the images are channels_last
    norm: bool  # whether fc1's input is GroupNorm's output
    residual: bool  # whether x was added to y
    parameter_grads: bool  # whether the gradients of weights and vectors are asked for
    drop_grad: bool  # whether drop scale's gradient is asked for
    scaled: bool  # whether w2t's rows were divided

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(C, out, hidden)."""
        return self.x.shape[1], self.w2t.shape[1], self.w1.shape[0]

    def tiles(self, tokens: int) -> int:
        """How many tiles of so many tokens cover the images: `token_tile`."""
        batch, _, height, width = self.x.shape
        if self.channels_last:
            return triton.cdiv(batch * height * width, tokens)
        return batch * triton.cdiv(height * width, tokens)


class Partials(NamedTuple):
    """Sums over tokens in fp32, before their last reduction; None where they are not needed."""

    dw1: Tensor | None  # [splits, hidden, C]
    dw2: Tensor | None  # [splits, out, hidden], before LayerScale multiplies it
    db1: Tensor | None  # [tiles, hidden]
    dnorm: Tensor | None  # [tiles, 2 C]: of GroupNorm's weight, then of its bias
    grad: Tensor | None  # [tiles, out]: the gradient of y times drop scale
    ddrop: Tensor | None  # [B], complete


@kernel
def mlp_bwd_prepare(
    w1_ptr, b1_ptr, w2_ptr, gamma_ptr, beta_ptr, scale_ptr, operand_ptr, w2t_ptr, table_ptr,
    C: tl.constexpr, O: tl.constexpr, J: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,  # noqa: E741
    SCALED: tl.constexpr,
):  # fmt: skip
    """The weights as operands, and a table of vectors of hidden channels.

    float16 has too small a range for a LayerScale of 1e-5: with SCALED each row of w2t is divided by the
    magnitude of its largest element, which the table keeps.

    w1_ptr, b1_ptr: fc1's weight [J, C], bias [J] or None
    w2_ptr: fc2's weight [O, J]
    gamma_ptr, beta_ptr: GroupNorm's weight and bias [C], or None
    scale_ptr: LayerScale [O], or None
    operand_ptr: output w1 [J, C] in the operands' dtype, or None where w1 has it
    w2t_ptr: output ``W2^T diag(s)`` [J, O] in the operands' dtype
    table_ptr: output [4, J], fp32: b1, the rows' divisors, u = W1 gamma, v = b1 + W1 beta
    C, O, J: channels of x and of y, hidden channels
    HIDDEN, CHANNELS: hidden channels of a program, channels that are loaded at a time
    SCALED: whether the rows of w2t are divided
    """
    DTYPE: tl.constexpr = w2t_ptr.dtype.element_ty
    j = tl.program_id(0) * HIDDEN + tl.arange(0, HIDDEN)
    j_ok = j < J
    u = tl.zeros([HIDDEN], tl.float32)
    v = tl.zeros([HIDDEN], tl.float32)
    for c0 in range(0, C, CHANNELS):
        c = c0 + tl.arange(0, CHANNELS)
        mask = j_ok[:, None] & (c < C)[None, :]
        offsets = j[:, None] * C + c[None, :]
        w = round_to(tl.load(w1_ptr + offsets, mask=mask, other=0.0).to(tl.float32), DTYPE)
        if operand_ptr is not None:
            tl.store(operand_ptr + offsets, w, mask=mask)
        u += tl.sum(w.to(tl.float32) * load_or_one(gamma_ptr, c, c < C)[None, :], 1)
        v += tl.sum(w.to(tl.float32) * load_or_zero(beta_ptr, c, c < C)[None, :], 1)
    b1 = load_or_zero(b1_ptr, j, j_ok)
    peak = tl.full([HIDDEN], 1.0, tl.float32)
    if SCALED:
        peak = tl.zeros([HIDDEN], tl.float32)
        for o0 in range(0, O, CHANNELS):
            o = o0 + tl.arange(0, CHANNELS)
            mask = j_ok[:, None] & (o < O)[None, :]
            w = tl.load(w2_ptr + o[None, :] * J + j[:, None], mask=mask, other=0.0).to(tl.float32)
            peak = tl.maximum(peak, tl.max(tl.abs(w * load_or_one(scale_ptr, o, o < O)[None, :]), 1))
        peak = tl.where(peak > 1e-30, peak, 1.0)  # a row of zeros stays as it is
    for o0 in range(0, O, CHANNELS):
        o = o0 + tl.arange(0, CHANNELS)
        mask = j_ok[:, None] & (o < O)[None, :]
        w = tl.load(w2_ptr + o[None, :] * J + j[:, None], mask=mask, other=0.0).to(tl.float32)
        w *= load_or_one(scale_ptr, o, o < O)[None, :]
        if SCALED:
            w /= peak[:, None]
        tl.store(w2t_ptr + j[:, None] * O + o[None, :], round_to(w, DTYPE), mask=mask)
    tl.store(table_ptr + j, b1, mask=j_ok)
    tl.store(table_ptr + J + j, peak, mask=j_ok)
    tl.store(table_ptr + 2 * J + j, u, mask=j_ok)
    tl.store(table_ptr + 3 * J + j, b1 + v, mask=j_ok)


@kernel(do_not_specialize=["HW", "T"])
def mlp_bwd_tokens(
    x_ptr, mean_rstd_ptr, gamma_ptr, beta_ptr, drop_ptr, tokens_ptr, sums_ptr, HW, T,
    C: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """A tile of an image as rows of an operand, and its sums over tokens.

    x_ptr: image [B, C, H, W]: x or the gradient of y
    mean_rstd_ptr: (mean, rstd) of x [B, 2], fp32
    gamma_ptr, beta_ptr: GroupNorm's weight and bias [C], or None
    drop_ptr: drop scale [B], or None
    tokens_ptr: output [T, C] in the operands' dtype, or None
    sums_ptr: output [tiles, C], fp32: sums of the image times drop scale; or None
    HW, T: tokens of a sample, and of all
    C: channels
    TOKENS, CHANNELS: of a tile
    CHANNELS_LAST: whether the image is channels_last
    NORM: whether the rows are normalised
    """
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0) // BLOCKS
    c = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    start, ok, b = token_tile(tile, HW, T, TOKENS, CHANNELS_LAST)
    mean, rstd, drop = sample_values(mean_rstd_ptr, drop_ptr, b, ok, NORM)
    mask = tile_mask(ok, c, C, BLOCKS * CHANNELS)
    ptrs = image_pointers(x_ptr, start, c, HW, C, TOKENS, CHANNELS_LAST)
    if tokens_ptr is not None:
        gamma = load_or_one(gamma_ptr, c, c < C)
        beta = load_or_zero(beta_ptr, c, c < C)
        n = load_normalised(ptrs, mask, mean, rstd, gamma, beta, NORM, tokens_ptr.dtype.element_ty)
        tl.store(image_pointers(tokens_ptr, start, c, HW, C, TOKENS, True), n, mask=mask)
    if sums_ptr is not None:
        total = tl.sum(tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) * drop[:, None], 0)
        tl.store(sums_ptr + tile.to(tl.int64) * C + c, total, mask=c < C)


@triton.jit
def _sample_total(token_sums_ptr, first, HW, plane, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of one kind of sums per token, over a sample's tokens and the PARTS blocks of hidden channels.

    first: the sample's first token; plane: tokens of all; BLOCK: tokens that are added at a time
    """
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < HW:
        i = start + tl.arange(0, BLOCK)
        for part in range(PARTS):
            total += tl.load(token_sums_ptr + part * plane + first + i, mask=i < HW, other=0.0)
        start += BLOCK
    return tl.sum(total)


@kernel(do_not_specialize=["HW", "T"])
def mlp_bwd_sample(
    token_sums_ptr, g_ptr, scale_ptr, b2_ptr, k_ptr, ddrop_ptr, HW, T, C: tl.constexpr, O: tl.constexpr,  # noqa: E741
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Of one sample: the two means of GroupNorm's backward, and drop_scale's gradient.

    token_sums_ptr: sums per token [3, PARTS, T], fp32: of dh u, dh (h - v), p dp
    g_ptr: gradient of y [T, O] in the operands' dtype
    scale_ptr, b2_ptr: LayerScale and fc2's bias [O], or None
    k_ptr: output [B, 2], fp32: the means over the sample of gamma dn and of gamma dn x_hat
    ddrop_ptr: output [B], fp32, or None
    HW, T: tokens of a sample, and of all
    C, O: channels of x and of y
    PARTS: blocks of hidden channels
    BLOCK: tokens of the sums that are added at a time
    ROWS, CHANNELS: tokens and channels of the gradient that are added at a time
    NORM: whether there is a norm; else k_ptr is not written
    """
    b = tl.program_id(0).to(tl.int64)
    plane = T.to(tl.int64)
    if NORM:
        count = HW.to(tl.float32) * C
        for q in tl.static_range(2):
            total = _sample_total(token_sums_ptr + q * PARTS * plane, b * HW, HW, plane, PARTS, BLOCK)
            tl.store(k_ptr + b * 2 + q, total / count)
    if ddrop_ptr is not None:
        total = _sample_total(token_sums_ptr + 2 * PARTS * plane, b * HW, HW, plane, PARTS, BLOCK)
        if b2_ptr is not None:  # o = W2 p + b2: p dp covers the product, this adds b2 times the sum of g
            for o0 in range(0, O, CHANNELS):
                o = o0 + tl.arange(0, CHANNELS)
                g = tl.zeros([ROWS, CHANNELS], tl.float32)
                start = 0
                while start < HW:
                    i = start + tl.arange(0, ROWS)
                    ptrs = g_ptr + (b * HW + i)[:, None] * O + o[None, :]
                    g += tl.load(ptrs, mask=(i < HW)[:, None] & (o < O)[None, :], other=0.0).to(tl.float32)
                    start += ROWS
                bias = load_or_one(scale_ptr, o, o < O) * load_or_zero(b2_ptr, o, o < O)
                total += tl.sum(tl.sum(g, 0) * bias)
        tl.store(ddrop_ptr + b, total)


@kernel(do_not_specialize=["P"])
def mlp_bwd_columns(
    partial_ptr, sums_ptr, P, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of each GROUP rows of a matrix.

    partial_ptr: matrix [P, WIDTH], fp32
    sums_ptr: output [groups, WIDTH], fp32
    P, WIDTH: rows and columns
    GROUP: rows that a program adds
    ROWS, COLUMNS: how many of them at a time, columns of a program
    """
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    group = (tl.program_id(0) // BLOCKS).to(tl.int64)
    c = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, GROUP, ROWS):
        row = group * GROUP + start + tl.arange(0, ROWS)
        mask = (row < P)[:, None] & (c < WIDTH)[None, :]
        total += tl.load(partial_ptr + row[:, None] * WIDTH + c[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + group * WIDTH + c, tl.sum(total, 0), mask=c < WIDTH)


@kernel(do_not_specialize=["SPLITS"])
def mlp_bwd_weight(
    partial_ptr, dw_ptr, w_ptr, scale_ptr, b2_ptr, total_ptr, dscale_ptr, db2_ptr, SPLITS,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row of a weight's gradient from its partials; for fc2 also LayerScale's and the bias's gradients.

    partial_ptr: partials of the gradient [SPLITS, ROWS, WIDTH], fp32
    dw_ptr: output [ROWS, WIDTH] in the weight's dtype
    w_ptr: fc2's weight [ROWS, WIDTH]; None for fc1: then the rest is None too
    scale_ptr, b2_ptr: LayerScale and fc2's bias [ROWS], or None
    total_ptr: sums over all tokens of drop scale times the gradient of y [ROWS], fp32
    dscale_ptr, db2_ptr: outputs [ROWS], fp32
    SPLITS, ROWS, WIDTH: partials, rows and columns
    GROUP, COLUMNS: partials and columns that are loaded at a time
    """
    row = tl.program_id(0)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row).to(tl.float32)
    dscale = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        acc = tl.zeros([GROUP, COLUMNS], tl.float32)
        first = 0
        while first < SPLITS:
            split = first + tl.arange(0, GROUP).to(tl.int64)
            ptrs = partial_ptr + (split[:, None] * ROWS + row) * WIDTH + c[None, :]
            acc += tl.load(ptrs, mask=(split < SPLITS)[:, None] & (c < WIDTH)[None, :], other=0.0)
            first += GROUP
        dw = tl.sum(acc, 0)
        offsets = row * WIDTH + c
        if w_ptr is not None:
            dscale += dw * tl.load(w_ptr + offsets, mask=c < WIDTH, other=0.0).to(tl.float32)
        tl.store(dw_ptr + offsets, round_to(dw * scale, dw_ptr.dtype.element_ty), mask=c < WIDTH)
    if w_ptr is not None:
        total = tl.load(total_ptr + row)
        bias = 0.0
        if b2_ptr is not None:
            bias = tl.load(b2_ptr + row).to(tl.float32)
        tl.store(dscale_ptr + row, tl.sum(dscale) + bias * total)
        tl.store(db2_ptr + row, scale * total)


def prepare_weights(
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    scale: Tensor | None,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """(w1, w2t, table, scaled) of `Problem` for dense weights; ``operand``: the operands' dtype."""
    hidden, channels, out = w1.shape[0], w1.shape[1], w2.shape[0]
    scaled = operand == torch.float16 and scale is not None
    converted = None
    if w1.dtype != operand:
        converted = torch.empty((hidden, channels), dtype=operand, device=w1.device)
    w2t = torch.empty((hidden, out), dtype=operand, device=w1.device)
    table = torch.empty((4, hidden), dtype=torch.float32, device=w1.device)
    mlp_bwd_prepare[(triton.cdiv(hidden, PREPARE_HIDDEN),)](
        w1, b1, w2, gamma, beta, scale, converted, w2t, table, channels, out, hidden, PREPARE_HIDDEN,
        PREPARE_CHANNELS, scaled, **OPTIONS,
    )  # fmt: skip
    return w1 if converted is None else converted, w2t, table, scaled


def is_operand(problem: Problem) -> bool:
    """Whether the images are operands as they are: rows of tokens in the operands' dtype."""
    return problem.channels_last and problem.x.dtype == problem.w1.dtype


def write_tokens(
    problem: Problem, t: Tensor, tokens: Tensor | None, sums: Tensor | None = None, norm: bool = False
) -> None:
    """Writes an image as rows of an operand, ``tokens`` [T, channels], normalised where ``norm``.

    ``sums``, where given, gets the sums of each tile's tokens, times drop scale.
    """
    batch, channels, height, width = t.shape
    block = min(IMAGE_CHANNELS, max(16, next_power_of_2(channels)))
    mlp_bwd_tokens[(problem.tiles(IMAGE_TOKENS) * triton.cdiv(channels, block),)](
        t, problem.mean_rstd, problem.gamma, problem.beta, problem.drop, tokens, sums, height * width,
        batch * height * width, channels, IMAGE_TOKENS, block, problem.channels_last, norm, **OPTIONS,
    )  # fmt: skip


def sample_sums(problem: Problem, token_sums: Tensor, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(k0 and k1 ``[B, 2]``, drop_scale's gradient ``[B]``) from the sums per token; None where not needed.

    ``g``: the gradient of y as rows of tokens ``[T, out]``.
    """
    batch, channels, height, width = problem.x.shape
    k = torch.empty((batch, 2), dtype=torch.float32, device=token_sums.device) if problem.norm else None
    ddrop = torch.empty(batch, dtype=torch.float32, device=token_sums.device) if problem.drop_grad else None
    block = min(next_power_of_2(height * width), SAMPLE_VALUES)
    mlp_bwd_sample[(batch,)](
        token_sums, g, problem.scale, problem.b2, k, ddrop, height * width, token_sums.shape[2], channels,
        problem.sizes[1], token_sums.shape[1], block, SAMPLE_TOKENS, SAMPLE_CHANNELS, problem.norm, **OPTIONS,
    )  # fmt: skip
    return k, ddrop


def sum_rows(partial: Tensor) -> Tensor:
    """The sum ``[width]`` of the rows of fp32 partials, in a fixed order."""
    rows, width = partial.shape
    while True:
        groups = triton.cdiv(rows, SUM_GROUP)
        sums = torch.empty((groups, width), dtype=torch.float32, device=partial.device)
        mlp_bwd_columns[(groups * triton.cdiv(width, SUM_COLUMNS),)](
            partial, sums, rows, width, SUM_GROUP, SUM_ROWS, SUM_COLUMNS, **OPTIONS
        )
        if groups == 1:
            return sums[0]
        partial, rows = sums, groups


def weight_gradient(
    partial: Tensor,
    like: Tensor,
    scale: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(gradient of a weight, of LayerScale, of b2) from partials of the first; the last two only with w2.

    ``like``: the weight; ``total``: the sums over all tokens of drop scale times the gradient of y.
    """
    splits, rows, width = partial.shape
    dw = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dscale, db2 = (
        None if w2 is None else torch.empty(rows, dtype=torch.float32, device=like.device) for _ in range(2)
    )
    mlp_bwd_weight[(rows,)](
        partial, dw, w2, scale, b2, total, dscale, db2, splits, rows, width,
        min(WEIGHT_SPLITS, next_power_of_2(splits)), min(WEIGHT_COLUMNS, next_power_of_2(width)), **OPTIONS,
    )  # fmt: skip
    return dw, dscale, db2
