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
from poolformer_kernels.ops import available_backends

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


def test_a_provider_that_fails_is_recorded_and_the_others_go_on(tmp_path, capsys, monkeypatch) -> None:
    from poolformer_kernels.benchmarks import harness, providers

    file = tmp_path / "m.csv"
    seen = []  # lines of the file when a case begins

    def broken(peer, ours, x):
        seen.append(len(file.read_text().splitlines()))
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
    assert lines[1:] == [f"ours cuda: {available_backends()['cuda']}"] or torch.cuda.is_available()
    assert bench(name, *options, "--providers", "eager") == 0


@pytest.mark.parametrize("name", ["pool-mixer", "mlp"])
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
