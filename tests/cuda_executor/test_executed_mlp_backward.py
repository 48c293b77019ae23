"""The MLP's backward kernels in the executor, called without the forward: every gradient's error rule."""

import pytest
import torch
from helpers import as_layout, as_vector_layout, assert_close_to_fp64, assert_same, run
from mlp_helpers import (
    NAMES,
    VECTORS,
    WEIGHTS,
    as_weight_layout,
    eager,
    make_grad,
    make_inputs,
    truth,
    ulps_of,
)

from poolformer_kernels import reference
from poolformer_kernels.layout import memory_format_of

pytestmark = pytest.mark.sampled(3)

BF16, F16 = torch.bfloat16, torch.float16
SHAPE = (2, 64, 7, 5)  # 70 tokens: two tiles of 64, samples meet inside one
backward = torch.ops.poolformer_kernels.mlp_cuda_backward


def normed(inputs) -> bool:
    return inputs["norm_weight"] is not None or inputs["norm_bias"] is not None


def statistics(x, eps: float = 1e-5):
    mean = x.double().mean((1, 2, 3), keepdim=True)
    var = (x.double() - mean).square().mean((1, 2, 3))
    return torch.stack([mean.flatten(), (var + eps).rsqrt()], 1).float()


def operand_of(inputs) -> torch.dtype:
    return inputs["w1" if inputs["x"].dtype == torch.float32 else "x"].dtype


def fc1(inputs, norm):
    """fc1's output as the forward saves it."""
    n = inputs["x"].double().contiguous()
    if norm:
        gamma, beta = (
            torch.full((n.shape[1],), default).double() if inputs[name] is None else inputs[name].double()
            for name, default in (("norm_weight", 1.0), ("norm_bias", 0.0))
        )
        n = torch.group_norm(n, 1, gamma, beta, 1e-5)
    bias = 0.0 if inputs["b1"] is None else inputs["b1"].double()
    h = n.flatten(2).transpose(1, 2) @ inputs["w1"].flatten(1).double().T + bias
    return h.flatten().to(operand_of(inputs))


def gradients(
    inputs, grad, *, activation="gelu", norm=None, residual=False, save_hidden=False, parameters=True,
    drop=True,
):  # fmt: skip
    x, *given = (inputs[name] for name in NAMES)
    norm = normed(inputs) if norm is None else norm
    mean_rstd = statistics(x) if norm else torch.empty(0)
    saved = fc1(inputs, norm) if save_hidden else None
    result = backward(grad, x, mean_rstd, *given, saved, activation, norm, residual, parameters, drop)
    return {f"d{name}": t for name, t in zip(NAMES, result, strict=True)}


def check(inputs, grad=None, *, save_hidden=False, ulps=4, **options):
    grad = make_grad(inputs) if grad is None else grad
    before = {name: t.clone() for name, t in inputs.items() if t is not None} | {"grad": grad.clone()}
    actual = gradients(inputs, grad, save_hidden=save_hidden, **options)
    assert_same({n: grad if n == "grad" else inputs[n] for n in before}, before)  # nothing was written to
    plain = {name: None if t is None else t.detach().contiguous().clone() for name, t in inputs.items()}
    theirs = run(eager, plain, grad.contiguous(), **options)
    right = truth(inputs, grad, **options)
    assert actual["dx"].is_contiguous(memory_format=memory_format_of(inputs["x"]))
    for name, value in actual.items():
        source = inputs[name[1:]]
        if source is None:
            continue
        assert value.dtype == (source.dtype if name in ("dx", "dw1", "dw2") else torch.float32)
        value = value.to(source.dtype)
        floor = ulps_of(value.dtype, operand_of(inputs), ulps)
        assert_close_to_fp64(
            value, theirs[name], right.values[name], scale=right.scales[name], ulps=floor, what=name
        )


def problem(shape=SHAPE, hidden=64, dtype=BF16, *, layout="channels_last", **options):
    inputs = make_inputs(shape, hidden, dtype, **options)
    inputs["x"] = as_layout(inputs["x"], layout)
    return inputs


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("channels", "hidden"), [(64, 64), (64, 256), (96, 128), (128, 192)])
def test_error_rule(channels, hidden, dtype) -> None:
    check(problem((2, channels, 7, 5), hidden, dtype), residual=True)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (7, 7)])
@pytest.mark.parametrize("batch", [1, 5])
def test_samples_in_a_tile(batch, size) -> None:
    check(problem((batch, 64, *size)), residual=True)


def test_more_tiles_than_one_group_of_sums() -> None:
    inputs = problem((1, 96, 91, 91), parameters=("norm_weight", "norm_bias"))
    grad = make_grad(inputs)
    right = truth(inputs, grad, residual=True)
    for name, value in gradients(inputs, grad, residual=True).items():
        size = torch.linalg.vector_norm(right.scales[name])
        assert torch.linalg.vector_norm(value.double() - right.values[name]) <= 0.005 * size, name


@pytest.mark.parametrize("activation", [name for name in reference.ACTIVATIONS if name != "gelu"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_activations(dtype, activation) -> None:
    check(problem((1, 64, 3, 5), 64, dtype), activation=activation, residual=True)


@pytest.mark.parametrize("without", VECTORS)
def test_without_one_parameter(without) -> None:
    given = tuple(name for name in VECTORS if name != without)
    check(problem((3, 64, 3, 1), parameters=given), residual=True)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_no_parameters(norm, residual) -> None:
    check(problem((2, 96, 3, 3), parameters=(), conv=False), norm=norm, residual=residual)


@pytest.mark.parametrize(("channels", "dtype"), [(64, BF16), (96, F16), (128, BF16)])
def test_saved_hidden(channels, dtype) -> None:
    check(problem((2, channels, 7, 5), 128, dtype), residual=True, save_hidden=True)


@pytest.mark.parametrize("layout", ["nchw", "transposed", "sliced_c_last", "offset_last"])
def test_layouts_of_x(layout) -> None:
    inputs = problem(layout=layout)
    if layout == "nchw":
        check(inputs, residual=True)
    dense = inputs | {"x": inputs["x"].contiguous(memory_format=memory_format_of(inputs["x"]))}
    grad = make_grad(inputs)
    assert_same(gradients(inputs, grad), gradients(dense, grad))


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced_hw", "offset_last", "expanded_all"])
def test_strides_of_the_gradient(layout) -> None:
    inputs = problem((2, 64, 3, 2))
    grad = as_layout(make_grad(inputs), layout)
    assert_same(gradients(inputs, grad), gradients(inputs, grad.clone()))


@pytest.mark.parametrize("layout", ["transposed", "padded", "offset"])
def test_strides_of_the_parameters(layout) -> None:
    inputs = problem((2, 64, 3, 2))
    strided = inputs | {name: as_weight_layout(inputs[name], layout) for name in WEIGHTS}
    strided |= {name: as_vector_layout(inputs[name], "strided") for name in VECTORS}
    grad = make_grad(inputs)
    assert_same(gradients(strided, grad, residual=True), gradients(inputs, grad, residual=True))


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(BF16, torch.float32), (F16, torch.float32), (torch.float32, BF16), (torch.float32, F16)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_other_weights(layout, dtype, weight_dtype) -> None:
    inputs = problem(
        (2, 64, 5, 3), 64, dtype, layout=layout, weight_dtype=weight_dtype, vector_dtype=torch.float32
    )
    check(inputs, residual=True)


@pytest.mark.parametrize("scale", [1e-5, 1e-6])
def test_small_layer_scale_in_fp16(scale) -> None:
    inputs = problem((2, 64, 5, 3), 64, F16, vector_dtype=torch.float32)
    inputs["layer_scale"] *= scale  # times a weight it is below fp16's smallest number
    check(inputs, 1e4 * make_grad(inputs))  # as a loss scaler hands it over


def test_mean_of_100_deviations() -> None:
    # half an ulp of the mean is 50 of a deviation's
    check(problem(mean=50.0, sigma=0.5), residual=True, ulps=54)


@pytest.mark.parametrize("norm", [True, False])
def test_only_what_is_asked_for(norm) -> None:
    given = VECTORS if norm else ("b1", "b2", "layer_scale", "drop_scale")
    inputs = problem((2, 64, 5, 3), parameters=given)
    grad = make_grad(inputs)
    everything = gradients(inputs, grad)
    for parameters, drop in ((False, False), (False, True), (True, False)):
        for name, value in gradients(inputs, grad, parameters=parameters, drop=drop).items():
            wanted = name == "dx" or (drop if name == "ddrop_scale" else parameters)
            expected = everything[name] if wanted else everything[name].new_empty(0)
            assert_same({name: value}, {name: expected})


@pytest.mark.parametrize("conv", [True, False])
def test_empty_batch(conv) -> None:
    inputs = make_inputs((0, 64, 3, 5), 64, conv=conv)
    inputs = {name: None if t is None else t.to(BF16) for name, t in inputs.items()}
    for name, value in gradients(inputs, make_grad(inputs)).items():
        source = inputs[name[1:]]
        dtype = source.dtype if name in ("dx", "dw1", "dw2") else torch.float32
        assert_same({name: value}, {name: torch.zeros(source.shape, dtype=dtype)})
    result = gradients(inputs, make_grad(inputs), parameters=False, drop=False)
    assert all(value.numel() == 0 for value in result.values())


def test_runs_are_bitwise_equal() -> None:
    inputs = problem((2, 64, 7, 3))
    grad = make_grad(inputs)
    first = gradients(inputs, grad, residual=True)
    for _ in range(9):
        assert_same(gradients(inputs, grad, residual=True), first)


@pytest.mark.parametrize("save_hidden", [True, False])
@pytest.mark.parametrize("channels", [64, 96, 128])
def test_order_of_the_threads(channels, save_hidden, other_orders) -> None:
    inputs = problem((2, channels, 7, 7))
    grad = make_grad(inputs)
    options = {"residual": True, "save_hidden": save_hidden}
    first = gradients(inputs, grad, **options)
    for _ in other_orders():
        assert_same(gradients(inputs, grad, **options), first)


def test_nan_stays_in_its_sample() -> None:
    inputs = problem((3, 64, 3, 3), parameters=("norm_weight", "norm_bias"))
    inputs["x"][1, 2, 1, 1] = float("nan")
    dx = gradients(inputs, make_grad(inputs), residual=True, parameters=False, drop=False)["dx"]
    assert dx.isfinite().flatten(1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 32, 3, 3, dtype=BF16)}, "64, 96 or 128 channels"),
        ({"w1": torch.zeros(65, 64, dtype=BF16)}, "multiples of 64, got 64 and 65"),
        ({"w1": torch.zeros(64, 65, dtype=BF16)}, r"w1 must be a tensor \[64, 64\]"),
        ({"w2": torch.zeros(32, 64, dtype=BF16)}, r"w2 must be a tensor \[64, 64\]"),
        ({"w2": torch.zeros(64, 64)}, "bfloat16 or float16"),
        ({"x": torch.zeros(2, 64, 3, 3), "w1": torch.zeros(64, 64)}, "bfloat16 or float16"),
        ({"grad": torch.zeros(2, 64, 3, 2, dtype=BF16)}, "grad must be .* of x's shape and dtype"),
        ({"grad": torch.zeros(2, 64, 3, 3)}, "grad must be .* of x's shape and dtype"),
        ({"mean_rstd": torch.zeros(3, 2)}, r"mean_rstd must be .* of shape \[B, 2\]"),
        ({"hidden": torch.zeros(5, dtype=BF16)}, "hidden must be .* B H W hidden elements"),
        ({"b1": torch.zeros(63)}, "b1 must be .* of 64 elements"),
        (
            {"layer_scale": torch.zeros(64, dtype=torch.float64)},
            "layer_scale must be .* float32, bfloat16 or float16",
        ),
        ({"activation": "tanh"}, "activation must be gelu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(change, message) -> None:
    inputs = problem((2, 64, 3, 3), conv=False)
    arguments = {"grad": make_grad(inputs), "mean_rstd": statistics(inputs["x"]), **inputs}
    arguments |= {"hidden": None, "activation": "gelu", "norm": True, "residual": True}
    with pytest.raises(RuntimeError, match=message):
        backward(**arguments | {"parameter_grads": True, "drop_grad": True} | change)
