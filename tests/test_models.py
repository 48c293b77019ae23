"""The models against timm, transformers and the formulas written out here."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.metaformer import official_model, released_shapes
from support.models import PUBLISHED, images, on_meta, raises, shapes
from support.nn import gradients
from support.peers import assert_as_accurate, randomise, relative_error, require, timm_twins
from support.problems import seeded

import poolformer_kernels as pk
from poolformer_kernels.models import HEADS, PoolFormer, model_config

NAMES = list(PUBLISHED)
NAMES_V2 = [name.replace("_", "v2_") for name in NAMES]
NAMED = ("name", *NAMES)  # of what an error says about a name


@pytest.fixture(scope="module")
def s12() -> PoolFormer:
    torch.manual_seed(0)
    return randomise(pk.create_model("poolformer_s12", num_classes=20)).eval()


@pytest.fixture
def own(s12):
    """A copy that a test may change."""
    return copy.deepcopy(s12)


# ---- the table ---------------------------------------------------------------------------------------------


def test_names_and_their_order():
    assert pk.list_models("poolformer_*") == NAMES
    assert pk.list_models("poolformerv2_*") == NAMES_V2
    assert set(NAMES_V2) < set(pk.list_models())


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_and_keys(name):
    model, config = on_meta(name), model_config(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name][0] == config.params
    assert list(shapes(model.state_dict()).items()) == list(released_shapes(name).items())
    assert model.config is config


@pytest.mark.parametrize("name", NAMES_V2)
def test_keys_and_sizes_of_v2_are_timms(name):
    timm, ours = require("timm"), on_meta(name)
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert shapes(pk.convert_state_dict(theirs.state_dict())) == shapes(ours.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == model_config(name).params
    assert ours.head_mode == "timm"


def test_rates_and_scales_of_the_official_code():
    for names in (NAMES, NAMES_V2):
        assert [model_config(name).drop_path_rate for name in names] == [0.1, 0.1, 0.2, 0.3, 0.4]
    assert [model_config(name).layer_scale_init for name in NAMES] == [1e-5, 1e-5, 1e-6, 1e-6, 1e-6]


def test_initial_values_are_the_official_ones():
    torch.manual_seed(0)
    model = pk.create_model("poolformer_s12")
    assert torch.equal(model.network[4][5].layer_scale_2, torch.full((320,), 1e-5))
    assert 0.0195 < model.head.weight.std() < 0.0205
    assert not model.head.bias.any()
    assert 0.0195 < model.network[6][0].mlp.fc1.weight.std() < 0.0205
    assert model.patch_embed.proj.bias.any()  # torch's default for the other convolutions


def test_drop_path_rates_grow_linearly_and_default_to_none():
    model = pk.create_model("poolformer_s12", drop_path_rate=0.22)
    blocks = [block for stage in model.network[::2] for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)])
    plain = pk.create_model("poolformer_s12", num_classes=0)
    assert all(isinstance(m, torch.nn.Identity) for n, m in plain.named_modules() if n.endswith("drop_path"))


# ---- values ------------------------------------------------------------------------------------------------


ODD_SIZES = [(193, 257), (33, 47), (3, 3), (40, 5)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, (224, 224)) for name in (*NAMES, NAMES_V2[0])), *((NAMES[0], size) for size in ODD_SIZES)],
)
def test_maps_and_logits_equal_timm(name, size):
    ours, theirs = timm_twins(name)
    x = images(1, 3, *size)
    with torch.inference_mode():
        expected = theirs(x)
        assert relative_error(ours.forward_features(x), theirs.forward_features(x)) < 1e-5
        assert relative_error(ours(x), expected) < 1e-5
    assert expected.std() > 0.05


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", [NAMES[0], NAMES_V2[0]])
def test_half_precision_is_as_near_as_timms(name, how):
    models, x = timm_twins(name), images(2, 3, 64, 96)
    if how == "bfloat16":
        models, x = [model.bfloat16() for model in models], x.bfloat16()
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            ours, theirs = (model(x) for model in models)
        exact = models[1].double()(x.double())
    assert ours.dtype == torch.bfloat16
    slack = 2e-3 if how == "bfloat16" else 4e-3  # autocast rounds weights, too
    assert_as_accurate(ours, theirs, exact, slack)


def test_maps_and_logits_equal_the_official_formula(s12):
    x = images(2, 3, 64, 48)
    with torch.inference_mode():
        maps, logits = official_model(s12.state_dict(), x)
        assert relative_error(s12.forward_features(x), maps) < 1e-5
        assert relative_error(s12(x), logits) < 1e-5
        assert torch.equal(s12.forward_head(s12.forward_features(x)), s12(x))


def test_the_two_heads_differ_on_the_same_weights(own):
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        official = own(x)
        own.head_mode = "timm"
        timm, pooled = own(x), own.forward_features(x).mean((2, 3))
        expected = F.layer_norm(pooled, (512,), own.norm.weight, own.norm.bias, 1e-6)
        assert relative_error(timm, own.head(expected)) < 1e-6
        assert relative_error(own.forward_head(own.forward_features(x), pre_logits=True), expected) < 1e-6
    assert relative_error(timm, official) > 0.01


@pytest.mark.parametrize("head", HEADS)
def test_no_classes_gives_the_pooled_features(own, head):
    bare = pk.create_model("poolformer_s12", num_classes=0, head=head).eval()
    state = own.state_dict()
    bare.load_state_dict({key: value for key, value in state.items() if not key.startswith("head.")})
    own.head_mode = head
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(bare(x), own.forward_head(own.forward_features(x), pre_logits=True))
        assert torch.equal(own.head(bare(x)), own(x))


def test_gradients_equal_timm():
    ours, theirs = timm_twins(num_classes=10)
    x, weight = images(2, 3, 64, 64), images(2, 10, seed=1)
    found, right = (gradients(model, x, weight) for model in (ours, theirs))
    expected = pk.convert_state_dict({name: right[name] for name, _ in theirs.named_parameters()})
    expected["dx"] = right["dx"]
    assert expected.keys() == found.keys() - {"y"}
    for name, value in expected.items():
        if "norm1.bias" in name:  # exactly zero; eager returns rounding noise
            assert found[name].norm() < 1e-5 * found[name.replace("bias", "weight")].norm() + 1e-7, name
        else:
            assert relative_error(found[name], value) < 1e-4, name


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformerv2_s12"])
def test_training_with_stochastic_depth_equals_timm_under_the_same_seed(name):
    ours, theirs = timm_twins(name, num_classes=10, drop_path_rate=0.6)
    x = images(6, 3, 32, 32)
    expected, y = (seeded(model.train(), x, seed=5) for model in (theirs, ours))
    assert relative_error(y, expected) < 1e-5
    assert relative_error(y, ours.eval()(x)) > 0.05


# ---- features ----------------------------------------------------------------------------------------------


def test_features_have_no_head():
    model = pk.create_model("poolformer_s12", features_only=True)
    assert sum(p.numel() for p in model.parameters()) == 11_915_176 - 513 * 1000 + 2 * (64 + 128 + 320)
    maps = torch.zeros(1, 512, 2, 2)
    for call in (lambda: model.forward_head(maps), lambda: model.reset_classifier(5), model.get_classifier):
        with pytest.raises(RuntimeError, match=r"features_only"):
            call()


# ---- modules as objects, layouts, dtypes -------------------------------------------------------------------


def test_reset_classifier(own):
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        features = own.forward_head(own.forward_features(x), pre_logits=True)
        torch.manual_seed(0)
        own.train().double().reset_classifier(7)
        assert own.head.training
        assert own.head.weight.dtype == torch.float64
        assert own.num_classes == 7
        assert own.head.weight.shape == (7, 512)
        assert 0.015 < own.head.weight.std() < 0.025
        assert not own.head.bias.any()
        own.float().eval()
        assert relative_error(own(x), features @ own.head.weight.T) < 1e-5
        own.reset_classifier(0)
        assert torch.equal(own(x), features)
        assert own.num_classes == 0


def test_the_residual_stream_stays_half_under_autocast(s12):
    """Eager widens it to float32 at the LayerScale."""
    x = images(2, 3, 64, 64)
    exact = copy.deepcopy(s12).double().forward_features(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        features, eager = s12.forward_features(x), official_model(s12.state_dict(), x)[0]
    assert features.dtype == torch.bfloat16
    assert_as_accurate(features, eager, exact, torch.finfo(torch.bfloat16).eps)


def test_a_copy_has_a_head_mode_of_its_own(own, s12):
    own.head_mode = "timm"
    assert s12.head_mode == "official"
    assert own.state_dict()._metadata[""]["head_mode"] == "timm"


def test_other_image_channels_and_empty_batches():
    model = pk.create_model("poolformer_s12", num_classes=5, in_chans=1).eval()
    assert model.patch_embed.proj.weight.shape == (64, 1, 7, 7)
    with torch.inference_mode():
        assert model(images(0, 1, 64, 64)).shape == (0, 5)


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"name": "poolformer-s24"}, ValueError, (*NAMED, "'poolformer-s24'", "did you mean poolformer_s24")),
        ({"name": "metaformer_s13"}, ValueError, (*NAMED, "metaformer_s12", *NAMES_V2, "did you mean")),
        ({"name": "resnet18"}, ValueError, (*NAMED, "'resnet18'")),
        ({"name": ["poolformer_s12"]}, ValueError, NAMED),
        ({"head": "mean"}, ValueError, ("head", "'mean'", "official, timm")),
        ({"num_classes": -1}, ValueError, ("num_classes", "-1", "negative")),
        ({"num_classes": 10.0}, TypeError, ("num_classes", "float", "int")),
        ({"in_chans": 0}, ValueError, ("in_chans", "0", "positive")),
        ({"in_chans": "3"}, TypeError, ("in_chans", "str", "int")),
        ({"drop_path_rate": 1}, ValueError, ("drop_path_rate", "1", "[0, 1)")),
        ({"drop_path_rate": float("nan")}, ValueError, ("drop_path_rate", "nan", "[0, 1)")),
        ({"drop_path_rate": "0.1"}, TypeError, ("drop_path_rate", "str", "number")),
        ({"checkpoint": "a", "pretrained": True}, ValueError, ("checkpoint", "pretrained", "one of them")),
        ({"name": NAMES_V2[0], "head": "official"}, ValueError, ("head", "'official'", "allowed: timm")),
        ({"name": NAMES_V2[0], "pool_size": 5}, TypeError, ("pool_size", "poolformerv2_s12 takes none")),
        # the structure of a MetaFormer
        (
            {"token_mixers": "poling"},
            ValueError,
            ("token_mixers", "'poling'", "pooling, identity", "callable"),
        ),
        ({"token_mixers": ("pooling",) * 3}, ValueError, ("token_mixers", "4", "3")),
        ({"token_mixers": torch.nn.Identity()}, TypeError, ("token_mixers", "Identity", "callable")),
        ({"pool_size": 4}, ValueError, ("pool_size", "4", "odd")),
        ({"norm_layer": "instance"}, ValueError, ("norm_layer", "'instance'", "group, layer, batch, none")),
        ({"act_layer": None}, TypeError, ("act_layer", "NoneType", "gelu")),
        ({"residual": 1}, TypeError, ("residual", "bool", "int")),
        ({"mlp": None}, TypeError, ("mlp", "bool", "NoneType")),
        ({"layer_scale_init": "1e-5"}, TypeError, ("layer_scale_init", "str", "number")),
        ({"layer_scale_init": float("nan")}, ValueError, ("layer_scale_init must",)),
        ({"layer_scale_init": float("inf")}, ValueError, ("layer_scale_init must",)),
        ({"layer_scale_init": -1.0}, ValueError, ("layer_scale_init must",)),
        ({"image_size": (224, 2)}, ValueError, ("image_size", "3", "2")),
        ({"image_size": 224.0}, TypeError, ("image_size", "float", "int")),
        ({"image_size": (224, 224, 3)}, ValueError, ("image_size", "(height, width)")),
        ({"mixer": "pooling"}, TypeError, ("mixer", "token_mixers", "norm_layer")),
        ({"name": "metaformer_s12", "pretrained": True}, ValueError, ("pretrained", "hub", "checkpoint")),
        ({"pretrained": True, "pool_size": 5}, ValueError, ("pretrained", "pool_size", "checkpoint")),
        ({"norm_layer": "batch", "head": "timm"}, ValueError, ("head", "'timm'", "official")),
    ],
)
def test_bad_arguments(options, error, words):
    with raises(error, *words), torch.device("meta"):
        pk.create_model(**{"name": "poolformer_s12", **options})


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(3, 32, 32), ValueError, ("[B, 3, H, W]", "[3, 32, 32]")),
        (torch.zeros(1, 1, 32, 32), ValueError, ("[B, 3, H, W]", "[1, 1, 32, 32]")),
        (torch.zeros(1, 3, 2, 32), ValueError, ("at least 3", "2 x 32")),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, ("floating", "torch.uint8")),
        ([[0.0]], TypeError, ("tensor", "list")),
    ],
)
def test_bad_images(s12, x, error, words):
    with raises(error, "x must", *words):
        s12(x)


def test_bad_head_mode_changes_nothing(own):
    with pytest.raises(ValueError, match=r"'both'.*official, timm"):
        own.head_mode = "both"
    assert own.head_mode == "official"
