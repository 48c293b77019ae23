"""The command `export`: the file that it writes, what it says of the heads, and what it refuses."""

import os
import sys

import pytest
import torch
from support.commands import refused, run, small_disk
from support.export import CLASSES, DIMS, HEAD, LAYERS, assert_same_logits, ours, plain
from support.peers import require

import poolformer_kernels as pk
from poolformer_kernels.cli import export as command
from poolformer_kernels.models import HEADS
from poolformer_kernels.models.export import TARGETS


@pytest.fixture
def file(tmp_path):
    """A small PoolFormer's weights as the official code saves them."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "small.pth.tar"
    torch.save({"state_dict": plain(ours("PoolFormer"))}, path)
    return path


@pytest.fixture
def saved(tmp_path):
    """Writes a file of these weights."""

    def save(state):
        torch.save(state, tmp_path / "own.pth")
        return tmp_path / "own.pth"

    return save


@pytest.fixture
def export(capsys):
    """The text that the command prints."""

    def exported(file, to, out, *options):
        assert run("export", file, "--to", to, "--out", out, *options) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return exported


@pytest.fixture
def refuses(capsys):
    """The line with which the command ends."""
    return lambda file, to, out, *options: refused(capsys, "export", file, "--to", to, "--out", out, *options)


def read(path):
    if path.suffix == ".safetensors":
        return require("safetensors.torch").load_file(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("to", TARGETS)
def test_the_file_has_every_weight(to, suffix, file, tmp_path, export):
    if suffix == ".safetensors":
        require("safetensors")
    out = tmp_path / f"out{suffix}"
    text = export(file, to, out)
    expected = pk.export_state_dict(torch.load(file, weights_only=True), to)
    assert f"{out}: {len(expected)} tensors, for " in text
    torch.testing.assert_close(read(out), dict(expected), rtol=0, atol=0)
    assert sorted(os.listdir(tmp_path)) == ["in", out.name]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask


def test_transformers_reads_the_file_by_itself(tmp_path, saved, export):
    transformers = require("transformers", "models.poolformer.modeling_poolformer")
    require("safetensors")
    model = ours("PoolFormer", head="official")
    export(saved(model.state_dict()), "transformers", tmp_path / "model.safetensors")
    config = transformers.PoolFormerConfig(depths=list(LAYERS), hidden_sizes=list(DIMS), num_labels=CLASSES)
    config.save_pretrained(tmp_path)
    theirs = transformers.PoolFormerForImageClassification.from_pretrained(tmp_path).eval()
    assert_same_logits(model, theirs)


def test_timm_reads_the_file_by_itself(tmp_path, saved, export):
    timm = require("timm")
    require("safetensors")
    model, file = ours("poolformer_s12", head="timm"), tmp_path / "model.safetensors"
    text = export(saved(model.state_dict()), "timm", file)
    assert 'for timm.create_model("poolformer_s12", num_classes=7)\n' in text
    theirs = timm.create_model("poolformer_s12", num_classes=CLASSES, checkpoint_path=str(file))
    assert_same_logits(model, theirs.eval())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_memory_that_weights_share_is_written_once_each(suffix, tmp_path):
    """A view of a large tensor, two names for one memory, and strides: as safetensors would refuse them."""
    require("safetensors")
    large = torch.randn(1000, 1000)
    tensors = {"a": large[:2, :3], "b": large[:2, :3], "c": large[:5, :4].t()}
    path = tmp_path / f"out{suffix}"
    command.write(path, tensors)
    assert path.stat().st_size < 4000
    torch.testing.assert_close(read(path), tensors, rtol=0, atol=0)


# ---- what it says ------------------------------------------------------------------------------------------

HEAD_SAID = {
    "official": '"official": GroupNorm, then the mean over pixels.',
    "timm": '"timm": the mean over pixels, then LayerNorm.',
}
SAME = "The logits stay the same, up to rounding."


def head_line(text):
    (line,) = (line for line in text.splitlines() if line.startswith("head"))
    return line.removeprefix("head     ")


def said(known, head, to):
    """The line on a file that is of ``head``, as is ``known``."""
    code = "The official code" if to == "official" else to
    if head == HEAD[to]:
        return f"{known} {HEAD_SAID[head]} {code} does the same. {SAME}"
    differ = f'The logits there differ from those of this file (our models compute both: head="{head}" as in'
    other = f"{code} evaluates the same weights the other way, {HEAD_SAID[HEAD[to]]}"
    return f"{known} {HEAD_SAID[head]} {other} {differ} this file)."


@pytest.mark.parametrize("noted", HEADS)
@pytest.mark.parametrize("to", TARGETS)
def test_it_says_what_the_heads_do_to_the_logits(to, noted, tmp_path, saved, export):
    text = export(saved(ours("PoolFormer", head=noted).state_dict()), to, tmp_path / "out.pth")
    assert head_line(text) == said("noted in the file as", noted, to)
    assert "Another token mixer" not in text  # the file says what it is


def test_it_says_which_head_names_stand_for(file, tmp_path, export):
    known = "not noted in the file, so that of "
    text = export(file, "timm", tmp_path / "timm.pth")
    assert head_line(text) == said(f"{known}the official code,", "official", "timm")
    text = export(tmp_path / "timm.pth", "transformers", tmp_path / "transformers.pth")
    assert head_line(text) == said(f"{known}timm,", "timm", "transformers")
    text = export(tmp_path / "transformers.pth", "official", tmp_path / "official.pth")
    assert head_line(text) == said(f"{known}transformers,", "official", "official")


def test_it_says_what_the_weights_are_of(file, tmp_path, export):
    text = export(file, "transformers", tmp_path / "out.pth")
    small = "a PoolFormer of 1, 2, 3, 1 blocks and 16, 24, 40, 48 channels"
    assert f"read     {file}: {small}, 3 input channels, 7 classes, under the names of the official" in text
    assert "Another token mixer without weights, pool size, norm or activation would have the same" in text
    config = "depths=[1, 2, 3, 1], hidden_sizes=[16, 24, 40, 48], num_labels=7"
    assert f"for PoolFormerForImageClassification(PoolFormerConfig({config}))\n" in text
    text = export(tmp_path / "out.pth", "timm", tmp_path / "timm.bin")
    assert "Another token mixer" not in text  # transformers has one
    assert "MetaFormer with depths=(1, 2, 3, 1), dims=(16, 24, 40, 48), num_classes=7 and the opt" in text


@pytest.mark.parametrize(
    ("name", "options", "to", "words"),
    [
        ("poolformerv2_s12", (), "timm", ('timm.create_model("poolformerv2_s12", num_classes=7)', "one way")),
        ("poolformerv2_s12", (), "official", ("sail-sg/metaformer, has other names", "one way only", SAME)),
        ("metaformer_id_s12", (), "official", ("MetaFormer with token_mixers=identity", "the final norm")),
        ("metaformer_id_s12", ("--model", "id_s12"), "official", ("this package's metaformer_id",)),
        ("poolformer_s12", (), "official", ("sail-sg/poolformer's poolformer_s12 with num_classes=7",)),
    ],
)
def test_it_says_it_of_every_family(name, options, to, words, tmp_path, saved, export):
    text = export(saved(ours(name).state_dict()), to, tmp_path / "out.pth", *options)
    assert [word for word in words if word not in text] == []
    assert ("GroupNorm" in text) == (name == "poolformer_s12")


def test_it_says_that_a_backbone_has_no_head(file, tmp_path, saved, export):
    state = torch.load(file, weights_only=True)["state_dict"]
    state = {key: value for key, value in state.items() if not key.startswith(("norm.", "head."))}
    text = export(saved(state), "timm", tmp_path / "out.pth")
    assert head_line(text) == "none: the weights are those of a backbone."
    assert "neither a final norm nor a classifier: load with strict=False" in text


def test_a_file_without_notes_must_name_its_metaformer(tmp_path, saved, export, refuses):
    """metaformer_s12's names are those of poolformer_s12: only the name keeps it from being taken for one."""
    file, out = saved(plain(ours("metaformer_s12"))), tmp_path / "out.pth"
    assert "Another token mixer without weights" in export(file, "timm", out)
    error = refuses(file, "timm", out, "--model", "metaformer_s12", "--force")
    assert error.startswith(f"checkpoint {file}: timm has no metaformer_s12; allowed: models of PoolFormer")


# ---- requests that cannot be met ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist or is not a file"),
        (b"not a checkpoint", "cannot be read as tensors only"),
        ([1, 2], "state_dict must be a mapping of names to tensors, got list"),
        ({"conv1.weight": torch.zeros(3)}, "not a PoolFormer checkpoint: its first key is 'conv1.weight'"),
    ],
    ids=["missing", "text", "list", "keys"],
)
def test_a_wrong_file(content, words, tmp_path, refuses):
    path = tmp_path / "in.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    error = refuses(path, "timm", tmp_path / "out.pth")
    assert error.startswith(f"checkpoint {path}")
    assert error.count(str(path)) == 1
    assert words in error
    assert not (tmp_path / "out.pth").exists()


def test_transformers_has_no_other_family(tmp_path, saved, refuses):
    path = saved(ours("PoolFormerV2").state_dict())
    error = refuses(path, "transformers", tmp_path / "out.pth")
    assert error == f"checkpoint {path}: transformers has no PoolFormerV2; allowed: models of PoolFormer"


@pytest.mark.parametrize("suffix", ["", ".tar", ".onnx", ".pth.gz"])
def test_another_suffix(suffix, file, tmp_path, refuses):
    out = tmp_path / f"out{suffix}"
    allowed = "allowed: .safetensors, .pth, .pt, .bin"
    assert refuses(file, "timm", out) == f"--out {out}: the suffix is {out.suffix!r}; {allowed}"


def test_an_existing_file_is_kept_unless_forced(file, tmp_path, export, refuses):
    out = tmp_path / "out.pth"
    out.write_text("precious")
    error = refuses(file, "timm", out)
    assert error == f"--out {out} exists; allowed: a new file, or --force to overwrite it"
    assert out.read_text() == "precious"
    export(file, "timm", out, "--force")
    assert "stem.conv.weight" in read(out)
    export(out, "official", out, "--force")  # the file itself
    assert "patch_embed.proj.weight" in read(out)


def test_a_folder_is_no_file(file, tmp_path, refuses):
    (tmp_path / "folder.pth").mkdir()
    error = refuses(file, "timm", tmp_path / "folder.pth", "--force")
    assert error == f"--out {tmp_path / 'folder.pth'} is a folder; allowed: a file"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out o.pth", "the following arguments are required: --to"),
        ("--to timm", "the following arguments are required: --out"),
        ("--to keras --out o.pth", "argument --to: invalid choice: 'keras'"),
        ("--to timm --out o.pth --model s13", "argument --model: 's13' is no model"),
    ],
)
def test_usage_errors(arguments, message, file, capsys):
    assert refused(capsys, "export", file, *arguments.split()).startswith(message)


def test_without_safetensors(file, tmp_path, refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refuses(file, "timm", tmp_path / "out.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_of_a_write_that_failed(exists, suffix, file, tmp_path, refuses):
    if suffix == ".safetensors":
        require("safetensors")
    out = tmp_path / f"out{suffix}"
    if exists:
        out.write_text("precious")
    before = sorted(os.listdir(tmp_path))
    with small_disk(1 << 16):
        error = refuses(file, "timm", out, *["--force"] * exists)
    assert error == f"cannot write to {out}: File too large"
    assert sorted(os.listdir(tmp_path)) == before
    assert not exists or out.read_text() == "precious"
