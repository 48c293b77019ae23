"""The Triton MLP's forward: the error rule over dtypes, layouts, shapes, activations and hard values."""

import pytest
import torch
from helpers import (
    HALVES,
    as_layout,
    as_vector_layout,
    assert_same,
    assert_statistics_of,
    bits,
    randn,
    tiled_stats,
)
from mlp_helpers import (
    PLAIN,
    VECTORS,
    WEIGHTS,
    as_weight_layout,
    assert_right,
    eager,
    make_grad,
    make_inputs,
)

from poolformer_kernels import reference
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats

from .mlp_cases import FUSED, KINDS, ONE_OF_EACH, PAIR

pytestmark = [pytest.mark.sampled(4), pytest.mark.usefixtures("no_graph")]

DTYPES = (torch.float32, *HALVES)
ACTIVATIONS = tuple(reference.ACTIVATIONS)


def check(inputs, layout="channels_last", ulps=8, **options) -> torch.Tensor:
    inputs = {**inputs, "x": as_layout(inputs["x"], layout)}
    before = {name: t.clone() for name, t in inputs.items() if t is not None}
    y = mlp(**inputs, **options)
    with torch.enable_grad():
        assert_right({"y": y}, inputs, make_grad(inputs), ulps=ulps, **options)
    assert y.is_contiguous(memory_format=memory_format_of(inputs["x"]))
    assert_same({name: inputs[name] for name in before}, before)  # nothing was written to
    return y


# ---- the error rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), FUSED + PAIR, ids=str)
def test_residual_form(shape, hidden, dtype, layout) -> None:
    check(make_inputs(shape, hidden, dtype), layout, residual=True)


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize(
    ("shape", "hidden", "out"),
    [((2, 17, 5, 8), 20, 17), ((2, 17, 5, 8), 20, 9), ((2, 64, 7, 7), 64, 330), ((1, 320, 2, 5), 33, 320)],
    ids=str,
)
def test_plain_form(shape, hidden, out, dtype, layout) -> None:
    for parameters in (PLAIN, VECTORS):
        check(make_inputs(shape, hidden, dtype, out=out, parameters=parameters), layout)


@pytest.mark.parametrize(
    "given", [(), ("b1",), ("b2", "drop_scale"), ("norm_weight",), ("norm_bias", "layer_scale")], ids=str
)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_missing_vectors(dtype, shape, hidden, given) -> None:
    for norm in (False, True) if not any(name.startswith("norm") for name in given) else (True,):
        check(make_inputs(shape, hidden, dtype, parameters=given), residual=True, norm=norm)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_activations(shape, hidden, dtype, activation) -> None:
    check(make_inputs(shape, hidden, dtype), residual=True, activation=activation)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "vector_dtype"),
    [
        *((half, torch.float32, torch.float32) for half in HALVES),
        *((torch.float32, half, vector) for half in HALVES for vector in (torch.float32, half)),
        *((half, half, torch.float32) for half in HALVES),
    ],
    ids=str,
)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_mixed_dtypes(shape, hidden, dtype, weight_dtype, vector_dtype) -> None:
    dtypes = {"weight_dtype": weight_dtype, "vector_dtype": vector_dtype}
    check(make_inputs(shape, hidden, dtype, **dtypes), residual=True)
    check(make_inputs(shape, hidden, dtype, parameters=PLAIN, **dtypes))


@pytest.mark.parametrize("layout", ["sliced_c", "transposed", "expanded", "offset", "sliced_hw_last"])
def test_layouts_of_x(layout) -> None:
    check(make_inputs((3, 17, 6, 9), 20, torch.bfloat16), layout, residual=True)


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("layout", ["transposed", "strided", "padded", "offset", "expanded"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_layouts_of_weights(name, layout, conv) -> None:
    inputs = make_inputs((2, 17, 6, 7), 20, conv=conv)
    inputs[name] = as_weight_layout(inputs[name], layout)
    check(inputs, residual=True)


@pytest.mark.parametrize("layout", ["strided", "expanded", "offset", "column"])
@pytest.mark.parametrize(("shape", "hidden"), [((2, 17, 6, 7), 20), ((2, 200, 1, 7), 20)], ids=str)
def test_layouts_of_vectors(shape, hidden, layout) -> None:
    inputs = make_inputs(shape, hidden)
    check(inputs | {name: as_vector_layout(inputs[name], layout) for name in VECTORS}, residual=True)


@pytest.mark.parametrize(
    ("dtype", "mean", "sigma"),
    [
        *((torch.float32, m, s) for m, s in ((1e2, 1.0), (-1e4, 1.0), (1e2, 1e-2))),
        *((torch.bfloat16, m, s) for m, s in ((1e2, 1.0), (1e3, 10.0), (-1e4, 1e2))),
        *((torch.float16, m, s) for m, s in ((1e2, 1.0), (-1e4, 1e2))),
    ],
    ids=str,
)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_mean_much_larger_than_sigma(shape, hidden, dtype, mean, sigma) -> None:
    """The mean is a float32, in eager PyTorch too: an ulp of it is allowed."""
    inputs = make_inputs(shape, hidden, dtype, mean=mean, sigma=sigma)
    for residual in (True, False):
        check(inputs, residual=residual, ulps=8 + abs(mean) / sigma)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_channels_with_their_own_means(shape, hidden, dtype) -> None:
    inputs = make_inputs(shape, hidden, dtype)
    inputs["x"][:, ::5] += 1e3 * randn(len(range(0, shape[1], 5)), 1, 1, dtype=dtype, seed=3)
    check(inputs, residual=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_a_sample_that_is_not_finite_stays_alone(shape, hidden, value, dtype) -> None:
    for parameters in (PLAIN, VECTORS):
        inputs = make_inputs(shape, hidden, dtype, parameters=parameters)
        clean = mlp(**inputs)
        inputs["x"][1, 3, 2, 4] = value
        y = mlp(**inputs)
        hurt = torch.zeros(y.shape, dtype=torch.bool)
        hurt[1 if parameters is VECTORS else (1, slice(None), 2, 4)] = True
        assert not y[hurt].isfinite().any()
        assert torch.equal(y[~hurt], clean[~hurt])


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2", "norm_weight", "norm_bias"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_nan_in_a_parameter_is_not_lost(shape, hidden, activation, name) -> None:
    inputs = make_inputs(shape, hidden, torch.bfloat16)
    inputs["drop_scale"] = None
    inputs[name].view(-1)[3] = float("nan")
    y = mlp(**inputs, activation=activation)
    assert torch.equal(y.isnan(), eager(**inputs, activation=activation).isnan())
    assert y.isnan().any()


# ---- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_given_statistics(shape, hidden, dtype, tiles) -> None:
    inputs = make_inputs(shape, hidden, dtype, mean=40.0)
    stats = tiled_stats(inputs["x"], tiles)
    y = mlp_with_stats(**inputs, residual=True, stats=stats)[0]
    with torch.enable_grad():
        assert_right({"y": y}, inputs, make_grad(inputs), residual=True, ulps=88)
    other = mlp_with_stats(
        **inputs, residual=True, stats=stats.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    )
    assert torch.equal(bits(y), bits(other[0]))


@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_given_statistics_are_used(shape, hidden) -> None:
    inputs = make_inputs(shape, hidden)
    quarter = reference.sample_stats(inputs["x"]) * torch.tensor([1.0, 1.0, 0.25])
    doubled = mlp(**{**inputs, "norm_weight": 2 * inputs["norm_weight"]}, eps=0.0)
    y, stats = mlp_with_stats(**inputs, eps=0.0, stats=quarter, return_stats=False)
    assert stats is None
    torch.testing.assert_close(y, doubled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "hidden", "dtype", "layout"),
    [
        (*problem, *kind)
        for i, problem in enumerate(
            (*FUSED[:2], FUSED[4], *PAIR[:4], ((5, 16, 8, 8), 20), ((2, 8, 1, 130), 16), ((9, 8, 4, 8), 16))
        )
        for kind in (KINDS[0], KINDS[1 + i % 2])
    ],
    ids=str,
)
def test_statistics_of_the_rounded_y(shape, hidden, dtype, layout) -> None:
    for mean, residual in ((-2.3, False), (1e3, True)):
        inputs = make_inputs(shape, hidden, dtype, mean=mean)
        inputs["drop_scale"] = None
        inputs["x"] = as_layout(inputs["x"], layout)
        y, stats = mlp_with_stats(**inputs, residual=residual)
        assert_statistics_of(stats, y)
