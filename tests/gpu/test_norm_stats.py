"""The CUDA C++ statistics kernel against float64, for whole and partial chunks and vectors."""

import pytest
import torch

from poolformer_kernels.backends.cpp import build_info
from poolformer_kernels.ops.norm_stats import CHUNK
from poolformer_kernels.reference import merge_stats

pytestmark = pytest.mark.skipif(
    not build_info().get("cuda_archs"), reason="the extension was built without nvcc"
)


def norm_stats(x):
    return torch.ops.poolformer_kernels.norm_stats_cuda(x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 64, 56, 56), (3, 17, 13, 29), (2, 1, 1, 1), (5, 128, 8, 8), (2, 320, 14, 14)]
)
@pytest.mark.parametrize("mean", [0.0, -2.3, 100.0])
def test_against_float64(shape, dtype, layout, mean):
    torch.manual_seed(0)
    x = (mean + torch.randn(shape, device="cuda")).to(dtype).contiguous(memory_format=layout)
    partials = norm_stats(x)
    assert partials.shape[1] == -(-x[0].numel() // CHUNK)
    assert partials[..., 0].sum().item() == x.numel()
    exact = x.double().flatten(1)
    got_mean, got_variance = merge_stats(partials.double())
    mean_error = (got_mean - exact.mean(1)).abs().max()
    variance = exact.var(1, correction=0)
    assert mean_error <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert ((got_variance - variance).abs() <= 1e-5 * variance + 1e-12).all()


def test_unaligned_start():
    torch.manual_seed(0)
    x = torch.randn(2 * 64 * 7 * 7 + 1, device="cuda")[1:].view(2, 64, 7, 7)
    mean, variance = merge_stats(norm_stats(x).double())
    exact = x.double().flatten(1)
    torch.testing.assert_close(mean, exact.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, exact.var(1, correction=0), rtol=1e-5, atol=0)


def test_repeats_bitwise_on_any_stream():
    x = torch.randn(4, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
    first = norm_stats(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = [norm_stats(x) for _ in range(10)]
    stream.synchronize()
    assert all(torch.equal(first, other) for other in again)


@pytest.mark.host
def test_not_dense_is_refused():
    with pytest.raises(RuntimeError, match="contiguous or channels_last"):
        norm_stats(torch.randn(2, 8, 8, 8, device="cuda").transpose(2, 3)[:, ::2])
