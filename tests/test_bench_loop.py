"""`bench loop`: what it measures is the training loop's own step, and its file says what each figure is."""

import numpy as np
import pytest
import torch
from support.bench import require_bench
from support.sandbox import Ran
from support.train import require_train

require_train()
require_bench()

from poolformer_kernels.benchmarks import bench_loop


def figures(ran: Ran) -> dict[str, float]:
    return {row["what"]: float(row["value"]) for row in ran.rows}


def test_loop_and_bare_step(sandbox) -> None:
    ran = sandbox.bench("loop", "--only", "loop", "--models", "s12", "--batch", "2")
    found = figures(ran)
    assert found.keys() == {"loop", "bare step", "loop / bare step"}
    assert found["loop / bare step"] == pytest.approx(found["loop"] / found["bare step"], rel=1e-4)
    assert str(ran.file) in ran.out


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
def test_memory_and_scaling(sandbox, monkeypatch) -> None:
    monkeypatch.setattr(bench_loop, "ALTERNATIONS", 1)
    command = ["loop", "--batch", "2", "--memory-batch", "16", "--only"]
    np.ones(1 << 28)  # 2 GiB, more than a step takes: the processes of the benchmark must not count it
    assert 0 < figures(sandbox.bench(*command, "memory"))["peak, ours / eager"] < 0.8
    found = figures(sandbox.bench(*command, "scaling"))
    assert found["gradients exchanged a step"] == pytest.approx(4 * 11_915_176, rel=1e-5)
    assert found["two / ideal"] > 0


def test_a_failing_process_is_one_line(sandbox, monkeypatch) -> None:
    monkeypatch.setattr(bench_loop, "MEMORY", "raise ValueError('no memory today')")
    assert "ValueError: no memory today" in sandbox.refusal("loop", "--only", "memory")
