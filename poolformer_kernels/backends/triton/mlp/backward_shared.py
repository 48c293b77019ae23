"""What both forms of the MLP's backward need first: operands, and what GroupNorm takes of each sample.

Formulas: docs/algebra.md, "MLP".
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import OPTIONS, ceil_div, next_power_of_2
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
)
from .tile import image_pointers, load_normalised, sample_values, tile_mask, token_tile

__all__ = [
    "Partials",
    "Problem",
    "is_operand",
    "prepare",
    "sample_sums",
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
    given_w1: Tensor  # fc1's weight [hidden, C], as the caller has it
    b1: Tensor | None  # fc1's bias [hidden]
    given_w2: Tensor  # fc2's weight [out, hidden], as the caller has it
    b2: Tensor | None  # fc2's bias [out]
    hidden: Tensor | None  # output of fc1 [B H W hidden], as the forward saved it
    # `prepare` writes the next three; w1 may be given_w1 itself.
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
    precision: str  # how fp32 operands are multiplied: `product_precision`

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(C, out, hidden)."""
        return self.x.shape[1], self.w2t.shape[1], self.w1.shape[0]

    def empty_drop_grad(self) -> Tensor | None:
        """Memory for drop scale's gradient, or None where it is not asked for."""
        if not self.drop_grad:
            return None
        dtype = torch.float32 if self.drop is None else self.drop.dtype
        return torch.empty(self.x.shape[0], dtype=dtype, device=self.x.device)

    def tiles(self, tokens: int) -> int:
        """How many tiles of so many tokens cover the images: `token_tile`."""
        batch, _, height, width = self.x.shape
        if self.channels_last:
            return ceil_div(batch * height * width, tokens)
        return batch * ceil_div(height * width, tokens)


class Partials(NamedTuple):
    """Sums over tokens in fp32, before their last reduction; None where they are not needed.

    How many of each there are, and what each sums, depends on the shape alone.
    """

    dw1: Tensor | None  # [splits, hidden, C]
    dw2: Tensor | None  # [splits, out, hidden], before LayerScale multiplies it
    db1: Tensor | None  # [tiles, hidden]
    dnorm: Tensor | None  # [tiles, 2 C]: of GroupNorm's weight, then of its bias
    grad: Tensor | None  # [tiles, out]: the gradient of y times drop scale
    ddrop: Tensor | None  # [B], complete


@triton.jit
def _prepare_weights(
    pid, w1_ptr, b1_ptr, w2_ptr, gamma_ptr, beta_ptr, scale_ptr, operand_ptr, w2t_ptr, table_ptr,
    C: tl.constexpr, O: tl.constexpr, J: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,  # noqa: E741
    SCALED: tl.constexpr,
):  # fmt: skip
    """HIDDEN rows of the weights as operands, and of the table: see `mlp_bwd_prepare`."""
    DTYPE: tl.constexpr = w2t_ptr.dtype.element_ty
    j = pid * HIDDEN + tl.arange(0, HIDDEN)
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


@triton.jit
def _write_rows(
    pid, x_ptr, mean_rstd_ptr, gamma_ptr, beta_ptr, drop_ptr, rows_ptr, sums_ptr, HW, T,
    C: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """A tile of an image as rows of an operand, normalised where NORM, and its sums over tokens.

    rows_ptr: output [T, C], or None
    sums_ptr: output [tiles, C], fp32: sums of the image times drop scale; or None
    """
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = pid // BLOCKS
    c = pid % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    start, ok, b = token_tile(tile, HW, T, TOKENS, CHANNELS_LAST)
    mean, rstd, drop = sample_values(mean_rstd_ptr, drop_ptr, b, ok, NORM)
    mask = tile_mask(ok, c, C, BLOCKS * CHANNELS)
    ptrs = image_pointers(x_ptr, start, c, HW, C, TOKENS, CHANNELS_LAST)
    if rows_ptr is not None:
        gamma = load_or_one(gamma_ptr, c, c < C)
        beta = load_or_zero(beta_ptr, c, c < C)
        n = load_normalised(ptrs, mask, mean, rstd, gamma, beta, NORM, rows_ptr.dtype.element_ty)
        tl.store(image_pointers(rows_ptr, start, c, HW, C, TOKENS, True), n, mask=mask)
    if sums_ptr is not None:
        total = tl.sum(tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) * drop[:, None], 0)
        tl.store(sums_ptr + tile.to(tl.int64) * C + c, total, mask=c < C)


@kernel(do_not_specialize=["weights", "images", "HW", "T"])
def mlp_bwd_prepare(
    w1_ptr, b1_ptr, w2_ptr, gamma_ptr, beta_ptr, scale_ptr, x_ptr, mean_rstd_ptr, grad_ptr, drop_ptr,
    operand_ptr, w2t_ptr, table_ptr, n_ptr, g_ptr, sums_ptr, weights, images, HW, T,
    C: tl.constexpr, O: tl.constexpr, J: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,  # noqa: E741
    SCALED: tl.constexpr, TOKENS: tl.constexpr, X_CHANNELS: tl.constexpr, G_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The operands of the backward, none of which needs another: of weights, of x, of the gradient of y.

    The first ``weights`` programs write the weights as operands and a table of vectors of hidden channels,
    the next ``images`` x as rows of tokens, the others the gradient of y, and its sums over tokens.

    float16 has too small a range for a LayerScale of 1e-5: with SCALED each row of w2t is divided by the
    magnitude of its largest element, which the table keeps.

    w1_ptr, b1_ptr: fc1's weight [J, C], bias [J] or None
    w2_ptr: fc2's weight [O, J]
    gamma_ptr, beta_ptr: GroupNorm's weight and bias [C], or None
    scale_ptr, drop_ptr: LayerScale [O] and drop scale [B], or None
    x_ptr, grad_ptr: x [B, C, H, W] and gradient of y [B, O, H, W], in one layout
    mean_rstd_ptr: (mean, rstd) of x [B, 2], fp32
    operand_ptr: output w1 [J, C] in the operands' dtype, or None where w1 has it
    w2t_ptr: output ``W2^T diag(s)`` [J, O] in the operands' dtype
    table_ptr: output [4, J], fp32: b1, the rows' divisors, u = W1 gamma, v = b1 + W1 beta
    n_ptr: output [T, C] in the operands' dtype: x, normalised where NORM; None: no program is for x
    g_ptr: output [T, O] in the operands' dtype: the gradient of y; or None
    sums_ptr: output [tiles, O], fp32: sums over a tile of the gradient of y times drop scale; or None
    weights, images: programs for the weights, and for x
    HW, T: tokens of a sample, and of all
    C, O, J: channels of x and of y, hidden channels
    HIDDEN, CHANNELS: rows of the weights of a program, channels that are loaded at a time
    SCALED: whether the rows of w2t are divided
    TOKENS: of a tile of an image
    X_CHANNELS, G_CHANNELS: channels of a tile of x, and of the gradient
    CHANNELS_LAST: whether the images are channels_last
    NORM: whether there is a norm
    """
    pid = tl.program_id(0)
    if pid < weights:
        _prepare_weights(
            pid, w1_ptr, b1_ptr, w2_ptr, gamma_ptr, beta_ptr, scale_ptr, operand_ptr, w2t_ptr, table_ptr,
            C, O, J, HIDDEN, CHANNELS, SCALED,
        )  # fmt: skip
    elif pid < weights + images:
        _write_rows(
            pid - weights, x_ptr, mean_rstd_ptr, gamma_ptr, beta_ptr, None, n_ptr, None, HW, T,
            C, TOKENS, X_CHANNELS, CHANNELS_LAST, NORM,
        )  # fmt: skip
    else:
        _write_rows(
            pid - weights - images, grad_ptr, None, None, None, drop_ptr, g_ptr, sums_ptr, HW, T,
            O, TOKENS, G_CHANNELS, CHANNELS_LAST, False,
        )  # fmt: skip


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
    ddrop_ptr: output [B], or None
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
        tl.store(ddrop_ptr + b, round_to(total, ddrop_ptr.dtype.element_ty))


def is_operand(problem: Problem) -> bool:
    """Whether the images are operands as they are: rows of tokens in the operands' dtype."""
    return problem.channels_last and problem.x.dtype == problem.w1.dtype


def prepare(
    problem: Problem, n: Tensor | None, g: Tensor | None, sums: Tensor | None, weights: bool = True
) -> None:
    """Writes the operands of a call, in one launch: ``n`` [T, C], ``g`` [T, out] and, ``weights``, the rest.

    ``sums``, where given, gets the sums of the gradient of y over each tile's tokens, times drop scale. What
    is None is not needed.
    """
    batch, channels, height, width = problem.x.shape
    _, out, hidden = problem.sizes
    tiles = problem.tiles(IMAGE_TOKENS)
    x_channels, g_channels = (min(IMAGE_CHANNELS, max(16, next_power_of_2(c))) for c in (channels, out))
    rows = ceil_div(hidden, PREPARE_HIDDEN) if weights else 0
    images = 0 if n is None else tiles * ceil_div(channels, x_channels)
    grads = 0 if g is None and sums is None else tiles * ceil_div(out, g_channels)
    if rows + images + grads == 0:
        return
    mlp_bwd_prepare[(rows + images + grads,)](
        problem.given_w1, problem.b1, problem.given_w2, problem.gamma, problem.beta, problem.scale, problem.x,
        problem.mean_rstd, problem.grad, problem.drop,
        None if problem.w1 is problem.given_w1 else problem.w1, problem.w2t, problem.table, n, g, sums, rows,
        images, height * width, batch * height * width, channels, out, hidden, PREPARE_HIDDEN,
        PREPARE_CHANNELS, problem.scaled, IMAGE_TOKENS, x_channels, g_channels, problem.channels_last,
        problem.norm, **OPTIONS,
    )  # fmt: skip


def sample_sums(problem: Problem, token_sums: Tensor, g: Tensor, ddrop: Tensor | None) -> Tensor | None:
    """k0 and k1 ``[B, 2]`` from the sums per token, or None without the norm.

    ``g``: the gradient of y as rows of tokens ``[T, out]``; ``ddrop``, where given, gets drop_scale's.
    """
    batch, channels, height, width = problem.x.shape
    k = torch.empty((batch, 2), dtype=torch.float32, device=token_sums.device) if problem.norm else None
    block = min(next_power_of_2(height * width), SAMPLE_VALUES)
    mlp_bwd_sample[(batch,)](
        token_sums, g, problem.scale, problem.b2, k, ddrop, height * width, token_sums.shape[2], channels,
        problem.sizes[1], token_sums.shape[1], block, SAMPLE_TOKENS, SAMPLE_CHANNELS, problem.norm, **OPTIONS,
    )  # fmt: skip
    return k
