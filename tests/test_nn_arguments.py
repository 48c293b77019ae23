"""What layers are given: numpy's numbers are numbers, what is wrong is named before any work."""

import numpy as np
import pytest
import torch
from support.models import raises

import poolformer_kernels as pk
from poolformer_kernels import nn
from poolformer_kernels.models import MetaFormerConfig

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpys_integers_are_taken(integer):
    eight, three, one = integer(8), integer(3), integer(1)
    mixer, pooling = nn.PoolMixer(eight, three), nn.Pooling(three)
    attention = nn.Attention(eight, integer(4)), nn.Attention(eight, integer(4), num_heads=one)
    taken = [mixer.dim, mixer.pool_size, pooling.pool_size, nn.GroupNorm(eight).num_channels]
    taken += [layer.head_dim for layer in attention]
    assert {type(value) for value in taken} == {int}
    nn.ChannelLayerNorm(eight)
    nn.SpatialFC((three, eight))
    nn.RandomMatrix((three, eight))
    nn.PositionEmbedding(eight, (three, three))
    for use_conv in (True, False):
        nn.Mlp(eight, eight, three, use_conv=use_conv)
    x = torch.randn(2, 8, 5, 5)
    other = nn.MetaFormerBlock(eight, three, res_scale_init_value=np.float32(1))
    for layer in (mixer, pooling, nn.PoolFormerBlock(eight, three), other):
        assert layer(x).shape == x.shape


def test_numpys_numbers_in_models():
    model = pk.create_model(
        "poolformer_s12", np.int64(5), np.int32(1), drop_path_rate=np.float32(0.1), device="meta"
    )
    assert (type(model.num_classes), type(model.in_chans)) == (int, int)
    assert (model.num_classes, model.in_chans) == (5, 1)
    model.reset_classifier(np.int64(3))
    assert model.head.out_features == 3
    sizes = {"pool_size": np.int64(5), "image_size": (np.int64(64), np.int64(32))}
    name, scale = "metaformer_ppff_s12_224", np.float64(0)
    model = pk.create_model(name, device="meta", layer_scale_init=scale, **sizes)
    assert model.config.image_size == (64, 32)
    assert [type(side) for side in (*model.config.image_size, model.config.pool_size)] == [int] * 3
    model = pk.create_model("poolformer_s12", features_only=True, out_indices=np.array([1, 3]), device="meta")
    assert model.feature_info.channels() == [128, 512]


@pytest.mark.parametrize("eps", [NAN, INF, -INF, -1e-5, "1e-5", None, True])
@pytest.mark.parametrize("make", [nn.PoolMixer, nn.GroupNorm, nn.ChannelLayerNorm])
def test_eps(make, eps):
    number = isinstance(eps, float)
    with pytest.raises(ValueError if number else TypeError, match=r"eps must") as caught:
        make(4, eps=eps)
    assert (str(eps) if number else type(eps).__name__) in str(caught.value)
    assert make(4, eps=0).eps == 0.0


BAD = [
    (lambda: nn.PoolMixer(0), ValueError, ("dim", "0", "positive")),
    (lambda: nn.PoolMixer(4.0), TypeError, ("dim", "float", "int")),
    (lambda: nn.PoolMixer(4, pool_size=2), ValueError, ("pool_size", "2", "odd")),
    (lambda: nn.PoolMixer(4, pool_size="3"), TypeError, ("pool_size", "str", "int")),
    (lambda: nn.PoolMixer(4, eps=-1e-5), ValueError, ("eps", "-1e-05", "negative")),
    (lambda: nn.PoolMixer(4, eps=None), TypeError, ("eps", "NoneType", "number")),
    (lambda: nn.PoolMixer(4)(torch.zeros(2, 4, 5)), ValueError, ("x", "[B, C, H, W]", "(2, 4, 5)")),
    (lambda: nn.Pooling(-3), ValueError, ("pool_size", "-3", "positive")),
    (lambda: nn.Pooling(np.bool_(True)), TypeError, ("pool_size", "int", "bool")),
    (lambda: nn.Pooling(np.float64(3)), TypeError, ("pool_size", "int", "float64")),
    (lambda: nn.PositionEmbedding("64", (7, 7)), TypeError, ("dim must be an int, got str",)),
    (lambda: nn.PoolFormerBlock("x"), TypeError, ("dim", "str", "int")),
    (lambda: nn.PoolFormerBlock(4, pool_size=4), ValueError, ("pool_size", "4", "odd")),
    (lambda: nn.PoolFormerBlock(4, drop_path=1.5), ValueError, ("drop_path", "1.5", "[0, 1)")),
    (lambda: nn.PoolFormerBlock(4, drop_path=NAN), ValueError, ("drop_path", "nan", "[0, 1)")),
    (lambda: nn.PoolFormerBlock(4, mlp_ratio=0), ValueError, ("mlp_ratio", "0", "at least one")),
    (lambda: nn.PoolFormerBlock(4, mlp_ratio=NAN), ValueError, ("mlp_ratio", "finite", "nan")),
    (lambda: nn.PoolFormerBlock(4, mlp_ratio="4"), TypeError, ("mlp_ratio", "str")),
    (lambda: nn.PoolFormerBlock(4, layer_scale_init_value=INF), ValueError, ("layer_scale_init", "inf")),
    (lambda: nn.PoolFormerBlock(4, layer_scale_init_value=None), TypeError, ("layer_scale", "NoneType")),
    (lambda: nn.PoolFormerBlock(4, use_layer_scale=1), TypeError, ("use_layer_scale", "bool", "int")),
    (lambda: nn.PoolFormerBlock(4, save_hidden=1), TypeError, ("save_hidden", "bool or None", "int")),
    (lambda: nn.PoolFormerBlock(4, act_layer="star_relu"), TypeError, ("act_layer", "'star_relu'", "GELU")),
    (lambda: nn.PoolFormerBlock(4, norm_layer="group"), TypeError, ("norm_layer", "'group'", "GroupNorm")),
    (lambda: nn.PoolFormerBlock(4, token_mixer=nn.Pooling()), TypeError, ("token_mixer", "got Pooling")),
    (lambda: nn.PoolFormerBlock(4)(torch.zeros(2, 3, 5, 5)), ValueError, ("weight", "[3]", "[4]")),
    (lambda: nn.MetaFormerBlock(4, res_scale_init_value=NAN), ValueError, ("res_scale_init_value", "nan")),
    (lambda: nn.MetaFormerBlock(8, res_scale_init_value="1"), TypeError, ("res_scale_init_value",)),
    (lambda: nn.MetaFormerBlock(8, residual=False, res_scale_init_value=1.0), ValueError, ("residual",)),
    (lambda: nn.Mlp(4, hidden_features=0), ValueError, ("hidden_features", "0", "positive")),
    (lambda: nn.Mlp(4, out_features=2.0), TypeError, ("out_features", "float", "int")),
    (lambda: nn.Mlp(4, act_layer=torch.nn.GELU()), TypeError, ("act_layer", "callable", "GELU")),
    (lambda: nn.Mlp(4, drop=-0.1), ValueError, ("drop", "-0.1")),
    (lambda: nn.Mlp(4, drop=NAN), ValueError, ("drop", "nan")),
    (lambda: nn.Mlp(4, bias=1), TypeError, ("bias", "int", "bool")),
    (lambda: nn.Mlp(4, use_conv=None), TypeError, ("use_conv", "NoneType", "bool")),
    (lambda: nn.Mlp(4, save_hidden="yes"), TypeError, ("save_hidden", "str", "bool or None")),
    (lambda: nn.Mlp(4)(torch.zeros(2, 4)), ValueError, ("x", "[B, C, H, W]", "(2, 4)")),
    (lambda: nn.Mlp(4)(torch.zeros(2, 3, 5, 5)), ValueError, ("w1", "[any, 3]", "[4, 4, 1, 1]")),
    (lambda: nn.Mlp(4)([1.0]), TypeError, ("x", "tensor", "list")),
    (lambda: nn.Mlp(4, use_conv=False)(torch.tensor(1.0)), ValueError, ("x", "[..., C]", "[]")),
    (lambda: nn.Mlp(4, use_conv=False)(torch.zeros(2, 5)), ValueError, ("w1", "[any, 5]", "[4, 4]")),
    (lambda: nn.DropPath(1.0), ValueError, ("drop_prob", "1.0", "[0, 1)")),
    (lambda: nn.DropPath(True), TypeError, ("drop_prob", "bool", "number")),
    (lambda: nn.StarReLU("a"), TypeError, ("scale", "str", "number")),
    (lambda: nn.StarReLU(NAN), ValueError, ("scale", "nan")),
    (lambda: nn.GroupNorm("4"), TypeError, ("num_channels", "str", "int")),
    (lambda: nn.GroupNorm(4, affine=1), TypeError, ("affine", "int")),
    (lambda: nn.ChannelLayerNorm(4, bias=None), TypeError, ("bias", "NoneType")),
    (lambda: nn.SpatialFC(4), TypeError, ("size", "(height, width)", "4")),
    (lambda: nn.SpatialFC((4, 0)), ValueError, ("width must be positive", "0")),
    (lambda: nn.SpatialFC((4, 5))(torch.zeros(1, 2, 4, 6)), ValueError, ("4 x 6", "4 x 5", "size=(4, 6)")),
    (lambda: nn.RandomMatrix((4, 5, 6)), TypeError, ("size", "(4, 5, 6)")),
    (lambda: nn.Attention(48), ValueError, ("multiple of head_dim 32, got 48",)),
    (lambda: nn.Attention(32, num_heads=0), ValueError, ("num_heads", "0")),
    (lambda: nn.Attention(32, attn_drop=1), ValueError, ("attn_drop", "[0, 1)")),
]


@pytest.mark.parametrize(("make", "error", "words"), BAD)
def test_bad_arguments(make, error, words):
    with raises(error, *words):
        make()


def test_star_relu_is_an_activation_of_models():
    """By its name, as PoolFormerV2's; an unknown one is told which there are."""
    model = pk.create_model("poolformer_s12", 7, act_layer="star_relu").eval()
    twin = pk.create_model("poolformer_s12", 7, act_layer=nn.StarReLU).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert isinstance(model.network[0][0].mlp.act, nn.StarReLU)
    assert torch.equal(model(x), twin(x))
    assert model.config.differences == "act_layer=star_relu"
    message = "act_layer must be gelu, gelu_tanh, relu, silu, star_relu or a call"
    with pytest.raises(ValueError, match=message):
        MetaFormerConfig("m", (1, 1, 1, 1), (8, 8, 8, 8), None, 0.0, None, 1.0, act_layer="starrelu")
