"""Block and stage against the official formula written out here; when operators run and when the modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.layouts import FORMATS
from support.nn import gradients, hook, make_block, make_stage, official_block, official_stage, subclass
from support.peers import assert_as_accurate, randomise, relative_error, require
from support.problems import randn, seeded
from support.rule import assert_close_to_fp64
from torch import nn

from poolformer_kernels.nn import DropPath, Mlp, PoolFormerBlock, PoolMixer

BLOCK_KEYS = ["layer_scale_1", "layer_scale_2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
BLOCK_KEYS += ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"pool_size": 5}, {"use_layer_scale": False}, {"mlp_ratio": 2.5}], ids=str
)
def test_stage_and_gradients_equal_the_official_formula(options, dtype, training, layout, backend):
    stage = make_stage(2, **options).to(dtype).train(training)
    assert stage[0].token_mixer.pool_size == options.get("pool_size", 3)  # with which the formula is computed
    x = randn(3, 12, 9, 7, dtype=dtype, mean=-2.3, sigma=0.5)
    grad = randn(3, 12, 9, 7, dtype=dtype, mean=0.3, seed=1)
    exact = gradients(copy.deepcopy(stage).double(), x.double(), grad.double(), official_stage)
    eager = gradients(stage, x, grad, official_stage)
    ours = gradients(stage, *(t.contiguous(memory_format=FORMATS[layout]) for t in (x, grad)))
    assert ours["y"].is_contiguous(memory_format=FORMATS[layout])
    for name, value in ours.items():
        scale = 4 * exact[name].abs()
        if name.endswith("norm1.bias"):  # pool minus identity cancels it: eager returns rounding noise
            scale = 4 * exact[name.replace("bias", "weight")].abs().max().expand(12)
            exact[name].zero_()
        assert value.dtype == dtype
        assert_close_to_fp64(value, eager[name], exact[name], scale=scale, what=name)


def test_float64_is_the_formula():
    stage = make_stage(2).double()
    x = randn(2, 12, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(stage(x), official_stage(stage, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_autocast_keeps_the_residual_stream_of_x(dtype, blocks, backend):
    stage, autocast = make_stage(blocks), torch.autocast("cpu", torch.bfloat16)
    x, grad = randn(3, 12, 9, 7, dtype=dtype, mean=-2.3, sigma=0.5), randn(3, 12, 9, 7, seed=1).to(dtype)
    ours = gradients(stage, x, grad, autocast(nn.Module.__call__))
    eager = gradients(stage, x, grad, autocast(official_stage))
    exact = gradients(copy.deepcopy(stage).double(), x.double(), grad.double(), official_stage)
    # eager widens to float32 at the LayerScale, a bfloat16 stream is rounded twice: once per sub-block
    rounding = 2 * blocks * torch.finfo(dtype).eps
    for name, value in ours.items():
        assert value.dtype == (dtype if name in ("y", "dx") else torch.float32), name
        if name == "y" or (blocks == 1 and not name.endswith("norm1.bias")):  # of a few numbers it is luck
            assert_as_accurate(value, eager[name], exact[name], rounding, name)


def test_pool_mixer_module():
    mixer = randomise(PoolMixer(6, pool_size=5, eps=1e-3))
    mixer.weight.data.uniform_(0.5, 1.5)
    x, grad = randn(2, 6, 7, 5, mean=3.0), randn(2, 6, 7, 5, seed=1)

    def formula(m, t):
        n = F.group_norm(t, 1, m.weight, m.bias, 1e-3)
        return F.avg_pool2d(n, 5, 1, 2, count_include_pad=False) - n

    exact = gradients(copy.deepcopy(mixer).double(), x.double(), grad.double(), formula)
    ours, eager = gradients(mixer, x, grad), gradients(mixer, x, grad, formula)
    for name in ("y", "dx", "weight"):
        assert_close_to_fp64(ours[name], eager[name], exact[name], scale=4 * exact[name].abs(), what=name)
    assert ours["bias"].abs().max() < 1e-5
    assert list(mixer.state_dict()) == ["weight", "bias"]
    fresh = PoolMixer(4)
    assert torch.equal(fresh.weight, torch.ones(4))
    assert torch.equal(fresh.bias, torch.zeros(4))


# ---- operator calls, or the modules ------------------------------------------------------------------------


def test_a_block_is_two_operator_calls(operator_calls, backend, monkeypatch):
    block = make_block(drop_path=0.3, pool_size=5, save_hidden=True, act_layer=nn.SiLU)
    block.norm2.eps = 1e-3
    masks = [torch.ones(4), torch.tensor([0.0, 1.0, 0.0, 1.0])]
    draws = iter(masks)
    monkeypatch.setattr(DropPath, "sample", lambda self, x: next(draws) if self.training else None)
    for training, drop_scales in ((True, masks), (False, [None, None])):
        operator_calls.clear()
        block.train(training)(randn(4, 12, 5, 5))
        mixer, mlp = operator_calls
        assert (mixer.name, mlp.name) == ("pool_mixer", "mlp")
        settings = [mixer.options[name] for name in ("residual", "pool_size", "eps")]
        assert settings == [True, 5, 1e-5]
        settings = [mlp.options[name] for name in ("residual", "norm", "activation", "eps", "save_hidden")]
        assert settings == [True, True, "silu", 1e-3, True]
        tensors = [*mixer.args[1:], *(mixer.options[name] for name in ("layer_scale", "drop_scale"))]
        names = ("norm_weight", "norm_bias", "layer_scale", "drop_scale")
        tensors += [*mlp.args[1:], *(mlp.options[name] for name in names)]
        expected = [*block.norm1.parameters(), block.layer_scale_1, drop_scales[0]]
        expected += [*block.mlp.parameters(), *block.norm2.parameters(), block.layer_scale_2, drop_scales[1]]
        assert [t is wanted for t, wanted in zip(tensors, expected, strict=True)] == [True] * 12


def foreign_mixer(stage, fired):
    class Mixer(nn.Module):
        def forward(self, x):
            fired.append("mixer")
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x

    stage[0].token_mixer = Mixer()


def linear_mlp(stage, fired):
    class Tokens(nn.Module):
        """fc1 and fc2 as linear layers between two permutations, as some forks have them."""

        def __init__(self, mlp):
            super().__init__()
            self.mlp = Mlp(12, 48, use_conv=False)
            self.mlp.load_state_dict(mlp.state_dict())

        def forward(self, x):
            fired.append("tokens")
            return self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    stage[0].mlp = Tokens(stage[0].mlp)


CHANGES = {  # by the operators that the changed block still calls
    ("mlp",): [
        *(hook("0.norm1"), hook("0.token_mixer", "pre"), hook("0.token_mixer", "backward")),
        *(subclass("0.norm1"), foreign_mixer),
    ],
    ("pool_mixer",): [
        *(hook("0.norm2"), hook("0.mlp", "pre"), hook("0.mlp", "backward"), hook("0.mlp.fc2")),
        *(subclass("0.norm2"), subclass("0.mlp"), linear_mlp),
    ],
    (): [hook("0.drop_path")],
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("change", "left"), [(change, left) for left, changes in CHANGES.items() for change in changes]
)
def test_hooks_and_foreign_modules_are_called(change, left, layout, backend, operator_calls):
    stage, fired = make_stage(2), []
    x, grad = (randn(2, 12, 6, 5, seed=i).contiguous(memory_format=FORMATS[layout]) for i in range(2))
    expected = gradients(stage, x, grad)
    change(stage, fired)
    operator_calls.clear()
    ours = gradients(stage, x, grad)
    assert fired
    assert [call.name for call in operator_calls] == [*left, "pool_mixer", "mlp"]
    for name in ("y", "dx", "1.mlp.fc1.weight", "1.norm2.weight"):
        assert relative_error(ours[name], expected[name]) < 1e-6, name
    assert ours["y"].stride() == expected["y"].stride()


def test_plain_group_norm_of_one_group_takes_the_operator(operator_calls):
    x = randn(2, 12, 6, 5)
    block = make_block()
    expected = block(x)
    norm = nn.GroupNorm(1, 12)
    norm.load_state_dict(block.norm1.state_dict())
    block.norm1 = norm
    assert torch.equal(block(x), expected)
    assert [call.name for call in operator_calls] == ["pool_mixer", "mlp"] * 2


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, lambda dim: nn.GroupNorm(3, dim), nn.InstanceNorm2d])
def test_other_norms_use_their_own_statistics(norm_layer, operator_calls):
    block = make_block(norm_layer=norm_layer)
    x = randn(2, 12, 6, 5, mean=1.0)
    n = norm_layer(12)(x)
    if not isinstance(block.norm1, nn.InstanceNorm2d):
        block.norm1.load_state_dict(norm_layer(12).state_dict())
    mixed = F.avg_pool2d(n, 3, 1, 1, count_include_pad=False) - n
    after = []
    block.norm2.register_forward_pre_hook(lambda _, args: after.append(args[0]))
    block(x)
    assert not operator_calls
    assert relative_error(after[0], x + block.layer_scale_1.view(-1, 1, 1) * mixed) < 1e-6


def test_linear_layers_in_a_block_mean_what_their_modules_mean(operator_calls):
    block, x = make_block(), randn(2, 12, 6, 5)
    y = official_block(block, x, masks=(1.0, 0.0))
    block.mlp = Mlp(5, use_conv=False)  # over the last dimension, the width
    assert block.mlp_unfused_reason() == "mlp has linear layers, not convolutions"
    n = F.group_norm(y, 1, block.norm2.weight, block.norm2.bias)
    branch = F.linear(F.gelu(F.linear(n, block.mlp.fc1.weight)), block.mlp.fc2.weight)
    assert relative_error(block(x), y + block.layer_scale_2.view(-1, 1, 1) * branch) < 1e-6
    assert [call.name for call in operator_calls] == ["pool_mixer"]


def test_active_dropout_is_the_modules_own(backend, operator_calls):
    block = make_block(drop=0.4)
    x = randn(3, 12, 6, 5)
    y = seeded(block, x, seed=3)
    middle = official_block(block, x, masks=(1.0, 0.0))
    n, mlp = F.group_norm(middle, 1, block.norm2.weight, block.norm2.bias), block.mlp
    torch.manual_seed(3)
    branch = mlp.drop(mlp.fc2(mlp.drop(mlp.act(mlp.fc1(n)))))
    assert relative_error(y, middle + block.layer_scale_2.view(-1, 1, 1) * branch) < 1e-6
    assert relative_error(block.eval()(x), official_block(block, x)) < 1e-6
    assert [call.name for call in operator_calls] == ["pool_mixer", "pool_mixer", "mlp"]


# ---- stochastic depth --------------------------------------------------------------------------------------


def test_drop_path_drops_each_branch_of_each_sample_and_keeps_the_mean():
    block = make_block(drop_path=0.4)
    batch = 4000
    x = randn(1, 12, 2, 2).expand(batch, -1, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        y, full = block(x), 1 / 0.6
        cases = [(a, b) for a in (0.0, full) for b in (0.0, full)]
        outcomes = torch.stack([official_block(block, x[:1], masks=masks)[0] for masks in cases])
    nearest = (y[:, None] - outcomes).flatten(2).norm(dim=2)
    assert nearest.min(1).values.max() < 1e-5
    share = torch.bincount(nearest.argmin(1), minlength=4) / batch
    expected = torch.tensor([0.4 * 0.4, 0.4 * 0.6, 0.6 * 0.4, 0.6 * 0.6])
    assert (share - expected).abs().max() < 0.03  # 4 sigma
    assert torch.equal(block.eval()(x[:2]), block(x[:2]))


def test_the_same_mask_gives_the_same_values_and_gradients(monkeypatch):
    block = make_block(drop_path=0.3)
    masks = [torch.tensor([0.0, 1 / 0.7, 1 / 0.7]), torch.tensor([1 / 0.7, 0.0, 1 / 0.7])]
    draws = iter(masks * 2)
    monkeypatch.setattr(DropPath, "sample", lambda self, x: next(draws))
    x, grad = randn(3, 12, 6, 5), randn(3, 12, 6, 5, seed=1)
    expected = gradients(block, x, grad, lambda b, t: official_block(b, t, masks))
    fused = gradients(block, x, grad)
    block.norm1.register_forward_hook(lambda *_: None)
    composite = gradients(block, x, grad)
    for name in expected:
        if name != "norm1.bias":
            assert relative_error(fused[name], expected[name]) < 1e-5, name
            assert relative_error(composite[name], expected[name]) < 1e-5, name


def test_drop_path_module_matches_timm():
    timm_layers = require("timm.layers")
    x = randn(50, 3, 2, 2)
    ours, theirs = (seeded(layer(0.4), x) for layer in (DropPath, timm_layers.DropPath))
    assert relative_error(ours, theirs) < 1e-6
    assert DropPath(0.4).sample(x.double()).dtype == torch.float64
    assert DropPath(0.4).sample(x.bfloat16()).dtype == torch.float32
    assert DropPath(0.4).sample(x[:0]).shape == (0,)
    assert DropPath(0.0)(x) is x
    assert DropPath(0.4).eval()(x) is x


# ---- modules as objects ------------------------------------------------------------------------------------


def test_parameters_of_a_block():
    assert list(make_block().state_dict()) == BLOCK_KEYS
    assert list(make_block(use_layer_scale=False).state_dict()) == BLOCK_KEYS[2:]
    assert torch.equal(PoolFormerBlock(4, layer_scale_init_value=1).layer_scale_2, torch.ones(4))


def test_reprs_name_the_settings():
    text = repr(PoolFormerBlock(4, pool_size=5, drop_path=0.25))
    assert "pool_size=5" in text
    assert "drop_prob=0.25" in text
    assert repr(PoolMixer(4, 3, 1e-6)) == "PoolMixer(4, pool_size=3, eps=1e-06)"


def test_a_subclass_may_use_any_name():
    """As ``shortcut``, a common one: no method of ours hides it or takes its place."""

    class Doubled(PoolFormerBlock):
        def __init__(self, dim):
            super().__init__(dim)
            self.shortcut = nn.Identity()

        def forward(self, x):
            return self.shortcut(x) + super().forward(x)

    torch.manual_seed(0)
    block, x = randomise(Doubled(8)), torch.randn(1, 8, 5, 5)
    plain = PoolFormerBlock(8)
    plain.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), x + plain(x))


@pytest.mark.parametrize("name", ["token_mixer", "mlp"])
def test_a_missing_module_is_an_error(name):
    block = PoolFormerBlock(8)
    setattr(block, name, None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        block(torch.randn(1, 8, 5, 5))
