"""The GPU check's summary: ratios to the fastest peer and fractions of the limits, from known CSV files."""

import csv
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from types import ModuleType

import pytest
from support.peers import require

from poolformer_kernels.cli.main import load_benchmarks


@pytest.fixture(scope="module")
def gpu_summary() -> ModuleType:
    for package in ("matplotlib", "rich"):
        require(package)
    return import_module(".gpu_summary", load_benchmarks().__name__)


def case(benchmark: str, times: dict[str, tuple[float, float]], **other: str) -> list[dict[str, str]]:
    """The rows of a case, (median, fraction) by provider, then a copy of 4300 GB/s and 790 TFLOP/s."""
    common = {
        "benchmark": benchmark,
        "direction": "forward",
        "model": "poolformer_s12",
        "shape": "64x56x56",
        "stage": "1",
        "dtype": "bfloat16",
        "layout": "channels_last",
        "batch": "256",
        "device": "NVIDIA H200",
        "threads": "16",
        "torch": "2.11.0",
        "commit": "abc1234",
    } | other
    rows = []
    for provider, (seconds, fraction) in times.items():
        numbers = {"median_s": seconds, "p20_s": 0.9 * seconds, "p80_s": 1.1 * seconds, "fraction": fraction}
        rows.append(common | {"provider": provider} | {name: str(n) for name, n in numbers.items()})
    limits = {"copy": {"gb_per_s": "4300.4"}, "matmul": {"tflop_per_s": "790.12"}}
    for provider, rate in limits.items():
        rows.append(common | {"provider": provider, "median_s": "1", "fraction": "1"} | rate)
    return rows


@pytest.fixture
def summary_of(gpu_summary, tmp_path) -> Callable[..., list[str]]:
    """The lines of the summary of ``benchmark=[case, ...]``, a file each, empty without cases."""
    from poolformer_kernels.benchmarks.rows import RecordedRow

    def summarise(**benchmarks: list) -> list[str]:
        for name, cases in benchmarks.items():
            with (tmp_path / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, [column.name for column in fields(RecordedRow)], restval="")
                if cases:
                    writer.writeheader()
                writer.writerows(row for rows in cases for row in rows)
        assert gpu_summary.main(["--results", str(tmp_path)]) == 0
        return (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines()

    return summarise


def test_backends_stand_beside_the_fastest_peer(summary_of) -> None:
    mixer = {"ours": (2e-4, 0.8), "ours given": (1e-4, 0.9), "eager": (1.6e-3, 0.1), "compile": (5e-4, 0.32)}
    nchw = case("pool_mixer", mixer | {"compile": (2e-3, 0.08)}, layout="NCHW")
    mlp = {"ours cuda": (1e-3, 0.5), "ours triton": (2e-3, 0.25), "eager": (3e-3, 0.2)}
    mlp["eager linear"] = (5e-4, 1)
    lines = summary_of(pool_mixer=[case("pool_mixer", mixer), nchw], mlp=[case("mlp", mlp)])
    assert lines[0] == "# NVIDIA H200"
    at = lines.index("## Token mixer sub-block")
    assert lines[at + 2].startswith("commit abc1234, torch 2.11.0. ")
    assert lines[at + 4 : at + 10] == [
        "direction forward, model poolformer_s12, stage 1, shape 64x56x56, dtype bfloat16, batch 256",
        "",
        "| layout | fastest peer | ours | ours given | copy GB/s | matmul TFLOP/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| channels_last | compile, 500 us, 32% | 2.50×, 80% | 5.00×, 90% | 4,300 | 790 |",
        "| NCHW | eager, 1.6 ms, 10% | 8.00×, 80% | 16.00×, 90% | 4,300 | 790 |",
    ]
    at = lines.index("## MLP sub-block")
    assert lines[at + 6 : at + 9] == [
        "| fastest peer | ours cuda | ours triton | eager linear | copy GB/s | matmul TFLOP/s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        "| eager, 3 ms, 20% | 3.00×, 50% | 1.50×, 25% | 6.00×, 100% | 4,300 | 790 |",
    ]
    assert lines[lines.index("## Whole model") + 2] == "Not measured."


def test_missing_providers_noise_and_a_peer_fed_another_layout(summary_of) -> None:
    first = case("block", {"ours": (1e-3, 0.5), "eager": (2e-3, 0.25)}, stage="")
    first[1]["layout"] = "NCHW"  # what eager NCHW is fed; the case stays one
    first[0]["p80_s"] = "0.0025"
    lines = summary_of(block=[first, case("block", {"ours": (5e-4, 0.125)}, stage="head")])
    at = lines.index("| stage | fastest peer | ours | copy GB/s | matmul TFLOP/s |")
    assert lines[at + 2 : at + 4] == [
        "| one block | eager, 2 ms, 25% | ~2.00×, 50% | 4,300 | 790 |",
        "| head | - | 500 us, 12% | 4,300 | 790 |",
    ]


def test_images_per_second_beside_eager_and_compile(summary_of) -> None:
    def model(times: dict[str, float], **other: str) -> list[dict[str, str]]:
        rows = case("model", {name: (seconds, 0.5) for name, seconds in times.items()}, stage="", **other)
        for row in rows[:-2]:
            row["img_per_s"] = str(int(row["batch"]) / float(row["median_s"]))
        return rows

    first = model({"ours triton": 4e-3, "ours cuda graphed": 2e-3, "eager": 2e-2, "compile": 8e-3})
    one = model({"ours triton": 1e-3, "eager": 5e-3}, batch="1")
    step = case("training", {"ours": (1e-2, 0.5)}, direction="step")
    step[0]["img_per_s"] = "25600"
    lines = summary_of(model=[first, one], training=[step], mlp=[])  # it was stopped before its first row
    at = lines.index("## Images per second")
    assert lines[at + 2 : at + 11] == [
        "| model | dtype | batch | provider | img/s | times eager | times compile |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
        "| poolformer_s12, inference | bfloat16 | 256 | ours cuda graphed | 128,000 | 10.00× | 4.00× |",
        "| poolformer_s12, inference | bfloat16 | 256 | ours triton | 64,000 | 5.00× | 2.00× |",
        "| poolformer_s12, inference | bfloat16 | 256 | compile | 32,000 | 2.50× | 1.00× |",
        "| poolformer_s12, inference | bfloat16 | 256 | eager | 12,800 | 1.00× | 0.40× |",
        "| poolformer_s12, inference | bfloat16 | 1 | ours triton | 1,000 | 5.00× | - |",
        "| poolformer_s12, inference | bfloat16 | 1 | eager | 200 | 1.00× | - |",
        "| poolformer_s12, training | bfloat16 | 256 | ours | 25,600 | - | - |",
    ]


def test_the_kernels_are_listed(gpu_summary, summary_of, monkeypatch) -> None:
    from poolformer_kernels.cli.kernels import Kernel

    kernel = Kernel("f<bf16>", "sm_90a", 59, 0, 0, 32, 0, 256, 4)
    monkeypatch.setattr(gpu_summary, "kernels", lambda: [kernel])
    lines = summary_of(mlp=[case("mlp", {"ours": (1e-3, 0.5), "eager": (2e-3, 0.25)})])
    at = lines.index("## CUDA kernels")
    assert lines[at + 7].split() == ["f<bf16>", "sm_90a", "59", "0/0", "32", "0", "256", "4", "32/64"]


def test_without_rows_it_says_so(gpu_summary, tmp_path) -> None:
    from poolformer_kernels.cli.errors import CommandError

    (tmp_path / "model.csv").touch()  # of a benchmark that was stopped before its first row
    with pytest.raises(CommandError, match="no CSV file with rows"):
        gpu_summary.main(["--results", str(tmp_path)])
