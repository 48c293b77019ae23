"""The benchmarks: what their CSV holds, what they refuse, and that they find themselves."""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.accelerate import blocks_of
from support.chain import Calls

import poolformer_kernels as pk
from poolformer_kernels.accelerate import unfused_reasons
from poolformer_kernels.cli import main as cli
from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.profiling import LimitProbes, count_macs
from poolformer_kernels.profiling import limits as limits_module
from poolformer_kernels.profiling.states import RateProbe
from poolformer_kernels.profiling.throughput import Sample

HEADER = (
    "benchmark,direction,model,shape,stage,dtype,layout,batch,provider,median_s,p20_s,p80_s,img_per_s,"
    "gb_per_s,tflop_per_s,fraction,error_l2,rate_tflops,state,device,threads,torch,commit"
)
MEASURED = HEADER.split(",")[:19]


pytestmark = pytest.mark.usefixtures("benchmark_process")


def bench(name: str, *arguments: str) -> int:
    return cli.main(["bench", name, "--device", "cpu", "--threads", "1", "--rounds", "2", *arguments])


def rows(path: Path) -> dict[str, dict[str, str]]:
    """By provider."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert ",".join(reader.fieldnames) == HEADER
        return {row["provider"]: row for row in reader}


def test_model(tmp_path, capsys) -> None:
    import timm

    files = ["--csv", str(tmp_path / "m.csv"), "--json", str(tmp_path / "m.json")]
    options = ["--models", "s12", "--dtype", "float32", "--batch", "2", "--image-size", "32"]
    assert bench("model", *options, "--providers", "ours,accelerate,eager", "ours triton", *files) == 0
    out = capsys.readouterr().out
    by_provider = rows(tmp_path / "m.csv")
    assert list(by_provider) == ["ours", "accelerate", "eager", "copy", "matmul"]

    # counted here: timm's convolutions and linear layers; weights once, activations once in and once out
    peer = timm.create_model("poolformer_s12")
    macs = count_macs(peer, (1, 3, 32, 32))
    flops = 2 * 2 * (macs["convolution"] + macs["linear"])
    stages = [(64, 8, 2), (128, 4, 2), (320, 2, 6), (512, 1, 2)]  # channels, side, blocks
    maps = [3 * 32 * 32, *(c * n * n for c, n, _ in stages)]
    moved = (
        sum(4 * depth * c * n * n for c, n, depth in stages)
        + sum(maps[:-1])
        + sum(maps[1:])
        + maps[-1]
        + 1000
    )
    moved = 4 * (2 * moved + sum(p.numel() for p in peer.parameters()))
    for provider in ("ours", "accelerate", "eager"):
        row = by_provider[provider]
        seconds = float(row["median_s"])
        rate = float(row["rate_tflops"] or by_provider["matmul"]["tflop_per_s"])
        limit = max(moved / float(by_provider["copy"]["gb_per_s"]) / 1e9, flops / rate / 1e12)
        assert 0 < float(row["p20_s"]) <= seconds <= float(row["p80_s"])
        assert float(row["img_per_s"]) == pytest.approx(2 / seconds, rel=1e-5)
        assert float(row["tflop_per_s"]) == pytest.approx(flops / seconds / 1e12, rel=1e-5)
        assert float(row["gb_per_s"]) == pytest.approx(moved / seconds / 1e9, rel=1e-5)
        assert float(row["fraction"]) == pytest.approx(limit / seconds, rel=1e-4)
        assert 1e-8 < float(row["error_l2"]) < 1e-5
        assert (row["benchmark"], row["direction"]) == ("model", "forward")
        assert (row["model"], row["shape"], row["stage"]) == ("poolformer_s12", "3x32x32", "")
        assert (row["dtype"], row["layout"], row["batch"]) == ("float32", "channels_last", "2")
        assert (row["threads"], row["torch"]) == ("1", torch.__version__)
    for provider, empty in (("copy", "tflop_per_s"), ("matmul", "gb_per_s")):
        row = by_provider[provider]
        assert [row[name] for name in (empty, "img_per_s", "error_l2")] == ["", "", ""]
    assert by_provider["copy"]["fraction"] == "1"
    product = by_provider["matmul"]
    share = float(product["tflop_per_s"]) / float(product["rate_tflops"] or product["tflop_per_s"])
    assert float(product["fraction"]) == pytest.approx(share, rel=1e-4)
    probed = "cpp" in pk.available_backends()
    assert {bool(row["rate_tflops"]) for row in by_provider.values()} == {probed}
    (state,) = {row["state"] for row in by_provider.values()}
    assert state in ("", "fast", "throttled", "mixed")

    content = json.loads((tmp_path / "m.json").read_text())
    assert [row["provider"] for row in content["rows"]] == list(by_provider)
    assert f"{content['rows'][0]['median_s']:.6g}" == by_provider["ours"]["median_s"]
    if not torch.cuda.is_available():  # what cannot run is said
        reason = content["unavailable"]["ours triton"]
        assert reason.startswith("backend 'triton' was asked for and cannot run this call: ")
        assert f"ours triton: {reason}" in " ".join(out.split())
    ratio = float(by_provider["eager"]["median_s"]) / float(by_provider["ours"]["median_s"])
    assert f"{ratio:.2f}×" in out


def test_a_wrong_result_is_not_timed(tmp_path, capsys, monkeypatch) -> None:
    from poolformer_kernels.benchmarks import providers

    def wrong(peer, ours, x):
        return lambda: ours(x) * torch.where(torch.arange(1000) == 7, 3.0, 1.2)

    monkeypatch.setitem(providers.PROVIDERS, "eager", wrong)
    options = ["--models", "s12", "--batch", "1", "--image-size", "32", "--csv", str(tmp_path / "m.csv")]
    assert bench("model", *options, "--providers", "ours", "eager") == 1
    assert "eager" not in rows(tmp_path / "m.csv")
    assert "eager: wrong: relative error 0.2" in capsys.readouterr().out


def test_half_precision_errors_are_those_of_rounding() -> None:
    from poolformer_kernels.benchmarks import harness, providers
    from poolformer_kernels.benchmarks.rows import Results

    peer, ours = providers.make_pair("poolformer_s12", torch.bfloat16, "cpu")
    x = harness.image(2, (3, 32, 32), "cpu", torch.bfloat16, "channels_last")
    results = Results()
    prepared = providers.prepare(["ours", "accelerate", "eager NCHW", "onnxruntime"], peer, ours, x, results)
    assert results.unavailable == {"onnxruntime": "it is measured in float32 only"}
    for error in prepared.errors.values():
        assert 1e-4 < error < 0.02
    for name in ("ours", "accelerate"):
        assert prepared.errors[name] < 1.5 * prepared.errors["eager NCHW"]


def test_accelerate_runs_a_copy_by_kernels(kernels) -> None:
    from poolformer_kernels.benchmarks import harness, providers
    from poolformer_kernels.benchmarks.rows import Results

    peer, ours = providers.make_pair("poolformer_s12", torch.float32, "cpu")
    results = Results()
    x = harness.image(2, (3, 32, 32), "cpu", torch.float32, "channels_last")
    call = providers.prepare(["accelerate"], peer, ours, x, results).calls["accelerate"]
    with torch.inference_mode(), Calls() as counted:
        call()
    assert counted.kernels() == {"chain_cpp": 4}  # each stage is one call
    reason = "not accelerated: see poolformer_kernels.accelerate"
    assert {unfused_reasons(block) for block in blocks_of(peer)} == {(reason, reason)}
    prepared = providers.prepare(["accelerate", "eager"], peer.stem, ours.patch_embed, x, results)
    reason = results.unavailable["accelerate"]
    assert reason.startswith("no block to accelerate in timm.models.metaformer.Stem; looked for ")
    assert list(prepared.calls) == ["eager"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("model", ["--models", "s13"], "argument --models: 's13' is no model (did you mean s"),
        (
            "model",
            ["--providers", "ours,tvm"],
            "argument --providers: 'tvm'; allowed: ours, ours reference, ",
        ),
        ("mlp", ["--dtype", "int8"], "argument --dtype: 'int8'; allowed: float32, bfloat16, float16"),
        ("pool-mixer", ["--layout", "NHWC"], "argument --layout: 'NHWC'; allowed: channels_last, NCHW"),
        ("block", ["--batch", "0"], "argument --batch: must be a positive integer, got '0'"),
        ("block", ["--image-size", "16"], "argument --image-size: must be at least 32"),
        ("model", ["--csv", "/dev/null/x.csv"], "cannot write to /dev/null/x.csv: "),
    ],
)
def test_requests_that_cannot_be_met(name, arguments, message, capsys) -> None:
    assert bench(name, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"poolformer-kernels: error: {message}")


@pytest.mark.parametrize("best", [None, 3e12])
def test_the_limits_are_those_of_the_profile(best, monkeypatch) -> None:
    from poolformer_kernels.benchmarks import harness
    from poolformer_kernels.benchmarks.rows import Case

    monkeypatch.setitem(limits_module._LARGEST_SIDE, "cpu", 256)  # both choose one side
    monkeypatch.setattr(limits_module, "rate_probe", lambda *_: best and RateProbe(lambda: best))
    seconds = {"ours": 3.0, "copy": 2.0, "matmul": 4.0}
    taken = {name: [Sample(s, best, best)] for name, s in seconds.items()}
    monkeypatch.setattr(limits_module, "sample_interleaved", lambda calls, **_: {n: taken[n] for n in calls})
    for shape in ((16, 8, 8), (16, 256, 256)):  # below the least copy, and above it
        x = harness.image(2, shape, "cpu", torch.bfloat16, "channels_last")
        case = Case("mlp", shape, "bfloat16", 2, (x.nbytes, 10**6))
        ((ours, copy, product),) = harness.measure(case, {"ours": int}, x, rounds=1)
        probes = LimitProbes("cpu", torch.bfloat16, x.nbytes)
        limits = probes.limits(taken, "ours")
        assert 1e9 * copy.gb_per_s == pytest.approx(limits.copy) == pytest.approx(max(x.nbytes, 2**21))
        assert 1e12 * product.tflop_per_s == pytest.approx(probes.flops / 4)
        assert limits.matmul == pytest.approx(best or probes.flops / 4)
        assert ours.fraction == pytest.approx(limits.seconds(*case.least) / 3)
        assert (ours.rate_tflops, ours.state) == (best and best / 1e12, "fast" if best else "")


def test_rows_of_two_states_are_two_groups(monkeypatch) -> None:
    from poolformer_kernels.benchmarks import harness
    from poolformer_kernels.benchmarks.rows import Case

    rate = RateProbe(lambda: 1e12)
    rate()
    monkeypatch.setattr(limits_module, "rate_probe", lambda *_: rate)
    fast, slow, mixed = Sample(1.0, 1e12, 9e11), Sample(3.0, 3e11, 3e11), Sample(9.0, 1e12, 3e11)
    taken = [fast, slow, mixed] * 5
    monkeypatch.setattr(limits_module, "sample_interleaved", lambda calls, **_: dict.fromkeys(calls, taken))
    x = harness.image(2, (16, 8, 8), "cpu", torch.float32, "channels_last")
    case = Case("mlp", (16, 8, 8), "float32", 2, (0, 10**6))
    groups = harness.measure(case, {"ours": int, "eager": int}, x, rounds=1)
    assert [[row.provider for row in group] for group in groups] == [["ours", "eager", "copy", "matmul"]] * 2
    for group, state, seconds, tflops in zip(groups, ("fast", "throttled"), (1, 3), (0.95, 0.3), strict=True):
        for row in group:
            assert (row.state, row.median_s, row.p20_s, row.p80_s) == (state, seconds, seconds, seconds)
            assert row.rate_tflops == pytest.approx(tflops)
        assert group[0].fraction == pytest.approx(1e6 / (tflops * 1e12) / seconds)


def test_missing_extras_are_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # as if it were not installed
    assert bench("mlp") == 2
    line = capsys.readouterr().err
    assert line.startswith("poolformer-kernels: error: packages for bench mlp are missing (")
    assert line.endswith("pip install 'poolformer_kernels[cli]'\n")
    assert line.count("\n") == 1


def test_parts_add_up_to_the_model() -> None:
    from poolformer_kernels.benchmarks import parts, providers

    peer, ours = providers.make_pair("poolformer_s12", torch.float32, "cpu")
    made = parts.parts(peer, ours, 64)
    assert [part.stage for part in made] == [
        *("stem", "1", "down1", "2", "down2", "3", "down3", "4", "head"), *[""] * 4
    ]  # fmt: skip
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        h, exact = x, peer(x)
        for part in made[:9]:  # each part's timm module and ours, on what the part before it returns
            assert tuple(h.shape[1:]) == part.shape
            ours_h, h = part.ours(h), part.peer(h)
            assert ((ours_h - h).norm() / h.norm()).item() < 1e-5
    assert torch.equal(h, exact)
    weights = sum(part.cost(0, 1)[0] for part in made[:9])  # of no sample: the weights alone
    assert weights == sum(p.numel() for p in ours.parameters())


def test_small_batches_by_default_of_the_first_model_only() -> None:
    from poolformer_kernels.benchmarks import bench_model

    options = {"scaling": False, "device": "cpu", "dtype": ["float32"], "image_size": [224]}
    args = argparse.Namespace(models=["poolformer_s12", "poolformer_m48"], batch=None, **options)
    chosen = [(point.model[-3:], point.batch) for point in bench_model.points(args)]
    assert chosen == [("s12", 8), ("s12", 1), ("m48", 8)]
    args.batch = [2, 4]
    chosen = [(point.model[-3:], point.batch) for point in bench_model.points(args)]
    assert chosen == [("s12", 2), ("s12", 4), ("m48", 2), ("m48", 4)]


def test_scaling_points_and_exponents() -> None:
    from poolformer_kernels.benchmarks import bench_model
    from poolformer_kernels.benchmarks.rows import Results, Row

    args = argparse.Namespace(
        scaling=True,
        models=["poolformer_s12", "poolformer_s24", "poolformer_m36"],
        dtype=["bfloat16"],
        batch=[1, 2, 4],
        image_size=[64, 128],
    )
    chosen = [(p.model[-3:], p.batch, p.size) for p in bench_model.points(args)]
    assert chosen == [
        *[("s12", 1, 64), ("s12", 2, 64), ("s12", 4, 64), ("s12", 1, 128), ("s24", 4, 64)],
    ]
    results = Results()
    for point in bench_model.points(args):
        seconds = point.batch**0.9 * point.size**2.2 * (1 if point.model == "poolformer_s12" else 9)
        row = dict.fromkeys(MEASURED, "") | {
            "model": point.model,
            "shape": f"3x{point.size}x{point.size}",
            "batch": point.batch,
            "provider": "ours",
            "median_s": seconds,
        }
        results.groups.append([Row(**row)])
    assert bench_model.exponents(results, args) == [
        "ours, poolformer_s12: time ~ batch^0.90, 3 points",
        "ours, poolformer_s12: time ~ pixels^1.10, 2 points",
    ]


@pytest.mark.parametrize("installed", [True, False])
def test_benchmarks_are_found(installed, tmp_path, monkeypatch) -> None:
    name, package = "poolformer_kernels.benchmarks", tmp_path / "poolformer_kernels"
    folder = (package if installed else tmp_path) / "benchmarks"
    folder.mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir(exist_ok=True)  # of another package, beside an installed one
    for file in ("__init__.py", "harness.py"):
        (folder / file).touch()
    monkeypatch.setattr(cli, "__file__", str(package / "cli" / "main.py"))
    monkeypatch.setattr(pk, "benchmarks", None)
    monkeypatch.setitem(sys.modules, name, sys.modules[name])  # put back afterwards
    del sys.modules[name]
    found = cli.load_benchmarks()
    assert found is sys.modules[name] is pk.benchmarks is cli.load_benchmarks()
    assert found.__path__ == [str(folder)]
    (folder / "harness.py").unlink()
    del sys.modules[name]
    with pytest.raises(CommandError, match="the benchmarks are missing"):
        cli.load_benchmarks()


# Ends without the modules that a finder of an editable install would lend
FROM_A_FOLDER = """
import sys
sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]
before = list(sys.path)
from poolformer_kernels.cli.main import main
try:
    main(['bench', 'block', '--help'])
except SystemExit as end:
    assert end.code == 0
assert sys.path == before
files = {n: m.__file__ for n, m in sys.modules.items() if getattr(m, '__file__', None)}
print(*{n for n, file in files.items() if file.startswith(sys.argv[1])})
"""


def run_from(folder: Path, benchmarks: Path, cwd: Path) -> tuple[str, set[str]]:
    """The help of a benchmark, and which modules came from the folder of the benchmarks."""
    done = subprocess.run(
        [sys.executable, "-c", FROM_A_FOLDER, str(benchmarks)],
        # so wide that the help does not break the path of the results
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "999"},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text, _, last = done.stdout.rstrip().rpartition("\n")
    return " ".join(text.split()), set(last.split())


def test_a_source_tree_has_the_benchmarks(tmp_path) -> None:
    root = Path(__file__).resolve().parent.parent
    text, modules = run_from(root, root / "benchmarks", tmp_path)
    assert "results/<device>/<name>.csv" in text
    name = "poolformer_kernels.benchmarks"
    assert {name, f"{name}.bench_block", f"{name}.harness"} <= modules
    assert all(module.startswith(name) for module in modules)


def test_a_wheel_holds_the_benchmarks(tmp_path) -> None:
    root = Path(__file__).resolve().parent.parent
    base = str(tmp_path)
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", base]
    command += ["build_py", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "POOLFORMER_KERNELS_SKIP_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "lib" / "poolformer_kernels" / "benchmarks"
    held = {path.name for path in folder.glob("*.py")}
    assert held == {path.name for path in (root / "benchmarks").glob("*.py")}
    assert (tmp_path / "lib" / "poolformer_kernels" / "backends" / "triton" / "mlp" / "tile.py").is_file()
    text, modules = run_from(tmp_path / "lib", folder, tmp_path)
    assert "default: results/<device>/<name>.csv" in text
    name = "poolformer_kernels.benchmarks"
    assert {name, f"{name}.bench_block", f"{name}.harness"} <= modules
    assert all(module.startswith(name) for module in modules)
