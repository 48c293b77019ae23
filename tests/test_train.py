"""Runs of `poolformer-kernels train` and `validate` in one process: what they write, repeat and refuse."""

import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from support.train import (
    ALL_DRAWS,
    SMALL,
    command,
    differing,
    environment,
    in_processes,
    losses,
    make_folder,
    require_train,
    state,
    train,
)

require_train()

import timm
from safetensors import safe_open
from safetensors.torch import load_file

from poolformer_kernels.accelerate import unfused_reasons
from poolformer_kernels.cli.main import main
from poolformer_kernels.models import PoolFormer, load_checkpoint
from poolformer_kernels.models.checkpoints import read_checkpoint
from poolformer_kernels.models.export import read_weights
from poolformer_kernels.nn import DropPath
from poolformer_kernels.train import loop, tasks
from poolformer_kernels.train.data import open_data
from poolformer_kernels.train.networks import DIGITS, StochasticDepth, build
from poolformer_kernels.train.processes import Processes
from poolformer_kernels.train.recipe import RecipeError, resolve

TWO = [*SMALL, "--epochs", "2", "--cooldown-epochs", "0", "--warmup-epochs", "1"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Two epochs with every draw on."""
    run = tmp_path_factory.mktemp("first") / "run"
    assert train(run, *TWO, *ALL_DRAWS) == 0
    return run


def error_of(capsys, *options: str, run, data: str = "sample:digits") -> str:
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert train(run, *options, data=data) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("poolformer-kernels: error: ")
    return err.removeprefix("poolformer-kernels: error: ").strip()


# ---- what a run leaves -------------------------------------------------------------------------------------


def test_what_a_run_holds(first) -> None:
    names = {"config.yaml", "metrics.csv", "curves.png", "index.html", "checkpoints", "best.safetensors"}
    assert {p.name for p in first.iterdir()} - {"tensorboard", ".lock"} == names
    assert sorted(p.name for p in (first / "checkpoints").iterdir()) == ["step_00000011", "step_00000022"]
    with (first / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 23))
    assert [row["step"] for row in rows if row["val_top1"]] == ["11", "22"]
    assert all(row["ema_top1"] for row in rows if row["val_top1"])
    assert all(float(row["train_loss"]) > 0 and float(row["memory_mb"]) > 50 for row in rows)
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert config["data"] == "sample:digits"
    assert (config["ema"], config["drop_path"], config["lr"]) == (0.9, 0.3, 0.032 * 128 / 1024)
    page = (first / "index.html").read_text()
    assert "poolformer_digits" in page
    assert page.count("<figure") == 24


def test_the_learning_rate_warms_up_and_falls(first) -> None:
    with (first / "metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    top = rates.index(max(rates))
    assert rates[0] == pytest.approx(1e-5)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 8 <= top <= 12


def test_the_best_weights_have_official_names_and_say_what_they_are(first) -> None:
    with safe_open(first / "best.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["poolformer_kernels"])
    assert notes["model"] == "poolformer_digits"
    assert notes["classes"] == [str(i) for i in range(10)]
    model = PoolFormer(DIGITS, num_classes=10)
    model.load_state_dict(load_file(first / "best.safetensors"))  # strict
    tensors, facts = state(first)
    assert notes["top1"] == facts["totals"]["best"]
    assert notes["step"] == facts["totals"]["best_step"]
    if notes["step"] == 22:  # the moving average's, not the model's
        weights = {f"ema/{name}": t for name, t in load_file(first / "best.safetensors").items()}
        assert differing(weights, {k: v for k, v in tensors.items() if k.startswith("ema/")}) == []


@pytest.mark.parametrize("options", [["--head", "timm"], ["--head", "official"], ["--eager"]], ids=str)
def test_the_best_weights_are_evaluated_with_the_head_they_were_trained_with(tmp_path, options) -> None:
    run = tmp_path / "run"
    assert train(run, *TWO, "--epochs", "1", "--warmup-epochs", "0", *options) == 0
    model = PoolFormer(DIGITS, num_classes=10)
    report = load_checkpoint(model, run / "best.safetensors")
    assert report.head_mode == model.head_mode == ("official" if "official" in options else "timm")
    assert read_weights(read_checkpoint(run / "best.safetensors")).head_noted
    assert (run / "best.safetensors").stat().st_mode & 0o777 == (run / "metrics.csv").stat().st_mode & 0o777


def test_validate_measures_what_the_run_measured(first, capsys) -> None:
    capsys.readouterr()
    best = str(first / "best.safetensors")
    command = ["validate", "sample:digits", "--checkpoint", best, "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with safe_open(best, "pt") as file:
        notes = json.loads(file.metadata()["poolformer_kernels"])
    assert found["top1"] == pytest.approx(notes["top1"], abs=1e-9)
    assert (found["images"], found["image_size"], found["crop_pct"]) == (360, 32, 1.0)
    assert found["images_per_second"] > 0
    assert main(command) == 0
    assert f"top-1 {notes['top1']:.2f} %" in capsys.readouterr().out


# ---- the same again ----------------------------------------------------------------------------------------


def test_the_config_repeats_the_run_bitwise(first, tmp_path) -> None:
    """In a process of its own, whose images two workers load."""
    in_processes(tmp_path / "run", "--config", str(first / "config.yaml"), "--workers", "2")
    assert differing(state(first)[0], state(tmp_path / "run")[0]) == []
    assert losses(first) == losses(tmp_path / "run")


@pytest.mark.long
def test_another_seed_is_another_run(first, tmp_path) -> None:
    assert train(tmp_path / "run", *TWO, *ALL_DRAWS, "--seed", "1") == 0
    assert losses(first) != losses(tmp_path / "run")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=str
)
def test_a_signal_lets_the_step_end_and_the_state_be_saved(first, tmp_path, number) -> None:
    run = tmp_path / "run"
    more = [*TWO, *ALL_DRAWS, "--save-every", "100", "--workers", "2"]
    process = subprocess.Popen(
        command(run, *more), env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    lines = iter(process.stderr.readline, "")
    seen = next(line for line in lines if line.startswith("step 5/"))
    os.killpg(process.pid, number)  # the processes that load images get it, too
    rest = process.stderr.read()
    assert process.wait(60) == 128 + number, seen + rest
    assert "stopped by a signal after step" in rest
    _, facts = state(run)
    assert 5 <= facts["step"] < 22
    assert train(run, *more, "--resume") == 0
    assert differing(state(first)[0], state(run)[0]) == []
    assert losses(first) == losses(run)


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch) -> None:
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


def test_a_signal_during_validation_is_made_up_for(first, tmp_path, monkeypatch) -> None:
    """Also where another one comes while it is made up for."""
    run, evaluate = tmp_path / "run", tasks.evaluate

    def interrupted(*args, **options):
        monkeypatch.setattr(tasks, "evaluate", evaluate)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    for resume in ([], ["--resume"]):
        monkeypatch.setattr(tasks, "evaluate", interrupted)
        assert train(run, *TWO, *ALL_DRAWS, *resume) == 143
        assert state(run)[1]["step"] == 11
    assert train(run, *TWO, *ALL_DRAWS, "--resume") == 0
    assert train(run, *TWO, *ALL_DRAWS, "--resume") == 0
    assert differing(state(first)[0], state(run)[0]) == []
    with (run / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["val_top1"]] == ["11", "22"]
    assert losses(first) == losses(run)


@pytest.mark.long
def test_resume_before_the_first_checkpoint_starts_from_the_beginning(first, tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes((first / "config.yaml").read_bytes())
    (run / "metrics.csv").write_text((first / "metrics.csv").read_text()[:700])
    assert train(run, "--resume") == 0
    assert differing(state(first)[0], state(run)[0]) == []
    assert losses(first) == losses(run)


def test_resume_of_a_finished_run_changes_nothing(first) -> None:
    before = {
        p: p.read_bytes() for p in first.rglob("*") if p.is_file() and p.suffix in (".csv", ".safetensors")
    }
    assert train(first, "--resume") == 0
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.long
def test_a_damaged_checkpoint_is_passed_over(first, tmp_path, capsys) -> None:
    run = shutil.copytree(first, tmp_path / "run")
    file = run / "checkpoints" / "step_00000022" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert train(run, "--resume") == 0
    err = capsys.readouterr().err
    assert "step_00000022 is damaged: its checksum is another; the one before it is taken" in err
    assert "goes on from step 11 of 22" in err
    assert differing(state(first)[0], state(run)[0]) == []


@pytest.mark.long
def test_micro_batches_give_the_whole_batchs_step(first, tmp_path) -> None:
    run = tmp_path / "run"
    assert train(run, *TWO, *ALL_DRAWS, "--accumulate", "4") == 0
    a, b = losses(first), losses(run)
    assert max(abs(x - y) for x, y in zip(a[:5], b[:5], strict=True)) < 1e-4
    assert a != b


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "lamb", "adan", "lion"])
def test_other_optimisers_are_resumed_bitwise(tmp_path, optimizer) -> None:
    """Some count steps in their groups, not in the parameters' states."""
    more = [*TWO, "--optimizer", optimizer, "--clip-grad", "1"]
    assert train(tmp_path / "whole", *more) == 0
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step_00000022")
    assert train(run, *more, "--resume") == 0
    assert differing(state(tmp_path / "whole")[0], state(run)[0]) == []
    assert losses(tmp_path / "whole") == losses(run)


def trainer(run, **changes):
    """A run of the digits that has not begun."""
    recipe = resolve("paper", {"model": "poolformer_digits", "batch_size": 128, "workers": 0, **changes})
    data, processes = open_data("sample:digits"), Processes(0, 1, torch.device("cpu"))
    recipe = loop.check(recipe, data, run, False, processes)
    made = loop._Trainer(recipe, data, run, processes, loop._Signals(torchrun=False), show=False)
    made.open()
    return made


def test_learning_rates_of_the_papers_schedule(tmp_path) -> None:
    """Warm-up over 5 epochs from 1e-6, cosine per epoch to 1e-5 at 300, then 10 epochs there."""
    made, top = trainer(tmp_path / "run"), 1e-3 * 128 / 1024
    assert made.steps == 11 * 310
    for epoch in (0, 1, 4, 5, 6, 150, 299, 300, 309):
        expected = 1e-5
        if epoch < 5:
            expected = 1e-6 + (top - 1e-6) * epoch / 5
        elif epoch < 300:
            expected = 1e-5 + (top - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2
        for step in (11 * epoch, 11 * epoch + 10):
            made.set_rate(step)
            assert {group["lr"] for group in made.optimizer.param_groups} == {made.rate}
            assert made.rate == pytest.approx(expected, rel=1e-9), epoch


def test_one_dimensional_parameters_do_not_decay(tmp_path) -> None:
    made = trainer(tmp_path / "run")
    decay = {id(p): group["weight_decay"] for group in made.optimizer.param_groups for p in group["params"]}
    named = dict(made.model.named_parameters())
    assert len(decay) == len(named)
    assert all(decay[id(p)] == (0.0 if p.dim() == 1 else 0.05) for p in named.values())
    assert {p.dim() for p in named.values()} == {1, 2, 4}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_has_the_gradient_of_the_mean_loss_clipped(tmp_path, accumulate) -> None:
    """Against the same batch at once, written by hand."""
    made = trainer(
        tmp_path / "run", accumulate=accumulate, clip_grad=0.01, precision="float32", drop_path=0.3
    )
    batches = list(itertools.islice(made.task.loader(0), accumulate))
    weights = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.optimizer.param_groups[0]["lr"] = made.optimizer.param_groups[1]["lr"] = 0.0
    made._one_step(batches)
    clipped = {name: p.grad.clone() for name, p in made.model.named_parameters()}
    norm = sum(g.double().square().sum() for g in clipped.values()).sqrt().item()
    assert norm == pytest.approx(0.01, rel=1e-4)

    assert all(p.equal(weights[name]) for name, p in made.model.named_parameters())
    whole = trainer(tmp_path / "whole", precision="float32", drop_path=0.3)
    images, targets = (torch.cat([getattr(b, what) for b in batches]) for what in ("images", "targets"))
    whole.depth.set(0, list(range(128)))
    logits = whole.model(images.contiguous(memory_format=torch.channels_last))
    (-(targets * logits.log_softmax(1)).sum(1).mean()).backward()
    exact = {name: p.grad for name, p in whole.model.named_parameters()}
    size = sum(g.double().square().sum() for g in exact.values()).sqrt().item()
    for name, g in exact.items():
        difference = (clipped[name] * (size / norm) - g).norm().item()
        assert difference <= 1e-5 * size, name


# ---- precision, eager, other models ------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_our_layers_follow_eagers_losses(tmp_path, precision) -> None:
    more = [*TWO, "--epochs", "1", "--warmup-epochs", "0", "--precision", precision, "--head", "timm"]
    more += ["--drop-path", "0.3"]
    assert train(tmp_path / "ours", *more) == 0
    assert train(tmp_path / "eager", *more, "--eager") == 0
    pairs = list(zip(losses(tmp_path / "ours"), losses(tmp_path / "eager"), strict=True))
    assert pairs[0][0] == pytest.approx(pairs[0][1], rel=1e-5 if precision == "float32" else 1e-2)
    mean = sum(abs(a - b) for a, b in pairs) / len(pairs)
    assert mean < (2e-3 if precision == "float32" else 2e-2)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_hundred_steps_are_as_far_from_eagers_as_eagers_on_other_threads(tmp_path, precision) -> None:
    """The mean distance of the losses; threads change how eager rounds, and nothing else."""
    more = [*SMALL, "--batch-size", "64", "--epochs", "5", "--cooldown-epochs", "0", "--head", "timm"]
    more += ["--precision", precision]
    found = {}
    for name, threads in (("ours", 1), ("eager", 1), ("rounding", 2)):
        in_processes(tmp_path / name, *more, *["--eager"] * (name != "ours"), threads=threads)
        found[name] = losses(tmp_path / name)[:100]

    def distance(name: str) -> float:
        return sum(abs(a - b) for a, b in zip(found[name], found["eager"], strict=True)) / 100

    assert len(found["ours"]) == 100
    assert found["ours"] != found["eager"]
    assert distance("ours") <= 2 * distance("rounding") + 1e-3, (distance("ours"), distance("rounding"))


@pytest.mark.long
def test_float16_scales_the_loss_and_counts_skipped_steps(tmp_path) -> None:
    """The scaler starts at 2**16, where the first steps overflow."""
    assert train(tmp_path / "run", *TWO, "--precision", "float16") == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    tensors, facts = state(tmp_path / "run")
    skipped = [int(row["skipped_steps"]) for row in rows]
    assert skipped == sorted(skipped)
    counts = {t.item() for name, t in tensors.items() if name.endswith("/step")}
    assert counts == {22 - skipped[-1]}
    assert facts["scaler"]["scale"] == 2.0**16 / 2 ** skipped[-1]
    assert float(rows[-1]["train_loss"]) < 2.2
    run = shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(run / "checkpoints" / "step_00000022")
    assert train(run, *TWO, "--precision", "float16", "--resume") == 0
    assert differing(state(run)[0], tensors) == []
    assert state(run)[1]["scaler"] == facts["scaler"]


def test_timms_models_are_accelerated(tmp_path) -> None:
    folder = make_folder(tmp_path / "d", images=8)
    options = [
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--image-size",
        "32",
        "--workers",
        "0",
        "--log-every",
        "1",
    ]
    assert train(tmp_path / "run", *options, "--model", "timm:poolformerv2_s12", data=str(folder)) == 0
    assert len(losses(tmp_path / "run")) == 2
    weights = load_file(tmp_path / "run" / "best.safetensors")
    assert "patch_embed.proj.weight" in weights  # official names
    recipe = resolve("paper", {"model": "timm:poolformerv2_s12", "drop_path": 0.2})
    model = build(recipe, 2)
    assert type(model.stages[0].blocks[1].drop_path1) is DropPath
    best = str(tmp_path / "run" / "best.safetensors")
    assert main(["validate", str(folder), "--checkpoint", best, "--device", "cpu"]) == 0
    assert all(unfused_reasons(block) == (None, None) for stage in model.stages for block in stage.blocks)


def test_a_checkpoint_of_another_number_of_classes_keeps_its_body(tmp_path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("poolformer_s12", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    recipe = resolve("finetune", {"checkpoint": str(tmp_path / "timm.pth")})
    model = build(recipe, 3)
    assert model.head.weight.shape == (3, 512)
    assert model.num_classes == 3
    assert model.head_mode == "timm"  # that of the file
    assert build(replace(recipe, head="official"), 3).head_mode == "official"
    with pytest.raises(RecipeError, match="has 7 classes, the data 3"):
        build(recipe, 3, new_classifier=False)
    assert model.patch_embed.proj.weight.equal(source.stem.conv.weight)
    assert model.network[6][1].mlp.fc2.weight.equal(source.stages[3].blocks[1].mlp.fc2.weight)
    plain = build(resolve("finetune", {"checkpoint": str(tmp_path / "timm.pth"), "eager": True}), 7)
    assert plain.head.fc.weight.equal(source.head.fc.weight)


def test_draws_of_stochastic_depth_are_of_step_and_position() -> None:
    recipe = resolve("small", {"drop_path": 0.4, "batch_size": 64})
    model = build(recipe, 10)
    paths = [m for m in model.modules() if isinstance(m, DropPath)]
    assert [round(m.drop_prob, 2) for m in paths] == [0.1, 0.2, 0.3, 0.4]

    def scales(step: int, positions: list[int]) -> torch.Tensor:
        depth = StochasticDepth(model, recipe, len(positions), torch.device("cpu"))
        depth.set(step, positions)
        x = torch.ones(len(positions), 1, 1, 1)
        return torch.stack([m(x).flatten() for m in paths for _ in range(2)])

    model.train()
    whole = scales(3, list(range(64)))
    assert whole[:, 10:20].equal(scales(3, list(range(10, 20))))
    assert not whole.equal(scales(4, list(range(64))))
    assert not whole[0].equal(whole[1])  # the two sub-blocks of a block
    kept = torch.cat([scales(step, list(range(64))) for step in range(200)], 1)
    expected = torch.tensor([m.drop_prob for m in paths for _ in range(2)])
    assert ((kept == 0).float().mean(1) - expected).abs().max() < 0.02
    assert (kept.mean(1) - 1).abs().max() < 0.04


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_saves_stops_and_says_so(tmp_path, capsys, monkeypatch) -> None:
    run, step = tmp_path / "run", loop._Trainer._one_step

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


def test_requests_that_cannot_be_met(tmp_path, capsys, first) -> None:
    new = tmp_path / "new"
    folder = make_folder(tmp_path / "d")

    def line(*options, run=new, data="sample:digits"):
        return error_of(capsys, *options, run=run, data=data)

    assert line(run=first).endswith("exists; allowed: a new folder, or --resume to go on with its run")
    assert line("--resume").endswith("has no config.yaml, so there is no run to go on with")
    assert line("--resume", "--model", "poolformer_s12", run=first).startswith(
        "--resume: model is poolformer_s12"
    )
    assert line("--resume", "--lr", "1", run=first).startswith("--resume: lr is 1.0, but the run in")
    assert "is of DATA sample:digits, not" in line("--resume", run=first, data=str(folder))
    assert "has 12 images; batch_size is 1024" in line(data=str(folder))
    assert "'poolformer_s13' is no model (did you mean " in line("--model", "poolformer_s13")
    assert "allowed after timm: a name of timm.list_models()" in line("--model", "timm:none")
    assert line("--model", "timm:resnet18").startswith("model timm:resnet18: no block to accelerate")
    assert "cannot be read" in line("--checkpoint", str(tmp_path / "d" / "train" / "cat" / "0.jpg"))
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


def test_an_unreadable_image_is_one_line(tmp_path, capsys) -> None:
    folder = make_folder(tmp_path / "d", images=8)
    (folder / "train" / "dog" / "3.jpg").write_bytes(b"no image")
    options = ["--batch-size", "16", "--epochs", "1", "--model", "poolformer_digits", "--log-every", "1"]
    for workers in ("0", "1"):
        line = error_of(capsys, *options, "--workers", workers, run=tmp_path / workers, data=str(folder))
        assert line.startswith(f"cannot read image {folder}/train/dog/3.jpg: ")
        assert line.endswith("; --bad-images skip puts its neighbour in its place")
    assert train(tmp_path / "skip", *options, "--bad-images", "skip", "--workers", "1", data=str(folder)) == 0
    with (tmp_path / "skip" / "metrics.csv").open() as file:
        assert [row["bad_images"] for row in csv.DictReader(file)][-1] == "1"


def test_bad_validation_images_are_counted(tmp_path, capsys) -> None:
    folder = make_folder(tmp_path / "d", images=8)
    (folder / "val" / "dog" / "3.jpg").write_bytes(b"no image")
    options = ["--batch-size", "8", "--epochs", "2", "--model", "poolformer_digits", "--workers", "0"]
    assert train(tmp_path / "run", *options, "--bad-images", "skip", data=str(folder)) == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert [row["bad_images"] for row in csv.DictReader(file)][-1] == "1"
    for file in (folder / "val").rglob("*.jpg"):
        file.write_bytes(b"no image")
    line = error_of(capsys, *options, "--bad-images", "skip", run=tmp_path / "none", data=str(folder))
    assert line.startswith("none of 16 validation images can be read")


def test_a_run_is_not_resumed_on_other_data_or_a_broken_table(tmp_path, capsys) -> None:
    folder, run = make_folder(tmp_path / "d", images=8), tmp_path / "run"
    options = ["--batch-size", "8", "--epochs", "1", "--model", "poolformer_digits", "--workers", "0"]
    assert train(run, *options, data=str(folder)) == 0
    with (run / "metrics.csv").open("a") as file:
        file.write("no row\n")
    assert "cannot write to" in error_of(capsys, "--resume", run=run, data=str(folder))
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text.removesuffix("no row\n"))
    (folder / "train" / "cat" / "0.jpg").unlink()
    line = error_of(capsys, "--resume", run=run, data=str(folder))
    assert line.startswith("the data has changed since the checkpoint of step 2: it was 16 and 16 images")


@pytest.mark.long
def test_two_processes_do_not_train_in_one_folder(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    more = [*TWO, "--epochs", "50"]
    process = subprocess.Popen(command(run, *more), env=environment(), stderr=subprocess.PIPE, text=True)
    next(line for line in iter(process.stderr.readline, "") if line.startswith("step 1/"))
    try:
        assert error_of(capsys, *more, "--resume", run=run) == f"another process trains in {run}"
    finally:
        process.kill()
        process.communicate()


def test_validate_refuses_what_does_not_fit(tmp_path, capsys, first) -> None:
    def line(*arguments) -> str:
        capsys.readouterr()
        assert main(["validate", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    best = str(first / "best.safetensors")
    folder = str(make_folder(tmp_path / "d"))
    assert "has 2 classes" in line(folder, "--checkpoint", best)
    torch.save(PoolFormer(DIGITS, num_classes=2).state_dict(), tmp_path / "w.pth")
    assert "does not say which model it is of" in line(folder, "--checkpoint", str(tmp_path / "w.pth"))
    assert "does not exist" in line(folder, "--checkpoint", "none.pth", "--model", "poolformer_s12")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    assert "bad.safetensors" in line(folder, "--checkpoint", str(tmp_path / "bad.safetensors"))


def test_without_the_extra_it_is_one_line() -> None:
    program = """
import sys
sys.modules["yaml"] = None
from poolformer_kernels.cli.main import main
sys.exit(main(["train", "x", "--out", "y"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'poolformer_kernels[train]'" in done.stderr
