"""Models of every family as objects: copies, files, layouts, dtypes, torch.compile."""

import copy

import pytest
import torch
from support.models import FAMILIES, small
from support.nn import COPIES
from support.peers import relative_error

import poolformer_kernels as pk
from poolformer_kernels.models import PoolFormer

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def with_its_state(model: PoolFormer) -> PoolFormer:
    """Another of the structure, which takes all values from the state dict."""
    other = copy.deepcopy(model)
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("copied", [*COPIES.values(), with_its_state], ids=[*COPIES, "state dict"])
def test_a_copy_computes_the_same(copied, family):
    model, x, _ = small(family)
    same = copied(model)
    assert same.config == model.config
    with torch.inference_mode():
        assert torch.equal(same(x), model(x))


def test_channels_last_equals_nchw(family):
    model, x, _ = small(family)
    last, x_last, _ = small(family, channels_last=True)
    with torch.inference_mode():
        maps, maps_last = model.forward_features(x), last.forward_features(x_last)
        assert maps.is_contiguous() or family == "PoolFormerV2"  # its maps come back in channels_last
        assert maps_last.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(maps_last, maps) < 1e-5
        assert relative_error(last(x_last), model(x)) < 1e-5


@pytest.mark.sampled(3)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_compiled_model_has_no_graph_break(gradients, family):
    torch.compiler.reset()
    model, x, _ = small(family)
    with torch.set_grad_enabled(gradients):
        y = torch.compile(model, backend="eager", fullgraph=True)(x)
        assert relative_error(y, model(x)) < 1e-6


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_is_near_and_trains(how, family):
    model, x, _ = small(family)
    exact = copy.deepcopy(model).double()(x.double())
    if how == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = model(x)
        with pk.use_backend("reference"):
            eager = model(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact) < min(0.03, 1.5 * relative_error(eager, exact) + 4e-3)
    y.float().square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == p.dtype, name
        assert torch.isfinite(p.grad).all(), name
