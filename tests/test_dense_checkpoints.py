"""Official files of the detectors and the segmenter: every value where it belongs, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.dense_files import (
    CLASSES,
    HEADS,
    NAMES,
    make,
    official_file,
    official_shapes,
    official_state,
    require_dense,
    tiny_body,
)
from support.peers import randomise, relative_error, require
from support.problems import randn

import poolformer_kernels as pk
from poolformer_kernels.models import CheckpointReport, load_checkpoint
from poolformer_kernels.models.checkpoints import FILE_NOTES

require_dense()
from poolformer_kernels import dense
from poolformer_kernels.dense import model_of_checkpoint

KINDS = {"retinanet": "RetinaNet", "mask_rcnn": "Mask R-CNN", "semantic_fpn": "Semantic FPN"}
SOURCES = {"retinanet": "mmdetection", "mask_rcnn": "mmdetection", "semantic_fpn": "mmsegmentation"}
X = randn(1, 3, 64, 96)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model, before):
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.fixture(params=HEADS)
def official(request, tmp_path):
    """(head, file, its tensors)."""
    path = tmp_path / "official.pth"
    return request.param, path, official_file(path, request.param)


# ---- the official code's forward, as functions of the official tensors -------------------------------------


def conv(state, key, x, **options):
    return F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), **options)


def pyramid(state, maps):
    """mmdetection's FPN: laterals, nearest upsampling from the coarsest down, a convolution each."""
    laterals = [conv(state, f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in range(len(maps) - 1, 0, -1):
        size = laterals[i - 1].shape[2:]
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=size, mode="nearest")
    found = [conv(state, f"neck.fpn_convs.{i}.conv", x, padding=1) for i, x in enumerate(laterals)]
    if "neck.fpn_convs.4.conv.weight" in state:
        found.append(conv(state, "neck.fpn_convs.3.conv", maps[-1], padding=1, stride=2))
        found.append(conv(state, "neck.fpn_convs.4.conv", found[-1], padding=1, stride=2))
    return found


def retina_head(state, x, branch, last):
    for i in range(4):
        x = conv(state, f"bbox_head.{branch}_convs.{i}.conv", x, padding=1).relu()
    return conv(state, f"bbox_head.{last}", x, padding=1)


def fpn_head(state, maps):
    """mmsegmentation's FPNHead in evaluation, before the last upsampling."""
    total = 0
    for level, x in enumerate(maps):
        for j in range(max(level, 1)):
            key = f"decode_head.scale_heads.{level}.{2 * j}"
            x = conv(state, f"{key}.conv", x, padding=1)
            statistics = [state[f"{key}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
            x = F.batch_norm(x, *statistics).relu()
            if level:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + x
    return conv(state, "decode_head.conv_seg", total)


def maps_of(state, model):
    """The backbone's maps, by a PoolFormer of its own with the official tensors (norm0 may be missing)."""
    body = tiny_body()
    tensors = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    left = body.load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= {"norm0.weight", "norm0.bias"}
    with torch.no_grad():
        return body.eval()(X)[-model.backbone.levels :]


def assert_near(actual, expected):
    assert relative_error(actual, expected) < 1e-5


@torch.no_grad()
def test_official_values_compute_what_the_official_code_computes(official):
    head, path, state = official
    model = make(head).eval()
    report = load_checkpoint(model, path)
    assert report == CheckpointReport(SOURCES[head], None, (), ())
    expected = pyramid(state, maps_of(state, model))
    found = list(model.backbone(X).values())[: len(expected)]
    for actual, wanted in zip(found, expected, strict=True):
        assert_near(actual, wanted)
    if head == "semantic_fpn":
        logits = F.interpolate(fpn_head(state, expected), size=X.shape[2:], mode="bilinear")
        assert_near(model(X), logits)
    elif head == "retinanet":
        for values in expected:
            logits = model.head([values])
            for name, branch, last, size in (
                ("cls_logits", "cls", "retina_cls", CLASSES),
                ("bbox_regression", "reg", "retina_reg", 4),
            ):
                wanted = retina_head(state, values, branch, last).permute(0, 2, 3, 1).reshape(1, -1, size)
                assert_near(logits[name], wanted)
    else:
        check_regions(model, state, expected)


def check_regions(model, state, maps):
    """The RPN on a map, and both heads on regions: mmdetection's background is last, ours first."""
    shared = conv(state, "rpn_head.rpn_conv", maps[0], padding=1).relu()
    objectness, deltas = model.rpn.head([maps[0]])
    assert_near(objectness[0], conv(state, "rpn_head.rpn_cls", shared))
    assert_near(deltas[0], conv(state, "rpn_head.rpn_reg", shared))

    regions, box = randn(3, 256, 7, 7), "roi_head.bbox_head"
    x = regions.flatten(1)
    for key in ("shared_fcs.0", "shared_fcs.1"):
        x = F.linear(x, state[f"{box}.{key}.weight"], state[f"{box}.{key}.bias"]).relu()
    scores = F.linear(x, state[f"{box}.fc_cls.weight"], state[f"{box}.fc_cls.bias"]).softmax(1)
    boxes = F.linear(x, state[f"{box}.fc_reg.weight"], state[f"{box}.fc_reg.bias"])
    heads = model.roi_heads
    logits, found = heads.box_predictor(heads.box_head(regions))
    assert_near(logits.softmax(1)[:, 1:], scores[:, :-1])
    assert_near(logits.softmax(1)[:, 0], scores[:, -1])
    assert_near(found[:, 4:], boxes)
    assert found[:, :4].eq(0).all()

    regions, mask = randn(3, 256, 14, 14), "roi_head.mask_head"
    x = regions
    for i in range(4):
        x = conv(state, f"{mask}.convs.{i}.conv", x, padding=1).relu()
    x = F.conv_transpose2d(x, state[f"{mask}.upsample.weight"], state[f"{mask}.upsample.bias"], 2).relu()
    found = heads.mask_predictor(heads.mask_head(regions))
    assert_near(found[:, 1:], conv(state, f"{mask}.conv_logits", x))
    assert found[:, 0].eq(0).all()


# ---- the released sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "parameters"),
    [("retinanet", 21_653_044), ("mask_rcnn", 31_570_608), ("semantic_fpn", 15_669_846)],
)
def test_official_shapes_add_up_to_the_papers_parameters(head, parameters, monkeypatch):
    monkeypatch.setattr("support.dense_files.LAYERS", (2, 2, 6, 2))
    monkeypatch.setattr("support.dense_files.DIMS", (64, 128, 320, 512))
    shapes = official_shapes(head, 150 if head == "semantic_fpn" else 80)
    counted = {k: s for k, s in shapes.items() if "running" not in k and "tracked" not in k}
    assert sum(torch.Size(shape).numel() for shape in counted.values()) == parameters


# ---- the model of a file -----------------------------------------------------------------------------------


def test_model_of_checkpoint(official):
    head, path, _ = official
    model, report, classes = model_of_checkpoint(path)
    assert type(model) is type(make(head))
    assert not model.training
    assert model.num_classes == CLASSES
    assert classes == NAMES
    assert report.source == SOURCES[head]
    assert model.backbone.body.config.layers == (1, 1, 2, 1)
    expected = make(head)
    load_checkpoint(expected, path)
    assert_unchanged(model, expected.state_dict())


def test_released_sizes_get_their_names(monkeypatch, tmp_path):
    monkeypatch.setattr("support.dense_files.LAYERS", (2, 2, 6, 2))
    monkeypatch.setattr("support.dense_files.DIMS", (64, 128, 320, 512))
    official_file(tmp_path / "s12.pth", "semantic_fpn", classes=150, names=None)
    model, _, classes = model_of_checkpoint(tmp_path / "s12.pth")
    assert (model.backbone.body.config.name, model.num_classes) == ("poolformer_s12", 150)
    assert classes is None
    with pytest.raises(ValueError, match=r"s12\.pth: .*poolformer_s24.*missing keys"):
        model_of_checkpoint(tmp_path / "s12.pth", "semantic_fpn_poolformer_s24")
    with pytest.raises(ValueError, match="name is 'retinanet_poolformer_s12', but it is of a Semantic FPN"):
        model_of_checkpoint(tmp_path / "s12.pth", "retinanet_poolformer_s12")
    with pytest.raises(TypeError, match="min_size is given; allowed with a detector only"):
        model_of_checkpoint(tmp_path / "s12.pth", min_size=512)


def test_detectors_take_their_options(tmp_path):
    official_file(tmp_path / "a.pth", "retinanet")
    model, _, _ = model_of_checkpoint(tmp_path / "a.pth", min_size=64, max_size=96, score_threshold=0.2)
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 96)
    assert model.score_thresh == 0.2


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("head", HEADS)
def test_our_own_files(head, suffix, tmp_path):
    torch.manual_seed(1)
    trained = make(head)
    path = tmp_path / f"best{suffix}"
    if suffix == ".pth":
        torch.save(trained.state_dict(), path)
    else:
        notes = {FILE_NOTES: json.dumps({"classes": NAMES})}
        require("safetensors.torch").save_file(trained.state_dict(), path, metadata=notes)
    model, report, classes = model_of_checkpoint(path)
    assert report == CheckpointReport("poolformer_kernels", None, (), ())
    assert classes == (NAMES if suffix == ".safetensors" else None)
    assert_unchanged(model, trained.state_dict())
    torch.save({f"module.{k}": v for k, v in trained.state_dict().items()}, tmp_path / "ddp.pth")
    other = make(head)
    load_checkpoint(other, tmp_path / "ddp.pth")
    assert_unchanged(other, trained.state_dict())


@pytest.mark.parametrize("name", ["poolformerv2_s12", "metaformer_s12"])
def test_other_backbones(name, tmp_path):
    torch.manual_seed(1)
    trained = dense.create_segmenter("semantic_fpn", name, 3)
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    full = f"semantic_fpn_{name}"
    if name.startswith("metaformer"):
        with pytest.raises(ValueError, match=r"a\.pth: it is of a MetaFormer with .*its name"):
            model_of_checkpoint(tmp_path / "a.pth")
    else:
        assert_unchanged(model_of_checkpoint(tmp_path / "a.pth")[0], trained.state_dict())
    model = model_of_checkpoint(tmp_path / "a.pth", full)[0]
    assert model.backbone.body.config.name == name
    assert_unchanged(model, trained.state_dict())
    notes = {FILE_NOTES: json.dumps({"model": full, "classes": ["a", "b", "c"]})}
    require("safetensors.torch").save_file(trained.state_dict(), tmp_path / "b.safetensors", metadata=notes)
    model, _, classes = model_of_checkpoint(tmp_path / "b.safetensors")
    assert classes == ("a", "b", "c")
    assert_unchanged(model, trained.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_prefixes_of_official_files(official, prefix, tmp_path):
    head, path, state = official
    torch.save({"state_dict": {f"{prefix}{k}": v for k, v in state.items()}}, tmp_path / "ddp.pth")
    model, expected = make(head), make(head)
    load_checkpoint(model, tmp_path / "ddp.pth")
    load_checkpoint(expected, path)
    assert_unchanged(model, expected.state_dict())


@pytest.mark.parametrize("numpy_1", [False, True])
def test_files_with_numpys_numbers(numpy_1, tmp_path):
    """mmsegmentation's best score is one."""
    path, state = tmp_path / "best.pth", official_state("semantic_fpn")
    meta = {"CLASSES": NAMES, "hook_msgs": {"best_score": np.float64(0.37), "best_epoch": np.int64(7)}}
    torch.save({"meta": meta, "state_dict": state}, path, _use_new_zipfile_serialization=False)
    if numpy_1:
        content = path.read_bytes()
        assert b"numpy._core.multiarray\n" in content
        path.write_bytes(content.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
    _, _, classes = model_of_checkpoint(path)
    assert classes == NAMES


# ---- ImageNet's weights in the backbone --------------------------------------------------------------------


def classifier_under(source):
    """A classifier's tensors under a source's names, and itself."""
    model = randomise(pk.create_model("poolformer_s12"), 3)
    state = dict(model.state_dict())
    if source == "mmpretrain":
        state = {
            f"backbone.{k}".replace("backbone.head", "head.fc").replace(
                "backbone.norm.", "backbone.norm6."
            ): v
            for k, v in state.items()
        }
    elif source != "official":
        state = pk.export_state_dict(state, {"huggingface": "transformers"}.get(source, source))
    return state, model


@pytest.mark.parametrize("source", ["official", "timm", "huggingface", "mmpretrain"])
@pytest.mark.parametrize("head", ["retinanet", "semantic_fpn"])
def test_imagenet_weights_go_into_the_body(head, source, tmp_path):
    state, classifier = classifier_under(source)
    torch.save(state, tmp_path / "imagenet.pth")
    made = dense.create_segmenter if head == "semantic_fpn" else dense.create_detector
    model = made(head, "poolformer_s12", 3)
    body = model.backbone.body
    report = load_checkpoint(body, tmp_path / "imagenet.pth")
    assert report.source == source
    norms = [f"norm{2 * s}.{n}" for s in range(head == "retinanet", 4) for n in ("weight", "bias")]
    assert sorted(report.not_in_file) == sorted(norms)
    own = body.state_dict()
    for key, value in classifier.state_dict().items():
        if not key.startswith(("norm.", "head.")):
            assert torch.equal(own[key], value), key
    for key in norms:
        assert own[key].eq(1.0 if key.endswith("weight") else 0.0).all(), key


# ---- what is refused ---------------------------------------------------------------------------------------


def drop(state, key):
    return {k: v for k, v in state.items() if k != key}


LAST = {
    "retinanet": "bbox_head.retina_reg.bias",
    "mask_rcnn": "roi_head.bbox_head.fc_reg.bias",
    "semantic_fpn": "decode_head.conv_seg.bias",
}
OUR_LAST = {
    "retinanet": "head.regression_head.bbox_reg.bias",
    "mask_rcnn": "roi_heads.box_predictor.bbox_pred.bias",
    "semantic_fpn": "classifier.bias",
}


def refused(model, content, tmp_path, *parts):
    path = tmp_path / "bad.pth"
    torch.save(content, path)
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError)) as error:
        load_checkpoint(model, path)
    message = str(error.value)
    assert message.startswith(f"checkpoint {path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert_unchanged(model, before)


@pytest.mark.parametrize("head", HEADS)
def test_files_that_do_not_fit(head, tmp_path):
    model, state, key = make(head), official_state(head), LAST[head]
    fits = f"does not fit {KINDS[head]} on tiny"
    refused(model, drop(state, key), tmp_path, fits, f"1 missing keys, the first {OUR_LAST[head]}")
    refused(model, state | {"ema.x": X}, tmp_path, fits, "1 unexpected keys, the first ema.x")
    wrong = state | {"neck.fpn_convs.0.conv.bias": torch.zeros(7)}
    where = "1 keys of another shape, the first backbone.fpn.layer_blocks.0.0.bias: [7] in the file, [256]"
    refused(model, wrong, tmp_path, fits, where)
    refused(model, {"state_dict": {**state, "a": "b"}}, tmp_path, "got str at 'a'")


@pytest.mark.parametrize("head", HEADS)
def test_another_number_of_classes(head, tmp_path):
    hint = f"(the model has {CLASSES} classes: make it with num_classes=8)"
    refused(make(head), official_state(head, 8), tmp_path, "keys of another shape", hint)
    besides = official_state(head, 8) | {"neck.fpn_convs.0.conv.bias": torch.zeros(7)}
    with pytest.raises(AssertionError):
        refused(make(head), besides, tmp_path, hint)


@pytest.mark.parametrize("head", HEADS)
def test_another_kind_of_model(head, tmp_path):
    other = HEADS[HEADS.index(head) - 1]
    kind = (
        f"it is of a {KINDS[other]}, under the names of {SOURCES[other]}; the model is {KINDS[head]} on tiny"
    )
    refused(make(head), official_state(other), tmp_path, kind)
    own = f"it is of a {KINDS[other]}, under the names of poolformer_kernels"
    refused(make(head), make(other).state_dict(), tmp_path, own)
    body = (
        "it is of a classifier or its backbone, under the names of official; load it into model.backbone.body"
    )
    refused(make(head), tiny_body(features_only=False).state_dict(), tmp_path, body)
    what = f"not a checkpoint of {KINDS[head]}: its first key is 'conv1.weight'; allowed:"
    refused(make(head), {"conv1.weight": X}, tmp_path, what)
    refused(make(head), {}, tmp_path, "it is empty")


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_a_classifier_says_what_it_was_given(head, features_only, tmp_path):
    body = tiny_body(features_only)
    what = f"it is of a {KINDS[head]}, under the names of {SOURCES[head]}; allowed: a classifier's"
    refused(body, {"state_dict": official_state(head), "meta": {}}, tmp_path, what)
    own = f"it is of a {KINDS[head]}, under the names of poolformer_kernels"
    refused(body, make(head).state_dict(), tmp_path, own)


def test_model_of_checkpoint_refuses(tmp_path):
    def message(content, *arguments):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises((TypeError, ValueError)) as error:
            model_of_checkpoint(tmp_path / "a.pth", *arguments)
        assert str(error.value).startswith(f"checkpoint {tmp_path / 'a.pth'}: ")
        return str(error.value)

    assert "it is of no detector or segmenter: its first key is 'patch_embed.proj.weight'" in message(
        tiny_body(False).state_dict()
    )
    state = official_state("retinanet")
    assert "it names 2 classes, its last layer has 5" in message(
        {"state_dict": state, "meta": {"CLASSES": ("a", "b")}}
    )
    resnet = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    assert "its backbone is no PoolFormer" in message(resnet | {"backbone.conv1.weight": X})
    assert re.search(
        "missing keys, the first network.4.0", message(drop(state, "backbone.network.4.0.norm1.bias"))
    )
    assert "name is 'yolo_poolformer_s12'; allowed: a head" in message(state, "yolo_poolformer_s12")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        model_of_checkpoint(tmp_path / "none.pth")


def test_other_modules_are_no_targets(tmp_path):
    with pytest.raises(TypeError, match=r"a detector or segmenter of .*PoolFormer, got Linear"):
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "none.pth")
