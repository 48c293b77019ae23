"""Recipes: the paper's, what shrinks with the epochs, YAML, and one clear line for every bad field."""

import pytest
import yaml
from support.train import require_train

require_train()

from poolformer_kernels.models import list_models
from poolformer_kernels.train.networks import complete
from poolformer_kernels.train.recipe import PRESETS, Recipe, RecipeError, read_yaml, resolve, write_yaml


def test_the_papers_recipe() -> None:
    """MetaFormer, section 4.1, and the defaults of the official train.py."""
    r = resolve("paper", {"batch_size": 4096})
    assert (r.optimizer, r.weight_decay, r.lr) == ("adamw", 0.05, 4e-3)
    assert (r.epochs, r.warmup_epochs, r.cooldown_epochs, r.total_epochs) == (300, 5, 10, 310)
    assert (r.warmup_lr, r.min_lr, r.schedule, r.schedule_on) == (1e-6, 1e-5, "cosine", "epoch")
    assert (r.auto_augment, r.color_jitter, r.hflip) == ("rand-m9-mstd0.5-inc1", 0.4, 0.5)
    assert (r.mixup, r.cutmix, r.mixup_prob, r.mixup_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (r.label_smoothing, r.random_erasing, r.random_erasing_mode) == (0.1, 0.25, "pixel")
    assert (r.ema, r.clip_grad) == (None, None)
    rates = {
        name: complete(resolve("paper", {"model": name})).drop_path for name in list_models("poolformer_*")
    }
    assert list(rates.values()) == [0.1, 0.1, 0.2, 0.3, 0.4]


def test_the_learning_rate_follows_the_batch_unless_it_is_given() -> None:
    assert resolve("paper", {"batch_size": 512}).lr == pytest.approx(5e-4)
    assert resolve("paper", {"batch_size": 512, "lr": 0.1}).lr == 0.1
    stored = resolve("paper").as_dict()
    assert resolve("paper", stored, {"batch_size": 512}).lr == pytest.approx(5e-4)
    assert resolve("paper", stored, {"batch_size": 512, "lr": 0.2}).lr == 0.2


def test_warm_up_and_cooldown_shrink_with_the_epochs_unless_they_are_given() -> None:
    r = resolve("paper", {"epochs": 60})
    assert (r.warmup_epochs, r.cooldown_epochs, r.total_epochs) == (1, 2, 62)
    r = resolve("paper", {"epochs": 60, "warmup_epochs": 7})
    assert (r.warmup_epochs, r.cooldown_epochs) == (7, 2)
    r = resolve("paper", {"epochs": 10})
    assert (r.warmup_epochs, r.cooldown_epochs) == (1, 1)
    assert resolve("paper", {"epochs": 1}).warmup_epochs == 0
    r = resolve("paper", {"epochs": 600})
    assert (r.warmup_epochs, r.cooldown_epochs) == (5, 10)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_written_recipe_is_read_back(preset, tmp_path) -> None:
    recipe = complete(resolve(preset, {"seed": 3, "lr": 1e-30, "ratio": [0.7, 1.3]}))
    write_yaml(tmp_path / "config.yaml", recipe.as_dict())
    assert Recipe(**read_yaml(tmp_path / "config.yaml")) == recipe
    assert resolve("paper", read_yaml(tmp_path / "config.yaml")) == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_later_changes_count() -> None:
    assert resolve("small", {"epochs": 9, "seed": 1}, {"epochs": 8}).epochs == 8


def test_heads_that_nobody_chose() -> None:
    heads = {"poolformer_s12": "official", "poolformerv2_s12": "timm", "timm:poolformer_s12": "timm"}
    for model, head in heads.items():
        assert complete(resolve("paper", {"model": model})).head == head
    assert complete(resolve("paper", {"eager": True})).head == "timm"


BAD = [
    ({"epoch": 1}, "'epoch' is not a field of a recipe (did you mean epochs?)"),
    ({"epochs": 1.5}, "epochs is 1.5; allowed: an integer"),
    ({"epochs": True}, "epochs is True; allowed: an integer"),
    ({"epochs": 0}, "epochs is 0; allowed: at least 1"),
    ({"epochs": 3, "warmup_epochs": 3}, "warmup_epochs is 3; allowed: less than epochs, 3"),
    ({"lr": "fast"}, "lr is 'fast'; allowed: a finite number or none"),
    ({"lr": float("nan")}, "lr is nan; allowed: a finite number or none"),
    ({"lr": -1.0}, "lr is -1; allowed: at least 0"),
    ({"weight_decay": None}, "weight_decay is None; allowed: a finite number"),
    ({"mixup_prob": 1.1}, "mixup_prob is 1.1; allowed: at least 0 and at most 1"),
    ({"drop_path": 1.0}, "drop_path is 1; allowed: at least 0 and below 1"),
    ({"precision": "fp16"}, "precision is 'fp16'; allowed: float32, bfloat16, float16"),
    ({"image_size": 31}, "image_size is 31; allowed: at least 32"),
    ({"clip_grad": 0}, "clip_grad is 0.0; allowed: above 0"),
    ({"scale": [1.0]}, "scale is [1.0]; allowed: two numbers"),
    ({"scale": [1.0, 0.5]}, "scale is 1.0, 0.5; allowed: two positive numbers, the smaller first"),
    ({"eager": "yes"}, "eager is 'yes'; allowed: true or false"),
    ({"eager": True, "head": "official"}, "head is official; allowed with eager: timm"),
    ({"schedule": "plateau"}, "schedule is 'plateau'; allowed: cosine, tanh, poly, step"),
    ({"model": 12}, "model is 12; allowed: a text"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change) for change, _ in BAD])
def test_a_bad_field_is_named_with_what_is_allowed(change, message) -> None:
    with pytest.raises(RecipeError) as error:
        resolve("paper", change)
    assert str(error.value).startswith(message)


def test_bad_files_and_presets(tmp_path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "object.yaml").write_text("a: !!python/object/apply:os.getcwd []\n")
    (tmp_path / "empty.yaml").write_text("")
    for name in ("list", "broken", "binary", "object", "none"):
        with pytest.raises(RecipeError, match=f"{name}.yaml"):
            read_yaml(tmp_path / f"{name}.yaml")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    with pytest.raises(RecipeError, match="recipe is 'fast'; allowed: paper, finetune, small"):
        resolve("fast")


def test_yaml_numbers_without_a_point_are_numbers() -> None:
    """YAML 1.1 reads 1e-3 as a text."""
    assert resolve("paper", yaml.safe_load("lr: 1e-3")).lr == 1e-3
