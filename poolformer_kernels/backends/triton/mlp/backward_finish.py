"""The MLP's backward, last part: fp32 partials of sums over tokens become the parameters' gradients.

They are added in an order that depends on the shape alone, in one launch; where a sum has more than
SUM_ROWS_LIMIT partials, another launch before it adds groups of them. Formulas: docs/algebra.md, "MLP".
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..config import OPTIONS, ceil_div, next_power_of_2
from ..launch import kernel
from ..tile import load_scalar_or_one, round_to
from .backward_shared import Partials, Problem
from .config import (
    SUM_COLUMNS,
    SUM_GROUP,
    SUM_LANES,
    SUM_ROWS,
    SUM_ROWS_LIMIT,
    WEIGHT_COLUMNS,
    WEIGHT_SPLITS,
)

__all__ = ["Gradients", "finish", "group_rows"]


class Gradients(NamedTuple):
    """Outputs, each in the dtype that the caller wants."""

    w1: Tensor  # [hidden, C]
    b1: Tensor  # [hidden]
    w2: Tensor  # [out, hidden]
    b2: Tensor  # [out]
    gamma: Tensor  # [C], as the next
    beta: Tensor
    scale: Tensor  # [out]


@triton.jit
def _sum_rows(ptr, first, last, c, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The sums, for columns c of a matrix of WIDTH columns, of its rows ``first`` to ``last - 1``."""
    total = tl.zeros([ROWS, c.shape[0]], tl.float32)
    start = first
    while start < last:
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & (c < WIDTH)[None, :]
        total += tl.load(ptr + row[:, None].to(tl.int64) * WIDTH + c[None, :], mask=mask, other=0.0)
        start += ROWS
    return tl.sum(total, 0)


@triton.jit
def _group_sums(
    pid, rows_ptr, sums_ptr, P, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of GROUP rows of a matrix [P, WIDTH]."""
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    group = pid // BLOCKS
    c = pid % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    total = _sum_rows(rows_ptr, group * GROUP, tl.minimum((group + 1) * GROUP, P), c, WIDTH, ROWS)
    tl.store(sums_ptr + group.to(tl.int64) * WIDTH + c, total, mask=c < WIDTH)


@kernel(do_not_specialize=["A_ROWS", "B_ROWS", "C_ROWS", "a_programs", "b_programs"])
def mlp_bwd_columns(
    a_ptr, b_ptr, c_ptr, a_sums_ptr, b_sums_ptr, c_sums_ptr, A_ROWS, B_ROWS, C_ROWS, a_programs, b_programs,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of each GROUP rows of up to three matrices.

    a_ptr, b_ptr, c_ptr: matrices [A_ROWS, A], [B_ROWS, B], [C_ROWS, C], fp32; None: there is none
    a_sums_ptr, b_sums_ptr, c_sums_ptr: outputs [groups, A], [groups, B], [groups, C], fp32
    A_ROWS, B_ROWS, C_ROWS, A, B, C: rows and columns
    a_programs, b_programs: programs of the first matrix, and of the second
    GROUP: rows that a program adds
    ROWS, COLUMNS: how many of them at a time, columns of a program
    """
    pid = tl.program_id(0)
    if pid < a_programs:
        if a_ptr is not None:
            _group_sums(pid, a_ptr, a_sums_ptr, A_ROWS, A, GROUP, ROWS, COLUMNS)
    elif pid < a_programs + b_programs:
        if b_ptr is not None:
            _group_sums(pid - a_programs, b_ptr, b_sums_ptr, B_ROWS, B, GROUP, ROWS, COLUMNS)
    else:
        if c_ptr is not None:
            _group_sums(pid - a_programs - b_programs, c_ptr, c_sums_ptr, C_ROWS, C, GROUP, ROWS, COLUMNS)


@triton.jit
def _finish_row(
    row, sums_ptr, w_ptr, scale, dw_ptr, SPLITS, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes a row of a weight's gradient ``[HEIGHT, WIDTH]``, times ``scale``.

    Returns the sum of the row's elements, before they are scaled, times those of the weight; 0 where w_ptr is
    None.
    """
    product = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        acc = tl.zeros([GROUP, COLUMNS], tl.float32)
        first = 0
        while first < SPLITS:
            split = first + tl.arange(0, GROUP).to(tl.int64)
            ptrs = sums_ptr + (split[:, None] * HEIGHT + row) * WIDTH + c[None, :]
            acc += tl.load(ptrs, mask=(split < SPLITS)[:, None] & (c < WIDTH)[None, :], other=0.0)
            first += GROUP
        dw = tl.sum(acc, 0)
        offsets = row * WIDTH + c
        if w_ptr is not None:
            product += dw * tl.load(w_ptr + offsets, mask=c < WIDTH, other=0.0).to(tl.float32)
        tl.store(dw_ptr + offsets, round_to(dw * scale, dw_ptr.dtype.element_ty), mask=c < WIDTH)
    return tl.sum(product)


@kernel(do_not_specialize=["SPLITS1", "SPLITS2", "HIDDEN_ROWS", "NORM_ROWS", "GRAD_ROWS"])
def mlp_bwd_finish(
    dw1_sums_ptr, dw2_sums_ptr, db1_sums_ptr, norm_sums_ptr, grad_sums_ptr, w2_ptr, scale_ptr, b2_ptr,
    dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, dgamma_ptr, dbeta_ptr, dscale_ptr,
    SPLITS1, SPLITS2, HIDDEN_ROWS, NORM_ROWS, GRAD_ROWS,
    C: tl.constexpr, O: tl.constexpr, J: tl.constexpr, GROUP1: tl.constexpr, GROUP2: tl.constexpr,  # noqa: E741
    COLUMNS1: tl.constexpr, COLUMNS2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """All of the parameters' gradients from their partials.

    A program each for the rows of W1, then those of W2 with an element of b2's and LayerScale's gradients;
    then one for each COLUMNS elements of b1's, and of GroupNorm's weight's and bias's.

    dw1_sums_ptr, dw2_sums_ptr: partials [SPLITS1, J, C] and [SPLITS2, O, J], fp32
    db1_sums_ptr: partials of b1's gradient [HIDDEN_ROWS, J], fp32
    norm_sums_ptr: partials of GroupNorm's weight's and bias's [NORM_ROWS, 2, C], fp32; None: both are 0
    grad_sums_ptr: partials of drop scale times the gradient of y [GRAD_ROWS, O], fp32
    w2_ptr: fc2's weight [O, J]
    scale_ptr, b2_ptr: LayerScale and fc2's bias [O], or None
    dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, dgamma_ptr, dbeta_ptr, dscale_ptr: outputs
    SPLITS1, SPLITS2, HIDDEN_ROWS, NORM_ROWS, GRAD_ROWS: how many partials
    C, O, J: channels of x and of y, hidden channels
    GROUP1, COLUMNS1, GROUP2, COLUMNS2: partials and columns of dW1, and of dW2, that are loaded at a time
    ROWS, COLUMNS: partials and columns of the vectors that are loaded at a time
    LANES: partials of one element of the gradient of y that are loaded at a time
    """
    pid = tl.program_id(0)
    if pid < J:
        _finish_row(pid, dw1_sums_ptr, None, 1.0, dw1_ptr, SPLITS1, J, C, GROUP1, COLUMNS1)
    elif pid < J + O:
        o = pid - J
        scale = load_scalar_or_one(scale_ptr, o)
        dscale = _finish_row(o, dw2_sums_ptr, w2_ptr, scale, dw2_ptr, SPLITS2, O, J, GROUP2, COLUMNS2)
        lanes = tl.zeros([LANES], tl.float32)
        start = 0
        while start < GRAD_ROWS:
            row = start + tl.arange(0, LANES)
            lanes += tl.load(grad_sums_ptr + row.to(tl.int64) * O + o, mask=row < GRAD_ROWS, other=0.0)
            start += LANES
        total = tl.sum(lanes)
        if b2_ptr is not None:
            dscale += tl.load(b2_ptr + o).to(tl.float32) * total
        tl.store(dscale_ptr + o, round_to(dscale, dscale_ptr.dtype.element_ty))
        tl.store(db2_ptr + o, round_to(scale * total, db2_ptr.dtype.element_ty))
    elif pid < J + O + (J + COLUMNS - 1) // COLUMNS:
        j = (pid - J - O) * COLUMNS + tl.arange(0, COLUMNS)
        db1 = _sum_rows(db1_sums_ptr, 0, HIDDEN_ROWS, j, J, ROWS)
        tl.store(db1_ptr + j, round_to(db1, db1_ptr.dtype.element_ty), mask=j < J)
    else:
        block = pid - J - O - (J + COLUMNS - 1) // COLUMNS
        c = block * COLUMNS + tl.arange(0, COLUMNS)
        dgamma = tl.zeros([COLUMNS], tl.float32)
        dbeta = dgamma
        if norm_sums_ptr is not None:
            width: tl.constexpr = 2 * C
            dgamma = _sum_rows(norm_sums_ptr, 0, NORM_ROWS, tl.where(c < C, c, width), width, ROWS)
            dbeta = _sum_rows(norm_sums_ptr, 0, NORM_ROWS, C + c, width, ROWS)
        tl.store(dgamma_ptr + c, round_to(dgamma, dgamma_ptr.dtype.element_ty), mask=c < C)
        tl.store(dbeta_ptr + c, round_to(dbeta, dbeta_ptr.dtype.element_ty), mask=c < C)


def group_rows(*partials: Tensor | None) -> list[Tensor | None]:
    """Up to three matrices of at most SUM_ROWS_LIMIT rows: those given, or sums of groups of their rows."""
    found = list(partials)
    while True:
        long = [t is not None and t.shape[0] > SUM_ROWS_LIMIT for t in found]
        if not any(long):
            return found
        matrices = [t if chosen else None for t, chosen in zip(found, long, strict=True)]
        sums = [
            None if t is None else t.new_empty((ceil_div(t.shape[0], SUM_GROUP), t.shape[1]))
            for t in matrices
        ]
        rows = [0 if t is None else t.shape[0] for t in matrices]
        widths = [1 if t is None else t.shape[1] for t in matrices]
        programs = [0 if t is None else t.shape[0] * ceil_div(t.shape[1], SUM_COLUMNS) for t in sums]
        mlp_bwd_columns[(sum(programs),)](
            *matrices, *sums, *rows, *programs[:2], *widths, SUM_GROUP, SUM_ROWS, SUM_COLUMNS, **OPTIONS
        )
        found = [new if chosen else t for t, new, chosen in zip(found, sums, long, strict=True)]


def finish(problem: Problem, sums: Partials, out: Gradients) -> None:
    """Writes the gradients of all parameters."""
    channels, outputs, hidden = problem.sizes
    db1, dnorm, grad = group_rows(sums.db1, sums.dnorm, sums.grad)
    splits = sums.dw1.shape[0], sums.dw2.shape[0]
    columns = [min(WEIGHT_COLUMNS, next_power_of_2(width)) for width in (channels, hidden)]
    groups = [min(WEIGHT_SPLITS, next_power_of_2(n)) for n in splits]
    programs = hidden + outputs + ceil_div(hidden, SUM_COLUMNS) + ceil_div(channels, SUM_COLUMNS)
    mlp_bwd_finish[(programs,)](
        sums.dw1, sums.dw2, db1, dnorm, grad, problem.given_w2, problem.scale, problem.b2,
        out.w1, out.b1, out.w2, out.b2, out.gamma, out.beta, out.scale,
        *splits, db1.shape[0], 0 if dnorm is None else dnorm.shape[0], grad.shape[0],
        channels, outputs, hidden, *groups, *columns, SUM_ROWS, SUM_COLUMNS, SUM_LANES, **OPTIONS,
    )  # fmt: skip
