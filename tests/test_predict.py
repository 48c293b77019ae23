"""`poolformer-kernels predict`: the model's own results in JSON, on the pictures and on the page."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from support.commands import refused, run
from support.dense import HEADS, require_dense
from support.dense_files import NAMES, make, official_file, tiny_body
from support.peers import randomise, require
from support.pictures import names_in, pictures_on, save_picture
from support.train import save_with_notes

require_dense()
from PIL import Image

from poolformer_kernels.cli.photos import preprocess
from poolformer_kernels.cli.predictors import run_lengths
from poolformer_kernels.dense import create_segmenter, model_of_checkpoint, segment
from poolformer_kernels.drawing import colour_of, draw_detections, draw_label_map, paint_labels
from poolformer_kernels.models import load_checkpoint

SIZE = ["--image-size", "64", "96"]
SCORE = 0.6


@pytest.fixture
def photo(tmp_path):
    return save_picture(tmp_path / "photo.png")


@pytest.fixture
def red(tmp_path):
    """Another picture, of another size."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def fpn(tmp_path):
    """A Semantic FPN's weights."""
    official_file(tmp_path / "fpn.pth", "semantic_fpn")
    return tmp_path / "fpn.pth"


@pytest.fixture
def predict(tmp_path):
    """Runs the command on the CPU; the JSON that it wrote into its folder."""

    def predictions(*arguments, out=tmp_path / "out") -> dict:
        assert run("predict", *arguments, "--device", "cpu", "--out", out) == 0
        return json.loads((out / "predictions.json").read_text(encoding="utf-8"))

    return predictions


def tensor_of(path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255


# ---- the figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_detections_are_the_models_own(head, photo, predict, tmp_path, capsys):
    file = tmp_path / "official.pth"
    official_file(file, head)
    written = predict(photo, "--checkpoint", file, *SIZE, "--score", SCORE)
    model, _, _ = model_of_checkpoint(file, min_size=64, max_size=96, score_threshold=SCORE)
    with torch.inference_mode():
        expected = model([tensor_of(photo)])[0]
    assert len(expected["scores"]) > 3
    (image,) = written["images"]
    found = image["detections"]
    assert [d["label"] for d in found] == expected["labels"].tolist()
    assert [d["name"] for d in found] == [NAMES[label] for label in expected["labels"].tolist()]
    torch.testing.assert_close(torch.tensor([d["score"] for d in found]), expected["scores"])
    torch.testing.assert_close(torch.tensor([d["box"] for d in found]), expected["boxes"])
    assert min(d["score"] for d in found) > SCORE
    assert image["size"] == [90, 70]
    assert written["model"]["task"] == ("detection" if head == "retinanet" else "instance segmentation")
    assert written["model"]["names_of"] == "mmdetection"
    assert f"{photo}: {len(found)} found: " in capsys.readouterr().out
    own = Image.open(photo).convert("RGB")
    masks = [mask[0].numpy() >= 0.5 for mask in expected["masks"]] if head == "mask_rcnn" else None
    texts = [f"{d['name']} {100 * d['score']:.0f}%" for d in found]
    drawn = draw_detections(own, expected["boxes"].tolist(), expected["labels"].tolist(), texts, masks)
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / "photo.png")), np.array(drawn))
    if head == "retinanet":
        assert not any("mask" in d for d in found)
        return
    rle = require("pycocotools.mask")
    for d, mask in zip(found, expected["masks"], strict=True):
        decoded = rle.decode(rle.frPyObjects(d["mask"], 70, 90))
        assert np.array_equal(decoded, (mask[0] >= 0.5).numpy())


@pytest.mark.parametrize("first", [0, 1])
def test_run_lengths_are_cocos(first):
    rle = require("pycocotools.mask")
    for seed in range(4):
        mask = np.random.default_rng(seed).random((5, 7)) < 0.4
        mask[0, 0] = first
        assert np.array_equal(rle.decode(rle.frPyObjects(run_lengths(mask), 5, 7)), mask)
    for value in (False, True):
        mask = np.full((5, 7), value)
        assert run_lengths(mask)["counts"] == ([0, 35] if value else [35])


def test_label_map_is_the_segmenters_own(photo, fpn, predict, tmp_path):
    written = predict(photo, "--checkpoint", fpn, *SIZE, "--json", tmp_path / "copy.json")
    model = make("semantic_fpn").eval()
    load_checkpoint(model, fpn)
    with torch.inference_mode():
        labels = segment(model, tensor_of(photo), 64, 96).argmax(0).numpy()
    assert len(np.unique(labels)) > 2
    (image,) = written["images"]
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / image["label_map"])), labels)
    values, counts = np.unique(labels, return_counts=True)
    pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert {c["label"]: c["pixels"] for c in image["classes"]} == pixels
    assert sum(c["share"] for c in image["classes"]) == pytest.approx(1)
    assert [c["name"] for c in image["classes"]] == [NAMES[c["label"]] for c in image["classes"]]
    picture = np.array(Image.open(tmp_path / "out" / "photo.png").convert("RGB"))
    painted = np.array(paint_labels(Image.open(photo).convert("RGB"), labels, 5))
    assert np.array_equal(picture[:70], painted)
    assert picture.shape[0] > 70  # the legend
    assert json.loads((tmp_path / "copy.json").read_text()) == written


@torch.inference_mode()
def test_segment_scales_as_the_official_code_does():
    """To the limits, then both sides up to multiples of 32, and the logits back."""
    model = create_segmenter("semantic_fpn", tiny_body(), 3).eval()
    image, seen = torch.rand(3, 50, 90), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = segment(model, image, 70, 200)
    assert logits.shape == (3, 50, 90)
    config = model.backbone.body.config
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    x = ((image - mean) / std)[None]
    for size in ((70, 126), (96, 128)):
        x = torch.nn.functional.interpolate(x, size=size, mode="bilinear")
    torch.testing.assert_close(seen[0], x)
    expected = torch.nn.functional.interpolate(model(x), size=(50, 90), mode="bilinear")[0]
    torch.testing.assert_close(logits, expected)
    with pytest.raises(ValueError, match=r"image must have shape \[3, H, W\], got \[1, 50, 90\]"):
        segment(model, image[:1])
    with pytest.raises(TypeError, match=r"of a floating dtype, got torch\.uint8"):
        segment(model, image.to(torch.uint8))
    with pytest.raises(ValueError, match="shorter and longer are 0 and 9; allowed: at least 1"):
        segment(model, image, 0, 9)
    with pytest.raises(ValueError, match="model is in training mode"):
        segment(model.train(), image)


def assert_top(top, model, x):
    """The five likeliest classes, with their names."""
    with torch.inference_mode():
        best = model(x[None])[0].softmax(0).sort(descending=True)
    assert [t["label"] for t in top] == best.indices.tolist()
    assert [t["name"] for t in top] == [NAMES[i] for i in best.indices.tolist()]
    assert [t["probability"] for t in top] == pytest.approx(best.values.tolist(), rel=1e-5)


def test_classifiers_top_five(photo, predict, tmp_path):
    model = randomise(tiny_body(features_only=False)).eval()
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n", encoding="utf-8")
    options = ["--classes", tmp_path / "names.txt", "--image-size", "64", "64"]
    (image,) = predict(photo, "--checkpoint", tmp_path / "tiny.pth", *options)["images"]
    assert_top(image["top"], model, preprocess(Image.open(photo).convert("RGB"), model.config, 64))


def test_a_training_runs_file_says_how_its_images_are_prepared(photo, predict, tmp_path):
    model = randomise(tiny_body(features_only=False)).eval()
    notes = {"model": "poolformer_digits", "classes": NAMES, "image_size": 48, "crop_pct": 0.8}
    notes |= {"interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    save_with_notes(tmp_path / "best.safetensors", model, **notes)
    written = predict(photo, "--checkpoint", tmp_path / "best.safetensors")
    assert written["model"]["image_size"] == [48, 48]
    pixels = np.asarray(Image.open(photo).convert("RGB").resize((77, 60), Image.Resampling.BILINEAR))
    x = torch.tensor(pixels[6:54, 14:62].copy()).permute(2, 0, 1) / 255
    x = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert_top(written["images"][0]["top"], model, x)


def test_classes_without_names(photo, predict, tmp_path):
    official_file(tmp_path / "a.pth", "semantic_fpn", names=None)
    (image,) = predict(photo, "--checkpoint", tmp_path / "a.pth", *SIZE)["images"]
    assert all(c["name"] == f"class {c['label']}" for c in image["classes"])


@pytest.mark.parametrize(
    "head", ["retinanet", "semantic_fpn", pytest.param("mask_rcnn", marks=pytest.mark.long)]
)
def test_bfloat16_is_close(head, photo, predict, tmp_path):
    """Not the same, but near: the best detection and most pixels."""
    official_file(tmp_path / "a.pth", head)
    options = ["--checkpoint", tmp_path / "a.pth", *SIZE]
    exact, rounded = (
        predict(photo, *options, "--precision", precision, out=tmp_path / precision)["images"][0]
        for precision in ("float32", "bfloat16")
    )
    assert exact != rounded
    if head == "semantic_fpn":
        maps = [np.array(Image.open(tmp_path / p / "photo.labels.png")) for p in ("float32", "bfloat16")]
        assert (maps[0] == maps[1]).mean() > 0.9
    else:
        best, near = exact["detections"][0], rounded["detections"]
        boxes = np.array([d["box"] for d in near if d["label"] == best["label"]])
        assert np.abs(boxes - best["box"]).max(1).min() < 3


# ---- pictures as they come ---------------------------------------------------------------------------------


def test_upright_grey_and_transparent_pictures(photo, fpn, predict, tmp_path):
    own = Image.open(photo).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    own.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    own.convert("RGBA").save(tmp_path / "clear.png")
    grey = own.convert("L")
    grey.save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    names = ("photo", "turned", "clear", "grey", "deep")
    written = predict(*(tmp_path / f"{n}.png" for n in names), "--checkpoint", fpn, *SIZE)
    found = {n: image["classes"] for n, image in zip(names, written["images"], strict=True)}
    assert [image["size"] for image in written["images"]] == [[90, 70]] * 5
    assert found["turned"] == found["photo"] == found["clear"]
    assert found["grey"] == found["deep"] != found["photo"]


def test_equal_stems_do_not_overwrite_each_other(photo, fpn, predict, tmp_path):
    (tmp_path / "b").mkdir()
    others = [tmp_path / "b" / name for name in ("photo.png", "PHOTO.jpg", "photo.labels.png")]
    for path in others:
        Image.new("RGB", (40, 30), "red").save(path)
    written = predict(photo, *others, "--checkpoint", fpn, *SIZE)
    pairs = [(image["picture"], image["label_map"]) for image in written["images"]]
    assert len({name.casefold() for pair in pairs for name in pair}) == 8
    assert pairs[0] == ("photo.png", "photo.labels.png")
    assert pairs[1] == ("photo-2.png", "photo-2.labels.png")
    sizes = [Image.open(tmp_path / "out" / label_map).size for _, label_map in pairs]
    assert sizes == [(90, 70), (40, 30), (40, 30), (40, 30)]
    assert names_in(tmp_path / "out") == set(written["files"])


def test_a_later_run_replaces_an_earlier_one(photo, red, fpn, predict, tmp_path, capsys):
    out = tmp_path / "out"
    predict(red, "--checkpoint", fpn, *SIZE)
    predict(photo, "--checkpoint", fpn, *SIZE)
    assert names_in(out) == {"index.html", "predictions.json", "photo.png", "photo.labels.png"}
    (out / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    error = refused(capsys, "predict", photo, "--checkpoint", fpn, "--out", out)
    assert error.startswith(f"--out {out} holds 'notes.txt'; allowed: a new folder")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_run_that_was_stopped_leaves_a_folder_that_the_next_one_takes(
    photo, red, fpn, predict, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("poolformer_kernels.cli.predict.section", stop)
        assert run("predict", photo, "--checkpoint", fpn, *SIZE, "--device", "cpu", "--out", out) == 130
    assert (out / "photo.png").exists()
    assert not (out / "index.html").exists()
    predict(red, "--checkpoint", fpn, *SIZE)
    assert names_in(out) == {"index.html", "predictions.json", "red.png", "red.labels.png"}


# ---- drawing -----------------------------------------------------------------------------------------------


def test_frames_lie_on_the_edges_of_the_boxes():
    blank = Image.new("RGB", (200, 150), "white")
    drawn = np.array(draw_detections(blank, [(40, 60, 120, 130)], [4], ["a"]))
    colour, inner = np.array(colour_of(4)), np.full(3, 255)
    for x, y in ((40, 60), (119, 60), (40, 129), (119, 129), (41, 100), (118, 100), (80, 61), (80, 128)):
        assert np.array_equal(drawn[y, x], colour), (x, y)
    for x, y in ((39, 100), (120, 100), (80, 130), (42, 100), (117, 100), (80, 62), (80, 127), (130, 60)):
        assert np.array_equal(drawn[y, x], inner), (x, y)
    assert np.array_equal(np.array(blank), np.full((150, 200, 3), 255))  # a copy was drawn on


@pytest.mark.parametrize("text", ["cat 99%", "a name that is longer than the picture is wide " * 3])
def test_labels_stay_inside(text):
    """On a picture of the box's own colour only the letters show: as many wherever the box is."""
    blank = Image.new("RGB", (200, 150), colour_of(0))

    def letters(box) -> int:
        return int((np.array(draw_detections(blank, [box], [0], [text])) != colour_of(0)).any(-1).sum())

    wanted = letters((1, 60, 4, 63))
    assert wanted > 100
    corners = [(0, 0, 20, 20), (180, 0, 200, 20), (180, 130, 200, 150)]
    for box in (*corners, (0, 0, 200, 150), (-5, -5, 300, 300)):
        assert letters(box) == wanted, box


def test_masks_are_translucent_and_the_best_is_on_top():
    grey = Image.new("RGB", (100, 100), (100, 100, 100))
    left, right = np.zeros((2, 100, 100), bool)
    left[50:, :60], right[50:, 40:] = True, True
    boxes = [(0, 50, 60, 100), (40, 50, 100, 100)]
    drawn = np.array(draw_detections(grey, boxes, [0, 1], ["", ""], [left, right])).astype(int)
    first, second = (np.array(colour_of(i)) for i in (0, 1))
    assert np.abs(drawn[80, 20] - (100 + first) / 2).max() <= 1
    assert np.abs(drawn[80, 80] - (100 + second) / 2).max() <= 1
    assert np.abs(drawn[80, 50] - ((100 + second) / 2 + first) / 2).max() <= 1
    assert np.array_equal(drawn[20, 20], [100, 100, 100])


def test_label_maps_and_their_legend():
    grey = Image.new("RGB", (300, 200), (100, 100, 100))
    labels = np.zeros((200, 300), np.int64)
    labels[:, 100:], labels[:, 280:] = 2, 255
    drawn = np.array(draw_label_map(grey, labels, ["sky", "sea", "land"])).astype(int)
    for x, label in ((50, 0), (200, 2)):
        assert np.abs(drawn[100, x] - (45 + 0.55 * np.array(colour_of(label)))).max() <= 1
    assert np.array_equal(drawn[100, 290], [100, 100, 100])  # ignored pixels
    assert np.array_equal(drawn[100, 100], [255, 255, 255])  # the line between two classes
    legend = drawn[200:].reshape(-1, 3)
    colours = {label: int((legend == colour_of(label)).all(1).sum()) for label in range(3)}
    assert colours[1] == 0  # the sea is not in the picture
    assert min(colours[0], colours[2]) > 60


def test_colours_differ():
    assert len({colour_of(label) for label in range(80)}) == 80
    assert colour_of(80) == colour_of(0)


# ---- the page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_page(head, photo, predict, tmp_path):
    names = ("<b>ant</b>", *NAMES[1:])
    official_file(tmp_path / "a.pth", head, names=names)
    strange = photo.rename(tmp_path / "a&b <i>.png")
    options = [] if head == "semantic_fpn" else ["--score", SCORE]
    (image,) = predict(strange, "--checkpoint", tmp_path / "a.pth", *SIZE, *options)["images"]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<i>.png" not in page
    assert "a&amp;b &lt;i&gt;.png" in page
    assert "<b>ant</b>" not in page
    rows = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", page)
    found = image.get("detections") or image["classes"]
    assert len(rows) >= len(found) > 0
    for (first, _), entry in zip(rows, found, strict=False):
        assert f"rgb{colour_of(entry['label'])}" in first
        assert re.sub(r"<.*?>", "", first).replace("&lt;", "<").replace("&gt;", ">") == entry["name"]
    (shown,) = pictures_on(page)
    data = base64.b64decode(shown.removeprefix("png;base64,"), validate=True)
    on_page = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(on_page, np.array(Image.open(tmp_path / "out" / image["picture"]))[:70])


def test_nothing_found(photo, predict, tmp_path, capsys):
    official_file(tmp_path / "a.pth", "retinanet")
    written = predict(photo, "--checkpoint", tmp_path / "a.pth", *SIZE, "--score", "0.9999")
    assert written["images"][0]["detections"] == []
    assert "Nothing found." in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert f"{photo}: nothing found" in capsys.readouterr().out


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.fixture
def refuses(photo, fpn, tmp_path, capsys, monkeypatch):
    """Runs the command, which must fail with this line and leave no folder."""
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_body(features_only=False).state_dict(), tmp_path / "tiny.pth")

    def refuse(words: str, message: str) -> None:
        error = refused(capsys, f"predict {words} --device cpu")
        assert re.match(message, error), error
        assert not (tmp_path / "predictions").exists()

    return refuse


FPN, TINY = "photo.png --checkpoint fpn.pth", "photo.png --checkpoint tiny.pth"
RETINANET = "retinanet_poolformer_s12"
LANCZOS = "its images were scaled by 'lanczos'; allowed: bicubic, bilinear"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("photo.png", "the following arguments are required: --checkpoint"),
        ("bad.jpg --checkpoint fpn.pth", "IMAGE bad.jpg: cannot be read as an image"),
        ("none.jpg --checkpoint fpn.pth", "IMAGE none.jpg: cannot be read as an image"),
        ("float.tif --checkpoint fpn.pth", "IMAGE float.tif: cannot be read.*allowed: 8 or 16 bits"),
        ("photo.png --checkpoint none.pth", "--checkpoint none.pth does not exist"),
        ("photo.png --checkpoint bad.jpg", "checkpoint bad.jpg: cannot be read as tensors only"),
        (f"{FPN} --score 0.5", "--score 0.5: fpn.pth is of a Semantic FPN"),
        (f"{TINY} --score 0.5", "--score 0.5: tiny.pth is of a classifier"),
        (f"{FPN} --score 1", "argument --score: must be a number from 0 to below 1"),
        (f"{FPN} --classes two.txt", "--classes two.txt has 2 names, fpn.pth 5"),
        (f"{FPN} --classes gap.txt", "--classes gap.txt: line 2 is empty"),
        (f"{FPN} --classes none.txt", "--classes none.txt: No such file"),
        (f"{FPN} --image-size 96 64", "--image-size 96 64: allowed: MIN at most"),
        (f"{TINY} --image-size 64 96", "--image-size 64 96: tiny.pth is of a"),
        (f"{FPN} --model {RETINANET}", f"checkpoint fpn.pth: .*name is '{RETINANET}', but it is of a Sem"),
        (f"{TINY} --model no", "argument --model: 'no' is no model"),
        ("photo.png --checkpoint body.pth", "checkpoint body.pth: it has no classifier"),
        ("photo.png --checkpoint odd.safetensors", f"checkpoint odd.safetensors: {LANCZOS}"),
        (f"{FPN} --out file", "--out file is not a folder"),
        (f"{FPN} --out .", "--out . holds "),
    ],
)
def test_refusals(words, message, refuses, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    (tmp_path / "file").touch()
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "float.tif")
    torch.save(tiny_body().state_dict(), tmp_path / "body.pth")
    save_with_notes(tmp_path / "odd.safetensors", tiny_body(features_only=False), interpolation="lanczos")
    refuses(words, message)


def test_an_input_in_the_folder(refuses, photo, predict, tmp_path, capsys):
    """What an earlier run wrote may not be read and overwritten at once."""
    predict(photo, "--checkpoint", tmp_path / "fpn.pth", *SIZE)
    capsys.readouterr()
    refuses("out/photo.png --checkpoint fpn.pth --out out", "--out out holds the input out/photo.png")


@pytest.mark.parametrize("name", ["photo.png", "fpn.pth"])
def test_json_does_not_overwrite_an_input(refuses, tmp_path, name):
    before = (tmp_path / name).read_bytes()
    message = f"--json ./{name} is the input {name}; allowed: another file"
    refuses(f"{FPN} --out out --json ./{name}", message)
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("head", HEADS)
def test_weights_that_are_not_finite_are_refused(refuses, tmp_path, head):
    model = make(head)
    key = model.class_keys[-1]
    state = model.state_dict()
    torch.save(state | {key: torch.full_like(state[key], float("nan"))}, "nan.pth")
    message = f"checkpoint nan.pth: its {key} has numbers that are not finite"
    refuses("photo.png --checkpoint nan.pth", message)
