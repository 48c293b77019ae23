"""The CUDA C++ MLP's forward, both its kernels, in the executor: its operator, tiles and limits."""

import re
from pathlib import Path

import pytest
import torch
from support.layouts import as_layout
from support.mlp import PLAIN, assert_right, make_grad, make_inputs
from support.problems import HALVES, tiled_stats
from support.rule import assert_close_to_fp64, assert_same, bits

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.backends.cuda import STATS_ROWS
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import mlp

pytestmark = pytest.mark.sampled(3)

FORWARD = torch.ops.poolformer_kernels.mlp_cuda.default
ORDER = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias", "layer_scale", "drop_scale")
SHAPES = (  # x, hidden: samples that share tiles, several tiles, one token
    ((3, 64, 9, 13), 128),
    ((1, 64, 1, 1), 64),
    ((2, 96, 8, 16), 64),
    ((2, 128, 6, 11), 192),
    ((1, 192, 5, 13), 64),
    ((5, 96, 1, 3), 64),
)
ONE = SHAPES[0]


@pytest.fixture(autouse=True, params=[80, 90], ids=["sm_80", "sm_90"])
def architecture(request, executor_library):
    executor_library.executor_architecture(request.param)
    yield request.param
    executor_library.executor_architecture(90)


@pytest.fixture(autouse=True)
def no_graph():
    with torch.no_grad():
        yield


def check(inputs, layout="channels_last", ulps=8, **options) -> torch.Tensor:
    inputs = {**inputs, "x": as_layout(inputs["x"], layout)}
    before = {name: t.clone() for name, t in inputs.items() if t is not None}
    y = mlp(**inputs, **options)
    with torch.enable_grad():
        assert_right({"y": y}, inputs, make_grad(inputs), ulps=ulps, **options)
    assert y.is_contiguous(memory_format=memory_format_of(inputs["x"]))
    assert_same({name: inputs[name] for name in before}, before)  # nothing was written to
    return y


# ---- statistics --------------------------------------------------------------------------------------------


def test_many_partials_are_merged_as_the_mixer_does() -> None:
    """A sample's partials are merged once beforehand: the same bits, and as exact as few."""
    inputs = make_inputs(*ONE, torch.bfloat16, mean=40.0)
    mixer = torch.ops.poolformer_kernels.pool_mixer_cuda.default
    for tiles in (128, 129, 300):
        call = list(arguments(inputs, save_hidden=False))
        call[len(ORDER)] = stats = tiled_stats(inputs["x"], tiles)
        mean_rstd = FORWARD(*call)[1]
        of_mixer = mixer(inputs["x"], None, None, None, None, stats, 3, 1e-5, True, False)[1]
        assert torch.equal(bits(mean_rstd), bits(of_mixer))
        mean, var = reference.merge_stats(stats.double())
        torch.testing.assert_close(mean_rstd[:, 0].double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(mean_rstd[:, 1].double(), (var + 1e-5).rsqrt(), rtol=2e-6, atol=0)


# ---- the op ------------------------------------------------------------------------------------------------


def arguments(
    inputs, *, activation="gelu", norm=True, residual=True, return_stats=True, save_hidden=True
) -> tuple:
    given = (inputs[name] for name in ORDER)
    return (*given, None, activation, 1e-5, norm, residual, return_stats, save_hidden)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), [ONE, *SHAPES[2:]], ids=str)
def test_hidden_and_mean_rstd(shape, hidden, dtype) -> None:
    inputs = make_inputs(shape, hidden, dtype)
    _, mean_rstd, _, saved = FORWARD(*arguments({**inputs, "x": as_layout(inputs["x"], "channels_last")}))
    d = {name: None if t is None else t.double() for name, t in inputs.items()}
    mean, var = reference.merge_stats(reference.sample_stats(d["x"]))
    torch.testing.assert_close(mean_rstd[:, 0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean_rstd[:, 1].double(), (var + 1e-5).rsqrt(), rtol=2e-6, atol=0)
    assert saved.dtype == dtype
    n = torch.group_norm(d["x"], 1, d["norm_weight"], d["norm_bias"]).permute(0, 2, 3, 1)
    n = n.reshape(-1, shape[1])
    exact = n @ d["w1"].flatten(1).T + d["b1"]
    theirs = n.to(dtype) @ inputs["w1"].flatten(1).T + inputs["b1"]
    assert_close_to_fp64(saved.view(exact.shape), theirs, exact, ulps=8)


def test_hidden_beyond_float16() -> None:
    inputs = make_inputs(*ONE, torch.float16, parameters=PLAIN)
    inputs["x"] = torch.full_like(inputs["x"], 6e4)
    inputs["w1"] = torch.full_like(inputs["w1"], 2.0)
    inputs["w1"][::2] *= -1
    for activation, most in (("gelu", 65504), ("relu_squared", float("inf"))):  # the latter's slope is 2 h
        options = {"norm": False, "residual": False, "return_stats": False, "activation": activation}
        rows = FORWARD(*arguments(inputs, **options))[3].view(-1, ONE[1])
        assert (rows[:, 1::2] == most).all()
        assert (rows[:, ::2] == -65504).all()


@pytest.mark.parametrize("architecture", [90], indirect=True)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("shape", "hidden", "groups"),  # weights that stay, and that go round; the last round lacks a tile
    [
        ((3, 64, 13, 17), 256, 3),
        ((1, 64, 9, 21), 320, 3),
        ((2, 96, 16, 14), 192, 3),
        ((3, 128, 13, 17), 384, 2),
        ((1, 192, 7, 50), 320, 2),
    ],
    ids=str,
)
def test_tiles_after_tiles(shape, hidden, groups, dtype, executor_library, other_orders) -> None:
    """Several rounds of a persistent block on Hopper (the executor has two multiprocessors)."""
    inputs = make_inputs(shape, hidden, dtype)
    check(inputs, residual=True)
    assert executor_library.executor_threads() == 128 * (groups + 1)
    call = arguments(inputs, save_hidden=False)
    first = FORWARD(*call)
    for _ in other_orders():
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, FORWARD(*call), strict=True))


# ---- what the kernels do not cover -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "hidden", "dtype", "why"),
    [
        ((1, 320, 2, 2), 64, torch.bfloat16, "320 to 320 channels, not 64, 96, 128, 192 to as many"),
        ((1, 64, 2, 2), 100, torch.bfloat16, "100 hidden channels, not a multiple of 64 up to 4096"),
        ((1, 64, 2, 2), 64, torch.float32, "products of float32"),
    ],
    ids=str,
)
def test_other_calls_stay_with_triton_or_raise(shape, hidden, dtype, why, monkeypatch) -> None:
    monkeypatch.setattr(pk.backends.triton, "UNAVAILABLE", "no CUDA device")
    message = f"backend 'cuda' was asked for and has no kernel for this call: {why}; triton"
    with pytest.raises(RuntimeError) as error:
        mlp(**make_inputs(shape, hidden, dtype))
    assert str(error.value) == f"{message}: no CUDA device"


def test_the_op_names_what_it_does_not_take() -> None:
    good = make_inputs((1, 64, 2, 2), 64, torch.bfloat16)
    for bad, message in (
        (make_inputs((1, 32, 2, 2), 64, torch.bfloat16), "64, 96, 128 or 192 channels, got 32"),
        (make_inputs((1, 64, 2, 2), 96, torch.bfloat16), "w1 must be .* multiple of 64 up to 4096, got 96"),
        ({**good, "w1": good["w1"].sum()}, r"w1 must be a tensor \[hidden, 64\]"),
        ({**good, "w2": good["w2"][1:]}, r"w2 must be a tensor \[64, 64\]"),
        (make_inputs((1, 64, 2, 2), 64), "must be halves, got float32"),
        ({**good, "w2": good["w2"].float()}, "w2 must be of w1's dtype"),
        ({**good, "b1": good["b1"][1:]}, "b1 must be a tensor of 64 elements on x's device"),
        ({**good, "b1": good["b1"].double()}, "b1 must be .* float32, bfloat16 or float16"),
        ({**good, "x": good["x"][0]}, "x must be a CUDA tensor of 4 dimensions"),
        ({**good, "x": good["x"].double()}, "x must be .* float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            FORWARD(*arguments(bad))


def test_units_of_statistics() -> None:
    text = (Path(__file__).parents[2] / "csrc" / "cuda" / "mlp" / "forward_tile.cuh").read_text()
    assert int(re.search(r"kUnit = (\d+);", text)[1]) == STATS_ROWS
