"""Values and gradients of the MLP on every CPU backend, against fp64 beside eager PyTorch.

The tests named ``core`` are also run by test_isa.py, once for each instruction set level of this machine.
"""

import os

import pytest
import torch
from helpers import (
    CHANNELS_LAST,
    GRAD_LAYOUTS,
    HALVES,
    LAYOUTS,
    VECTOR_LAYOUTS,
    as_layout,
    as_vector_layout,
    assert_close_to_fp64,
    assert_same,
    run,
    tiled_stats,
)
from mlp_helpers import (
    PLAIN,
    VECTORS,
    WEIGHT_LAYOUTS,
    WEIGHTS,
    as_weight_layout,
    assert_right,
    eager,
    make_grad,
    make_inputs,
    truth,
    y_of_mlp_with_stats,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats

DTYPES = (torch.float32, *HALVES)
FORMATS = ("nchw", "channels_last")


def assert_formats(actual: dict, layout: str) -> None:
    """y is dense in x's memory format whatever x's strides, one channel in NCHW; so is dx from a kernel."""
    several = actual["dx"].shape[1] > 1
    wanted = torch.channels_last if layout in CHANNELS_LAST and several else torch.contiguous_format
    on_reference = pk.ops.dispatch.select_backend("cpu", actual["y"].dtype) == "reference"
    for name in ("y",) if on_reference else ("y", "dx"):
        t = actual[name]
        if t.numel() > 0:
            assert t.is_contiguous(memory_format=wanted), f"{name}: strides {t.stride()} of {tuple(t.shape)}"


def assert_mlp_right(inputs, grad, layout="nchw", *, save_hidden=False, **options) -> dict:
    inputs = {**inputs, "x": as_layout(inputs["x"], layout)}
    grad = as_layout(grad, layout)
    actual = run(mlp, inputs, grad, save_hidden=save_hidden, **options)
    assert_right(actual, inputs, grad, **options)
    assert_formats(actual, layout)
    return actual


# ---- the definition ----------------------------------------------------------------------------------------


def test_is_the_papers_definition():
    """Equation 3 of the paper, one number at a time, in float64."""
    inputs = make_inputs((3, 2, 2, 3), 4, torch.float64)
    v = {name: t.flatten(1).tolist() if t.dim() == 4 else t.tolist() for name, t in inputs.items()}
    y = mlp(**inputs, activation="relu", eps=1e-3, residual=True)
    for b in range(3):
        values = inputs["x"][b].flatten().tolist()
        mean = sum(values) / len(values)
        rstd = (sum((u - mean) ** 2 for u in values) / len(values) + 1e-3) ** -0.5
        for i in range(2):
            for j in range(3):
                x = inputs["x"][b, :, i, j].tolist()
                n = [(x[c] - mean) * rstd * v["norm_weight"][c] + v["norm_bias"][c] for c in range(2)]
                p = [max(0.0, sum(v["w1"][k][c] * n[c] for c in range(2)) + v["b1"][k]) for k in range(4)]
                for c in range(2):
                    o = sum(v["w2"][c][k] * p[k] for k in range(4)) + v["b2"][c]
                    wanted = x[c] + v["drop_scale"][b] * v["layer_scale"][c] * o
                    assert y[b, c, i, j].item() == pytest.approx(wanted, abs=1e-13)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_runs_the_reference(layout, residual, activation):
    """To fp64's digits: the formulas that every other value is tested against are right too."""
    inputs = make_inputs((4, 5, 6, 9), 7, torch.float64)
    assert_mlp_right(inputs, make_grad(inputs), layout, residual=residual, activation=activation)


# ---- shapes ------------------------------------------------------------------------------------------------

SHAPES = (  # x, hidden
    ((2, 17, 5, 8), 68),  # H != W
    ((2, 3, 1, 9), 12),
    ((2, 3, 9, 1), 5),
    ((3, 17, 1, 1), 33),
    ((2, 1, 5, 6), 1),
    ((2, 16, 6, 6), 1),
    ((3, 3, 13, 29), 12),
    ((2, 64, 7, 7), 256),
    ((1, 96, 7, 7), 384),
    ((1, 64, 14, 14), 257),
    ((5, 32, 1, 13), 300),
    ((1, 320, 2, 5), 1280),
    ((1, 96, 3, 11), 1000),
    ((1, 513, 2, 3), 31),
)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_shapes(backend, dtype, shape, hidden, layout):
    inputs = make_inputs(shape, hidden, dtype)
    assert_mlp_right(inputs, make_grad(inputs), layout, residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("shape", "hidden", "out"),
    [
        ((2, 17, 5, 8), 20, 9),
        ((2, 17, 5, 8), 5, 1),
        ((2, 1, 5, 8), 5, 40),
        ((2, 64, 7, 7), 64, 10),
        ((1, 3, 13, 29), 12, 3),
        ((1, 24, 4, 9), 260, 100),
        ((2, 9, 3, 11), 1061, 37),
        ((3, 33, 1, 1), 7, 65),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_plain_to_another_width(backend, dtype, shape, hidden, out, layout):
    """sigma(X W1) W2: no norm, no residual, any number of channels out."""
    inputs = make_inputs(shape, hidden, dtype, out=out, parameters=PLAIN)
    assert_mlp_right(inputs, make_grad(inputs), layout)


@pytest.mark.parametrize(("channels", "hidden"), [(320, 1280), (768, 96), (24, 3072)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_long_sums(backend, dtype, channels, hidden):
    """No residual hides them: one running float32 sum over a long row is less exact than eager's."""
    inputs = make_inputs((2, channels, 5, 7), hidden, dtype, parameters=PLAIN)
    grad = make_grad(inputs)
    actual, theirs, right = run(mlp, inputs, grad), run(eager, inputs, grad), truth(inputs, grad)
    for name in ("y", "dx"):  # relative to the values themselves
        assert_close_to_fp64(actual[name], theirs[name], right.values[name], what=name)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_norm_to_another_width(backend, dtype, save_hidden, layout):
    inputs = make_inputs((4, 17, 5, 8), 36, dtype, out=24)
    assert_mlp_right(inputs, make_grad(inputs), layout, save_hidden=save_hidden)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_numbers_of_tokens(backend, dtype, tokens, layout):
    """Around the sizes of tiles, where samples share tiles and the last one is partly empty."""
    inputs = make_inputs((2, 20, 1, tokens), 40, dtype)
    assert_mlp_right(inputs, make_grad(inputs), layout, residual=True)


@pytest.mark.parametrize("channels", [2, 7, 15, 16, 31, 32, 33, 48, 63, 65, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_numbers_of_channels(backend, dtype, channels):
    """Around the sizes of vectors and matrix tiles: C and the hidden size each on either side."""
    for hidden in (channels + 1, 2 * channels - 1):
        inputs = make_inputs((2, channels, 3, 7), hidden, dtype)
        assert_mlp_right(inputs, make_grad(inputs), "channels_last", residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_many_samples(backend, dtype, save_hidden, layout):
    inputs = make_inputs((513, 5, 1, 3), 9, dtype)
    assert_mlp_right(inputs, make_grad(inputs), layout, save_hidden=save_hidden, residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize("shape", [(65, 8, 7, 7), (17, 8, 14, 14), (5, 8, 28, 28), (1, 4, 57, 59)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_cpp_backward_in_groups(kernels, dtype, shape, save_hidden, layout):
    """More tokens than the backward holds at once: groups of samples, a short last one, one large image."""
    inputs = make_inputs(shape, 9, dtype)
    assert_mlp_right(inputs, make_grad(inputs), layout, save_hidden=save_hidden, residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_core_no_samples(backend, residual, save_hidden, layout):
    inputs = make_inputs((0, 5, 3, 4), 7)
    actual = assert_mlp_right(inputs, make_grad(inputs), layout, save_hidden=save_hidden, residual=residual)
    assert actual["y"].shape == (0, 5, 3, 4)
    assert actual["ddrop_scale"].shape == (0,)
    for name in inputs:
        if name not in ("x", "drop_scale"):
            assert torch.equal(actual[f"d{name}"], torch.zeros(inputs[name].shape)), name


# ---- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_layouts_of_x(backend, dtype, layout):
    for form in ({"parameters": VECTORS}, {"parameters": PLAIN, "out": 9}):
        inputs = make_inputs((3, 17, 6, 9), 20, dtype, **form)
        inputs["x"] = as_layout(inputs["x"], layout)
        grad = make_grad(inputs)
        options = {"residual": "out" not in form}
        actual = run(mlp, inputs, grad, **options)
        assert_right(actual, inputs, grad, **options)
        assert_formats(actual, layout)


@pytest.mark.parametrize("x_layout", FORMATS)
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_layouts_of_the_gradient(backend, dtype, layout, x_layout):
    inputs = make_inputs((3, 17, 6, 9), 20, dtype)
    inputs["x"] = as_layout(inputs["x"], x_layout)
    grad = as_layout(make_grad(inputs), layout)
    actual = run(mlp, inputs, grad, residual=True)
    assert_right(actual, inputs, grad, residual=True)
    assert_formats(actual, x_layout)


@pytest.mark.parametrize(
    ("layout", "conv"),
    [
        (layout, conv)
        for layout in WEIGHT_LAYOUTS
        for conv in (False, True)
        if conv or layout != "channels_last"
    ],
)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_layouts_of_weights(backend, dtype, name, layout, conv):
    inputs = make_inputs((2, 17, 3, 5), 20, dtype, conv=conv)
    inputs[name] = as_weight_layout(inputs[name], layout)
    grad = make_grad(inputs)
    actual = run(mlp, inputs, grad, residual=True)
    assert_right(actual, inputs, grad, residual=True)
    plain = {**inputs, name: inputs[name].contiguous().clone()}
    if backend != "reference":
        assert_same(actual, run(mlp, plain, grad, residual=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_and_conv_weights_are_the_same(backend, dtype):
    """One of each too: nn.Linear's weight is [out, in], nn.Conv2d's [out, in, 1, 1]."""
    results = []
    for first, second in ((True, True), (False, False), (True, False), (False, True)):
        inputs = make_inputs((2, 17, 3, 5), 20, dtype, conv=first)
        inputs["w2"] = make_inputs((2, 17, 3, 5), 20, dtype, conv=second)["w2"]
        actual = run(mlp, inputs, make_grad(inputs), residual=True)
        for name in WEIGHTS:
            assert actual[f"d{name}"].shape == inputs[name].shape
            actual[f"d{name}"] = actual[f"d{name}"].flatten(1)
        results.append(actual)
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
def test_layouts_of_vectors(backend, layout, name):
    inputs = make_inputs((5, 6, 4, 5), 10)
    inputs[name] = as_vector_layout(inputs[name], layout)
    grad = make_grad(inputs)
    assert_right(run(mlp, inputs, grad, residual=True), inputs, grad, residual=True)


# ---- dtypes ------------------------------------------------------------------------------------------------

MIXED = [
    *((half, torch.float32, torch.float32) for half in HALVES),  # x, weights, vectors
    *((torch.float32, half, vector) for half in HALVES for vector in (torch.float32, half)),
    *((half, half, torch.float32) for half in HALVES),
]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize(("dtype", "weight_dtype", "vector_dtype"), MIXED, ids=str)
def test_core_mixed_dtypes(backend, dtype, weight_dtype, vector_dtype, save_hidden, layout):
    inputs = make_inputs((2, 17, 6, 9), 36, dtype, weight_dtype=weight_dtype, vector_dtype=vector_dtype)
    assert_mlp_right(inputs, make_grad(inputs), layout, save_hidden=save_hidden, residual=True)
    plain = make_inputs(
        (2, 17, 6, 9),
        36,
        dtype,
        out=9,
        parameters=PLAIN,
        weight_dtype=weight_dtype,
        vector_dtype=vector_dtype,
    )
    assert_mlp_right(plain, make_grad(plain), layout, save_hidden=save_hidden)


def test_each_vector_has_its_own_dtype(backend):
    inputs = make_inputs((2, 17, 6, 9), 20, torch.bfloat16)
    for name in ("b2", "norm_bias", "drop_scale"):
        inputs[name] = inputs[name].float()
    assert_mlp_right(inputs, make_grad(inputs), residual=True)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch cannot copy even fake CUDA tensors")
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_autocast_dtypes(dtype, normed, residual, enabled):
    """On fake CUDA tensors, so that it is tested where there is no such device; see test_mlp_compile too."""
    before = torch.is_autocast_enabled("cuda")
    half = torch.get_autocast_dtype("cuda")
    with FakeTensorMode(), pk.use_backend("reference"):
        x = torch.empty(2, 3, 4, 5, device="cuda", dtype=dtype)
        w1, w2 = (torch.empty(shape, device="cuda", dtype=dtype) for shape in ((6, 3), (3, 6)))
        torch.set_autocast_enabled("cuda", enabled)
        try:
            y = mlp(x, w1, None, w2, None, norm=normed, residual=residual)
        finally:
            torch.set_autocast_enabled("cuda", before)
    if not enabled:
        assert y.dtype == dtype
    else:
        assert y.dtype == (torch.float32 if residual else half)


# ---- determinism -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(5, 19, 14, 13), (1, 352, 3, 7), (3, 96, 7, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_ten_runs_are_bitwise_equal(backend, dtype, shape, layout):
    """Kernels: over thread counts too, because their reductions keep one order whoever computes the parts.

    At test_isa.py's levels with each number of threads once.
    """
    inputs = make_inputs(shape, 3 * shape[1], dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = as_layout(make_grad(inputs), layout)
    threads = torch.get_num_threads()
    stats = tiled_stats(inputs["x"], 3)

    def everything() -> dict:
        returned = mlp_with_stats(**inputs, residual=True)[1]
        given = run(y_of_mlp_with_stats, inputs, grad, residual=True, stats=stats, save_hidden=True)
        own = run(mlp, inputs, grad, residual=True)
        return own | {"stats": returned} | {f"given {name}": value for name, value in given.items()}

    try:
        expected = everything()
        for i in range(3 if "POOLFORMER_KERNELS_ISA" in os.environ else 9):
            if backend != "reference":
                torch.set_num_threads((1, 2, 3)[i % 3])
            assert_same(everything(), expected)
    finally:
        torch.set_num_threads(threads)


# ---- few tokens and many hidden channels -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "shape"),
    [(1376, (1, 64, 7, 7)), (1376, (1, 64, 14, 14)), (2656, (1, 64, 7, 7)), (2656, (4, 64, 7, 7))],
    ids=str,
)
def test_core_parts_of_unequal_size(backend, dtype, hidden, shape):
    """The last part of the hidden channels, which threads share, is smaller than the others."""
    inputs = make_inputs(shape, hidden, dtype)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    with torch.no_grad():
        y = mlp(**inputs)
    assert_right({"y": y}, inputs, make_grad(inputs))
