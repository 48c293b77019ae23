"""The MLP's definition, its float64, and its dtypes under CUDA autocast; all else is in contract/mlp*.py."""

import pytest
import torch
from support.layouts import LAYOUTS, as_layout
from support.mlp import assert_right, make_grad, make_inputs
from support.problems import HALVES
from support.rule import run
from torch._subclasses.fake_tensor import FakeTensorMode

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import mlp

DTYPES = (torch.float32, *HALVES)


def test_is_the_papers_definition():
    """Equation 3 of the paper, one number at a time, in float64."""
    inputs = make_inputs((3, 2, 2, 3), 4, torch.float64)
    v = {name: t.flatten(1).tolist() if t.dim() == 4 else t.tolist() for name, t in inputs.items()}
    y = mlp(**inputs, activation="relu", eps=1e-3, residual=True)
    for b in range(3):
        values = inputs["x"][b].flatten().tolist()
        mean = sum(values) / len(values)
        rstd = (sum((u - mean) ** 2 for u in values) / len(values) + 1e-3) ** -0.5
        for i in range(2):
            for j in range(3):
                x = inputs["x"][b, :, i, j].tolist()
                n = [(x[c] - mean) * rstd * v["norm_weight"][c] + v["norm_bias"][c] for c in range(2)]
                p = [max(0.0, sum(v["w1"][k][c] * n[c] for c in range(2)) + v["b1"][k]) for k in range(4)]
                for c in range(2):
                    o = sum(v["w2"][c][k] * p[k] for k in range(4)) + v["b2"][c]
                    wanted = x[c] + v["drop_scale"][b] * v["layer_scale"][c] * o
                    assert y[b, c, i, j].item() == pytest.approx(wanted, abs=1e-13)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_runs_the_reference(layout, residual, activation):
    """To fp64's digits: the formulas that every other value is tested against are right too."""
    inputs = make_inputs((4, 5, 6, 9), 7, torch.float64)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad, options = as_layout(make_grad(inputs), layout), {"residual": residual, "activation": activation}
    found = run(mlp, inputs, grad, **options)
    assert_right(found, inputs, grad, **options)
    assert found["y"].is_contiguous(memory_format=memory_format_of(inputs["x"]))


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch cannot copy even fake CUDA tensors")
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_autocast_dtypes(dtype, normed, residual, enabled):
    """On fake CUDA tensors, so that it is tested where there is no such device; see test_mlp_compile too."""
    before = torch.is_autocast_enabled("cuda")
    half = torch.get_autocast_dtype("cuda")
    with FakeTensorMode(), pk.use_backend("reference"):
        x = torch.empty(2, 3, 4, 5, device="cuda", dtype=dtype)
        w1, w2 = (torch.empty(shape, device="cuda", dtype=dtype) for shape in ((6, 3), (3, 6)))
        torch.set_autocast_enabled("cuda", enabled)
        try:
            y = mlp(x, w1, None, w2, None, norm=normed, residual=residual)
        finally:
            torch.set_autocast_enabled("cuda", before)
    if not enabled:
        assert y.dtype == dtype
    else:
        assert y.dtype == (torch.float32 if residual else half)
