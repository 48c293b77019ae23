"""What a dense run starts from and may meet: checkpoints, precisions, hard pictures, bad ones, and NaN."""

import math
from dataclasses import replace

import pytest
import torch
from support.commands import printed, refused
from support.dense_data import coco_annotation, disc, require_dense_data, write_coco
from support.train import differing, losses, rows, state, train_words, validate_words
from support.train_dense import TASKS, data_of, few_regions, make_discs, run_task, task_words

require_dense_data()

from poolformer_kernels.cli.main import main
from poolformer_kernels.dense import create_detector
from poolformer_kernels.models import PoolFormer
from poolformer_kernels.train import loop, nuclei
from poolformer_kernels.train.coco import open_coco
from poolformer_kernels.train.networks import DIGITS
from poolformer_kernels.train.processes import Processes
from poolformer_kernels.train.recipe import resolve

MOST = ["detection", pytest.param("instance", marks=pytest.mark.long), "segmentation"]
ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _few_regions(monkeypatch) -> None:
    few_regions(monkeypatch)


def task_of(discs, name: str, **changes):
    """A task that has not begun."""
    cls = loop.TASKS[name]
    model = f"{cls.kind.head}_poolformer_digits"
    sizes = {"min_size": (64, 64), "max_size": 64}
    if name == "segmentation":
        sizes = {"scale": (64, 64), "crop": 64, "zero_label": "class"}
    recipe = resolve("paper", {"model": model, "workers": 0, **sizes, **changes}, kind=cls.kind)
    return cls(recipe, cls.open(data_of(discs, name), recipe), ONE)


# ---- checkpoints -------------------------------------------------------------------------------------------


def saved(folder, weights: dict) -> str:
    torch.save(weights, folder / "weights.pth")
    return str(folder / "weights.pth")


@pytest.mark.parametrize("task", TASKS)
def test_a_classifiers_weights_go_into_the_backbone(discs, tmp_path, task) -> None:
    """The others, of which are the norms of the outputs, are the seed's."""
    torch.manual_seed(5)
    given = PoolFormer(DIGITS, num_classes=10).state_dict()
    model = task_of(discs, task, checkpoint=saved(tmp_path, given)).build()
    blocks = {name: t for name, t in given.items() if name.startswith(("patch_embed", "network"))}
    assert len(blocks) > 20
    expected = task_of(discs, task).build().state_dict()
    expected |= {f"backbone.body.{name}": t for name, t in blocks.items()}
    assert differing(model.state_dict(), expected) == []


@pytest.mark.parametrize("task", TASKS)
def test_a_whole_models_weights_go_into_the_whole(discs, tmp_path, task) -> None:
    given = task_of(discs, task, seed=9).build().state_dict()
    model = task_of(discs, task, checkpoint=saved(tmp_path, given)).build()
    assert differing(model.state_dict(), given) == []


def test_another_kind_of_model_gives_its_backbone(discs, tmp_path) -> None:
    """And one of the same kind with other classes all but these."""
    fresh = task_of(discs, "detection").build().state_dict()
    given = task_of(discs, "segmentation", seed=1).build().state_dict()
    made = task_of(discs, "detection", checkpoint=saved(tmp_path, given)).build()
    for name, t in made.state_dict().items():
        assert t.equal((given if name.startswith("backbone.body.") else fresh)[name]), name

    given = create_detector("retinanet", PoolFormer(DIGITS, features_only=True), 7).state_dict()
    made = task_of(discs, "detection", checkpoint=saved(tmp_path, given)).build()
    for name, t in made.state_dict().items():
        assert t.equal((fresh if "cls_logits" in name else given)[name]), name


def test_other_checkpoints_are_one_line(discs, run, tmp_path, capsys) -> None:
    text = tmp_path / "text.pth"
    text.write_text("no weights")
    for file in (saved(tmp_path, {"a.weight": torch.zeros(3)}), str(text), str(tmp_path / "missing.pth")):
        assert file in refused(capsys, *task_words(run, discs, "detection", "--checkpoint", file))
    assert not run.exists()


@pytest.mark.parametrize("backbone", ["metaformer_pppa_s12_224", "metaformer_pppf_s12_224"])
def test_a_backbone_for_images_of_one_size_is_one_line(discs, run, capsys, backbone) -> None:
    model = f"retinanet_{backbone}"
    found = refused(capsys, *task_words(run, discs, "detection", "--model", model))
    assert found.startswith(f"model is {model}, whose ")
    assert "was made for images of 224 pixels; allowed: backbones for images of any size" in found
    assert not run.exists()


# ---- precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_is_near_float32(discs, task) -> None:
    """The loss and the gradient of a batch, within what eight bits leave."""
    found = {}
    changes = {"dropout": 0.0, "batch_size": 2} if task == "segmentation" else {"batch_size": 1}
    if task == "detection":  # P6 of 2 x 2: of 1 x 1 in channels_last, PyTorch's gradient of P7 is wrong
        changes |= {"min_size": (128, 128), "max_size": 128}
    for precision in ("float32", "bfloat16"):
        made = task_of(discs, task, precision=precision, **changes)
        model = made.build().train()
        loss = made.loss(model, next(iter(made.loader(0))))
        assert loss.dtype == torch.float32
        loss.backward()
        gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        found[precision] = loss.item(), gradient
    (loss, gradient), (half_loss, half) = found.values()
    assert half_loss == pytest.approx(loss, rel=0.03)
    assert half_loss != loss
    assert torch.cosine_similarity(gradient, half, 0).item() > 0.95


# ---- pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["detection", "instance"])
def test_a_picture_whose_objects_are_cropped_away_has_a_loss(discs, task) -> None:
    """As a random crop may leave it."""
    made = task_of(discs, task, batch_size=2)
    model, batch = made.build().train(), next(iter(made.loader(0)))
    full, other = batch.targets
    masks = None if other.masks is None else other.masks[:0]
    empty = replace(other, boxes=other.boxes[:0], labels=other.labels[:0], masks=masks)
    for targets in ([full, empty], [empty, empty]):
        batch.targets = targets
        model.zero_grad()
        loss = made.loss(model, batch)
        loss.backward()
        assert math.isfinite(loss.item())
        without = [n for n, p in model.named_parameters() if p.grad is None]
        assert without == []  # else several processes would wait for each other
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("task", ["detection", pytest.param("instance", marks=pytest.mark.long)])
def test_pictures_of_different_sizes_make_a_batch(tmp_path, run, task) -> None:
    discs = make_discs(tmp_path / "discs", sizes=((64, 48), (48, 96), (40, 64)), validation=2)
    assert run_task(run, discs, task, "--max-size", "128", "--epochs", "1") == 0
    assert all(math.isfinite(loss) for loss in losses(run))
    data = open_coco(str(discs / "coco"), masks=False)
    assert {data.train.size(i) for i in range(6)} == {(64, 48), (48, 96), (40, 64)}


@pytest.mark.parametrize(
    ("task", "split"),
    [
        ("detection", "train"),
        ("segmentation", "val"),
        pytest.param("detection", "val", marks=pytest.mark.long),
        pytest.param("segmentation", "train", marks=pytest.mark.long),
    ],
)
def test_bad_images_fail_or_are_skipped(tmp_path, capsys, task, split) -> None:
    discs = make_discs(tmp_path / "discs", validation=2)
    folder = {"train": "training", "val": "validation"}[split]
    parts = ("coco", split) if task == "detection" else ("maps", "images", folder)
    discs.joinpath(*parts, "1.png").write_bytes(b"no picture")
    short = ["--iterations", "4"] if task == "segmentation" else ["--epochs", "1"]
    assert run_task(tmp_path / "run", discs, task, *short) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert found.startswith("poolformer-kernels: error: cannot read image ")
    assert "1.png" in found
    assert found.endswith("--bad-images skip puts its neighbour in its place")
    run = tmp_path / "skipped"
    assert run_task(run, discs, task, *short, "--bad-images", "skip") == 0
    assert int(rows(run)[-1]["bad_images"]) >= 1
    words = validate_words(run / "best.safetensors", data_of(discs, task))
    assert main(words) == (2 if split == "val" else 0)
    images = 1 if split == "val" else 2
    assert f"on {images} images" in printed(capsys, *words, "--bad-images", "skip")


def test_data_without_a_usable_picture_is_one_line(tmp_path, run, capsys) -> None:
    discs = make_discs(tmp_path / "discs", images=1, validation=1)
    words = task_words(run, discs, "detection")
    assert refused(capsys, *words).endswith("coco has 1 images; batch_size is 2")
    bad = coco_annotation(1, 99, 4, disc(64, 64, 30, 30, 9))
    image = {"id": 1, "file_name": "0.png", "height": 64, "width": 64}
    write_coco(discs / "coco", "train", {"images": [image], "annotations": [bad], "categories": []}, {})
    assert "instances_train.json" in refused(capsys, *words)


# ---- not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", MOST)
def test_a_rate_that_is_far_too_high_ends_the_run_with_one_line_and_keeps_its_state(
    discs, run, capsys, task
) -> None:
    more = ["--warmup-steps", "0"] if task != "segmentation" else []
    code = run_task(run, discs, task, "--lr", "1e30", "--validate-every", "100", *more)
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 1, err
    last = state(run)[1]["step"]
    assert f"the loss of step {last + 1} is " in err
    assert err.endswith(f"the state of step {last} is saved")


def test_micro_batches_differ_by_their_own_numbers_of_positive_anchors(discs) -> None:
    """Each divides its sums by its own positives, so the step's loss is a mean of theirs, not the whole's."""
    made = task_of(discs, "detection", batch_size=4)
    whole = made.loss(made.build().train(), next(iter(made.loader(0)))).item()
    parts = task_of(discs, "detection", batch_size=4, accumulate=2)
    model = parts.build().train()
    found = [parts.loss(model, batch).item() for batch, _ in zip(parts.loader(0), range(2), strict=False)]
    assert sum(found) / 2 == pytest.approx(whole, rel=0.2)
    assert sum(found) / 2 != pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_weights_that_are_not_finite_score_nothing(discs, task) -> None:
    """The run goes on to the step whose loss tells; its page has pictures, too."""
    made = task_of(discs, task)
    model = made.build()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    found = made.evaluate(model.eval(), stop=lambda: False)
    assert found.bad == 0
    if task == "segmentation":
        assert math.isnan(found.values["val_loss"])
        assert found.values["val_mIoU"] == 0
    else:
        assert {value for name, value in found.values.items() if "AP" in name} == {0.0}
    assert len(made.samples(model)) == 4


# ---- sample:nuclei -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_nuclei_without_their_package_are_one_line(run, capsys, monkeypatch, task) -> None:
    monkeypatch.setattr(nuclei, "find_spec", lambda name: None)
    assert refused(capsys, *train_words(run, "--task", task, data="sample:nuclei")) == (
        "DATA is sample:nuclei, which the package stardist carries: pip install --no-deps stardist"
    )
