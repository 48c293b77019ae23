"""Recipes of the dense tasks: the paper's, learning rates by hand, YAML, one clear line for bad fields."""

import pytest
import torch
from support.dense_data import require_dense_data

require_dense_data()

from poolformer_kernels.dense import list_detectors, list_segmenters
from poolformer_kernels.models import list_models
from poolformer_kernels.train.dense_recipe import DetectionRecipe, InstanceRecipe, SegmentationRecipe
from poolformer_kernels.train.loop import _optimizer
from poolformer_kernels.train.recipe import RecipeError, read_yaml, resolve, write_yaml

KINDS = (DetectionRecipe, InstanceRecipe, SegmentationRecipe)
COCO = (DetectionRecipe, InstanceRecipe)


def paper(kind, **changes):
    return resolve("paper", changes, kind=kind)


# ---- the paper's values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rate"), [(DetectionRecipe, 1e-4), (InstanceRecipe, 2e-4)])
def test_the_papers_recipe_on_coco(kind, rate) -> None:
    """MetaFormer, section 4.2; the official detection/configs."""
    r = paper(kind)
    assert (r.optimizer, r.weight_decay, r.decays_all, r.batch_size) == ("adamw", 1e-4, True, 16)
    assert r.lr == pytest.approx(rate, rel=1e-12)
    assert (r.epochs, r.decay_epochs, r.decay, r.warmup_steps, r.warmup_start) == (
        12,
        (8, 11),
        0.1,
        500,
        1e-3,
    )
    assert (r.min_size, r.sizes, r.max_size, r.hflip, r.crop) == ((800, 800), (800,), 1333, 0.5, None)
    assert (r.drop_path, r.clip_grad, r.ema, r.precision, r.accumulate) == (0.0, None, None, "float32", 1)
    assert (r.steps(7330), r.validates_every(7330)) == (12 * 7330, 7330)


def test_the_papers_recipe_on_ade20k() -> None:
    """MetaFormer, section 4.3; the official segmentation/configs."""
    r = paper(SegmentationRecipe)
    assert (r.optimizer, r.weight_decay, r.decays_all, r.batch_size) == ("adamw", 1e-4, True, 32)
    assert r.lr == pytest.approx(2e-4, rel=1e-12)
    assert (r.iterations, r.power, r.min_lr, r.dropout) == (40_000, 0.9, 0.0, 0.1)
    assert (r.scale, r.ratio, r.crop, r.cat_max_ratio) == ((2048, 512), (0.5, 2.0), 512, 0.75)
    assert (r.hflip, r.zero_label, r.validate_every) == (0.5, "ignore", 4000)
    assert (r.drop_path, r.clip_grad, r.ema, r.precision, r.accumulate) == (0.0, None, None, "float32", 1)
    assert (r.steps(631), r.validates_every(631)) == (40_000, 4000)


def test_the_rate_warms_up_linearly_and_falls_after_epochs_8_and_11() -> None:
    """1000 steps an epoch. mmcv: at step i of 500, the share 1 - (1 - i / 500) * (1 - 0.001)."""
    r = paper(DetectionRecipe)
    by_hand = {0: 1e-7, 1: 2.998e-7, 250: 5.005e-5, 499: 9.98002e-5, 500: 1e-4, 7999: 1e-4}
    by_hand |= {8000: 1e-5, 10_999: 1e-5, 11_000: 1e-6, 11_999: 1e-6}
    for step, rate in by_hand.items():
        assert r.rate(step, 1000) == pytest.approx(rate, rel=1e-9), step
    assert paper(InstanceRecipe).rate(8000, 1000) == pytest.approx(2e-5, rel=1e-9)
    short = paper(DetectionRecipe, epochs=12)
    assert short.rate(40, 5) == pytest.approx(1e-5 * (1 - (1 - 40 / 500) * 0.999), rel=1e-9)  # both at once
    assert paper(DetectionRecipe, warmup_steps=0).rate(0, 10) == pytest.approx(1e-4, rel=1e-9)


def test_the_rate_falls_as_a_polynomial_to_zero() -> None:
    r = paper(SegmentationRecipe)
    by_hand = {0: 2e-4, 10_000: 2e-4 * 0.75**0.9, 20_000: 2e-4 * 0.5**0.9, 39_999: 2e-4 * 2.5e-5**0.9}
    for step, rate in by_hand.items():
        assert r.rate(step, 631) == pytest.approx(rate, rel=1e-9), step
    assert r.rate(20_000, 631) == pytest.approx(1.0717735e-4, rel=1e-6)
    assert r.rate(40_000, 631) == 0.0
    assert paper(SegmentationRecipe, min_lr=1e-5).rate(40_000, 631) == pytest.approx(1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_follows_the_batch_unless_it_is_given(kind) -> None:
    whole = paper(kind)
    assert paper(kind, batch_size=2 * whole.batch_size).lr == pytest.approx(2 * whole.lr, rel=1e-12)
    assert paper(kind, batch_size=4).lr == pytest.approx(4 / whole.batch_size * whole.lr, rel=1e-12)
    assert paper(kind, batch_size=4, lr=0.1).lr == 0.1
    stored = whole.as_dict()
    assert resolve("paper", stored, {"batch_size": 4}, kind=kind).lr == paper(kind, batch_size=4).lr


@pytest.mark.parametrize("kind", COCO)
def test_the_decay_epochs_follow_the_epochs_unless_they_are_given(kind) -> None:
    assert paper(kind, epochs=36).decay_epochs == (24, 33)
    assert paper(kind, epochs=6).decay_epochs == (4, 5.5)
    half = paper(kind, epochs=6, warmup_steps=0)
    assert half.rate(55, 10) == pytest.approx(0.1 * half.rate(54, 10), rel=1e-9)  # in the middle of an epoch
    assert paper(kind, epochs=36, decay_epochs=[27, 33]).decay_epochs == (27, 33)
    stored = paper(kind, epochs=36).as_dict()
    assert resolve("paper", stored, {"seed": 1}, kind=kind).decay_epochs == (24, 33)


@pytest.mark.parametrize("kind", COCO)
def test_the_small_recipe_falls_late_in_its_schedule(kind) -> None:
    """Two thirds and eleven twelfths, as the paper's."""
    small = resolve("small", kind=kind)
    assert [round(epoch / small.epochs, 2) for epoch in small.decay_epochs] == [0.67, 0.92]
    assert small.rate(small.warmup_steps, 1) == small.rate(int(small.decay_epochs[0]) - 1, 1) == small.lr
    longer = resolve("small", {"epochs": 300}, kind=kind)
    assert [round(epoch / 300, 2) for epoch in longer.decay_epochs] == [0.67, 0.92]


@pytest.mark.parametrize("decays_all", [True, False])
def test_all_parameters_decay(decays_all, monkeypatch) -> None:
    monkeypatch.setattr(DetectionRecipe, "decays_all", decays_all)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.GroupNorm(1, 4))
    groups = _optimizer(model, paper(DetectionRecipe)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == 4
    for p in model.parameters():
        assert decay[id(p)] == (1e-4 if decays_all or p.dim() > 1 else 0.0)


# ---- YAML and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "small"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_written_recipe_is_read_back(kind, preset, tmp_path) -> None:
    recipe = resolve(preset, {"seed": 3, "lr": 1e-30}, kind=kind)
    write_yaml(tmp_path / "config.yaml", recipe.as_dict())
    assert kind(**read_yaml(tmp_path / "config.yaml")) == recipe
    assert resolve("paper", read_yaml(tmp_path / "config.yaml"), kind=kind) == recipe


def test_every_head_has_a_task_and_every_backbone_a_recipe() -> None:
    assert {kind.head for kind in KINDS} == {*list_detectors(), *list_segmenters()}
    for name in list_models():
        assert paper(DetectionRecipe, model=f"retinanet_{name}").model == f"retinanet_{name}"


BAD = [
    (COCO, {"model": "semantic_fpn_poolformer_s12"}, "model is 'semantic_fpn_poolformer_s12'; allowed for"),
    (COCO, {"model": "poolformer_s12"}, "model is 'poolformer_s12'; allowed for this task: "),
    (KINDS, {"mixup": 0.8}, "'mixup' is not a field of a recipe"),
    (KINDS, {"eager": True}, "'eager' is not a field of a recipe"),
    (KINDS, {"batch_size": 0}, "batch_size is 0; allowed: at least 1"),
    (KINDS, {"weight_decay": -1}, "weight_decay is -1; allowed: at least 0"),
    (KINDS, {"drop_path": 1}, "drop_path is 1; allowed: at least 0 and below 1"),
    (KINDS, {"validate_every": 0}, "validate_every is 0; allowed: at least 1"),
    (KINDS, {"hflip": 1.5}, "hflip is 1.5; allowed: at least 0 and at most 1"),
    (KINDS, {"precision": "float64"}, "precision is 'float64'; allowed: float32, bfloat16, float16"),
    (COCO, {"epochs": 0}, "epochs is 0; allowed: at least 1"),
    (COCO, {"iterations": 5}, "'iterations' is not a field of a recipe"),
    (COCO, {"decay_epochs": [11, 8]}, "decay_epochs is 11, 8; allowed: at least 0, the smaller first"),
    (COCO, {"decay_epochs": [8, float("inf")]}, "decay_epochs is [8, inf]; allowed: two finite numbers"),
    (COCO, {"decay_epochs": 8}, "decay_epochs is 8; allowed: two numbers"),
    (COCO, {"decay": -0.1}, "decay is -0.1; allowed: at least 0"),
    (COCO, {"warmup_steps": -1}, "warmup_steps is -1; allowed: at least 0"),
    (COCO, {"warmup_start": -1}, "warmup_start is -1; allowed: at least 0"),
    (COCO, {"min_size": [16, 800]}, "min_size is 16, 800; allowed: at least 32, the smaller first"),
    (COCO, {"min_size": [640, float("nan")]}, "min_size is [640, nan]; allowed: two finite numbers"),
    (COCO, {"max_size": 799}, "max_size is 799; allowed: at least 800"),
    (COCO, {"crop": 0}, "crop is 0; allowed: at least 1"),
    (KINDS[2:], {"model": "retinanet_poolformer_s12"}, "model is 'retinanet_poolformer_s12'; allowed for"),
    (KINDS[2:], {"epochs": 12}, "'epochs' is not a field of a recipe"),
    (KINDS[2:], {"iterations": 0}, "iterations is 0; allowed: at least 1"),
    (KINDS[2:], {"power": -0.9}, "power is -0.9; allowed: at least 0"),
    (KINDS[2:], {"min_lr": -1}, "min_lr is -1; allowed: at least 0"),
    (KINDS[2:], {"dropout": 1}, "dropout is 1; allowed: at least 0 and below 1"),
    (KINDS[2:], {"zero_label": "drop"}, "zero_label is 'drop'; allowed: ignore, class"),
    (KINDS[2:], {"scale": [512, 2048]}, "scale is 512, 2048; allowed: the longer first, both at least 32"),
    (KINDS[2:], {"scale": [float("inf"), 512]}, "scale is [inf, 512]; allowed: two finite numbers"),
    (KINDS[2:], {"ratio": [0.0, 2.0]}, "ratio is 0, 2; allowed: at least 0.001, the smaller first"),
    (KINDS[2:], {"ratio": [0.5, float("inf")]}, "ratio is [0.5, inf]; allowed: two finite numbers"),
    (KINDS[2:], {"crop": 32}, "crop is 32; allowed: at least 64"),
    (KINDS[2:], {"cat_max_ratio": 0}, "cat_max_ratio is 0; allowed: at least 0.001 and at most 1"),
]


@pytest.mark.parametrize(("kinds", "change", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_one_clear_line(kinds, change, message) -> None:
    for kind in kinds:
        with pytest.raises(RecipeError) as error:
            paper(kind, **change)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


def test_an_unknown_backbone_is_named_with_those_there_are() -> None:
    with pytest.raises(RecipeError) as error:
        paper(InstanceRecipe, model="mask_rcnn_poolformer_s99")
    text = str(error.value)
    assert text.startswith(
        "model is 'mask_rcnn_poolformer_s99'; allowed: mask_rcnn_ and one of poolformer_s12"
    )
    assert "timm:" not in text
