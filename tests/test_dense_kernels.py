"""The detectors and the segmenter on our kernels against the same modules in eager PyTorch."""

import copy
from collections import Counter

import pytest
import torch
from support.dense import images, require_dense, sample, tiny
from support.rule import assert_close_to_fp64, one_thread
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import poolformer_kernels as pk

require_dense()

from poolformer_kernels import dense
from poolformer_kernels.dense.retinanet import RetinaNet

HEADS = ("retinanet", "mask_rcnn", "semantic_fpn")
BLOCKS = 4


class Calls(TorchDispatchMode):
    """Counts calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "poolformer_kernels":
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))


def in_training(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum of a model's losses on the three images, with the samples that their seeds decide."""
    x, targets = sample()
    targets = [one | {"seed": i} for i, one in enumerate(targets)]
    if isinstance(model, dense.SemanticFPN):
        x = torch.stack(images((97, 61), (97, 61)))
        labels = torch.randint(0, 4, (2, 97, 61), generator=torch.Generator().manual_seed(0))
        return dense.segmentation_loss(model(x.to(dtype)), labels.where(labels < 3, 255))
    return sum(model([image.to(dtype) for image in x], targets).values())


def batch_and_size(model: nn.Module) -> Tensor:
    """Padded images, as the backbone sees them."""
    if isinstance(model, dense.SemanticFPN):
        return torch.stack(images((97, 61), (97, 61)))
    return model.transform(sample()[0])[0].tensors


# ---- which kernels run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_the_backbone_runs_on_kernels(kernels, head):
    calls = pk.explain(tiny(head)).calls
    assert len(calls) == 2 * BLOCKS
    for call in calls:
        assert call.path.startswith("backbone.body.network")
        assert call.operator in ("pool_mixer", "mlp")
        assert call.backend == "cpp", call


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_operators_are_called_in_training_and_evaluation(kernels, head, autocast):
    model = tiny(head)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Calls() as calls:
            loss = in_training(model.train())
        forward = dict(calls.counts)
        with Calls() as calls:
            loss.backward()
    backward = {name: n for name, n in calls.counts.items() if "backward" in name}
    for operator in ("pool_mixer", "mlp"):
        assert sum(n for name, n in forward.items() if name.startswith(operator)) >= BLOCKS, forward
        assert sum(n for name, n in backward.items() if name.startswith(operator)) >= BLOCKS, backward
    with torch.no_grad(), Calls() as calls:
        model.eval().backbone(batch_and_size(model))
    assert sum(calls.counts.values()) > 0
    with pk.use_backend("reference"), Calls() as calls:
        in_training(model.train())
    assert not any("cpp" in name for name in calls.counts)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_maps_are_as_exact_as_eagers(kernels, head, dtype):
    model = tiny(head).train()
    x = batch_and_size(model)
    with torch.no_grad():
        with pk.use_backend("reference"):
            exact = list(copy.deepcopy(model.backbone).double()(x.double()).values())
        for mode in (True, False):
            model.train(mode)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                ours = list(model.backbone(x).values())
                with pk.use_backend("reference"), one_thread():
                    eager = list(model.backbone(x).values())
            assert len(ours) == {"retinanet": 5, "mask_rcnn": 5, "semantic_fpn": 4}[head]
            for level, (y, other, right) in enumerate(zip(ours, eager, exact, strict=True)):
                assert y.dtype == dtype
                assert_close_to_fp64(y, other, right, ulps=64, what=f"level {level}")


@pytest.mark.parametrize(
    "size",
    [
        (97, 61),
        pytest.param((512, 683), marks=pytest.mark.long),
        pytest.param((800, 1333), marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_maps_of_odd_sizes_are_as_exact_as_eagers(kernels, size, padded):
    """Alone and unpadded, and padded beside a larger image, whose zeros GroupNorm sees."""
    x = images(size)[0][None]
    if padded:
        height, width = (-(-side // 32) * 32 + 32 for side in size)
        x = nn.functional.pad(x, (0, width - size[1], 0, height - size[0]))
        x = torch.cat([x, torch.stack(images((height, width), seed=1))])
    body = tiny("semantic_fpn").eval().backbone.body
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        ours = body(x)
        with pk.use_backend("reference"), one_thread():
            eager, exact = body(x), copy.deepcopy(body).double()(x.double())
    for level, (y, other, right) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_close_to_fp64(y, other, right, ulps=64, what=f"map {level}")


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def both_sides(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], ...]:
    """Loss and gradients on our kernels, in eager PyTorch, and in float64."""
    sides = []
    for backend in ("cpp", "reference"):
        with pk.use_backend(backend), one_thread():
            twin = copy.deepcopy(model)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = in_training(twin)
            sides.append(gradients(twin, loss) | {"loss": loss.detach()})
    with pk.use_backend("reference"):
        double = copy.deepcopy(model).double()
        loss = in_training(double, torch.float64)
        exact = gradients(double, loss) | {"loss": loss.detach()}
    for name in [name for name in exact if name.endswith("norm1.bias")]:
        assert exact[name].abs().max() < 1e-12  # the pool of a constant less the constant
        zero = sides[0][name].abs().max()
        assert zero <= 1e-3 * exact[name.replace("bias", "weight")].abs().max() + 1e-6
        del exact[name]
    return *sides, exact


@pytest.mark.parametrize("head", ["retinanet", "semantic_fpn"])
def test_losses_and_gradients_are_as_exact_as_eagers(kernels, head):
    """Mask R-CNN's regions depend on the order of scores, which rounding may change: see below."""
    model = tiny(head, **({"dropout": 0.0} if head == "semantic_fpn" else {})).train()
    ours, eager, exact = both_sides(model, torch.float32)
    for name, g in exact.items():
        scale = g.abs().max() * torch.ones_like(g)  # sums over pixels that cancel
        assert_close_to_fp64(ours[name], eager[name], g, scale=scale, ulps=64, what=name)


@pytest.mark.parametrize("head", ["retinanet", "semantic_fpn"])
def test_losses_and_gradients_under_autocast(kernels, head):
    """Eager widens the residual stream to float32 at the first LayerScale, ours stays in bfloat16.

    It is rounded after each of the eight additions, forth and back, by half an ulp: by eight ulps at most.
    The errors are root mean squares over four models: a gradient of sixteen numbers that cancel is one draw,
    and either side may be lucky.
    """
    errors: dict[str, list[list[float]]] = {}
    for seed in range(4):
        model = tiny(head, seed=seed, **({"dropout": 0.0} if head == "semantic_fpn" else {})).train()
        *sides, exact = both_sides(model, torch.bfloat16)
        for name, g in exact.items():
            pair = [((side[name].double() - g).norm() / g.norm()).item() for side in sides]
            errors.setdefault(name, []).append(pair)
    floor = 8 * torch.finfo(torch.bfloat16).eps
    for name, pairs in errors.items():
        ours, eager = (torch.tensor(pairs).square().mean(0)).sqrt().tolist()
        assert ours <= 1.5 * eager + floor, name


def test_mask_rcnn_losses_and_gradients_equal_eagers(kernels):
    """In float32, where no order of scores changes."""
    model = tiny("mask_rcnn").train()
    ours = gradients(model, in_training(model))
    loss = in_training(model).detach()
    with pk.use_backend("reference"):
        eager = gradients(model, in_training(model))
        assert torch.allclose(loss, in_training(model).detach(), rtol=1e-4)
    for name, g in eager.items():
        if not name.endswith("norm1.bias"):
            assert (ours[name] - g).norm() <= 1e-3 * g.norm() + 1e-6, name


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_detections_equal_eagers(kernels, head):
    model = tiny(head).eval()
    with torch.no_grad():
        if isinstance(model, RetinaNet):
            model.head.classification_head.cls_logits.weight.mul_(20)
            model.head.classification_head.cls_logits.bias.add_(3)
        else:
            model.roi_heads.box_predictor.cls_score.weight.mul_(100)
        x = images((97, 61), (40, 90), seed=3)
        ours = model(x)
        with pk.use_backend("reference"):
            eager = model(x)
    for one, other in zip(ours, eager, strict=True):
        assert len(one["scores"]) > 3
        assert torch.equal(one["labels"], other["labels"])
        assert torch.allclose(one["scores"], other["scores"], atol=1e-4)
        assert torch.allclose(one["boxes"], other["boxes"], atol=1e-2)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_weights_in_half_precision(head, dtype):
    """Images may stay in float32; boxes, scores and losses are float32."""
    model = tiny(head).to(dtype).eval()
    x, targets = sample()
    if head == "semantic_fpn":
        wide = dense.segment(tiny(head).eval(), x[0], 64, 128)
        found = dense.segment(model, x[0], 64, 128)
        assert found.dtype == torch.float32
        assert (found - wide).norm() < 8 * torch.finfo(dtype).eps * wide.norm()
        return
    losses = model.train()(x, [one | {"seed": 0} for one in targets])
    sum(losses.values()).backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        if head == "retinanet":
            model.head.classification_head.cls_logits.bias.fill_(2.0)
        found = model.eval()(x)
    for one in found:
        assert one["boxes"].dtype == one["scores"].dtype == torch.float32
        assert len(one["scores"]) > 10
        assert not torch.equal(one["boxes"], one["boxes"].to(dtype).float())


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_targets_on_another_device(head):
    x, targets = sample()
    targets[1]["labels"] = targets[1]["labels"].to("meta")
    with pytest.raises(ValueError, match=r"targets\[1\]\['labels'\] is on meta; allowed: cpu"):
        tiny(head).train()(x, targets)
