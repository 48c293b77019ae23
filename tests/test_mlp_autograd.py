"""What the CPU's kernels keep for the MLP's backward, and the reference's second and forward derivatives."""

import pytest
import torch
from support.mlp import make_inputs

import poolformer_kernels as pk
from poolformer_kernels.ops import mlp

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
def test_transforms_run_on_the_reference(transform, name):
    inputs = make_inputs((2, 3, 5, 6), 7, torch.float64)
    at = inputs.pop(name)
    tangent = torch.randn(at.shape if transform is not grad_by_func else (2, 3, 5, 6), dtype=torch.float64)

    def function(t):
        return mlp(**inputs, **{name: t}, residual=True)

    with pk.use_backend("reference"):
        expected = transform(function, at, tangent)
        if transform is not grad_by_func:
            ahead, behind = (function(at + step * tangent) for step in (1e-6, -1e-6))
            torch.testing.assert_close(expected, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)
