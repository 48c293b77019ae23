"""The MLP's backward where tokens are rows: bfloat16 products, channels_last, gelu, whole tiles, many tokens.

That way is for matrix units; test_amx has it on emulated ones. Without one these are tests of the usual way.
It is not for the gradient of drop_scale, so no test here asks for that.
"""

import pytest
import torch
from helpers import as_layout, assert_same, bits, randn
from mlp_helpers import as_weight_layout, assert_right, make_grad, make_inputs
from torch import Tensor

from poolformer_kernels.backends import cpp
from poolformer_kernels.ops import mlp

BF16 = torch.bfloat16
SHAPES = (  # x, hidden
    ((2, 64, 14, 14), 256),
    ((1, 32, 17, 19), 32),  # 323 tokens: the last 32 are not whole
    ((3, 96, 13, 11), 384),
    ((5, 128, 28, 28), 512),  # blocks of tokens that begin within samples
    ((2, 320, 14, 14), 1280),
    ((1, 320, 19, 29), 96),
    ((1, 224, 16, 18), 896),
    ((1, 256, 16, 18), 1024),
    ((289, 64, 1, 1), 96),
    ((97, 32, 1, 5), 64),
    ((2, 352, 17, 19), 96),
    ((6, 512, 7, 7), 2048),
    ((4, 512, 14, 14), 128),
    ((3, 384, 13, 13), 160),
    ((2, 768, 14, 14), 320),
    ((1, 64, 57, 59), 128),  # one sample of many blocks
    ((2, 64, 13, 17), 1312),
    ((7, 160, 7, 7), 640),
)


def values(inputs: dict, grad: Tensor, wanted: tuple[str, ...] | None = None, **options) -> dict[str, Tensor]:
    """The gradients of ``wanted``, by default all but drop_scale's."""
    wanted = (
        tuple(n for n, t in inputs.items() if t is not None and n != "drop_scale")
        if wanted is None
        else wanted
    )
    leaves = {n: t if t is None else t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
    y = mlp(**leaves, **options)
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], grad)
    return {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def problem(shape, hidden, layout: str = "channels_last", **options) -> tuple[dict, Tensor]:
    inputs = make_inputs(shape, hidden, BF16, **options)
    inputs["x"] = as_layout(inputs["x"], layout)
    return inputs, as_layout(make_grad(inputs), layout)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
def test_core_cpp_rows_shapes(kernels, shape, hidden, dropped):
    inputs, grad = problem(shape, hidden)
    inputs["drop_scale"] = inputs["drop_scale"] if dropped else None
    assert_right(values(inputs, grad, residual=True), inputs, grad, residual=True)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_core_cpp_rows_forms(kernels, residual, norm):
    parameters = ("b1", "norm_weight", "layer_scale") if norm else ("b2", "layer_scale")
    for vector_dtype in (BF16, torch.float32):
        inputs, grad = problem((3, 64, 13, 11), 128, parameters=parameters, vector_dtype=vector_dtype)
        assert_right(values(inputs, grad, residual=residual), inputs, grad, residual=residual)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("x_dtype", "weight_dtype"), [(torch.float32, BF16), (BF16, torch.float32)])
def test_core_cpp_rows_dtypes(kernels, x_dtype, weight_dtype, dropped):
    """One of x and the weights in float32; its gradients are, too."""
    for shape, hidden in (((3, 64, 13, 11), 128), ((2, 320, 14, 14), 640), ((6, 512, 7, 7), 256)):
        inputs = make_inputs(shape, hidden, x_dtype, weight_dtype=weight_dtype, vector_dtype=torch.float32)
        inputs["x"] = as_layout(inputs["x"], "channels_last")
        inputs["drop_scale"] = inputs["drop_scale"] if dropped else None
        grad = as_layout(make_grad(inputs), "channels_last")
        actual = values(inputs, grad, residual=True)
        assert_right(actual, inputs, grad, residual=True)
        for name in ("dx", "dw1", "dw2"):
            assert actual[name].dtype == inputs[name[1:]].dtype
            rounded = torch.equal(actual[name], actual[name].to(BF16).to(actual[name].dtype))
            assert rounded == (actual[name].dtype == BF16), name


@pytest.mark.parametrize("x_dtype", [torch.float32, BF16])
def test_core_cpp_rows_under_autocast(kernels, x_dtype):
    """The kernels read float32 weights: no copy of them is kept, and no gradient is rounded."""
    inputs = make_inputs((3, 64, 13, 11), 128, x_dtype, vector_dtype=torch.float32)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    grad = as_layout(make_grad(inputs), "channels_last")
    rounded = {n: t.to(BF16) if n in ("w1", "w2") else t for n, t in inputs.items()}
    expected = values(rounded, grad, residual=True)
    inputs |= {n: (1 + 2**-12) * rounded[n].float() for n in ("w1", "w2")}
    kept = []

    def keep(t):
        kept.append(t.data_ptr())
        return t

    with torch.autocast("cpu", BF16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            mlp(**{n: t.requires_grad_() for n, t in inputs.items()}, residual=True)
        actual = values(inputs, grad, residual=True)
    assert {inputs["w1"].data_ptr(), inputs["w2"].data_ptr()} <= set(kept)
    for name in ("dw1", "dw2"):
        assert actual[name].dtype == torch.float32
        assert not torch.equal(actual[name], actual[name].to(BF16).float()), name
        actual[name] = actual[name].to(BF16)
    if cpp.ISA in ("amx", "avx512_bf16"):  # elsewhere float32 weights are not rounded
        same = ("dx", "db1", "db2", "dw1", "dw2")
        assert_same(*({n: gradients[n] for n in same} for gradients in (actual, expected)))
    for name, gradient in expected.items():
        atol = 2**-7 * gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=2**-7, atol=atol)


@pytest.mark.parametrize("layout", ["channels_last", "sliced_c_last", "offset_last"])
def test_core_cpp_rows_layouts(kernels, layout):
    """Rows of weights that are apart, or not aligned, and tensors that begin anywhere."""
    inputs, grad = problem((3, 64, 13, 11), 128)
    expected = values(inputs, grad, residual=True)
    inputs["x"], grad = as_layout(inputs["x"], layout), as_layout(grad, layout)
    assert_same(values(inputs, grad, residual=True), expected)
    for w in ("strided", "padded", "offset"):
        other = {n: as_weight_layout(t, w) if n in ("w1", "w2") else t for n, t in inputs.items()}
        assert_same(values(other, grad, residual=True), expected)


@pytest.mark.parametrize(
    ("shape", "hidden"), [((5, 64, 28, 28), 256), ((3, 320, 13, 11), 1280), ((1, 96, 19, 23), 64)]
)
def test_core_cpp_rows_do_not_depend_on_threads(kernels, shape, hidden):
    inputs, grad = problem(shape, hidden)
    threads = torch.get_num_threads()
    try:
        expected = values(inputs, grad, residual=True)
        for count in (1, 2, 3, 7, 2):
            torch.set_num_threads(count)
            assert_same(values(inputs, grad, residual=True), expected)
    finally:
        torch.set_num_threads(threads)


def test_core_cpp_rows_of_x_alone(kernels):
    """What is frozen changes no other gradient."""
    for shape, hidden in (((3, 64, 13, 11), 256), ((2, 320, 14, 14), 640)):
        inputs, grad = problem(shape, hidden)
        full = values(inputs, grad, residual=True)
        assert torch.equal(bits(values(inputs, grad, ("x",), residual=True)["dx"]), bits(full["dx"]))


def test_core_cpp_rows_of_dropped_samples(kernels):
    """A sample whose drop_scale is 0 hands on the gradient as it is, and adds nothing to a parameter's."""
    inputs, grad = problem((4, 64, 12, 12), 256)
    inputs["drop_scale"] = torch.tensor([1.25, 0.0, 1.25, 0.0], dtype=BF16)
    actual = values(inputs, grad, residual=True)
    assert torch.equal(actual["dx"][1::2], grad[1::2])
    kept = {**inputs, "x": inputs["x"][::2], "drop_scale": inputs["drop_scale"][::2]}
    fewer = values(kept, grad[::2], residual=True)
    assert torch.equal(actual["dx"][::2], fewer["dx"])
    for name in ("db1", "db2", "dw1", "dw2"):
        torch.testing.assert_close(
            actual[name], fewer[name], rtol=2**-7, atol=2**-7 * fewer[name].abs().max().item()
        )


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu", "relu_squared"])
def test_core_cpp_rows_other_activations(kernels, activation):
    inputs, grad = problem((3, 64, 13, 11), 128)
    if activation == "relu":
        inputs["w1"] = 0.2 * inputs["w1"]
        inputs["b1"] = torch.where(torch.arange(128) % 2 == 0, 2.0, -2.0).to(BF16)
    actual = values(inputs, grad, residual=True, activation=activation)
    assert_right(actual, inputs, grad, residual=True, activation=activation)


@pytest.mark.parametrize("size", [0.0, 1.0, 3.5, 50.0, 1e4])
def test_core_cpp_rows_far_hidden_activations(kernels, size):
    """b1 of +-size, where gelu and its slope end in those of relu; about 0 and where the table ends, too."""
    inputs, grad = problem((3, 64, 13, 11), 128)
    inputs["b1"] = torch.where(torch.arange(128) % 2 == 0, size, -size).to(BF16)
    inputs["w2"] = inputs["w2"] / max(size, 1)
    assert_right(values(inputs, grad, residual=True), inputs, grad, residual=True)
    if size > 10:
        inputs["b1"].fill_(-size)
        actual = values(inputs, grad, residual=True)
        for name in ("dw1", "db1", "dw2", "dnorm_weight", "dnorm_bias"):
            assert not actual[name].any(), name
        assert torch.equal(actual["dx"], grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_core_cpp_rows_not_finite(kernels, bad):
    """In x, g or a parameter: in dx it stays in its sample, and no gradient that it reaches is a number."""
    inputs, grad = problem((3, 64, 13, 11), 128)
    inputs["drop_scale"] = None
    clean = values(inputs, grad, residual=True)["dx"]
    reached = ("dx", "dw1", "db1", "dnorm_weight", "dnorm_bias")
    for where, names in (("x", (*reached, "dw2")), ("grad", (*reached, "dw2", "db2"))):
        hurt, g = {**inputs, "x": inputs["x"].clone()}, grad.clone()
        (hurt["x"] if where == "x" else g)[1, 5, 3, 4] = bad
        actual = values(hurt, g, residual=True)
        assert not actual["dx"][1].isfinite().any()
        assert torch.equal(actual["dx"][[0, 2]], clean[[0, 2]])
        assert all(not actual[n].isfinite().all() for n in names)
    if bad == float("inf") and cpp.ISA != "amx":
        return  # there the slope of an infinite h is 0 or 1; that of eager is not a number
    for name in ("w1", "b1", "w2", "norm_weight", "norm_bias"):
        hurt = {**inputs, name: inputs[name].clone()}
        hurt[name].view(-1)[3] = bad
        actual = values(hurt, grad, residual=True)
        assert not actual["dx"].isfinite().any(), name
        assert not actual["dw1"].isfinite().all(), name
        assert actual["dw2"].isfinite().all() == (name == "w2"), name


def test_rows_are_taken(kernels):
    """Where there is a matrix unit: the usual way, that of drop_scale's gradient, differs in last digits."""
    if cpp.ISA != "amx":
        pytest.skip("no matrix unit")
    inputs, grad = problem((3, 64, 13, 11), 128)
    inputs["drop_scale"] = torch.ones(3, dtype=BF16)
    both = [values(inputs, grad, wanted, residual=True)["dx"] for wanted in (("x",), ("x", "drop_scale"))]
    assert not torch.equal(*both)
    torch.testing.assert_close(*both, rtol=2e-2, atol=2e-2)


def test_core_cpp_rows_of_trained_statistics(kernels):
    """Channels with means of their own, far from zero."""
    inputs, grad = problem((3, 64, 13, 11), 256)
    inputs["x"][:, ::5] += 30 * randn(13, 1, 1, dtype=BF16, seed=3)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    assert_right(values(inputs, grad, residual=True), inputs, grad, residual=True, ulps=8)
