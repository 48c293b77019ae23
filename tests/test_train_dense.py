"""Runs of detection, instance and semantic segmentation: what they write, repeat and refuse."""

import base64
import io
import json
import os
import re
import shutil
import signal

import pytest
import torch
import yaml
from support import dense_files
from support.dense_data import require_dense_data
from support.train import differing, state
from support.train_dense import (
    SCORE,
    STEPS,
    TASKS,
    VALIDATED,
    data_of,
    few_regions,
    make_discs,
    rows,
    run_task,
    values,
)

require_dense_data()

from PIL import Image
from safetensors import safe_open

from poolformer_kernels.cli.main import main
from poolformer_kernels.dense import segment
from poolformer_kernels.dense.checkpoints import model_of_checkpoint
from poolformer_kernels.models import load_checkpoint
from poolformer_kernels.train import loop
from poolformer_kernels.train.dense_evaluation import SegmentationScores
from poolformer_kernels.train.dense_transforms import as_tensor
from poolformer_kernels.train.label_maps import open_label_maps
from poolformer_kernels.train.metrics import columns_of
from poolformer_kernels.train.networks import DIGITS


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        few_regions(patch)
        yield patch


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return make_discs(tmp_path_factory.mktemp("discs"))


@pytest.fixture(scope="module")
def finished(patch, discs, tmp_path_factory):
    """A function: the run of a task to its end, made once."""
    made = {}

    def run_of(task: str):
        if task not in made:
            made[task] = tmp_path_factory.mktemp(task) / "run"
            assert run_task(made[task], discs, task) == 0
        return made[task]

    return run_of


def notes_of(run) -> dict:
    with safe_open(run / "best.safetensors", "pt") as file:
        return json.loads(file.metadata()["poolformer_kernels"])


def refused(capsys, *words: str) -> str:
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert main(list(words)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("poolformer-kernels: error: ")
    return err.removeprefix("poolformer-kernels: error: ").strip()


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
    best = str(run / "best.safetensors")
    notes, (tensors, facts) = notes_of(run), state(run)
    score = SCORE[task]
    of_best = next(row for row in rows(run) if int(row["step"]) == notes["step"])
    assert (notes[score], notes["step"]) == (facts["totals"]["best"], facts["totals"]["best_step"])
    assert notes[score] == float(of_best[f"ema_{score}"])
    command = ["validate", data_of(discs, task), "--checkpoint", best, "--device", "cpu"]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[score] == pytest.approx(notes[score], abs=1e-9)
    assert (found["task"], found["images"], found["bad_images"]) == (task, 4, 0)
    assert main([*command, "--task", task]) == 0
    assert f"{score.replace('_', ' ')} {notes[score]:.2f}" in capsys.readouterr().out
    model, _, classes = model_of_checkpoint(best)
    names = ("black", "ball", "coin") if task == "segmentation" else ("coin", "ball")
    assert classes == names
    if notes["step"] == STEPS[task]:
        own = {f"ema/{name}": t for name, t in model.state_dict().items()}
        assert differing(own, {k: v for k, v in tensors.items() if k.startswith("ema/")}) == []
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    load_checkpoint(model, best)
    assert all(bool(p.abs().sum() > 0) for p in model.parameters() if p.dim() > 1)


# ---- validate and predict ----------------------------------------------------------------------------------


def test_validate_refuses_what_the_file_is_not_of(finished, discs, tmp_path, capsys) -> None:
    best = str(finished("detection") / "best.safetensors")
    coco, maps = data_of(discs, "detection"), data_of(discs, "segmentation")
    command = ("--checkpoint", best, "--device", "cpu")
    assert refused(capsys, "validate", coco, *command, "--task", "instance") == (
        f"--task is instance; {best} is of detection"
    )
    assert refused(capsys, "validate", "sample:digits", *command, "--task", "classification") == (
        f"--task is classification; {best} is of detection"
    )
    assert "maps has no annotations of train" in refused(capsys, "validate", maps, *command)
    assert refused(capsys, "validate", coco, *command, "--image-size", "64") == (
        "--image-size is 64; allowed with classification only, this is detection"
    )
    assert "--head is timm; allowed" in refused(capsys, "validate", coco, *command, "--head", "timm")
    text = refused(capsys, "validate", coco, *command, "--model", "mask_rcnn_poolformer_digits")
    assert text.startswith("model is 'mask_rcnn_poolformer_digits'; allowed for this task: retinanet_")
    other = make_discs(tmp_path / "other", images=1) / "coco"
    for split in ("train", "val"):
        file = other / "annotations" / f"instances_{split}.json"
        file.write_text(file.read_text().replace("ball", "plate"))
    text = refused(capsys, "validate", str(other), *command)
    assert "has 2 classes, ['coin', 'plate']" in text
    assert "was trained on 2, ['coin', 'ball']" in text


def test_validate_ends_with_1_below_the_floor(finished, discs, capsys) -> None:
    best = str(finished("segmentation") / "best.safetensors")
    score = notes_of(finished("segmentation"))["mIoU"]
    command = ["validate", data_of(discs, "segmentation"), "--checkpoint", best, "--device", "cpu"]
    assert main([*command, "--at-least", f"{score - 0.01}"]) == 0
    assert main([*command, "--at-least", f"{score + 0.01}"]) == 1


def test_an_official_file_is_validated_when_task_and_model_are_named(capsys, tmp_path, monkeypatch):
    """Of mmsegmentation; label 0 is of no class, and pictures are scaled as there."""
    monkeypatch.setattr(dense_files, "DIMS", DIGITS.dims)
    file, discs = tmp_path / "official.pth", make_discs(tmp_path / "discs", images=1, validation=1)
    maps = data_of(discs, "segmentation")
    dense_files.official_file(file, "semantic_fpn", classes=3, names=None)
    command = ["validate", maps, "--checkpoint", str(file), "--device", "cpu"]
    name = "semantic_fpn_poolformer_digits"
    text = refused(capsys, *command, "--task", "segmentation")
    assert text.startswith(f"--model: {file} does not say which model it is of")
    assert main([*command, "--task", "segmentation", "--model", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    model, scores = model_of_checkpoint(file)[0], SegmentationScores(3)
    for image, target in open_label_maps(maps, "ignore").val:
        with torch.no_grad():
            scores.add(segment(model, as_tensor(image), 512, 2048).argmax(0), target)
    assert found["mIoU"] == pytest.approx(scores.scores()["mIoU"], abs=1e-6)
    assert found["mIoU"] > 0
    text = refused(capsys, *command, "--task", "detection", "--model", "retinanet_poolformer_digits")
    assert "has no annotations" in text
    command[1] = data_of(discs, "detection")
    text = refused(capsys, *command, "--task", "detection", "--model", "retinanet_poolformer_digits")
    assert str(file) in text


@pytest.mark.parametrize("task", TASKS)
def test_predict_knows_the_classes_and_the_size_of_the_pictures(finished, discs, task, tmp_path) -> None:
    run = finished(task)
    picture = discs / "maps" / "images" / "validation" / "2.png"
    command = ["predict", str(picture), "--checkpoint", str(run / "best.safetensors"), "--device", "cpu"]
    command += ["--score", "0.01"] if task != "segmentation" else []
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert found["model"]["image_size"] == [64, 64]
    record = found["images"][0]
    names = {entry["name"] for entry in record["classes" if task == "segmentation" else "detections"]}
    assert names
    assert names <= {"black", "ball", "coin"}


# ---- the same again ----------------------------------------------------------------------------------------


def interrupt(monkeypatch, task: str, method: str, call: int) -> None:
    """SIGTERM to this process at the given call of a task's method, the first being 1."""
    cls, calls = loop.TASKS[task], []
    real = getattr(cls, method)

    def interrupted(*args, **options):
        calls.append(method)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(cls, method, interrupted)


@pytest.mark.parametrize("task", [*(pytest.param(t, marks=pytest.mark.long) for t in TASKS[:2]), TASKS[2]])
def test_a_stopped_run_goes_on_to_the_same_end(finished, discs, tmp_path, monkeypatch, task) -> None:
    """Stopped in its second step, in the validation that follows, and in the one that makes up for it."""
    run, whole = tmp_path / "run", finished(task)
    first = VALIDATED[task][0]
    for method, call, step in (("loss", 2, 2), ("_judge", 2, first), ("_judge", 6, first)):
        with monkeypatch.context() as patch:
            interrupt(patch, task, method, call)
            resume = ["--resume"] * run.exists()
            assert run_task(run, discs, task, "--save-every", "100", *resume) == 143
        assert state(run)[1]["step"] == step
    assert run_task(run, discs, task, "--resume", "--save-every", "100") == 0
    assert differing(state(run)[0], state(whole)[0]) == []
    assert values(run) == values(whole)
    assert notes_of(run) == notes_of(whole)
    assert {p.name: p for p in run.iterdir()}.keys() == {p.name: p for p in whole.iterdir()}.keys()


def test_running_statistics_are_part_of_the_state_and_of_the_average(finished) -> None:
    tensors, _ = state(finished("segmentation"))
    norm = "scale_heads.0.1"
    for kind in ("model", "ema"):
        assert tensors[f"{kind}/{norm}.num_batches_tracked"].item() == 7
    mean, average = (tensors[f"{kind}/{norm}.running_mean"] for kind in ("model", "ema"))
    assert mean.abs().max() > 0
    assert average.abs().max() > 0
    assert not mean.equal(average)


@pytest.mark.parametrize("task", [*(pytest.param(t, marks=pytest.mark.long) for t in TASKS[:2]), TASKS[2]])
def test_workers_do_not_change_the_run(finished, discs, tmp_path, task) -> None:
    run = tmp_path / "run"
    assert run_task(run, discs, task, "--workers", "2") == 0
    assert differing(state(run)[0], state(finished(task))[0]) == []
    assert values(run) == values(finished(task))


def test_resume_of_another_run_is_refused(finished, discs, capsys, tmp_path) -> None:
    run = shutil.copytree(finished("detection"), tmp_path / "run")
    command = ("train", data_of(discs, "detection"), "--out", str(run), "--device", "cpu", "--resume")
    for task in ("instance", "classification"):
        assert refused(capsys, *command, "--task", task) == (
            f"the task is {task}, but --resume: the run in {run} is of detection"
        )
    text = refused(capsys, *command, "--model", "retinanet_poolformer_s12")
    assert text == (
        f"--resume: model is retinanet_poolformer_s12, but the run in {run} has retinanet_poolformer_digits"
    )
    assert refused(capsys, *command, "--warmup-steps", "3").startswith("--resume: warmup_steps is 3, but")
    assert main([*command]) == 0  # the task is the run's own, which is finished
    config = tmp_path / "config.yaml"
    config.write_text("task: segmentation\n")
    new = ("train", str(discs / "coco"), "--out", str(tmp_path / "new"), "--config", str(config))
    assert refused(capsys, *new, "--task", "detection") == (
        f"the task is detection, but config {config} is of segmentation"
    )
    assert not (tmp_path / "new").exists()
