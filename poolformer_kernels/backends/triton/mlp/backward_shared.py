"""What both forms of the MLP's backward need: the prepared weights before, the reductions after.

Every sum over tokens arrives as fp32 partials, added here in an order that depends on the shape alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import OPTIONS, next_power_of_2
from ..tile import rounded, shift, vector
from .tile import image, inside, normalised, sample_values, token_tile

__all__ = [
    "TOKENS",
    "Partials",
    "Problem",
    "direct",
    "finish_weight",
    "prepare",
    "sample_sums",
    "summed",
    "to_tokens",
]

TOKENS = 64  # of a tile of `mlp_bwd_tokens`
_GROUP = 256  # rows that one program of `mlp_bwd_columns` adds


class Problem(NamedTuple):
    """One call of the operator: dense tensors, and the weights as the products' operands."""

    grad: Tensor
    x: Tensor
    dx: Tensor
    mean_rstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    scale: Tensor | None
    drop: Tensor | None
    b2: Tensor | None
    hidden: Tensor | None
    w1: Tensor  # [hidden, C]
    w2t: Tensor  # [hidden, out], times layer_scale
    table: Tensor  # [4, hidden]: b1, what w2t was divided by, u, v
    activation: str
    last: bool
    norm: bool
    residual: bool
    parameter_grads: bool
    drop_grad: bool
    scaled: bool  # w2t was divided

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(C, out, hidden)."""
        return self.x.shape[1], self.w2t.shape[1], self.w1.shape[0]

    def tiles(self, tokens: int) -> int:
        batch, _, height, width = self.x.shape
        if self.last:
            return triton.cdiv(batch * height * width, tokens)
        return batch * triton.cdiv(height * width, tokens)


class Partials(NamedTuple):
    """Sums over tokens before their last reduction; None without parameter gradients (or norm)."""

    dw1: Tensor | None  # [splits, hidden, C]
    dw2: Tensor | None  # [splits, out, hidden], of the unscaled gradient
    db1: Tensor | None  # [tiles, hidden]
    dnorm: Tensor | None  # [tiles, 2 C]: weight's, bias's
    grad: Tensor | None  # [tiles, out]: the gradient's, times drop_scale
    ddrop: Tensor  # [B], done, or empty


@triton.jit
def mlp_bwd_prepare(
    w1_ptr, b1_ptr, w2_ptr, gamma_ptr, beta_ptr, scale_ptr, operand_ptr, w2t_ptr, table_ptr,
    C: tl.constexpr, O: tl.constexpr, J: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,  # noqa: E741
    SCALED: tl.constexpr,
):  # fmt: skip
    """w1 as an operand where it is not one; ``w2t = W2^T diag(s)``; the table ``[4, J]`` of vectors.

    fp16 has no room for a LayerScale of 1e-5: ``SCALED`` divides each row of w2t by its largest element.
    """
    DTYPE: tl.constexpr = w2t_ptr.dtype.element_ty
    j = tl.program_id(0) * HIDDEN + tl.arange(0, HIDDEN)
    j_ok = j < J
    u = tl.zeros([HIDDEN], tl.float32)
    v = tl.zeros([HIDDEN], tl.float32)
    for c0 in range(0, C, CHANNELS):
        c = c0 + tl.arange(0, CHANNELS)
        mask = j_ok[:, None] & (c < C)[None, :]
        at = j[:, None] * C + c[None, :]
        w = rounded(tl.load(w1_ptr + at, mask=mask, other=0.0).to(tl.float32), DTYPE)
        if operand_ptr is not None:
            tl.store(operand_ptr + at, w, mask=mask)
        u += tl.sum(w.to(tl.float32) * vector(gamma_ptr, c, c < C)[None, :], 1)
        v += tl.sum(w.to(tl.float32) * shift(beta_ptr, c, c < C)[None, :], 1)
    b1 = shift(b1_ptr, j, j_ok)
    peak = tl.full([HIDDEN], 1.0, tl.float32)
    if SCALED:
        peak = tl.zeros([HIDDEN], tl.float32)
        for o0 in range(0, O, CHANNELS):
            o = o0 + tl.arange(0, CHANNELS)
            mask = j_ok[:, None] & (o < O)[None, :]
            w = tl.load(w2_ptr + o[None, :] * J + j[:, None], mask=mask, other=0.0).to(tl.float32)
            peak = tl.maximum(peak, tl.max(tl.abs(w * vector(scale_ptr, o, o < O)[None, :]), 1))
        peak = tl.where(peak > 1e-30, peak, 1.0)
    for o0 in range(0, O, CHANNELS):
        o = o0 + tl.arange(0, CHANNELS)
        mask = j_ok[:, None] & (o < O)[None, :]
        w = tl.load(w2_ptr + o[None, :] * J + j[:, None], mask=mask, other=0.0).to(tl.float32)
        w *= vector(scale_ptr, o, o < O)[None, :]
        if SCALED:
            w /= peak[:, None]
        tl.store(w2t_ptr + j[:, None] * O + o[None, :], rounded(w, DTYPE), mask=mask)
    tl.store(table_ptr + j, b1, mask=j_ok)
    tl.store(table_ptr + J + j, peak, mask=j_ok)
    tl.store(table_ptr + 2 * J + j, u, mask=j_ok)
    tl.store(table_ptr + 3 * J + j, b1 + v, mask=j_ok)


@triton.jit(do_not_specialize=["HW", "T"])
def mlp_bwd_tokens(
    x_ptr, mean_rstd_ptr, gamma_ptr, beta_ptr, drop_ptr, tokens_ptr, sums_ptr, HW, T,
    C: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """An image as operand rows ``[T, C]``, normalised where ``NORM``; its sums ``d x`` over tokens."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0) // BLOCKS
    c = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    start, ok, b = token_tile(tile, HW, T, TOKENS, LAST)
    mean, rstd, drop = sample_values(mean_rstd_ptr, drop_ptr, b, ok, NORM)
    mask = inside(ok, c, C, BLOCKS * CHANNELS)
    at = image(x_ptr, start, c, HW, C, TOKENS, LAST)
    if tokens_ptr is not None:
        gamma = vector(gamma_ptr, c, c < C)
        beta = shift(beta_ptr, c, c < C)
        n = normalised(at, mask, mean, rstd, gamma, beta, NORM, tokens_ptr.dtype.element_ty)
        tl.store(image(tokens_ptr, start, c, HW, C, TOKENS, True), n, mask=mask)
    if sums_ptr is not None:
        total = tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32) * drop[:, None], 0)
        tl.store(sums_ptr + tile.to(tl.int64) * C + c, total, mask=c < C)


@triton.jit
def _row_total(row_ptr, first, HW, plane, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of one quantity over a sample's tokens and the blocks of hidden channels."""
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < HW:
        i = start + tl.arange(0, BLOCK)
        for part in range(PARTS):
            total += tl.load(row_ptr + part * plane + first + i, mask=i < HW, other=0.0)
        start += BLOCK
    return tl.sum(total)


@triton.jit(do_not_specialize=["HW", "T"])
def mlp_bwd_sample(
    rows_ptr, g_ptr, scale_ptr, b2_ptr, k_ptr, ddrop_ptr, HW, T, C: tl.constexpr, O: tl.constexpr,  # noqa: E741
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Of one sample: k0 and k1 (for GroupNorm's backward) and drop_scale's gradient."""
    b = tl.program_id(0).to(tl.int64)
    plane = T.to(tl.int64)
    if NORM:
        count = HW.to(tl.float32) * C
        for q in tl.static_range(2):
            total = _row_total(rows_ptr + q * PARTS * plane, b * HW, HW, plane, PARTS, BLOCK)
            tl.store(k_ptr + b * 2 + q, total / count)
    if ddrop_ptr is not None:
        total = _row_total(rows_ptr + 2 * PARTS * plane, b * HW, HW, plane, PARTS, BLOCK)
        if b2_ptr is not None:  # the rest of o: its bias, for the sum of g
            for o0 in range(0, O, CHANNELS):
                o = o0 + tl.arange(0, CHANNELS)
                g = tl.zeros([ROWS, CHANNELS], tl.float32)
                start = 0
                while start < HW:
                    i = start + tl.arange(0, ROWS)
                    at = g_ptr + (b * HW + i)[:, None] * O + o[None, :]
                    g += tl.load(at, mask=(i < HW)[:, None] & (o < O)[None, :], other=0.0).to(tl.float32)
                    start += ROWS
                bias = vector(scale_ptr, o, o < O) * shift(b2_ptr, o, o < O)
                total += tl.sum(tl.sum(g, 0) * bias)
        tl.store(ddrop_ptr + b, total)


@triton.jit(do_not_specialize=["P"])
def mlp_bwd_columns(
    partial_ptr, sums_ptr, P, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of GROUP rows of a matrix ``[P, WIDTH]``."""
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    group = (tl.program_id(0) // BLOCKS).to(tl.int64)
    c = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, GROUP, ROWS):
        row = group * GROUP + start + tl.arange(0, ROWS)
        mask = (row < P)[:, None] & (c < WIDTH)[None, :]
        total += tl.load(partial_ptr + row[:, None] * WIDTH + c[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + group * WIDTH + c, tl.sum(total, 0), mask=c < WIDTH)


@triton.jit(do_not_specialize=["SPLITS"])
def mlp_bwd_weight(
    partial_ptr, dw_ptr, w_ptr, scale_ptr, b2_ptr, total_ptr, dscale_ptr, db2_ptr, SPLITS,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row of a weight's gradient from its partials; of fc2's, layer_scale's and b2's gradients too."""
    row = tl.program_id(0)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row).to(tl.float32)
    along = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        acc = tl.zeros([GROUP, COLUMNS], tl.float32)
        first = 0
        while first < SPLITS:
            split = first + tl.arange(0, GROUP).to(tl.int64)
            at = partial_ptr + (split[:, None] * ROWS + row) * WIDTH + c[None, :]
            acc += tl.load(at, mask=(split < SPLITS)[:, None] & (c < WIDTH)[None, :], other=0.0)
            first += GROUP
        dw = tl.sum(acc, 0)
        at = row * WIDTH + c
        if w_ptr is not None:
            along += dw * tl.load(w_ptr + at, mask=c < WIDTH, other=0.0).to(tl.float32)
        tl.store(dw_ptr + at, rounded(dw * scale, dw_ptr.dtype.element_ty), mask=c < WIDTH)
    if w_ptr is not None:
        total = tl.load(total_ptr + row)
        bias = 0.0
        if b2_ptr is not None:
            bias = tl.load(b2_ptr + row).to(tl.float32)
        tl.store(dscale_ptr + row, tl.sum(along) + bias * total)
        tl.store(db2_ptr + row, scale * total)


def prepare(
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    scale: Tensor | None,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """(w1 ``[hidden, C]``, w2t, the table, whether w2t was divided) of dense weights."""
    hidden, channels, out = w1.shape[0], w1.shape[1], w2.shape[0]
    scaled = operand == torch.float16 and scale is not None
    w1h = torch.empty((hidden, channels), dtype=operand, device=w1.device) if w1.dtype != operand else None
    w2t = torch.empty((hidden, out), dtype=operand, device=w1.device)
    table = torch.empty((4, hidden), dtype=torch.float32, device=w1.device)
    mlp_bwd_prepare[(triton.cdiv(hidden, 16),)](
        w1, b1, w2, gamma, beta, scale, w1h, w2t, table, channels, out, hidden, 16, 64, scaled, **OPTIONS,
    )  # fmt: skip
    return w1 if w1h is None else w1h, w2t, table, scaled


def direct(problem: Problem) -> bool:
    """Whether an image's memory is its operand already."""
    return problem.last and problem.x.dtype == problem.w1.dtype


def to_tokens(
    problem: Problem, t: Tensor, tokens: Tensor | None, sums: Tensor | None = None, norm: bool = False
) -> None:
    """Writes an image as operand rows ``[T, channels]``, normalised where ``norm``, and its tiles' sums."""
    batch, channels, height, width = t.shape
    block = min(64, max(16, next_power_of_2(channels)))
    mlp_bwd_tokens[(problem.tiles(TOKENS) * triton.cdiv(channels, block),)](
        t, problem.mean_rstd, problem.gamma, problem.beta, problem.drop, tokens, sums, height * width,
        batch * height * width, channels, TOKENS, block, problem.last, norm, **OPTIONS,
    )  # fmt: skip


def sample_sums(problem: Problem, rows: Tensor, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(k0 and k1 ``[B, 2]``, drop_scale's gradient ``[B]``), each where needed, from the sums per token.

    ``g``: the gradient's tokens ``[T, out]``.
    """
    batch, channels, height, width = problem.x.shape
    k = torch.empty((batch, 2), dtype=torch.float32, device=rows.device) if problem.norm else None
    ddrop = torch.empty(batch, dtype=torch.float32, device=rows.device) if problem.drop_grad else None
    block = min(next_power_of_2(height * width), 1024)
    mlp_bwd_sample[(batch,)](
        rows, g, problem.scale, problem.b2, k, ddrop, height * width, rows.shape[2], channels,
        problem.sizes[1], rows.shape[1], block, 64, 64, problem.norm, **OPTIONS,
    )  # fmt: skip
    return k, ddrop


def summed(partial: Tensor) -> Tensor:
    """The sum ``[width]`` of the rows of fp32 partials, in a fixed order."""
    rows, width = partial.shape
    while True:
        groups = triton.cdiv(rows, _GROUP)
        sums = torch.empty((groups, width), dtype=torch.float32, device=partial.device)
        mlp_bwd_columns[(groups * triton.cdiv(width, 32),)](
            partial, sums, rows, width, _GROUP, 32, 32, **OPTIONS
        )
        if groups == 1:
            return sums[0]
        partial, rows = sums, groups


def finish_weight(
    partial: Tensor,
    like: Tensor,
    scale: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(a weight's gradient, and with ``w2`` those of layer_scale and of b2) from partials of the products."""
    splits, rows, width = partial.shape
    dw = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dscale, db2 = (
        None if w2 is None else torch.empty(rows, dtype=torch.float32, device=like.device) for _ in range(2)
    )
    mlp_bwd_weight[(rows,)](
        partial, dw, w2, scale, b2, total, dscale, db2, splits, rows, width,
        min(16, next_power_of_2(splits)), min(128, next_power_of_2(width)), **OPTIONS,
    )  # fmt: skip
    return dw, dscale, db2
