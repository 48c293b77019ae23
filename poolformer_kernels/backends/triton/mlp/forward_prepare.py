"""The MLP's forward in Triton, first part: weights as operands, folded with the norm; merged statistics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import OPTIONS, ceil_div, next_power_of_2
from ..launch import kernel
from ..statistics import merge_partials
from ..tile import load_or_one, load_or_zero, round_to
from .config import CAST_BLOCK, FOLD_DEPTH, FOLD_ROWS

__all__ = ["prepare"]


@triton.jit
def _cast(pid, w_ptr, operand_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of a weight in the operands' dtype."""
    i = pid * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + i, mask=i < SIZE, other=0.0).to(tl.float32)
    tl.store(operand_ptr + i, round_to(w, operand_ptr.dtype.element_ty), mask=i < SIZE)


@kernel(do_not_specialize=["T"])
def mlp_prepare(
    stats_ptr, mean_rstd_ptr, w1_ptr, b1_ptr, w2_ptr, gamma_ptr, beta_ptr, folded_ptr, u_ptr, v_ptr,
    operand1_ptr, operand2_ptr, T, eps, C: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, FOLDS: tl.constexpr, CASTS1: tl.constexpr, CASTS2: tl.constexpr,
    BLOCK: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """What fc1 and fc2 need before them: weights as operands, the norm folded into fc1's, the statistics.

    The first FOLDS programs fold GroupNorm into BN rows of fc1's weight each. The next CASTS1 and CASTS2
    write BLOCK elements each of fc1's and fc2's weights in the operands' dtype. Each of the others computes
    (mean, rstd) of a sample.

    The folded weight is W1 diag(gamma), rounded. Its product with x contains the mean of x times u, the sums
    of the weight's rows: as u is summed after the rounding, subtracting that is exact to fp32's precision.

    stats_ptr: partials of x [B, T, 3], fp32; None: no program is for a sample
    mean_rstd_ptr: output (mean, rstd) of x [B, 2], fp32
    w1_ptr, b1_ptr: fc1's weight [HIDDEN, C], bias [HIDDEN] or None
    w2_ptr: fc2's weight [OUT, HIDDEN]
    gamma_ptr, beta_ptr: GroupNorm's weight and bias [C], or None
    folded_ptr: output W1 diag(gamma) [HIDDEN, C] in the operands' dtype; None with FOLDS 0
    u_ptr, v_ptr: outputs [HIDDEN], fp32: the folded weight's row sums, b1 + W1 beta; None with FOLDS 0
    operand1_ptr, operand2_ptr: outputs [HIDDEN, C] and [OUT, HIDDEN] in the operands' dtype; None with
        CASTS1 or CASTS2 0
    T: partials of a sample of x
    eps: GroupNorm's epsilon
    C, HIDDEN, OUT: channels of x, hidden channels, channels of y
    BN, BK: rows and columns of a tile of the weight that is folded
    FOLDS: programs that fold; 0: nothing is folded
    CASTS1, CASTS2: programs that cast; 0: the weight is not cast
    BLOCK: elements that one of them casts
    MERGE: a power of two, at least T
    """
    pid = tl.program_id(0)
    if pid >= FOLDS + CASTS1 + CASTS2:
        if stats_ptr is not None:
            b = (pid - FOLDS - CASTS1 - CASTS2).to(tl.int64)
            mean, variance = merge_partials(stats_ptr, b, T, MERGE)
            tl.store(mean_rstd_ptr + b * 2, mean)
            tl.store(mean_rstd_ptr + b * 2 + 1, 1.0 / tl.sqrt_rn(variance + eps))
    elif pid >= FOLDS + CASTS1:
        if CASTS2 > 0:
            _cast(pid - FOLDS - CASTS1, w2_ptr, operand2_ptr, OUT * HIDDEN, BLOCK)
    elif pid >= FOLDS:
        if CASTS1 > 0:
            _cast(pid - FOLDS, w1_ptr, operand1_ptr, HIDDEN * C, BLOCK)
    elif FOLDS > 0:
        DTYPE: tl.constexpr = folded_ptr.dtype.element_ty
        j = pid * BN + tl.arange(0, BN)
        u = tl.zeros([BN], tl.float32)
        v = load_or_zero(b1_ptr, j, j < HIDDEN)
        for k in range(0, C, BK):
            c = k + tl.arange(0, BK)
            ok = (j < HIDDEN)[:, None] & (c < C)[None, :]
            offsets = j[:, None] * C + c[None, :]
            w = tl.load(w1_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
            w = round_to(w, DTYPE).to(tl.float32)  # as the operand that is multiplied without the norm
            folded = round_to(w * load_or_one(gamma_ptr, c, c < C)[None, :], DTYPE)
            tl.store(folded_ptr + offsets, folded, mask=ok)
            u += tl.sum(folded.to(tl.float32), 1)
            v += tl.sum(w * load_or_zero(beta_ptr, c, c < C)[None, :], 1)
        tl.store(u_ptr + j, u, mask=j < HIDDEN)
        tl.store(v_ptr + j, v, mask=j < HIDDEN)


def prepare(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stats: Tensor | None,
    mean_rstd: Tensor | None,
    eps: float,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(w1, b1, u, w2) as the operands of `mlp_fc1` and `mlp_fc2`; with ``stats`` also writes mean_rstd."""
    hidden, channels = w1.shape
    # A bf16 x need not be centred before the product: it has few digits to lose. float16 might not hold
    # W1 diag(gamma); bf16 does, however large gamma is.
    folds = ceil_div(hidden, FOLD_ROWS) if stats is not None and x.dtype == torch.bfloat16 else 0
    casts1, casts2 = (ceil_div(w.numel(), CAST_BLOCK) if w.dtype != operand else 0 for w in (w1, w2))
    if folds > 0:
        casts1 = 0  # the folded weight is an operand
    samples, partials = (0, 1) if stats is None else stats.shape[:2]
    if folds + casts1 + casts2 + samples == 0:
        return w1, b1, None, w2
    weights = {"dtype": operand, "device": x.device}
    folded, u, v = None, None, b1
    if folds > 0:
        folded = torch.empty((hidden, channels), **weights)
        u, v = torch.empty((2, hidden), dtype=torch.float32, device=x.device)
    operand1 = torch.empty((hidden, channels), **weights) if casts1 > 0 else None
    operand2 = torch.empty(w2.shape, **weights) if casts2 > 0 else None
    mlp_prepare[(folds + casts1 + casts2 + samples,)](
        stats, mean_rstd, w1, b1, w2, norm_weight, norm_bias, folded, u, None if u is None else v, operand1,
        operand2, partials, eps, channels, hidden, w2.shape[0], FOLD_ROWS, FOLD_DEPTH, folds, casts1, casts2,
        CAST_BLOCK, next_power_of_2(partials), **OPTIONS,
    )  # fmt: skip
    prepared = folded if folds > 0 else operand1 if casts1 > 0 else w1
    return prepared, v, u, w2 if operand2 is None else operand2
