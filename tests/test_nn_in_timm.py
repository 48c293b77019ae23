"""Our token mixers where timm's go, and timm's Mlp beside ours."""

import copy
import inspect

import pytest
import torch
from support.nn import make_mlp
from support.peers import randomise, relative_error, require
from support.problems import randn
from support.rule import assert_close_to_fp64

import poolformer_kernels as pk

metaformer = require("timm", "models.metaformer").models.metaformer
DIMS, DEPTHS = (16, 24, 32, 64), (1, 1, 2, 1)


def timms_model(mixers, norms=metaformer.LayerNorm2dNoBias, **options):
    torch.manual_seed(0)
    sizes = {"depths": DEPTHS, "dims": DIMS, "num_classes": 7, "use_mlp_head": False}
    model = metaformer.MetaFormer(token_mixers=mixers, norm_layers=norms, **sizes, **options)
    return randomise(model).eval()


def assert_same_model(ours, theirs):
    """By the error rule; linear layers over tokens and 1x1 convolutions have the same weights."""
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    state = theirs.state_dict()
    assert state.keys() == shapes.keys()
    ours.load_state_dict({key: value.view(shapes[key]) for key, value in state.items()})
    x = randn(2, 3, 64, 96)
    with torch.no_grad():
        y, eager = ours(x), theirs(x)
        assert_close_to_fp64(y, eager, theirs.double()(x.double()))


def test_pooling():
    """timm passes ``dim``, ``proj_drop``, ``device``, ``dtype``, and with them what is for other mixers."""
    ours = timms_model(pk.nn.Pooling, pool_size=5)
    assert ours.stages[2].blocks[1].token_mixer.pool_size == 5
    assert_same_model(ours, timms_model(metaformer.Pooling, pool_size=5))


def test_pooling_beside_attention():
    """With an argument that only one of the two has."""
    options = {"proj_bias": True, "head_dim": 16, "proj_drop_rate": 0.1}
    norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
    theirs = timms_model([metaformer.Pooling] * 2 + [metaformer.Attention] * 2, norms, **options)
    ours = timms_model([pk.nn.Pooling] * 2 + [pk.nn.Attention] * 2, **options)
    mixer = ours.stages[3].blocks[0].token_mixer
    assert (mixer.head_dim, mixer.proj_drop) == (16, 0.1)
    assert_same_model(ours, theirs)


def test_the_others_run_there():
    """Those for one size, and the mixer with its norm, in place of stages of their sizes."""
    for kind in (pk.nn.SpatialFC, pk.nn.RandomMatrix):
        model = timms_model([pk.nn.Pooling] * 3 + [kind], size=(2, 3))
        mixer, maps = model.stages[3].blocks[0].token_mixer, randn(2, 64, 2, 3)
        (weight,) = mixer.state_dict().values()
        with torch.no_grad():
            assert model(randn(2, 3, 64, 96)).isfinite().all()
            expected = (maps.flatten(2) @ weight.T).view(maps.shape)
            assert relative_error(mixer(maps), expected) < 1e-5
    model = timms_model(pk.nn.PoolMixer, metaformer.GroupNorm1)
    assert [m.dim for m in model.modules() if isinstance(m, pk.nn.PoolMixer)] == [16, 24, 32, 32, 64]
    with torch.no_grad():
        assert model(randn(2, 3, 64, 96)).isfinite().all()


def test_device_and_dtype_reach_the_mixers():
    model = timms_model([pk.nn.Pooling] * 3 + [pk.nn.Attention], device="cpu", dtype=torch.float64)
    assert model.stages[3].blocks[0].token_mixer.qkv.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: pk.nn.Pooling(pool_sise=5), "pool_sise"),
        (lambda: pk.nn.PoolMixer(8, poolsize=5), "poolsize"),
        (lambda: pk.nn.Attention(32, heads=1), "heads"),
        (lambda: pk.nn.SpatialFC((2, 3), bias=True), "bias"),
        (lambda: pk.nn.RandomMatrix((2, 3), bias=True), "bias"),
    ],
)
def test_misspelt_arguments_are_refused(make, word):
    with pytest.raises(TypeError, match=rf"has no argument '{word}'; allowed: .*device, dtype"):
        make()


def test_attention_drops_in_training_alone():
    torch.manual_seed(0)
    layer, x = pk.nn.Attention(32, proj_drop=0.5, attn_drop=0.3), randn(2, 32, 4, 5)
    plain = pk.nn.Attention(32).eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain(x))
    y = layer.train()(x)
    assert 0.3 < (y == 0).float().mean() < 0.7
    only_attention = pk.nn.Attention(32, attn_drop=0.3)
    only_attention.load_state_dict(layer.state_dict())
    assert relative_error(only_attention(x), plain(x)) > 1e-2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_conv", [False, True])
def test_timms_mlp_computes_the_same(use_conv, bias, backend):
    """With its initial weights and with any."""
    options = {"hidden_features": 30, "out_features": 5, "bias": bias, "use_conv": use_conv, "drop": 0.1}
    theirs, ours = (make(12, **options).eval() for make in (metaformer.Mlp, pk.nn.Mlp))
    x = randn(2, 12, 4, 5) if use_conv else randn(2, 5, 12)
    for state in (theirs.state_dict(), make_mlp(12, **options).state_dict()):
        for mlp in (theirs, ours):
            mlp.load_state_dict(state)
        with torch.no_grad():
            assert_close_to_fp64(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()))


def test_timms_mlp_is_different_where_our_docstring_says_so():
    here, there = (inspect.signature(cls).parameters for cls in (pk.nn.Mlp, metaformer.Mlp))
    assert (here["use_conv"].default, there["use_conv"].default) == (True, False)
    assert list(there)[4:6] == ["norm_layer", "bias"]
    assert "norm_layer" not in here
    assert {"drop1", "drop2"} <= dict(metaformer.Mlp(12).named_modules()).keys()
    for phrase in ("``use_conv=False``", "``norm_layer``", "fifth argument", "pairs", "``drop1``", "0.02"):
        assert phrase in pk.nn.Mlp.__doc__
