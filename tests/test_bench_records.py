"""What benchmarks write while they run: rows as they come, and why a provider is missing."""

import argparse
import csv
import importlib
import json
import sys

import pytest
import torch
from test_bench import MEASURED, bench, rows

from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.ops import backend_reasons

pytestmark = pytest.mark.usefixtures("benchmark_process")


def test_default_file_and_six_digits(tmp_path) -> None:
    from poolformer_kernels.benchmarks import facts
    from poolformer_kernels.benchmarks.rows import Results, Row

    values = dict.fromkeys(MEASURED, "x") | {"median_s": 1 / 3, "batch": 8, "error_l2": None}
    path = facts.csv_path("mlp", "cpu")
    Results(path, facts.facts_of("cpu")).add([Row(**values)])
    assert path.parent.parent == tmp_path / "results"
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["median_s"], row["batch"], row["error_l2"]) == ("0.333333", "8", "")
    assert row["device"] == facts.processor_name("cpu")


def test_ratios_are_of_calls_in_one_state(capsys, monkeypatch) -> None:
    from poolformer_kernels.benchmarks.rows import Row
    from poolformer_kernels.benchmarks.summary import print_summary

    def group(state: str, rate: float, times: dict[str, float]) -> list[Row]:
        common = dict.fromkeys(MEASURED, "") | {"model": "s12", "batch": 8, "error_l2": None, "state": state}
        common |= {"gb_per_s": 20.0, "tflop_per_s": 1.0, "fraction": 0.5, "rate_tflops": rate}
        times = times | {"copy": 1.0, "matmul": 1.0}
        spread = [{"provider": p, "median_s": t, "p20_s": t, "p80_s": t} for p, t in times.items()]
        return [Row(**common | fields) for fields in spread]

    monkeypatch.setenv("COLUMNS", "200")
    fast = group("fast", 2.25, {"ours": 0.01, "eager": 0.02})
    slow = group("throttled", 0.6, {"ours": 0.02, "eager": 0.06})
    print_summary([fast, slow], "Model", "a machine", {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fast", "10.0", "20.0", "2.00×", "20", "1", "2.25", "50%"] in lines
    assert ["throttled", "20.0", "60.0", "3.00×", "20", "1", "0.6", "50%"] in lines
    print_summary([group("mixed", 1.0, {"ours": 0.01})], "Model", "a machine", {})
    out = capsys.readouterr().out
    assert "Model: s12, batch 8, machine mixed" in out
    assert "mixed: too few calls of each provider in one state" in out


def test_each_number_of_threads_has_its_file(monkeypatch, tmp_path) -> None:
    from poolformer_kernels.benchmarks import harness

    monkeypatch.setattr(harness, "_OWN_THREADS", 2)
    for threads, name in ((2, "model.csv"), (1, "model_threads_1.csv")):
        args = argparse.Namespace(device="cpu", csv=None, threads=threads)
        assert harness.record("model", args).path.name == name
    args.csv = str(tmp_path / "given.csv")
    assert harness.record("model", args).path.name == "given.csv"


def test_a_provider_that_fails_is_recorded_and_the_others_go_on(tmp_path, capsys, monkeypatch) -> None:
    from poolformer_kernels.benchmarks import harness, providers

    file = tmp_path / "m.csv"
    seen = []  # lines of the file when a case begins

    def broken(peer, ours, x):
        seen.append(len(file.read_text().splitlines()) if file.exists() else 0)
        if len(x) == 2:
            raise RuntimeError("launch of mlp_fwd: too many resources\nand a stack")
        return lambda: ours(x)

    monkeypatch.setitem(providers.PROVIDERS, "ours", broken)
    options = ["--models", "s12", "--dtype", "float32", "--image-size", "32", "--csv", str(file)]
    options += ["--json", str(tmp_path / "m.json"), "--providers", "ours", "eager", "openvino"]
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert bench("model", "--batch", "1", "2", *options) == 1
    with file.open(newline="") as stream:
        read = [(row["batch"], row["provider"]) for row in csv.DictReader(stream)]
    limits = ("copy", "matmul")
    assert read == [("1", p) for p in ("ours", "eager", *limits)] + [("2", p) for p in ("eager", *limits)]
    assert seen == [0, 5]
    reason = "failed: RuntimeError: launch of mlp_fwd: too many resources, model: forward, poolformer_s12"
    assert f"ours: {reason}" in " ".join(capsys.readouterr().out.split())
    lines = (tmp_path / "m.missing.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["openvino", "ours"]
    assert lines[1].startswith(f"ours: {reason}")
    content = json.loads((tmp_path / "m.json").read_text())
    assert list(content["failed"]) == ["ours"]
    assert content["unavailable"]["openvino"].startswith("ModuleNotFoundError: ")
    # a run without failures leaves none behind
    monkeypatch.setitem(providers.PROVIDERS, "ours", lambda peer, ours, x: lambda: ours(x))
    args = argparse.Namespace(device="cpu", csv=str(file))
    harness.record("model", args)
    assert not (tmp_path / "m.missing.txt").exists()


def test_a_lost_device_ends_the_benchmark_with_what_it_has(tmp_path, monkeypatch) -> None:
    """After an illegal access every call of the process fails: no provider behind it is to blame."""
    from poolformer_kernels.benchmarks import harness
    from poolformer_kernels.benchmarks.rows import Results

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    results, reached = Results(tmp_path / "m.csv"), []

    def broken():
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        raise RuntimeError("CUDA error: an illegal memory access")

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access")

    builders = {"ours": lambda: int, "ours cuda": broken, "eager": lambda: reached.append(1) or int}
    with pytest.raises(CommandError, match="after 'ours cuda' the CUDA device is lost to this process: "):
        harness.working(builders, results, "a case", "cuda")
    assert reached == []
    line = "ours cuda: failed: RuntimeError: CUDA error: an illegal memory access, a case\n"
    assert (tmp_path / "m.missing.txt").read_text() == line


def test_graphs_of_each_backend_run_on_cuda_only() -> None:
    from poolformer_kernels.benchmarks import harness, providers
    from poolformer_kernels.benchmarks.rows import Results

    names = ["ours graphed", "ours triton graphed", "ours cuda graphed"]
    results = Results()
    peer, ours = providers.make_pair("poolformer_s12", torch.float32, "cpu")
    x = harness.image(1, (3, 32, 32), "cpu", torch.float32, "channels_last")
    assert providers.prepare(names, peer, ours, x, results).calls == {}
    assert results.missing == dict.fromkeys(names, "it runs on cuda, not on cpu")


@pytest.mark.parametrize("name", ["pool-mixer", "mlp"])
def test_operators_without_ours_are_measured_all_the_same(name, tmp_path, monkeypatch) -> None:
    def broken(*args, **options):
        raise RuntimeError("no kernel image")

    module = importlib.import_module(f"poolformer_kernels.benchmarks.bench_{name.replace('-', '_')}")
    monkeypatch.setattr(module, "ours", broken)
    monkeypatch.setattr(module, "call_overhead", lambda rounds: {}, raising=False)
    monkeypatch.setattr(module, "stages", lambda models: [("poolformer_s12", "4", (16, 5, 7))])
    file = tmp_path / "o.csv"
    options = ["--batch", "2", "--dtype", "float32", "--directions", "forward", "--csv", str(file)]
    options += ["--layout", "NCHW"] if name == "pool-mixer" else []
    assert bench(name, *options, "--providers", "ours", "ours cuda", "eager") == 1
    assert list(rows(file)) == ["eager", "copy", "matmul"]
    lines = (tmp_path / "o.missing.txt").read_text().splitlines()
    assert lines[0].startswith("ours: failed: RuntimeError: no kernel image, ")
    assert lines[1:] == [f"ours cuda: {backend_reasons().get('cuda')}"] or torch.cuda.is_available()
    assert bench(name, *options, "--providers", "eager") == 0


@pytest.mark.parametrize("name", [pytest.param("pool-mixer", marks=pytest.mark.long), "mlp"])
def test_operators(name, tmp_path, monkeypatch) -> None:
    module = importlib.import_module(f"poolformer_kernels.benchmarks.bench_{name.replace('-', '_')}")
    monkeypatch.setattr(module, "stages", lambda models: [("poolformer_s12", "4", (16, 5, 7))])
    options = ["--batch", "2", "--dtype", "float32", "--csv", str(tmp_path / "o.csv")]
    assert bench(name, *options, *(["--layout", "NCHW"] if name == "pool-mixer" else [])) == 0
    with (tmp_path / "o.csv").open(newline="") as file:
        found = {(row["direction"], row["provider"]) for row in csv.DictReader(file)}
    forward, backward = (
        {provider for way, provider in found if way == direction} - {"copy", "matmul"}
        for direction in ("forward", "backward")
    )
    if name == "mlp":
        assert forward == {"ours", "eager", "compile", "eager linear", "compile linear"}
        assert backward == {"ours", "ours saved", "eager", "eager linear", "compile linear"}
    else:
        assert forward == {"ours", "ours given", "eager", "compile"}
        assert backward == {"ours", "eager", "compile"}
