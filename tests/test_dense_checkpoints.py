"""Official files of the detectors and the segmenter: every value where it belongs, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from support import dense_truth as truth
from support.dense import BACKGROUND, HEADS, PARAMETERS, made, require_dense
from support.dense_files import CLASSES, NAMES, make, official_file, official_state, tiny_body
from support.dense_truth import conv
from support.dense_truth_regions import doubled, linear
from support.peers import as_mmpretrain, randomise, relative_error
from support.problems import randn
from support.train import save_with_notes

import poolformer_kernels as pk
from poolformer_kernels.models import CheckpointReport, load_checkpoint

require_dense()
from poolformer_kernels import dense
from poolformer_kernels.dense import model_of_checkpoint

KINDS = {"retinanet": "RetinaNet", "mask_rcnn": "Mask R-CNN", "semantic_fpn": "Semantic FPN"}
SOURCES = {"retinanet": "mmdetection", "mask_rcnn": "mmdetection", "semantic_fpn": "mmsegmentation"}
X = randn(1, 3, 64, 96)


def assert_holds(model, state):
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


@pytest.fixture(params=HEADS)
def official(request, tmp_path):
    """(head, file, its tensors)."""
    path = tmp_path / "official.pth"
    return request.param, path, official_file(path, request.param)


# ---- what the official code computes, from the official tensors --------------------------------------------


def assert_near(actual, expected):
    assert relative_error(actual, expected) < 1e-5


def scale_head(level, i):
    """A convolution of mmsegmentation's head and its norm; at odd indices there are upsamplings."""
    return tuple(f"decode_head.scale_heads.{level}.{2 * i}.{part}" for part in ("conv", "bn"))


@torch.no_grad()
def test_official_values_compute_what_the_official_code_computes(official):
    head, path, state = official
    model = make(head).eval()
    report = load_checkpoint(model, path)
    assert report == CheckpointReport(SOURCES[head], None, (), ())
    p = {key.replace("backbone.", "backbone.body."): value.double() for key, value in state.items()}
    maps = truth.body(p, X.double(), first=4 - model.backbone.levels)
    expected = truth.pyramid(p, maps, "neck.lateral_convs.{}.conv", "neck.fpn_convs.{}.conv")
    if head == "retinanet":
        expected.append(conv(maps[-1], p, "neck.fpn_convs.3.conv", 2, 1))
        expected.append(conv(expected[-1], p, "neck.fpn_convs.4.conv", 2, 1))
    found = list(model.backbone(X).values())
    for actual, wanted in zip(found[: len(expected)], expected, strict=True):
        assert_near(actual, wanted)
    if head == "semantic_fpn":
        logits = truth.semantic_head(p, expected, p, scale_head, "decode_head.conv_seg")
        assert_near(model(X), truth.resized(logits, *X.shape[2:]))
    elif head == "retinanet":
        for name, branch, last, numbers in (
            ("cls_logits", "cls", "retina_cls", CLASSES),
            ("bbox_regression", "reg", "retina_reg", 4),
        ):
            deep = [truth.four_convolutions(x, p, f"bbox_head.{branch}_convs.{{}}.conv") for x in expected]
            wanted = [truth.flat(conv(x, p, f"bbox_head.{last}", padding=1), numbers) for x in deep]
            assert_near(model.head(found)[name], torch.cat(wanted, 1))
    else:
        check_regions(model, p, expected[0])


def check_regions(model, p, finest):
    """The RPN on a map, and both heads on regions: mmdetection's background is last, ours first."""
    shared = conv(finest, p, "rpn_head.rpn_conv", padding=1).relu()
    (objectness,), (deltas,) = model.rpn.head([finest.float()])
    assert_near(objectness, conv(shared, p, "rpn_head.rpn_cls"))
    assert_near(deltas, conv(shared, p, "rpn_head.rpn_reg"))

    regions, box, heads = randn(3, 256, 7, 7), "roi_head.bbox_head", model.roi_heads
    x = linear(regions.double().flatten(1), p, f"{box}.shared_fcs.0").relu()
    x = linear(x, p, f"{box}.shared_fcs.1").relu()
    logits, found = heads.box_predictor(heads.box_head(regions))
    assert_near(logits.softmax(1), linear(x, p, f"{box}.fc_cls").softmax(1).roll(1, 1))
    assert_near(found[:, 4:], linear(x, p, f"{box}.fc_reg"))
    assert found[:, :4].eq(0).all()

    regions, mask = randn(3, 256, 14, 14), "roi_head.mask_head"
    x = truth.four_convolutions(regions.double(), p, f"{mask}.convs.{{}}.conv")
    x = doubled(x, p, f"{mask}.upsample").relu()
    found = heads.mask_predictor(heads.mask_head(regions))
    assert_near(found[:, 1:], conv(x, p, f"{mask}.conv_logits"))
    assert found[:, 0].eq(0).all()


# ---- the released sizes ------------------------------------------------------------------------------------


@pytest.fixture
def s12(monkeypatch):
    """Official files are of poolformer_s12's shapes."""
    monkeypatch.setattr("support.dense_files.LAYERS", (2, 2, 6, 2))
    monkeypatch.setattr("support.dense_files.DIMS", (64, 128, 320, 512))


@pytest.mark.parametrize("head", HEADS)
def test_official_shapes_add_up_to_the_papers_parameters(head, s12):
    state = official_state(head, 150 if head == "semantic_fpn" else 80)
    counted = sum(t.numel() for k, t in state.items() if "running" not in k and "tracked" not in k)
    background = BACKGROUND if head == "mask_rcnn" else 0
    assert counted == PARAMETERS[f"{head}_poolformer_s12"] - background


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
    assert_holds(model, expected.state_dict())


def test_released_sizes_get_their_names(s12, tmp_path):
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
        save_with_notes(path, trained, classes=NAMES)
    model, report, classes = model_of_checkpoint(path)
    assert report == CheckpointReport("poolformer_kernels", None, (), ())
    assert classes == (NAMES if suffix == ".safetensors" else None)
    assert_holds(model, trained.state_dict())


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
        assert_holds(model_of_checkpoint(tmp_path / "a.pth")[0], trained.state_dict())
    model = model_of_checkpoint(tmp_path / "a.pth", full)[0]
    assert model.backbone.body.config.name == name
    assert_holds(model, trained.state_dict())
    save_with_notes(tmp_path / "b.safetensors", trained, model=full, classes=["a", "b", "c"])
    model, _, classes = model_of_checkpoint(tmp_path / "b.safetensors")
    assert classes == ("a", "b", "c")
    assert_holds(model, trained.state_dict())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_prefixes(official, prefix, tmp_path):
    """Of an official file's names, and of ours."""
    head, path, state = official
    expected = make(head)
    load_checkpoint(expected, path)
    for tensors in (state, expected.state_dict()):
        model, content = make(head), {f"{prefix}{k}": v for k, v in tensors.items()}
        torch.save({"state_dict": content} if tensors is state else content, tmp_path / "ddp.pth")
        load_checkpoint(model, tmp_path / "ddp.pth")
        assert_holds(model, expected.state_dict())


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
        state = as_mmpretrain(state)
    elif source != "official":
        state = pk.export_state_dict(state, {"huggingface": "transformers"}.get(source, source))
    return state, model


@pytest.mark.parametrize("source", ["official", "timm", "huggingface", "mmpretrain"])
@pytest.mark.parametrize("head", ["retinanet", "semantic_fpn"])
def test_imagenet_weights_go_into_the_body(head, source, tmp_path):
    state, classifier = classifier_under(source)
    torch.save(state, tmp_path / "imagenet.pth")
    body = made(head, "poolformer_s12", 3).backbone.body
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


LAST = {  # a key as the official code has it, and ours
    "retinanet": ("bbox_head.retina_reg.bias", "head.regression_head.bbox_reg.bias"),
    "mask_rcnn": ("roi_head.bbox_head.fc_reg.bias", "roi_heads.box_predictor.bbox_pred.bias"),
    "semantic_fpn": ("decode_head.conv_seg.bias", "classifier.bias"),
}


def refused(model, content, tmp_path, *parts):
    before = copy.deepcopy(model.state_dict())
    message = error_of(lambda path: load_checkpoint(model, path), content, tmp_path / "bad.pth")
    for part in parts:
        assert part in message
    assert_holds(model, before)


def error_of(load, content, path):
    """What is said of a file with this content, in one line."""
    torch.save(content, path)
    with pytest.raises((TypeError, ValueError)) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"checkpoint {path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("head", HEADS)
def test_files_that_do_not_fit(head, tmp_path):
    model, state, (key, ours) = make(head), official_state(head), LAST[head]
    fits = f"does not fit {KINDS[head]} on tiny"
    refused(model, drop(state, key), tmp_path, fits, f"1 missing keys, the first {ours}")
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
    model, other = make(head), HEADS[HEADS.index(head) - 1]
    names = f"it is of a {KINDS[other]}, under the names of"
    on = f"the model is {KINDS[head]} on tiny"
    refused(model, official_state(other), tmp_path, f"{names} {SOURCES[other]}; {on}")
    refused(model, make(other).state_dict(), tmp_path, f"{names} poolformer_kernels")
    body = "it is of a classifier or its backbone, under the names of official"
    refused(model, tiny_body(False).state_dict(), tmp_path, f"{body}; load it into model.backbone.body")
    what = f"not a checkpoint of {KINDS[head]}: its first key is 'conv1.weight'; allowed:"
    refused(model, {"conv1.weight": X}, tmp_path, what)
    refused(model, {}, tmp_path, "it is empty")


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_a_classifier_says_what_it_was_given(head, features_only, tmp_path):
    body = tiny_body(features_only)
    what = f"it is of a {KINDS[head]}, under the names of {SOURCES[head]}; allowed: a classifier's"
    refused(body, {"state_dict": official_state(head), "meta": {}}, tmp_path, what)
    own = f"it is of a {KINDS[head]}, under the names of poolformer_kernels"
    refused(body, make(head).state_dict(), tmp_path, own)


def test_model_of_checkpoint_refuses(tmp_path):
    state, path = official_state("retinanet"), tmp_path / "a.pth"
    resnet = {k: v for k, v in state.items() if not k.startswith("backbone.")} | {"backbone.conv1.weight": X}
    no_head = "it is of no detector or segmenter"
    two_names = {"state_dict": state, "meta": {"CLASSES": ("a", "b")}}
    for content, words in (
        (tiny_body(False).state_dict(), f"{no_head}: its first key is 'patch_embed.proj.weight'"),
        (two_names, "it names 2 classes, its last layer has 5"),
        (resnet, "its backbone is no PoolFormer"),
        (drop(state, "backbone.network.4.0.norm1.bias"), "missing keys, the first network.4.0"),
    ):
        assert words in error_of(model_of_checkpoint, content, path)
    unknown = error_of(lambda path: model_of_checkpoint(path, "yolo_poolformer_s12"), state, path)
    assert "name is 'yolo_poolformer_s12'; allowed: a head" in unknown
    with pytest.raises(FileNotFoundError, match="does not exist"):
        model_of_checkpoint(tmp_path / "none.pth")


def test_other_modules_are_no_targets(tmp_path):
    with pytest.raises(TypeError, match=r"a detector or segmenter of .*PoolFormer, got Linear"):
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "none.pth")
