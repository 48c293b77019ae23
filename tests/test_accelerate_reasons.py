"""What accelerate leaves alone: asserted by its reason, and by results that stay bitwise as they were."""

import copy

import numpy as np
import pytest
import torch
from support.accelerate import PoolFormerBlock, Pooling, blocks_of, image, logits, make_model
from support.peers import randomise, require
from torch import Tensor, nn
from torch.nn.utils import parametrize

import poolformer_kernels as pk
from poolformer_kernels.accelerate import accelerate, blocks, restore


def rows(model: nn.Module) -> dict[str, tuple[str, str]]:
    """By part: the backend and the reason."""
    return {call.path: (call.backend, call.reason) for call in pk.explain(model).calls}


HERE, BLOCK = "test_accelerate_reasons", "support.accelerate.PoolFormerBlock"
pytestmark = pytest.mark.filterwarnings("ignore:accelerate made nothing faster")
OTHER = "computes something else than its modules' names say"


def make_block(**options) -> nn.Module:
    torch.manual_seed(0)
    return randomise(PoolFormerBlock(**options)).eval()


def images() -> Tensor:
    return torch.randn((2, 16, 5, 6), generator=torch.Generator().manual_seed(1))


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs()


class OtherDrop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Quantised(nn.Parameter):
    """A weight that is more than its values."""


MIXERS = {
    "token_mixer is torch.nn.Conv2d, without 'pool'": lambda b: setattr(
        b, "token_mixer", nn.Conv2d(16, 16, 1)
    ),
    "token_mixer.pool is torch.nn.MaxPool2d, not AvgPool2d": lambda b: setattr(
        b.token_mixer, "pool", nn.MaxPool2d(3, 1, 1)
    ),
    "token_mixer.pool has count_include_pad=True": lambda b: setattr(
        b, "token_mixer", Pooling(count_include_pad=True)
    ),
    "token_mixer.pool has stride (2, 2), not 1": lambda b: setattr(b.token_mixer.pool, "stride", (2, 2)),
    "token_mixer.pool has kernel_size (3, 5), not odd and square": lambda b: setattr(
        b, "token_mixer", Pooling(kernel_size=(3, 5), padding=(1, 2))
    ),
    "token_mixer.pool has padding 0, not half its size": lambda b: setattr(b.token_mixer.pool, "padding", 0),
    "token_mixer.pool has divisor_override 7": lambda b: setattr(b.token_mixer.pool, "divisor_override", 7),
    "norm1 is torch.nn.BatchNorm2d, not GroupNorm": lambda b: setattr(b, "norm1", nn.BatchNorm2d(16)),
    "norm1 has 4 groups, not 1": lambda b: setattr(b, "norm1", nn.GroupNorm(4, 16)),
}
MLPS = {
    "norm2 is torch.nn.LayerNorm, not GroupNorm": lambda b: setattr(b, "norm2", nn.LayerNorm([16, 5, 6])),
    "mlp is torch.nn.Sequential, without 'fc1'": lambda b: setattr(
        b, "mlp", nn.Sequential(nn.Conv2d(16, 16, 1))
    ),
    "mlp.fc1 is not a 1x1 convolution of stride 1, without padding and groups": lambda b: setattr(
        b.mlp, "fc1", nn.Conv2d(16, 64, 3, 1, 1)
    ),
    "mlp.fc2 is torch.nn.Conv1d, not Conv2d": lambda b: setattr(b.mlp, "fc2", nn.Conv1d(64, 16, 1)),
    "mlp.act is test_accelerate_reasons.Squared, which computes none of gelu": lambda b: setattr(
        b.mlp, "act", Squared()
    ),
    "mlp.act is torch.nn.PReLU, which computes none of gelu": lambda b: setattr(b.mlp, "act", nn.PReLU()),
    "mlp.drop is torch.nn.Dropout2d, not Dropout or Identity": lambda b: setattr(
        b.mlp, "drop", nn.Dropout2d(0.5)
    ),
    "mlp.fc1 is torch.nn.utils.parametrize.ParametrizedConv2d, not Conv2d": lambda b: (
        parametrize.register_parametrization(b.mlp.fc1, "weight", nn.Identity())
    ),
    "mlp.fc2 has a weight of test_accelerate_reasons.Quantised, not a plain parameter": lambda b: setattr(
        b.mlp.fc2, "weight", Quantised(b.mlp.fc2.weight)
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
    assert table[other] == ("cpp", "asked for")
    if reason.startswith(
        ("mlp.fc2 is torch.nn.Conv1d", "token_mixer.pool has stride", "token_mixer.pool has padding")
    ):
        return  # it runs neither way
    accelerate(block, mlp=part == "mlp", mixer=part != "mlp")  # nothing that could be
    with torch.no_grad():
        assert torch.equal(block(images()), plain(images()))


def test_numpys_integers_are_integers(kernels):
    three, one = np.int64(3), np.int64(1)
    block = PoolFormerBlock(kernel_size=three, stride=one, padding=one)
    assert rows(accelerate(block)) == {"token_mixer": ("cpp", "asked for"), "mlp": ("cpp", "asked for")}
    expected = PoolFormerBlock()
    expected.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(images()), expected(images()))


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
    x, plain = images(), restore(copy.deepcopy(block))
    drawn = []
    for each in (block, plain):
        torch.manual_seed(0)
        drawn.append(each(x))
    torch.testing.assert_close(*drawn)
    assert (block(x) - drawn[0]).abs().max() > 1e-3


class ScaledNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("norm", "part"), [("norm1", "token_mixer"), ("norm2", "mlp")])
def test_modules_replaced_later_are_called(norm, part, kernels):
    block = accelerate(make_block())
    setattr(block, norm, ScaledNorm(1, 16))
    both = f"the forward of {BLOCK} {OTHER}"
    assert rows(block)[part] == ("modules", both)
    plain = restore(copy.deepcopy(block))
    torch.testing.assert_close(block(images()), plain(images()))
    setattr(block, norm, nn.GroupNorm(1, 16))
    assert rows(block)[part][0] == "cpp"
    assert (block(images()) - plain(images())).abs().max() > 1e-2


# ---- forwards that are not what they look like -------------------------------------------------------------


class PostNorm(PoolFormerBlock):
    pass


def post_norm(self, x):
    x = self.norm1(x + self.layer_scale_1[:, None, None] * self.token_mixer(x))
    return self.norm2(x + self.layer_scale_2[:, None, None] * self.mlp(x))


def forward_of(kind):
    """A class of this structure whose forward is another."""
    names = {"__init__": PoolFormerBlock.__init__}
    forwards = {
        "post norm": post_norm,
        "two arguments": lambda self, x, mask=None: PoolFormerBlock.forward(self, x),
        "raises": lambda self, x: x.no_such_method(),
        "dropped twice": lambda self, x: x + self.drop_path(PoolFormerBlock.forward(self, x) - x),
    }
    return type(f"Other{kind.title().replace(' ', '')}", (nn.Module,), names | {"forward": forwards[kind]})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "post norm",
            f"the forward of {HERE}.OtherPostNorm {OTHER}",
        ),
        (
            "dropped twice",
            f"the forward of {HERE}.OtherDroppedTwice {OTHER}",
        ),
        (
            "two arguments",
            "the forward of test_accelerate_reasons.OtherTwoArguments does not take one tensor",
        ),
        (
            "raises",
            f"the forward of {HERE}.OtherRaises could not be compared with ours: 'Tensor' object has no",
        ),
    ],
)
def test_other_forwards(kind, reason, monkeypatch):
    made = forward_of(kind)
    monkeypatch.setattr(made, "__init__", lambda self: nn.Module.__init__(self))
    block = made()
    vars(block).update(vars(make_block(drop_path=0.5)))
    accelerate(block)
    assert type(block) is made
    assert all(backend == "modules" and why.startswith(reason) for backend, why in rows(block).values())


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
    block = randomise(PostNorm())
    expected = block(images())
    assert isinstance(accelerate(block), PostNorm)
    assert rows(block)["mlp"][0] == "cpp"
    torch.testing.assert_close(block(images()), expected)


# ---- hooks -------------------------------------------------------------------------------------------------

HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, given, y: seen.append(y.shape)),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda m, given: seen.append(given[0].shape)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda m, i, o: seen.append(o[0].shape)),
}


@pytest.mark.parametrize("source", ["timm", "timm v2", "transformers", "official"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_inside_are_honoured_while_they_are_there(source, kind, kernels):
    block = accelerate(blocks_of(make_model(source, drop_path=0.9))[1])
    x = images().requires_grad_()
    run = lambda: block(x)[0] if source == "transformers" else block(x)  # noqa: E731
    inside = [(name, module) for name, module in block.named_modules() if name]
    assert len(inside) >= 9
    for name, module in inside:
        seen = []
        hook = HOOKS[kind](module, seen)
        assert any("has hooks" in why and backend == "modules" for backend, why in rows(block).values()), name
        run().sum().backward()
        assert seen, name
        hook.remove()
        count = len(seen)
        run().sum().backward()
        assert len(seen) == count, name
        assert {backend for backend, _ in rows(block).values()} == {"cpp"}


def test_hooks_around_blocks_and_stages_stay_with_the_operators(kernels):
    model, x, seen = accelerate(make_model("timm")), image(), []
    expected = logits(model, x)
    for module in model.modules():
        if type(module).__name__ in ("MetaFormerBlock", "Sequential"):
            module.register_forward_hook(lambda module, given, y: seen.append(type(module)))
    torch.testing.assert_close(logits(model, x), expected)  # statistics start anew behind a hook
    assert len(seen) == 5 + 4 + 1  # the head is a Sequential, too
    assert {backend for backend, _ in rows(model).values()} == {"cpp"}


def test_global_hooks_see_every_module():
    block, seen = accelerate(make_block()), []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        block(images())
    finally:
        hook.remove()
    assert seen == [
        *("GroupNorm", "AvgPool2d", "Pooling", "Identity"),
        *(
            "GroupNorm",
            "Conv2d",
            "GELU",
            "Dropout",
            "Conv2d",
            "Dropout",
            "Mlp",
            "Identity",
            "PoolFormerBlock",
        ),
    ]


def test_a_forward_on_the_instance_stays(kernels):
    block = make_block()
    block.forward = lambda x: x + 1
    x = images()
    assert torch.equal(accelerate(block)(x), x + 1)
    assert rows(block)["mlp"] == ("modules", "forward was set on the block itself")
    del block.forward
    block.mlp.forward = lambda x: x
    assert rows(block)["mlp"] == ("modules", "forward was set on mlp itself")


# ---- models ------------------------------------------------------------------------------------------------


def test_models_of_other_parts():
    timm = require("timm", "models.metaformer")
    options = {"depths": (1, 1, 1, 1), "dims": (32, 32, 32, 32), "num_classes": 3}
    model = timm.models.metaformer.MetaFormer(
        token_mixers=[timm.models.metaformer.SepConv] * 2 + [timm.models.metaformer.Attention] * 2,
        norm_layers=[timm.models.metaformer.LayerNorm2dNoBias] * 2
        + [timm.models.metaformer.LayerNormNoBias] * 2,
        **options,
    )
    classes, expected = [*map(type, model.modules())], pk.explain(model)
    assert accelerate(model) is model
    assert [*map(type, model.modules())] == classes
    assert pk.explain(model) == expected
    table = rows(model)
    assert table["stages.0.blocks.0.token_mixer"] == (
        "modules",
        "token_mixer is timm.models.metaformer.SepConv, without 'pool'",
    )
    assert table["stages.3.blocks.0.token_mixer"] == (
        "modules",
        "token_mixer is timm.models.metaformer.Attention, without 'pool'",
    )
    assert table["stages.0.blocks.0.mlp"] == (
        "modules",
        "norm2 is timm.models.metaformer.LayerNorm2dNoBias, not GroupNorm",
    )
    assert table["stages.3.blocks.0.mlp"] == (
        "modules",
        "norm2 is timm.models.metaformer.LayerNormNoBias, not GroupNorm",
    )


def test_attention_beside_a_fused_mlp(kernels):
    timm = require("timm", "models.metaformer").models.metaformer
    block = timm.MetaFormerBlock(16, timm.SepConv, norm_layer=timm.GroupNorm1, mlp_act=nn.GELU)
    expected = block(images())
    assert rows(accelerate(block))["mlp"] == ("cpp", "asked for")
    torch.testing.assert_close(block(images()), expected)


def test_own_layers_are_fast_already():
    model = pk.create_model("poolformer_s12", num_classes=2)
    classes, expected = [*map(type, model.modules())], pk.explain(model)
    assert accelerate(model) is model
    assert [*map(type, model.modules())] == classes
    assert pk.explain(model) == expected


def test_not_yet_accelerated():
    reason = "not accelerated: see poolformer_kernels.accelerate"
    block = make_block()
    assert rows(block) == {"token_mixer": ("modules", reason), "mlp": ("modules", reason)}
    assert rows(accelerate(block, mlp=False))["mlp"] == ("modules", "accelerate was called with mlp=False")


def test_refusals():
    with pytest.raises(
        ValueError, match=r"no block to accelerate in torch.nn.Linear; looked for timm MetaFormerBlock, H"
    ):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        accelerate("poolformer_s12")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        restore(None)
    for name in ("mixer", "mlp", "inplace"):
        with pytest.raises(TypeError, match=f"{name} must be a bool, got int"):
            accelerate(make_block(), **{name: 1})
    with pytest.raises(ValueError, match="mixer and mlp must not both be False"):
        accelerate(make_block(), mixer=False, mlp=False)


def test_classes_derived_further_are_not_undone():
    block = accelerate(make_block())
    made = type(block)
    block.__class__ = type("Sharded", (made,), {})  # as fully_shard does
    assert accelerate(block) is block
    assert type(block).__name__ == "Sharded"
    for options in ({"save_hidden": True}, {"mlp": False}):  # which could not be had
        with pytest.raises(
            RuntimeError, match=r"the block became \S*Sharded after accelerate\(\); undo that"
        ):
            accelerate(block, **options)
    with pytest.raises(RuntimeError, match=r"block '1\.block' became \S*Sharded after accelerate\(\)"):
        restore(nn.Sequential(nn.Identity(), nn.ModuleDict({"block": block})))
    with pytest.raises(
        RuntimeError, match=r"the block became \S*Sharded after accelerate\(\); undo that first"
    ):
        restore(block)
    block.__class__ = made
    assert type(restore(block)) is PoolFormerBlock
    assert blocks.recipe_of(block) is None
