"""Values and gradients of the token mixer on every CPU backend, against fp64 beside eager PyTorch.

The tests named ``core`` are also run by test_isa.py, once for each instruction set level of this machine.
"""

import pytest
import torch
from helpers import (
    CHANNELS_LAST,
    GRAD_LAYOUTS,
    LAYOUTS,
    PARAMETERS,
    VECTOR_LAYOUTS,
    as_layout,
    as_vector_layout,
    assert_right,
    assert_same,
    make_grad,
    make_inputs,
    run,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import poolformer_kernels as pk
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
FORMATS = ("nchw", "channels_last")


def assert_formats(actual: dict, layout: str) -> None:
    """y is dense in x's memory format whatever x's strides; so is dx from a kernel."""
    wanted = torch.channels_last if layout in CHANNELS_LAST else torch.contiguous_format
    for name in (
        ("y",) if pk.ops.dispatch.select_backend("cpu", actual["y"].dtype) == "reference" else ("y", "dx")
    ):
        t = actual[name]
        if t.numel() > 0:
            assert t.is_contiguous(memory_format=wanted), f"{name}: strides {t.stride()} of {tuple(t.shape)}"


def assert_mixer_right(inputs, grad, layout="nchw", **options) -> dict:
    inputs = {**inputs, "x": as_layout(inputs["x"], layout)}
    actual = run(pool_mixer, inputs, as_layout(grad, layout), **options)
    assert_right(actual, inputs, as_layout(grad, layout), **options)
    assert_formats(actual, layout)
    return actual


# ---- shapes ------------------------------------------------------------------------------------------------

SHAPES = (
    (2, 17, 5, 8),  # H != W
    (2, 3, 1, 9),
    (2, 3, 9, 1),
    (3, 17, 1, 1),
    (2, 5, 2, 2),
    (1, 96, 7, 7),
    (3, 3, 13, 29),
    (2, 1, 14, 14),
    (1, 64, 14, 14),
    (1, 17, 56, 56),
    (1, 320, 7, 7),
    (1, 768, 3, 7),
)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_shapes(backend, dtype, shape, layout):
    inputs = make_inputs(shape, dtype)
    assert_mixer_right(inputs, make_grad(inputs), layout, residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(2, 17, 5, 8), (2, 20, 1, 1), (2, 64, 7, 7), (1, 3, 13, 29)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_without_residual(backend, dtype, shape, layout):
    inputs = make_inputs(shape, dtype)
    assert_mixer_right(inputs, make_grad(inputs), layout, residual=False)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("pool_size", [1, 3, 5, 7, 9, 31])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (13, 29)], ids=str)
def test_core_pool_sizes(backend, size, pool_size, layout):
    """The pool may be larger than the image; pool size 1 leaves the identity (or zero) exactly."""
    inputs = make_inputs((2, 19, *size))
    grad = make_grad(inputs)
    actual = assert_mixer_right(inputs, grad, layout, pool_size=pool_size, residual=True)
    if pool_size == 1 and backend != "reference":
        assert torch.equal(actual["y"], inputs["x"])
        assert torch.equal(actual["dx"], grad)
    assert_mixer_right(inputs, grad, layout, pool_size=pool_size, residual=False)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("pool_size", [3, 5, 9])
@pytest.mark.parametrize("shape", [(1, 5, 100, 70), (1, 64, 40, 40), (1, 7, 300, 6)], ids=str)
def test_core_pools_across_work_items(backend, shape, pool_size, layout):
    """Images of several strips of rows: those at a strip's edge belong to the pool of the next."""
    inputs = make_inputs(shape)
    assert_mixer_right(inputs, make_grad(inputs), layout, pool_size=pool_size, residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("size", [(400, 1), (1, 400), (3, 50)], ids=str)
def test_core_pool_far_wider_than_a_thin_image(backend, size, layout):
    inputs = make_inputs((1, 3, *size))
    expected = run(pool_mixer, inputs, make_grad(inputs), pool_size=2 * max(size) - 1)
    assert_same(run(pool_mixer, inputs, make_grad(inputs), pool_size=2**31 - 1), expected)
    assert_mixer_right(inputs, make_grad(inputs), layout, pool_size=801, residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_core_every_half_survives(dtype, layout, kernels):
    """All 65536 values in and out unchanged, where the pool leaves the identity: infinities and NaN too."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 64, 32, 32)
    if dtype == torch.bfloat16:  # hardware conversions may take a subnormal for zero
        x = torch.where((x.abs() < torch.finfo(dtype).tiny), torch.zeros_like(x), x)
    stats = torch.tensor([[[65536.0, 0.0, 65536.0]]])
    finite = as_layout(torch.where(x.isfinite(), x, torch.ones_like(x)), layout)
    y, _ = pool_mixer_with_stats(finite, None, None, pool_size=1, residual=True, stats=stats)
    assert torch.equal(y, finite)
    y, _ = pool_mixer_with_stats(as_layout(x, layout), None, None, pool_size=1, residual=True, stats=stats)
    assert torch.equal(y.isfinite(), x.isfinite())


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_many_samples(backend, dtype, layout):
    inputs = make_inputs((513, 5, 3, 4), dtype)
    assert_mixer_right(inputs, make_grad(inputs), layout, residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("residual", [False, True])
def test_core_no_samples(backend, residual, layout):
    inputs = make_inputs((0, 5, 3, 4))
    actual = assert_mixer_right(inputs, make_grad(inputs), layout, residual=residual)
    assert actual["y"].shape == (0, 5, 3, 4)
    assert actual["ddrop_scale"].shape == (0,)
    for name in ("weight", "bias", "layer_scale"):
        assert torch.equal(actual[f"d{name}"], torch.zeros(5)), name


# ---- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_layouts_of_x(backend, dtype, layout):
    inputs = make_inputs((3, 17, 6, 9), dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)
    actual = run(pool_mixer, inputs, grad, residual=True)
    assert_right(actual, inputs, grad, residual=True)
    assert_formats(actual, layout)


@pytest.mark.parametrize("x_layout", FORMATS)
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_layouts_of_the_gradient(backend, dtype, layout, x_layout):
    inputs = make_inputs((3, 17, 6, 9), dtype)
    inputs["x"] = as_layout(inputs["x"], x_layout)
    grad = as_layout(make_grad(inputs), layout)
    actual = run(pool_mixer, inputs, grad, residual=True)
    assert_right(actual, inputs, grad, residual=True)
    assert_formats(actual, x_layout)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
def test_layouts_of_parameters(backend, layout, name):
    inputs = make_inputs((5, 6, 4, 5))
    inputs[name] = as_vector_layout(inputs[name], layout)
    grad = make_grad(inputs)
    assert_right(run(pool_mixer, inputs, grad, residual=True), inputs, grad, residual=True)


# ---- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_core_float32_parameters_with_half_activations(backend, dtype, residual, layout):
    inputs = make_inputs((2, 17, 6, 9), dtype, parameter_dtype=torch.float32)
    assert_mixer_right(inputs, make_grad(inputs), layout, residual=residual)


def test_each_parameter_has_its_own_dtype(backend):
    inputs = make_inputs((2, 17, 6, 9), torch.bfloat16)
    for name in ("bias", "drop_scale"):
        inputs[name] = inputs[name].float()
    assert_mixer_right(inputs, make_grad(inputs), residual=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_runs_the_reference(layout):
    inputs = make_inputs((3, 5, 6, 9), torch.float64)
    assert_mixer_right(inputs, make_grad(inputs), layout, residual=True)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_autocast_keeps_the_dtype(backend, dtype, enabled):
    inputs = make_inputs((2, 5, 6, 9), dtype, parameter_dtype=torch.float32)
    grad = make_grad(inputs)
    plain = run(pool_mixer, inputs, grad, residual=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        under_autocast = run(pool_mixer, inputs, grad, residual=True)
    assert_same(under_autocast, plain)
    assert under_autocast["y"].dtype == dtype
    assert under_autocast["dweight"].dtype == torch.float32


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_autocast_computes_in_float32(dtype, enabled):
    """GroupNorm's rule; on fake CUDA tensors, so that it is tested where there is no such device."""
    before = torch.is_autocast_enabled("cuda")
    with FakeTensorMode(), pk.use_backend("reference"):
        x = torch.empty(2, 3, 4, 5, device="cuda", dtype=dtype)
        weight = torch.empty(3, device="cuda", dtype=dtype)
        torch.set_autocast_enabled("cuda", enabled)
        try:
            y = pool_mixer(x, weight, None, residual=True)
        finally:
            torch.set_autocast_enabled("cuda", before)
    assert y.dtype == (torch.float32 if enabled else dtype)
