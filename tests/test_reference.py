"""The specification itself: against the definition written as loops, and by finite differences in float64."""

import itertools

import pytest
import torch
from support import mlp
from support.layouts import LAYOUTS, as_layout
from support.pool_mixer import make_inputs
from support.problems import randn, tiled_stats
from support.rule import assert_close_to_fp64

from poolformer_kernels import reference
from poolformer_kernels.layout import memory_format_of


def mean_rstd_of(sample: torch.Tensor, eps: float) -> tuple[float, float]:
    values = sample.flatten().tolist()
    mean = sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / len(values) + eps) ** -0.5


def mixer_in_loops(x, weight, bias, layer_scale, drop_scale, pool_size, eps, residual) -> torch.Tensor:
    """Equations 2 and 4 and Algorithm 1 of the paper, one pixel at a time."""
    batch, channels, height, width = x.shape
    reach = pool_size // 2
    y = torch.empty_like(x)
    for b in range(batch):
        mean, rstd = mean_rstd_of(x[b], eps)
        for c, i, j in itertools.product(range(channels), range(height), range(width)):
            rows = range(max(0, i - reach), min(height, i + reach + 1))
            columns = range(max(0, j - reach), min(width, j + reach + 1))
            n = {
                (p, q): (x[b, c, p, q].item() - mean) * rstd * weight[c].item() + bias[c].item()
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


def test_the_mlp_is_the_papers_definition():
    """Equation 3, one number at a time."""
    inputs = mlp.make_inputs((3, 2, 2, 3), 4, torch.float64)
    v = {name: t.flatten(1).tolist() if t.dim() == 4 else t.tolist() for name, t in inputs.items()}
    y = reference.mlp(**inputs, activation="relu", norm=True, eps=1e-3, residual=True)
    for b in range(3):
        mean, rstd = mean_rstd_of(inputs["x"][b], 1e-3)
        for i, j in itertools.product(range(2), range(3)):
            x = inputs["x"][b, :, i, j].tolist()
            n = [(x[c] - mean) * rstd * v["norm_weight"][c] + v["norm_bias"][c] for c in range(2)]
            p = [max(0.0, sum(v["w1"][k][c] * n[c] for c in range(2)) + v["b1"][k]) for k in range(4)]
            for c in range(2):
                o = sum(v["w2"][c][k] * p[k] for k in range(4)) + v["b2"][c]
                wanted = x[c] + v["drop_scale"][b] * v["layer_scale"][c] * o
                assert y[b, c, i, j].item() == pytest.approx(wanted, abs=1e-13)


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


def function_and_leaves(shape: tuple[int, ...], residual: bool, given: bool = False):
    """The mixer as a function of all its tensors, and these."""
    inputs = make_inputs(shape, torch.float64, seed=4)
    inputs["drop_scale"] = torch.tensor([1.25, 0.5], dtype=torch.float64)

    def function(*tensors):
        # statistics of the tensor itself, so that finite differences move them too
        stats = reference.sample_stats(tensors[0].detach()) if given else None
        return reference.pool_mixer(**dict(zip(inputs, tensors, strict=True)), residual=residual, stats=stats)

    return function, [t.requires_grad_() for t in inputs.values()]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
def test_gradcheck(given, residual):
    assert torch.autograd.gradcheck(*function_and_leaves((2, 3, 4, 3), residual, given))


def test_gradgradcheck():
    assert torch.autograd.gradgradcheck(*function_and_leaves((2, 2, 3, 3), residual=True))


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
