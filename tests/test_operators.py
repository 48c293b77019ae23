"""Both operators where no target is concerned: float64, autocast, second derivatives, torch.func.

What they promise on every target is in `contract`.
"""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.derivatives import TRANSFORMS
from support.layouts import LAYOUTS, as_layout
from support.mlp import FORMS, PLAIN, assert_rule, eager, truth, under_autocast
from support.operators import MLP, POOL_MIXER, Operator
from support.pool_mixer import assert_right, mixer_with_stats
from support.problems import HALVES, tiled_stats
from support.rule import assert_same, run
from torch._subclasses.fake_tensor import FakeTensorMode

import poolformer_kernels as pk
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import mlp, pool_mixer
from poolformer_kernels.reference import ACTIVATIONS

F32 = torch.float32
BOTH = (False, True)


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        (POOL_MIXER, {"residual": True}),
        *((MLP, {"residual": residual, "activation": name}) for residual in BOTH for name in ACTIVATIONS),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_runs_the_reference(layout, operator, options):
    """To fp64's digits: the formulas that every other value is tested against are right too."""
    inputs = operator.inputs((4, 5, 6, 9), 7, torch.float64)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = as_layout(operator.grad(inputs), layout)
    found = run(operator.call, inputs, grad, **options)
    operator.problem.assert_right(found, inputs, grad, **options)
    assert found["y"].is_contiguous(memory_format=memory_format_of(inputs["x"]))


@pytest.mark.parametrize("tiles", [1, 7])
def test_given_statistics_in_float64(tiles):
    inputs = POOL_MIXER.inputs((3, 18, 6, 9), dtype=torch.float64)
    grad = POOL_MIXER.grad(inputs)
    actual = run(mixer_with_stats, inputs, grad, residual=True, stats=tiled_stats(inputs["x"], tiles))
    # as many ulps as the reference formula itself is off
    assert_right(actual, inputs, grad, residual=True, ulps=16)


# ---- autocast ----------------------------------------------------------------------------------------------


NO_COPIES = pytest.mark.skipif(torch.version.cuda is None, reason="this torch copies no fake CUDA tensors")


@pytest.mark.parametrize("enabled", BOTH)
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        (POOL_MIXER, {"residual": True}),
        *(
            pytest.param(MLP, {"residual": residual, "norm": norm}, marks=NO_COPIES)
            for residual, norm in itertools.product(BOTH, BOTH)
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, *HALVES], ids=str)
def test_cuda_autocast_dtypes(dtype, operator, options, enabled):
    """GroupNorm's rule; on fake CUDA tensors, so that it is tested where there is no such device."""
    before = torch.is_autocast_enabled("cuda")
    inputs = operator.inputs((2, 3, 4, 5), 6, dtype, parameters=("weight",))
    with FakeTensorMode(), pk.use_backend("reference"):
        fake = {
            name: t if t is None else torch.empty(t.shape, device="cuda", dtype=dtype)
            for name, t in inputs.items()
        }
        torch.set_autocast_enabled("cuda", enabled)
        try:
            y = operator.call(**fake, **options)
        finally:
            torch.set_autocast_enabled("cuda", before)
    under_autocast = F32 if options["residual"] else torch.get_autocast_dtype("cuda")
    assert y.dtype == (under_autocast if enabled else dtype)


@pytest.mark.parametrize("enabled", BOTH)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_cpu_autocast_keeps_the_mixers_dtype(backend, dtype, enabled):
    inputs = POOL_MIXER.inputs((2, 5, 6, 9), dtype=dtype, vector_dtype=F32)
    grad = POOL_MIXER.grad(inputs)
    plain = run(pool_mixer, inputs, grad, residual=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        under_autocast = run(pool_mixer, inputs, grad, residual=True)
    assert_same(under_autocast, plain)
    assert under_autocast["y"].dtype == dtype
    assert under_autocast["dweight"].dtype == F32


def plain_eager(x, w1, b1, w2, b2, **options) -> torch.Tensor:
    """Eager PyTorch as a user writes it, for autocast to choose the dtypes."""
    parameters = {name: p for name, p in options.items() if p is not None}
    n = x
    if "norm_weight" in parameters:
        n = F.group_norm(x, 1, parameters["norm_weight"], parameters["norm_bias"])
    m = F.conv2d(F.gelu(F.conv2d(n, w1, b1)), w2, b2)
    m = m * parameters["layer_scale"][:, None, None] if "layer_scale" in parameters else m
    m = m * parameters["drop_scale"][:, None, None, None] if "drop_scale" in parameters else m
    return x + m if parameters.get("residual") else m


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_cpu_autocast_of_the_mlp_as_eager(backend, half, form, layout):
    """A float32 model under CPU autocast: the dtypes of eager's value and gradients, and its errors."""
    parameters, residual = FORMS[form]
    inputs = MLP.inputs((3, 16, 6, 7), 40, parameters=parameters)
    grad = MLP.grad(inputs)
    with torch.autocast("cpu", half):
        assert plain_eager(**inputs, residual=residual).dtype == (F32 if residual else half)
    grad = grad if residual else grad.to(half)
    autocast = partial(under_autocast, device="cpu", half=half, residual=residual)
    theirs = run(autocast(plain_eager), inputs, grad)
    ours = run(autocast(mlp), {**inputs, "x": as_layout(inputs["x"], layout)}, grad)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    assert_rule(ours, theirs, truth(inputs, grad, residual=residual), half)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_cpu_autocast_of_a_half_x(backend, half, form):
    """What the layer before hands on: x keeps its dtype, the float32 parameters their gradients'."""
    parameters, residual = FORMS[form]
    dtypes = {"weight_dtype": F32, "vector_dtype": F32}
    inputs = MLP.inputs((3, 16, 6, 7), 40, half, parameters=parameters, **dtypes)
    grad = MLP.grad(inputs)
    with torch.autocast("cpu", half):
        ours = run(mlp, inputs, grad, residual=residual)
    assert {name for name, t in ours.items() if t.dtype == half} == {"y", "dx"}
    theirs, right = run(eager, inputs, grad, residual=residual), truth(inputs, grad, residual=residual)
    assert_rule(ours, theirs, right, half)


@pytest.mark.parametrize(("x_dtype", "half"), [HALVES, HALVES[::-1]], ids=str)
def test_cpu_autocast_of_the_other_half(backend, x_dtype, half):
    """x in one half dtype, autocast to the other: eager takes it, its convolutions cast x too."""
    inputs = MLP.inputs((2, 5, 6, 7), 9, parameters=PLAIN)
    x = inputs.pop("x").to(x_dtype)
    with torch.autocast("cpu", half):
        assert plain_eager(x, **inputs).dtype == half
        y = mlp(x, **inputs)
    torch.testing.assert_close(y.float(), mlp(x.float(), **inputs), rtol=3e-2, atol=3e-2)


def test_cpu_autocast_leaves_float64_alone():
    inputs = MLP.inputs((2, 5, 6, 7), 9, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(**inputs, residual=True)
    assert torch.equal(y, mlp(**inputs, residual=True))


# ---- derivatives of the reference --------------------------------------------------------------------------


@pytest.mark.parametrize(("operator", "unit"), [(POOL_MIXER, 1e-4), (MLP, 1e-3)], ids=str)
def test_double_backward_on_the_reference(operator: Operator, unit: float):
    """A gradient penalty: the second derivative of the reference in float32 against float64."""

    def penalty(dtype: torch.dtype) -> torch.Tensor:
        inputs = {name: t.to(dtype) for name, t in operator.inputs((2, 3, 4, 5), 7).items()}
        x = inputs["x"].requires_grad_()
        with pk.use_backend("reference"):
            y = operator.call(**inputs, residual=True)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty(F32).double(), penalty(torch.float64), rtol=unit, atol=unit)


@pytest.mark.parametrize(
    ("operator", "name"),
    [*itertools.product([POOL_MIXER], ("x", "weight")), *itertools.product([MLP], ("x", "w1", "b2"))],
    ids=str,
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_run_on_the_reference(transform, operator, name):
    inputs = operator.inputs((2, 3, 5, 6), 7, torch.float64)
    at = inputs.pop(name)
    tangent = torch.randn(at.shape, dtype=torch.float64)

    def function(t: torch.Tensor) -> torch.Tensor:
        return operator.call(**inputs, **{name: t}, residual=True)

    with pk.use_backend("reference"):
        found = TRANSFORMS[transform](function, at, tangent)
        slope = (function(at + 1e-6 * tangent) - function(at - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(found, slope if found.dim() else slope.sum(), rtol=1e-6, atol=1e-6)
