"""What tests of whole models share: models on no device, what a call leaves alone, what an error says."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.models import ModelConfig, PoolFormer, PoolFormerV2
from support.metaformer import SIZE, tiny
from support.peers import randomise
from support.problems import randn

PUBLISHED = {  # parameters, and MACs of fvcore at 224 x 224
    "poolformer_s12": (11_915_176, 1_822_678_528),
    "poolformer_s24": (21_388_968, 3_412_906_496),
    "poolformer_s36": (30_862_760, 5_003_134_464),
    "poolformer_m36": (56_172_520, 8_801_876_736),
    "poolformer_m48": (73_473_448, 11_590_708_992),
}


SMALL = ModelConfig("small", (1, 2, 1, 1), (16, 24, 32, 48), 1e-5, 0.1, None, 1.0)
MIXERS = ("pooling", "random_matrix", "attention", "spatial_fc")
FAMILIES = {
    "PoolFormer": lambda: PoolFormer(SMALL, 7),
    "timm's head": lambda: PoolFormer(SMALL, 7, head="timm"),
    "PoolFormerV2": lambda: PoolFormerV2(SMALL, 7),
    "MetaFormer": lambda: tiny(token_mixers=MIXERS, norm_layer="layer"),
    "convolutions": lambda: tiny(token_mixers="convolution", norm_layer="batch", act_layer="relu"),
    "no residual": lambda: tiny(residual=False),
}


def small(family: str, channels_last: bool = False) -> tuple[PoolFormer, torch.Tensor, torch.Tensor]:
    """A model of a family with random weights, and image batches of two sizes."""
    torch.manual_seed(0)
    model = randomise(FAMILIES[family]()).eval()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = (randn(batch, 3, *SIZE, seed=batch).to(memory_format=layout) for batch in (2, 5))
    return model.to(memory_format=layout), *images


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, mean=0.1, seed=seed)


def on_meta(name: str = "poolformer_s12", **options) -> PoolFormer:
    with torch.device("meta"):
        return pk.create_model(name, **options)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within, nothing of the model changes: values and where they lie, gradients, modes, hooks."""
    values = {key: value.clone() for key, value in model.state_dict().items()}
    facts, gradients = _facts(model), [p.grad for p in model.parameters()]
    yield
    assert _facts(model) == facts
    assert all(p.grad is grad for p, grad in zip(model.parameters(), gradients, strict=True))
    torch.testing.assert_close(dict(model.state_dict()), values, rtol=0, atol=0)


def _facts(model: nn.Module) -> list[tuple]:
    modules = [
        (name, m.training, [*m._forward_hooks], [*m._forward_pre_hooks]) for name, m in model.named_modules()
    ]
    parameters = [
        (name, p.device, p.dtype, p.stride(), p.data_ptr(), p._version, p.requires_grad)
        for name, p in model.named_parameters()
    ]
    return [*modules, *parameters, ("head_mode", getattr(model, "head_mode", None))]


@contextmanager
def raises(error: type[Exception], *words: str) -> Iterator[pytest.ExceptionInfo]:
    """As pytest.raises; all the words are in the message."""
    with pytest.raises(error) as caught:
        yield caught
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
