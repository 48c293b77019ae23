"""What the tests of exported weights share: our models, and those of other code bases with the weights."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

import poolformer_kernels as pk
from poolformer_kernels.models import ModelConfig, PoolFormer, PoolFormerV2, model_config
from support.metaformer import official_model
from support.peers import (
    poolformer_of_timm,
    poolformer_of_transformers,
    randomise_all,
    relative_error,
    require,
)
from support.problems import randn
from support.rule import assert_close_to_fp64

CLASSES = 7
LAYERS, DIMS = (1, 2, 3, 1), (16, 24, 40, 48)
SMALL = {"PoolFormer": PoolFormer, "PoolFormerV2": PoolFormerV2}  # families, for models of these sizes
HEAD = {"official": "official", "timm": "timm", "transformers": "official"}  # how each evaluates its weights
X = randn(2, 3, 48, 64)


def ours(name, head=None, num_classes=CLASSES, in_chans=3, features_only=False) -> PoolFormer:
    """A model by name, or a small one of a family."""
    torch.manual_seed(0)
    if name not in SMALL:
        return randomise_all(pk.create_model(name, num_classes, in_chans, head, features_only=features_only))
    config = ModelConfig("small", LAYERS, DIMS, 1e-5 if name == "PoolFormer" else None, 0.1, None, 1.0)
    options = {} if head is None else {"head": head}
    return randomise_all(SMALL[name](config, num_classes, in_chans, features_only=features_only, **options))


def plain(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without our notes, as another code base saves it."""
    return OrderedDict(model.state_dict().items())


class Official(nn.Module):
    """The official model as functions of its state dict."""

    def __init__(self, weights: dict[str, Tensor], layers: tuple[int, ...]) -> None:
        super().__init__()
        self.weights, self.layers = weights, layers

    def double(self) -> "Official":
        return Official({key: value.double() for key, value in self.weights.items()}, self.layers)

    def forward(self, x: Tensor) -> Tensor:
        return official_model(self.weights, x, self.layers)[1]


def peer(to: str, name: str, num_classes: int = CLASSES, in_chans: int = 3) -> nn.Module:
    """timm's or transformers' model of this name."""
    layers, dims = (LAYERS, DIMS) if name in SMALL else (model_config(name).layers, model_config(name).dims)
    if to == "transformers":
        return poolformer_of_transformers(num_classes, layers, dims, num_channels=in_chans)
    if name not in SMALL:
        return require("timm").create_model(name, num_classes=num_classes, in_chans=in_chans)
    version = 1 if name == "PoolFormer" else 2
    return poolformer_of_timm(layers, dims, num_classes, version, in_chans=in_chans)


def theirs(to: str, name: str, weights: dict[str, Tensor], *sizes: int) -> nn.Module:
    """The model of another code base with the exported weights, every one of them and no other."""
    if to == "official":
        return Official(weights, LAYERS if name in SMALL else model_config(name).layers)
    model = peer(to, name, *sizes)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def logits(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.inference_mode():
        y = model(x)
    return getattr(y, "logits", y)


def assert_same_logits(model: nn.Module, theirs: nn.Module, x: Tensor = X) -> None:
    """To rounding in float64, where an exchanged weight would show, and by the error rule in float32."""
    there, here = logits(theirs, x), logits(model, x)
    exact, exact_here = logits(theirs.double(), x.double()), logits(model.double(), x.double())
    assert relative_error(exact_here, exact) < 1e-12
    assert_close_to_fp64(here, there, exact)
