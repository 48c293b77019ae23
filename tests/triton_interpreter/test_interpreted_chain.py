"""The chain's layers in Triton's interpreter: the two kernels of its own, and whole models layer by layer."""

import pytest
import torch
import torch.nn.functional as F
from support.chain import by_reference, images, make_model
from support.problems import HALVES, randn
from support.rule import assert_close_to_fp64

from poolformer_kernels import reference
from poolformer_kernels.backends.triton.chain import add_bias, head, run_layers
from poolformer_kernels.models import HEADS
from poolformer_kernels.ops.chain import Chain

LAST = torch.channels_last
DTYPES = (torch.float32, *HALVES)


def call(op, *args):
    return op(*args)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 20, 20), (3, 33, 5, 7), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_bias_and_statistics(dtype, shape, mean) -> None:
    """The sum is rounded once; the statistics are those of the rounded numbers."""
    x = randn(*shape, dtype=dtype, mean=mean).to(memory_format=LAST)
    bias = randn(shape[1], dtype=dtype, seed=1)
    expected = x + bias.view(-1, 1, 1)
    y = x.clone(memory_format=torch.preserve_format)
    stats = add_bias(y, bias, True)
    assert torch.equal(y, expected)
    found_mean, variance = reference.merge_stats(stats)
    exact = y.double().flatten(1)
    spread = exact.var(1, correction=0)
    torch.testing.assert_close(found_mean.double(), exact.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), spread, rtol=1e-5, atol=1e-9)
    untouched = y.clone(memory_format=torch.preserve_format)
    assert torch.equal(add_bias(y, None, True), stats)
    assert add_bias(y, torch.zeros_like(bias), False) is None
    assert torch.equal(y, untouched)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 96, 7, 7), (3, 33, 5, 7), (2, 16, 1, 1)], ids=str)
@pytest.mark.parametrize("mean", [0.1, 100.0])
@pytest.mark.parametrize("norm_first", [True, False])
def test_head(dtype, shape, mean, norm_first) -> None:
    x = randn(*shape, dtype=dtype, mean=mean).to(memory_format=LAST)
    x += randn(1, shape[1], 1, 1, dtype=dtype, seed=3)  # channels differ in their means
    weight, bias = (randn(shape[1], dtype=dtype, mean=1.0, seed=i) for i in (1, 2))

    def eager(x, weight, bias):
        if norm_first:
            return F.group_norm(x, 1, weight, bias, 1e-5).mean((2, 3))
        return F.layer_norm(x.mean((2, 3)), (shape[1],), weight, bias, 1e-5)

    stats = add_bias(x, None, True) if norm_first else None
    y = head(x, weight, bias, stats, 1e-5)
    exact = eager(x.double(), weight.double(), bias.double())
    assert_close_to_fp64(y, eager(x, weight, bias), exact, what="features")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", HEADS)
def test_a_model_layer_by_layer(dtype, mode) -> None:
    model, x = make_model(dtype=dtype, head=mode), images(2, 3, 41, 33, dtype=dtype)
    chain = Chain()
    assert model.add_to(chain)
    with torch.no_grad():
        logits = run_layers(chain.layers, x, "triton", call)
    exact, eager = by_reference(model, x), by_reference(model, x, dtype)
    assert_close_to_fp64(logits, eager, exact, what="logits")
