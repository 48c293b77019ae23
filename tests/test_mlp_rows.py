"""The CPU's MLP where tokens are rows: channels_last, whole blocks of channels, many tokens.

The backward's way is for matrix units and bfloat16 products; test_amx has it on emulated ones, and its values
are in contract/mlp_backward.py. The forward's in floats is for AVX-512; other levels take the usual way.
"""

from functools import partial

import pytest
import torch
from contract import mlp_backward
from contract.targets import CPP
from support.mlp import NAMES
from support.rule import assert_same

from poolformer_kernels.backends import cpp
from poolformer_kernels.ops import mlp

BF16 = torch.bfloat16


gradients, rows = (partial(function, CPP) for function in (mlp_backward.gradients, mlp_backward.rows))


@pytest.mark.parametrize("x_dtype", [torch.float32, BF16])
def test_core_cpp_rows_under_autocast(kernels, x_dtype):
    """The kernels read float32 weights: no copy of them is kept, and no gradient is rounded."""
    inputs, grad = rows((3, 64, 13, 11), 128, x_dtype, vector_dtype=torch.float32)
    rounded = {n: t.to(BF16) if n in ("w1", "w2") else t for n, t in inputs.items()}
    expected = gradients(rounded, grad)
    inputs |= {n: (1 + 2**-12) * rounded[n].float() for n in ("w1", "w2")}
    kept = []

    def keep(t):
        kept.append(t.data_ptr())
        return t

    with torch.autocast("cpu", BF16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            mlp(**{n: t.requires_grad_() for n, t in inputs.items()}, residual=True)
        actual = gradients(inputs, grad)
    assert {inputs["w1"].data_ptr(), inputs["w2"].data_ptr()} <= set(kept)
    for name in ("dw1", "dw2"):
        assert actual[name].dtype == torch.float32
        assert not torch.equal(actual[name], actual[name].to(BF16).float()), name
        actual[name] = actual[name].to(BF16)
    if cpp.ISA in ("amx", "avx512_bf16"):  # elsewhere float32 weights are not rounded
        same = ("dx", "db1", "db2", "dw1", "dw2")
        assert_same(*({n: found[n] for n in same} for found in (actual, expected)))
    for name, gradient in expected.items():
        atol = 2**-7 * gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=2**-7, atol=atol)


def test_rows_are_taken(kernels):
    """Where there is a matrix unit: the usual way, that of drop_scale's gradient, differs in last digits."""
    if cpp.ISA != "amx":
        pytest.skip("no matrix unit")
    inputs, grad = rows((3, 64, 13, 11), 128, BF16)
    inputs["drop_scale"] = torch.ones(3, dtype=BF16)
    both = [gradients(inputs, grad, NAMES[1:last])["dx"] for last in (None, -1)]
    assert not torch.equal(*both)
    torch.testing.assert_close(*both, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [
        ((2, 64, 14, 14), 256),
        ((1, 32, 17, 19), 32),  # 323 tokens: the last block is not whole
        ((3, 96, 13, 11), 384),
        ((2, 320, 14, 14), 1280),
        ((8, 512, 7, 7), 2048),
        ((97, 32, 1, 5), 64),
        ((2, 160, 13, 17), 1312),
        ((1, 64, 40, 41), 160),  # several panels
    ],
    ids=str,
)
def test_the_forwards_rows_are_the_columns_results(kernels, shape, hidden, dtype):
    """To the last bit: the usual way is taken where fc1's output is saved."""
    inputs, _ = rows(shape, hidden, dtype)
    with torch.no_grad():
        found = mlp(**inputs)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    assert_same({"y": found}, {"y": mlp(**leaves, save_hidden=True).detach()})
