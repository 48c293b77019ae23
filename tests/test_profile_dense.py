"""The profile of detectors and segmenters: counts against formulas written out here, times, the command."""

import json

import pytest
import torch
from support.commands import printed, refused
from support.dense import HEADS, PARAMETERS, made, require_dense, tiny
from support.models import unchanged
from support.peers import require

require_dense()
require("rich")

from torchvision.ops import clip_boxes_to_image

from poolformer_kernels.cli import profile_dense as command
from poolformer_kernels.dense.registry import split_name
from poolformer_kernels.models import create_model
from poolformer_kernels.profiling import count_macs, dense
from poolformer_kernels.profiling.dense import profile_dense

DIMS, DEPTHS = (64, 128, 320, 512), (2, 2, 6, 2)


def create(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return made(*split_name(name))


@pytest.fixture
def no_probe(monkeypatch):
    """Without the rate of the processor, which takes 0.1 s, and with one round."""
    monkeypatch.setattr(dense, "rate_probe", lambda *_: None)


# ---- counts ------------------------------------------------------------------------------------------------


class Count:
    """Parameters and multiply-accumulates, summed by hand."""

    def __init__(self) -> None:
        self.params = self.products = self.others = 0

    def conv(self, inputs: int, outputs: int, kernel: int, pixels: int, *, bias: bool = True) -> "Count":
        self.params += inputs * outputs * kernel**2 + bias * outputs
        self.products += inputs * outputs * kernel**2 * pixels
        return self

    @property
    def figures(self) -> tuple[int, int, int]:
        return self.params, self.products + self.others, self.products


def tokens(height: int, width: int) -> list[int]:
    """Pixels of the backbone's maps."""
    return [(height >> s) * (width >> s) for s in (2, 3, 4, 5)]


def backbone(height: int, width: int, norms: tuple[int, ...] = (0, 1, 2, 3)) -> dict[str, Count]:
    pixels, found, channels = tokens(height, width), {}, 3
    for stage, (dim, depth, n) in enumerate(zip(DIMS, DEPTHS, pixels, strict=True)):
        part = found[f"stage {stage + 1}"] = Count().conv(channels, dim, 3 if stage else 7, n)
        for _ in range(depth):
            part.conv(dim, 4 * dim, 1, n).conv(4 * dim, dim, 1, n)
            part.params += 2 * 2 * dim + 2 * dim  # norms, LayerScales
            part.others += 2 * 5 * dim * n
        channels = dim
    part = found["norms of the maps"] = Count()
    for stage in norms:
        part.params += 2 * DIMS[stage]
        part.others += 5 * DIMS[stage] * pixels[stage]
    return found


def pyramid(dims: tuple[int, ...], pixels: list[int]) -> Count:
    part = Count()
    for dim, n in zip(dims, pixels, strict=True):
        part.conv(dim, 256, 1, n).conv(256, 256, 3, n)
    part.others += 256 * sum(pixels[:-1])  # every map but the coarsest is added to the coarser one, scaled up
    return part


def retinanet(height: int, width: int) -> dict[str, Count]:
    found, pixels = backbone(height, width, (1, 2, 3)), tokens(height, width)[1:]
    neck = found["neck"] = pyramid(DIMS[1:], pixels)
    levels = list(pixels)
    h, w = height // 32, width // 32
    for inputs in (512, 256):
        h, w = -(-h // 2), -(-w // 2)
        neck.conv(inputs, 256, 3, h * w)
        levels.append(h * w)
    for name, outputs in (("classification head", 9 * 80), ("box head", 9 * 4)):
        found[name] = Count()
        for channels in (256, 256, 256, 256, outputs):
            found[name].conv(256, channels, 3, sum(levels))
    return found


def mask_rcnn(height: int, width: int) -> dict[str, Count]:
    found, pixels = backbone(height, width), tokens(height, width)
    found["neck"] = pyramid(DIMS, pixels)
    every = sum(pixels) + -(-height // 64) * -(-width // 64)
    found["RPN head"] = Count().conv(256, 256, 3, every).conv(256, 3, 1, every).conv(256, 12, 1, every)
    box = found["box head"] = Count()
    for inputs, outputs in ((256 * 49, 1024), (1024, 1024), (1024, 81), (1024, 81 * 4)):
        box.conv(inputs, outputs, 1, 1000)  # a linear layer for each of 1000 proposals
    mask = found["mask head"] = Count()
    for _ in range(4):
        mask.conv(256, 256, 3, 100 * 14 * 14)
    mask.conv(256, 256, 2, 100 * 14 * 14).conv(256, 81, 1, 100 * 28 * 28)  # transposed: counts its input
    return found


def semantic_fpn(height: int, width: int) -> dict[str, Count]:
    found, pixels = backbone(height, width), tokens(height, width)
    found["neck"] = pyramid(DIMS, pixels)
    head = found["head"] = Count()
    for level, n in enumerate(pixels):
        for i in range(max(level, 1)):
            n_here = n * 4**i
            head.conv(128 if i else 256, 128, 3, n_here, bias=False)
            head.params += 2 * 128
            head.others += 2 * 128 * n_here  # BatchNorm
            head.others += 4 * 128 * 4 * n_here if level else 0  # bilinear, to twice the side
    head.conv(128, 150, 1, pixels[0])
    head.others += 4 * 150 * height * width
    return found


@pytest.mark.parametrize(
    ("by_hand", "size"),
    [(retinanet, (800, 1280)), (mask_rcnn, (800, 1280)), (semantic_fpn, (512, 512))],
)
def test_parts_are_those_counted_by_hand_at_the_papers_sizes(by_hand, size) -> None:
    result = profile_dense(create(f"{by_hand.__name__}_poolformer_s12"), measure=False)
    assert result.input_shape == (1, 3, *size)
    found = {p.name: (p.params, p.macs_fvcore, p.macs_flop_counter) for p in result.parts}
    assert found == {part: count.figures for part, count in by_hand(*size).items()}
    total = result.total
    sums = tuple(sum(figures) for figures in zip(*found.values(), strict=True))
    assert (total.params, total.macs_fvcore, total.macs_flop_counter) == sums
    assert {part.time for part in (*result.parts, total)} == {None}
    assert result.backend is None
    regions = {"box head": 1000, "mask head": 100} if by_hand is mask_rcnn else {}
    assert result.regions == regions


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_official_configurations(name) -> None:
    result = profile_dense(create(name), 64, measure=False)
    assert result.total.params == sum(part.params for part in result.parts) == PARAMETERS[name]
    assert sum(p.numel() for p in create(name).parameters()) == PARAMETERS[name]


def test_batch_and_another_size() -> None:
    model = create("mask_rcnn_poolformer_s12")
    one, three = (profile_dense(model, (64, 96), batch=n, measure=False) for n in (1, 3))
    assert three.input_shape == (3, 3, 64, 96)
    assert [3 * part.macs_fvcore for part in one.parts] == [part.macs_fvcore for part in three.parts]
    assert [part.params for part in one.parts] == [part.params for part in three.parts]
    by_hand = mask_rcnn(64, 96)
    assert [part.macs_fvcore for part in one.parts] == [c.figures[1] for c in by_hand.values()]


@pytest.mark.parametrize("name", ["poolformerv2_s12", "metaformer_id_s12"])
def test_other_backbones_are_counted_too(name) -> None:
    with torch.device("meta"):
        body = create_model(name, features_only=True)
    result = profile_dense(made("semantic_fpn", body), 64, measure=False)
    stages = [part for part in result.parts if part.name.startswith(("stage", "norms"))]
    assert sum(part.params for part in stages) == sum(p.numel() for p in body.parameters())
    assert sum(part.macs_fvcore for part in stages) == count_macs(body, (1, 3, 64, 64)).total()


# ---- times -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_is_timed(name, dtype, no_probe, monkeypatch) -> None:
    monkeypatch.setattr(dense, "PROPOSALS", 6)
    monkeypatch.setattr(dense, "DETECTIONS", 2)
    result = profile_dense(tiny(name), 64, dtype=dtype, rounds=1)
    assert all(part.time.rounds == 1 for part in (*result.parts, result.total))
    assert all(part.time.median > 0 for part in (*result.parts, result.total))
    assert (result.dtype, result.device) == (dtype, "cpu")
    content = json.loads(json.dumps(result.to_dict()))
    assert content["total"]["time"]["median"] == result.total.time.median
    assert content["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", HEADS)
def test_the_parts_in_a_row_compute_what_the_model_does(name, monkeypatch) -> None:
    monkeypatch.setattr(dense, "PROPOSALS", 30)
    monkeypatch.setattr(dense, "DETECTIONS", 5)
    model = tiny(name).eval()
    x = torch.randn(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        results = {part.name: part.run() for part in dense._parts(model, x)}
        maps = model.backbone(x)
    torch.testing.assert_close(results["neck"], maps, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        if name == "semantic_fpn":
            torch.testing.assert_close(results["head"], model(x), rtol=1e-4, atol=1e-5)
        elif name == "retinanet":
            expected = model.head(list(maps.values()))
            torch.testing.assert_close(results["classification head"], expected["cls_logits"])
            torch.testing.assert_close(results["box head"], expected["bbox_regression"])
        else:
            boxes = [dense._random_boxes(30, 64, 96)]
            logits, deltas = model.roi_heads._boxes(maps, boxes, [(64, 96)])
            torch.testing.assert_close(results["box head"], (logits, deltas))
            masks = model.roi_heads._masks(maps, [dense._random_boxes(5, 64, 96)], [(64, 96)])
            torch.testing.assert_close(results["mask head"], masks)


def test_random_boxes_lie_in_the_image() -> None:
    boxes = dense._random_boxes(500, 64, 800)
    assert torch.equal(boxes, clip_boxes_to_image(boxes, (64, 800)))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= 8 - 1e-3
    assert sides[:, 0].median() == pytest.approx(80, rel=0.2)  # the middle of 8 to 800 on a log scale


def test_the_model_is_left_as_it_was(no_probe) -> None:
    model = tiny("semantic_fpn").train()
    called = []
    model.backbone.fpn.register_forward_hook(lambda *_: called.append(1))
    with unchanged(model):
        profile_dense(model, 64, dtype=torch.bfloat16, rounds=1)
    assert called == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model must be a detector or segmenter of .dense, got"),
        ({"size": 100}, ValueError, "size must be of multiples of 32 pixels, got 100"),
        ({"size": (64, 65)}, ValueError, r"size must be of multiples of 32 pixels, got \(64, 65\)"),
        ({"size": "64"}, TypeError, "size must be an int or a tuple of two ints, got '64'"),
        ({"batch": 0}, ValueError, "batch must be positive, got 0"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating torch.dtype or None, got torch.int8"),
        ({"device": "tpu"}, ValueError, "device must be a CPU or CUDA device, got 'tpu'"),
        ({"measure": True}, ValueError, "model is on the meta device and has no weights to time"),
    ],
)
def test_refusals(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        profile_dense(**({"model": create("semantic_fpn_poolformer_s12"), "measure": False} | arguments))


# ---- the command -------------------------------------------------------------------------------------------


def test_command_counts(capsys, tmp_path) -> None:
    path = tmp_path / "profile.json"
    command = "profile --no-time --model mask_rcnn_poolformer_s12 --image-size 64 96 --json"
    lines = [" ".join(line.split()) for line in printed(capsys, command, path).splitlines()]
    assert "MaskRCNN on poolformer_s12, 1x3x64x96, float32" in lines
    assert "31,574,965 parameters" in lines
    parts = mask_rcnn(64, 96)
    for name, count in parts.items():
        params, fvcore, torchs = count.figures
        assert f"{name} {params:,} {fvcore / 1e9:,.2f} {torchs / 1e9:,.2f}" in lines
    assert any("1000 regions in the box head and 100 regions in the mask head" in line for line in lines)
    assert any(line.startswith("4,357 parameters are torchvision's") for line in lines)
    saved = json.loads(path.read_text())
    assert saved["schema"] == 1
    assert saved["profile"]["total"]["macs_flop_counter"] == sum(c.products for c in parts.values())
    assert saved["profile"]["regions"] == {"box head": 1000, "mask head": 100}


def test_command_default_sizes(capsys) -> None:
    for name, size in (("retinanet", "800x1280"), ("semantic_fpn", "512x512")):
        out = printed(capsys, f"profile --no-time --batch-size 2 --model {name}_poolformer_s12")
        assert f", 2x3x{size}, float32" in out


def test_command_times(capsys, monkeypatch) -> None:
    monkeypatch.setattr(command, "create_segmenter", lambda head, backbone: tiny(head))
    monkeypatch.setattr(command, "profile_dense", lambda *a, **k: profile_dense(*a, **k, rounds=1))
    options = "--model semantic_fpn_poolformer_s12 --image-size 64 --device cpu"
    lines = printed(capsys, f"profile {options}").splitlines()
    assert next(line for line in lines if line.split()[:1] == ["total"]).split()[-1] == "100%"
    assert next(line for line in lines if line.split()[:1] == ["neck"]).rstrip().endswith("%")
    assert any("without resizing, anchors and NMS" in line for line in lines)


NO_MODEL = "argument --model: '{}' is no model (did you mean "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model yolo_poolformer_s12", f"{NO_MODEL.format('yolo_poolformer_s12')}poolformer"),
        ("--model retinanet_poolformer_s13", f"{NO_MODEL.format('retinanet_poolformer_s13')}retinanet_poolf"),
        ("--model retinanet_poolformer_s12 --image-size 100", "--image-size: size must be of multiples"),
        ("--image-size 64 64 64", "--image-size: 3 numbers; allowed: a side, or height and width"),
        ("--image-size 64 16", "argument --image-size: must be at least 32"),
    ],
)
def test_command_refuses_in_one_line(arguments, message, capsys) -> None:
    assert refused(capsys, "profile --no-time", *arguments.split()).startswith(message)
