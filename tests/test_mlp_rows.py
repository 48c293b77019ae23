"""The CPU's MLP backward where tokens are rows: bfloat16 products, channels_last, whole tiles, many tokens.

That way is for matrix units; test_amx has it on emulated ones. Its values are in contract/mlp_numerics.py.
"""

import pytest
import torch
from support.layouts import as_layout
from support.mlp import make_grad, make_inputs
from support.rule import assert_same
from torch import Tensor

from poolformer_kernels.backends import cpp
from poolformer_kernels.ops import mlp

BF16 = torch.bfloat16


def values(inputs: dict, grad: Tensor, wanted: tuple[str, ...] | None = None, **options) -> dict[str, Tensor]:
    """The gradients of ``wanted``, by default all but drop_scale's."""
    wanted = (
        tuple(n for n, t in inputs.items() if t is not None and n != "drop_scale")
        if wanted is None
        else wanted
    )
    leaves = {n: t if t is None else t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
    y = mlp(**leaves, **options)
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], grad)
    return {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


@pytest.mark.parametrize("x_dtype", [torch.float32, BF16])
def test_core_cpp_rows_under_autocast(kernels, x_dtype):
    """The kernels read float32 weights: no copy of them is kept, and no gradient is rounded."""
    inputs = make_inputs((3, 64, 13, 11), 128, x_dtype, vector_dtype=torch.float32)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    grad = as_layout(make_grad(inputs), "channels_last")
    rounded = {n: t.to(BF16) if n in ("w1", "w2") else t for n, t in inputs.items()}
    expected = values(rounded, grad, residual=True)
    inputs |= {n: (1 + 2**-12) * rounded[n].float() for n in ("w1", "w2")}
    kept = []

    def keep(t):
        kept.append(t.data_ptr())
        return t

    with torch.autocast("cpu", BF16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            mlp(**{n: t.requires_grad_() for n, t in inputs.items()}, residual=True)
        actual = values(inputs, grad, residual=True)
    assert {inputs["w1"].data_ptr(), inputs["w2"].data_ptr()} <= set(kept)
    for name in ("dw1", "dw2"):
        assert actual[name].dtype == torch.float32
        assert not torch.equal(actual[name], actual[name].to(BF16).float()), name
        actual[name] = actual[name].to(BF16)
    if cpp.ISA in ("amx", "avx512_bf16"):  # elsewhere float32 weights are not rounded
        same = ("dx", "db1", "db2", "dw1", "dw2")
        assert_same(*({n: gradients[n] for n in same} for gradients in (actual, expected)))
    for name, gradient in expected.items():
        atol = 2**-7 * gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=2**-7, atol=atol)


def test_rows_are_taken(kernels):
    """Where there is a matrix unit: the usual way, that of drop_scale's gradient, differs in last digits."""
    if cpp.ISA != "amx":
        pytest.skip("no matrix unit")
    inputs = make_inputs((3, 64, 13, 11), 128, BF16)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    grad = as_layout(make_grad(inputs), "channels_last")
    inputs["drop_scale"] = torch.ones(3, dtype=BF16)
    both = [values(inputs, grad, wanted, residual=True)["dx"] for wanted in (("x",), ("x", "drop_scale"))]
    assert not torch.equal(*both)
    torch.testing.assert_close(*both, rtol=2e-2, atol=2e-2)
