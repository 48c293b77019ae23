"""The command `cam` end to end: its page, its pictures, its JSON, and what it refuses."""

import json
import re

import numpy as np
import pytest
import torch
from support.gradcam import tiny
from support.peers import randomise, require

import poolformer_kernels as pk
from poolformer_kernels.cli.main import main
from poolformer_kernels.gradcam import grad_cam
from poolformer_kernels.models import PoolFormer
from poolformer_kernels.models.checkpoints import FILE_NOTES

for package in ("PIL", "captum", "matplotlib"):
    require(package)


@pytest.fixture
def picture(tmp_path) -> str:
    """A JPEG that is wider than high."""
    image = require("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3)).astype(np.uint8)
    image.fromarray(pixels).save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


def saved(path, classifier: PoolFormer, **notes) -> str:
    """A checkpoint: .pth, or .safetensors with the notes of `poolformer-kernels train`."""
    if path.suffix == ".safetensors":
        file = require("safetensors.torch", "")
        metadata = {"format": "pt", FILE_NOTES: json.dumps({**classifier._notes(), **notes})}
        file.save_file(classifier.state_dict(), path, metadata=metadata)
    else:
        torch.save(classifier.state_dict(), path)
    return str(path)


NAMES = ["cat", "dog", "<owl>", "pig", "hen"]


def test_command(tmp_path, picture, capsys):
    from PIL import Image

    from poolformer_kernels.cli.photos import load_photo, normalise

    trained = saved(
        tmp_path / "best.safetensors", tiny("timm"), model="poolformer_digits", classes=NAMES, image_size=96
    )
    plain = saved(tmp_path / "plain.pth", tiny("official", 7, dims=(8, 16, 24, 32)))
    timm = require("timm")
    resnet = timm.create_model("resnet10t", num_classes=3)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    out = tmp_path / "out"
    words = [
        "cam",
        picture,
        "--checkpoint",
        trained,
        "--checkpoint",
        plain,
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    words += ["--json", "--compare", f"timm:resnet10t={tmp_path / 'resnet.pth'}"]
    assert main(words) == 0
    result = json.loads((out / "cam.json").read_text())
    assert [(m["label"], m["layer"], m["image_size"], m["classes"]) for m in result["models"]] == [
        ("poolformer_digits", "network.6", 96, 5),
        ("plain", "network.6", 224, 7),
        ("timm:resnet10t", "layer4.0", 176, 3),
    ]
    maps = result["images"][0]["maps"]
    files = ["photo_poolformer_digits.png", "photo_plain.png", "photo_timm-resnet10t.png"]
    assert [m["file"] for m in maps] == files
    assert sorted(p.name for p in out.iterdir()) == sorted([*files, "cam.json", "index.html"])

    # the first model by hand: its own size without a crop, the head of its notes, the picture under the map
    model = tiny("timm").eval()
    image = load_photo(picture).resize((96, 96), Image.Resampling.BICUBIC)
    x = normalise(image, model.config.mean, model.config.std).unsqueeze(0)
    probabilities = model(x).softmax(1)[0]
    best = int(probabilities.argmax())
    assert maps[0]["predicted"] == maps[0]["target"]
    assert (maps[0]["predicted"]["index"], maps[0]["predicted"]["name"]) == (best, NAMES[best])
    assert maps[0]["predicted"]["probability"] == pytest.approx(probabilities[best].item(), rel=1e-4)
    colours = require("matplotlib").colormaps["jet"](grad_cam(model, x)[0, 0].numpy())[..., :3]
    mixed = np.asarray(image) / 255 + colours
    shown = np.asarray(Image.open(out / files[0])).astype(int)
    assert np.abs(shown - 255 * mixed / mixed.max()).max() <= 2

    page = (out / "index.html").read_text()
    assert page.count('src="data:image/') == page.count("src=") == 4
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "without a crop" in page
    assert "random" not in page
    for text in ("poolformer_digits", "plain", "timm:resnet10t", f"{probabilities[best]:.1%}", "photo.jpg"):
        assert text in page
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"photo.jpg  poolformer_digits: {NAMES[best]} (")
    assert lines[-1] == f"report: {out / 'index.html'}"

    # again into the same folder, of a class that is given, whose name is escaped
    (out / "mine.txt").write_text("stays")
    assert main([*words, "--target", "2", "--image-size", "128"]) == 0
    maps = json.loads((out / "cam.json").read_text())["images"][0]["maps"]
    assert [m["target"]["name"] for m in maps] == ["<owl>", "class 2", "class 2"]
    page = (out / "index.html").read_text()
    assert "&lt;owl&gt;" in page
    assert "<owl>" not in page
    assert (out / "mine.txt").read_text() == "stays"


def test_random_weights_are_said_to_be_random(tmp_path, picture, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"name {i}" for i in range(1000)) + "\n")
    out = tmp_path / "out"
    options = ["--image-size", "64", "--device", "cpu", "--out", str(out), "--classes", str(names)]
    assert main(["cam", picture, "--random-weights", *options]) == 0
    page = (out / "index.html").read_text()
    assert "The weights of poolformer_s12 are random: these maps and classes say nothing" in page
    assert re.search(r"photo.jpg  poolformer_s12: name \d+ \(0.\d%\)", capsys.readouterr().out)


def test_a_file_that_is_called_random_is_a_file(tmp_path, picture, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict(), "random")
    assert main(["cam", picture, "--checkpoint", "random", "--image-size", "64", "--device", "cpu"]) == 0
    assert "are random" not in (tmp_path / "cam" / "index.html").read_text()
    assert "are random" not in capsys.readouterr().out


def test_models_of_one_name_and_pictures_of_one_name(tmp_path, picture):
    image = require("PIL.Image")
    (tmp_path / "b").mkdir()
    image.open(picture).save(tmp_path / "b" / "photo.png")
    files = [saved(tmp_path / f"{name}.safetensors", tiny(), model="poolformer_digits") for name in "xy"]
    options = ["--image-size", "64", "--device", "cpu", "--out", str(tmp_path / "out")]
    pairs = [word for file in files for word in ("--checkpoint", file)]
    assert main(["cam", picture, str(tmp_path / "b" / "photo.png"), *pairs, *options]) == 0
    found = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    stems, labels = ("photo", "photo-2"), ("poolformer_digits-x", "poolformer_digits-y")
    assert found == sorted(f"{stem}_{label}.png" for stem in stems for label in labels)


def test_a_timm_poolformer_gets_weights_under_official_names(tmp_path, picture):
    timm = require("timm")
    ours = randomise(pk.create_model("poolformer_s12", num_classes=3, head="timm")).eval()
    file = saved(tmp_path / "s12.safetensors", ours, model="poolformer_s12", classes=["a", "b", "c"])
    out = tmp_path / "out"
    words = ["cam", picture, "--checkpoint", file, "--compare", f"timm:poolformer_s12={file}", "--json"]
    assert main([*words, "--image-size", "64", "--device", "cpu", "--out", str(out)]) == 0
    mine, theirs = json.loads((out / "cam.json").read_text())["images"][0]["maps"]
    assert mine["predicted"]["name"] == theirs["predicted"]["name"]
    assert mine["predicted"]["probability"] == pytest.approx(theirs["predicted"]["probability"], rel=1e-4)
    assert timm.is_model("poolformer_s12")


def refused(capsys, *words: str) -> str:
    """The one line of a command that is refused."""
    assert main(["cam", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_refusals(tmp_path, picture, capsys, monkeypatch):
    timm = require("timm")
    good = saved(
        tmp_path / "good.safetensors", tiny(), model="poolformer_digits", classes=NAMES, image_size=64
    )
    other = saved(tmp_path / "other.safetensors", tiny(), model="poolformer_digits", classes=NAMES[:2])
    small = saved(tmp_path / "small.safetensors", tiny(), model="poolformer_digits", image_size=32)
    text = tmp_path / "names.txt"
    text.write_text("a\nb\n")
    full = tmp_path / "full"
    full.mkdir()
    (full / "index.html").write_text("my homepage")
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    with_good = [picture, "--checkpoint", good]
    for message, words in [
        (
            "no weights are given; allowed: --checkpoint FILE, --compare timm:NAME, or --random-weights",
            [picture],
        ),
        ("--model poolformer_s12 has no weights", [picture, "--model", "poolformer_s12"]),
        (
            "--model poolformer_s12 has no weights",
            [picture, "--model", "poolformer_s12", "--compare", "timm:resnet18"],
        ),
        ("--random-weights and --checkpoint are both given", [*with_good, "--random-weights"]),
        ("--model is given 2 times and --checkpoint 1", [*with_good, "--model", "s12", "--model", "s24"]),
        ("does not exist or is not a file", [picture, "--checkpoint", str(tmp_path / "none.pth")]),
        ("cannot be read as tensors only", [picture, "--checkpoint", picture]),
        (
            "it is not of a poolformer_s12|does not fit poolformer_s12",
            [*with_good, "--model", "poolformer_s12"],
        ),
        ("'poolformer_x' is no model", [picture, "--random-weights", "--model", "poolformer_x"]),
        ("notes other classes than the 5", [picture, "--checkpoint", other]),
        ("1 x 1 pixels for images of 32 x 32", [picture, "--checkpoint", small]),
        (
            "names.txt has 2 lines; small has|has 2 lines; poolformer_digits has 5",
            [picture, "--checkpoint", small, "--classes", str(text)],
        ),
        ("--classes .*none.txt: No such file", [*with_good, "--classes", str(tmp_path / "none.txt")]),
        ("--target is '-1'|--target", [*with_good, "--target=-1"]),
        ("--target is 5; allowed: 0 to 4, the classes of poolformer_digits", [*with_good, "--target", "5"]),
        (
            "--compare .*photo.jpg: allowed: timm:NAME or timm:NAME=FILE",
            ["x.jpg", "--compare", "timm:resnet18", picture],
        ),
        ("--compare timm:resnet18=: allowed", [picture, "--compare", "timm:resnet18="]),
        ("allowed after timm: a name of timm.list_models", [picture, "--compare", "timm:nothing"]),
        (
            "does not fit timm's resnet18: the first key of .* is conv1.weight",
            [picture, "--compare", f"timm:resnet18={good}"],
        ),
        ("IMAGE .*names.txt: cannot be read as an image", [str(text), "--checkpoint", good]),
        ("--json .*photo.jpg: allowed: a FILE that ends in .json", [*with_good, "--json", picture]),
    ]:
        assert re.search(message, refused(capsys, *words, *out)), message
    assert "holds files of another origin" in refused(capsys, *with_good, "--out", str(full))
    assert (full / "index.html").read_text() == "my homepage"
    assert "is a file; allowed: a folder" in refused(capsys, *with_good, "--out", str(text))

    def offline(*args, **options):
        raise OSError("no network\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    message = "cannot get timm's pretrained weights: no network; offline: --compare timm:resnet18=FILE"
    assert message in refused(capsys, picture, "--compare", "timm:resnet18", *out)
    assert not list((tmp_path / "out").glob("*"))
