"""The Triton MLP's operators as torch.library sees them: every output, fakes, casts and what they write."""

from functools import partial

import pytest
import torch
from contract.check import laid
from support.mlp import PLAIN, VECTORS, WEIGHTS, backward_arguments, forward_arguments, make_grad, make_inputs
from support.mlp_operator import check_hidden_and_mean_rstd, check_hidden_beyond_float16
from support.problems import HALVES
from support.rule import assert_same, run

from poolformer_kernels.backends.triton.mlp import forward as kernels
from poolformer_kernels.ops import mlp

from .guarded import check_writes

pytestmark = pytest.mark.sampled(4)

FORWARD = torch.ops.poolformer_kernels.mlp_triton.default
BACKWARD = torch.ops.poolformer_kernels.mlp_triton_backward.default
KINDS = ((torch.float32, "nchw"), *((dtype, "channels_last") for dtype in HALVES))
# x, hidden: samples that share tiles, several tiles; wide, or so few pixels that a tile has many samples
ONE_OF_EACH = (((3, 64, 7, 9), 128), ((2, 200, 6, 6), 50))
PROBLEMS = (ONE_OF_EACH[0], ((1, 96, 8, 16), 70), ((3, 320, 7, 7), 96), ((67, 5, 1, 3), 9))


def arguments(inputs, *, operand=None, allow_tf32=False, save_hidden=True, **options) -> tuple:
    operand = operand or inputs["w1" if inputs["x"].dtype == torch.float32 else "x"].dtype
    return (*forward_arguments(inputs, save_hidden=save_hidden, **options), operand, allow_tf32)


def forward(inputs, **options) -> tuple:
    return FORWARD(*arguments(inputs, **options))


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), PROBLEMS, ids=str)
def test_hidden_and_mean_rstd(shape, hidden, dtype, layout) -> None:
    check_hidden_and_mean_rstd(forward, shape, hidden, dtype, layout)


@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_hidden_beyond_float16(shape, hidden) -> None:
    check_hidden_beyond_float16(forward, shape, hidden)


def test_tf32_changes_nothing_on_the_cpu() -> None:
    """TF32's own tiles compute the same; the interpreter multiplies in float32."""
    for shape, hidden in ONE_OF_EACH:
        inputs = make_inputs(shape, hidden)
        exact, tf32 = (forward(inputs, allow_tf32=allow) for allow in (False, True))
        for name, a, b in zip(("y", "mean_rstd", "stats", "hidden"), exact, tf32, strict=True):
            if name != "stats":  # partials of other tiles
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        _, mean_rstd, _, saved = exact
        given = backward_arguments(inputs["x"], inputs, mean_rstd, saved)
        gradients = [BACKWARD(*given, torch.float32, allow) for allow in (False, True)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * a.abs().max().item())


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 8, 0, 4)], ids=str)
def test_nothing_to_compute(shape) -> None:
    y, mean_rstd, stats, saved = forward(make_inputs(shape, 12))
    assert y.shape == shape
    assert mean_rstd.shape == (shape[0], 2)
    assert stats.shape[::2] == (shape[0], 3)
    assert saved.shape == (0,)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_weights_are_cast_by_the_kernels(shape, hidden, dtype, norm) -> None:
    """float32 weights as bfloat16 operands: the values of weights that were cast before, bit for bit."""
    parameters = VECTORS if norm else PLAIN
    inputs = make_inputs(shape, hidden, dtype, weight_dtype=torch.float32, parameters=parameters)
    inputs = laid(inputs, "channels_last")
    cast = inputs | {name: inputs[name].bfloat16() for name in WEIGHTS}
    ours, theirs = (forward(each, norm=norm, operand=torch.bfloat16) for each in (inputs, cast))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "hidden"), [((3, 17, 5, 7), 40), ((3, 132, 2, 3), 20)], ids=["fused", "gemm"]
)
def test_autocast_leaves_the_weights_to_the_kernels(shape, hidden) -> None:
    """The same bits as of weights that were cast; but theirs are gradients that are rounded to bfloat16."""
    inputs = laid(make_inputs(shape, hidden), "channels_last")
    grad = make_grad(inputs)
    cast = inputs | {name: inputs[name].bfloat16() for name in WEIGHTS}
    inputs |= {name: cast[name].float() for name in WEIGHTS}  # w2 times layer_scale is rounded only once
    with torch.autocast("cpu", torch.bfloat16):
        found = run(mlp, inputs, grad, residual=True)
    for name in WEIGHTS:
        gradient = found[f"d{name}"]
        assert gradient.dtype == torch.float32
        found[f"d{name}"] = gradient.bfloat16()
        assert not torch.equal(gradient, gradient.bfloat16().float())
    assert_same(found, run(mlp, cast, grad, residual=True))


@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), [((2, 17, 3, 4), 20), ONE_OF_EACH[1]], ids=str)
def test_fakes_of_the_backward(shape, hidden, vectors) -> None:
    """Each gradient has the dtype of what it belongs to."""
    inputs = make_inputs(shape, hidden, vector_dtype=vectors)
    _, mean_rstd, _, saved = forward(inputs, operand=torch.bfloat16)
    for wanted in (True, False):
        given = backward_arguments(inputs["x"], inputs, mean_rstd, saved, wanted=(wanted, wanted))
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(BACKWARD, (*given, torch.bfloat16, False), test_utils=utilities)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_outside_the_outputs_is_written(dtype) -> None:
    more = (((5, 17, 4, 9), 30), ((1, 513, 2, 16), 31), ((3, 33, 1, 1), 7))
    for shape, hidden in (*PROBLEMS[:2], ONE_OF_EACH[1], PROBLEMS[3], *more):
        inputs = laid(make_inputs(shape, hidden, dtype), "channels_last")
        assert check_writes(partial(kernels.forward, *arguments(inputs))) >= 4
