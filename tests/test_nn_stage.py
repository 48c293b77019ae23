"""The stage: two kernels a block, statistics handed from one to the next."""

import copy

import pytest
import torch
from support.nn import gradients, hook, instance_forward, make_block, make_stage, official_stage, subclass
from support.peers import assert_as_accurate, relative_error
from support.problems import randn
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

import poolformer_kernels as pk
from poolformer_kernels.nn import GroupNorm, PoolFormerBlock, PoolFormerStage

# one call of an operator: name, given its input's statistics, asked for its output's
FIRST, MIXER = ("pool_mixer_cpp", False, True), ("pool_mixer_cpp", True, True)
MLP, LAST = ("mlp_cpp", True, True), ("mlp_cpp", True, False)
CHAIN = [FIRST, MLP, MIXER, MLP, MIXER, LAST]  # three blocks


class Calls(TorchDispatchMode):
    """Our operators' calls in their order, as `CHAIN`."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "poolformer_kernels":
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            if "return_stats" in named:
                self.made.append(
                    (func._overloadpacket.__name__, named["stats"] is not None, named["return_stats"])
                )
        return func(*args, **(kwargs or {}))


def calls_of(stage, x, grad=True) -> list[tuple[str, bool, bool]]:
    """The operators of one call on fake tensors: nothing is computed. See test_chain for inference."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(grad), Calls() as calls:
        stage(mode.from_tensor(x))
    return calls.made


@pytest.mark.parametrize("grad", [False, True])
def test_a_block_is_two_kernels_and_reads_nothing_to_normalise_it(grad, kernels):
    assert calls_of(make_stage(drop_path=0.1), randn(2, 12, 6, 5), grad) == CHAIN
    assert calls_of(make_block(), randn(2, 12, 6, 5), grad) == [FIRST, LAST]
    assert calls_of(nn.Sequential(make_block(), make_block()), randn(2, 12, 6, 5), grad) == 2 * [FIRST, LAST]


def test_a_model_starts_its_statistics_once_a_stage(kernels):
    model = pk.create_model("poolformer_s12").eval()
    calls = calls_of(model, randn(1, 3, 64, 64))
    assert [name for name, *_ in calls] == [MIXER[0], MLP[0]] * 12
    assert [i for i, (_, given, _) in enumerate(calls) if not given] == [0, 4, 8, 20]
    assert [i for i, (*_, asked) in enumerate(calls) if not asked] == [3, 7, 19, 23]


def test_the_kernels_hand_on_what_the_chain_asks_for(kernels):
    stage, x = make_stage(), randn(2, 12, 6, 5)
    with Calls() as calls:
        y = stage(x)
    assert calls.made == CHAIN
    assert relative_error(y.detach(), official_stage(stage, x)) < 1e-5


def test_the_reference_computes_no_statistics_to_hand_on(monkeypatch):
    stage = make_stage()
    monkeypatch.setattr(pk.reference, "sample_stats", lambda x: pytest.fail("statistics in another pass"))
    with pk.use_backend("reference"):
        stage(randn(2, 12, 6, 5))


def test_handed_on_statistics_are_as_good_as_its_own(kernels):
    stage = make_stage(4)
    x, grad = randn(2, 12, 9, 7, mean=40.0), randn(2, 12, 9, 7, seed=1)
    exact = gradients(copy.deepcopy(stage).double(), x.double(), grad.double(), official_stage)
    alone = gradients(stage, x, grad, lambda s, t: nn.Sequential(*s)(t))
    for name, value in gradients(stage, x, grad).items():
        if not name.endswith("norm1.bias"):
            floor = 2 * torch.finfo(torch.float32).eps
            assert_as_accurate(value, alone[name], exact[name], floor, name)


def compiled(block, fired):
    block._compiled_call_impl = lambda x: fired.append("compiled") or block.forward(x)


@pytest.mark.parametrize("mark", [hook(""), hook("", "pre"), instance_forward(""), subclass(""), compiled])
def test_a_marked_block_is_called_as_a_module(mark, kernels):
    stage, fired = make_stage(), []
    mark(stage[1], fired)
    assert calls_of(stage, randn(2, 12, 6, 5)) == 3 * [FIRST, LAST]
    assert len(fired) == 1


def test_global_hooks_see_every_block(backend):
    stage, seen = make_stage(), []
    x = randn(2, 12, 6, 5)
    expected = stage(x)
    with register_module_forward_hook(lambda module, *_: seen.append(module)):
        assert relative_error(stage(x), expected) < 1e-5
    assert [module for module in seen if isinstance(module, PoolFormerBlock)] == list(stage)


def test_hooks_on_a_models_blocks_see_their_features(backend):
    model, seen = pk.create_model("poolformer_s12", num_classes=5).eval(), []
    x = randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        for stage in model.network[::2]:
            for block in stage:
                block.register_forward_hook(lambda _, args, y: seen.append(y))
        assert relative_error(model(x), logits) < 1e-5
    assert [y.shape[1] for y in seen] == [64] * 2 + [128] * 2 + [320] * 6 + [512] * 2
    assert relative_error(seen[-1], features) < 1e-5


def test_the_chain_goes_around_what_takes_no_statistics(kernels):
    x = randn(2, 12, 6, 5)
    stage = make_stage()
    stage[1].norm1.register_forward_hook(lambda *_: None)  # its mixer runs as modules
    assert calls_of(stage, x) == [FIRST, LAST, ("mlp_cpp", False, True), MIXER, LAST]
    stage = make_stage()
    stage[1].norm2.register_forward_hook(lambda *_: None)  # its MLP runs without norm and residual
    mixer, mlp = ("pool_mixer_cpp", True, False), ("mlp_cpp", False, False)
    assert calls_of(stage, x) == [FIRST, MLP, mixer, mlp, FIRST, LAST]
    stage.insert(1, nn.ReLU())
    assert calls_of(stage, x) == [FIRST, LAST, ("pool_mixer_cpp", False, False), mlp, FIRST, LAST]


def test_statistics_of_x_are_dropped_where_modules_read_it(kernels):
    block, x = make_block(), randn(2, 12, 6, 5)
    block.norm1.register_forward_hook(lambda *_: None)
    y, stats = block.forward_with_stats(x, pk.reference.sample_stats(3 * x + 1), return_stats=True)
    assert relative_error(y, official_stage([block], x)) < 1e-5
    expected = pk.reference.merge_stats(pk.reference.sample_stats(y))
    torch.testing.assert_close(pk.reference.merge_stats(stats), expected, rtol=1e-5, atol=1e-5)


def test_a_stage_is_a_sequential(backend):
    stage, x = make_stage(), randn(2, 12, 6, 5)
    plain = nn.Sequential(*stage)
    assert list(stage.state_dict()) == list(plain.state_dict())
    expected = plain(x)
    assert relative_error(stage(x), expected) < 1e-6
    assert type(stage[1:]) is PoolFormerStage
    assert relative_error(stage[1:](stage[:1](x)), expected) < 1e-6
    assert torch.equal(PoolFormerStage()(x), x)


@pytest.mark.parametrize("norm", [GroupNorm, nn.BatchNorm2d])
def test_a_stage_hands_statistics_to_another_forward_with_stats(norm):
    """Set on the instance; also where the modules of the block are called one by one."""
    torch.manual_seed(0)
    stage = PoolFormerStage(*(PoolFormerBlock(8, norm_layer=norm) for _ in range(2))).train()
    seen, own = [], stage[1].forward_with_stats
    stage[1].forward_with_stats = lambda *args: seen.append(len(args)) or own(*args)
    stage(torch.randn(1, 8, 5, 5))
    assert seen == [3]
