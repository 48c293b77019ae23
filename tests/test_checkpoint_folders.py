"""Folders that transformers' save_pretrained writes, and errors that name a checkpoint once."""

import json
from pathlib import Path

import pytest
import torch
from support.models import raises, unchanged
from support.peers import relative_error, require, timm_model, transformers_model
from support.problems import randn

import poolformer_kernels as pk
from poolformer_kernels.models.files import IN_FOLDER

CLASSES = 7
X = randn(2, 3, 48, 64)


@pytest.fixture(scope="module")
def theirs():
    require("safetensors")
    return transformers_model(CLASSES, seed=1)


def ours(**options):
    return pk.create_model("poolformer_s12", num_classes=CLASSES, **options).eval()


def assert_same_logits(model, theirs):
    assert model.head_mode == "official"
    with torch.no_grad():
        assert relative_error(model(X), theirs(X).logits) < 1e-5


def save_bin(theirs, folder, shards=1):
    """As transformers < 5 does without safetensors."""
    state = theirs.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    places = {key: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, key in enumerate(state)}
    for name in set(places.values()):
        torch.save({key: value for key, value in state.items() if places[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", IN_FOLDER)
def test_every_kind_of_folder(kind, theirs, tmp_path):
    """config.json is not needed."""
    if kind.startswith("model"):
        theirs.save_pretrained(tmp_path, max_shard_size="10MB" if kind.endswith("json") else "5GB")
        (tmp_path / "config.json").unlink()
    else:
        save_bin(theirs, tmp_path, 3 if kind.endswith("json") else 1)
    assert (tmp_path / kind).is_file()
    if kind.endswith("json"):
        assert len(set(json.loads((tmp_path / kind).read_text())["weight_map"].values())) > 1
    assert_same_logits(ours(checkpoint=tmp_path), theirs)
    model = ours(head="timm")
    report = pk.load_checkpoint(model, str(tmp_path))
    assert (report.source, report.not_in_file, report.not_in_model) == ("huggingface", (), ())
    assert_same_logits(model, theirs)


def test_safetensors_come_first(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"another format")
    assert_same_logits(ours(checkpoint=tmp_path), theirs)


def test_a_folder_that_timm_saved(tmp_path):
    """Of timm's names, so evaluated as timm does."""
    theirs = timm_model(num_classes=CLASSES)
    require("safetensors.torch").save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    model = ours(checkpoint=tmp_path)
    assert model.head_mode == "timm"
    with torch.no_grad():
        assert relative_error(model(X), theirs(X)) < 1e-5


# ---- folders that do not fit -------------------------------------------------------------------------------


PART = "pytorch_model-00002-of-00003.bin"


def other_files(theirs, folder):
    for name in ("tf_model.h5", "config.json", "a.txt", "b.txt", "c.txt", "d.txt"):
        (folder / name).write_text("{}")


def parts_and(change):
    """Three parts, of which the second is changed."""

    def make(theirs, folder):
        save_bin(theirs, folder, 3)
        change(folder / PART)

    return make


def text(content, name="model.safetensors"):
    return lambda theirs, folder: (folder / name).write_text(content)


def index(content):
    return text(content, "model.safetensors.index.json")


def incomplete(theirs, folder):
    state = theirs.state_dict()
    del state["poolformer.encoder.block.2.5.output.conv1.weight"]
    torch.save(state, folder / "pytorch_model.bin")


def other_model(theirs, folder):
    torch.save({"bert.embeddings.weight": torch.zeros(2)}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda theirs, folder: None, FileNotFoundError, ("is a folder that has nothing", *IN_FOLDER)),
        (other_files, FileNotFoundError, ("has a.txt, b.txt, c.txt, config.json, d.txt, ...;", *IN_FOLDER)),
        (parts_and(Path.unlink), FileNotFoundError, (f"has no {PART}", "index.json names")),
        (index("no json"), ValueError, ("model.safetensors.index.json must have a weight_map",)),
        (index("[]"), ValueError, ("must have a weight_map",)),
        (index('{"weight_map": {"a": 3}}'), ValueError, ("must have a weight_map",)),
        (index('{"weight_map": {"a": "../secret.safetensors"}}'), ValueError, ("files beside it",)),
        (index('{"weight_map": {"a": "/etc/passwd"}}'), ValueError, ("files beside it",)),
        (text("nothing of the kind"), ValueError, ("model.safetensors cannot be read as tensors only",)),
        (parts_and(lambda p: p.write_text("text")), ValueError, (f"{PART} cannot be read as tensors only",)),
        (parts_and(lambda p: torch.save([1], p)), TypeError, (f"{PART} must hold a mapping", "list")),
        (incomplete, ValueError, ("missing keys, the first network.4.5.mlp.fc1.weight",)),
        (other_model, ValueError, ("not a PoolFormer checkpoint", "'bert.embeddings.weight'")),
    ],
)
def test_a_wrong_folder_is_named_once(make, error, words, theirs, tmp_path):
    make(theirs, tmp_path)
    model = ours()
    for load in (lambda: pk.load_checkpoint(model, tmp_path), lambda: ours(checkpoint=tmp_path)):
        with unchanged(model), raises(error, *words) as caught:
            load()
        assert str(caught.value).startswith(f"checkpoint {tmp_path}")
        assert str(caught.value).count(f"checkpoint {tmp_path}") == 1


def test_a_file_of_another_image_size(tmp_path):
    """The position embedding's shape is told as the image size that it is of."""
    name, size = "metaformer_ppaa_s12_224", {"image_size": 96}
    torch.save(pk.create_model(name, CLASSES).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"pos_embed: .*image_size=\(96, 96\): make it for the file's"):
        pk.create_model(name, CLASSES, checkpoint=tmp_path / "model.pth", **size)
    words = ("x has images of 48 x 64 pixels", "96 x 96", f"create_model('{name}', image_size=(48, 64))")
    with raises(ValueError, "a position embedding for image_size=(96, 96): allowed", *words):
        pk.create_model(name, CLASSES, **size)(X)
