"""The models against timm, transformers and the formulas written out here."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.peers import official_model, randomise, relative_error, require
from support.problems import randn

import poolformer_kernels as pk
from poolformer_kernels.models import HEADS, PoolFormer, model_config

NAMES = ["poolformer_s12", "poolformer_s24", "poolformer_s36", "poolformer_m36", "poolformer_m48"]
PARAMS = [11_915_176, 21_388_968, 30_862_760, 56_172_520, 73_473_448]
S12, S12_DIMS = (2, 2, 6, 2), (64, 128, 320, 512)


@pytest.fixture(scope="module")
def s12() -> PoolFormer:
    torch.manual_seed(0)
    return randomise(pk.create_model("poolformer_s12", num_classes=20)).eval()


@pytest.fixture
def own(s12):
    """A copy that a test may change."""
    return copy.deepcopy(s12)


def images(*shape, seed=0):
    return randn(*shape, mean=0.1, seed=seed)


def timm_twin(name="poolformer_s12", **options):
    """timm's model and ours with the same random weights, both in eval mode."""
    timm = require("timm")
    torch.manual_seed(0)
    theirs = randomise(timm.create_model(name, **options)).eval()
    ours = pk.create_model(name, head="timm", **options).eval()
    ours.load_state_dict(pk.convert_state_dict(theirs.state_dict()))
    return ours, theirs


def official_keys(layers):
    keys = []
    for stage, depth in enumerate(layers):
        at = f"network.{2 * stage - 1}" if stage else "patch_embed"
        keys += [f"{at}.proj.weight", f"{at}.proj.bias"]
        for i in range(depth):
            keys += [f"network.{2 * stage}.{i}.layer_scale_{n}" for n in (1, 2)]
            layers_with_bias = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
            keys += [f"network.{2 * stage}.{i}.{m}.{p}" for m in layers_with_bias for p in ("weight", "bias")]
    return [*keys, "norm.weight", "norm.bias", "head.weight", "head.bias"]


# ---- the table ---------------------------------------------------------------------------------------------


def test_names_and_their_order():
    assert pk.list_models("poolformer_*") == NAMES


@pytest.mark.parametrize(("name", "params"), list(zip(NAMES, PARAMS, strict=True)))
def test_parameter_counts_and_keys(name, params):
    with torch.device("meta"):
        model = pk.create_model(name)
    config = model_config(name)
    assert sum(p.numel() for p in model.parameters()) == params == config.params
    assert list(model.state_dict()) == official_keys(config.layers)
    assert model.config is config


def test_configurations_are_timms():
    timm = require("timm")
    for name in NAMES:
        config, theirs = model_config(name), timm.get_pretrained_cfg(f"{name}.sail_in1k")
        assert (config.crop_pct, config.mean, config.std) == (theirs.crop_pct, theirs.mean, theirs.std)
        assert (config.interpolation, (3, config.input_size, config.input_size)) == (
            "bicubic",
            theirs.input_size,
        )
        assert config.interpolation == theirs.interpolation
        assert config.hf_hub_id == theirs.hf_hub_id
    rates = [model_config(name).drop_path_rate for name in NAMES]
    assert rates == [0.1, 0.1, 0.2, 0.3, 0.4]
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


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_timm_at_224(name):
    ours, theirs = timm_twin(name)
    x = images(1, 3, 224, 224)
    with torch.inference_mode():
        y, expected = ours(x), theirs(x)
    assert expected.std() > 0.05
    assert relative_error(y, expected) < 1e-5


def test_error_is_no_larger_than_timms():
    ours, theirs = timm_twin()
    x = images(2, 3, 64, 96)
    with torch.inference_mode():
        fp32, eager = ours(x), theirs(x)
        bf16, eager_bf16 = (m.bfloat16()(x.bfloat16()) for m in (ours, theirs))
        ours16, theirs64 = copy.deepcopy(ours), theirs.double()
        exact16 = theirs64(x.bfloat16().double())
    ours, theirs = timm_twin()
    with torch.inference_mode():
        exact = theirs.double()(x.double())
    assert relative_error(fp32, exact) < 1.5 * relative_error(eager, exact) + 1e-6
    assert bf16.dtype == torch.bfloat16
    assert ours16.head.weight.dtype == torch.bfloat16
    assert relative_error(bf16, exact16) < 1.5 * relative_error(eager_bf16, exact16) + 2e-3


@pytest.mark.parametrize("size", [(193, 257), (33, 47), (3, 3), (40, 5)])
def test_odd_sizes_equal_timm(size):
    ours, theirs = timm_twin(num_classes=20)
    x = images(2, 3, *size)
    with torch.inference_mode():
        maps, expected_maps = ours.forward_features(x), theirs.forward_features(x)
        assert relative_error(maps, expected_maps) < 1e-5
        assert relative_error(ours(x), theirs(x)) < 1e-5


def test_logits_equal_the_official_formula(s12):
    x = images(2, 3, 64, 48)
    with torch.inference_mode():
        maps, logits = official_model(s12.state_dict(), x)
        assert relative_error(s12.forward_features(x), maps) < 1e-5
        assert relative_error(s12(x), logits) < 1e-5
        assert torch.equal(s12.forward_head(s12.forward_features(x)), s12(x))
    exact = copy.deepcopy(s12).double()
    assert relative_error(exact(x.double()), official_model(exact.state_dict(), x.double())[1]) < 1e-12


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformer_s24"])
def test_logits_equal_transformers(name):
    transformers = require("transformers", "models.poolformer.modeling_poolformer")
    config = model_config(name)
    peer = transformers.PoolFormerConfig(depths=config.layers, hidden_sizes=config.dims, num_labels=20)
    theirs = randomise(transformers.PoolFormerForImageClassification(peer)).eval()
    ours = pk.create_model(name, num_classes=20).eval()
    ours.load_state_dict(pk.convert_state_dict(theirs.state_dict()))
    x = images(2, 3, 64, 96)
    with torch.inference_mode():
        expected = theirs(x, output_hidden_states=True)
        assert relative_error(ours(x), expected.logits) < 1e-5
        assert relative_error(ours.forward_features(x), expected.hidden_states[-1]) < 1e-5


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


def test_pooled_features_equal_timm():
    ours, theirs = timm_twin(num_classes=0)
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(ours(x), theirs(x)) < 1e-5


def test_gradients_equal_timm():
    ours, theirs = timm_twin(num_classes=10)
    x, weight = images(2, 3, 64, 64), images(2, 10, seed=1)
    theirs_x, ours_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    (theirs(theirs_x) * weight).sum().backward()
    (ours(ours_x) * weight).sum().backward()
    assert relative_error(ours_x.grad, theirs_x.grad) < 1e-4
    expected = pk.convert_state_dict({name: p.grad for name, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        if "norm1.bias" in name:  # exactly zero; eager returns rounding noise
            assert (
                p.grad.norm() < 1e-5 * ours.get_parameter(name.replace("bias", "weight")).grad.norm() + 1e-7
            ), name
        else:
            assert relative_error(p.grad, expected[name]) < 1e-4, name


def test_training_with_stochastic_depth_equals_timm_under_the_same_seed():
    ours, theirs = timm_twin(num_classes=10, drop_path_rate=0.6)
    x = images(6, 3, 32, 32)
    torch.manual_seed(5)
    expected = theirs.train()(x)
    torch.manual_seed(5)
    y = ours.train()(x)
    assert relative_error(y, expected) < 1e-5
    assert relative_error(y, ours.eval()(x)) > 0.05


# ---- features ----------------------------------------------------------------------------------------------


def test_feature_maps_equal_timm_through_norms_of_their_own():
    timm = require("timm")
    torch.manual_seed(0)
    theirs = randomise(timm.create_model("poolformer_s12", num_classes=0)).eval()
    ours = randomise(pk.create_model("poolformer_s12", features_only=True), seed=1).eval()
    state = pk.convert_state_dict(theirs.state_dict())
    result = ours.load_state_dict({k: v for k, v in state.items() if not k.startswith("norm.")}, strict=False)
    norms = [f"norm{i}" for i in (0, 2, 4, 6)]
    assert result.missing_keys == [f"{n}.{p}" for n in norms for p in ("weight", "bias")]
    x = images(2, 3, 65, 97)
    with torch.inference_mode():
        maps = ours(x)
        raw = theirs.forward_intermediates(x, intermediates_only=True)
        for norm, y, expected, dim in zip(norms, maps, raw, S12_DIMS, strict=True):
            p = dict(ours.get_submodule(norm).named_parameters())
            assert y.shape[1] == dim
            assert relative_error(y, F.group_norm(expected, 1, p["weight"], p["bias"], 1e-5)) < 1e-5
        assert relative_error(ours.forward_features(x), raw[-1]) < 1e-5
    strides = [m.shape[2:] for m in ours(images(1, 3, 64, 96))]
    assert strides == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_features_have_no_head():
    model = pk.create_model("poolformer_s12", features_only=True)
    assert sum(p.numel() for p in model.parameters()) == 11_915_176 - 513 * 1000 + 2 * (64 + 128 + 320)
    for call in (lambda: model.forward_head(torch.zeros(1, 512, 2, 2)), lambda: model.reset_classifier(5)):
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


def test_channels_last_equals_nchw(s12):
    x = images(2, 3, 64, 96)
    model = copy.deepcopy(s12).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        features = model.forward_features(x.contiguous(memory_format=torch.channels_last))
        assert features.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(features, s12.forward_features(x)) < 1e-5
        assert relative_error(model(x.contiguous(memory_format=torch.channels_last)), s12(x)) < 1e-5


@pytest.mark.parametrize("head", HEADS)
def test_cpu_autocast(own, head):
    own.head_mode = head
    x = images(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        features = own.forward_features(x)
        logits = own(x)
        eager = official_model(own.state_dict(), x)[0]
    assert features.dtype == logits.dtype == torch.bfloat16
    with torch.inference_mode():
        double = copy.deepcopy(own).double()
        exact = double.forward_features(x.double())
        assert relative_error(logits, double(x.double())) < 0.03
    # eager widens the residual stream to float32 at the LayerScale, ours stays bfloat16
    assert (
        relative_error(features, exact) < 1.5 * relative_error(eager, exact) + torch.finfo(torch.bfloat16).eps
    )
    logits.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == p.dtype for p in own.parameters())


def test_copies_and_files(s12):
    x = images(1, 3, 64, 64)
    buffer = io.BytesIO()
    torch.save(s12, buffer)
    buffer.seek(0)
    other = pk.create_model("poolformer_s12", num_classes=20).eval()
    other.load_state_dict(s12.state_dict())
    with torch.inference_mode():
        expected = s12(x)
        copies = (
            copy.deepcopy(s12),
            pickle.loads(pickle.dumps(s12)),
            torch.load(buffer, weights_only=False),
            other,
        )
        for same in copies:
            assert torch.equal(same(x), expected)
    copied = copies[0]
    copied.head_mode = "timm"
    assert s12.head_mode == "official"
    assert copied.state_dict()._metadata[""]["head_mode"] == "timm"


def test_other_image_channels_and_empty_batches():
    model = pk.create_model("poolformer_s12", num_classes=5, in_chans=1).eval()
    assert model.patch_embed.proj.weight.shape == (64, 1, 7, 7)
    with torch.inference_mode():
        assert model(images(0, 1, 64, 64)).shape == (0, 5)


def test_compiled_model_has_no_graph_break(s12):
    torch.compiler.reset()
    compiled = torch.compile(s12, backend="eager", fullgraph=True)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(compiled(x), s12(x)) < 1e-6


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"name": "poolformer-s24"},
            ValueError,
            ("name", "'poolformer-s24'", *NAMES, "did you mean poolformer_s24"),
        ),
        ({"name": "resnet18"}, ValueError, ("name", "'resnet18'", *NAMES)),
        ({"name": ["poolformer_s12"]}, ValueError, ("name", *NAMES)),
        ({"head": "mean"}, ValueError, ("head", "'mean'", "official, timm")),
        ({"num_classes": -1}, ValueError, ("num_classes", "-1", "negative")),
        ({"num_classes": 10.0}, TypeError, ("num_classes", "float", "int")),
        ({"in_chans": 0}, ValueError, ("in_chans", "0", "positive")),
        ({"in_chans": "3"}, TypeError, ("in_chans", "str", "int")),
        ({"drop_path_rate": 1}, ValueError, ("drop_path_rate", "1", "[0, 1)")),
        ({"drop_path_rate": float("nan")}, ValueError, ("drop_path_rate", "nan", "[0, 1)")),
        ({"drop_path_rate": "0.1"}, TypeError, ("drop_path_rate", "str", "number")),
        (
            {"checkpoint": "a.pth", "pretrained": True},
            ValueError,
            ("checkpoint", "pretrained", "one of them"),
        ),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error) as caught:
        pk.create_model(**{"name": "poolformer_s12", **options})
    for word in words:
        assert word in str(caught.value)


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
    with pytest.raises(error) as caught:
        s12(x)
    for word in ("x must", *words):
        assert word in str(caught.value)


def test_bad_head_mode_changes_nothing(own):
    with pytest.raises(ValueError, match=r"'both'.*official, timm"):
        own.head_mode = "both"
    assert own.head_mode == "official"
