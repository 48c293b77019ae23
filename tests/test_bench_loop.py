"""`bench loop`: what it measures is the training loop's own step, and its file says what each figure is."""

import csv

import numpy as np
import pytest
import torch
from support.train import require_train

require_train()

from poolformer_kernels.cli import main as cli

cli.load_benchmarks()

from poolformer_kernels.benchmarks import bench_loop

pytestmark = pytest.mark.usefixtures("benchmark_process")


def rows(path) -> dict[str, float]:
    with path.open() as file:
        return {row["what"]: float(row["value"]) for row in csv.DictReader(file)}


def test_loop_and_bare_step(tmp_path, capsys) -> None:
    path = tmp_path / "loop.csv"
    command = ["bench", "loop", "--only", "loop", "--models", "s12", "--batch", "2", "--rounds", "2"]
    assert cli.main([*command, "--threads", "1", "--csv", str(path)]) == 0
    found = rows(path)
    assert found.keys() == {"loop", "bare step", "loop / bare step"}
    assert found["loop / bare step"] == pytest.approx(found["loop"] / found["bare step"], rel=1e-4)
    assert str(path) in capsys.readouterr().out


def test_both_steps_compute_the_same_gradients(tmp_path) -> None:
    """The loop's step and the bare one, from the same weights, on the same draws of stochastic depth."""
    gradients = []
    for name in ("loop", "bare"):
        trainer = bench_loop.make_trainer("poolformer_s12", 2, tmp_path / name, threads=1)
        batch = bench_loop.decoded(2, trainer)
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.0
        if name == "loop":
            trainer._one_step([batch])
        else:
            trainer.depth.set(0, batch.positions)
            bench_loop.bare_step(trainer, batch)()
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert sum(g.abs().sum() for g in gradients[0]) > 0


def test_gradients_of_a_step() -> None:
    assert bench_loop.gradient_bytes("poolformer_s12") == 4 * 11_915_176


@pytest.mark.long
def test_loading(tmp_path) -> None:
    assert bench_loop.measure_loading(tmp_path / "data") > 1


@pytest.mark.long
def test_memory_and_scaling(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench_loop, "ALTERNATIONS", 1)
    path = tmp_path / "loop.csv"
    command = ["bench", "loop", "--batch", "2", "--memory-batch", "16", "--threads", "1", "--csv", str(path)]
    np.ones(1 << 28)  # 2 GiB, more than a step takes: the processes of the benchmark must not count it
    assert cli.main([*command, "--only", "memory"]) == 0
    found = rows(path)
    assert 0 < found["peak, ours / eager"] < 0.8
    assert cli.main([*command, "--only", "scaling"]) == 0
    found = rows(path)
    assert found["gradients exchanged a step"] == pytest.approx(4 * 11_915_176, rel=1e-5)
    assert found["two / ideal"] > 0


def test_a_failing_process_is_one_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_loop, "MEMORY", "raise ValueError('no memory today')")
    path = str(tmp_path / "loop.csv")
    assert cli.main(["bench", "loop", "--only", "memory", "--csv", path]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ValueError: no memory today" in err
