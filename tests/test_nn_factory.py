"""``device=`` and ``dtype=`` in every constructor, as in torch.nn."""

import inspect
from dataclasses import replace

import pytest
import torch
from support.models import MIXERS, SMALL, shapes
from support.problems import randn
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.models import MetaFormer, MetaFormerConfig, PoolFormer, PoolFormerV2

MAKE = {
    "Attention": ((32,), {}),
    "ChannelLayerNorm": ((8,), {}),
    "DropPath": ((0.1,), {}),
    "GroupNorm": ((8,), {}),
    "MetaFormerBlock": ((8,), {"res_scale_init_value": 1.0, "act_layer": pk.nn.StarReLU}),
    "Mlp": ((8,), {"act_layer": nn.PReLU}),
    "PoolFormerBlock": ((8,), {"norm_layer": nn.BatchNorm2d, "token_mixer": lambda c: nn.Conv2d(c, c, 1)}),
    "PoolMixer": ((8,), {}),
    "Pooling": ((3,), {}),
    "PositionEmbedding": ((8, (4, 5)), {}),
    "RandomMatrix": (((4, 5),), {}),
    "SpatialFC": (((4, 5),), {}),
    "StarReLU": ((), {}),
}
SIZES = (SMALL.name, SMALL.layers, SMALL.dims)
METAFORMER = {"token_mixers": MIXERS, "norm_layer": "batch", "image_size": 64}
MODELS = {
    "PoolFormer": (PoolFormer, (SMALL, 7)),
    "backbone": (PoolFormer, (SMALL, 7, 3, "official", 0.1, True)),
    "PoolFormerV2": (PoolFormerV2, (replace(SMALL, layer_scale_init=None), 7)),
    "MetaFormer": (MetaFormer, (MetaFormerConfig(*SIZES, 1e-5, 0.1, None, 1.0, **METAFORMER), 7)),
}
LAYERS = {name: (getattr(pk.nn, name), *given) for name, given in MAKE.items()}
LAYERS |= {name: (cls, given, {}) for name, (cls, given) in MODELS.items()}
every = pytest.mark.parametrize("name", LAYERS)


def made(name, **factory):
    cls, given, options = LAYERS[name]
    torch.manual_seed(0)
    return cls(*given, **options, **factory)


def tensors(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def test_every_layer_is_here():
    layers = {name for name in pk.nn.__all__ if issubclass(getattr(pk.nn, name), nn.Module)}
    assert layers - {"PoolFormerStage"} == MAKE.keys()  # a stage is made of blocks, which have their own


@every
def test_arguments_by_name(name):
    parameters = inspect.signature(LAYERS[name][0]).parameters
    assert parameters["device"].default is None
    assert parameters["dtype"].default is None


@every
def test_meta_has_no_memory(name):
    usual, module = tensors(made(name)), tensors(made(name, device="meta", dtype=torch.bfloat16))
    assert module.keys() == usual.keys()
    for key, value in module.items():
        assert value.is_meta, key
        assert value.shape == usual[key].shape
        assert value.dtype == (torch.bfloat16 if usual[key].is_floating_point() else usual[key].dtype), key


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(name, dtype):
    """All that is floating, with the initial values of the usual dtype where they are no draws."""
    usual = tensors(made(name))
    for key, value in tensors(made(name, device="cpu", dtype=dtype)).items():
        if usual[key].is_floating_point():
            assert value.dtype == dtype, key
            if usual[key].unique().numel() == 1:
                assert torch.equal(value, usual[key].to(dtype)), key
            else:
                spread = usual[key].std()
                assert 0.5 * spread < value.std().float() < 2 * spread, key


@every
def test_a_device_that_is_given_counts_more_than_the_default(name):
    with torch.device("meta"):
        module = made(name, device="cpu")
    assert not any(value.is_meta for value in tensors(module).values())


@every
def test_skip_init(name):
    cls, given, options = LAYERS[name]
    module = nn.utils.skip_init(cls, *given, **options)
    assert shapes(tensors(module)) == shapes(tensors(made(name)))


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformerv2_s12", "metaformer_ppaa_s12_224"])
def test_create_model(name):
    model = pk.create_model(name, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}
    model.reset_classifier(5)
    assert (model.head.weight.is_meta, model.head.weight.dtype) == (True, torch.float16)
    model.reset_classifier(5, device="cpu", dtype=torch.float64)
    assert (model.head.weight.is_meta, model.head.weight.dtype) == (False, torch.float64)


def test_a_model_of_another_dtype_computes_in_it():
    model = made("PoolFormer", dtype=torch.float64).eval()
    x = randn(2, 3, 64, 64)
    twin = made("PoolFormer").eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x.double()).float(), rtol=1e-4, atol=1e-6)


def test_weights_do_not_load_into_meta(tmp_path):
    torch.save(made("PoolFormer").state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"device meta.*another device"):
        pk.load_checkpoint(made("PoolFormer", device="meta"), tmp_path / "model.pth")
    for options in ({"checkpoint": tmp_path / "model.pth"}, {"pretrained": True}):
        with pytest.raises(ValueError, match=r"device meta.*another device"):
            pk.create_model("poolformer_s12", device="meta", **options)
