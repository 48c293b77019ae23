"""bench host: its rows and counts on the null GPU, what it prints, and what it says where it cannot run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from null_gpu.counts import INFERENCE, OTHERS, TRAINING
from support.bench import require_bench
from support.peers import require_null_gpu
from support.sandbox import Ran

require_bench()

from poolformer_kernels.benchmarks import bench_host, host_device
from poolformer_kernels.benchmarks.rows import Case

OURS = ("ours", "ours triton", "ours cuda")
BACKENDS = {"ours": "triton", "ours triton": "triton", "ours cuda": "cuda"}  # what auto takes


def by_case_and_provider(rows: list[dict]) -> dict[tuple[str, str, str], dict[str, dict]]:
    """(benchmark, shape, direction): the rows by provider."""
    found: dict = {}
    for row in rows:
        found.setdefault((row["benchmark"], row["shape"], row["direction"]), {})[row["provider"]] = row
    return found


@pytest.mark.long
def test_on_the_null_gpu(sandbox) -> None:
    """As its users start it; the launches are those that the null GPU's own tests ask for."""
    require_null_gpu(extension=True, triton=True)
    command = ["-m", "poolformer_kernels", "bench", "host", "--device", "null"]
    command += ["--models", "s12", "--batch", "2", "--rounds", "2"]
    command += ["--csv", "host.csv", "--json", "host.json"]
    ran = Ran(sandbox.python(*command, COLUMNS="200"), "", Path("host.csv"))
    rows, content = by_case_and_provider(ran.rows), json.loads(Path("host.json").read_text())
    assert content["failed"] == content["unavailable"] == {}

    for direction, counts in (("forward", INFERENCE), ("step", TRAINING)):
        by_provider = rows["host", "3x224x224", direction]
        assert set(by_provider) == {*OURS, "eager"}
        (case,) = (n for n in content["kernels"] if n.startswith(f"host: {direction}, poolformer_s1"))
        for name in OURS:
            expected = counts[BACKENDS[name]]
            others = OTHERS["inference" if direction == "forward" else BACKENDS[name]]
            assert content["kernels"][case][name] == expected
            assert int(by_provider[name]["kernels"]) == sum(expected.values())
            assert int(by_provider[name]["launches"]) - sum(expected.values()) <= others
        assert all(map(host_device._OURS.search, content["kernels"][case]["ours triton"]))  # on a device, too
        assert int(by_provider["eager"]["kernels"]) == 0
        assert int(by_provider["eager"]["launches"]) > int(by_provider["ours"]["launches"])
    for shape, mlp in (("64x56x56", (2, 3)), ("512x7x7", (4, 4))):
        mixer, expected = rows["host_pool_mixer", shape, "forward"], rows["host_mlp", shape, "forward"]
        assert {mixer[name]["kernels"] for name in OURS} == {"2"}
        assert tuple(int(expected[name]["kernels"]) for name in OURS[1:]) == mlp
    for by_provider in rows.values():
        base = by_provider["torch.add_" if "torch.add_" in by_provider else "eager"]
        assert float(base["ratio"]) == 1
        for row in by_provider.values():
            ratio = float(row["median_s"]) / float(base["median_s"])
            assert float(row["ratio"]) == pytest.approx(ratio, 1e-4)
            assert (row["device"], row["dtype"], row["batch"]) == ("Null H200", "bfloat16", "2")
    operators = [by_provider for case, by_provider in rows.items() if "_" in case[0]]
    assert {by_provider["torch.add_"]["launches"] for by_provider in operators} == {"1"}
    text = ran.words
    assert "on the null GPU (Null H200, capability 9.0), which computes nothing: no value is compared" in text
    assert "CPU time of this process, medians of 2 interleaved rounds: only ratios mean something" in text
    for row in content["rows"]:
        assert f"{row['ratio']:.2f}" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("installed", "there is no {folder}/null_gpu"),
        ("compiler", "g++ is not installed"),
        ("cpu-only torch", "this torch has no CUDA"),
        ("broken", "it cannot be built: cc1plus: out of memory"),
    ],
)
def test_one_line_where_there_is_neither_a_device_nor_a_null_gpu(why, message, sandbox, monkeypatch) -> None:
    def broken() -> None:
        raise RuntimeError("g++ -c driver.cpp\nin file\ncc1plus: out of memory\n")

    if why == "installed":
        monkeypatch.setattr(host_device, "_TESTS", sandbox.folder)
    modules = {
        "build": SimpleNamespace(unavailable=lambda: None if why == "broken" else message, build=broken),
        "extension": SimpleNamespace(extension_file=lambda: None),
    }
    monkeypatch.setattr(host_device, "_null_gpu", modules.__getitem__)
    needs = "bench host needs a CUDA device, or in a source tree the null GPU: torch sees no CUDA device, and"
    assert f"{needs} {message.format(folder=sandbox.folder)}" in sandbox.refusal("host", "--models", "s12")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_a_device_that_is_not_there(sandbox) -> None:
    message = "--device cuda: torch sees no CUDA device; allowed here: null"
    assert sandbox.refusal("host", "--device", "cuda").startswith(message)


def test_rounds_are_of_random_order_and_ratios_those_of_medians(monkeypatch) -> None:
    """On a clock of the test's own: each side takes what it says, for each of its repeats."""
    now, order = [0.0], []
    seconds = {"eager": 0.004, "ours": 0.001, "ours cuda": 0.0001}
    monkeypatch.setattr(bench_host.time, "process_time", lambda: now[0])
    monkeypatch.setattr(bench_host.torch.cuda, "synchronize", lambda: None)

    def side(name: str) -> tuple[bench_host.Side, host_device.Launches]:
        def call() -> None:
            now[0] += seconds[name]
            if order[-1:] != [name]:
                order.append(name)

        return bench_host.Side(call, "auto", True), host_device.Launches({"kernel": 3}, 17)

    case = Case("host", (3, 8, 8), "bfloat16", 2, (0, 0), "forward", "poolformer_s12")
    rows = bench_host.measure(case, {name: side(name) for name in seconds}, rounds=30)
    for row in rows:
        assert row.median_s == pytest.approx(seconds[row.provider])
        assert row.ratio == pytest.approx(seconds[row.provider] / 0.004)
        assert (row.launches, row.kernels) == (20, 3)
    assert order[:3] == list(seconds)  # how often a sample repeats each
    assert len({tuple(order[i : i + 3]) for i in range(3, 60, 3)}) > 1
