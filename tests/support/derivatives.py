"""Forward mode and torch.func: the derivative of ``function`` at x along a tangent."""

import torch


def jvp_by_func(function, x, tangent):
    return torch.func.jvp(function, (x,), (tangent,))[1]


def jvp_by_dual(function, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        y = function(torch.autograd.forward_ad.make_dual(x, tangent))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


def grad_by_func(function, x, tangent):
    """Of the sum of the function's values."""
    return (torch.func.grad(lambda a: function(a).sum())(x) * tangent).sum()


TRANSFORMS = {f.__name__: f for f in (jvp_by_func, jvp_by_dual, grad_by_func)}
