"""accelerate on the released configurations: logits and gradients within the error rule.

On a small odd image each of the fifteen runs at its full depth and width, m36 and m48 in inference alone. At
224 x 224 and at 193 x 257 runs one of either width of each source, the small one at its full depth and the
wide one with 1, 1, 2 and 1 blocks in its stages: apart from the depth, models of the same width are the same.
``pytest tests/test_accelerate_models.py --full-depth`` runs all fifteen there, each as it is (minutes, 4 GB).
LayerScale and norms are random: at the released initial values of 1e-5 a wrong branch would not show.
"""

import copy
from collections.abc import Sequence

import pytest
import torch
from support.accelerate import blocks_of, logits, results
from support.models import PUBLISHED
from support.peers import assert_as_accurate, poolformer_of_transformers, randomise_all, require
from support.problems import randn
from support.rule import assert_close_to_fp64
from torch import Tensor, nn

from poolformer_kernels.accelerate import accelerate, unfused_reasons
from poolformer_kernels.models import model_config

SIZES = [name.removeprefix("poolformer_") for name in PUBLISHED]  # s12, s24, s36, m36, m48
SOURCES = ("poolformer", "poolformerv2", "transformers")
DEPTHS = {name: model_config(f"poolformer_{name}").layers for name in SIZES}
REDUCED = (1, 1, 2, 1)


def make_model(source: str, size: str, depths: Sequence[int]) -> nn.Module:
    """The configuration with ``depths`` blocks in its stages and random parameters, in eval mode."""
    config = model_config(f"poolformer_{size}")
    with torch.device("meta"):  # their own initialisation takes longer than the test
        if source == "transformers":
            model = poolformer_of_transformers(1000, config.layers, config.dims)
            stages = model.poolformer.encoder.block
        else:
            model = require("timm").create_model(f"{source}_{size}")
            stages = [stage.blocks for stage in model.stages]
    assert tuple(map(len, stages)) == config.layers
    for stage, depth in zip(stages, depths, strict=True):
        del stage[depth:]
    return randomise_all(model.to_empty(device="cpu"))


def assert_right(model: nn.Module, x: Tensor, depths: Sequence[int]) -> None:
    """The error rule in the L2 norm: of the logits, of dx and of the gradients of all parameters together.

    Of a few numbers alone, as the gradient of StarReLU's scale, eager may be right by chance. In float32 a
    gradient that is wrong shows beside much larger ones.
    """
    eager = results(model, x)
    right = results(copy.deepcopy(model).double(), x.double())
    accelerate(model)
    blocks = blocks_of(model)
    assert len(blocks) == sum(depths)
    assert {unfused_reasons(block) for block in blocks} == {(None, None)}
    ours = results(model, x)
    kinds = {"logits": ["logits"], "dx": ["dx"], "gradients": [name for name, _ in model.named_parameters()]}
    for kind, names in kinds.items():
        joined = (torch.cat([found[name].flatten() for name in names]) for found in (ours, eager, right))
        assert_as_accurate(*joined, floor=4.5 * torch.finfo(torch.float32).eps, what=kind)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[2]])
@pytest.mark.parametrize("source", SOURCES)
def test_full_depth(source, size, kernels):
    """On six images: over 36 blocks eager's error of dx differs by a factor of three from image to image."""
    assert_right(make_model(source, size, DEPTHS[size]), randn(6, 3, 33, 47, mean=0.1), DEPTHS[size])


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES[3:])
@pytest.mark.parametrize("source", SOURCES)
@torch.inference_mode()
def test_logits_of_the_wide_models_at_full_depth(source, size, kernels):
    model, x = make_model(source, size, DEPTHS[size]), randn(2, 3, 33, 47, mean=0.1)
    eager = logits(model, x)
    exact = logits(model.double(), x.double())
    ours = logits(accelerate(model.float()), x)  # the same parameters again
    assert_close_to_fp64(ours, eager, exact, what="logits")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The models of `test_real_sizes`."""
    if "depths" in metafunc.fixturenames:
        full = metafunc.config.getoption("full_depth")
        models = list(DEPTHS.items()) if full else [("s12", DEPTHS["s12"]), ("m36", REDUCED)]
        metafunc.parametrize(("size", "depths"), models, ids=[size for size, _ in models])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("shape", [(224, 224), (193, 257)], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_real_sizes(source, size, depths, shape, kernels):
    assert_right(make_model(source, size, depths), randn(1, 3, *shape, mean=0.1), depths)
