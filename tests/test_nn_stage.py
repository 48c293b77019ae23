"""The block's MLP sub-block and the stage: two kernels a block, statistics handed from one to the next."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.nn import gradients, make_block, official_block
from support.peers import relative_error
from support.problems import randn
from support.rule import assert_close_to_fp64
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import poolformer_kernels as pk
from poolformer_kernels.nn import DropPath, GroupNorm, Mlp, PoolFormerBlock, PoolFormerStage

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


def make_stage(blocks=3, **options) -> PoolFormerStage:
    return PoolFormerStage(*(make_block(seed=i, **options) for i in range(blocks)))


def official_stage(stage, x, **options):
    for block in stage:
        x = official_block(block, x, **options)
    return x


def calls_of(stage, x, grad=True) -> list[tuple[str, bool, bool]]:
    """The operators of one call on fake tensors: nothing is computed. See test_chain for inference."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(grad), Calls() as calls:
        stage(mode.from_tensor(x))
    return calls.made


@pytest.fixture
def mlp_calls(monkeypatch):
    """The arguments of every call of the MLP operator by a block."""
    calls, original = [], pk.nn.fusion.mlp_with_stats

    def counted(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(pk.nn.fusion, "mlp_with_stats", counted)
    return calls


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_stage_and_gradients_equal_the_official_formula(channels_last, dtype, training, backend):
    stage = make_stage(2).to(dtype).train(training)
    x = randn(3, 12, 9, 7, dtype=dtype, mean=-2.3, sigma=0.5)
    grad = randn(3, 12, 9, 7, dtype=dtype, mean=0.3, seed=1)
    exact = gradients(official_stage, copy.deepcopy(stage).double(), x.double(), grad.double())
    eager = gradients(official_stage, stage, x, grad)
    if channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    ours = gradients(lambda s, t: s(t), stage, x, grad)
    assert ours["y"].is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    for name, value in ours.items():
        scale = 4 * exact[name].abs()
        if name.endswith("norm1.bias"):  # pool minus identity cancels it: eager returns rounding noise
            scale = 4 * exact[name.replace("bias", "weight")].abs().max().expand(12)
            exact[name].zero_()
        assert value.dtype == dtype
        assert_close_to_fp64(value, eager[name], exact[name], scale=scale, what=name)


def test_handed_on_statistics_are_as_good_as_its_own(kernels):
    stage = make_stage(4)
    x, grad = randn(2, 12, 9, 7, mean=40.0), randn(2, 12, 9, 7, seed=1)
    exact = gradients(official_stage, copy.deepcopy(stage).double(), x.double(), grad.double())
    chained = gradients(lambda s, t: s(t), stage, x, grad)
    alone = gradients(lambda s, t: nn.Sequential(*s)(t), stage, x, grad)
    for name, value in chained.items():
        if not name.endswith("norm1.bias"):
            allowed = 1.5 * relative_error(alone[name], exact[name]) + 2 * torch.finfo(torch.float32).eps
            assert relative_error(value, exact[name]) <= allowed, name


def test_float64_is_the_formula():
    stage = make_stage(2).double()
    x = randn(2, 12, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(stage(x), official_stage(stage, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_residual_stream(dtype, backend):
    stage = make_stage(2)
    x = randn(3, 12, 9, 7, dtype=dtype, mean=-2.3, sigma=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        y, eager = stage(x), official_stage(stage, x)
    exact = official_stage(copy.deepcopy(stage).double(), x.double())
    assert y.dtype == dtype
    allowed = 1.5 * relative_error(eager, exact) + 4 * torch.finfo(dtype).eps  # rounded four times
    assert relative_error(y, exact) <= allowed


# ---- the MLP sub-block: one operator call, or the modules --------------------------------------------------


def test_second_sub_block_is_one_operator_call(mlp_calls, backend, monkeypatch):
    block = make_block(drop_path=0.3, save_hidden=True, act_layer=nn.SiLU)
    block.norm2.eps = 1e-3
    masks = [torch.ones(4), torch.tensor([0.0, 1.0, 0.0, 1.0])]
    draws = iter(masks)
    monkeypatch.setattr(DropPath, "sample", lambda self, x: next(draws) if self.training else None)
    block(randn(4, 12, 5, 5))
    block.eval()(randn(4, 12, 5, 5))
    (_, train), (parameters, infer) = mlp_calls
    assert [p is q for p, q in zip(parameters[1:], block.mlp.parameters(), strict=True)] == [True] * 4
    for options in (train, infer):
        assert options["residual"] is options["norm"] is options["save_hidden"] is True
        assert (options["activation"], options["eps"]) == ("silu", 1e-3)
        assert options["layer_scale"] is block.layer_scale_2
        assert options["norm_weight"] is block.norm2.weight
        assert options["norm_bias"] is block.norm2.bias
    assert train["drop_scale"] is masks[1]
    assert infer["drop_scale"] is None


def hook_norm(block, fired):
    block.norm2.register_forward_hook(lambda *_: fired.append("norm2"))


def hook_mlp(block, fired):
    block.mlp.register_forward_pre_hook(lambda *_: fired.append("mlp"))


def hook_mlp_backward(block, fired):
    block.mlp.register_full_backward_hook(lambda *_: fired.append("mlp"))


def hook_fc2(block, fired):
    block.mlp.fc2.register_forward_hook(lambda *_: fired.append("fc2"))


def hook_drop_path(block, fired):
    block.drop_path.register_forward_hook(lambda *_: fired.append("drop_path"))


def subclass_mlp(block, fired):
    class Own(Mlp):
        def forward(self, x):
            fired.append("mlp")
            return super().forward(x)

    block.mlp.__class__ = Own


def foreign_norm(block, fired):
    class Norm(GroupNorm):
        def forward(self, x):
            fired.append("norm")
            return super().forward(x)

    block.norm2.__class__ = Norm


def linear_mlp(block, fired):
    class Tokens(nn.Module):
        """fc1 and fc2 as linear layers between two permutations, as some forks have them."""

        def __init__(self, mlp):
            super().__init__()
            self.mlp = Mlp(12, 48, use_conv=False)
            self.mlp.load_state_dict(mlp.state_dict())

        def forward(self, x):
            fired.append("tokens")
            return self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    block.mlp = Tokens(block.mlp)


@pytest.mark.parametrize(
    "change",
    [
        *(hook_norm, hook_mlp, hook_mlp_backward, hook_fc2, hook_drop_path),
        *(subclass_mlp, foreign_norm, linear_mlp),
    ],
)
def test_hooks_and_foreign_modules_are_called(change, backend, mlp_calls):
    stage, fired = make_stage(2), []
    x, grad = randn(2, 12, 6, 5), randn(2, 12, 6, 5, seed=1)
    expected = gradients(lambda s, t: s(t), stage, x, grad)
    change(stage[0], fired)
    ours = gradients(lambda s, t: s(t), stage, x, grad)
    assert fired
    assert len(mlp_calls) == 3
    for name in ("y", "dx", "1.mlp.fc1.weight", "1.norm2.weight"):
        assert relative_error(ours[name], expected[name]) < 1e-5, name


def test_linear_layers_in_a_block_mean_what_their_modules_mean(mlp_calls):
    block = make_block()
    block.mlp = Mlp(5, use_conv=False)  # over the last dimension, the width
    x = randn(2, 12, 6, 5)
    assert block.mlp_unfused_reason() == "mlp has linear layers, not convolutions"
    n = F.group_norm(x, 1, block.norm1.weight, block.norm1.bias)
    y = x + block.layer_scale_1.view(-1, 1, 1) * (F.avg_pool2d(n, 3, 1, 1, count_include_pad=False) - n)
    n = F.group_norm(y, 1, block.norm2.weight, block.norm2.bias)
    branch = F.linear(F.gelu(F.linear(n, block.mlp.fc1.weight)), block.mlp.fc2.weight)
    assert relative_error(block(x), y + block.layer_scale_2.view(-1, 1, 1) * branch) < 1e-6
    assert not mlp_calls


def test_active_dropout_is_the_modules_own(backend, mlp_calls):
    block = make_block(drop=0.4)
    x = randn(3, 12, 6, 5)
    torch.manual_seed(3)
    y = block(x)
    middle = official_block(block, x, masks=(1.0, 0.0))
    n, mlp = F.group_norm(middle, 1, block.norm2.weight, block.norm2.bias), block.mlp
    torch.manual_seed(3)
    branch = mlp.drop(mlp.fc2(mlp.drop(mlp.act(mlp.fc1(n)))))
    assert relative_error(y, middle + block.layer_scale_2.view(-1, 1, 1) * branch) < 1e-6
    assert not mlp_calls
    block.eval()
    assert relative_error(block(x), official_block(block, x)) < 1e-6
    assert len(mlp_calls) == 1


# ---- the chain of statistics -------------------------------------------------------------------------------


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


def mark_hook(block, fired):
    block.register_forward_hook(lambda *_: fired.append("hook"))


def mark_pre_hook(block, fired):
    block.register_forward_pre_hook(lambda _, args: fired.append(len(args)))


def mark_forward(block, fired):
    original = block.forward
    block.forward = lambda x: fired.append("forward") or original(x)


def mark_class(block, fired):
    class Own(PoolFormerBlock):
        def forward(self, x):
            fired.append("class")
            return super().forward(x)

    block.__class__ = Own


def mark_compiled(block, fired):
    block._compiled_call_impl = lambda x: fired.append("compiled") or block.forward(x)


MARKS = [mark_hook, mark_pre_hook, mark_forward, mark_class, mark_compiled]


@pytest.mark.parametrize("mark", MARKS)
def test_a_marked_block_is_called_as_a_module(mark, kernels):
    stage, fired = make_stage(), []
    mark(stage[1], fired)
    assert calls_of(stage, randn(2, 12, 6, 5)) == 3 * [FIRST, LAST]
    assert len(fired) == 1


def test_global_hooks_see_every_block(backend):
    stage, seen = make_stage(), []
    x = randn(2, 12, 6, 5)
    expected = stage(x)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.append(module) if isinstance(module, PoolFormerBlock) else None
    )
    try:
        assert relative_error(stage(x), expected) < 1e-5
    finally:
        hook.remove()
    assert seen == list(stage)


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
    assert relative_error(y, official_block(block, x)) < 1e-5
    expected = pk.reference.merge_stats(pk.reference.sample_stats(y))
    torch.testing.assert_close(pk.reference.merge_stats(stats), expected, rtol=1e-5, atol=1e-5)


def test_compiled_stage_has_no_graph_break(backend):
    torch.compiler.reset()
    stage = make_stage(2, drop_path=0.5).eval()
    compiled = torch.compile(stage, backend="aot_eager", fullgraph=True)
    x, grad = randn(2, 12, 6, 5), randn(2, 12, 6, 5, seed=1)
    ours, expected = (gradients(lambda _, t, f=f: f(t), stage, x, grad) for f in (compiled, stage))
    for name, value in ours.items():
        if not name.endswith("norm1.bias"):
            assert relative_error(value, expected[name]) < 1e-5, name
    stage.train()
    assert torch.isfinite(compiled(x)).all()


# ---- modules as objects ------------------------------------------------------------------------------------


def test_a_stage_is_a_sequential(backend):
    stage, x = make_stage(), randn(2, 12, 6, 5)
    plain = nn.Sequential(*copy.deepcopy(list(stage)))
    assert list(stage.state_dict()) == list(plain.state_dict())
    expected = plain(x)
    for same in (stage, copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert relative_error(same(x), expected) < 1e-6
    assert type(stage[1:]) is PoolFormerStage
    assert relative_error(stage[1:](stage[:1](x)), expected) < 1e-6
    assert torch.equal(PoolFormerStage()(x), x)


def test_save_hidden_must_be_a_bool_or_none():
    with pytest.raises(TypeError, match="save_hidden must be a bool or None, got int"):
        PoolFormerBlock(4, save_hidden=1)


@pytest.mark.parametrize("norm", [GroupNorm, nn.BatchNorm2d])
def test_a_stage_hands_statistics_to_another_forward_with_stats(norm):
    """Set on the instance; also where the modules of the block are called one by one."""
    torch.manual_seed(0)
    stage = PoolFormerStage(*(PoolFormerBlock(8, norm_layer=norm) for _ in range(2))).train()
    seen, own = [], stage[1].forward_with_stats
    stage[1].forward_with_stats = lambda *args: seen.append(len(args)) or own(*args)
    stage(torch.randn(1, 8, 5, 5))
    assert seen == [3]
