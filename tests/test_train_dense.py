"""Runs of detection, instance and semantic segmentation: what they write, repeat and refuse."""

import base64
import io
import json
import re
import shutil

import pytest
import torch
import yaml
from support import dense_files
from support import train as training
from support.commands import printed, refused
from support.dense_data import edit_coco, require_dense_data
from support.train import assert_same_end, notes_of, rows, state, train_words, validate_words
from support.train_dense import SCORE, STEPS, TASKS, VALIDATED, data_of, few_regions, make_discs, run_task

require_dense_data()

from PIL import Image

from poolformer_kernels.cli.main import main
from poolformer_kernels.dense import segment
from poolformer_kernels.dense.checkpoints import model_of_checkpoint
from poolformer_kernels.train import loop
from poolformer_kernels.train.dense_evaluation import SegmentationScores
from poolformer_kernels.train.dense_transforms import as_tensor
from poolformer_kernels.train.label_maps import open_label_maps
from poolformer_kernels.train.metrics import columns_of
from poolformer_kernels.train.networks import DIGITS

MOST_LONG = [*(pytest.param(task, marks=pytest.mark.long) for task in TASKS[:2]), TASKS[2]]


@pytest.fixture(autouse=True)
def _few_regions(monkeypatch) -> None:
    few_regions(monkeypatch)


@pytest.fixture(scope="module")
def finished(discs, tmp_path_factory):
    """A function: the run of a task to its end, made once."""
    made = {}

    def run_of(task: str):
        if task not in made:
            made[task] = tmp_path_factory.mktemp(task) / "run"
            assert run_task(made[task], discs, task) == 0
        return made[task]

    return run_of


# ---- what a run leaves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_what_a_run_holds(finished, task) -> None:
    run = finished(task)
    names = {"config.yaml", "metrics.csv", "curves.png", "index.html", "checkpoints", "best.safetensors"}
    assert {p.name for p in run.iterdir()} - {"tensorboard", ".lock"} == names
    saved = sorted(int(p.name.removeprefix("step_")) for p in (run / "checkpoints").iterdir())
    assert saved == [3, 6, 7][: 3 if task == "segmentation" else 2]
    found = rows(run)
    assert tuple(found[0]) == columns_of(task)
    assert [int(row["step"]) for row in found] == list(range(1, STEPS[task] + 1))
    assert [float(row["epoch"]) for row in found] == [step / 3 for step in range(1, STEPS[task] + 1)]
    ema = f"ema_{SCORE[task]}"
    assert [int(row["step"]) for row in found if row[ema]] == VALIDATED[task]
    steps = range(STEPS[task])
    if task == "segmentation":
        rates = [1e-3 * (1 - step / 7) ** 0.9 for step in steps]
    else:  # warm-up over two steps; 8/12 and 11/12 of two epochs of three steps are the steps 4 and 5.5
        rates = [1e-6, 1e-3 * (1 - 0.5 * 0.999), 1e-3, 1e-3, 1e-4, 1e-4]
    assert [float(row["lr"]) for row in found] == pytest.approx(rates, rel=1e-9)
    assert all(float(row["train_loss"]) > 0 and float(row["images_per_second"]) > 0 for row in found)
    for row in found:
        scores = [cell for name, cell in row.items() if name.startswith(("val_", "ema_"))]
        assert all(scores) if row[ema] else not any(scores)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["task"], config["seed"], config["weight_decay"]) == (task, 3, 1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_the_page_shows_truth_and_prediction(finished, task) -> None:
    page = (finished(task) / "index.html").read_text()
    images = re.findall(r'<img src="data:image/\w+;base64,([^"]+)" alt="(truth|prediction)"', page)
    assert [what for _, what in images] == ["truth", "prediction"] * 4
    sizes = {Image.open(io.BytesIO(base64.b64decode(data))).size for data, _ in images}
    assert {width for width, _ in sizes} == {64}
    assert {height >= 64 for _, height in sizes} == {True}  # a legend is below a label map
    captions = re.findall(r'<p class="soft small">([^<]+)</p>', page)
    assert [caption.partition(":")[0] for caption in captions] == ["0.png", "1.png", "2.png", "3.png"]
    said = "of the pixels are right" if task == "segmentation" else "2 objects, "
    assert said in captions[0]
    assert f"poolformer_digits on {'maps' if task == 'segmentation' else 'coco'}" in page


@pytest.mark.parametrize("task", TASKS)
def test_the_best_weights_are_the_averages_and_give_the_runs_score_again(
    finished, discs, task, capsys
) -> None:
    run = finished(task)
    best = run / "best.safetensors"
    notes, (tensors, facts) = notes_of(run), state(run)
    score = SCORE[task]
    of_best = next(row for row in rows(run) if int(row["step"]) == notes["step"])
    assert (notes[score], notes["step"]) == (facts["totals"]["best"], facts["totals"]["best_step"])
    assert notes[score] == float(of_best[f"ema_{score}"])
    words = validate_words(best, data_of(discs, task))
    found = training.scores_of(capsys, *words)
    assert found[score] == pytest.approx(notes[score], abs=1e-9)
    assert (found["task"], found["images"], found["bad_images"]) == (task, 4, 0)
    assert f"{score.replace('_', ' ')} {notes[score]:.2f}" in printed(capsys, *words, "--task", task)
    model, _, classes = model_of_checkpoint(best)
    assert classes == (("black", "ball", "coin") if task == "segmentation" else ("coin", "ball"))
    if notes["step"] == STEPS[task]:
        own = {f"ema/{name}": t for name, t in model.state_dict().items()}
        assert training.differing(own, {k: v for k, v in tensors.items() if k.startswith("ema/")}) == []


# ---- validate and predict ----------------------------------------------------------------------------------


def test_validate_refuses_what_the_file_is_not_of(finished, discs, tmp_path, capsys) -> None:
    best = finished("detection") / "best.safetensors"
    coco, maps = data_of(discs, "detection"), data_of(discs, "segmentation")

    def line(data, *options: str) -> str:
        return refused(capsys, *validate_words(best, data), *options)

    assert line(coco, "--task", "instance") == f"--task is instance; {best} is of detection"
    said = f"--task is classification; {best} is of detection"
    assert line("sample:digits", "--task", "classification") == said
    assert "maps has no annotations of train" in line(maps)
    said = "--image-size is 64; allowed with classification only, this is detection"
    assert line(coco, "--image-size", "64") == said
    assert "--head is timm; allowed" in line(coco, "--head", "timm")
    said = "model is 'mask_rcnn_poolformer_digits'; allowed for this task: retinanet_"
    assert line(coco, "--model", "mask_rcnn_poolformer_digits").startswith(said)
    other = make_discs(tmp_path / "other", images=1) / "coco"
    for split in ("train", "val"):
        edit_coco(other, lambda found: found["categories"][0].update(name="plate"), split)
    text = line(other)
    assert "has 2 classes, ['coin', 'plate']" in text
    assert "was trained on 2, ['coin', 'ball']" in text


def test_validate_ends_with_1_below_the_floor(finished, discs) -> None:
    run = finished("segmentation")
    words = validate_words(run / "best.safetensors", data_of(discs, "segmentation"))
    score = notes_of(run)["mIoU"]
    assert main([*words, "--at-least", f"{score - 0.01}"]) == 0
    assert main([*words, "--at-least", f"{score + 0.01}"]) == 1


def test_an_official_file_is_validated_when_task_and_model_are_named(capsys, tmp_path, monkeypatch):
    """Of mmsegmentation; label 0 is of no class, and pictures are scaled as there."""
    monkeypatch.setattr(dense_files, "DIMS", DIGITS.dims)
    file, discs = tmp_path / "official.pth", make_discs(tmp_path / "discs", images=1, validation=1)
    maps = data_of(discs, "segmentation")
    dense_files.official_file(file, "semantic_fpn", classes=3, names=None)
    words, known = validate_words(file, maps), ["--task", "segmentation"]
    text = refused(capsys, *words, *known)
    assert text.startswith(f"--model: {file} does not say which model it is of")
    found = training.scores_of(capsys, *words, *known, "--model", "semantic_fpn_poolformer_digits")

    model, scores = model_of_checkpoint(file)[0], SegmentationScores(3)
    for image, target in open_label_maps(maps, "ignore").val:
        with torch.no_grad():
            scores.add(segment(model, as_tensor(image), 512, 2048).argmax(0), target)
    assert found["mIoU"] == pytest.approx(scores.scores()["mIoU"], abs=1e-6)
    assert found["mIoU"] > 0
    other = ["--task", "detection", "--model", "retinanet_poolformer_digits"]
    assert "has no annotations" in refused(capsys, *words, *other)
    assert str(file) in refused(capsys, *validate_words(file, data_of(discs, "detection")), *other)


@pytest.mark.parametrize("task", TASKS)
def test_predict_knows_the_classes_and_the_size_of_the_pictures(finished, discs, task, tmp_path) -> None:
    picture, best = discs / "maps/images/validation/2.png", finished(task) / "best.safetensors"
    words = ["predict", str(picture), "--checkpoint", str(best), "--device", "cpu"]
    words += ["--score", "0.01"] if task != "segmentation" else []
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert found["model"]["image_size"] == [64, 64]
    record = found["images"][0]
    names = {entry["name"] for entry in record["classes" if task == "segmentation" else "detections"]}
    assert names
    assert names <= {"black", "ball", "coin"}


# ---- the same again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", MOST_LONG)
def test_a_stopped_run_goes_on_to_the_same_end(finished, discs, run, monkeypatch, task) -> None:
    """Stopped in its second step, in the validation that follows, and in the one that makes up for it."""
    whole, first = finished(task), VALIDATED[task][0]
    for method, call, step in (("loss", 2, 2), ("_judge", 2, first), ("_judge", 6, first)):
        with monkeypatch.context() as patch:
            training.interrupt(patch, loop.TASKS[task], method, call)
            resume = ["--resume"] * run.exists()
            assert run_task(run, discs, task, "--save-every", "100", *resume) == 143
        assert state(run)[1]["step"] == step
    assert run_task(run, discs, task, "--resume", "--save-every", "100") == 0
    assert_same_end(run, whole)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


def test_running_statistics_are_part_of_the_state_and_of_the_average(finished) -> None:
    tensors, _ = state(finished("segmentation"))
    norm = "scale_heads.0.1"
    for kind in ("model", "ema"):
        assert tensors[f"{kind}/{norm}.num_batches_tracked"].item() == 7
    mean, average = (tensors[f"{kind}/{norm}.running_mean"] for kind in ("model", "ema"))
    assert mean.abs().max() > 0
    assert average.abs().max() > 0
    assert not mean.equal(average)


@pytest.mark.parametrize("task", MOST_LONG)
def test_workers_do_not_change_the_run(finished, discs, run, task) -> None:
    assert run_task(run, discs, task, "--workers", "2") == 0
    assert_same_end(run, finished(task))


def test_resume_of_another_run_is_refused(finished, discs, capsys, run, tmp_path) -> None:
    shutil.copytree(finished("detection"), run)
    resume = train_words(run, "--resume", data=data_of(discs, "detection"))
    for task in ("instance", "classification"):
        assert refused(capsys, *resume, "--task", task) == (
            f"the task is {task}, but --resume: the run in {run} is of detection"
        )
    assert refused(capsys, *resume, "--model", "retinanet_poolformer_s12") == (
        f"--resume: model is retinanet_poolformer_s12, but the run in {run} has retinanet_poolformer_digits"
    )
    assert refused(capsys, *resume, "--warmup-steps", "3").startswith("--resume: warmup_steps is 3, but")
    assert main(resume) == 0  # the task is the run's own, which is finished
    config = tmp_path / "config.yaml"
    config.write_text("task: segmentation\n")
    options = ("--config", str(config), "--task", "detection")
    assert refused(capsys, *train_words(tmp_path / "new", *options, data=discs / "coco")) == (
        f"the task is detection, but config {config} is of segmentation"
    )
    assert not (tmp_path / "new").exists()
