"""Recipes: the papers', rates by hand, what follows batch and epochs, YAML, one line for every bad field."""

import pytest
import yaml
from support.train import message_of, require_train

require_train()

from poolformer_kernels.dense import list_detectors, list_segmenters
from poolformer_kernels.models import PoolFormer, list_models
from poolformer_kernels.train.dense_recipe import DetectionRecipe, InstanceRecipe, SegmentationRecipe
from poolformer_kernels.train.loop import _optimizer
from poolformer_kernels.train.networks import DIGITS, complete
from poolformer_kernels.train.recipe import Recipe, RecipeError, read_yaml, resolve, write_yaml

IMAGENET = (Recipe,)
COCO = (DetectionRecipe, InstanceRecipe)
ADE20K = (SegmentationRecipe,)
DENSE = (*COCO, *ADE20K)


def paper(kind=Recipe, **changes):
    return resolve("paper", changes, kind=kind)


# ---- the papers' values ------------------------------------------------------------------------------------


def test_the_papers_recipe_on_imagenet() -> None:
    """MetaFormer, section 4.1, and the defaults of the official train.py."""
    r = paper(batch_size=4096)
    assert (r.optimizer, r.weight_decay, r.lr) == ("adamw", 0.05, 4e-3)
    assert (r.epochs, r.warmup_epochs, r.cooldown_epochs, r.total_epochs) == (300, 5, 10, 310)
    assert (r.warmup_lr, r.min_lr, r.schedule, r.schedule_on) == (1e-6, 1e-5, "cosine", "epoch")
    assert (r.auto_augment, r.color_jitter, r.hflip) == ("rand-m9-mstd0.5-inc1", 0.4, 0.5)
    assert (r.mixup, r.cutmix, r.mixup_prob, r.mixup_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (r.label_smoothing, r.random_erasing, r.random_erasing_mode) == (0.1, 0.25, "pixel")
    assert (r.ema, r.clip_grad) == (None, None)
    rates = [complete(paper(model=name)).drop_path for name in list_models("poolformer_*")]
    assert rates == [0.1, 0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(("kind", "rate"), [(DetectionRecipe, 1e-4), (InstanceRecipe, 2e-4)])
def test_the_papers_recipe_on_coco(kind, rate) -> None:
    """MetaFormer, section 4.2; the official detection/configs."""
    r = paper(kind)
    assert (r.optimizer, r.weight_decay, r.decays_all, r.batch_size) == ("adamw", 1e-4, True, 16)
    assert r.lr == pytest.approx(rate, rel=1e-12)
    assert (r.epochs, r.decay_epochs, r.decay) == (12, (8, 11), 0.1)
    assert (r.warmup_steps, r.warmup_start) == (500, 1e-3)
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


@pytest.mark.parametrize(("kind", "of_one_dimension"), [(Recipe, 0.0), *((kind, 1e-4) for kind in DENSE)])
def test_one_dimensional_parameters_decay_in_dense_tasks_only(kind, of_one_dimension) -> None:
    model, recipe = PoolFormer(DIGITS, num_classes=10), paper(kind)
    groups = _optimizer(model, recipe).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert {p.dim() for p in model.parameters()} == {1, 2, 4}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (of_one_dimension if p.dim() == 1 else recipe.weight_decay), name


# ---- what follows the batch and the epochs -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [Recipe, *DENSE])
def test_the_rate_follows_the_batch_unless_it_is_given(kind) -> None:
    whole = paper(kind)
    assert paper(kind, batch_size=2 * whole.batch_size).lr == pytest.approx(2 * whole.lr, rel=1e-12)
    assert paper(kind, batch_size=4).lr == pytest.approx(4 / whole.batch_size * whole.lr, rel=1e-12)
    assert paper(kind, batch_size=4, lr=0.1).lr == 0.1
    stored = whole.as_dict()
    assert resolve("paper", stored, {"batch_size": 4}, kind=kind).lr == paper(kind, batch_size=4).lr
    assert resolve("paper", stored, {"batch_size": 4, "lr": 0.2}, kind=kind).lr == 0.2


@pytest.mark.parametrize(
    ("given", "warmup", "cooldown"),
    [
        ({"epochs": 1}, 0, 0),
        ({"epochs": 10}, 1, 1),
        ({"epochs": 60}, 1, 2),
        ({"epochs": 60, "warmup_epochs": 7}, 7, 2),
        ({"epochs": 600}, 5, 10),
    ],
    ids=str,
)
def test_warm_up_and_cooldown_shrink_with_the_epochs_unless_they_are_given(given, warmup, cooldown) -> None:
    r = paper(**given)
    assert (r.warmup_epochs, r.cooldown_epochs) == (warmup, cooldown)
    assert r.total_epochs == r.epochs + cooldown


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


# ---- YAML --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "preset"), [(kind, preset) for kind in (Recipe, *DENSE) for preset in kind.presets()]
)
def test_a_written_recipe_is_read_back(kind, preset, tmp_path) -> None:
    more = {"ratio": [0.7, 1.3]} if kind is Recipe else {}
    recipe = resolve(preset, {"seed": 3, "lr": 1e-30, **more}, kind=kind)
    recipe = complete(recipe) if kind is Recipe else recipe
    write_yaml(tmp_path / "config.yaml", recipe.as_dict())
    assert kind(**read_yaml(tmp_path / "config.yaml")) == recipe
    assert resolve("paper", read_yaml(tmp_path / "config.yaml"), kind=kind) == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_yaml_numbers_without_a_point_are_numbers() -> None:
    """YAML 1.1 reads 1e-3 as a text."""
    assert resolve("paper", yaml.safe_load("lr: 1e-3")).lr == 1e-3


def test_later_changes_count() -> None:
    assert resolve("small", {"epochs": 9, "seed": 1}, {"epochs": 8}).epochs == 8


def test_heads_that_nobody_chose() -> None:
    heads = {"poolformer_s12": "official", "poolformerv2_s12": "timm", "timm:poolformer_s12": "timm"}
    for model, head in heads.items():
        assert complete(paper(model=model)).head == head
    assert complete(paper(eager=True)).head == "timm"


def test_every_head_has_a_task_and_every_backbone_a_recipe() -> None:
    assert {kind.head for kind in DENSE} == {*list_detectors(), *list_segmenters()}
    for name in list_models():
        assert paper(DetectionRecipe, model=f"retinanet_{name}").model == f"retinanet_{name}"


# ---- errors ------------------------------------------------------------------------------------------------

BAD = [
    (IMAGENET, {"epoch": 1}, "'epoch' is not a field of a recipe (did you mean epochs?)"),
    (IMAGENET, {"epochs": 1.5}, "epochs is 1.5; allowed: an integer"),
    (IMAGENET, {"epochs": True}, "epochs is True; allowed: an integer"),
    ((Recipe, *COCO), {"epochs": 0}, "epochs is 0; allowed: at least 1"),
    (IMAGENET, {"epochs": 3, "warmup_epochs": 3}, "warmup_epochs is 3; allowed: less than epochs, 3"),
    (IMAGENET, {"lr": "fast"}, "lr is 'fast'; allowed: a finite number or none"),
    (IMAGENET, {"lr": float("nan")}, "lr is nan; allowed: a finite number or none"),
    (IMAGENET, {"lr": -1.0}, "lr is -1; allowed: at least 0"),
    (IMAGENET, {"weight_decay": None}, "weight_decay is None; allowed: a finite number"),
    (IMAGENET, {"mixup_prob": 1.1}, "mixup_prob is 1.1; allowed: at least 0 and at most 1"),
    ((Recipe, *DENSE), {"drop_path": 1.0}, "drop_path is 1; allowed: at least 0 and below 1"),
    (IMAGENET, {"precision": "fp16"}, "precision is 'fp16'; allowed: float32, bfloat16, float16"),
    (IMAGENET, {"image_size": 31}, "image_size is 31; allowed: at least 32"),
    (IMAGENET, {"clip_grad": 0}, "clip_grad is 0.0; allowed: above 0"),
    (IMAGENET, {"scale": [1.0]}, "scale is [1.0]; allowed: two numbers"),
    (IMAGENET, {"scale": [1.0, 0.5]}, "scale is 1.0, 0.5; allowed: two positive numbers, the smaller first"),
    (IMAGENET, {"eager": "yes"}, "eager is 'yes'; allowed: true or false"),
    (IMAGENET, {"eager": True, "head": "official"}, "head is official; allowed with eager: timm"),
    (IMAGENET, {"schedule": "plateau"}, "schedule is 'plateau'; allowed: cosine, tanh, poly, step"),
    (IMAGENET, {"model": 12}, "model is 12; allowed: a text"),
    (COCO, {"model": "semantic_fpn_poolformer_s12"}, "model is 'semantic_fpn_poolformer_s12'; allowed for"),
    (COCO, {"model": "poolformer_s12"}, "model is 'poolformer_s12'; allowed for this task: "),
    (DENSE, {"mixup": 0.8}, "'mixup' is not a field of a recipe"),
    (DENSE, {"eager": True}, "'eager' is not a field of a recipe"),
    (DENSE, {"batch_size": 0}, "batch_size is 0; allowed: at least 1"),
    (DENSE, {"weight_decay": -1}, "weight_decay is -1; allowed: at least 0"),
    (DENSE, {"validate_every": 0}, "validate_every is 0; allowed: at least 1"),
    (DENSE, {"hflip": 1.5}, "hflip is 1.5; allowed: at least 0 and at most 1"),
    (DENSE, {"precision": "float64"}, "precision is 'float64'; allowed: float32, bfloat16, float16"),
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
    (ADE20K, {"model": "retinanet_poolformer_s12"}, "model is 'retinanet_poolformer_s12'; allowed for"),
    (ADE20K, {"epochs": 12}, "'epochs' is not a field of a recipe"),
    (ADE20K, {"iterations": 0}, "iterations is 0; allowed: at least 1"),
    (ADE20K, {"power": -0.9}, "power is -0.9; allowed: at least 0"),
    (ADE20K, {"min_lr": -1}, "min_lr is -1; allowed: at least 0"),
    (ADE20K, {"dropout": 1}, "dropout is 1; allowed: at least 0 and below 1"),
    (ADE20K, {"zero_label": "drop"}, "zero_label is 'drop'; allowed: ignore, class"),
    (ADE20K, {"scale": [512, 2048]}, "scale is 512, 2048; allowed: the longer first, both at least 32"),
    (ADE20K, {"scale": [float("inf"), 512]}, "scale is [inf, 512]; allowed: two finite numbers"),
    (ADE20K, {"ratio": [0.0, 2.0]}, "ratio is 0, 2; allowed: at least 0.001, the smaller first"),
    (ADE20K, {"ratio": [0.5, float("inf")]}, "ratio is [0.5, inf]; allowed: two finite numbers"),
    (ADE20K, {"crop": 32}, "crop is 32; allowed: at least 64"),
    (ADE20K, {"cat_max_ratio": 0}, "cat_max_ratio is 0; allowed: at least 0.001 and at most 1"),
]


@pytest.mark.parametrize(("kinds", "change", "message"), BAD, ids=[str(change) for _, change, _ in BAD])
def test_a_bad_field_is_named_with_what_is_allowed(kinds, change, message) -> None:
    for kind in kinds:
        assert message_of(RecipeError, paper, kind, **change).startswith(message)


def test_an_unknown_backbone_is_named_with_those_there_are() -> None:
    text = message_of(RecipeError, paper, InstanceRecipe, model="mask_rcnn_poolformer_s99")
    said = "model is 'mask_rcnn_poolformer_s99'; allowed: mask_rcnn_ and one of poolformer_s12"
    assert text.startswith(said)
    assert "timm:" not in text


def test_bad_files_and_presets(tmp_path) -> None:
    files = {"list": b"- 1\n", "broken": b"a: [1\n", "binary": b"\xff\xfe\x00", "empty": b""}
    files["object"] = b"a: !!python/object/apply:os.getcwd []\n"
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
    for name in ("list", "broken", "binary", "object", "none"):
        assert f"{name}.yaml" in message_of(RecipeError, read_yaml, tmp_path / f"{name}.yaml")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    said = "recipe is 'fast'; allowed: paper, finetune, small"
    assert message_of(RecipeError, resolve, "fast").startswith(said)
