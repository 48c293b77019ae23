"""What benchmarks write while they run: rows as they come, and why a provider is missing."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import bench
from support.sandbox import Ran

bench.require_bench()

from poolformer_kernels.benchmarks import facts, harness, providers
from poolformer_kernels.benchmarks.rows import Results, Row
from poolformer_kernels.benchmarks.summary import print_summary

from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.cli.main import load_benchmark
from poolformer_kernels.ops import backend_reasons


def test_default_file_and_six_digits(sandbox) -> None:
    case = Row("mlp", "forward", "", "x", "", "float32", "NCHW", 8, "ours", 1 / 3, 0.3, 0.4, *[None] * 5)
    path = facts.csv_path("mlp", "cpu")
    Results(path, facts.facts_of("cpu")).add([case])
    assert path.parent.parent == Path("results")
    (row,) = Ran("", "", path).rows
    assert (row["median_s"], row["batch"], row["error_l2"]) == ("0.333333", "8", "")
    assert row["device"] == facts.processor_name("cpu")


def test_ratios_are_of_calls_in_one_state(capsys, monkeypatch) -> None:
    def group(state: str, rate: float, times: dict[str, float]) -> list[Row]:
        common = {"gb_per_s": 20.0, "tflop_per_s": 1.0, "fraction": 0.5, "rate_tflops": rate, "state": state}
        times = times | {"copy": 1.0, "matmul": 1.0}
        return [bench.row(t, provider=p, **common) for p, t in times.items()]

    monkeypatch.setenv("COLUMNS", "200")
    fast = group("fast", 2.25, {"ours": 0.01, "eager": 0.02})
    slow = group("throttled", 0.6, {"ours": 0.02, "eager": 0.06})
    print_summary([fast, slow], "Model", "a machine", {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fast", "10.0", "20.0", "2.00×", "20", "1", "2.25", "50%"] in lines
    assert ["throttled", "20.0", "60.0", "3.00×", "20", "1", "0.6", "50%"] in lines
    print_summary([group("mixed", 1.0, {"ours": 0.01})], "Model", "a machine", {})
    out = capsys.readouterr().out
    assert "Model: forward, poolformer_s12, 3x224x224, bfloat16, channels_last, batch 8, machine mixed" in out
    assert "mixed: too few calls of each provider in one state" in out


def test_each_number_of_threads_has_its_file(sandbox, monkeypatch) -> None:
    monkeypatch.setattr(harness, "_OWN_THREADS", 2)
    for threads, name in ((2, "model.csv"), (1, "model_threads_1.csv")):
        args = argparse.Namespace(device="cpu", csv=None, threads=threads)
        assert harness.record("model", args).path.name == name
    args.csv = "given.csv"
    assert harness.record("model", args).path == Path("given.csv")


def test_a_provider_that_fails_is_recorded_and_the_others_go_on(sandbox, monkeypatch) -> None:
    file = sandbox.folder / "model.csv"
    seen = []  # lines of the file when a case begins

    def broken(peer, ours, x):
        seen.append(len(file.read_text().splitlines()) if file.exists() else 0)
        if len(x) == 2:
            raise RuntimeError("launch of mlp_fwd: too many resources\nand a stack")
        return lambda: ours(x)

    monkeypatch.setitem(providers.PROVIDERS, "ours", broken)
    monkeypatch.setitem(sys.modules, "openvino", None)
    options = ["--models", "s12", "--dtype", "float32", "--image-size", "32", "--batch", "1", "2"]
    options += ["--json", "model.json", "--providers", "ours", "eager", "openvino"]
    ran = sandbox.bench("model", *options, code=1)
    read = [(row["batch"], row["provider"]) for row in ran.rows]
    others = ["eager", "copy", "matmul"]
    assert read == [("1", "ours"), *(("1", p) for p in others), *(("2", p) for p in others)]
    assert seen == [0, 5]
    reason = "failed: RuntimeError: launch of mlp_fwd: too many resources, model: forward, poolformer_s12"
    assert f"ours: {reason}" in ran.words
    openvino, ours = ran.missing
    assert openvino.startswith("openvino:")
    assert ours.startswith(f"ours: {reason}")
    content = json.loads(Path("model.json").read_text())
    assert list(content["failed"]) == ["ours"]
    assert content["unavailable"]["openvino"].startswith("ModuleNotFoundError: ")
    # a run without failures leaves none behind
    harness.record("model", argparse.Namespace(device="cpu", csv=str(file)))
    assert not file.with_suffix(".missing.txt").exists()


def test_a_lost_device_ends_the_benchmark_with_what_it_has(tmp_path, monkeypatch) -> None:
    """After an illegal access every call of the process fails: no provider behind it is to blame."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    results, reached = Results(tmp_path / "m.csv"), []

    def broken():
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        lost()

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access")

    builders = {"ours": lambda: int, "ours cuda": broken, "eager": lambda: reached.append(1) or int}
    with pytest.raises(CommandError, match="after 'ours cuda' the CUDA device is lost to this process: "):
        harness.working(builders, results, "a case", "cuda")
    assert reached == []
    line = "ours cuda: failed: RuntimeError: CUDA error: an illegal memory access, a case\n"
    assert (tmp_path / "m.missing.txt").read_text() == line


def test_graphs_of_each_backend_run_on_cuda_only() -> None:
    names = ["ours graphed", "ours triton graphed", "ours cuda graphed"]
    results = Results()
    peer, ours = providers.make_pair("poolformer_s12", torch.float32, "cpu")
    x = harness.image(1, (3, 32, 32), "cpu", torch.float32, "channels_last")
    assert providers.prepare(names, peer, ours, x, results).calls == {}
    assert results.missing == dict.fromkeys(names, "it runs on cuda, not on cpu")


OPTIONS = {
    "mlp": ["--batch", "2", "--dtype", "float32"],
    "pool-mixer": ["--batch", "2", "--dtype", "float32", "--layout", "NCHW"],
}


@pytest.fixture
def small(monkeypatch) -> Callable[[str], ModuleType]:
    """An operator's benchmark, of a small map only."""

    def of(name: str) -> ModuleType:
        module = load_benchmark(name)
        monkeypatch.setattr(module, "stages", lambda models: [("poolformer_s12", "4", (16, 5, 7))])
        return module

    return of


@pytest.mark.parametrize("name", OPTIONS)
def test_operators_without_ours_are_measured_all_the_same(name, small, sandbox, monkeypatch) -> None:
    def broken(*args, **options):
        raise RuntimeError("no kernel image")

    module = small(name)
    monkeypatch.setattr(module, "ours", broken)
    monkeypatch.setattr(module, "call_overhead", lambda rounds: {}, raising=False)
    options = [*OPTIONS[name], "--directions", "forward", "--providers", "eager"]
    ran = sandbox.bench(name, *options, "ours", "ours cuda", code=1)
    assert list(ran.by_provider) == ["eager", "copy", "matmul"]
    first, *others = ran.missing
    assert first.startswith("ours: failed: RuntimeError: no kernel image, ")
    assert others == [f"ours cuda: {backend_reasons().get('cuda')}"] or torch.cuda.is_available()
    sandbox.bench(name, *options)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        (
            "mlp",
            {"ours", "eager", "compile", "eager linear", "compile linear"},
            {"ours", "ours saved", "eager", "eager linear", "compile linear"},
        ),
        pytest.param(
            "pool-mixer",
            {"ours", "ours given", "eager", "compile"},
            {"ours", "eager", "compile"},
            marks=pytest.mark.long,
        ),
    ],
    ids=OPTIONS,
)
def test_operators(name, forward, backward, small, sandbox) -> None:
    small(name)
    rows = sandbox.bench(name, *OPTIONS[name]).rows
    for direction, expected in (("forward", forward), ("backward", backward)):
        found = {row["provider"] for row in rows if row["direction"] == direction}
        assert found == expected | {"copy", "matmul"}
