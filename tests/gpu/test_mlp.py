"""The MLP's numbers on the CUDA backends. Truth: the device's fp64; eager: contiguous, in the same dtype."""

import pytest
import torch
from support.devices import assert_same_truth, like_on, on, truth_on
from support.mlp import eager, make_grad, make_inputs, truth
from support.problems import HALVES
from support.rule import run

from poolformer_kernels import reference
from poolformer_kernels.ops import mlp

from .cases import DTYPES, FORMATS, over
from .mlp_cases import (
    DTYPE,
    FORMS,
    FUSED,
    NARROW,
    ODD,
    PAIR,
    ROUNDS,
    SMALL,
    STAGES,
    assert_rule,
    check,
    each,
)

F32, BF16, F16 = DTYPES
ACTIVATIONS = tuple(reference.ACTIVATIONS)

pytestmark = pytest.mark.usefixtures("backend")


# ---- the error rule ----------------------------------------------------------------------------------------


@over("shape, hidden", cuda=[SMALL[0]])
def test_truth_of_the_device_is_the_cpus(shape, hidden) -> None:
    inputs = make_inputs(shape, hidden, BF16)
    assert_same_truth(truth, inputs, make_grad(inputs), residual=True)


@over(
    "shape, hidden, dtype, form",
    triton=[
        *each(STAGES, [BF16], ["residual"]),
        *((*problem, DTYPES[i % 3], "residual") for i, problem in enumerate(ODD)),
        *each([PAIR], [F32, F16], ["residual"]),
        *each([FUSED], [BF16], ["plain", "norm"]),
        *each([PAIR], [BF16], ["residual", "plain"]),
    ],
    cuda=[*each(NARROW, HALVES, FORMS), *each(ROUNDS, HALVES, ["plain", "residual"])],
)
def test_error_rule(shape, hidden, dtype, form) -> None:
    parameters, residual = FORMS[form]
    check(make_inputs(shape, hidden, dtype, parameters=parameters), layouts=FORMATS, residual=residual)


@over("shape, hidden", triton=[FUSED, PAIR])
def test_tf32_as_in_eager(shape, hidden, monkeypatch) -> None:
    """The error rule against eager in TF32, from whose settings ours is taken.

    Eager may round the operands to nearest, ours are truncated. With an ulp of u, the error of a product then
    has a mean square of 2 (u^2 / 12) + (2 u / 2)^2 instead of 2 (u^2 / 12): 7 times as much.
    """
    inputs = make_inputs(shape, hidden)
    grad = make_grad(inputs)
    cuda, cuda_grad = on("cuda", inputs), like_on("cuda", grad)
    without = run(mlp, cuda, cuda_grad, residual=True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    ours = run(mlp, cuda, cuda_grad, residual=True)
    theirs = run(eager, cuda, cuda_grad, residual=True)
    right = truth_on("cuda", truth, inputs, grad, residual=True)
    for name, exact in right.values.items():
        exact = exact.to(theirs[name].device)
        theirs[name] = exact + 7**0.5 * (theirs[name].double() - exact)
    assert_rule(ours, theirs, right, inputs, F32, F32)
    for name in ("y", "dx", "dw1", "dw2"):
        assert not torch.equal(ours[name], without[name])


# ---- hard values -------------------------------------------------------------------------------------------


@over(
    "shape, hidden",
    triton=[((70_000, 4, 3, 2), 8), ((70_000, 200, 1, 2), 8), ((70_000, 4, 6, 6), 8)],
    cuda=[((70_000, 64, 3, 2), 64), ((70_000, 128, 1, 1), 64)],
)
def test_batch_past_the_grid_limits(shape, hidden, backend) -> None:
    parameters = ("b1", "b2", "norm_weight", "norm_bias")
    inputs = on("cuda", make_inputs(shape, hidden, DTYPE[backend], parameters=parameters))
    tail = {**inputs, "x": inputs["x"][-3:]}
    grad = torch.ones_like(inputs["x"])
    whole, part = (run(mlp, given, grad[-len(given["x"]) :], residual=True) for given in (inputs, tail))
    tolerance = max(1e-5, torch.finfo(DTYPE[backend]).eps)
    for name in ("y", "dx"):
        torch.testing.assert_close(whole[name][-3:], part[name], rtol=tolerance, atol=tolerance)
    tokens = float(shape[0] * shape[2] * shape[3])
    assert torch.equal(whole["db2"], torch.full_like(whole["db2"], tokens))


# ---- autocast ----------------------------------------------------------------------------------------------


@over(
    "shape, hidden, x_dtype, half, form",
    triton=[
        (*FUSED, F32, BF16, "residual"),
        (*PAIR, F16, F16, "norm"),
        (*PAIR, BF16, BF16, "plain"),
    ],
    cuda=each(SMALL[:2], DTYPES, HALVES, FORMS),
)
def test_autocast(shape, hidden, x_dtype, half, form) -> None:
    """Eager's dtypes: half, but for a residual stream, which is float32. Gradients have their tensors'."""
    parameters, residual = FORMS[form]
    inputs = make_inputs(shape, hidden, parameters=parameters)
    inputs["x"] = inputs["x"].to(x_dtype)
    if form == "plain":
        inputs["x"] = inputs["x"].to(half).to(x_dtype)  # fc1's cast of it is then exact
    wanted = torch.float32 if residual else half
    grad = make_grad(inputs).to(half)

    def under_autocast(**tensors):
        with torch.autocast("cuda", half):
            return mlp(**tensors, residual=residual)

    def by_eager(x, **tensors):
        with torch.autocast("cuda", half):
            return eager(x.float(), **tensors, residual=residual)

    cuda = on("cuda", inputs)
    ours = run(under_autocast, cuda, like_on("cuda", grad).to(wanted))
    theirs = run(by_eager, cuda, like_on("cuda", grad).float())
    right = truth_on("cuda", truth, inputs, grad.float(), residual=residual)
    assert_rule(ours, theirs, right, inputs, wanted, half)
