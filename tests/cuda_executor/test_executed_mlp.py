"""The CUDA C++ MLP's forward, both its kernels, in the executor: its operator, tiles and limits."""

import re
from pathlib import Path

import pytest
import torch
from contract import executor
from contract.check import laid
from support import mlp_operator
from support.mlp import assert_right, forward_arguments, make_grad, make_inputs
from support.problems import HALVES, tiled_stats
from support.rule import assert_same, bits

import poolformer_kernels as pk
from poolformer_kernels.backends.cuda import STATS_ROWS
from poolformer_kernels.ops import mlp

pytestmark = pytest.mark.sampled(3)

FORWARD = torch.ops.poolformer_kernels.mlp_cuda.default
SHAPES = (  # x, hidden: samples that share tiles, several tiles, one token
    ((3, 64, 9, 13), 128),
    ((2, 96, 8, 16), 64),
    ((2, 128, 6, 11), 192),
    ((1, 192, 5, 13), 64),
    ((5, 96, 1, 3), 64),
)
ONE = SHAPES[0]


@pytest.fixture(autouse=True, params=[80, 90], ids=["sm_80", "sm_90"])
def architecture(request):
    executor.library().executor_architecture(request.param)
    yield request.param
    executor.library().executor_architecture(90)


def forward(inputs, **options) -> tuple:
    return FORWARD(*forward_arguments(inputs, **options))


# ---- what it returns beside y ------------------------------------------------------------------------------


def test_many_partials_are_merged_as_the_mixer_does() -> None:
    """A sample's partials are merged once beforehand: the same bits, and as exact as few."""
    inputs = make_inputs(*ONE, torch.bfloat16, mean=40.0)
    mixer = torch.ops.poolformer_kernels.pool_mixer_cuda.default
    for tiles in (128, 129, 300):
        stats = tiled_stats(inputs["x"], tiles)
        mean_rstd = forward(inputs, stats=stats)[1]
        of_mixer = mixer(inputs["x"], None, None, None, None, stats, 3, 1e-5, True, False)[1]
        assert torch.equal(bits(mean_rstd), bits(of_mixer))
        mlp_operator.assert_mean_rstd(mean_rstd, mlp_operator.mean_rstd_of(stats))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
def test_hidden_and_mean_rstd(shape, hidden, dtype) -> None:
    mlp_operator.check_hidden_and_mean_rstd(forward, shape, hidden, dtype, "channels_last")


def test_hidden_beyond_float16() -> None:
    mlp_operator.check_hidden_beyond_float16(forward, *ONE)


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
def test_tiles_after_tiles(shape, hidden, groups, dtype) -> None:
    """Several rounds of a persistent block on Hopper (the executor has two multiprocessors)."""
    inputs = laid(make_inputs(shape, hidden, dtype), "channels_last")
    before = {name: t.clone() for name, t in inputs.items()}
    y = mlp(**inputs, residual=True)
    assert executor.library().executor_threads() == 128 * (groups + 1)
    assert_right({"y": y}, inputs, make_grad(inputs), ulps=8, residual=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same(inputs, before)  # nothing was written to
    first = forward(inputs)
    for _ in executor.orders():
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, forward(inputs), strict=True))


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
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}: no CUDA device$"):
        mlp(**make_inputs(shape, hidden, dtype))


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
            forward(bad)


def test_units_of_statistics() -> None:
    text = (Path(__file__).parents[2] / "csrc" / "cuda" / "mlp" / "forward_tile.cuh").read_text()
    assert int(re.search(r"kUnit = (\d+);", text)[1]) == STATS_ROWS
