"""Weights under other code bases' names: what these compute with them, and what is refused."""

import re
from collections import OrderedDict

import pytest
import torch
from support.export import CLASSES, HEAD, X, assert_same_logits, logits, ours, peer, plain, theirs
from support.metaformer import tiny, twin
from support.models import on_meta, shapes
from support.peers import as_mmpretrain, relative_error, require
from support.problems import randn

import poolformer_kernels as pk
from poolformer_kernels.models import ModelConfig, PoolFormer
from poolformer_kernels.models.export import TARGETS

NAMES = pk.list_models("poolformer_*")
S12 = NAMES[0]
NAMES_V2 = pk.list_models("poolformerv2_*")


def sized(names, *more):
    """With ``more`` before each; the larger models are long."""
    large = ("s36", "m36", "m48")
    return [pytest.param(*more, n, marks=[pytest.mark.long] if n.endswith(large) else []) for n in names]


# ---- the same logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "name", "num_classes", "in_chans"),
    [
        *(("timm", n, 7, 3) for n in ("PoolFormer", "PoolFormerV2", "poolformer_s12", "poolformerv2_s12")),
        *(("transformers", n, 7, 3) for n in ("PoolFormer", "poolformer_s12")),
        *((to, "PoolFormer", 0, 3) for to in ("timm", "transformers")),
        *((to, "PoolFormer", 3, 1) for to in ("timm", "transformers")),
    ],
)
def test_others_compute_the_same_logits(to, name, num_classes, in_chans):
    model = ours(name, HEAD[to], num_classes, in_chans)
    weights = pk.export_state_dict(model.state_dict(), to)
    assert_same_logits(model, theirs(to, name, weights, num_classes, in_chans), X[:, :in_chans])


@pytest.mark.parametrize("source", ["timm", "transformers", "mmpretrain"])
def test_the_official_code_computes_the_same_logits(source):
    """Of a file that came from elsewhere."""
    model = ours("poolformer_s12", head="official")
    state = plain(model)
    given = as_mmpretrain(state) if source == "mmpretrain" else pk.export_state_dict(state, source)
    assert not set(given) & {"patch_embed.proj.weight", "network.0.0.norm1.weight"}
    weights = pk.export_state_dict(given, "official")
    assert list(weights) == list(state)
    assert_same_logits(model, theirs("official", "poolformer_s12", weights))


@pytest.mark.parametrize("to", TARGETS)
def test_the_other_head_gives_other_logits(to):
    """What the command says of the heads."""
    model = ours("PoolFormer", head="official" if HEAD[to] == "timm" else "timm")
    there = theirs(to, "PoolFormer", pk.export_state_dict(model.state_dict(), to))
    assert relative_error(logits(model), logits(there)) > 0.01
    model.head_mode = HEAD[to]
    assert relative_error(logits(model), logits(there)) < 1e-5


def test_a_backbones_maps_are_the_same():
    timm = require("timm")
    model = ours("poolformer_s12", features_only=True)
    state = {key: t for key, t in model.state_dict().items() if not re.match(r"norm\d", key)}
    weights = pk.export_state_dict(state, "timm")
    there = timm.create_model("poolformer_s12", num_classes=0)
    missing, unexpected = there.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["head.norm.weight", "head.norm.bias"], [])
    with torch.inference_mode():
        expected = model.double().forward_features(X.double())
        assert relative_error(there.eval().double().forward_features(X.double()), expected) < 1e-12


# ---- every model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "name"), [*sized(NAMES + NAMES_V2, "timm"), *sized(NAMES, "transformers")])
def test_every_model_has_their_names_and_returns(to, name):
    state = plain(on_meta(name))
    there = pk.export_state_dict(state, to)
    with torch.device("meta"):
        assert shapes(there) == shapes(peer(to, name, 1000).state_dict())
    assert_identical(pk.export_state_dict(there, "official"), state)
    assert_identical(pk.convert_state_dict(there), state)
    assert_identical(pk.export_state_dict(there, to, name), there)
    if to == "transformers":
        assert_identical(pk.export_state_dict(pk.export_state_dict(there, "timm"), to), there)


@pytest.mark.parametrize("name", sized(pk.list_models()))
def test_every_model_keeps_its_official_names(name):
    model = on_meta(name)
    state = model.state_dict()
    assert_identical(pk.export_state_dict(state, "official"), state)
    assert_identical(pk.export_state_dict(state, "official", name), state)
    unnoted = plain(model)
    assert_identical(pk.export_state_dict(unnoted, "official", name), unnoted)


def assert_identical(actual, expected):
    """The same tensors themselves, none copied, under the same names in the same order."""
    assert list(actual) == list(expected)
    for key, value in actual.items():
        assert value is expected[key], key


def test_wrappers_and_prefixes_go():
    state = plain(on_meta("poolformer_s12"))
    wrapped = {"epoch": 3, "model": {f"module.{key}": value for key, value in state.items()}}
    assert_identical(pk.export_state_dict(wrapped, "official"), state)
    assert_identical(pk.export_state_dict(wrapped, "timm"), pk.export_state_dict(state, "timm"))


# ---- what a target does not have ---------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["timm", "transformers"])
@pytest.mark.parametrize("name", pk.list_models("metaformer_*"))
def test_metaformers_are_refused(name, to):
    """Known by their name, or by what our models note; among them those with the names of a PoolFormer."""
    families = "PoolFormer and PoolFormerV2" if to == "timm" else "PoolFormer"
    model = on_meta(name)
    with pytest.raises(ValueError, match=rf"{to} has no {name}; allowed: models of {families}$"):
        pk.export_state_dict(plain(model), to, name)
    mixers = set(model.config.token_mixers)
    mixers = mixers.pop() if len(mixers) == 1 else "/".join(model.config.token_mixers)
    with pytest.raises(ValueError, match=rf"{to} has no MetaFormer with token_mixers={mixers}"):
        pk.export_state_dict(model.state_dict(), to)


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ({"pool_size": 5}, "pool_size=5"),
        ({"norm_layer": "layer", "act_layer": "relu"}, "norm_layer=layer, act_layer=relu"),
        ({"residual": False}, "residual=False"),
        ({"mlp": False}, "mlp=False"),
        ({"act_layer": torch.nn.Tanh}, "act_layer=Tanh"),
        ({"layer_scale_init": None}, "layer_scale_init=None"),
        ({"token_mixers": "convolution"}, "token_mixers=convolution"),
        ({"norm_layer": "batch"}, "norm_layer=batch"),
    ],
    ids=lambda value: value.partition("=")[0] if isinstance(value, str) else "",
)
def test_a_structure_of_ones_own_is_refused_by_name(structure, said, tmp_path):
    model = tiny(**structure)
    torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "own.pth")  # the file remembers, too
    saved = torch.load(tmp_path / "own.pth", weights_only=True)
    for state in (model.state_dict(), saved, {"state_dict": saved}):
        for to in ("timm", "transformers"):
            with pytest.raises(ValueError, match=rf"{to} has no MetaFormer with {said}; allowed: models of"):
                pk.export_state_dict(state, to)
        weights = pk.export_state_dict(state, "official")
        assert list(weights) == list(model.state_dict())
        with pytest.raises(ValueError, match=rf"not of a poolformer_s12: the model that wrote it has {said}"):
            pk.export_state_dict(state, "official", "poolformer_s12")
    with torch.inference_mode():
        x = randn(1, 3, 40, 56).double()
        expected = model.double()(x)
        if structure != {"layer_scale_init": None}:
            weights = {key: value.double() for key, value in weights.items()}
            assert relative_error(twin(model.config, weights, x)[1], expected) < 1e-12


def test_a_metaformer_like_a_poolformer_is_one():
    model = pk.create_model("poolformer_s12", pool_size=3)
    assert type(model) is not PoolFormer
    state = model.state_dict()
    for to in TARGETS:
        expected = pk.export_state_dict(OrderedDict(state.items()), to)
        assert_identical(pk.export_state_dict(state, to, "poolformer_s12"), expected)


@pytest.mark.parametrize(
    ("of", "to", "name", "message"),
    [
        (S12, "official", "metaformer_s12", "not of a metaformer_s12.* has the structure of a PoolFormer"),
        (S12, "timm", "poolformer_s24", "does not fit poolformer_s24: .* missing keys"),
        (S12, "timm", "poolformerv2_s12", "does not fit poolformerv2_s12: "),
        (S12, "timm", "poolformer_s13", "name is 'poolformer_s13'; allowed: poolformer_s12, "),
        ("poolformerv2_s12", "transformers", None, "has no poolformerv2_s12; allowed: models of PoolFormer"),
    ],
)
def test_another_poolformer_than_the_asked_one(of, to, name, message):
    with pytest.raises(ValueError, match=message):
        pk.export_state_dict(on_meta(of).state_dict(), to, name)


def test_a_dense_backbone_has_norms_that_only_the_official_code_has():
    state = on_meta("poolformer_s12", features_only=True).state_dict()
    assert_identical(pk.export_state_dict(state, "official"), state)
    for to in ("timm", "transformers"):
        with pytest.raises(ValueError, match=rf"{to} has no place for norm0.weight"):
            pk.export_state_dict(state, to)


def test_timm_has_no_downsample_between_stages_of_the_same_width():
    timm = require("timm", "models.metaformer")
    config = ModelConfig("flat", (1, 1, 1, 1), (16, 16, 32, 48), 1e-5, 0.0, None, 1.0)
    state = PoolFormer(config, CLASSES).state_dict()
    with pytest.raises(ValueError, match=r"no downsample .* equally many channels; these are 16, 16, 32, 48"):
        pk.export_state_dict(state, "timm")
    theirs = timm.models.metaformer.MetaFormer(depths=config.layers, dims=config.dims)
    assert type(theirs.stages[1].downsample) is torch.nn.Identity
    there = pk.export_state_dict(state, "transformers")
    assert "poolformer.encoder.patch_embeddings.1.projection.weight" in there


def without(key):
    return lambda: {name: t for name, t in plain(on_meta()).items() if name != key}


def with_tensor(key, *shape):
    return lambda: plain(on_meta()) | {key: torch.zeros(shape)}


def whole(name):
    return lambda: plain(on_meta(name))


def caformer():
    with torch.device("meta"):
        return require("timm").create_model("caformer_s18").state_dict()


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without("network.0.1.norm2.bias"), "1 missing keys, the first network.0.1.norm2.bias"),
        (with_tensor("momentum", 3), "1 unexpected keys, the first momentum"),
        (without("head.weight"), "1 missing keys, the first head.weight"),
        (without("norm.weight"), "1 missing keys, the first norm.weight"),
        (without("network.3.proj.weight"), "it has no network.3.proj.weight; a MetaFormer mus"),
        (with_tensor("network.0.0.norm1.weight", 3), r"norm1.weight: \[3\] in the file, \[64\] in"),
        (with_tensor("patch_embed.proj.weight", 64, 3), "must be the weight of a convolution, .*64, 3"),
        (with_tensor("head.weight"), "of another shape, the first head.weight"),
        (with_tensor("head.weight", 0, 512), "of another shape, the first head.weight"),
        (with_tensor("head.weight", 1000, 4), r"head.weight: \[1000, 4\] in the file, \[1000, 512\]"),
        (whole("metaformer_ppaa_s12_224"), "not of a PoolFormer: .*; a MetaFormer must be"),
        (whole("metaformer_ppff_s12_224"), "unexpected keys, .*; a MetaFormer must be named"),
        (caformer, "PoolFormerV2 of 3, 3, 9, 3 blocks and 64, 128, 320, 512 channels: .*token_mixer"),
        (lambda: {"conv1.weight": torch.zeros(3)}, "not a PoolFormer checkpoint: its first key"),
        (dict, "not a PoolFormer checkpoint: it is empty"),
    ],
)
def test_weights_of_no_whole_model_are_refused(make, words, to):
    with pytest.raises(ValueError, match=words):
        pk.export_state_dict(make(), to)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"to is 'keras'; allowed: official, timm, transformers"):
        pk.export_state_dict({}, "keras")
    for content in ([1, 2], {"epoch": 3}, {3: torch.zeros(1)}):
        with pytest.raises(TypeError, match=r"state_dict must"):
            pk.export_state_dict(content, "timm")
