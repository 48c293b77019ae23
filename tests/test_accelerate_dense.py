"""`accelerate` on others' detectors and segmenters: torchvision's heads and segmentation_models_pytorch's."""

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.accelerate import DEPTHS, blocks_of, joined, make_model
from support.chain import Calls
from support.peers import assert_as_accurate, randomise, require
from torch import Tensor, nn

from poolformer_kernels import explain
from poolformer_kernels.accelerate import accelerate, restore

Call = Callable[[nn.Module], dict[str, Tensor]]
BODIES = {"tiny": DEPTHS, "poolformer_s12": (2, 2, 6, 2)}  # and their depths
EVERY = 100_000  # more than there are anchors and proposals: none is left out, and none drawn at random


def timm_features(name: str) -> nn.Module:
    """timm's PoolFormer as a backbone; ``"tiny"`` is a small one."""
    timm = require("timm", "models.metaformer")
    if name != "tiny":
        return timm.create_model(name, features_only=True)
    return timm.models.FeatureListNet(make_model("timm"), out_indices=(0, 1, 2, 3), flatten_sequential=True)


def with_large_branches(model: nn.Module) -> nn.Module:
    """Random weights under which a wrong block shows in every result."""
    randomise(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".mlp.fc" in name and p.dim() == 4:
                p.normal_(std=2 / p.shape[1] ** 0.5)
    return model


def without_kinks(model: nn.Module) -> nn.Module:
    """GELU for ReLU: of the many values beside zero, one that rounding moves across it changes a gradient."""
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if type(child) is nn.ReLU:
                setattr(module, name, nn.GELU())
    return model


class Backbone(nn.Module):
    """What one writes to give torchvision's detectors another body."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        ops = require("torchvision", "ops").ops
        self.body, self.out_channels = body, 8
        self.fpn = ops.FeaturePyramidNetwork(body.feature_info.channels(), self.out_channels)

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))


def make_detector(kind: str, body: str) -> nn.Module:
    detection = require("torchvision", "models.detection").models.detection
    torch.manual_seed(0)
    anchors = detection.anchor_utils.AnchorGenerator(((8,), (16,), (32,), (48,)), ((0.5, 1.0, 2.0),) * 4)
    backbone = Backbone(with_large_branches(timm_features(body)))
    options = {"min_size": 64, "max_size": 64, "num_classes": 3}
    if kind == "RetinaNet":
        options |= {"anchor_generator": anchors, "score_thresh": 0.0, "detections_per_img": 8}
        model = detection.RetinaNet(backbone, **options)
        with torch.no_grad():
            for p in model.head.parameters():
                if p.dim() == 4:  # at the initial 0.01 no score would depend on the image
                    p.normal_(std=p[0].numel() ** -0.5)
        return without_kinks(model)
    head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 7 * 7, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU())
    options |= {"num_classes": None, "box_head": head}
    model = detection.FasterRCNN(
        backbone,
        **options,
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, 3),
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=EVERY,
        rpn_post_nms_top_n_train=EVERY,
        rpn_nms_thresh=1.0,
        rpn_batch_size_per_image=EVERY,
        box_batch_size_per_image=EVERY,
        box_score_thresh=0.0,
        box_detections_per_img=8,
    )
    return without_kinks(model)


def pictures(model: nn.Module) -> list[Tensor]:
    generator, dtype = torch.Generator().manual_seed(1), next(model.parameters()).dtype
    return [torch.rand(3, *size, generator=generator).to(dtype) for size in ((64, 64), (48, 64))]


def targets(images: list[Tensor]) -> list[dict[str, Tensor]]:
    boxes = [[[4.0, 6.0, 36.0, 30.0], [20.0, 30.0, 60.0, 62.0]], [[10.0, 5.0, 22.0, 21.0]]]
    return [
        {"boxes": torch.tensor(b).to(image), "labels": torch.tensor(labels)}
        for image, b, labels in zip(images, boxes, [[1, 2], [1]], strict=True)
    ]


def losses_and_gradients(losses: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(sum(losses.values()), parameters)
    return {name: loss.detach() for name, loss in losses.items()} | dict(zip(names, found, strict=True))


def detector_step(model: nn.Module) -> dict[str, Tensor]:
    images = pictures(model)
    return losses_and_gradients(model.train()(images, targets(images)), model)


def detections(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        found = model.eval()(pictures(model))
    return {name: torch.cat([result[name] for result in found]) for name in ("boxes", "scores", "labels")}


def segmenter_step(model: nn.Module) -> dict[str, Tensor]:
    x = torch.stack(pictures(model)[:1] * 2)
    target = torch.arange(64 * 64).view(1, 64, 64).expand(2, -1, -1) // 32 % 5
    return losses_and_gradients({"loss": F.cross_entropy(model.train()(x), target)}, model)


def segmentation(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model.eval()(torch.stack(pictures(model)[:1]))}


def assert_within_rounding(plain: nn.Module, accelerated: nn.Module, call: Call) -> None:
    """No further from the modules' results in float64 than 1.5 times theirs in float32, by the L2 norm."""
    models = accelerated, plain, copy.deepcopy(plain).double()
    ours, eager, right = (joined(call(model)) for model in models)
    assert ours.keys() == eager.keys() == right.keys()
    for name, exact in right.items():
        assert_as_accurate(ours[name], eager[name], exact, what=name)


def assert_accelerated_and_restored(plain: nn.Module, depths: tuple[int, ...], *calls: Call) -> None:
    before = explain(plain)
    assert len(before.calls) == 2 * sum(depths)
    assert {call.reason for call in before.calls} == {"not accelerated: see poolformer_kernels.accelerate"}
    model = accelerate(copy.deepcopy(plain))
    after = [(call.operator, call.backend) for call in explain(model).calls]
    assert after == [("pool_mixer", "cpp"), ("mlp", "cpp")] * sum(depths)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for call in calls:
        with Calls() as counted:
            call(copy.deepcopy(model))  # a step changes BatchNorm's averages
        assert any(name.endswith("_cpp") for name in counted.counts), "no kernel of ours was called"
        assert_within_rounding(*map(copy.deepcopy, (plain, model)), call)
    restore(model)
    assert explain(model) == before
    assert list(map(type, blocks_of(model))) == list(map(type, blocks_of(plain)))
    for call in calls:
        given, expected = (call(copy.deepcopy(each)) for each in (model, plain))
        assert all(torch.equal(value, expected[name]) for name, value in given.items())


@pytest.mark.parametrize(
    ("kind", "body"), [("RetinaNet", "tiny"), ("RetinaNet", "poolformer_s12"), ("FasterRCNN", "tiny")]
)
def test_torchvisions_detectors_around_timms_poolformer(kind, body, kernels) -> None:
    plain = make_detector(kind, body)
    assert_accelerated_and_restored(plain, BODIES[body], detector_step, detections)


@pytest.mark.parametrize("kind", ["Unet", "FPN"])
def test_segmentation_models_pytorch(kind, kernels) -> None:
    smp = require("segmentation_models_pytorch")
    torch.manual_seed(0)
    plain = without_kinks(getattr(smp, kind)("tu-poolformer_s12", encoder_weights=None, classes=5))
    with_large_branches(plain.encoder)
    for module in plain.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0  # else a training step would draw channels to leave out
    calls = (segmenter_step, segmentation)
    assert_accelerated_and_restored(plain, BODIES["poolformer_s12"], *calls)
