"""`torch.vmap` of the operators: each member's own result for all in_dims, and no warning."""

import warnings

import pytest
import torch
from support.problems import randn
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels.ops import mlp, pool_mixer
from poolformer_kernels.ops.chain import Chain
from poolformer_kernels.ops.mlp import mlp_with_stats
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats
from poolformer_kernels.reference import sample_stats

MEMBERS, BATCH, C, HIDDEN, HEIGHT, WIDTH = 3, 2, 8, 12, 5, 6
SHAPES = {
    "x": (BATCH, C, HEIGHT, WIDTH),
    "w1": (HIDDEN, C),
    "b1": (HIDDEN,),
    "w2": (C, HIDDEN),
    "b2": (C,),
    "norm_weight": (C,),
    "norm_bias": (C,),
    "weight": (C,),
    "bias": (C,),
    "layer_scale": (C,),
    "drop_scale": (BATCH,),
}
ARGUMENTS = {
    pool_mixer: ("x", "weight", "bias", "layer_scale", "drop_scale"),
    mlp: ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias", "layer_scale", "drop_scale"),
}
OPERATORS = pytest.mark.parametrize("operator", [pool_mixer, mlp], ids=lambda f: f.__name__)


@pytest.fixture(autouse=True)
def no_warnings(capfd):
    """Neither Python's nor those of PyTorch's C++ code, which it prints."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert capfd.readouterr().err == ""


def problem(operator, *leading: int) -> dict[str, Tensor]:
    """The operator's tensors, each with these dimensions in front."""
    names = ARGUMENTS[operator]
    return {name: randn(*leading, *SHAPES[name], seed=seed) for seed, name in enumerate(names)}


def call(operator, names: tuple[str, ...]):
    return lambda *tensors: operator(**dict(zip(names, tensors, strict=True)), residual=True)


def assert_each_member(operator, in_dims: dict[str, int]) -> None:
    """vmap over these arguments, the others being shared, equals one call for each member."""
    tensors, names = problem(operator, MEMBERS), ARGUMENTS[operator]
    f, dims = call(operator, names), tuple(in_dims.get(name) for name in names)
    given = [
        t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(tensors.values(), dims, strict=True)
    ]
    wanted = [
        f(*(t[0 if dim is None else i] for t, dim in zip(tensors.values(), dims, strict=True)))
        for i in range(MEMBERS)
    ]
    if not (operator is pool_mixer and [*in_dims] == ["bias"]):  # pool minus identity cancels it
        assert not torch.equal(wanted[0], wanted[1])
    assert torch.equal(torch.vmap(f, dims)(*given), torch.stack(wanted))


@OPERATORS
@pytest.mark.parametrize("dim", [0, 1, 2, 3, 4, -1, -3])
def test_over_x(operator, dim, kernels) -> None:
    assert_each_member(operator, {"x": dim})


@OPERATORS
@pytest.mark.parametrize("with_x", [False, True])
def test_over_each_parameter(operator, with_x, kernels) -> None:
    for name in ARGUMENTS[operator][1:]:
        for dim in (0, 1):
            assert_each_member(operator, {"x": 2, name: dim} if with_x else {name: dim})


@OPERATORS
def test_over_everything(operator, kernels) -> None:
    assert_each_member(operator, dict.fromkeys(ARGUMENTS[operator], 0))


@OPERATORS
def test_nested_and_its_gradients(operator, kernels) -> None:
    """The inner one over x, the outer over the parameters, too: two models on three batches."""
    names = ARGUMENTS[operator]
    tensors = {name: t.requires_grad_() for name, t in problem(operator, 2).items()}
    tensors["x"] = randn(2, MEMBERS, *SHAPES["x"]).requires_grad_()
    f = call(operator, names)
    inner = torch.vmap(f, (0, *[None] * (len(names) - 1)))
    y = torch.vmap(inner)(*tensors.values())
    wanted = torch.stack(
        [
            torch.stack(
                [f(x, *(t[i] for name, t in tensors.items() if name != "x")) for x in tensors["x"][i]]
            )
            for i in range(2)
        ]
    )
    assert torch.equal(y, wanted)
    given, right = (
        torch.autograd.grad(out.square().sum(), [*tensors.values()], retain_graph=True) for out in (y, wanted)
    )
    for name, ours, exact in zip(names, given, right, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5, msg=name)


@OPERATORS
def test_many_gradients_at_once(operator, kernels) -> None:
    """`is_grads_batched` maps the backward alone."""
    tensors = [t.requires_grad_() for t in problem(operator).values()]
    y = call(operator, ARGUMENTS[operator])(*tensors)
    grads = randn(MEMBERS, *y.shape, seed=9)
    given = torch.autograd.grad(y, tensors, grads, retain_graph=True, is_grads_batched=True)
    right = [torch.autograd.grad(y, tensors, grad, retain_graph=True) for grad in grads]
    for ours, exact in zip(given, map(torch.stack, zip(*right, strict=True)), strict=True):
        assert torch.equal(ours, exact)


@OPERATORS
def test_statistics(operator, kernels) -> None:
    """x's are taken and y's returned, as many as of one member."""
    with_stats = {pool_mixer: pool_mixer_with_stats, mlp: mlp_with_stats}[operator]
    shared = problem(operator)
    del shared["x"]
    x = randn(MEMBERS, *SHAPES["x"], seed=3)
    stats = torch.stack([sample_stats(3 * each) for each in x])
    y, of_y = torch.vmap(lambda x, stats: with_stats(x, **shared, stats=stats))(x, stats)
    wanted = [with_stats(each, **shared, stats=its) for each, its in zip(x, stats, strict=True)]
    assert torch.equal(y, torch.stack([each[0] for each in wanted]))
    assert torch.equal(of_y, torch.stack([each[1] for each in wanted]))


@OPERATORS
def test_a_members_layout_is_kept(operator, kernels) -> None:
    tensors = problem(operator)
    x = randn(MEMBERS * BATCH, *SHAPES["x"][1:]).to(memory_format=torch.channels_last)
    f = call(operator, ARGUMENTS[operator])
    y = torch.vmap(lambda x: f(x, *[*tensors.values()][1:]))(x.unflatten(0, (MEMBERS, BATCH)))
    assert y[1].is_contiguous(memory_format=torch.channels_last)


@OPERATORS
def test_no_member_at_all_is_refused(operator, kernels) -> None:
    f = call(operator, ("x", "weight", "bias") if operator is pool_mixer else ARGUMENTS[mlp][:5])
    rest = [None, None] if operator is pool_mixer else [*problem(mlp).values()][1:5]
    with pytest.raises(ValueError, match=rf"{operator.__name__}_cpp cannot be mapped over .* of size 0"):
        torch.vmap(lambda x: f(x, *rest))(torch.ones(0, *SHAPES["x"]))


def test_the_inference_operator(kernels) -> None:
    """Compiled models reach it inside vmap."""
    model, chain = pk.create_model("poolformer_s12", num_classes=10).eval(), Chain()
    assert model.add_to(chain)
    x = randn(MEMBERS, BATCH, 3, 32, 32)
    with torch.no_grad():
        wanted = torch.stack([chain.run(each, True) for each in x])
        for dim in (0, 1):
            assert torch.equal(torch.vmap(lambda x: chain.run(x, True), dim)(x.movedim(0, dim)), wanted)
