"""The MLP's numbers in TF32 and under autocast, which the contract does not have."""

from functools import partial

import pytest
import torch
from contract.common import BF16, DTYPES, F16, F32
from support.devices import like_on, on, truth_on
from support.mlp import FORMS, assert_rule, eager, make_grad, make_inputs, truth, under_autocast
from support.problems import HALVES
from support.rule import run

from poolformer_kernels.ops import mlp

from .cases import FUSED, PAIR, SMALL, each, over

pytestmark = pytest.mark.usefixtures("backend")


def check(ours, theirs, right, inputs, y_dtype, operands) -> None:
    """The contract's; y and the operands of the products are of other dtypes than x."""
    for name, value in ours.items():
        dtype = y_dtype if name == "y" else inputs[name[1:]].dtype
        assert value.dtype == dtype, f"{name}: {value.dtype}, not {dtype}"
    assert_rule(ours, theirs, right, operands, ulps=8)


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
    check(ours, theirs, right, inputs, F32, F32)
    for name in ("y", "dx", "dw1", "dw2"):
        assert not torch.equal(ours[name], without[name])


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

    def by_eager(x, **tensors):
        return eager(x.float(), **tensors)

    cuda, cuda_grad = on("cuda", inputs), like_on("cuda", grad)
    autocast = partial(under_autocast, device="cuda", half=half, residual=residual)
    ours = run(autocast(mlp), cuda, cuda_grad.to(wanted))
    theirs = run(autocast(by_eager), cuda, cuda_grad.float())
    right = truth_on("cuda", truth, inputs, grad.float(), residual=residual)
    check(ours, theirs, right, inputs, wanted, half)
