"""graphed on a GPU: replays against eager calls of the same model on the same backend, bit by bit."""

from itertools import product

import pytest
import torch
from contract.common import BF16, DTYPES
from support.graphs import eager
from support.layouts import as_layout

import poolformer_kernels as pk

from .cases import computed_late, images, over, s12


def captured(batch=2, size=64, **options):
    """(the model, its graph, an input that the graph has not seen)"""
    model = s12(**options).eval()
    like = {"batch": batch, "size": size, "dtype": options.get("dtype", BF16)}
    return model, pk.graphed(model, images(**like)), images(**like, seed=1)


@over("batch, dtype", triton=product([1, 8], DTYPES), cuda=[(4, BF16)])
def test_replay_with_changed_input_equals_eager(batch, dtype, backend):
    model, g, _ = captured(batch, dtype=dtype)
    results = []
    for seed in (1, 2, 1):
        x = images(batch, dtype=dtype, seed=seed)
        y = g(x)
        assert torch.equal(y, eager(model, x))
        results.append(y.clone())
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_at_full_size():
    model, g, x = captured(8, size=224)
    assert torch.equal(g(x), eager(model, x))


def test_the_result_is_the_same_memory_in_every_call():
    _, g, x = captured()
    first = g(x)
    kept = first.clone()
    second = g(images(2, seed=2))
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(first, second)
    assert not torch.equal(kept, second)


def test_features():
    model, g, x = captured(features_only=True)
    for image in (x, images(2, seed=2)):
        maps = g(image)
        assert len(maps) == 4
        assert all(torch.equal(ours, others) for ours, others in zip(maps, eager(model, image), strict=True))


@pytest.mark.parametrize("layout", ["nchw", "sliced_hw", "transposed"])
def test_other_strides_are_copied(layout):
    model, g, x = captured()
    assert torch.equal(g(as_layout(x, layout)), eager(model, x))


def test_parameters_updated_in_place_are_seen():
    model, g, x = captured()
    before = g(x).clone()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)
    after = g(x)
    assert torch.equal(after, eager(model, x))
    assert not torch.equal(before, after)


def test_the_graph_keeps_the_weights_alive():
    model, g, x = captured()
    expected = eager(model, x)
    del model
    torch.cuda.empty_cache()
    torch.full((2**26,), torch.nan, device="cuda")  # what was freed would be NaN
    assert torch.equal(g(x), expected)


def test_autocast_is_captured():
    with torch.autocast("cuda", torch.bfloat16):
        model, g, x = captured(dtype=torch.float32)
        expected = eager(model, x)
    torch.full((2**26,), torch.nan, device="cuda")
    assert torch.equal(g(x), expected)


def test_on_another_stream():
    model, g, x = captured()
    expected = eager(model, x)
    assert torch.equal(computed_late(g, x), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_current():
    captured()  # torch's own capture stream now belongs to cuda:0
    model = s12(device="cuda:1").eval()
    g = pk.graphed(model, images(2, device="cuda:1"))
    x = images(2, seed=1, device="cuda:1")
    assert torch.equal(g(x), eager(model, x))
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="captured device cuda:1, got cuda:0"):
        g(x.to("cuda:0"))


@pytest.mark.host
def test_refusals_name_the_devices():
    """All others are in tests/test_graphed.py."""
    model, g, x = captured()
    with pytest.raises(ValueError, match="captured device cuda:0, got cpu"):
        g(x.cpu())
    with pytest.raises(ValueError, match="example must be a CUDA tensor, got one on cpu"):
        pk.graphed(model, x.cpu())
    with pytest.raises(ValueError, match=r"example's device cuda:0, but patch_embed.proj.weight is on cpu"):
        pk.graphed(model.cpu(), x)
