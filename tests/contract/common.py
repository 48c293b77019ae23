"""What the contract's tests have in common: values of axes, problems that fit a target, their checks."""

import torch
from support.layouts import as_layout
from support.operators import MLP, Operator
from support.problems import HALVES, Tensors, randn
from torch import Tensor

from poolformer_kernels import reference

from .check import check
from .targets import Target

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, *HALVES)
TWO = (F32, BF16)
FORMATS = ("nchw", "channels_last")
BOTH = (False, True)
ACTIVATIONS = tuple(reference.ACTIVATIONS)
INF, NAN = float("inf"), float("nan")

# x, hidden
TINY = ((3, 5, 6, 7), 9)
SMALL = ((3, 17, 6, 9), 20)
WIDE = ((3, 200, 3, 6), 50)  # from about 100 channels on Triton has kernels of its own for each product
EACH = {"shape, hidden": [SMALL, WIDE]}


def problem_of(
    operator: Operator, target: Target, shape, hidden=None, dtype=None, *, out=None, **options
) -> Tensors:
    """An MLP has the channels that this target has a kernel for, and its dtype if none is given.

    The CUDA C++ kernels have no products of float32.
    """
    if operator is not MLP:
        return operator.inputs(shape, dtype=dtype or F32, **options)
    channels, hidden, out = target.fit(shape[1], hidden, out)
    dtype = dtype or (BF16 if target.backend == "cuda" else F32)
    return operator.inputs((shape[0], channels, *shape[2:]), hidden, dtype, out=out, **options)


def laid(inputs: Tensors, layout: str) -> Tensors:
    return {**inputs, "x": as_layout(inputs["x"], layout)}


def given(**options) -> dict:
    """Without those that this operator does not have."""
    return {name: value for name, value in options.items() if value is not None}


def check_of(
    operator: Operator,
    target: Target,
    inputs: Tensors,
    grad: Tensor | None = None,
    *,
    stats: Tensor | None = None,
    save_hidden: bool = False,
    **options,
) -> Tensors:
    """`check` of y and its gradients, from given statistics if there are any."""
    function, own = operator.call, {"save_hidden": save_hidden} if operator is MLP else {}
    if stats is not None:
        function, own = operator.of_stats, own | {"stats": stats.to(target.device)}
    return check(target, operator.problem, function, inputs, grad, given=own, **options)


def of_mean(target: Target, allowed: float) -> float:
    """What is added to the MLP's floor; on a device eager's error has had room enough for it."""
    return 0 if target.device == "cuda" else allowed - target.ulps[1]


def shift_some_channels(x: Tensor, offset: float) -> None:
    """What trained models have: a few channels are far away.

    Their x has few digits left for the others, and sigma hides what happens inside one.
    """
    few = x[:, ::5]
    few += offset * randn(few.shape[1], 1, 1, dtype=x.dtype, seed=3)
