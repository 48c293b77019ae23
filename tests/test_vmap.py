"""`torch.vmap` of the operators: each member's own result for all in_dims, and no warning."""

import warnings

import pytest
import torch
from support.operators import EVERY, MLP, POOL_MIXER, Operator
from support.problems import randn
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels.ops.chain import Chain
from poolformer_kernels.reference import sample_stats

MEMBERS, BATCH, C, HIDDEN, HEIGHT, WIDTH = 3, 2, 8, 12, 5, 6
SHAPE = (BATCH, C, HEIGHT, WIDTH)


@pytest.fixture(autouse=True)
def no_warnings(capfd):
    """Neither Python's nor those of PyTorch's C++ code, which it prints."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert capfd.readouterr().err == ""


def problem(operator: Operator, *leading: int) -> dict[str, Tensor]:
    """The operator's tensors, each with these dimensions in front."""
    options = {"conv": False} if operator is MLP else {}
    of_one = operator.inputs(SHAPE, HIDDEN, **options)
    return {name: randn(*leading, *t.shape, seed=seed) for seed, (name, t) in enumerate(of_one.items())}


def call(operator: Operator, names: tuple[str, ...] | None = None):
    names = names or operator.names
    return lambda *tensors: operator.call(**dict(zip(names, tensors, strict=True)), residual=True)


def assert_each_member(operator, in_dims: dict[str, int]) -> None:
    """vmap over these arguments, the others being shared, equals one call for each member."""
    tensors, f = problem(operator, MEMBERS), call(operator)
    dims = tuple(map(in_dims.get, operator.names))
    given = [
        t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(tensors.values(), dims, strict=True)
    ]
    wanted = [
        f(*(t[0 if dim is None else i] for t, dim in zip(tensors.values(), dims, strict=True)))
        for i in range(MEMBERS)
    ]
    if not (operator is POOL_MIXER and [*in_dims] == ["bias"]):  # pool minus identity cancels it
        assert not torch.equal(wanted[0], wanted[1])
    assert torch.equal(torch.vmap(f, dims)(*given), torch.stack(wanted))


@EVERY
@pytest.mark.parametrize("dim", [0, 1, 2, 3, 4, -1, -3])
def test_over_x(operator, dim, kernels) -> None:
    assert_each_member(operator, {"x": dim})


@EVERY
@pytest.mark.parametrize("with_x", [False, True])
def test_over_each_parameter(operator, with_x, kernels) -> None:
    for name in operator.names[1:]:
        for dim in (0, 1):
            assert_each_member(operator, {"x": 2, name: dim} if with_x else {name: dim})


@EVERY
def test_over_everything(operator, kernels) -> None:
    assert_each_member(operator, dict.fromkeys(operator.names, 0))


@EVERY
def test_nested_and_its_gradients(operator, kernels) -> None:
    """The inner one over x, the outer over the parameters, too: two models on three batches."""
    names = operator.names
    tensors = {name: t.requires_grad_() for name, t in problem(operator, 2).items()}
    tensors["x"] = randn(2, MEMBERS, *SHAPE).requires_grad_()
    f = call(operator)
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


@EVERY
def test_many_gradients_at_once(operator, kernels) -> None:
    """`is_grads_batched` maps the backward alone."""
    tensors = [t.requires_grad_() for t in problem(operator).values()]
    y = call(operator)(*tensors)
    grads = randn(MEMBERS, *y.shape, seed=9)
    given = torch.autograd.grad(y, tensors, grads, retain_graph=True, is_grads_batched=True)
    right = [torch.autograd.grad(y, tensors, grad, retain_graph=True) for grad in grads]
    for ours, exact in zip(given, map(torch.stack, zip(*right, strict=True)), strict=True):
        assert torch.equal(ours, exact)


@EVERY
def test_statistics(operator, kernels) -> None:
    """x's are taken and y's returned, as many as of one member."""
    with_stats = operator.with_stats
    shared = problem(operator)
    del shared["x"]
    x = randn(MEMBERS, *SHAPE, seed=3)
    stats = torch.stack([sample_stats(3 * each) for each in x])
    y, of_y = torch.vmap(lambda x, stats: with_stats(x, **shared, stats=stats))(x, stats)
    wanted = [with_stats(each, **shared, stats=its) for each, its in zip(x, stats, strict=True)]
    assert torch.equal(y, torch.stack([each[0] for each in wanted]))
    assert torch.equal(of_y, torch.stack([each[1] for each in wanted]))


@EVERY
def test_a_members_layout_is_kept(operator, kernels) -> None:
    tensors = problem(operator)
    x = randn(MEMBERS * BATCH, *SHAPE[1:]).to(memory_format=torch.channels_last)
    f = call(operator)
    y = torch.vmap(lambda x: f(x, *[*tensors.values()][1:]))(x.unflatten(0, (MEMBERS, BATCH)))
    assert y[1].is_contiguous(memory_format=torch.channels_last)


@EVERY
def test_no_member_at_all_is_refused(operator, kernels) -> None:
    f = call(operator, operator.names[: 3 if operator is POOL_MIXER else 5])
    rest = [None, None] if operator is POOL_MIXER else [*problem(MLP).values()][1:5]
    with pytest.raises(ValueError, match=rf"{operator}_cpp cannot be mapped over .* of size 0"):
        torch.vmap(lambda x: f(x, *rest))(torch.ones(0, *SHAPE))


def test_the_inference_operator(kernels) -> None:
    """Compiled models reach it inside vmap."""
    model, chain = pk.create_model("poolformer_s12", num_classes=10).eval(), Chain()
    assert model.add_to(chain)
    x = randn(MEMBERS, BATCH, 3, 32, 32)
    with torch.no_grad():
        wanted = torch.stack([chain.run(each, True) for each in x])
        for dim in (0, 1):
            assert torch.equal(torch.vmap(lambda x: chain.run(x, True), dim)(x.movedim(0, dim)), wanted)
