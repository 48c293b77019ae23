"""Runs of `poolformer-kernels train` and `validate` in one process: what they write, repeat and refuse."""

import math
import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import torch
import yaml
from support import train as training
from support.commands import printed, refused
from support.processes import started
from support.train import ALL_DRAWS, ONE, TWO, assert_same_end, losses, rows, state, train, train_words

training.require_train()

from safetensors.torch import load_file

from poolformer_kernels.models import PoolFormer, load_checkpoint
from poolformer_kernels.models.checkpoints import read_checkpoint
from poolformer_kernels.models.export import read_weights
from poolformer_kernels.train import loop, tasks
from poolformer_kernels.train.networks import DIGITS


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Two epochs with every draw on."""
    run = tmp_path_factory.mktemp("first") / "run"
    assert train(run, *TWO, *ALL_DRAWS) == 0
    return run


# ---- what a run leaves -------------------------------------------------------------------------------------


def test_what_a_run_holds(first) -> None:
    names = {"config.yaml", "metrics.csv", "curves.png", "index.html", "checkpoints", "best.safetensors"}
    assert {p.name for p in first.iterdir()} - {"tensorboard", ".lock"} == names
    assert sorted(p.name for p in (first / "checkpoints").iterdir()) == ["step_00000011", "step_00000022"]
    found = rows(first)
    assert [int(row["step"]) for row in found] == list(range(1, 23))
    for score in ("val_top1", "ema_top1"):
        assert [row["step"] for row in found if row[score]] == ["11", "22"]
    assert all(float(row["train_loss"]) > 0 and float(row["memory_mb"]) > 50 for row in found)
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert config["data"] == "sample:digits"
    assert (config["ema"], config["drop_path"], config["lr"]) == (0.9, 0.3, 0.032 * 128 / 1024)
    page = (first / "index.html").read_text()
    assert "poolformer_digits" in page
    assert page.count("<figure") == 24


def test_the_learning_rate_warms_up_and_falls(first) -> None:
    rates = [float(row["lr"]) for row in rows(first)]
    top = rates.index(max(rates))
    assert 8 <= top <= 12
    assert rates[0] == pytest.approx(1e-5)
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)


def test_the_best_weights_have_official_names_and_say_what_they_are(first) -> None:
    notes, weights = training.notes_of(first), load_file(first / "best.safetensors")
    assert notes["model"] == "poolformer_digits"
    assert notes["classes"] == [str(i) for i in range(10)]
    PoolFormer(DIGITS, num_classes=10).load_state_dict(weights)  # strict
    tensors, facts = state(first)
    assert notes["top1"] == facts["totals"]["best"]
    assert notes["step"] == facts["totals"]["best_step"]
    if notes["step"] == 22:  # the moving average's, not the model's
        averages = {k.removeprefix("ema/"): t for k, t in tensors.items() if k.startswith("ema/")}
        assert training.differing(weights, averages) == []


@pytest.mark.parametrize("options", [["--head", "timm"], ["--head", "official"], ["--eager"]], ids=str)
def test_the_best_weights_are_evaluated_with_the_head_they_were_trained_with(run, options) -> None:
    assert train(run, *ONE, *options) == 0
    model = PoolFormer(DIGITS, num_classes=10)
    report = load_checkpoint(model, run / "best.safetensors")
    assert report.head_mode == model.head_mode == ("official" if "official" in options else "timm")
    assert read_weights(read_checkpoint(run / "best.safetensors")).head_noted
    assert (run / "best.safetensors").stat().st_mode & 0o777 == (run / "metrics.csv").stat().st_mode & 0o777


def test_validate_measures_what_the_run_measured(first, capsys) -> None:
    words, top1 = training.validate_words(first / "best.safetensors"), training.notes_of(first)["top1"]
    found = training.scores_of(capsys, *words)
    assert found["top1"] == pytest.approx(top1, abs=1e-9)
    assert (found["images"], found["image_size"], found["crop_pct"]) == (360, 32, 1.0)
    assert found["images_per_second"] > 0
    assert f"top-1 {top1:.2f} %" in printed(capsys, *words)


# ---- the same again ----------------------------------------------------------------------------------------


def test_the_config_repeats_the_run_bitwise(first, run) -> None:
    """In a process of its own, whose images two workers load."""
    training.in_processes(run, "--config", str(first / "config.yaml"), "--workers", "2")
    assert_same_end(run, first)


@pytest.mark.long
def test_another_seed_is_another_run(first, run) -> None:
    assert train(run, *TWO, *ALL_DRAWS, "--seed", "1") == 0
    assert losses(first) != losses(run)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=str
)
def test_a_signal_lets_the_step_end_and_the_state_be_saved(first, run, number) -> None:
    more = [*TWO, *ALL_DRAWS, "--save-every", "100", "--workers", "2"]
    process = started(*training.command(run, *more), stderr=subprocess.PIPE)
    lines = iter(process.stderr.readline, "")
    seen = next(line for line in lines if line.startswith("step 5/"))
    os.killpg(process.pid, number)  # the processes that load images get it, too
    rest = process.stderr.read()
    assert process.wait(60) == 128 + number, seen + rest
    assert "stopped by a signal after step" in rest
    _, facts = state(run)
    assert 5 <= facts["step"] < 22
    assert train(run, *more, "--resume") == 0
    assert_same_end(run, first)


def test_a_second_signal_ends_at_once(monkeypatch) -> None:
    signals = loop._Signals(torchrun=False)
    ended = []
    monkeypatch.setattr(loop.os, "_exit", ended.append)
    with signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.number, ended) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [143]
    with loop._Signals(torchrun=True) as signals:  # the launcher repeats what the terminal sent
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [143]
        signals._until = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [143, 130]


def test_a_signal_during_validation_is_made_up_for(first, run, monkeypatch) -> None:
    """Also where another one comes while it is made up for."""
    for resume in ([], ["--resume"]):
        with monkeypatch.context() as patch:
            training.interrupt(patch, tasks, "evaluate", 1)
            assert train(run, *TWO, *ALL_DRAWS, *resume) == 143
        assert state(run)[1]["step"] == 11
    assert train(run, *TWO, *ALL_DRAWS, "--resume") == 0
    assert train(run, *TWO, *ALL_DRAWS, "--resume") == 0
    assert_same_end(run, first)


@pytest.mark.long
def test_resume_before_the_first_checkpoint_starts_from_the_beginning(first, run) -> None:
    run.mkdir()
    (run / "config.yaml").write_bytes((first / "config.yaml").read_bytes())
    (run / "metrics.csv").write_text((first / "metrics.csv").read_text()[:700])
    assert train(run, "--resume") == 0
    assert_same_end(run, first)


def test_resume_of_a_finished_run_changes_nothing(first) -> None:
    files = [path for path in first.rglob("*") if path.suffix in (".csv", ".safetensors")]
    before = [path.read_bytes() for path in files]
    assert train(first, "--resume") == 0
    assert [path.read_bytes() for path in files] == before


@pytest.mark.long
def test_a_damaged_checkpoint_is_passed_over(first, run, capsys) -> None:
    shutil.copytree(first, run)
    file = run / "checkpoints" / "step_00000022" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert train(run, "--resume") == 0
    err = capsys.readouterr().err
    assert "step_00000022 is damaged: its checksum is another; the one before it is taken" in err
    assert "goes on from step 11 of 22" in err
    assert_same_end(run, first)


def resumed_from_the_first_epoch(whole, *options: str):
    """A copy of a run without its last checkpoint, which has gone on to the end."""
    run = shutil.copytree(whole, whole.with_name("resumed"))
    shutil.rmtree(run / "checkpoints" / "step_00000022")
    assert train(run, *options, "--resume") == 0
    return run


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "lamb", "adan", "lion"])
def test_other_optimisers_are_resumed_bitwise(tmp_path, optimizer) -> None:
    """Some count steps in their groups, not in the parameters' states."""
    whole, more = tmp_path / "whole", [*TWO, "--optimizer", optimizer, "--clip-grad", "1"]
    assert train(whole, *more) == 0
    assert_same_end(resumed_from_the_first_epoch(whole, *more), whole)


@pytest.mark.long
def test_float16_scales_the_loss_and_counts_skipped_steps(run) -> None:
    """The scaler starts at 2**16, where the first steps overflow."""
    more = [*TWO, "--precision", "float16"]
    assert train(run, *more) == 0
    tensors, facts = state(run)
    skipped = [int(row["skipped_steps"]) for row in rows(run)]
    assert skipped == sorted(skipped)
    counts = {t.item() for name, t in tensors.items() if name.endswith("/step")}
    assert counts == {22 - skipped[-1]}
    assert facts["scaler"]["scale"] == 2.0**16 / 2 ** skipped[-1]
    assert losses(run)[-1] < 2.2
    assert_same_end(resumed_from_the_first_epoch(run, *more), run)


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_saves_stops_and_says_so(run, capsys, monkeypatch) -> None:
    step = loop._Trainer._one_step

    def poisoned(self, batches):
        if self.step == 7:
            batches[0].images[3, 0, 0, 0] = math.nan
        step(self, batches)

    monkeypatch.setattr(loop._Trainer, "_one_step", poisoned)
    assert train(run, *TWO, *ALL_DRAWS) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    tensors, facts = state(run)
    last = losses(run)[-1]
    assert facts["step"] == 7
    assert "the loss of step 8 is nan, learning rate 0.00" in line
    assert line.endswith(f"last finite loss {last:.6g}; the state of step 7 is saved")
    assert all(t.isfinite().all() for t in tensors.values())


OF_FOLDERS = shlex.split("--model poolformer_digits --batch-size 8 --epochs 1 --workers 0")  # 2 steps


def test_requests_that_cannot_be_met(folder, tmp_path, capsys, first) -> None:
    new = tmp_path / "new"

    def line(*options, run=new, data="sample:digits"):
        return refused(capsys, *train_words(run, *options, data=data))

    assert line(run=first).endswith("exists; allowed: a new folder, or --resume to go on with its run")
    assert line("--resume").endswith("has no config.yaml, so there is no run to go on with")
    other = line("--resume", "--model", "poolformer_s12", run=first)
    assert other.startswith("--resume: model is poolformer_s12")
    assert line("--resume", "--lr", "1", run=first).startswith("--resume: lr is 1.0, but the run in")
    assert "is of DATA sample:digits, not" in line("--resume", run=first, data=folder)
    assert "has 16 images; batch_size is 1024" in line(data=folder)
    assert "'poolformer_s13' is no model (did you mean " in line("--model", "poolformer_s13")
    assert "allowed after timm: a name of timm.list_models()" in line("--model", "timm:none")
    assert line("--model", "timm:resnet18").startswith("model timm:resnet18: no block to accelerate")
    assert "cannot be read" in line("--checkpoint", str(folder / "train" / "cat" / "0.jpg"))
    assert "does not exist" in line("--checkpoint", "none.pth")
    assert line("--batch-size", "65", "--mixup", "0.8").endswith("an even number, since pairs are mixed")
    assert line("--batch-size", "64", "--accumulate", "3").endswith("a multiple of processes x accumulate, 3")
    assert line("--fsdp").startswith("fsdp is true; allowed with several processes")
    assert line("--device", "cuda").startswith("device is cuda; ") or torch.cuda.is_available()
    assert line("--optimizer", "fastest").startswith("optimizer fastest: ")
    assert line("--optimizer", "lookahead_adamw").endswith("could not be resumed exactly")
    assert line("--auto-augment", "foo-m9").startswith("auto_augment is 'foo-m9', which timm refuses")
    assert "argument --schedule: invalid choice: 'plateau'" in line("--schedule", "plateau")
    (tmp_path / "c.yaml").write_text("epoch: 3\n")
    assert line("--config", str(tmp_path / "c.yaml")).startswith("'epoch' is not a field of a recipe")
    assert not new.exists()


def test_an_unreadable_image_is_one_line(folder, tmp_path, capsys) -> None:
    (folder / "train" / "dog" / "3.jpg").write_bytes(b"no image")
    options = [*OF_FOLDERS, "--batch-size", "16", "--log-every", "1"]
    for workers in ("0", "1"):
        line = refused(capsys, *train_words(tmp_path / workers, *options, "--workers", workers, data=folder))
        assert line.startswith(f"cannot read image {folder}/train/dog/3.jpg: ")
        assert line.endswith("; --bad-images skip puts its neighbour in its place")
    assert train(tmp_path / "skip", *options, "--bad-images", "skip", "--workers", "1", data=folder) == 0
    assert rows(tmp_path / "skip")[-1]["bad_images"] == "1"


def test_bad_validation_images_are_counted(folder, tmp_path, run, capsys) -> None:
    (folder / "val" / "dog" / "3.jpg").write_bytes(b"no image")
    options = [*OF_FOLDERS, "--epochs", "2", "--bad-images", "skip"]
    assert train(run, *options, data=folder) == 0
    assert rows(run)[-1]["bad_images"] == "1"
    for file in (folder / "val").rglob("*.jpg"):
        file.write_bytes(b"no image")
    line = refused(capsys, *train_words(tmp_path / "none", *options, data=folder))
    assert line.startswith("none of 16 validation images can be read")


def test_a_run_is_not_resumed_on_other_data_or_a_broken_table(folder, run, capsys) -> None:
    assert train(run, *OF_FOLDERS, data=folder) == 0
    table, resume = (run / "metrics.csv").read_text(), train_words(run, "--resume", data=folder)
    (run / "metrics.csv").write_text(table + "no row\n")
    assert "cannot write to" in refused(capsys, *resume)
    (run / "metrics.csv").write_text(table)
    (folder / "train" / "cat" / "0.jpg").unlink()
    line = refused(capsys, *resume)
    assert line.startswith("the data has changed since the checkpoint of step 2: it was 16 and 16 images")


@pytest.mark.long
def test_two_processes_do_not_train_in_one_folder(run, capsys) -> None:
    more = [*TWO, "--epochs", "50"]
    process = started(*training.command(run, *more), stderr=subprocess.PIPE)
    next(line for line in iter(process.stderr.readline, "") if line.startswith("step 1/"))
    try:
        assert refused(capsys, *train_words(run, *more, "--resume")) == f"another process trains in {run}"
    finally:
        process.kill()
        process.communicate()


def test_validate_refuses_what_does_not_fit(folder, tmp_path, capsys, first) -> None:

    def line(weights, *options: str) -> str:
        return refused(capsys, *training.validate_words(weights, folder), *options)

    assert "has 2 classes" in line(first / "best.safetensors")
    torch.save(PoolFormer(DIGITS, num_classes=2).state_dict(), tmp_path / "w.pth")
    assert "does not say which model it is of" in line(tmp_path / "w.pth")
    assert "does not exist" in line("none.pth", "--model", "poolformer_s12")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    assert "bad.safetensors" in line(tmp_path / "bad.safetensors")
