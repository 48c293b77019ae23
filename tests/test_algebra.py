"""The formulas of docs/algebra.md, as written there, against the reference and its gradients in float64."""

import pytest
import torch
import torch.nn.functional as F

from poolformer_kernels import reference

B, C, H, W, HIDDEN, EPS = 2, 3, 4, 5, 7, 1e-5
N = C * H * W


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
ACTS = {"gelu": F.gelu, "relu_squared": lambda h: F.relu(h).square()}


def pool(x):
    """P, the average of the pixels that exist."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def adjoint(g):
    """P^T, from the matrix of P."""
    unit = torch.eye(H * W, dtype=torch.float64).view(H * W, 1, H, W)
    matrix = pool(unit).view(H * W, H * W).T  # its columns are the pooled unit images
    return (g.flatten(2) @ matrix).view(g.shape)


def each(channel):
    return channel.view(-1, 1, 1)


def sample(values):
    return values.view(-1, 1, 1, 1)


def normalised(x):
    """(x̂, r)"""
    r = (x.var((1, 2, 3), correction=0, keepdim=True) + EPS).rsqrt()
    return (x - x.mean((1, 2, 3), keepdim=True)) * r, r


def leaves(**tensors):
    return {name: t.requires_grad_() for name, t in tensors.items()}


def gradients(y, given, g):
    return dict(zip(given, torch.autograd.grad(y, given.values(), g), strict=True))


def assert_equal(computed, expected):
    assert computed.keys() == expected.keys()
    for name, value in computed.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-10, atol=1e-10, msg=name)


def test_token_mixer():
    given = leaves(
        x=5 + randn(B, C, H, W), weight=randn(C), bias=randn(C), layer_scale=randn(C), drop_scale=randn(B)
    )
    y, g = reference.pool_mixer(**given, eps=EPS, residual=True), randn(B, C, H, W)
    with torch.no_grad():
        x, gamma, _, s, d = given.values()
        hat, r = normalised(x)
        forward = x + sample(d) * each(s) * (r * each(gamma) * (pool(x) - x))
        e = adjoint(g) - g
        q = (hat * e).sum((2, 3))
        torch.testing.assert_close(q, (r * g * (pool(x) - x)).sum((2, 3)))  # its second form
        total = (d[:, None] * q).sum(0)  # Q
        k = (gamma * s * d[:, None] * q).sum(1) / N
        dx = g + r * (each(gamma) * each(s) * sample(d) * e - hat * sample(k))
        computed = {
            "x": dx,
            "weight": s * total,
            "bias": torch.zeros(C, dtype=torch.float64),
            "layer_scale": gamma * total,
            "drop_scale": (gamma * s * q).sum(1),
        }
    torch.testing.assert_close(forward, y.detach())
    assert_equal(computed, gradients(y, given, g))


@pytest.mark.parametrize("activation", ACTS)
def test_mlp(activation):
    given = leaves(
        x=5 + randn(B, C, H, W),
        w1=randn(HIDDEN, C),
        b1=randn(HIDDEN),
        w2=randn(C, HIDDEN),
        b2=randn(C),
        norm_weight=randn(C),
        norm_bias=randn(C),
        layer_scale=randn(C),
        drop_scale=randn(B),
    )
    z = reference.mlp(**given, activation=activation, norm=True, eps=EPS, residual=True)
    gz = randn(B, C, H, W)

    def tokens(t):  # [B, tokens, channels]
        return t.flatten(2).transpose(1, 2)

    with torch.no_grad():
        y, w1, b1, w2, b2, gamma, beta, s, d = given.values()
        hat, r = normalised(y)
        hat, g, dd = tokens(hat), tokens(gz), d[:, None, None]
        n = gamma * hat + beta
        h = n @ w1.T + b1
        slope = torch.func.vmap(torch.func.grad(ACTS[activation]))(h.flatten()).view(h.shape)
        p = ACTS[activation](h)
        o = p @ w2.T + b2
        forward = tokens(y) + dd * s * o

        big = torch.einsum("btc,bth->ch", dd * g, p)  # G
        t = (dd * g).sum((0, 1))
        dh = dd * ((s * g) @ w2) * slope
        m = torch.einsum("bth,btc->hc", dh, hat)  # M
        db1 = dh.sum((0, 1))
        e = gamma * (dh @ w1)
        mean = lambda v: v.mean((1, 2), keepdim=True)  # noqa: E731
        computed = {
            "x": g + r[:, 0] * (e - mean(e) - hat * mean(e * hat)),
            "w1": m * gamma + db1[:, None] * beta,
            "b1": db1,
            "w2": s[:, None] * big,
            "b2": s * t,
            "norm_weight": (w1 * m).sum(0),
            "norm_bias": w1.T @ db1,
            "layer_scale": (w2 * big).sum(1) + b2 * t,
            "drop_scale": (((s * g) @ w2) * p).sum((1, 2)) + (s * b2 * g).sum((1, 2)),
        }
    torch.testing.assert_close(forward, tokens(z).detach())
    expected = gradients(z, given, gz)
    expected["x"] = tokens(expected["x"])
    assert_equal(computed, expected)
