"""Files of the four sources, whole, wrapped, partial, wrong and broken."""

import argparse
import builtins
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
from support.peers import randomise, relative_error, require
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


def snapshot(model):
    return model.head_mode, {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model, before):
    head_mode, state = before
    assert model.head_mode == head_mode
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def from_timm(**options):
    timm = require("timm")
    torch.manual_seed(1)
    model = randomise(timm.create_model("poolformer_s12", num_classes=CLASSES, **options), 1).eval()
    return model.state_dict(), lambda: logits(model)


def from_huggingface():
    transformers = require("transformers", "models.poolformer.modeling_poolformer")
    torch.manual_seed(1)
    config = transformers.PoolFormerConfig(num_labels=CLASSES)
    model = randomise(transformers.PoolFormerForImageClassification(config), 1).eval()
    return model.state_dict(), lambda: model(X).logits.detach()


def from_official():
    model = our_model(1)
    return OrderedDict(model.state_dict().items()), lambda: logits(
        model
    )  # a new mapping: no metadata of ours


def from_mmpretrain():
    state, expected = from_official()
    renamed = {}
    for key, value in state.items():
        key = f"backbone.{key}" if key.startswith(("patch_embed.", "network.")) else key
        key = key.replace("head.", "head.fc.") if key.startswith("head.") else key
        renamed[key.replace("norm.", "backbone.norm6.") if key.startswith("norm.") else key] = value
    return renamed, expected


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


def test_mmpretrain_keys_are_those_of_its_backbone():
    state, _ = from_mmpretrain()
    assert {"backbone.patch_embed.proj.weight", "backbone.network.1.proj.bias"} < set(state)
    assert {"backbone.network.0.1.layer_scale_1", "backbone.norm6.weight", "head.fc.weight"} < set(state)
    assert len(state) == len(from_official()[0])


@pytest.mark.parametrize("name", ["poolformer_s24", "poolformer_m48"])
def test_every_key_of_a_deeper_timm_model_is_converted(name):
    timm = require("timm")
    with torch.device("meta"):
        theirs, ours = timm.create_model(name).state_dict(), pk.create_model(name).state_dict()
    converted = pk.convert_state_dict(theirs)
    assert {key: value.shape for key, value in converted.items()} == {k: v.shape for k, v in ours.items()}


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
def test_wrappers_and_prefixes(source, wrap, tmp_path):
    state, expected = SOURCES[source]()
    torch.save(wrap(state), tmp_path / "last.pth.tar")
    model = our_model()
    assert pk.load_checkpoint(model, tmp_path / "last.pth.tar").source == source
    assert relative_error(logits(model), expected()) < 1e-5


@pytest.mark.parametrize("head", ["official", "timm"])
def test_our_own_files_remember_their_head(head, tmp_path):
    model = our_model(1, head=head)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "own.pth")
    torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "parallel.pth")
    for file in ("own.pth", "parallel.pth"):
        other = our_model(head="official" if head == "timm" else "timm")
        report = pk.load_checkpoint(other, tmp_path / file)
        assert (report.source, report.head_mode) == ("official", head)
        assert torch.equal(logits(other), logits(model))


def test_half_precision_files_load_into_the_models_dtype(tmp_path):
    state, _ = from_official()
    torch.save({key: value.bfloat16() for key, value in state.items()}, tmp_path / "half.pth")
    model = our_model()
    pk.load_checkpoint(model, tmp_path / "half.pth")
    assert torch.equal(model.head.weight, state["head.weight"].bfloat16().float())


# ---- parts of a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_without_classes_leaves_the_classifier(source, tmp_path):
    state, expected = SOURCES[source]()
    torch.save(state, tmp_path / "model.pth")
    model = our_model(num_classes=0)
    report = pk.load_checkpoint(model, tmp_path / "model.pth")
    assert sorted(report.not_in_model) == ["head.bias", "head.weight"]
    assert report.not_in_file == ()
    ours = pk.convert_state_dict(state)
    assert (
        relative_error(
            torch.nn.functional.linear(logits(model), ours["head.weight"], ours["head.bias"]), expected()
        )
        < 1e-5
    )


@pytest.mark.parametrize("source", SOURCES)
def test_features_from_a_classification_file(source, tmp_path):
    state, _ = SOURCES[source]()
    torch.save(state, tmp_path / "model.pth")
    model = our_model(features_only=True)
    norm2 = model.norm2.weight.clone()
    report = pk.load_checkpoint(model, tmp_path / "model.pth")
    assert sorted(report.not_in_model) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert report.not_in_file == tuple(f"norm{i}.{p}" for i in (0, 2, 4, 6) for p in ("weight", "bias"))
    assert torch.equal(model.norm2.weight, norm2)
    classifier = our_model()
    pk.load_checkpoint(classifier, tmp_path / "model.pth")
    with torch.inference_mode():
        assert torch.equal(model.forward_features(X), classifier.forward_features(X))


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_features_from_a_dense_backbone(prefix, tmp_path):
    theirs = our_model(1, features_only=True)
    torch.save({prefix + key: value for key, value in theirs.state_dict().items()}, tmp_path / "model.pth")
    model = our_model(features_only=True)
    report = pk.load_checkpoint(model, tmp_path / "model.pth")
    assert report == CheckpointReport("mmpretrain" if prefix else "official", "official", (), ())
    for ours, expected in zip(logits(model), logits(theirs), strict=True):
        assert torch.equal(ours, expected)


def test_backbones_of_timm_and_transformers():
    timm, transformers = require("timm"), require("transformers", "models.poolformer.modeling_poolformer")
    with torch.device("meta"):
        listed = timm.create_model("poolformer_s12", features_only=True).state_dict()
        plain = transformers.PoolFormerModel(transformers.PoolFormerConfig()).state_dict()
        expected = [
            k for k in pk.create_model("poolformer_s12").state_dict() if not k.startswith(("norm.", "head."))
        ]
    assert sorted(pk.convert_state_dict(listed)) == sorted(expected)
    assert sorted(pk.convert_state_dict(plain)) == sorted(expected)


# ---- files that do not fit ---------------------------------------------------------------------------------


def damaged(change):
    def make():
        state, _ = from_official()
        change(state)
        return state

    return make


def rename_and_drop(state):
    del state["network.4.5.norm2.bias"]
    del state["network.6.0.mlp.fc1.weight"]
    state["network.4.6.norm2.bias"] = torch.zeros(320)


def reshape(state):
    state["network.0.0.mlp.fc1.weight"] = state["network.0.0.mlp.fc1.weight"][:, :, 0, 0]


def v2_of_timm():
    state = dict(require("timm").create_model("poolformerv2_s12").state_dict())
    return state


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            damaged(rename_and_drop),
            (
                "2 missing keys, the first network.4.5.norm2.bias",
                "1 unexpected keys, the first network.4.6.norm2.bias",
            ),
        ),
        (
            damaged(reshape),
            ("network.0.0.mlp.fc1.weight", "[256, 64] in the file", "[256, 64, 1, 1] in the model"),
        ),
        (
            lambda: our_model(1, "poolformer_s24").state_dict(),
            ("unexpected keys, the first network.0.2.layer_scale_1",),
        ),
        (lambda: our_model(1, num_classes=21).state_dict(), ("head.weight", "[21, 512]", "num_classes=21")),
        (lambda: our_model(1, num_classes=0).state_dict(), ("2 missing keys, the first head.weight",)),
        (
            lambda: our_model(1, features_only=True).state_dict(),
            ("first norm.weight", "unexpected", "first norm0.weight"),
        ),
        (
            lambda: our_model(1, in_chans=1).state_dict(),
            ("patch_embed.proj.weight", "[64, 1, 7, 7]", "[64, 3, 7, 7]"),
        ),
        (v2_of_timm, ("missing", "network.0.0.layer_scale_1", "unexpected", "patch_embed.norm.weight")),
        (
            lambda: {"conv1.weight": torch.zeros(3)},
            ("not a PoolFormer checkpoint", "'conv1.weight'", "stem.conv.weight"),
        ),
        (dict, ("not a PoolFormer checkpoint", "empty")),
    ],
    ids=["keys", "shape", "deeper", "classes", "headless", "features", "channels", "v2", "other", "empty"],
)
def test_a_wrong_file_is_named_and_changes_nothing(make, words, tmp_path):
    torch.save(make(), tmp_path / "wrong.pth")
    model = our_model(head="timm")
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        pk.load_checkpoint(model, tmp_path / "wrong.pth")
    for word in ("wrong.pth", *words):
        assert word in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip", bytes(100)])
def test_a_corrupted_file(content, suffix, tmp_path):
    if suffix == ".safetensors":
        require("safetensors")
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    model = our_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"broken.*cannot be read"):
        pk.load_checkpoint(model, path)
    assert_unchanged(model, before)


def test_a_truncated_file(tmp_path):
    torch.save(from_official()[0], tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"half.pth: cannot be read"):
        pk.load_checkpoint(our_model(), tmp_path / "half.pth")


class Payload:
    """Runs code when a file is unpickled without weights_only."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the file ran code')",)


def test_a_file_with_code_is_not_run(tmp_path):
    torch.save({"state_dict": from_official()[0], "extra": Payload()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code.pth: cannot be read as tensors only"):
        pk.load_checkpoint(our_model(), tmp_path / "code.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], ("state_dict", "list")),
        ({"epoch": 3}, ("int", "'epoch'")),
        ({3: torch.zeros(1)}, ("names", "3")),
    ],
)
def test_a_file_without_tensors(content, words, tmp_path):
    torch.save(content, tmp_path / "list.pth")
    with pytest.raises(TypeError) as caught:
        pk.load_checkpoint(our_model(), tmp_path / "list.pth")
    for word in ("list.pth", *words):
        assert word in str(caught.value)
    with pytest.raises(TypeError, match=r"state_dict must"):
        pk.convert_state_dict(content)


def test_a_missing_file_and_a_foreign_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist or is not a file"):
        pk.load_checkpoint(our_model(), tmp_path / "none.pth")
    with pytest.raises(TypeError, match=r"model must be .*PoolFormer, got Linear"):
        pk.load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "none.pth")


# ---- create_model ------------------------------------------------------------------------------------------


def test_create_model_with_a_checkpoint(tmp_path):
    state, expected = from_timm()
    torch.save(state, tmp_path / "model.pth")
    model = pk.create_model("poolformer_s12", num_classes=CLASSES, checkpoint=tmp_path / "model.pth").eval()
    assert model.head_mode == "timm"
    assert relative_error(logits(model), expected()) < 1e-5


def fake_hub(monkeypatch, download):
    hub = ModuleType("huggingface_hub")
    hub.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_pretrained_comes_from_the_hub(tmp_path, monkeypatch):
    timm, safetensors = require("timm"), require("safetensors.torch")
    torch.manual_seed(1)
    theirs = randomise(timm.create_model("poolformer_s12")).eval()
    safetensors.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
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

    class OddError(Exception):
        pass

    def download(repo_id, filename):
        raise OddError("no route\nto host")

    fake_hub(monkeypatch, download)
    with pytest.raises(ConnectionError, match=r"no route;"):
        pk.create_model("poolformer_s12", pretrained=True)


def refuse(monkeypatch, package):
    real = builtins.__import__

    def importer(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importer)


def test_without_the_hub_client_or_safetensors(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    model = our_model()
    with monkeypatch.context() as patch:
        refuse(patch, "safetensors")
        with pytest.raises(ImportError, match=r"pip install safetensors"):
            pk.load_checkpoint(model, tmp_path / "model.safetensors")
    fake_hub(monkeypatch, None)
    refuse(monkeypatch, "huggingface_hub")
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
    with pytest.raises(ValueError) as caught:
        pk.create_model("poolformer_s12", pretrained=True, **options)
    for word in words:
        assert word in str(caught.value)
