"""The statistics kernel against float64, for whole and partial chunks and vectors.

In the executor; tests/gpu/test_cuda.py runs the same tests on a GPU, with another ``device``.
"""

import pytest
import torch

from poolformer_kernels.ops.norm_stats import CHUNK
from poolformer_kernels.reference import merge_stats

norm_stats = torch.ops.poolformer_kernels.norm_stats_cuda
SHAPES = ((1, 64, 28, 28), (3, 17, 13, 29), (2, 1, 1, 1), (5, 128, 8, 8), (2, 320, 14, 14))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [0.0, -2.3, 100.0])
def test_against_float64(device, shape, dtype, layout, mean):
    torch.manual_seed(0)
    x = (mean + torch.randn(shape)).to(device, dtype).contiguous(memory_format=layout)
    partials = norm_stats(x)
    assert partials.shape[1] == -(-x[0].numel() // CHUNK)
    assert partials[..., 0].sum().item() == x.numel()
    exact = x.double().flatten(1)
    got_mean, got_variance = merge_stats(partials.double())
    assert (got_mean - exact.mean(1)).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    torch.testing.assert_close(got_variance, exact.var(1, correction=0), rtol=1e-5, atol=1e-12)


def test_unaligned_start(device):
    torch.manual_seed(0)
    x = torch.randn(2 * 64 * 7 * 7 + 1).to(device)[1:].view(2, 64, 7, 7)
    mean, variance = merge_stats(norm_stats(x).double())
    exact = x.double().flatten(1)
    torch.testing.assert_close(mean, exact.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, exact.var(1, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_statistics(device, value):
    x = torch.ones(2, 3, 4, 5, device=device)
    x[1, 2, 3, 4] = value
    mean, variance = merge_stats(norm_stats(x))
    assert mean.isfinite().tolist() == variance.isfinite().tolist() == [True, False]


@pytest.mark.host
def test_not_dense_is_refused(device):
    with pytest.raises(RuntimeError, match="contiguous or channels_last"):
        norm_stats(torch.randn(2, 8, 8, 8, device=device).transpose(2, 3)[:, ::2])
