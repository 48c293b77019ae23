"""The Triton MLP's operators as torch.library sees them: every output, fakes, casts and what they write."""

import pytest
import torch
from support.layouts import as_layout
from support.mlp import PLAIN, VECTORS, make_inputs
from support.rule import assert_close_to_fp64

from poolformer_kernels import reference
from poolformer_kernels.backends.triton.mlp import forward as kernels
from poolformer_kernels.ops import mlp

from .mlp_cases import FUSED, KINDS, ONE_OF_EACH, PAIR

pytestmark = [pytest.mark.sampled(4), pytest.mark.usefixtures("no_graph")]

FORMATS = ("nchw", "channels_last")
FORWARD = torch.ops.poolformer_kernels.mlp_triton.default
BACKWARD = torch.ops.poolformer_kernels.mlp_triton_backward.default
ORDER = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias", "layer_scale", "drop_scale")


def arguments(
    inputs, *, activation="gelu", norm=True, residual=True, return_stats=True, save_hidden=True, operand=None,
    allow_tf32=False,
) -> tuple:  # fmt: skip
    given = [inputs[name] for name in ORDER]
    if operand is None:
        operand = given[1].dtype if given[0].dtype == torch.float32 else given[0].dtype
    return (*given, None, activation, 1e-5, norm, residual, return_stats, save_hidden, operand, allow_tf32)


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), [*FUSED[:2], PAIR[0], PAIR[3]], ids=str)
def test_hidden_and_mean_rstd(shape, hidden, dtype, layout) -> None:
    inputs = make_inputs(shape, hidden, dtype)
    x = as_layout(inputs["x"], layout)
    _, mean_rstd, _, saved = FORWARD(*arguments({**inputs, "x": x}))
    d = {name: None if t is None else t.double() for name, t in inputs.items()}
    mean, var = reference.merge_stats(reference.sample_stats(d["x"]))
    torch.testing.assert_close(mean_rstd[:, 0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean_rstd[:, 1].double(), (var + 1e-5).rsqrt(), rtol=2e-6, atol=0)

    assert saved.dtype == dtype
    n = (
        torch.group_norm(d["x"], 1, d["norm_weight"], d["norm_bias"])
        .permute(0, 2, 3, 1)
        .reshape(-1, shape[1])
    )
    exact = n @ d["w1"].flatten(1).T + d["b1"]
    theirs = n.to(dtype) @ inputs["w1"].flatten(1).T + inputs["b1"]
    assert_close_to_fp64(saved.view(exact.shape), theirs, exact, ulps=8)


@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_hidden_beyond_float16(shape, hidden) -> None:
    inputs = make_inputs(shape, hidden, torch.float16, parameters=PLAIN)
    inputs["x"] = torch.full_like(inputs["x"], 6e4)
    inputs["w1"] = torch.full_like(inputs["w1"], 2.0)
    inputs["w1"][::2] *= -1
    for activation, most in (("gelu", 65504), ("relu_squared", float("inf"))):  # the latter's slope is 2 h
        options = {"norm": False, "residual": False, "return_stats": False, "activation": activation}
        rows = FORWARD(*arguments(inputs, **options))[3].view(-1, hidden)
        assert (rows[:, 1::2] == most).all()
        assert (rows[:, ::2] == -65504).all()


def test_tf32_changes_nothing_on_the_cpu() -> None:
    """TF32's own tiles compute the same; the interpreter multiplies in float32."""
    for shape, hidden in ONE_OF_EACH:
        inputs = make_inputs(shape, hidden)
        exact, tf32 = (FORWARD(*arguments(inputs, allow_tf32=allow)) for allow in (False, True))
        for name, a, b in zip(("y", "mean_rstd", "stats", "hidden"), exact, tf32, strict=True):
            if name != "stats":  # partials of other tiles
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        given = (inputs[name] for name in ORDER)
        x, *parameters = given
        saved = exact[3]
        gradients = [
            BACKWARD(x, x, exact[1], *parameters, saved, "gelu", True, True, True, True, torch.float32, allow)
            for allow in (False, True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * a.abs().max().item())


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 8, 0, 4)], ids=str)
def test_nothing_to_compute(shape) -> None:
    y, mean_rstd, stats, saved = FORWARD(*arguments(make_inputs(shape, 12)))
    assert y.shape == shape
    assert mean_rstd.shape == (shape[0], 2)
    assert stats.shape[::2] == (shape[0], 3)
    assert saved.shape == (0,)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_weights_are_cast_by_the_kernels(shape, hidden, dtype, norm) -> None:
    """float32 weights as bfloat16 operands: the values of weights that were cast before, bit for bit."""
    inputs = make_inputs(
        shape, hidden, dtype, weight_dtype=torch.float32, parameters=VECTORS if norm else PLAIN
    )
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    cast = {**inputs, **{name: inputs[name].bfloat16() for name in ("w1", "w2")}}
    options = {"norm": norm, "operand": torch.bfloat16}
    ours, theirs = (FORWARD(*arguments(each, **options)) for each in (inputs, cast))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), [((2, 17, 3, 4), 20), PAIR[1]], ids=str)
def test_fakes_of_the_backward(shape, hidden, vectors) -> None:
    """Each gradient has the dtype of what it belongs to."""
    inputs = make_inputs(shape, hidden, vector_dtype=vectors)
    x, *parameters = (inputs[name] for name in ORDER)
    _, mean_rstd, _, saved = FORWARD(*arguments(inputs, operand=torch.bfloat16))
    given = (x, x, mean_rstd, *parameters, saved, "gelu", True, True)
    for wanted in (True, False):
        options = (wanted, wanted, torch.bfloat16, False)
        torch.library.opcheck(BACKWARD, (*given, *options), test_utils=("test_schema", "test_faketensor"))


def test_autocast_leaves_the_weights_to_the_kernels() -> None:
    """The same values as of weights that were cast; their gradients are not rounded to bfloat16."""
    inputs = make_inputs((2, 17, 3, 4), 20)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        y = mlp(**leaves, residual=True)
        y.sum().backward()
    cast = {name: t.detach() for name, t in inputs.items()}
    cast |= {name: cast[name].bfloat16() for name in ("w1", "w2")}
    torch.testing.assert_close(y.detach(), mlp(**cast, residual=True), rtol=0, atol=0)
    for name in ("w1", "w2"):
        grad = leaves[name].grad
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.bfloat16().float())


def test_nothing_outside_the_outputs_is_written(monkeypatch) -> None:
    guard, blocks = 4096, []
    empty = torch.empty

    def guarded(size, *, dtype=None, device=None, memory_format=torch.contiguous_format):
        numel = torch.Size(size).numel()
        block = empty(numel + 2 * guard, dtype=dtype, device=device).fill_(123.0)
        blocks.append((block, numel))
        inner = block[guard : guard + numel]
        if memory_format is torch.channels_last:
            b, c, h, w = size
            return inner.view(b, h, w, c).permute(0, 3, 1, 2)
        return inner.view(size)

    for dtype in (torch.float32, torch.bfloat16):
        for shape, hidden in (*FUSED[:2], FUSED[4], *PAIR[1:]):
            inputs = make_inputs(shape, hidden, dtype)
            inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
            monkeypatch.setattr(torch, "empty", guarded)
            kernels.forward(*arguments(inputs))
            monkeypatch.undo()
    for block, numel in blocks:
        assert (block[:guard] == 123).all()
        assert (block[guard + numel :] == 123).all()
        assert not (block[guard : guard + numel] == 123).any()  # and every output is written
