"""What constructors are given: numpy's numbers are numbers, what is wrong is named before any work."""

import numpy as np
import pytest
import torch
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.models import MetaFormerConfig

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpys_integers_are_taken(integer):
    eight, three, one = integer(8), integer(3), integer(1)
    layers = [
        (pk.nn.PoolMixer(eight, three), "dim", "pool_size"),
        (pk.nn.Pooling(three), "pool_size"),
        (pk.nn.GroupNorm(eight), "num_channels"),
        (pk.nn.ChannelLayerNorm(eight),),
        (pk.nn.Attention(eight, integer(4)), "head_dim"),
        (pk.nn.Attention(eight, integer(4), num_heads=one), "head_dim"),
        (pk.nn.SpatialFC((three, eight)),),
        (pk.nn.RandomMatrix((three, eight)),),
        (pk.nn.PositionEmbedding(eight, (three, three)),),
        (pk.nn.Mlp(eight, eight, three),),
        (pk.nn.Mlp(eight, eight, three, use_conv=False),),
        (pk.nn.PoolFormerBlock(eight, three),),
        (pk.nn.MetaFormerBlock(eight, three, res_scale_init_value=np.float32(1)),),
    ]
    for layer, *names in layers:
        assert all(type(getattr(layer, name)) is int for name in names)
    x = torch.randn(2, 8, 5, 5)
    for block in (layers[0][0], layers[1][0], layers[-1][0], layers[-2][0]):
        assert block(x).shape == x.shape


def test_numpys_numbers_in_models():
    model = pk.create_model(
        "poolformer_s12", np.int64(5), np.int32(1), drop_path_rate=np.float32(0.1), device="meta"
    )
    assert (type(model.num_classes), type(model.in_chans)) == (int, int)
    assert (model.num_classes, model.in_chans) == (5, 1)
    model.reset_classifier(np.int64(3))
    assert model.head.out_features == 3
    options = {
        "pool_size": np.int64(5),
        "image_size": (np.int64(64), np.int64(32)),
        "layer_scale_init": np.float64(0),
    }
    model = pk.create_model("metaformer_ppff_s12_224", device="meta", **options)
    assert model.config.image_size == (64, 32)
    assert [type(side) for side in (*model.config.image_size, model.config.pool_size)] == [int] * 3
    model = pk.create_model("poolformer_s12", features_only=True, out_indices=np.array([1, 3]), device="meta")
    assert model.feature_info.channels() == [128, 512]


@pytest.mark.parametrize("eps", [NAN, INF, -INF, -1e-5, "1e-5", None, True])
@pytest.mark.parametrize(
    "make", [pk.nn.PoolMixer, pk.nn.GroupNorm, pk.nn.ChannelLayerNorm], ids=lambda make: make.__name__
)
def test_eps(make, eps):
    number = isinstance(eps, float)
    with pytest.raises(ValueError if number else TypeError, match=r"eps must") as caught:
        make(4, eps=eps)
    assert (str(eps) if number else type(eps).__name__) in str(caught.value)
    assert make(4, eps=0).eps == 0.0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: pk.nn.PoolFormerBlock(4, mlp_ratio=NAN), ValueError, ("mlp_ratio", "finite", "nan")),
        (lambda: pk.nn.PoolFormerBlock(4, mlp_ratio="4"), TypeError, ("mlp_ratio", "str")),
        (
            lambda: pk.nn.PoolFormerBlock(4, layer_scale_init_value=INF),
            ValueError,
            ("layer_scale_init_value", "inf"),
        ),
        (
            lambda: pk.nn.PoolFormerBlock(4, layer_scale_init_value=None),
            TypeError,
            ("layer_scale", "NoneType"),
        ),
        (lambda: pk.nn.PoolFormerBlock(4, use_layer_scale=1), TypeError, ("use_layer_scale", "bool", "int")),
        (
            lambda: pk.nn.PoolFormerBlock(4, act_layer="star_relu"),
            TypeError,
            ("act_layer", "'star_relu'", "GELU"),
        ),
        (
            lambda: pk.nn.PoolFormerBlock(4, norm_layer="group"),
            TypeError,
            ("norm_layer", "'group'", "GroupNorm"),
        ),
        (
            lambda: pk.nn.PoolFormerBlock(4, token_mixer=pk.nn.Pooling()),
            TypeError,
            ("token_mixer", "got Pooling"),
        ),
        (lambda: pk.nn.PoolFormerBlock(4, drop_path=NAN), ValueError, ("drop_path", "nan", "[0, 1)")),
        (
            lambda: pk.nn.MetaFormerBlock(4, res_scale_init_value=NAN),
            ValueError,
            ("res_scale_init_value", "nan"),
        ),
        (lambda: pk.nn.Mlp(4, act_layer=nn.GELU()), TypeError, ("act_layer", "callable", "GELU")),
        (lambda: pk.nn.Mlp(4, drop=-0.1), ValueError, ("drop", "-0.1")),
        (lambda: pk.nn.StarReLU(NAN), ValueError, ("scale", "nan")),
        (lambda: pk.nn.GroupNorm(4, affine=1), TypeError, ("affine", "int")),
        (lambda: pk.nn.ChannelLayerNorm(4, bias=None), TypeError, ("bias", "NoneType")),
        (lambda: pk.nn.SpatialFC(4), TypeError, ("size", "(height, width)", "4")),
        (lambda: pk.nn.RandomMatrix((4, 5, 6)), TypeError, ("size", "(4, 5, 6)")),
        (lambda: pk.nn.SpatialFC((4, 0)), ValueError, ("width", "0")),
        (
            lambda: pk.nn.SpatialFC((4, 5))(torch.zeros(1, 2, 4, 6)),
            ValueError,
            ("4 x 6", "4 x 5", "size=(4, 6)"),
        ),
        (lambda: pk.nn.Attention(32, num_heads=0), ValueError, ("num_heads", "0")),
        (lambda: pk.nn.Attention(32, attn_drop=1), ValueError, ("attn_drop", "[0, 1)")),
        (lambda: pk.nn.Pooling(np.bool_(True)), TypeError, ("pool_size", "int", "bool")),
        (lambda: pk.nn.Pooling(np.float64(3)), TypeError, ("pool_size", "int", "float64")),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [NAN, INF, -1.0])
def test_layer_scale_of_a_model(value):
    with pytest.raises(ValueError, match=r"layer_scale_init must"):
        pk.create_model("metaformer_s12", layer_scale_init=value, device="meta")


def test_star_relu_is_an_activation_of_models():
    """By its name, as PoolFormerV2's; an unknown one is told which there are."""
    model = pk.create_model("poolformer_s12", 7, act_layer="star_relu").eval()
    twin = pk.create_model("poolformer_s12", 7, act_layer=pk.nn.StarReLU).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert isinstance(model.network[0][0].mlp.act, pk.nn.StarReLU)
    assert torch.equal(model(x), twin(x))
    assert model.config.differences == "act_layer=star_relu"
    with pytest.raises(
        ValueError, match=r"act_layer must be gelu, gelu_tanh, relu, silu, star_relu or a call"
    ):
        MetaFormerConfig("m", (1, 1, 1, 1), (8, 8, 8, 8), None, 0.0, None, 1.0, act_layer="starrelu")
