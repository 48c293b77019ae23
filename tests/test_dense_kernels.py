"""The detectors and the segmenter on our kernels against the same modules in eager PyTorch."""

import copy
from functools import partial

import pytest
import torch
from support.chain import Calls
from support.dense import DETECTORS, HEADS, images, require_dense, sample, spread_scores, tiny
from support.peers import relative_error
from support.rule import assert_close_to_fp64, one_thread
from torch import Tensor, nn

import poolformer_kernels as pk

require_dense()

from poolformer_kernels import dense

BLOCKS = 4


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
        for counts in (forward, backward):
            assert sum(n for name, n in counts.items() if name.startswith(operator)) >= BLOCKS, counts
    with torch.no_grad(), Calls() as calls:
        model.eval().backbone(batch_and_size(model))
    assert any(name.endswith("_cpp") for name in calls.counts)
    with pk.use_backend("reference"), Calls() as calls:
        in_training(model.train())
    assert not any("cpp" in name for name in calls.counts)


# ---- values ------------------------------------------------------------------------------------------------


def assert_maps_right(module: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Under autocast to ``dtype``; returns how many maps there are."""
    with torch.no_grad():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            ours = module(x)
            with pk.use_backend("reference"), one_thread():
                eager = module(x)
        with pk.use_backend("reference"):
            exact = copy.deepcopy(module).double()(x.double())
    maps = zip(*(list(y.values()) if isinstance(y, dict) else y for y in (ours, eager, exact)), strict=True)
    for level, (y, other, right) in enumerate(maps):
        assert y.dtype == dtype
        assert_close_to_fp64(y, other, right, ulps=64, what=f"level {level}")
    return len(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_maps_are_as_exact_as_eagers(kernels, head, dtype):
    model = tiny(head)
    for mode in (True, False):
        model.train(mode)
        found = assert_maps_right(model.backbone, batch_and_size(model), dtype)
        assert found == (4 if head == "semantic_fpn" else 5)


@pytest.mark.parametrize(
    "size",
    [(97, 61), *(pytest.param(size, marks=pytest.mark.long) for size in ((512, 683), (800, 1333)))],
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
    assert_maps_right(body, x.contiguous(memory_format=torch.channels_last))


def gradients(model: nn.Module, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """And the loss, on a backend, under autocast to bfloat16 or in another dtype."""
    half = dtype == torch.bfloat16
    twin = copy.deepcopy(model).to(torch.float32 if half else dtype)
    with pk.use_backend(backend), one_thread():
        with torch.autocast("cpu", dtype, enabled=half):
            loss = in_training(twin, torch.float32 if half else dtype)
        loss.backward()
    return {name: p.grad for name, p in twin.named_parameters()} | {"loss": loss.detach()}


def without_dropout(head: str, seed: int = 0) -> nn.Module:
    return tiny(head, seed=seed, **({"dropout": 0.0} if head == "semantic_fpn" else {})).train()


def both_sides(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], ...]:
    """Loss and gradients on our kernels, in eager PyTorch, and in float64."""
    ours, eager = (gradients(model, backend, dtype) for backend in ("cpp", "reference"))
    exact = gradients(model, "reference", torch.float64)
    for name in [name for name in exact if name.endswith("norm1.bias")]:
        assert exact[name].abs().max() < 1e-12  # the pool of a constant less the constant
        zero = ours[name].abs().max()
        assert zero <= 1e-3 * exact[name.replace("bias", "weight")].abs().max() + 1e-6
        del exact[name]
    return ours, eager, exact


@pytest.mark.parametrize("head", ["retinanet", "semantic_fpn"])
def test_losses_and_gradients_are_as_exact_as_eagers(kernels, head):
    """Mask R-CNN's regions depend on the order of scores, which rounding may change: see below."""
    ours, eager, exact = both_sides(without_dropout(head), torch.float32)
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
        *sides, exact = both_sides(without_dropout(head, seed), torch.bfloat16)
        for name, g in exact.items():
            errors.setdefault(name, []).append([relative_error(side[name], g) for side in sides])
    floor = 8 * torch.finfo(torch.bfloat16).eps
    for name, pairs in errors.items():
        ours, eager = (torch.tensor(pairs).square().mean(0)).sqrt().tolist()
        assert ours <= 1.5 * eager + floor, name


def test_mask_rcnn_losses_and_gradients_equal_eagers(kernels):
    """In float32, where no order of scores changes."""
    ours, eager = (gradients(tiny("mask_rcnn").train(), backend) for backend in ("cpp", "reference"))
    torch.testing.assert_close(ours["loss"], eager["loss"], rtol=1e-4, atol=1e-8)
    for name, g in eager.items():
        if not name.endswith("norm1.bias"):
            assert (ours[name] - g).norm() <= 1e-3 * g.norm() + 1e-6, name


@pytest.mark.parametrize("head", DETECTORS)
def test_detections_equal_eagers(kernels, head):
    model, x = tiny(head).eval(), images((97, 61), (40, 90), seed=3)
    spread_scores(model)
    with torch.no_grad():
        ours = model(x)
        with pk.use_backend("reference"):
            eager = model(x)
    for one, other in zip(ours, eager, strict=True):
        assert len(one["scores"]) > 3
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    ("head", "how"),
    [
        *((head, how) for head in DETECTORS for how in ("autocast", torch.bfloat16)),
        # PyTorch's convolutions in float16 take a minute, those of mask_rcnn four
        pytest.param("retinanet", torch.float16, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_half_precision_leaves_boxes_and_losses_in_float32(head, how):
    """Images may stay in float32 where the weights are of half precision."""
    dtype = torch.bfloat16 if how == "autocast" else how
    model = tiny(head, dtype=torch.float32 if how == "autocast" else dtype, logit=2.0)
    x, targets = sample()
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=how == "autocast")
    with autocast():
        losses = model.train()(x, [one | {"seed": 0} for one in targets])
        sum(losses.values()).backward()
    with torch.no_grad(), autocast():
        found = model.eval()(x)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for one in found:
        assert one["boxes"].dtype == one["scores"].dtype == torch.float32
        assert not torch.equal(one["boxes"], one["boxes"].to(dtype).float())
        assert len(one["scores"]) > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_a_segmenter_of_half_precision_scales_up_in_float32(dtype):
    (image,) = images((97, 61), seed=3)
    wide, found = (
        dense.segment(tiny("semantic_fpn", dtype=d).eval(), image, 64, 128) for d in (torch.float32, dtype)
    )
    assert found.dtype == torch.float32
    assert relative_error(found, wide) < 8 * torch.finfo(dtype).eps
