"""Files of the four sources, whole, wrapped, partial, wrong and broken."""

import argparse
import io
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
from support.models import on_meta, raises, unchanged
from support.peers import as_mmpretrain, randomise, relative_error, require, timm_model, transformers_model
from support.problems import randn

import poolformer_kernels as pk
from poolformer_kernels.models import CheckpointReport

CLASSES = 7
X = randn(1, 3, 48, 64)


def our_model(seed=0, name="poolformer_s12", num_classes=CLASSES, **options):
    torch.manual_seed(seed)
    return randomise(pk.create_model(name, num_classes=num_classes, **options), seed).eval()


def logits(model):
    with torch.inference_mode():
        return model(X)


@pytest.fixture
def load(tmp_path):
    """A model of ours with the weights of a file that holds this, and the report."""

    def make(content, **options):
        torch.save(content, tmp_path / "model.pth")
        model = our_model(**options)
        return model, pk.load_checkpoint(model, tmp_path / "model.pth")

    return make


def from_timm():
    model = timm_model(seed=1, num_classes=CLASSES)
    return model.state_dict(), lambda: logits(model)


def from_huggingface():
    model = transformers_model(CLASSES, seed=1)
    return model.state_dict(), lambda: model(X).logits.detach()


def from_official():
    model = our_model(1)
    state = OrderedDict(model.state_dict().items())  # a new mapping: no metadata of ours
    return state, lambda: logits(model)


def from_mmpretrain():
    state, expected = from_official()
    return as_mmpretrain(state), expected


SOURCES = {
    "official": from_official,
    "timm": from_timm,
    "huggingface": from_huggingface,
    "mmpretrain": from_mmpretrain,
}


# ---- every source, every container -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".bin", ".safetensors"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_its_own_logits(source, suffix, tmp_path):
    state, expected = SOURCES[source]()
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        require("safetensors.torch").save_file(dict(state), path)
    else:
        torch.save(state, path)
    head_mode = "timm" if source == "timm" else "official"
    model = our_model(head="official" if source == "timm" else "timm")
    report = pk.load_checkpoint(model, str(path))
    assert report == CheckpointReport(source, head_mode, (), ())
    assert model.head_mode == head_mode
    assert relative_error(logits(model), expected()) < 1e-5


def test_conversion_shares_the_tensors_and_leaves_the_argument():
    state, _ = from_timm()
    keys = list(state)
    converted = pk.convert_state_dict(state)
    assert list(state) == keys
    assert converted["head.weight"].data_ptr() == state["head.fc.weight"].data_ptr()
    again = pk.convert_state_dict(converted)
    assert list(again) == list(converted)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3, "arch": "poolformer_s12", "args": argparse.Namespace(lr=0.1)},
        lambda s: {"model": s, "optimizer": {"state": {}}},
        lambda s: {"model_state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    ],
    ids=["state_dict", "model", "model_state_dict-ddp", "ddp", "compiled-ddp"],
)
@pytest.mark.parametrize("source", ["official", "timm", "mmpretrain"])
def test_wrappers_and_prefixes(source, wrap, load):
    state, expected = SOURCES[source]()
    model, report = load(wrap(state))
    assert report.source == source
    assert relative_error(logits(model), expected()) < 1e-5


@pytest.mark.parametrize("head", ["official", "timm"])
def test_our_own_files_remember_their_head(head, load):
    model = our_model(1, head=head)
    for content in ({"state_dict": model.state_dict()}, torch.nn.DataParallel(model).state_dict()):
        other, report = load(content, head="official" if head == "timm" else "timm")
        assert (report.source, report.head_mode) == ("official", head)
        assert torch.equal(logits(other), logits(model))


def test_half_precision_files_load_into_the_models_dtype(load):
    state, _ = from_official()
    model, _ = load({key: value.bfloat16() for key, value in state.items()})
    assert torch.equal(model.head.weight, state["head.weight"].bfloat16().float())


# ---- parts of a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_without_classes_leaves_the_classifier(source, load):
    state, expected = SOURCES[source]()
    model, report = load(state, num_classes=0)
    assert sorted(report.not_in_model) == ["head.bias", "head.weight"]
    assert report.not_in_file == ()
    ours = pk.convert_state_dict(state)
    y = torch.nn.functional.linear(logits(model), ours["head.weight"], ours["head.bias"])
    assert relative_error(y, expected()) < 1e-5


@pytest.mark.parametrize("source", SOURCES)
def test_features_from_a_classification_file(source, load):
    state, _ = SOURCES[source]()
    model, report = load(state, features_only=True)
    assert sorted(report.not_in_model) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert report.not_in_file == tuple(f"norm{i}.{p}" for i in (0, 2, 4, 6) for p in ("weight", "bias"))
    assert torch.equal(model.norm2.weight, our_model(features_only=True).norm2.weight)
    classifier, _ = load(state)
    with torch.inference_mode():
        assert torch.equal(model.forward_features(X), classifier.forward_features(X))


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_features_from_a_dense_backbone(prefix, load):
    theirs = our_model(1, features_only=True)
    content = {prefix + key: value for key, value in theirs.state_dict().items()}
    model, report = load(content, features_only=True)
    assert report == CheckpointReport("mmpretrain" if prefix else "official", "official", (), ())
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=0)


def test_backbones_of_timm_and_transformers():
    timm, transformers = require("timm"), require("transformers", "models.poolformer.modeling_poolformer")
    with torch.device("meta"):
        listed = timm.create_model("poolformer_s12", features_only=True).state_dict()
        plain = transformers.PoolFormerModel(transformers.PoolFormerConfig()).state_dict()
    expected = [key for key in on_meta().state_dict() if not key.startswith(("norm.", "head."))]
    assert sorted(pk.convert_state_dict(listed)) == sorted(expected)
    assert sorted(pk.convert_state_dict(plain)) == sorted(expected)


# ---- files that do not fit ---------------------------------------------------------------------------------


FC1, MISSING = "network.0.0.mlp.fc1.weight", "2 missing keys, the first network.4.5.norm2.bias"
OTHER = {"conv1.weight": torch.zeros(3)}  # of no PoolFormer


def renamed_and_dropped():
    state, _ = from_official()
    del state["network.4.5.norm2.bias"]
    del state["network.6.0.mlp.fc1.weight"]
    return state | {"network.4.6.norm2.bias": torch.zeros(320)}


def reshaped():
    state, _ = from_official()
    return state | {FC1: state[FC1][:, :, 0, 0]}


def v2_of_timm():
    return dict(require("timm").create_model("poolformerv2_s12").state_dict())


def other(**options):
    return lambda: our_model(1, **options).state_dict()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (renamed_and_dropped, (MISSING, "1 unexpected keys, the first network.4.6.norm2.bias")),
        (reshaped, (FC1, "[256, 64] in the file", "[256, 64, 1, 1] in the model")),
        (other(name="poolformer_s24"), ("unexpected keys, the first network.0.2.layer_scale_1",)),
        (other(num_classes=21), ("head.weight", "[21, 512]", "num_classes=21")),
        (other(num_classes=0), ("2 missing keys, the first head.weight",)),
        (other(features_only=True), ("first norm.weight", "unexpected", "first norm0.weight")),
        (other(in_chans=1), ("patch_embed.proj.weight", "[64, 1, 7, 7]", "[64, 3, 7, 7]")),
        (v2_of_timm, ("missing", "network.0.0.layer_scale_1", "unexpected", "patch_embed.norm.weight")),
        (lambda: OTHER, ("not a PoolFormer checkpoint", "'conv1.weight'", "stem.conv.weight")),
        (dict, ("not a PoolFormer checkpoint", "empty")),
    ],
    ids=["keys", "shape", "deeper", "classes", "headless", "features", "channels", "v2", "other", "empty"],
)
def test_a_wrong_file_is_named_and_changes_nothing(make, words, tmp_path):
    torch.save(make(), tmp_path / "wrong.pth")
    model = our_model(head="timm")
    with unchanged(model), raises(ValueError, "wrong.pth", *words):
        pk.load_checkpoint(model, tmp_path / "wrong.pth")


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Payload:
    """Runs code when a file is unpickled without weights_only."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the file ran code')",)


UNREADABLE = {
    "empty": b"",
    "text": b"not a checkpoint",
    "half a zip": b"PK\x03\x04 half a zip",
    "zeros": bytes(100),
    "truncated": saved({"head.weight": torch.ones(7, 512)})[:-2000],
    "code": saved({"state_dict": {"head.weight": torch.ones(7, 512)}, "extra": Payload()}),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", UNREADABLE)
def test_a_file_that_cannot_be_read(content, suffix, tmp_path):
    if suffix == ".safetensors":
        require("safetensors")
    path, model = tmp_path / f"broken{suffix}", our_model()
    path.write_bytes(UNREADABLE[content])
    with unchanged(model), pytest.raises(ValueError, match=r"broken.*: cannot be read as tensors only"):
        pk.load_checkpoint(model, path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], ("state_dict", "list")),
        ({"epoch": 3}, ("int", "'epoch'")),
        ({3: torch.zeros(1)}, ("names", "3")),
    ],
)
def test_a_file_without_tensors(content, words, load):
    with raises(TypeError, "model.pth", *words):
        load(content)
    with pytest.raises(TypeError, match=r"state_dict must"):
        pk.convert_state_dict(content)


def test_a_missing_file_and_a_foreign_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist or is not a file"):
        pk.load_checkpoint(our_model(), tmp_path / "none.pth")
    with pytest.raises(TypeError, match=r"model must be .*PoolFormer, got Linear"):
        pk.load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "none.pth")


# ---- from the hub ------------------------------------------------------------------------------------------


def fake_hub(monkeypatch, download):
    hub = ModuleType("huggingface_hub")
    hub.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_pretrained_comes_from_the_hub(tmp_path, monkeypatch):
    theirs = timm_model(seed=1)
    require("safetensors.torch").save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(repo_id, filename):
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    fake_hub(monkeypatch, download)
    model = pk.create_model("poolformer_s12", pretrained=True).eval()
    assert asked == [("timm/poolformer_s12.sail_in1k", "model.safetensors")]
    assert model.head_mode == "timm"
    assert relative_error(logits(model), logits(theirs)) < 1e-5
    features = pk.create_model("poolformer_s12", pretrained=True, features_only=True)
    assert torch.equal(features.network[6][1].mlp.fc2.weight, theirs.stages[3].blocks[1].mlp.fc2.weight)


def test_pretrained_offline(monkeypatch, tmp_path):
    hub = require("huggingface_hub")
    require("safetensors")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"timm/poolformer_s12\.sail_in1k.*checkpoint") as caught:
        pk.create_model("poolformer_s12", pretrained=True)
    assert "\n" not in str(caught.value)


def test_pretrained_with_an_error_of_the_client(monkeypatch):
    require("safetensors")

    def download(repo_id, filename):
        raise Exception("no route\nto host")

    fake_hub(monkeypatch, download)
    with pytest.raises(ConnectionError, match=r"no route;"):
        pk.create_model("poolformer_s12", pretrained=True)


def test_without_safetensors(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").touch()
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install safetensors"):
        pk.load_checkpoint(our_model(), tmp_path / "model.safetensors")


def test_without_the_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install huggingface_hub"):
        pk.create_model("poolformer_s12", pretrained=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 10}, ("num_classes is 10", "1000", "reset_classifier")),
        ({"in_chans": 1}, ("in_chans is 1", "3")),
    ],
)
def test_pretrained_weights_have_their_own_sizes(options, words, monkeypatch):
    fake_hub(monkeypatch, lambda *_: pytest.fail("downloaded"))
    with raises(ValueError, *words):
        pk.create_model("poolformer_s12", pretrained=True, **options)
