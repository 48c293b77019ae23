"""The specification itself: against the definition written as loops, and by finite differences in float64."""

import itertools

import pytest
import torch
from support.layouts import LAYOUTS, as_layout
from support.pool_mixer import make_inputs
from support.problems import randn, tiled_stats
from support.rule import assert_close_to_fp64

from poolformer_kernels import reference
from poolformer_kernels.layout import memory_format_of


def mixer_in_loops(x, weight, bias, layer_scale, drop_scale, pool_size, eps, residual) -> torch.Tensor:
    """Equations 2 and 4 and Algorithm 1 of the paper, one pixel at a time."""
    batch, channels, height, width = x.shape
    reach = pool_size // 2
    y = torch.empty_like(x)
    for b in range(batch):
        values = x[b].flatten().tolist()
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / len(values)
        for c, i, j in itertools.product(range(channels), range(height), range(width)):
            rows = range(max(0, i - reach), min(height, i + reach + 1))
            columns = range(max(0, j - reach), min(width, j + reach + 1))
            n = {
                (p, q): (x[b, c, p, q].item() - mean) / (var + eps) ** 0.5 * weight[c].item() + bias[c].item()
                for p, q in itertools.product(rows, columns)
            }
            m = sum(n.values()) / len(n) - n[i, j]
            y[b, c, i, j] = layer_scale[c] * drop_scale[b] * m + (x[b, c, i, j] if residual else 0.0)
    return y


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("pool_size", [1, 3, 5])
def test_is_the_papers_definition(pool_size, residual):
    inputs = make_inputs((3, 2, 4, 5), torch.float64)
    y = reference.pool_mixer(**inputs, pool_size=pool_size, eps=1e-3, residual=residual)
    wanted = mixer_in_loops(**inputs, pool_size=pool_size, eps=1e-3, residual=residual)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-13)


def test_absent_parameters_mean_one_and_zero():
    inputs = make_inputs((2, 3, 4, 5), torch.float64, parameters=())
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    y = reference.pool_mixer(**inputs, residual=True)
    same = reference.pool_mixer(
        inputs["x"], ones, zeros, layer_scale=ones, drop_scale=ones[:2], residual=True
    )
    torch.testing.assert_close(y, same, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_computes_on_contiguous_data(layout):
    """Eager's channels_last GroupNorm takes the variance in one pass, which is off by far at this mean."""
    x = randn(2, 16, 14, 14, mean=1e4)
    x = as_layout(x, layout)
    y = reference.pool_mixer(x, None, None)
    assert torch.equal(y, reference.pool_mixer(x.contiguous(), None, None))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
def test_gradcheck(given, residual):
    inputs = make_inputs((2, 3, 4, 3), torch.float64, seed=4)
    inputs["drop_scale"] = torch.tensor([1.25, 0.5], dtype=torch.float64)
    names, leaves = list(inputs), [t.requires_grad_() for t in inputs.values()]

    def function(*tensors):
        # statistics of the tensor itself, so that finite differences move them too
        stats = reference.sample_stats(tensors[0].detach()) if given else None
        return reference.pool_mixer(**dict(zip(names, tensors, strict=True)), residual=residual, stats=stats)

    assert torch.autograd.gradcheck(function, leaves)


def test_gradgradcheck():
    inputs = make_inputs((2, 2, 3, 3), torch.float64, seed=5)
    inputs["drop_scale"] = torch.tensor([1.25, 0.5], dtype=torch.float64)
    names, leaves = list(inputs), [t.requires_grad_() for t in inputs.values()]
    function = lambda *tensors: reference.pool_mixer(**dict(zip(names, tensors, strict=True)), residual=True)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_sample_stats(dtype, mean):
    x = randn(3, 5, 7, 6, dtype=dtype, mean=mean, sigma=2.0)
    stats = reference.sample_stats(x)
    assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert stats.shape == (3, 1, 3)
    assert stats[..., 0].eq(5 * 7 * 6).all()
    flat = x.double().flatten(1)
    assert_close_to_fp64(stats[:, 0, 1].float(), None, flat.mean(1), scale=flat.abs().amax(1), what="mean")
    assert_close_to_fp64(stats[:, 0, 2].float(), None, flat.var(1, correction=0) * 210, what="M2")


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("tiles", [1, 2, 7])
def test_merge_stats_is_exact_for_any_tiling(tiles, mean):
    x = randn(3, 5, 8, 6, dtype=torch.float64, mean=mean)
    merged_mean, merged_var = reference.merge_stats(tiled_stats(x, tiles))
    torch.testing.assert_close(merged_mean, x.flatten(1).mean(1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(merged_var, x.flatten(1).var(1, correction=0), rtol=1e-11, atol=0)


def test_merge_stats_of_different_counts():
    stats = torch.tensor([[[1.0, 5.0, 0.0], [3.0, 1.0, 2.0]]], dtype=torch.float64)  # {5} and {0, 1, 2}
    mean, var = reference.merge_stats(stats)
    assert mean.item() == 2.0
    assert var.item() == pytest.approx(3.5, abs=1e-15)


def test_merge_stats_keeps_float32_accuracy_far_from_zero():
    x = randn(2, 4, 32, 32, mean=1e3, sigma=0.1)
    mean, var = reference.merge_stats(tiled_stats(x, 9))
    flat = x.double().flatten(1)
    assert_close_to_fp64(mean, None, flat.mean(1), what="mean")
    # each partial's mean is rounded to float32, 6e-5 at 1e3: against sigma 0.1 at most 1e-3 of var
    torch.testing.assert_close(var.double(), flat.var(1, correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_of(layout):
    x = as_layout(randn(2, 3, 4, 5), layout)
    wanted = torch.channels_last if layout.endswith("_last") else torch.contiguous_format
    assert memory_format_of(x) == wanted
