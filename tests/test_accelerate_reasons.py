"""What accelerate leaves alone: asserted by its reason, and by results that stay bitwise as they were."""

import copy

import numpy as np
import pytest
import torch
from support.accelerate import PoolFormerBlock, Pooling, blocks_of, features, image, make_block, make_model
from support.nn import hook, setting
from support.peers import randomise, require
from support.problems import seeded
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import poolformer_kernels as pk
from poolformer_kernels.accelerate import accelerate, blocks, restore


def rows(model: nn.Module) -> dict[str, tuple[str, str]]:
    """By part: the backend and the reason."""
    return {call.path: (call.backend, call.reason) for call in pk.explain(model).calls}


pytestmark = pytest.mark.filterwarnings("ignore:accelerate made nothing faster")
OPERATOR = ("cpp", "asked for")


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs()


class OtherDrop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Quantised(nn.Parameter):
    """A weight that is more than its values."""


MIXERS = {
    "token_mixer is torch.nn.Conv2d, without 'pool'": setting("token_mixer", nn.Conv2d(16, 16, 1)),
    "token_mixer.pool is torch.nn.MaxPool2d, not AvgPool2d": setting(
        "token_mixer.pool", nn.MaxPool2d(3, 1, 1)
    ),
    "token_mixer.pool has count_include_pad=True": setting("token_mixer.pool.count_include_pad", True),
    "token_mixer.pool has stride (2, 2), not 1": setting("token_mixer.pool.stride", (2, 2)),
    "token_mixer.pool has kernel_size (3, 5), not odd and square": setting(
        "token_mixer", Pooling(kernel_size=(3, 5), padding=(1, 2))
    ),
    "token_mixer.pool has padding 0, not half its size": setting("token_mixer.pool.padding", 0),
    "token_mixer.pool has divisor_override 7": setting("token_mixer.pool.divisor_override", 7),
    "norm1 is torch.nn.BatchNorm2d, not GroupNorm": setting("norm1", nn.BatchNorm2d(16)),
    "norm1 has 4 groups, not 1": setting("norm1", nn.GroupNorm(4, 16)),
}
MLPS = {
    "norm2 is torch.nn.LayerNorm, not GroupNorm": setting("norm2", nn.LayerNorm([16, 5, 6])),
    "mlp is torch.nn.Sequential, without 'fc1'": setting("mlp", nn.Sequential(nn.Conv2d(16, 16, 1))),
    "mlp.fc1 is not a 1x1 convolution of stride 1, without padding and groups": setting(
        "mlp.fc1", nn.Conv2d(16, 64, 3, 1, 1)
    ),
    "mlp.fc2 is torch.nn.Conv1d, not Conv2d": setting("mlp.fc2", nn.Conv1d(64, 16, 1)),
    "mlp.act is test_accelerate_reasons.Squared, which computes none of gelu": setting("mlp.act", Squared()),
    "mlp.act is torch.nn.PReLU, which computes none of gelu": setting("mlp.act", nn.PReLU()),
    "mlp.drop is torch.nn.Dropout2d, not Dropout or Identity": setting("mlp.drop", nn.Dropout2d(0.5)),
    "mlp.fc1 is torch.nn.utils.parametrize.ParametrizedConv2d, not Conv2d": lambda block: (
        parametrize.register_parametrization(block.mlp.fc1, "weight", nn.Identity())
    ),
    "mlp.fc2 has a weight of test_accelerate_reasons.Quantised, not a plain parameter": lambda block: setattr(
        block.mlp.fc2, "weight", Quantised(block.mlp.fc2.weight)
    ),
}
CASES = [("token_mixer", *case) for case in MIXERS.items()] + [("mlp", *case) for case in MLPS.items()]


@pytest.mark.parametrize(("part", "reason", "change"), CASES, ids=[case[1] for case in CASES])
@pytest.mark.parametrize("when", ["before", "after"])
def test_one_part_is_left_alone(part, reason, change, when, kernels):
    block = make_block()
    if when == "after":
        accelerate(block)
    change(block)
    block.eval()
    plain = restore(copy.deepcopy(block))
    if when == "before":
        accelerate(block)
    other = "mlp" if part == "token_mixer" else "token_mixer"
    table = rows(block)
    assert table[part][0] == "modules"
    assert table[part][1].startswith(reason)
    assert table[other] == OPERATOR
    if reason.startswith(
        ("mlp.fc2 is torch.nn.Conv1d", "token_mixer.pool has stride", "token_mixer.pool has padding")
    ):
        return  # it runs neither way
    accelerate(block, mlp=part == "mlp", mixer=part != "mlp")  # nothing that could be
    with torch.no_grad():
        assert torch.equal(block(features()), plain(features()))


def test_numpys_integers_are_integers(kernels):
    three, one = np.int64(3), np.int64(1)
    block = PoolFormerBlock(kernel_size=three, stride=one, padding=one)
    assert rows(accelerate(block)) == {"token_mixer": OPERATOR, "mlp": OPERATOR}
    expected = PoolFormerBlock()
    expected.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(features()), expected(features()))


def test_drop_paths_of_another_kind():
    block = make_block()
    block.drop_path = OtherDrop()
    accelerate(block)
    assert type(block) is PoolFormerBlock
    reason = "drop_path is test_accelerate_reasons.OtherDrop, not DropPath or Identity"
    assert rows(block) == {"token_mixer": ("modules", reason), "mlp": ("modules", reason)}


def test_dropout_is_left_alone_while_it_drops(kernels):
    block = accelerate(make_block(drop=0.25))
    assert rows(block)["mlp"][0] == "cpp"
    block.train()
    assert rows(block)["mlp"] == ("modules", "mlp.drop is active (p = 0.25)")
    assert rows(block)["token_mixer"][0] == "cpp"
    x, plain = features(), restore(copy.deepcopy(block))
    drawn = [seeded(each, x) for each in (block, plain)]
    torch.testing.assert_close(*drawn)
    assert (block(x) - drawn[0]).abs().max() > 1e-3


# ---- forwards that are not what they look like -------------------------------------------------------------


def test_overridden_forwards():
    class Mine(PoolFormerBlock):
        def forward(self, x):
            return super().forward(x)

    block = accelerate(Mine())
    assert type(block) is Mine
    assert rows(block)["mlp"] == (
        "modules",
        "test_accelerate_reasons.test_overridden_forwards.<locals>.Mine overrides the forward of"
        " support.accelerate.PoolFormerBlock",
    )


def test_subclasses_without_a_forward_are_accelerated(kernels):
    derived = type("Derived", (PoolFormerBlock,), {})
    block = randomise(derived())
    expected = block(features())
    assert isinstance(accelerate(block), derived)
    assert rows(block)["mlp"][0] == "cpp"
    torch.testing.assert_close(block(features()), expected)


# ---- hooks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["timm", "timm v2", "transformers", "official"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_inside_are_honoured_while_they_are_there(source, kind, kernels):
    block = accelerate(blocks_of(make_model(source, drop_path=0.9))[1])
    x = features().requires_grad_()
    run = lambda: block(x)[0] if source == "transformers" else block(x)  # noqa: E731
    inside = [name for name, _ in block.named_modules() if name]
    assert len(inside) >= 9
    for name in inside:
        seen = []
        handle = hook(name, kind)(block, seen)
        assert any("has hooks" in why and backend == "modules" for backend, why in rows(block).values()), name
        run().sum().backward()
        assert seen, name
        handle.remove()
        seen.clear()
        run().sum().backward()
        assert not seen, name
        assert {backend for backend, _ in rows(block).values()} == {"cpp"}


def test_hooks_around_blocks_and_stages_stay_with_the_operators(kernels):
    model, x, seen = accelerate(make_model("timm")), image(), []
    expected = model(x)
    for module in model.modules():
        if type(module).__name__ in ("MetaFormerBlock", "Sequential"):
            module.register_forward_hook(lambda module, given, y: seen.append(type(module)))
    torch.testing.assert_close(model(x), expected)  # statistics start anew behind a hook
    assert len(seen) == 5 + 4 + 1  # the head is a Sequential, too
    assert {backend for backend, _ in rows(model).values()} == {"cpp"}


def test_global_hooks_see_every_module():
    block, seen = accelerate(make_block()), []
    with register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__)):
        block(features())
    assert seen == [
        *("GroupNorm", "AvgPool2d", "Pooling", "Identity", "GroupNorm"),
        *("Conv2d", "GELU", "Dropout", "Conv2d", "Dropout", "Mlp", "Identity", "PoolFormerBlock"),
    ]


def test_a_forward_on_the_instance_stays(kernels):
    block = make_block()
    block.forward = lambda x: x + 1
    x = features()
    assert torch.equal(accelerate(block)(x), x + 1)
    assert rows(block)["mlp"] == ("modules", "forward was set on the block itself")


# ---- models ------------------------------------------------------------------------------------------------


def test_attention_beside_a_fused_mlp(kernels):
    timm = require("timm", "models.metaformer").models.metaformer
    block = timm.MetaFormerBlock(16, timm.SepConv, norm_layer=timm.GroupNorm1, mlp_act=nn.GELU)
    expected = block(features())
    assert rows(accelerate(block))["mlp"] == ("cpp", "asked for")
    torch.testing.assert_close(block(features()), expected)


def test_refusals():
    looked_for = r"no block to accelerate in torch.nn.Linear; looked for timm MetaFormerBlock, H"
    with pytest.raises(ValueError, match=looked_for):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        accelerate("poolformer_s12")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        restore(None)
    with pytest.raises(ValueError, match="mixer and mlp must not both be False"):
        accelerate(make_block(), mixer=False, mlp=False)


def test_classes_derived_further_are_not_undone():
    block = accelerate(make_block())
    made = type(block)
    block.__class__ = type("Sharded", (made,), {})  # as fully_shard does
    assert accelerate(block) is block
    assert type(block).__name__ == "Sharded"
    refusal = r"the block became \S*Sharded after accelerate\(\); undo that first"
    for options in ({"save_hidden": True}, {"mlp": False}):  # which could not be had
        with pytest.raises(RuntimeError, match=refusal):
            accelerate(block, **options)
    with pytest.raises(RuntimeError, match=r"block '1\.block' became \S*Sharded after accelerate\(\)"):
        restore(nn.Sequential(nn.Identity(), nn.ModuleDict({"block": block})))
    with pytest.raises(RuntimeError, match=refusal):
        restore(block)
    block.__class__ = made
    assert type(restore(block)) is PoolFormerBlock
    assert blocks.recipe_of(block) is None
