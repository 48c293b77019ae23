"""nn.Mlp against the plain modules; when the operator runs and when the modules."""

import copy
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from support.nn import gradients, hook, instance_forward, make_mlp, subclass
from support.peers import assert_as_accurate
from support.problems import randn, seeded
from support.rule import assert_close_to_fp64
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.nn import Mlp

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
KEYS = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


def plain(mlp: Mlp, x: torch.Tensor) -> torch.Tensor:
    """The same layers, one by one, as the official module calls them."""
    return nn.Sequential(mlp.fc1, mlp.act, mlp.drop, mlp.fc2, mlp.drop)(x)


@pytest.fixture
def mlp_calls(monkeypatch):
    """The arguments of every call of ops.mlp."""
    counted = Mock(wraps=pk.ops.mlp)
    monkeypatch.setattr(pk.ops, "mlp", counted)
    return counted.call_args_list


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nchw", "channels_last", "linear"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_equal_the_modules(activation, kind, dtype, training, backend, mlp_calls):
    sizes = (12, 31, 9) if kind == "linear" else (12, 40)
    options = {"use_conv": kind != "linear", "bias": activation != "relu", "drop": 0.0 if training else 0.5}
    mlp = make_mlp(*sizes, act_layer=ACTIVATIONS[activation], dtype=dtype, **options).train(training)
    shape = (3, 5, 7, 12) if kind == "linear" else (3, 12, 5, 7)
    x = randn(*shape, dtype=dtype, mean=-0.6, sigma=0.8)
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.empty_like(mlp(x)).copy_(randn(*mlp(x).shape, mean=0.3, seed=9))
    ours, eager = gradients(mlp, x, grad), gradients(mlp, x, grad, plain)
    exact = gradients(copy.deepcopy(mlp).double(), x.double(), grad.double(), plain)
    assert {options["activation"] for _, options in mlp_calls} == {activation}
    assert ours["y"].stride() == eager["y"].stride()
    tokens = x.numel() // 12
    for name, value in ours.items():
        scale = exact[name].abs() * (1 if name in ("y", "dx") else tokens**0.5)
        assert value.dtype == dtype
        assert_close_to_fp64(value, eager[name], exact[name], scale=scale, what=name)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (4, 12), (2, 3, 12), (2, 3, 2, 12), (0, 12), (2, 0, 12)])
def test_linear_layers_take_any_leading_sizes(shape, backend):
    mlp = make_mlp(12, 20, 7, use_conv=False)
    x = randn(*shape)
    y, expected = mlp(x), plain(mlp, x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    if x.dim() > 1:
        x = x.transpose(0, -2)  # neither a view of tokens in this order nor contiguous
        torch.testing.assert_close(mlp(x), plain(mlp, x), rtol=1e-5, atol=1e-5)


def test_linear_layers_copy_neither_tokens_nor_result(mlp_calls, backend):
    mlp = make_mlp(12, 20, 7, use_conv=False)
    x = randn(2, 5, 12)
    with torch.no_grad():
        y = mlp(x)
    (given, *_), _ = mlp_calls[0]
    assert given.shape == (1, 12, 1, 10)
    assert given.data_ptr() == x.data_ptr()
    assert given.is_contiguous(memory_format=torch.channels_last)
    assert y._base is not None


def test_image_without_a_batch(backend, mlp_calls):
    mlp = make_mlp(6, 10, 4)
    x = randn(6, 3, 5)
    torch.testing.assert_close(mlp(x), plain(mlp, x), rtol=1e-5, atol=1e-5)
    assert len(mlp_calls) == 1


def test_autocast_returns_what_the_modules_return(backend, mlp_calls):
    mlp, x = make_mlp(12, 40), randn(2, 12, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y, eager = mlp(x), plain(mlp, x)
    exact = plain(copy.deepcopy(mlp).double(), x.double())
    assert y.dtype == eager.dtype == torch.bfloat16
    assert_as_accurate(y, eager, exact, 2e-3)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in mlp.parameters())
    assert len(mlp_calls) == 1


# ---- dropout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_conv", [True, False])
def test_active_dropout_is_the_modules_own(use_conv, backend, mlp_calls):
    mlp = make_mlp(64, 200, 32, act_layer=nn.ReLU, drop=0.4, use_conv=use_conv)
    x = randn(2, 64, 3, 4) if use_conv else randn(2, 12, 64)
    y = seeded(mlp, x, seed=3)
    assert torch.equal(y, seeded(plain, mlp, x, seed=3))
    assert 0.3 < (y == 0).float().mean() < 0.5
    assert not mlp_calls
    assert mlp.unfused_reason() == "drop is active (p = 0.4)"
    torch.testing.assert_close(mlp.eval()(x), plain(mlp, x), rtol=1e-5, atol=1e-5)
    mlp.train().drop.p = 0.0
    mlp(x)
    mlp.drop = nn.Identity()
    mlp(x)
    assert len(mlp_calls) == 3


# ---- one operator call, or the modules ---------------------------------------------------------------------


def weight_norm(mlp, fired):
    nn.utils.parametrizations.weight_norm(mlp.fc1)
    fired.append("type of fc1")


def foreign_activation(mlp, fired):
    class Activation(nn.Module):
        def forward(self, x):
            fired.append("act")
            return F.gelu(x)

    mlp.act = Activation()


HERE, NOT = "test_nn_mlp", "torch.nn.Conv2d, not Conv2d or Linear"
OWN = "support.nn.subclass.<locals>.change.<locals>.Own"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook("fc1"), "fc1 has hooks"),
        (hook("act", "pre"), "act has hooks"),
        (hook("fc2", "backward"), "fc2 has hooks"),
        (hook("drop"), "drop has hooks"),
        (instance_forward("fc2"), "forward was set on fc2 itself"),
        (subclass("fc1"), f"fc1 and fc2 are {OWN} and {NOT}"),
        (weight_norm, f"fc1 and fc2 are torch.nn.utils.parametrize.ParametrizedConv2d and {NOT}"),
        (
            foreign_activation,
            f"act is {HERE}.foreign_activation.<locals>.Activation, not GELU, ReLU, SiLU or StarReLU",
        ),
    ],
)
def test_hooks_and_foreign_layers_are_called(change, reason, backend, mlp_calls):
    mlp, fired = make_mlp(12, 40), []
    x, grad = randn(2, 12, 5, 7), randn(2, 12, 5, 7, seed=1)
    expected = gradients(mlp, x, grad)
    assert len(mlp_calls) == 1
    change(mlp, fired)
    ours = gradients(mlp, x, grad)
    assert fired
    assert len(mlp_calls) == 1
    assert mlp.unfused_reason() == reason
    for name in ("y", "dx"):
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(12, 40, 3, padding=1), (5, 7)),
        (nn.Conv2d(12, 40, 1, stride=2), (3, 4)),
        (nn.Conv2d(12, 40, 1, padding=1), (7, 9)),
        (nn.Conv2d(12, 40, 1, groups=4), (5, 7)),
    ],
    ids=["3x3", "stride", "padding", "groups"],
)
def test_other_convolutions_keep_their_meaning(layer, size, mlp_calls):
    mlp = make_mlp(12, 40)
    mlp.fc1 = layer
    x = randn(2, 12, 5, 7)
    y = mlp(x)
    assert y.shape[2:] == size
    assert torch.equal(y, mlp.fc2(F.gelu(layer(x))))
    assert mlp.unfused_reason() == "fc1 is not a 1x1 convolution of stride 1, without padding and groups"
    assert not mlp_calls


# ---- modules as objects ------------------------------------------------------------------------------------


def test_initialisation_and_keys():
    torch.manual_seed(0)
    mlp = Mlp(64, 200, 32)
    assert 0.015 < mlp.fc1.weight.std() < 0.021
    assert not mlp.fc1.bias.any()
    assert not mlp.fc2.bias.any()
    assert list(Mlp(3).state_dict()) == list(Mlp(3, use_conv=False).state_dict()) == KEYS
    assert list(Mlp(3, bias=False).state_dict()) == KEYS[::2]
    assert Mlp(3).fc2.weight.shape == (3, 3, 1, 1)
    assert Mlp(3, use_conv=False).fc2.weight.shape == (3, 3)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("use_conv", [True, False])
def test_either_weight_shape_loads(use_conv, assign):
    source, target = make_mlp(6, 10, 4, use_conv=not use_conv), Mlp(6, 10, 4, use_conv=use_conv)
    state = {f"0.{name}": t for name, t in source.state_dict().items()}
    shapes = {name: t.shape for name, t in state.items()}
    nn.Sequential(target).load_state_dict(state, assign=assign)
    assert {name: t.shape for name, t in state.items()} == shapes  # the caller's dict is left as it was
    for name, p in target.named_parameters():
        assert isinstance(p, nn.Parameter)
        assert p.requires_grad
        assert p.shape == Mlp(6, 10, 4, use_conv=use_conv).get_parameter(name).shape
        assert torch.equal(p.flatten(), source.get_parameter(name).flatten())
    tokens = randn(15, 6)
    image = tokens.T.reshape(1, 6, 3, 5)
    by_pixel = (target if use_conv else source)(image).flatten(2)[0].T
    torch.testing.assert_close(by_pixel, (source if use_conv else target)(tokens))


def test_a_wrong_weight_shape_does_not_load():
    state = make_mlp(6, 10, use_conv=False).state_dict()
    for wrong in (state["fc1.weight"].T, randn(10, 6, 3, 3)):
        with pytest.raises(RuntimeError, match=r"size mismatch for fc1.weight"):
            Mlp(6, 10).load_state_dict({**state, "fc1.weight": wrong})
    result = Mlp(6, 10).load_state_dict({"fc1.weight": state["fc1.weight"]}, strict=False)
    assert result.missing_keys == KEYS[1:]


def test_save_hidden_reaches_the_operator(mlp_calls):
    x = randn(2, 4, 3, 3)
    for save in (True, False):
        Mlp(4, save_hidden=save)(x)
    Mlp(4)(x)
    assert [kwargs["save_hidden"] for _, kwargs in mlp_calls] == [True, False, None]
