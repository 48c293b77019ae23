"""The MLP's backward kernels, called without the forward: the error rule for every gradient."""

import pytest
import torch
from helpers import as_layout, assert_close_to_fp64, assert_same, randn, run
from mlp_helpers import (
    NAMES,
    PLAIN,
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
from poolformer_kernels.backends.triton.mlp import backward, backward_gemm, backward_shared, config
from poolformer_kernels.layout import memory_format_of

pytestmark = pytest.mark.sampled(4)

KINDS = ((torch.float32, "nchw"), (torch.bfloat16, "channels_last"), (torch.float16, "nchw"))
FUSED, GEMM = ((3, 17, 5, 7), 40), ((3, 132, 2, 3), 20)  # (shape of x, hidden) of either form
TWO_BLOCKS = (GEMM[0], 70)  # of hidden channels
SHAPES = (FUSED, TWO_BLOCKS, ((2, 96, 7, 5), 70), ((2, 2, 1, 1), 5), ((4, 1, 13, 2), 33))


def statistics(x, eps: float = 1e-5):
    var, mean = torch.var_mean(x.double(), (1, 2, 3), correction=0)
    return torch.stack([mean, (var + eps).rsqrt()], 1).float()


def normed(inputs, norm) -> bool:
    given = inputs["norm_weight"] is not None or inputs["norm_bias"] is not None
    return given if norm is None else norm


def fc1(inputs, norm):
    """fc1's output as the forward saves it."""
    x = inputs["x"]
    n = x.double()
    if normed(inputs, norm):
        ones = torch.ones(x.shape[1])
        gamma, beta = inputs["norm_weight"], inputs["norm_bias"]
        gamma, beta = ones if gamma is None else gamma, 0 * ones if beta is None else beta
        n = torch.group_norm(n.contiguous(), 1, gamma.double(), beta.double(), 1e-5)
    bias = 0.0 if inputs["b1"] is None else inputs["b1"].double()
    h = n.flatten(2).transpose(1, 2) @ inputs["w1"].flatten(1).double().T + bias
    return h.flatten().to(inputs["w1"].dtype if x.dtype == torch.float32 else x.dtype)


def gradients(
    inputs, grad, *, activation="gelu", norm=None, residual=False, save_hidden=False, parameters=True,
    drop=True,
):  # fmt: skip
    x, *given = (inputs[name] for name in NAMES)
    norm = normed(inputs, norm)
    mean_rstd = statistics(x) if norm else torch.empty(0)
    saved = fc1(inputs, norm) if save_hidden else None
    result = backward.backward(
        grad, x, mean_rstd, *given, saved, activation, norm, residual, parameters, drop
    )
    return {f"d{name}": t for name, t in zip(NAMES, result, strict=True)}


def check(inputs, grad=None, *, save_hidden=False, ulps=4, **options):
    grad = make_grad(inputs) if grad is None else grad
    before = {name: t.clone() for name, t in inputs.items() if t is not None} | {"grad": grad.clone()}
    actual = gradients(inputs, grad, save_hidden=save_hidden, **options)
    assert_same({n: grad if n == "grad" else inputs[n] for n in before}, before)  # nothing was written to
    plain = {name: None if t is None else t.detach().contiguous().clone() for name, t in inputs.items()}
    theirs = run(eager, plain, grad.contiguous(), **options)
    right = truth(inputs, grad, **options)
    x = inputs["x"]
    operands = inputs["w1"].dtype if x.dtype == torch.float32 else x.dtype
    assert actual["dx"].is_contiguous(memory_format=memory_format_of(x))
    for name, value in actual.items():
        source = inputs[name[1:]]
        if source is None:
            continue
        tensor = name in ("dx", "dw1", "dw2")
        assert value.dtype == (source.dtype if tensor else torch.float32)
        value = value.to(source.dtype)
        exact, scale = right.values[name], right.scales[name]
        floor = ulps_of(value.dtype, operands, ulps)
        assert_close_to_fp64(value, theirs[name], exact, scale=scale, ulps=floor, what=name)


@pytest.mark.parametrize(("dtype", "layout"), KINDS)
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
def test_error_rule(shape, hidden, dtype, layout) -> None:
    inputs = make_inputs(shape, hidden, dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, residual=True)


@pytest.mark.parametrize("activation", [name for name in reference.ACTIVATIONS if name != "gelu"])
@pytest.mark.parametrize(
    ("form", "dtype"), [(FUSED, torch.float32), (GEMM, torch.bfloat16)], ids=["fused", "gemm"]
)
def test_activations(form, dtype, activation) -> None:
    check(make_inputs(*form, dtype), activation=activation, residual=True)


@pytest.mark.parametrize("without", ["drop_scale", "layer_scale", "b1", "b2", "norm_weight", "norm_bias"])
def test_without_one_parameter(without) -> None:
    given = tuple(name for name in VECTORS if name != without)
    check(make_inputs(*FUSED, torch.bfloat16, parameters=given), residual=True)


@pytest.mark.parametrize(("dtype", "layout"), KINDS[:2])
@pytest.mark.parametrize("channels", [17, 132])
@pytest.mark.parametrize("parameters", [(), VECTORS], ids=len)
def test_plain_form_with_another_width(parameters, channels, dtype, layout) -> None:
    inputs = make_inputs((2, channels, 2, 5), 40, dtype, out=21, parameters=parameters, conv=False)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs)


@pytest.mark.parametrize("norm", [True, False])
def test_norm_without_parameters(norm) -> None:
    check(make_inputs(*FUSED, parameters=()), norm=norm, residual=True)
    check(make_inputs(*GEMM, parameters=()), norm=norm, residual=True)


@pytest.mark.parametrize(("dtype", "layout"), KINDS[:2])
@pytest.mark.parametrize(("shape", "hidden"), [FUSED, TWO_BLOCKS], ids=["fused", "gemm"])
def test_saved_hidden(shape, hidden, dtype, layout) -> None:
    inputs = make_inputs(shape, hidden, dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, residual=True, save_hidden=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), [FUSED, GEMM], ids=["fused", "gemm"])
def test_mean_of_100_deviations(shape, hidden, dtype) -> None:
    # half an ulp of the mean is 50 of a deviation's
    check(make_inputs(shape, hidden, dtype, mean=50.0, sigma=0.5), residual=True, ulps=54)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("shape", "hidden"), [FUSED, GEMM], ids=["fused", "gemm"])
def test_other_weights(shape, hidden, dtype, weight_dtype) -> None:
    inputs = make_inputs(shape, hidden, dtype, weight_dtype=weight_dtype, vector_dtype=torch.float32)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    check(inputs, residual=True)


@pytest.mark.parametrize(("shape", "hidden"), [FUSED, GEMM], ids=["fused", "gemm"])
def test_small_layer_scale_in_fp16(shape, hidden) -> None:
    inputs = make_inputs(shape, hidden, torch.float16, vector_dtype=torch.float32)
    inputs["layer_scale"] *= 1e-6  # times a weight it is below fp16's smallest number
    check(inputs, 1e4 * make_grad(inputs))  # as a loss scaler hands it over


@pytest.mark.parametrize(
    ("shape", "hidden", "layout"),
    [
        *((*FUSED, layout) for layout in ("transposed", "sliced_c_last", "expanded_all")),
        (*GEMM, "transposed"),
    ],
)
def test_strides_of_the_gradient(shape, hidden, layout) -> None:
    inputs = make_inputs(shape, hidden, torch.bfloat16)
    grad = as_layout(make_grad(inputs), layout)
    assert_same(gradients(inputs, grad), gradients(inputs, grad.contiguous()))


@pytest.mark.parametrize("layout", ["transposed", "padded", "expanded"])
def test_strides_of_the_weights(layout) -> None:
    inputs = make_inputs(*FUSED)
    strided = inputs | {name: as_weight_layout(inputs[name], layout) for name in WEIGHTS}
    dense = inputs | {name: strided[name].contiguous() for name in WEIGHTS}
    grad = make_grad(inputs)
    assert_same(gradients(strided, grad), gradients(dense, grad))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("shape", "hidden"), [FUSED, GEMM], ids=["fused", "gemm"])
def test_only_what_is_asked_for(shape, hidden, norm) -> None:
    inputs = make_inputs(shape, hidden, torch.bfloat16, parameters=VECTORS if norm else PLAIN)
    grad = make_grad(inputs)
    everything = gradients(inputs, grad)
    for parameters, drop in ((True, False), (False, True), (False, False)):
        some = gradients(inputs, grad, parameters=parameters, drop=drop)
        for name, value in some.items():
            wanted = name == "dx" or (drop if name == "ddrop_scale" else parameters)
            expected = everything[name] if wanted else everything[name].new_empty(0)
            assert_same({name: value}, {name: expected})


@pytest.mark.parametrize(("shape", "hidden"), [FUSED, GEMM], ids=["fused", "gemm"])
def test_empty_batch(shape, hidden) -> None:
    inputs = make_inputs((0, *shape[1:]), hidden, torch.bfloat16)
    result = gradients(inputs, make_grad(inputs))
    for name, value in result.items():
        source = inputs[name[1:]]
        dtype = source.dtype if name in ("dx", "dw1", "dw2") else torch.float32
        assert_same({name: value}, {name: torch.zeros(source.shape, dtype=dtype)})
    result = gradients(inputs, make_grad(inputs), parameters=False, drop=False)
    assert all(value.numel() == 0 for value in result.values())


@pytest.mark.parametrize(("shape", "hidden"), [FUSED, GEMM], ids=["fused", "gemm"])
def test_runs_are_bitwise_equal(shape, hidden) -> None:
    """The interpreter has one order: what could differ is memory that was not written."""
    inputs = make_inputs((2, shape[1], 2, 3), hidden, torch.bfloat16)
    grad = make_grad(inputs)
    first = gradients(inputs, grad, residual=True)
    for _ in range(2):
        assert_same(gradients(inputs, grad, residual=True), first)


@pytest.mark.parametrize(("save_hidden", "layout"), [(False, "channels_last"), (True, "nchw")])
def test_chunks_of_samples(save_hidden, layout, monkeypatch) -> None:
    inputs = make_inputs((19, 132, 2, 3), 20, torch.bfloat16)
    inputs["x"] = as_layout(inputs["x"], layout)
    monkeypatch.setattr(backward_gemm, "WORKSPACE", 8 * 6 * 20)  # 8 samples, then 8, then 3
    check(inputs, residual=True, save_hidden=save_hidden)


def test_several_splits_of_the_tokens(monkeypatch) -> None:
    backward_launch = backward.backward_launch
    monkeypatch.setattr(
        backward, "backward_launch", lambda *args: backward_launch(*args)._replace(programs=12)
    )
    for dtype in (torch.float32, torch.bfloat16):
        check(make_inputs((2, 17, 11, 13), 40, dtype), residual=True)
    for save_hidden in (False, True):  # float32: two splits of three tiles of 64 tokens
        check(make_inputs((2, 132, 8, 9), 20), residual=True, save_hidden=save_hidden)


@pytest.mark.parametrize("rows", [1, 256, 257, 70000])
def test_sums_of_partials(rows) -> None:
    partial = randn(rows, 3, mean=1.0)
    assert_close_to_fp64(backward_shared.sum_rows(partial), None, partial.double().sum(0), ulps=2)


def test_power_of_2_parts_cover() -> None:
    for size in range(1, 520):
        first, second = config.power_of_2_parts(size)
        assert first + second >= size
        assert first >= 16
        assert second == 0 or (16 <= second <= first < size)
        assert all(p & (p - 1) == 0 for p in (first, second))


def test_chunks_bound_the_workspace() -> None:
    samples = backward_gemm._samples_per_chunk
    assert samples(256, 14 * 14, 1280) % 8 == 0
    assert samples(256, 14 * 14, 1280) * 14 * 14 * 1280 <= config.WORKSPACE
    assert samples(3, 14 * 14, 1280) == 3
    assert samples(5, 2**20, 1280) == 1
