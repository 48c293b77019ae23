"""Inference as one operator: no change of a model is missed, hooks fire, and nothing outlives the model."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from support import accelerate as blocks
from support.chain import ONE, RIGHT, by_reference, calls, images, infer, make_model
from support.nn import setting
from support.peers import randomise_all, relative_error
from support.problems import HALVES
from support.rule import assert_close_to_fp64
from torch import nn

from poolformer_kernels.accelerate import accelerate
from poolformer_kernels.models import PoolFormer
from poolformer_kernels.nn import Mlp, PoolFormerBlock, PoolFormerStage, chain_cache

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def x():
    return images(2, 3, 41, 33)


def ran(x, **options) -> tuple[PoolFormer, torch.Tensor]:
    """A model that has run as one operator, and its result."""
    model = make_model(**options)
    assert calls(model, x) == ONE
    logits = infer(model, x)
    assert relative_error(logits, by_reference(model, x)) < RIGHT
    return model, logits


# ---- never stale -------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def change_weight(model):
    with torch.no_grad():
        model.network[2][0].mlp.fc1.weight.mul_(1.5)


def change_vector(model):
    with torch.no_grad():
        model.network[2][1].layer_scale_1.add_(0.5)


def step_of_an_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model(images(2, 3, 32, 32, seed=5)).square().sum().backward()
    optimizer.step()


def negate_data(model):
    weight = model.patch_embed.proj.weight
    weight.data = -weight.data


def shorten_head(model):
    head = model.head
    head.weight.data, head.bias.data = -head.weight.data[:5], head.bias.data[:5]


def swap_blocks(model):
    stage = model.network[2]
    stage[0], stage[1] = stage[1], stage[0]


def reorder_blocks(model):
    blocks = model.network[2]._modules
    blocks["0"] = blocks.pop("0")


def double_weight(model):
    parametrize.register_parametrization(model.network[1].proj, "weight", Twice())


def put_subclass(model):
    class Other(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).relu()

    model.network[1].proj = randomise_all(Other(16, 33, 3, 2, 1), 4)


def change_class(model):
    """As tools that wrap layers in place do."""

    class Other(PoolFormerBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    model.network[0][0].__class__ = Other


def override_features(model):
    model.forward_features = lambda x: x[:, :1].expand(-1, model.num_features, -1, -1)


CHANGES = {
    "weight in place": change_weight,
    "vector in place": change_vector,
    "optimizer step": step_of_an_optimizer,
    "data": negate_data,
    "other shape": shorten_head,
    "state dict": lambda model: model.load_state_dict(make_model(seed=1).state_dict()),
    "state dict assigned": lambda model: model.load_state_dict(make_model(seed=1).state_dict(), assign=True),
    "eps of a block": setting("network.0.0.norm1.eps", 10.0),
    "eps of the mlp's norm": setting("network.0.0.norm2.eps", 10.0),
    "eps of the head": setting("norm.eps", 10.0),
    "number of groups": setting("network.0.0.norm2.num_groups", 4),
    "pool size": setting("network.0.0.token_mixer.pool_size", 5),
    "stride": setting("network.1.proj.stride", (1, 1)),
    "padding": setting("network.1.proj.padding", (0, 0)),
    "dilation": setting("network.1.proj.dilation", (2, 2)),
    "parameter removed": setting("network.2.0.layer_scale_2", None),
    "bias removed": setting("network.1.proj.bias", None),
    "mlp replaced": setting("network.2.0.mlp", randomise_all(Mlp(33, 50, act_layer=nn.SiLU), 4)),
    "norm replaced": setting("network.2.0.norm1", nn.GroupNorm(3, 33)),
    "mixer replaced": setting("network.0.0.token_mixer", nn.Identity()),
    "block replaced": setting("network.2.1", nn.Identity()),
    "block appended": lambda model: model.network[4].append(randomise_all(PoolFormerBlock(40), 4)),
    "block removed": lambda model: model.network[2].pop(1),
    "blocks swapped": swap_blocks,
    "order changed": reorder_blocks,
    "stage replaced": setting("network.0", nn.Sequential(randomise_all(PoolFormerBlock(16), 4))),
    "convolution replaced": setting("network.1.proj", randomise_all(nn.Conv2d(16, 33, 5, 2, 2), 4)),
    "classifier reset": lambda model: model.reset_classifier(9),
    "classifier left out": lambda model: model.reset_classifier(0),
    "head of several layers": lambda model: setattr(model, "head", nn.Sequential(model.head, nn.ReLU())),
    "head mode": setting("head_mode", "timm"),
    "activation replaced": setting("network.2.0.mlp.act", nn.ReLU()),
    "activation unknown": setting("network.2.0.mlp.act", nn.Tanh()),
    "activation changed": setting("network.2.0.mlp.act.approximate", "tanh"),
    "forward of an mlp": setting("network.2.0.mlp.forward", torch.ones_like),
    "forward of a convolution": setting("network.1.proj.forward", lambda x: x.new_ones(2, 33, 5, 4)),
    "features overridden": override_features,
    "block overridden": setting("network.0.0.forward_with_stats", lambda x, *_: (2 * x, None)),
    "parametrized": double_weight,
    "subclass": put_subclass,
    "class changed": change_class,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name, x):
    model, before = ran(x)
    CHANGES[name](model)
    after, exact = infer(model, x), by_reference(model, x)
    assert relative_error(after, exact) < RIGHT
    if before.shape == exact.shape:  # the stale result would be seen
        assert relative_error(before, exact) > 5 * RIGHT
    assert torch.equal(infer(model, x), after)


def test_a_weight_becomes_an_attribute(x):
    model, before = ran(x)
    proj = model.network[1].proj
    proj.weight.data = -proj.weight.data
    exact = by_reference(model, x)
    proj.weight.data = -proj.weight.data
    weight = proj._parameters.pop("weight")
    proj.weight = -weight.detach()
    assert relative_error(infer(model, x), exact) < RIGHT
    assert relative_error(before, exact) > 0.1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_dtype_is_changed(dtype, x):
    model, before = ran(x)
    (model.half if dtype == torch.float16 else model.bfloat16)()
    narrow = x.to(dtype)
    assert calls(model, narrow) == ONE
    logits = infer(model, narrow)
    assert logits.dtype == dtype
    exact = by_reference(model, narrow)
    assert_close_to_fp64(logits, by_reference(model, narrow, dtype), exact)
    assert relative_error(before, exact) > 1e-4
    model.float()
    assert relative_error(infer(model, x), by_reference(model, x)) < RIGHT


def test_a_copy_and_a_pickle_are_models_of_their_own(x):
    model, before = ran(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert calls(twin, x) == ONE
        assert torch.equal(infer(twin, x), before)
        twin.head_mode = "timm"
        assert relative_error(infer(twin, x), before) > 1e-2
        assert torch.equal(infer(model, x), before)


def test_functional_call(x):
    model, before = ran(x)
    other = make_model(seed=1)
    with torch.no_grad():
        logits = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
    assert torch.equal(logits, infer(other, x))
    assert relative_error(logits, before) > 0.1
    assert torch.equal(infer(model, x), before)


def test_stochastic_depth_and_dropout_in_training_mode(x):
    model, before = ran(x, drop_path_rate=0.9)
    model.network[0][0].mlp.drop.p = 0.5
    for part, count in ((model, 5), (model.network[0][0].mlp, 1)):
        part.train()
        assert len({tuple(infer(model, x).flatten().tolist()) for _ in range(6)}) >= min(count, 3)
        model.eval()
        assert calls(model, x) == ONE
        assert torch.equal(infer(model, x), before)


PLACES = ["patch_embed", "patch_embed.proj", "network.1.proj", "network.0", "network.2.1", "norm", "head"]
INSIDE = ("norm1", "token_mixer", "mlp", "mlp.act", "mlp.fc2", "drop_path")
PLACES += [f"network.0.0.{name}" for name in INSIDE]


@pytest.mark.parametrize("name", PLACES)
def test_a_hook_fires_until_it_is_removed(name, x):
    model, before = ran(x)
    fired = []
    inner = model.get_submodule(name)
    with inner.register_forward_hook(lambda *_: fired.append(name)):
        assert calls(model, x) != ONE
        assert fired == [name] * (2 if name.endswith("drop_path") else 1)
        assert relative_error(infer(model, x), before) < RIGHT
    with inner.register_forward_pre_hook(lambda _, args: (args[0].square(),)):
        assert relative_error(infer(model, x), before) > 1e-3
    fired.clear()
    assert calls(model, x) == ONE
    assert torch.equal(infer(model, x), before)
    assert fired == []


def test_hooks_of_the_model_itself_and_of_all_modules(x):
    model, before = ran(x)
    fired = []
    with model.register_forward_hook(lambda *_: fired.append(0)):
        assert calls(model, x) == ONE
    assert fired == [0]
    with nn.modules.module.register_module_forward_hook(lambda module, *_: fired.append(type(module))):
        assert "chain_cpp" not in calls(model, x)
    assert {PoolFormer, PoolFormerBlock, nn.Conv2d, nn.Linear} <= set(fired)
    assert torch.equal(infer(model, x), before)
    assert calls(model, x) == ONE


def test_a_compiled_block_is_called(x):
    model, before = ran(x)
    seen = []
    model.network[2][0].compile(backend=lambda graph, _: seen.append(0) or graph.forward)
    torch._dynamo.reset()
    assert relative_error(infer(model, x), before) < RIGHT
    assert seen


# ---- nothing outlives a model ------------------------------------------------------------------------------


def wrap_forward(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


KEPT = {
    "as it is": lambda model: None,
    "forward wrapped": wrap_forward,
    "stage's forward wrapped": lambda model: wrap_forward(model.network[0]),
    "known to a part": lambda model: setattr(model.network[0], "owner", [model]),
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
def test_a_model_is_collected(change, x):
    model, _ = ran(x)
    change(model)
    infer(model, x)
    alive = [weakref.ref(t) for t in (model, model.network[0], model.head.weight)]
    del model
    gc.collect()
    assert [ref() is None for ref in alive] == [True] * 3


@pytest.mark.parametrize("where", ["norm1", "norm2"])
def test_a_parameter_that_is_computed_is_never_stale(where):
    """The norms of an accelerated block may be of any class derived from GroupNorm."""
    torch.manual_seed(0)
    block, x = blocks.PoolFormerBlock(), images(2, 16, 9, 7)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.3)
    parametrize.register_parametrization(block.get_submodule(where), "weight", Twice())
    plain = copy.deepcopy(block).eval()
    accelerate(block.eval())
    for _ in range(2):
        assert relative_error(infer(block, x), infer(plain, x)) < RIGHT
        with torch.no_grad():
            for p in (*block.parameters(), *plain.parameters()):
                p.mul_(1.5)


def test_no_cache_is_seen_half_built(x, monkeypatch):
    """By another thread's inference."""
    seen, collect = [], chain_cache._collect
    monkeypatch.setattr(
        chain_cache, "_collect", lambda root: seen.append(vars(root)[chain_cache.PLACE]) or collect(root)
    )
    assert calls(make_model(), x) == ONE
    assert seen == [None]


def test_a_layer_scale_that_is_a_buffer(x):
    """It is no parameter, and a chain that has read it must not keep it."""
    model = PoolFormerStage(PoolFormerBlock(x.shape[1], layer_scale_init_value=1.0)).eval()
    block = model[0]
    del block.layer_scale_1
    block.register_buffer("layer_scale_1", torch.ones(x.shape[1]))
    with torch.inference_mode():
        first = model(x)
        block.layer_scale_1 = torch.zeros(x.shape[1])
        second, expected = model(x), block(x)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, expected)
