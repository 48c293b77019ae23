"""The command `cam` end to end: its page, its pictures, its JSON, and what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import printed, refused, run
from support.gradcam import tiny
from support.peers import randomise, require
from support.pictures import names_in, pictures_on, save_picture
from support.train import save_with_notes

import poolformer_kernels as pk
from poolformer_kernels.gradcam import grad_cam
from poolformer_kernels.models import PoolFormer

for package in ("PIL", "captum", "matplotlib"):
    require(package)


@pytest.fixture
def picture(tmp_path) -> Path:
    """A JPEG that is wider than high."""
    return save_picture(tmp_path / "photo.jpg", (120, 90))


def saved(path: Path, classifier: PoolFormer, model="poolformer_digits", **notes) -> Path:
    """A checkpoint with the notes of `poolformer-kernels train`."""
    save_with_notes(path, classifier, **(classifier._notes() | {"model": model} | notes))
    return path


SMALL = "--image-size 64 --device cpu"
NAMES = ["cat", "dog", "<owl>", "pig", "hen"]


def maps_in(out: Path) -> list[dict]:
    """What is written of the first picture, model by model."""
    return json.loads((out / "cam.json").read_text())["images"][0]["maps"]


def test_command(tmp_path, picture, capsys):
    from PIL import Image

    from poolformer_kernels.cli.photos import load_photo, normalise

    trained = saved(tmp_path / "best.safetensors", tiny("timm"), classes=NAMES, image_size=96)
    plain, resnet, out = (tmp_path / name for name in ("plain.pth", "resnet.pth", "out"))
    torch.save(tiny("official", 7, dims=(8, 16, 24, 32)).state_dict(), plain)
    torch.save(require("timm").create_model("resnet10t", num_classes=3).state_dict(), resnet)
    words = ["cam", picture, "--checkpoint", trained, "--checkpoint", plain, "--device", "cpu", "--json"]
    words += ["--out", out, "--compare", f"timm:resnet10t={resnet}"]
    lines = printed(capsys, *words).splitlines()
    result = json.loads((out / "cam.json").read_text())
    assert [(m["label"], m["layer"], m["image_size"], m["classes"]) for m in result["models"]] == [
        ("poolformer_digits", "network.6", 96, 5),
        ("plain", "network.6", 224, 7),
        ("timm:resnet10t", "layer4.0", 176, 3),
    ]
    maps = maps_in(out)
    files = ["photo_poolformer_digits.png", "photo_plain.png", "photo_timm-resnet10t.png"]
    assert [m["file"] for m in maps] == files
    assert names_in(out) == {*files, "cam.json", "index.html"}

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
    assert len(pictures_on(page)) == 4
    assert "without a crop" in page
    assert "random" not in page
    for text in ("poolformer_digits", "plain", "timm:resnet10t", f"{probabilities[best]:.1%}", "photo.jpg"):
        assert text in page
    assert lines[0].startswith(f"photo.jpg  poolformer_digits: {NAMES[best]} (")
    assert lines[-1] == f"report: {out / 'index.html'}"

    # again into the same folder, of a class that is given, whose name is escaped
    (out / "mine.txt").write_text("stays")
    assert run(*words, "--target", "2", "--image-size", "128") == 0
    assert [m["target"]["name"] for m in maps_in(out)] == ["<owl>", "class 2", "class 2"]
    page = (out / "index.html").read_text()
    assert "&lt;owl&gt;" in page
    assert "<owl>" not in page
    assert (out / "mine.txt").read_text() == "stays"


def test_random_weights_are_said_to_be_random(tmp_path, picture, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"name {i}" for i in range(1000)) + "\n")
    out = tmp_path / "out"
    text = printed(capsys, f"cam --random-weights {SMALL} --out", out, "--classes", names, picture)
    page = (out / "index.html").read_text()
    assert "The weights of poolformer_s12 are random: these maps and classes say nothing" in page
    assert re.search(r"photo.jpg  poolformer_s12: name \d+ \(0.\d%\)", text)


def test_a_file_that_is_called_random_is_a_file(tmp_path, picture, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict(), "random")
    assert "are random" not in printed(capsys, f"cam --checkpoint random {SMALL}", picture)
    assert "are random" not in (tmp_path / "cam" / "index.html").read_text()


def test_models_of_one_name_and_pictures_of_one_name(tmp_path, picture):
    (tmp_path / "b").mkdir()
    other = save_picture(tmp_path / "b" / "photo.png")
    files = [saved(tmp_path / f"{name}.safetensors", tiny()) for name in "xy"]
    pairs = [word for file in files for word in ("--checkpoint", file)]
    assert run("cam", picture, other, *pairs, *SMALL.split(), "--out", tmp_path / "out") == 0
    stems, labels = ("photo", "photo-2"), ("poolformer_digits-x", "poolformer_digits-y")
    pictures = {f"{stem}_{label}.png" for stem in stems for label in labels}
    assert names_in(tmp_path / "out") == {*pictures, "index.html"}


def test_a_timm_poolformer_gets_weights_under_official_names(tmp_path, picture):
    require("timm")
    ours = randomise(pk.create_model("poolformer_s12", num_classes=3, head="timm")).eval()
    file = saved(tmp_path / "s12.safetensors", ours, model="poolformer_s12", classes=["a", "b", "c"])
    out = tmp_path / "out"
    models = ["--checkpoint", file, "--compare", f"timm:poolformer_s12={file}"]
    assert run("cam", picture, *models, "--json", *SMALL.split(), "--out", out) == 0
    mine, theirs = maps_in(out)
    assert mine["predicted"]["name"] == theirs["predicted"]["name"]
    assert mine["predicted"]["probability"] == pytest.approx(theirs["predicted"]["probability"], rel=1e-4)


PHOTO, GOOD = "photo.jpg --compare timm:resnet18", "photo.jpg --checkpoint good.safetensors"
UNNAMED = "photo.jpg --checkpoint small.safetensors"
GIVEN = "no weights are given; allowed: --checkpoint FILE, --compare timm:NAME, or --random-weights"
OFFLINE = "cannot get timm's pretrained weights: no network; offline: --compare timm:resnet18=FILE"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("photo.jpg", GIVEN),
        ("photo.jpg --model poolformer_s12", "--model poolformer_s12 has no weights"),
        (f"{PHOTO} --model poolformer_s12", "--model poolformer_s12 has no weights"),
        (f"{GOOD} --random-weights", "--random-weights and --checkpoint are both given"),
        (f"{GOOD} --model s12 --model s24", "--model is given 2 times and --checkpoint 1"),
        ("photo.jpg --checkpoint none.pth", "does not exist or is not a file"),
        ("photo.jpg --checkpoint photo.jpg", "cannot be read as tensors only"),
        (f"{GOOD} --model poolformer_s12", "it is not of a poolformer_s12|does not fit poolformer_s12"),
        ("photo.jpg --random-weights --model poolformer_x", "'poolformer_x' is no model"),
        ("photo.jpg --checkpoint other.safetensors", "notes other classes than the 5"),
        (UNNAMED, "1 x 1 pixels for images of 32 x 32"),
        (f"{UNNAMED} --classes names.txt", "names.txt has 2 lines; poolformer_digits has 5"),
        (f"{GOOD} --classes none.txt", "--classes none.txt: No such file"),
        (f"{GOOD} --target=-1", "--target"),
        (f"{GOOD} --target 5", "--target is 5; allowed: 0 to 4, the classes of poolformer_digits"),
        (f"{PHOTO} photo.jpg", "--compare photo.jpg: allowed: timm:NAME or timm:NAME=FILE"),
        (f"{PHOTO}=", "--compare timm:resnet18=: allowed"),
        ("photo.jpg --compare timm:nothing", "allowed after timm: a name of timm.list_models"),
        (f"{PHOTO}=good.safetensors", "does not fit timm's resnet18: the first key of .* is conv1.weight"),
        (PHOTO, OFFLINE),
        ("names.txt --checkpoint good.safetensors", "IMAGE names.txt: cannot be read as an image"),
        (f"{GOOD} --json photo.jpg", "--json photo.jpg: allowed: a FILE that ends in .json"),
        (f"{GOOD} --out full", "holds files of another origin"),
        (f"{GOOD} --out names.txt", "is a file; allowed: a folder"),
    ],
)
def test_refusals(words, message, tmp_path, picture, capsys, monkeypatch):
    timm = require("timm")
    create_model = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network\nand more")
        return create_model(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.chdir(tmp_path)
    for name, notes in (
        ("good", {"classes": NAMES, "image_size": 64}),
        ("other", {"classes": NAMES[:2]}),
        ("small", {"image_size": 32}),
    ):
        saved(tmp_path / f"{name}.safetensors", tiny(), **notes)
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "index.html").write_text("my homepage")
    before = names_in(tmp_path)
    error = refused(capsys, f"cam {words} --device cpu")
    assert re.search(message, error), error
    assert names_in(tmp_path) == before
    assert (tmp_path / "full" / "index.html").read_text() == "my homepage"
