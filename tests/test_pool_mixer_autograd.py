"""Which gradients the token mixer returns, what it must leave alone, and second derivatives."""

import itertools

import pytest
import torch
from helpers import PARAMETERS, as_layout, assert_right, assert_same, bits, make_grad, make_inputs, run

import poolformer_kernels as pk
from poolformer_kernels.ops import pool_mixer

NAMES = ("x", *PARAMETERS)
FORMATS = ("nchw", "channels_last")
SUBSETS = [s for size in range(len(NAMES) + 1) for s in itertools.combinations(NAMES, size)]


@pytest.mark.parametrize("residual", [False, True])
def test_every_subset_of_requires_grad(backend, residual):
    inputs = make_inputs((3, 5, 6, 7))
    grad = make_grad(inputs)
    full = run(pool_mixer, inputs, grad, residual=residual)
    for subset in SUBSETS:
        leaves = {name: t.clone().requires_grad_(name in subset) for name, t in inputs.items()}
        y = pool_mixer(**leaves, residual=residual)
        assert torch.equal(bits(y.detach()), bits(full["y"])), subset
        assert y.requires_grad == bool(subset), subset
        if subset:
            y.backward(grad)
        for name, leaf in leaves.items():
            if name not in subset:
                assert leaf.grad is None, (subset, name)
            elif backend == "reference":  # eager sums in another order where it has less to compute
                torch.testing.assert_close(leaf.grad, full[f"d{name}"], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(bits(leaf.grad), bits(full[f"d{name}"])), (subset, name)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_subset_of_absent_parameters(backend, dtype, residual):
    for size in range(len(PARAMETERS) + 1):
        for parameters in itertools.combinations(PARAMETERS, size):
            inputs = make_inputs((3, 5, 6, 7), dtype, parameters=parameters)
            grad = make_grad(inputs)
            assert_right(run(pool_mixer, inputs, grad, residual=residual), inputs, grad, residual=residual)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_bias_is_exactly_zero(kernels, parameter_dtype):
    inputs = make_inputs((3, 5, 6, 7), torch.bfloat16, parameter_dtype=parameter_dtype)
    dbias = run(pool_mixer, inputs, make_grad(inputs))["dbias"]
    assert dbias.dtype == parameter_dtype
    assert torch.equal(dbias, torch.zeros(5, dtype=parameter_dtype))


@pytest.mark.parametrize("layout", [*FORMATS, "expanded_all"])
@pytest.mark.parametrize("x_layout", FORMATS)
@pytest.mark.parametrize("residual", [False, True])
def test_nothing_given_is_written(backend, residual, x_layout, layout):
    """Neither the inputs, which are the tensors saved, nor the incoming gradient, forward and backward."""
    inputs = make_inputs((3, 5, 6, 7))
    inputs["x"] = as_layout(inputs["x"], x_layout)
    grad = as_layout(make_grad(inputs), layout)
    before = {name: t.clone() for name, t in inputs.items()} | {"grad": grad.clone()}
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = pool_mixer(**leaves, residual=residual)
    kept = y.detach().clone()
    first = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), grad)
    assert_same({name: t.detach() for name, t in leaves.items()} | {"grad": grad}, before)
    assert torch.equal(y.detach(), kept)
    assert_same(dict(zip(leaves, first, strict=True)), dict(zip(leaves, second, strict=True)))


def test_outputs_share_no_memory_with_inputs(backend):
    inputs = make_inputs((3, 5, 6, 7))
    x, grad = inputs["x"].requires_grad_(), make_grad(inputs)
    y = pool_mixer(**inputs, pool_size=1, residual=True)  # y = x
    (dx,) = torch.autograd.grad(y, x, grad)
    storages = [t.untyped_storage().data_ptr() for t in (x, y, grad, dx)]
    if backend == "reference":  # eager's backward may hand the gradient on as it came
        storages.pop()
    assert len(set(storages)) == len(storages)


def test_writing_a_saved_input_before_backward_raises(backend):
    inputs = make_inputs((3, 5, 6, 7))
    weight = inputs["weight"].requires_grad_()
    y = pool_mixer(**inputs, residual=True)
    inputs["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), weight)


def test_backward_keeps_the_backend_of_its_forward(kernels):
    inputs = make_inputs((3, 5, 6, 7))
    grad = make_grad(inputs)
    expected = run(pool_mixer, inputs, grad, residual=True)
    x = inputs["x"].requires_grad_()
    y = pool_mixer(**inputs, residual=True)
    with pk.use_backend("reference"):
        (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(bits(dx), bits(expected["dx"]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_value_is_the_same_without_autograd(backend, mode):
    inputs = make_inputs((3, 5, 6, 7))
    recorded = pool_mixer(**{**inputs, "x": inputs["x"].clone().requires_grad_()}, residual=True)
    with mode():
        y = pool_mixer(**inputs, residual=True)
    assert not y.requires_grad
    assert torch.equal(bits(y), bits(recorded.detach()))


def test_double_backward_on_a_kernel_says_what_to_do(kernels):
    inputs = make_inputs((2, 3, 4, 5))
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(pool_mixer(**inputs, residual=True).square().sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"pool_mixer on the 'cpp' backend has no second derivative.*use_backend"
    ):
        dx.square().sum().backward()


def test_double_backward_on_the_reference():
    """A gradient penalty: the second derivative of the reference in float32 against float64."""

    def penalty(dtype: torch.dtype) -> torch.Tensor:
        inputs = make_inputs((2, 3, 4, 5), parameter_dtype=torch.float32)
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
        x = inputs["x"].requires_grad_()
        with pk.use_backend("reference"):
            y = pool_mixer(**inputs, residual=True)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty(torch.float32).double(), penalty(torch.float64), rtol=1e-4, atol=1e-4)


def test_gradients_accumulate_over_calls(backend):
    """The same weight in two calls, and a backward through several outputs."""
    inputs = make_inputs((3, 5, 6, 7))
    grad = make_grad(inputs)
    once = run(pool_mixer, inputs, grad, residual=True)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    torch.autograd.backward([pool_mixer(**leaves, residual=True) for _ in range(2)], [grad, grad])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 2 * once[f"d{name}"], rtol=1e-6, atol=1e-6)


# ---- forward mode and torch.func ---------------------------------------------------------------------------


def jvp_by_func(x, tangent):
    return torch.func.jvp(lambda a: pool_mixer(a, None, None), (x,), (tangent,))[1]


def jvp_by_dual(x, tangent):
    with torch.autograd.forward_ad.dual_level():
        y = pool_mixer(torch.autograd.forward_ad.make_dual(x, tangent), None, None)
        return torch.autograd.forward_ad.unpack_dual(y).tangent


def grad_by_func(x, tangent):
    return torch.func.grad(lambda a: (pool_mixer(a, None, None) * tangent).sum())(x)


@pytest.mark.parametrize("transform", [jvp_by_func, jvp_by_dual, grad_by_func])
def test_transforms_run_on_the_reference_and_are_refused_by_kernels(kernels, transform):
    """A kernel has no tangents: a zero or a missing one would be a wrong number."""
    x, tangent = torch.randn(2, 3, 5, 6).double(), torch.randn(2, 3, 5, 6).double()
    with pk.use_backend("reference"):
        expected = transform(x, tangent)
        step = 1e-6
        if transform is not grad_by_func:
            ahead, behind = (pool_mixer(x + s * step * tangent, None, None) for s in (1, -1))
            torch.testing.assert_close(expected, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative and no torch\.func gradient; use"):
        transform(x.float(), tangent.float())
