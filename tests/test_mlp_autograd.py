"""Which gradients the MLP returns, what it must leave alone, and second derivatives."""

import itertools

import pytest
import torch
from helpers import HALVES, as_layout, assert_same, bits, run
from mlp_helpers import (
    NAMES,
    PLAIN,
    VECTORS,
    assert_right,
    make_grad,
    make_inputs,
    y_of_mlp_with_stats,
)

import poolformer_kernels as pk
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats

FORMATS = ("nchw", "channels_last")
DTYPES = (torch.float32, *HALVES)
SUBSETS = [  # each alone, each left out, all, none, and pairs
    (),
    *((name,) for name in NAMES),
    *itertools.combinations(NAMES, 2),
    *(tuple(n for n in NAMES if n != name) for name in NAMES),
    NAMES,
]


@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_subsets_of_requires_grad(backend, residual, save_hidden):
    inputs = make_inputs((3, 5, 6, 7), 9)
    grad = make_grad(inputs)
    options = {"residual": residual, "save_hidden": save_hidden}
    full = run(mlp, inputs, grad, **options)
    for subset in SUBSETS:
        leaves = {name: t.clone().requires_grad_(name in subset) for name, t in inputs.items()}
        y = mlp(**leaves, **options)
        if backend == "reference":  # eager takes other ways through the same sums
            torch.testing.assert_close(y.detach(), full["y"], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(bits(y.detach()), bits(full["y"])), subset
        assert y.requires_grad == bool(subset), subset
        if subset:
            y.backward(grad)
        for name, leaf in leaves.items():
            if name not in subset:
                assert leaf.grad is None, (subset, name)
            elif backend == "reference":
                torch.testing.assert_close(leaf.grad, full[f"d{name}"], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(bits(leaf.grad), bits(full[f"d{name}"])), (subset, name)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subsets_of_absent_parameters(backend, dtype, residual):
    """No biases, no norm or one half of it, no LayerScale, no drop path: none, one, two, or all of them."""
    for size in (0, 1, 2, 5, 6):
        for parameters in itertools.combinations(VECTORS, size):
            inputs = make_inputs((3, 5, 6, 7), 9, dtype, parameters=parameters)
            grad = make_grad(inputs)
            assert_right(run(mlp, inputs, grad, residual=residual), inputs, grad, residual=residual)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_without_parameters(backend, dtype, residual):
    inputs = make_inputs((3, 5, 6, 7), 9, dtype, parameters=PLAIN)
    grad = make_grad(inputs)
    options = {"residual": residual, "norm": True}
    assert_right(run(mlp, inputs, grad, **options), inputs, grad, **options)
    plain = mlp(**inputs, residual=residual)
    assert not torch.equal(mlp(**inputs, **options), plain)
    assert torch.equal(mlp(**inputs, residual=residual, norm=False), plain)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_saved_or_computed_again(backend, dtype, residual, layout):
    """The value is the same to the last bit; both gradients meet the error rule."""
    inputs = make_inputs((4, 17, 6, 7), 40, dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)
    both = [run(mlp, inputs, grad, residual=residual, save_hidden=saved) for saved in (False, True)]
    assert torch.equal(bits(both[0]["y"]), bits(both[1]["y"]))
    for actual in both:
        assert_right(actual, inputs, grad, residual=residual)


@pytest.mark.parametrize("save_hidden", [False, True])
def test_what_is_kept_for_the_backward(kernels, save_hidden):
    """x, its statistics and the parameters; the hidden activations only where asked for."""
    inputs = make_inputs((2, 8, 6, 7), 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(
            **{name: t.requires_grad_() for name, t in inputs.items()}, residual=True, save_hidden=save_hidden
        )
    new = [t for t in kept if all(t.data_ptr() != given.data_ptr() for given in inputs.values())]
    assert sorted(t.numel() for t in new) == ([4, 2 * 6 * 7 * 32] if save_hidden else [4])


KEPT = [
    (256, "avx512", torch.float32, 72),
    (255, "avx512", torch.float32, 0),
    (256, "avx512", torch.bfloat16, 72),
    (256, "amx", torch.bfloat16, 0),
    (256, "amx", torch.float32, 72),  # the matrix unit multiplies bfloat16 only
    (256, "amx", torch.float16, 72),
]


@pytest.mark.parametrize(("channels", "isa", "dtype", "kept"), KEPT, ids=str)
def test_hidden_activations_are_kept_where_that_is_faster(kernels, channels, isa, dtype, kept, monkeypatch):
    monkeypatch.setattr(pk.backends.cpp, "ISA", isa)
    inputs = {n: t.to(dtype).requires_grad_() for n, t in make_inputs((2, channels, 3, 3), 4).items()}
    y = mlp(**inputs, residual=True, save_hidden=None)
    assert sum(t.numel() for t in y.grad_fn.saved_tensors if t is not None and t.shape == (72,)) == kept


def test_nothing_is_saved_without_autograd(kernels):
    """save_hidden costs no memory in inference."""
    inputs = make_inputs((2, 8, 6, 7), 32)
    arguments = (*inputs.values(), None, "gelu", 1e-5, True, True, False)
    assert torch.ops.poolformer_kernels.mlp_cpp(*arguments, False)[3].numel() == 0
    expected = mlp(**inputs, residual=True)
    with torch.inference_mode():
        assert torch.equal(mlp(**inputs, residual=True, save_hidden=True), expected)


@pytest.mark.parametrize("layout", [*FORMATS, "expanded_all"])
@pytest.mark.parametrize("x_layout", FORMATS)
@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_given_is_written(backend, dtype, residual, save_hidden, x_layout, layout):
    """Neither the inputs, which are the tensors saved, nor the incoming gradient, forward and backward."""
    inputs = make_inputs((3, 5, 6, 7), 9, dtype)
    inputs["x"] = as_layout(inputs["x"], x_layout)
    grad = as_layout(make_grad(inputs), layout)
    before = {name: t.clone() for name, t in inputs.items()} | {"grad": grad.clone()}
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = mlp(**leaves, residual=residual, save_hidden=save_hidden)
    kept = y.detach().clone()
    first = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), grad)
    assert_same({name: t.detach() for name, t in leaves.items()} | {"grad": grad}, before)
    assert torch.equal(y.detach(), kept)
    assert_same(dict(zip(leaves, first, strict=True)), dict(zip(leaves, second, strict=True)))


def test_statistics_given_are_not_written(backend):
    inputs = make_inputs((3, 5, 6, 7), 9)
    stats = pk.reference.sample_stats(inputs["x"])
    before = stats.clone()
    run(y_of_mlp_with_stats, inputs, make_grad(inputs), residual=True, stats=stats)
    assert torch.equal(stats, before)


def test_outputs_share_no_memory(backend):
    inputs = make_inputs((3, 5, 6, 7), 9)
    grad = make_grad(inputs)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    leaves["layer_scale"] = torch.zeros(5, requires_grad=True)  # y = x
    y, stats = mlp_with_stats(**leaves, residual=True)
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    tensors = [*leaves.values(), y, stats, *grads]
    if backend != "reference":  # eager's backward may hand the gradient on as it came
        tensors.append(grad)
    storages = [t.untyped_storage().data_ptr() for t in tensors]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("written", ["x", "w1", "w2", "b1", "norm_weight"])
def test_writing_a_saved_input_before_backward_raises(kernels, written):
    """The version counters of all that the backward reads, as in PyTorch."""
    inputs = make_inputs((3, 5, 6, 7), 9)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = mlp(**leaves, residual=True)
    with torch.no_grad():
        leaves[written].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("written", ["w1", "w2"])
def test_writing_a_weight_before_backward_raises_as_in_pytorch(backend, written):
    inputs = make_inputs((3, 5, 6, 7), 9)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = mlp(**leaves)
    with torch.no_grad():
        leaves[written].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_keeps_the_backend_of_its_forward(kernels):
    inputs = make_inputs((3, 5, 6, 7), 9)
    grad = make_grad(inputs)
    expected = run(mlp, inputs, grad, residual=True)
    w1 = inputs["w1"].requires_grad_()
    y = mlp(**inputs, residual=True)
    with pk.use_backend("reference"):
        (dw1,) = torch.autograd.grad(y, w1, grad)
    assert torch.equal(bits(dw1), bits(expected["dw1"]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_value_is_the_same_without_autograd(backend, mode):
    inputs = make_inputs((3, 5, 6, 7), 9)
    recorded = mlp(**{**inputs, "w2": inputs["w2"].clone().requires_grad_()}, residual=True)
    with mode():
        y = mlp(**inputs, residual=True)
    assert not y.requires_grad
    assert torch.equal(bits(y), bits(recorded.detach()))


def test_double_backward_on_a_kernel_says_what_to_do(kernels):
    inputs = make_inputs((2, 3, 4, 5), 7)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(mlp(**inputs, residual=True).square().sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"mlp on the 'cpp' backend has no second derivative.*use_backend\('reference'\)"
    ):
        dx.square().sum().backward()


def test_double_backward_on_the_reference():
    """A gradient penalty: the second derivative of the reference in float32 against float64."""

    def penalty(dtype: torch.dtype) -> torch.Tensor:
        inputs = {name: t.to(dtype) for name, t in make_inputs((2, 3, 4, 5), 7).items()}
        x = inputs["x"].requires_grad_()
        with pk.use_backend("reference"):
            y = mlp(**inputs, residual=True)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    exact = penalty(torch.float64)
    torch.testing.assert_close(penalty(torch.float32).double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("save_hidden", [False, True])
def test_gradients_accumulate_over_calls(backend, save_hidden):
    """The same weights in two calls, and a backward through several outputs."""
    inputs = make_inputs((3, 5, 6, 7), 9)
    grad = make_grad(inputs)
    options = {"residual": True, "save_hidden": save_hidden}
    once = run(mlp, inputs, grad, **options)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    torch.autograd.backward([mlp(**leaves, **options) for _ in range(2)], [grad, grad])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 2 * once[f"d{name}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("save_hidden", [False, True])
def test_checkpointing_computes_the_same(backend, save_hidden):
    """torch.utils.checkpoint runs the forward again inside the backward."""
    from torch.utils.checkpoint import checkpoint

    inputs = make_inputs((3, 5, 6, 7), 9)
    grad = make_grad(inputs)
    options = {"residual": True, "save_hidden": save_hidden}
    again = run(lambda **t: checkpoint(lambda: mlp(**t, **options), use_reentrant=False), inputs, grad)
    expected = run(mlp, inputs, grad, **options)
    assert_same(again, expected)


# ---- forward mode and torch.func ---------------------------------------------------------------------------


def jvp_by_func(function, x, tangent):
    return torch.func.jvp(function, (x,), (tangent,))[1]


def jvp_by_dual(function, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        y = function(torch.autograd.forward_ad.make_dual(x, tangent))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


def grad_by_func(function, x, tangent):
    return torch.func.grad(lambda a: (function(a) * tangent).sum())(x)


@pytest.mark.parametrize("name", ["x", "w1", "b2"])
@pytest.mark.parametrize("transform", [jvp_by_func, jvp_by_dual, grad_by_func])
def test_transforms_run_on_the_reference_and_are_refused_by_kernels(kernels, transform, name):
    """A kernel has no tangents: a zero or a missing one would be a wrong number."""
    inputs = make_inputs((2, 3, 5, 6), 7, torch.float64)
    at = inputs.pop(name)
    tangent = torch.randn(at.shape if transform is not grad_by_func else (2, 3, 5, 6), dtype=torch.float64)

    def function(t):
        return mlp(**{key: value.to(t.dtype) for key, value in inputs.items()}, **{name: t}, residual=True)

    with pk.use_backend("reference"):
        expected = transform(function, at, tangent)
        if transform is not grad_by_func:
            ahead, behind = (function(at + step * tangent) for step in (1e-6, -1e-6))
            torch.testing.assert_close(expected, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative and no torch\.func gradient; use"):
        transform(function, at.float(), tangent.float())
