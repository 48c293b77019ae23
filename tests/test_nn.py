"""The layers against the official formulas written out here; when the operator runs and when the modules."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.nn import gradients, make_block, official_block
from support.peers import randomise, relative_error, require
from support.problems import randn
from support.rule import assert_close_to_fp64
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.nn import DropPath, GroupNorm, PoolFormerBlock, Pooling, PoolMixer, StarReLU

BLOCK_KEYS = ["layer_scale_1", "layer_scale_2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
BLOCK_KEYS += ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]


@pytest.fixture
def mixer_calls(monkeypatch):
    """The keyword arguments of every call of the token mixer by a block."""
    calls, original = [], pk.nn.fusion.pool_mixer_with_stats

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(pk.nn.fusion, "pool_mixer_with_stats", counted)
    return calls


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"pool_size": 5}, {"use_layer_scale": False}, {"mlp_ratio": 2.5}],
    ids=lambda o: str(o) or "default",
)
def test_block_and_gradients_equal_the_official_formula(options, channels_last):
    block = make_block(**options)
    x, grad = randn(3, 12, 9, 7, mean=-2.3, sigma=0.5), randn(3, 12, 9, 7, mean=0.3, seed=1)
    size = options.get("pool_size", 3)
    exact = gradients(
        lambda b, t: official_block(b, t, size), copy.deepcopy(block).double(), x.double(), grad.double()
    )
    if channels_last:  # eager in the same layout: the second norm is eager's, less accurate here than in NCHW
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    eager = gradients(lambda b, t: official_block(b, t, size), block, x, grad)
    ours = gradients(lambda b, t: b(t), block, x, grad)
    assert ours["y"].is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    exact["norm1.bias"].zero_()  # pool minus identity cancels it: eager returns rounding noise
    for name, value in ours.items():
        scale = exact["norm1.weight"].abs().max().expand(12) if name == "norm1.bias" else exact[name].abs()
        assert value.dtype == torch.float32
        assert_close_to_fp64(value, eager[name], exact[name], scale=4 * scale, what=name)


def test_block_in_float64_is_the_formula():
    block = make_block().double()
    x = randn(2, 12, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), official_block(block, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_block(dtype):
    block = make_block().to(dtype)
    x = randn(3, 12, 9, 7, dtype=dtype, mean=-2.3, sigma=0.5)
    with torch.no_grad():
        y, eager = block(x), official_block(block, x)
        exact = official_block(copy.deepcopy(block).double(), x.double())
    assert y.dtype == dtype
    assert_close_to_fp64(y, eager, exact, what="y")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_autocast_keeps_the_residual_stream_of_x(dtype):
    block = make_block()
    x, grad = randn(3, 12, 9, 7, dtype=dtype, mean=-2.3, sigma=0.5), randn(3, 12, 9, 7, seed=1)

    def amp(function):
        def call(b, t):
            with torch.autocast("cpu", torch.bfloat16):
                return function(b, t)

        return call

    ours = gradients(amp(lambda b, t: b(t)), block, x, grad.to(dtype))
    eager = gradients(amp(official_block), block, x, grad.to(dtype))
    double = copy.deepcopy(block).double()
    exact = gradients(official_block, double, x.double(), grad.to(dtype).double())
    assert ours["y"].dtype == dtype
    assert ours["dx"].dtype == dtype
    # eager widens to float32 at the LayerScale, a bfloat16 stream is rounded twice: once per sub-block
    rounding = 2 * torch.finfo(dtype).eps
    for name, value in ours.items():
        if name != "norm1.bias":
            error, allowed = (
                relative_error(value, exact[name]),
                1.5 * relative_error(eager[name], exact[name]),
            )
            assert error <= allowed + rounding, f"{name}: {error:.2e}, eager {allowed / 1.5:.2e}"
        if name not in ("y", "dx"):
            assert value.dtype == torch.float32


def test_pool_mixer_module():
    mixer = randomise(PoolMixer(6, pool_size=5, eps=1e-3))
    mixer.weight.data.uniform_(0.5, 1.5)
    x, grad = randn(2, 6, 7, 5, mean=3.0), randn(2, 6, 7, 5, seed=1)

    def formula(m, t):
        n = F.group_norm(t, 1, m.weight, m.bias, 1e-3)
        return F.avg_pool2d(n, 5, 1, 2, count_include_pad=False) - n

    ours, double = gradients(lambda m, t: m(t), mixer, x, grad), copy.deepcopy(mixer).double()
    exact = gradients(formula, double, x.double(), grad.double())
    eager = gradients(formula, mixer, x, grad)
    for name in ("y", "dx", "weight"):
        assert_close_to_fp64(ours[name], eager[name], exact[name], scale=4 * exact[name].abs(), what=name)
    assert ours["bias"].abs().max() < 1e-5
    assert list(mixer.state_dict()) == ["weight", "bias"]
    fresh = PoolMixer(4)
    assert torch.equal(fresh.weight, torch.ones(4))
    assert torch.equal(fresh.bias, torch.zeros(4))


# ---- one operator call, or the modules ---------------------------------------------------------------------


def test_first_sub_block_is_one_operator_call(mixer_calls):
    block = make_block(drop_path=0.3, pool_size=5)
    block(randn(4, 12, 5, 5))
    block.eval()(randn(4, 12, 5, 5))
    train, infer = mixer_calls
    assert train["residual"]
    assert infer["residual"]
    assert train["pool_size"] == 5
    assert train["eps"] == 1e-5
    assert train["layer_scale"] is block.layer_scale_1
    assert train["drop_scale"].shape == (4,)
    assert infer["drop_scale"] is None


def hook_norm(block, fired):
    block.norm1.register_forward_hook(lambda *_: fired.append("norm1"))


def hook_mixer_before(block, fired):
    block.token_mixer.register_forward_pre_hook(lambda *_: fired.append("token_mixer"))


def hook_mixer_backward(block, fired):
    block.token_mixer.register_full_backward_hook(lambda *_: fired.append("token_mixer"))


def hook_drop_path(block, fired):
    block.drop_path.register_forward_hook(lambda *_: fired.append("drop_path"))


def subclass_norm(block, fired):
    class Norm(GroupNorm):
        def forward(self, x):
            fired.append("norm")
            return super().forward(x)

    norm = Norm(12)
    norm.load_state_dict(block.norm1.state_dict())
    block.norm1 = norm


def foreign_mixer(block, fired):
    class Mixer(nn.Module):
        def forward(self, x):
            fired.append("mixer")
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x

    block.token_mixer = Mixer()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "change",
    [hook_norm, hook_mixer_before, hook_mixer_backward, hook_drop_path, subclass_norm, foreign_mixer],
)
def test_hooks_and_foreign_modules_are_called(change, channels_last, mixer_calls):
    block, fired = make_block(), []
    x = randn(2, 12, 6, 5).requires_grad_()
    grad = randn(2, 12, 6, 5, seed=1)
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = block(x)
    (expected_dx,) = torch.autograd.grad(expected, x, grad)
    change(block, fired)
    y = block(x)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert fired
    assert len(mixer_calls) == 1
    assert relative_error(y, expected) < 1e-6
    assert relative_error(dx, expected_dx) < 1e-6
    assert y.stride() == expected.stride()


def test_plain_group_norm_of_one_group_takes_the_operator(mixer_calls):
    x = randn(2, 12, 6, 5)
    block = make_block()
    expected = block(x)
    norm = nn.GroupNorm(1, 12)
    norm.load_state_dict(block.norm1.state_dict())
    block.norm1 = norm
    assert torch.equal(block(x), expected)
    assert len(mixer_calls) == 2


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, lambda dim: nn.GroupNorm(3, dim), nn.InstanceNorm2d])
def test_other_norms_use_their_own_statistics(norm_layer, mixer_calls):
    block = make_block(norm_layer=norm_layer)
    x = randn(2, 12, 6, 5, mean=1.0)
    n = norm_layer(12)(x)
    if not isinstance(block.norm1, nn.InstanceNorm2d):
        block.norm1.load_state_dict(norm_layer(12).state_dict())
    mixed = F.avg_pool2d(n, 3, 1, 1, count_include_pad=False) - n
    after = []
    block.norm2.register_forward_pre_hook(lambda _, args: after.append(args[0]))
    block(x)
    assert not mixer_calls
    assert relative_error(after[0], x + block.layer_scale_1.view(-1, 1, 1) * mixed) < 1e-6


def test_compiled_block_has_no_graph_break():
    block = make_block(drop_path=0.5).eval()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x, grad = randn(2, 12, 6, 5), randn(2, 12, 6, 5, seed=1)
    ours, expected = (gradients(lambda _, t, f=f: f(t), block, x, grad) for f in (compiled, block))
    for name, value in ours.items():
        if name != "norm1.bias":
            assert relative_error(value, expected[name]) < 1e-5, name
    block.train()
    assert torch.isfinite(compiled(x)).all()


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
    expected = gradients(lambda b, t: official_block(b, t, masks=masks), block, x, grad)
    fused = gradients(lambda b, t: b(t), block, x, grad)
    block.norm1.register_forward_hook(lambda *_: None)
    composite = gradients(lambda b, t: b(t), block, x, grad)
    for name in expected:
        if name != "norm1.bias":
            assert relative_error(fused[name], expected[name]) < 1e-5, name
            assert relative_error(composite[name], expected[name]) < 1e-5, name


def test_drop_path_module_matches_timm():
    timm_layers = require("timm.layers")
    x = randn(50, 3, 2, 2)
    torch.manual_seed(3)
    ours = DropPath(0.4)(x)
    torch.manual_seed(3)
    assert relative_error(ours, timm_layers.DropPath(0.4)(x)) < 1e-6
    assert DropPath(0.4).sample(x.double()).dtype == torch.float64
    assert DropPath(0.4).sample(x.bfloat16()).dtype == torch.float32
    assert DropPath(0.4).sample(x[:0]).shape == (0,)
    assert DropPath(0.0)(x) is x
    assert DropPath(0.4).eval()(x) is x


# ---- modules as objects ------------------------------------------------------------------------------------


def test_block_parameters_copies_and_files():
    block = make_block(drop_path=0.2).eval()
    assert list(block.state_dict()) == BLOCK_KEYS
    assert list(make_block(use_layer_scale=False).state_dict()) == BLOCK_KEYS[2:]
    assert torch.equal(PoolFormerBlock(4, layer_scale_init_value=1).layer_scale_2, torch.ones(4))
    x = randn(2, 12, 5, 5)
    expected = block(x)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    other = make_block(seed=1, drop_path=0.2).eval()
    assert not torch.equal(other(x), expected)
    other.load_state_dict(block.state_dict())
    copies = [
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(buffer, weights_only=False),
        other,
    ]
    for same in copies:
        assert torch.equal(same(x), expected)
    with torch.no_grad():
        copies[0].layer_scale_1.add_(1)
    assert torch.equal(block(x), expected)


def test_reprs_name_the_settings():
    text = repr(PoolFormerBlock(4, pool_size=5, drop_path=0.25))
    assert "pool_size=5" in text
    assert "drop_prob=0.25" in text
    assert repr(PoolMixer(4, 3, 1e-6)) == "PoolMixer(4, pool_size=3, eps=1e-06)"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: PoolMixer(0), ValueError, ("dim", "0", "positive")),
        (lambda: PoolMixer(4.0), TypeError, ("dim", "float", "int")),
        (lambda: PoolMixer(4, pool_size=2), ValueError, ("pool_size", "2", "odd")),
        (lambda: PoolMixer(4, pool_size="3"), TypeError, ("pool_size", "str", "int")),
        (lambda: PoolMixer(4, eps=-1e-5), ValueError, ("eps", "-1e-05", "negative")),
        (lambda: PoolMixer(4, eps=None), TypeError, ("eps", "NoneType", "number")),
        (lambda: GroupNorm("4"), TypeError, ("num_channels", "str", "int")),
        (lambda: StarReLU("a"), TypeError, ("scale", "str", "number")),
        (lambda: Pooling(-3), ValueError, ("pool_size", "-3", "positive")),
        (lambda: DropPath(1.0), ValueError, ("drop_prob", "1.0", "[0, 1)")),
        (lambda: DropPath(True), TypeError, ("drop_prob", "bool", "number")),
        (lambda: PoolFormerBlock("x"), TypeError, ("dim", "str", "int")),
        (lambda: PoolFormerBlock(4, pool_size=4), ValueError, ("pool_size", "4", "odd")),
        (lambda: PoolFormerBlock(4, drop_path=1.5), ValueError, ("drop_path", "1.5", "[0, 1)")),
        (lambda: PoolFormerBlock(4, mlp_ratio=0), ValueError, ("mlp_ratio", "0", "at least one")),
        (lambda: PoolMixer(4)(torch.zeros(2, 4, 5)), ValueError, ("x", "[B, C, H, W]", "(2, 4, 5)")),
        (lambda: PoolFormerBlock(4)(torch.zeros(2, 3, 5, 5)), ValueError, ("weight", "[3]", "[4]")),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


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
