"""The detectors and the segmenter as objects: parameters, arguments, sizes, copies, dtypes."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from support.dense import DETECTORS, DIMS, HEADS, images, made, require_dense, sample, target, tiny, tiny_body
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.models import MetaFormer, MetaFormerConfig

require_dense()

from poolformer_kernels import dense
from poolformer_kernels.dense.registry import split_name

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


# ---- structure ---------------------------------------------------------------------------------------------


def test_names():
    assert dense.list_detectors() == ["retinanet", "mask_rcnn"]
    assert dense.list_segmenters() == ["semantic_fpn"]
    assert split_name("retinanet_poolformer_s12") == ("retinanet", "poolformer_s12")
    assert split_name("semantic_fpn_metaformer_id_s12") == ("semantic_fpn", "metaformer_id_s12")
    assert split_name("mask_rcnn_poolformerv2_m48") == ("mask_rcnn", "poolformerv2_m48")
    for name in ("retinanet", "retinanet_", "fcos_poolformer_s12", "retinanet_resnet50", ""):
        with pytest.raises(ValueError, match=f"name is {name!r}"):
            split_name(name)
    for head, cls in zip(HEADS, (dense.RetinaNet, dense.MaskRCNN, dense.SemanticFPN), strict=True):
        model = tiny(head, classes=7)
        assert type(model) is cls
        assert model.num_classes == 7


def test_defaults_are_the_papers():
    with torch.device("meta"):
        retina, mask, fpn = (made(head) for head in HEADS)
    for model in (retina, mask):
        assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)
        assert model.num_classes == 80
    assert [getattr(mask.backbone.body, f"norm{i}").num_channels for i in (0, 2, 4, 6)] == [64, 128, 320, 512]
    assert [getattr(retina.backbone.body, f"norm{i}").num_channels for i in (2, 4, 6)] == [128, 320, 512]
    assert type(retina.backbone.body.norm0) is nn.Identity
    assert (retina.score_thresh, retina.nms_thresh) == (0.05, 0.5)
    assert (retina.detections_per_img, retina.topk_candidates) == (100, 1000)
    heads, rpn = mask.roi_heads, mask.rpn
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert (rpn._pre_nms_top_n, rpn.nms_thresh) == ({"training": 2000, "testing": 1000}, 0.7)
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    assert (fpn.num_classes, fpn.dropout.p) == (150, 0.1)
    rates = [m.drop_prob for m in fpn.modules() if hasattr(m, "drop_prob")]
    assert not any(rates)


def test_initial_weights():
    torch.manual_seed(0)
    retina, mask, fpn = (made(head, tiny_body()) for head in HEADS)
    assert torch.allclose(retina.head.classification_head.cls_logits.bias.sigmoid(), torch.tensor(0.01))
    for model in (retina, mask, fpn):
        for name, module in model.backbone.fpn.named_modules():
            if isinstance(module, nn.Conv2d):  # Xavier's uniform
                area = module.kernel_size[0] ** 2
                bound = (6 / (area * (module.in_channels + module.out_channels))) ** 0.5
                assert 0.98 * bound < module.weight.abs().max() <= bound, name
                assert not module.bias.any()
    predictor, head = mask.roi_heads.box_predictor, mask.roi_heads.box_head
    assert 0.0098 < predictor.cls_score.weight.std() < 0.0102
    assert 0.00098 < predictor.bbox_pred.weight.std() < 0.00102
    assert head.fc7.weight.abs().max() <= (6 / 2048) ** 0.5
    for module in (*mask.roi_heads.modules(), *mask.rpn.modules(), *retina.head.regression_head.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            assert not module.bias.any()
    assert 0.009 < fpn.classifier.weight.std() < 0.011
    assert not fpn.classifier.bias.any()
    first = fpn.scale_heads[0][0].weight
    assert 0.97 < first.std() / (2 / (9 * 128)) ** 0.5 < 1.03


# ---- arguments ---------------------------------------------------------------------------------------------


BAD_ARGUMENTS = {
    dense.create_detector: [
        (("fcos",), {}, ValueError, r"name is 'fcos'; allowed: retinanet, mask_rcnn"),
        (("semantic_fpn",), {}, ValueError, r"name is 'semantic_fpn'"),
        ((["retinanet"],), {}, ValueError, r"name is \['retinanet'\]"),
        (("retinanet", "resnet50"), {}, ValueError, r"name is 'resnet50'"),
        (("retinanet", nn.Identity()), {}, TypeError, r"backbone must be .* PoolFormer, got Identity"),
        (("retinanet", None), {}, TypeError, r"backbone must be .* got NoneType"),
        (("retinanet", "poolformer_s12", 0), {}, ValueError, r"num_classes must be positive, got 0"),
        (("retinanet", "poolformer_s12", 3.0), {}, TypeError, r"num_classes must be an int, got float"),
        (("mask_rcnn",), {"min_size": 0}, ValueError, r"min_size must be positive"),
        (("mask_rcnn",), {"max_size": 100}, ValueError, r"max_size is 100; allowed: at least min_size, 800"),
        (("mask_rcnn",), {"max_size": "1333"}, TypeError, r"max_size must be an int"),
        (("mask_rcnn",), {"score_threshold": 1}, ValueError, r"score_threshold must be in \[0, 1\), got 1"),
        (("mask_rcnn",), {"score_threshold": -0.1}, ValueError, r"score_threshold must not be negative"),
        (("mask_rcnn",), {"score_threshold": "no"}, TypeError, r"score_threshold must be a number, got str"),
        (("mask_rcnn",), {"score_threshold": float("nan")}, ValueError, r"score_threshold must"),
        (("mask_rcnn",), {"detections_per_image": 0}, ValueError, r"detections_per_image must be positive"),
        (("retinanet",), {"in_chans": 1}, ValueError, r"in_chans is 1; allowed in a detector: 3"),
        (("retinanet",), {"colour": 1}, TypeError, r"no argument 'colour'"),
    ],
    dense.create_segmenter: [
        (("retinanet",), {}, ValueError, r"name is 'retinanet'; allowed: semantic_fpn"),
        (("semantic_fpn", "poolformer_s12", True), {}, TypeError, r"num_classes must be an int, got bool"),
        (("semantic_fpn",), {"num_classes": 256}, ValueError, r"num_classes is 256; allowed: at most 255"),
        (("semantic_fpn",), {"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        (("semantic_fpn",), {"dropout": None}, TypeError, r"dropout must be a number, got NoneType"),
        (("semantic_fpn",), {"min_size": 5}, TypeError, r"no argument 'min_size'"),
    ],
}


@pytest.mark.parametrize(
    ("make", "arguments", "options", "error", "words"),
    [(make, *case) for make, cases in BAD_ARGUMENTS.items() for case in cases],
)
def test_bad_arguments(make, arguments, options, error, words):
    with torch.device("meta"), pytest.raises(error, match=words):
        make(*arguments, **options)


@pytest.mark.parametrize("head", HEADS)
def test_a_classifier_is_no_backbone(head):
    with torch.device("meta"):
        classifier, body = pk.create_model("poolformer_s12"), tiny_body()
    words = r"backbone poolformer_s12 has a head; allowed: .*features_only=True"
    with pytest.raises(ValueError, match=words):
        made(head, classifier)
    words = "layer_scale_init is given; allowed with the name of a backbone only"
    with pytest.raises(TypeError, match=words):
        made(head, body, layer_scale_init=None)


IMAGE = torch.rand(3, 40, 64)


@pytest.mark.parametrize("head", DETECTORS)
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([], TypeError, r"images must be a list of tensors \[3, H, W\], got an empty list"),
        (IMAGE, TypeError, r"images must be a list of tensors \[3, H, W\], got a tensor \[3, 40, 64\]"),
        (None, TypeError, r"images must be a list"),
        ([IMAGE, "x"], TypeError, r"images\[1\] must be a tensor of a floating dtype, got str"),
        ([(IMAGE * 255).byte()], TypeError, r"images\[0\] must be .* \[3, 40, 64\] of torch.uint8"),
        ([IMAGE, IMAGE[:2]], ValueError, r"images\[1\] must have shape \[3, H, W\], got \[2, 40, 64\]"),
        ([IMAGE[None]], ValueError, r"images\[0\] must have shape .* got \[1, 3, 40, 64\]"),
        ([IMAGE[:, :0]], ValueError, r"images\[0\] must have shape .* got \[3, 0, 64\]"),
    ],
)
def test_bad_images(head, given, error, words):
    model = tiny(head)
    for mode in (True, False):
        with pytest.raises(error, match=words):
            model.train(mode)(given, [{}])


def changed(**values) -> dict:
    good = target([[10.0, 4.0, 33.0, 29.0]], [2], (40, 64))
    return {name: value for name, value in (good | values).items() if value is not None}


BAD_TARGETS = [
    (None, ValueError, r"targets must be a list of 1 dicts.* got NoneType"),
    ([], ValueError, r"targets must be a list of 1 dicts.* got 0"),
    (changed(), ValueError, r"targets must be a list of 1 dicts.* got dict"),
    ([[1]], TypeError, r"targets\[0\] must be a dict, got list"),
    ([changed(boxes=None)], ValueError, r"targets\[0\] has no 'boxes'; it has labels, masks"),
    ([changed(labels=None)], ValueError, r"targets\[0\] has no 'labels'"),
    ([changed(labels=[2])], TypeError, r"targets\[0\]\['labels'\] must be a tensor, got list"),
    ([changed(boxes=[[1, 2, 3, 4]])], TypeError, r"\['boxes'\] must be a tensor, got list"),
    ([changed(boxes=torch.ones(1, 4).long())], ValueError, r"\['boxes'\] must be \[N, 4\] of a floating"),
    ([changed(boxes=torch.ones(4))], ValueError, r"\['boxes'\] must be \[N, 4\].* got a tensor \[4\]"),
    ([changed(labels=torch.tensor([2, 1]))], ValueError, r"\['labels'\] must be \[1\] of int64"),
    ([changed(labels=torch.tensor([2.0]))], ValueError, r"\['labels'\] must be \[1\] of int64.*float32"),
    ([changed(labels=torch.tensor([2], dtype=torch.uint8))], ValueError, r"of int64, got .* torch.uint8"),
    ([changed(labels=torch.ones(1, device="meta").long())], ValueError, "is on meta; allowed: cpu"),
    ([changed(labels=torch.tensor([3]))], ValueError, r"\['labels'\] has 3; allowed: 0 to 2"),
    ([changed(labels=torch.tensor([-1]))], ValueError, r"\['labels'\] has -1; allowed: 0 to 2"),
    ([changed(boxes=torch.tensor([[5.0, 5, 5, 9]]))], ValueError, r"\['boxes'\]\[0\] is \[5.0, 5.0, 5.0"),
    ([changed(boxes=torch.tensor([[5.0, 9, 8, 5]]))], ValueError, r"allowed: finite, x1 < x2, y1 < y2"),
    ([changed(boxes=torch.tensor([[5.0, 1, 8, float("inf")]]))], ValueError, r"allowed: finite"),
    ([changed(boxes=torch.tensor([[float("nan"), 1, 8, 9]]))], ValueError, r"allowed: finite"),
]
BAD_MASKS = [
    ([changed(masks=None)], ValueError, r"targets\[0\] has no 'masks'"),
    ([changed(masks=torch.ones(1, 64, 40))], ValueError, r"must be \[1, 40, 64\].*\[1, 64, 40\]"),
    ([changed(masks=torch.ones(2, 40, 64))], ValueError, r"\['masks'\] must be \[1, 40, 64\]"),
    ([changed(masks="rle")], TypeError, r"\['masks'\] must be a tensor, got str"),
]


@pytest.mark.parametrize(
    ("head", "given", "error", "words"),
    [
        (head, *case)
        for head in DETECTORS
        for case in BAD_TARGETS + (BAD_MASKS if head == "mask_rcnn" else [])
    ],
)
def test_bad_targets(head, given, error, words):
    with pytest.raises(error, match=words):
        tiny(head).train()([IMAGE], given)


def test_bad_input_of_a_segmenter():
    model = tiny("semantic_fpn")
    with pytest.raises(TypeError, match=r"x must be a tensor of a floating dtype, got torch.uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"x must be a tensor of a floating dtype, got list"):
        model([IMAGE])
    for x in (IMAGE, torch.zeros(1, 4, 32, 32)):
        with pytest.raises(ValueError, match=r"x must have shape \[B, 3, H, W\], got"):
            model(x)
    logits = torch.zeros(2, 3, 8, 9)
    for labels in (torch.zeros(2, 9, 8), torch.zeros(2, 1, 8, 9), torch.zeros(2, 8, 9, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"target must be \[2, 8, 9\] of int64 or uint8, got"):
            dense.segmentation_loss(logits, labels)


# ---- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", DETECTORS)
def test_batches_of_different_sizes(head):
    """An image's detections do not depend on images beside it that leave its padding as it is."""
    model = tiny(head, logit=-1.0, min_size=64, max_size=96).eval()
    x = images((64, 96), (61, 90))
    with torch.no_grad():
        both = model(x)
        alone = [model([image])[0] for image in x]
    for found, other, image in zip(both, alone, x, strict=True):
        assert len(found["scores"]) > 0
        for name in ("labels", "boxes", "scores"):
            torch.testing.assert_close(found[name], other[name], rtol=1e-3, atol=1e-3)
        height, width = image.shape[1:]
        assert bool((found["boxes"] >= 0).all())
        assert bool((found["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all())
        assert bool((found["boxes"][:, 2:] > found["boxes"][:, :2]).all())
        assert bool((found["scores"].diff() <= 0).all())
        assert set(found["labels"].tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("head", DETECTORS)
def test_the_padding_has_no_detections(head):
    """Beside a much larger image: every anchor scores well, those in the padding have no area."""
    model = tiny(head, logit=5.0).eval()
    model.transform.min_size, model.transform.max_size = (1000,), 128
    with torch.no_grad():
        found = model(images((128, 128), (16, 128)))
    for one in found:
        assert len(one["scores"]) > 10
        assert bool((one["boxes"][:, 2:] > one["boxes"][:, :2]).all())


@pytest.mark.long
@pytest.mark.parametrize("head", DETECTORS)
@pytest.mark.parametrize("size", [(800, 1333), (512, 683)])
def test_real_sizes(head, size):
    model = tiny(head, min_size=800, max_size=1333)
    x = images(size)
    large = target([[30.0, 20.0, 400.0, 500.0], [100, 100, 164, 164]], [0, 2], size)
    losses = model.train()(x, [large])
    sum(losses.values()).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    with torch.no_grad():
        found = model.eval()(x)[0]
    assert bool((found["boxes"] <= torch.tensor([size[1], size[0]] * 2) + 1e-2).all())
    if head == "mask_rcnn":
        assert found["masks"].shape[1:] == (1, *size)


@pytest.mark.parametrize("size", [(97, 61), (32, 32), (33, 200)])
def test_sizes_of_a_segmenter(size):
    model = tiny("semantic_fpn", classes=4).eval()
    x = torch.stack(images(size, size))
    logits = model(x)
    assert logits.shape == (2, 4, *size)
    assert torch.allclose(logits[1:], model(x[1:]), atol=1e-5)


@pytest.mark.parametrize("head", DETECTORS)
@pytest.mark.parametrize("sizes", [[(40, 64)], [(40, 64), (97, 61)]])
def test_images_without_objects(head, sizes):
    model = tiny(head).train()
    losses = model(images(*sizes), [target([], [], size) for size in sizes])
    sum(losses.values()).backward()
    zero = {"bbox_regression", "loss_box_reg", "loss_rpn_box_reg", "loss_mask"}
    for name, value in losses.items():
        assert (value == 0) if name in zero else (0 < value < 100), name
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# ---- backbones ---------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "head", ["retinanet", pytest.param("mask_rcnn", marks=pytest.mark.long), "semantic_fpn"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"token_mixers": "identity"},
        {"token_mixers": ("pooling", "convolution", "identity", "pooling"), "pool_size": 5},
        {"norm_layer": "layer", "act_layer": "relu"},
        {"layer_scale_init": None},
    ],
    ids=["identity", "mixed", "layer_norm", "no_layer_scale"],
)
def test_any_metaformer(head, options):
    options = {"layer_scale_init": 1e-5} | options
    config = MetaFormerConfig(
        "tiny", (1, 1, 1, 1), DIMS, drop_path_rate=0.0, params=None, crop_pct=1.0, **options
    )
    model = made(head, MetaFormer(config, features_only=True), 3)
    x, targets = sample()
    if head == "semantic_fpn":
        model(torch.stack(images((64, 64), (64, 64)))).sum().backward()
    else:
        sum(model(x, targets).values()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["poolformerv2_s12", "metaformer_id_s12"])
def test_named_backbones(head, name):
    with torch.device("meta"):
        model = made(head, name, 5)
    assert model.backbone.body.config.name == name
    assert model.backbone.body.features_only


# ---- copies, determinism, dtypes ---------------------------------------------------------------------------


def output(model: nn.Module, head: str) -> list[torch.Tensor]:
    if head == "semantic_fpn":
        return [model(torch.stack(images((64, 96), (64, 96))))]
    return [value for found in model(images((97, 61), (40, 64))) for value in found.values()]


@pytest.mark.parametrize("head", HEADS)
def test_copies_and_files(head):
    model = tiny(head).eval()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        for p in loaded.parameters():
            p.add_(1.0)
    assert not loaded.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys
    with torch.no_grad():
        expected = output(model, head)
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert not other.training
            assert_equal(output(other, head), expected)  # also the same model twice


@pytest.mark.parametrize("head", DETECTORS)
def test_seeds_decide_the_losses_and_nothing_given_is_changed(head):
    model = tiny(head)
    x, targets = sample()
    targets = [one | {"seed": i} for i, one in enumerate(targets)]
    before = copy.deepcopy((x, targets))
    losses = [model.train()(x, targets) for _ in range(2)]
    assert_equal(*losses)  # the seeds decide which samples are drawn
    if head == "mask_rcnn":
        others = model(x, [one | {"seed": 9} for one in targets])
        assert not torch.equal(others["loss_objectness"], losses[0]["loss_objectness"])
    with torch.no_grad():
        model.eval()(x, targets)
    assert_equal((x, targets), before)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("head", DETECTORS)
@pytest.mark.parametrize("masks", [torch.uint8, torch.bool, torch.float32])
def test_float64_and_masks_of_other_dtypes(head, masks):
    model = tiny(head, dtype=torch.float64)
    x, targets = sample()
    targets = [one | {"masks": one["masks"].to(masks), "seed": 0} for one in targets]  # boxes are float32
    losses = model.train()([image.double() for image in x], targets)
    single = tiny(head).train()(x, targets)
    for name, value in losses.items():
        assert value.dtype == torch.float64
        if head == "retinanet":  # where no rounding decides which samples are drawn
            assert torch.allclose(value.float(), single[name], rtol=1e-4), name
