"""Problems that fit a target; one call of an operator, its gradients, and what holds for every call."""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from support.devices import like_on, on, truth_on
from support.layouts import CHANNELS_LAST, as_layout
from support.operators import MLP, Operator
from support.problems import HALVES, Tensors, randn
from support.rule import assert_right, run
from torch import Tensor

from .common import BF16, F32
from .targets import Target


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


def shift_some_channels(x: Tensor, offset: float) -> None:
    """What trained models have: a few channels are far away.

    Their x has few digits left for the others, and sigma hides what happens inside one.
    """
    few = x[:, ::5]
    few += offset * randn(few.shape[1], 1, 1, dtype=x.dtype, seed=3)


def values(
    target: Target, function: Callable[..., Tensor], inputs: Tensors, grad: Tensor, *, frozen=(), **options
) -> Tensors:
    """y and, where they are the target's own, the gradients; nothing that was given is written to."""
    given, cotangent = on(target.device, inputs), like_on(target.device, grad)
    tensors = [t for t in (*given.values(), cotangent) if t is not None]
    before = [t.untyped_storage().clone() for t in tensors]  # and what lies between its elements
    operator = "mlp" if "w1" in inputs else "pool_mixer"
    if target.differentiates(operator, inputs["x"].shape[1]):
        found = run(function, given, cotangent, frozen=frozen, **options)
    else:
        with torch.no_grad():
            found = {"y": function(**given, **options)}
    for t, kept in zip(tensors, before, strict=True):
        now, then = (
            torch.empty(0, dtype=torch.uint8, device=t.device).set_(s) for s in (t.untyped_storage(), kept)
        )
        assert torch.equal(now, then)
    return found


def check(
    target: Target,
    problem: ModuleType,
    function: Callable[..., Tensor],
    inputs: Tensors,
    grad: Tensor | None = None,
    *,
    layout: str = "",
    ulps: float | dict[str, float] = 0,
    given: dict | None = None,
    frozen: tuple[str, ...] = (),
    **options,
) -> Tensors:
    """The error rule, dtypes, devices and memory formats of y and every gradient.

    ``problem`` has the operator's `eager` and `truth`. With a ``layout`` x has it, and a gradient that is not
    given, too. ``ulps`` are added to the target's floor, for all values or by name. ``given`` are options
    that the target alone gets, ``frozen`` names of inputs whose gradients it is not asked for.
    """
    mlp = "w1" in inputs
    if layout:
        inputs = {**inputs, "x": as_layout(inputs["x"], layout)}
    if grad is None:
        grad = problem.make_grad(inputs)
        grad = as_layout(grad, layout) if layout else grad
    found = values(target, function, inputs, grad, frozen=frozen, **(given or {}), **options)
    operand = inputs["w1" if mlp and inputs["x"].dtype not in HALVES else "x"].dtype

    def allowed(name: str, dtype: torch.dtype) -> float:
        floor = target.ulps[mlp] + (ulps.get(name, 0) if isinstance(ulps, dict) else ulps)
        return problem.ulps_of(dtype, operand, floor) if mlp else floor

    there = on(target.device, inputs), like_on(target.device, grad)
    truth = partial(truth_on, target.device, problem.truth)
    assert_right(found, *there, eager=problem.eager, truth=truth, ulps=allowed, **options)
    for name, value in found.items():
        assert value.device.type == target.device, name
    assert_formats(target, found, inputs["x"], layout)
    return found


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


def assert_formats(target: Target, found: Tensors, x: Tensor, layout: str) -> None:
    """y is dense in x's memory format whatever x's strides; so is dx from a kernel."""
    if not layout or x.numel() == 0:
        return
    last = layout in CHANNELS_LAST and not x.is_contiguous()  # x may be dense in both formats
    wanted = torch.channels_last if last else torch.contiguous_format
    for name in ("y", "dx") if target.kernels and "dx" in found else ("y",):
        t = found[name]
        assert t.is_contiguous(memory_format=wanted), f"{name}: strides {t.stride()} of {tuple(t.shape)}"


def same_pattern(actual: Tensor, expected: Tensor) -> bool:
    """NaN, +inf and -inf are where they are in ``expected``, and nowhere else."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(
        torch.where(actual.isinf(), actual, 0.0), torch.where(expected.isinf(), expected, 0.0)
    )
