"""The benchmarks: what their CSV holds, what they refuse, and that they find themselves."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.accelerate import blocks_of
from support.bench import assert_measured, require_bench, row
from support.chain import Calls
from support.commands import refused
from support.sandbox import Sandbox

require_bench()

from poolformer_kernels.benchmarks import bench_model, harness, parts, providers
from poolformer_kernels.benchmarks.rows import Case, Results

import poolformer_kernels as pk
from poolformer_kernels.accelerate import unfused_reasons
from poolformer_kernels.cli import main as cli
from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.profiling import LimitProbes, count_macs
from poolformer_kernels.profiling import limits as limits_module
from poolformer_kernels.profiling.states import RateProbe
from poolformer_kernels.profiling.throughput import Sample

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "benchmark,direction,model,shape,stage,dtype,layout,batch,provider,median_s,p20_s,p80_s,img_per_s,"
    "gb_per_s,tflop_per_s,fraction,error_l2,rate_tflops,state,device,threads,torch,commit"
)


def test_model(sandbox) -> None:
    import timm

    options = ["--models", "s12", "--dtype", "float32", "--batch", "2", "--image-size", "32"]
    options += ["--providers", "ours,accelerate,eager", "ours triton", "--json", "model.json"]
    ran = sandbox.bench("model", *options)
    by_provider = ran.by_provider
    assert ",".join(ran.rows[0]) == HEADER
    measured = ("ours", "accelerate", "eager")
    fields = {"benchmark": "model", "direction": "forward", "model": "poolformer_s12", "shape": "3x32x32"}
    fields |= {"stage": "", "dtype": "float32", "layout": "channels_last", "batch": "2"}
    assert_measured(by_provider, measured, **fields, threads="1", torch=torch.__version__)

    # counted here: timm's convolutions and linear layers; weights once, activations once in and once out
    peer = timm.create_model("poolformer_s12")
    macs = count_macs(peer, (1, 3, 32, 32))
    flops = 2 * 2 * (macs["convolution"] + macs["linear"])
    stages = [(64, 8, 2), (128, 4, 2), (320, 2, 6), (512, 1, 2)]  # channels, side, blocks
    maps = [3 * 32 * 32, *(c * n * n for c, n, _ in stages)]
    inside = sum(4 * depth * c * n * n for c, n, depth in stages)
    moved = inside + sum(maps[:-1]) + sum(maps[1:]) + maps[-1] + 1000
    moved = 4 * (2 * moved + sum(p.numel() for p in peer.parameters()))
    for provider in measured:
        found = by_provider[provider]
        seconds = float(found["median_s"])
        rate = float(found["rate_tflops"] or by_provider["matmul"]["tflop_per_s"])
        limit = max(moved / float(by_provider["copy"]["gb_per_s"]) / 1e9, flops / rate / 1e12)
        assert float(found["tflop_per_s"]) == pytest.approx(flops / seconds / 1e12, rel=1e-5)
        assert float(found["gb_per_s"]) == pytest.approx(moved / seconds / 1e9, rel=1e-5)
        assert float(found["fraction"]) == pytest.approx(limit / seconds, rel=1e-4)
        assert 1e-8 < float(found["error_l2"]) < 1e-5
    for provider, empty in (("copy", "tflop_per_s"), ("matmul", "gb_per_s")):
        limit = by_provider[provider]
        assert [limit[name] for name in (empty, "img_per_s", "error_l2")] == ["", "", ""]
    assert by_provider["copy"]["fraction"] == "1"
    product = by_provider["matmul"]
    share = float(product["tflop_per_s"]) / float(product["rate_tflops"] or product["tflop_per_s"])
    assert float(product["fraction"]) == pytest.approx(share, rel=1e-4)
    probed = "cpp" in pk.available_backends()
    assert {bool(found["rate_tflops"]) for found in by_provider.values()} == {probed}
    (state,) = {found["state"] for found in by_provider.values()}
    assert state in ("", "fast", "throttled", "mixed")

    content = json.loads(Path("model.json").read_text())
    assert [found["provider"] for found in content["rows"]] == list(by_provider)
    assert f"{content['rows'][0]['median_s']:.6g}" == by_provider["ours"]["median_s"]
    if not torch.cuda.is_available():  # what cannot run is said
        reason = content["unavailable"]["ours triton"]
        assert reason.startswith("backend 'triton' was asked for and cannot run this call: ")
        assert f"ours triton: {reason}" in ran.words
    ratio = float(by_provider["eager"]["median_s"]) / float(by_provider["ours"]["median_s"])
    assert f"{ratio:.2f}×" in ran.out


def test_a_wrong_result_is_not_timed(sandbox, monkeypatch) -> None:
    def wrong(peer, ours, x):
        return lambda: ours(x) * torch.where(torch.arange(1000) == 7, 3.0, 1.2)

    monkeypatch.setitem(providers.PROVIDERS, "eager", wrong)
    options = ["--models", "s12", "--batch", "1", "--image-size", "32", "--providers", "ours", "eager"]
    ran = sandbox.bench("model", *options, code=1)
    assert "eager" not in ran.by_provider
    assert "eager: wrong: relative error 0.2" in ran.out


def test_half_precision_errors_are_those_of_rounding() -> None:
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
    ("command", "message"),
    [
        ("model --models s13", "argument --models: 's13' is no model (did you mean s"),
        ("model --providers ours,tvm", "argument --providers: 'tvm'; allowed: ours, ours reference, "),
        ("mlp --dtype int8", "argument --dtype: 'int8'; allowed: float32, bfloat16, float16"),
        ("pool-mixer --layout NHWC", "argument --layout: 'NHWC'; allowed: channels_last, NCHW"),
        ("block --batch 0", "argument --batch: must be a positive integer, got '0'"),
        ("block --image-size 16", "argument --image-size: must be at least 32"),
        ("model --csv /dev/null/x.csv", "cannot write to /dev/null/x.csv: "),
        ("dense --sizes 512x", "argument --sizes: must be N or HxW with sides of at least 32, got '512x'"),
        ("dense --sizes 31", "argument --sizes: must be N or HxW with sides of at least 32, got '31'"),
        ("dense --only speed", "argument --only: 'speed'; allowed: features, training, whole"),
        ("dense --providers tvm", "argument --providers: 'tvm'; allowed: ours, accelerate, eager, compile"),
        ("dense --dtype float16", "--dtype float16: not measured; allowed: float32, bfloat16"),
        ("training --dtype float16", "--dtype float16: without loss scaling; allowed: float32, bfloat16"),
    ],
)
def test_requests_that_cannot_be_met(command, message, sandbox) -> None:
    assert sandbox.refusal(*command.split()).startswith(message)


@pytest.mark.parametrize("best", [None, 3e12])
def test_the_limits_are_those_of_the_profile(best, monkeypatch) -> None:
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
    rate = RateProbe(lambda: 1e12)
    rate()
    monkeypatch.setattr(limits_module, "rate_probe", lambda *_: rate)
    fast, slow, mixed = Sample(1.0, 1e12, 9e11), Sample(3.0, 3e11, 3e11), Sample(9.0, 1e12, 3e11)
    taken = [fast, slow, mixed] * 5
    monkeypatch.setattr(limits_module, "sample_interleaved", lambda calls, **_: dict.fromkeys(calls, taken))
    x = harness.image(2, (16, 8, 8), "cpu", torch.float32, "channels_last")
    case = Case("mlp", (16, 8, 8), "float32", 2, (0, 10**6))
    groups = harness.measure(case, {"ours": int, "eager": int}, x, rounds=1)
    assert [[one.provider for one in group] for group in groups] == [["ours", "eager", "copy", "matmul"]] * 2
    for group, state, seconds, tflops in zip(groups, ("fast", "throttled"), (1, 3), (0.95, 0.3), strict=True):
        for one in group:
            assert (one.state, one.median_s, one.p20_s, one.p80_s) == (state, seconds, seconds, seconds)
            assert one.rate_tflops == pytest.approx(tflops)
        assert group[0].fraction == pytest.approx(1e6 / (tflops * 1e12) / seconds)


def test_missing_extras_are_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # as if it were not installed
    line = refused(capsys, "bench mlp")
    assert line.startswith("packages for bench mlp are missing (")
    assert line.endswith("pip install 'poolformer_kernels[cli]'")


def test_parts_add_up_to_the_model() -> None:
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
    options = {"scaling": False, "device": "cpu", "dtype": ["float32"], "image_size": [224]}
    args = argparse.Namespace(models=["poolformer_s12", "poolformer_m48"], batch=None, **options)
    chosen = [(point.model[-3:], point.batch) for point in bench_model.points(args)]
    assert chosen == [("s12", 8), ("s12", 1), ("m48", 8)]
    args.batch = [2, 4]
    chosen = [(point.model[-3:], point.batch) for point in bench_model.points(args)]
    assert chosen == [("s12", 2), ("s12", 4), ("m48", 2), ("m48", 4)]


def test_scaling_points_and_exponents() -> None:
    args = argparse.Namespace(
        scaling=True,
        models=["poolformer_s12", "poolformer_s24", "poolformer_m36"],
        dtype=["bfloat16"],
        batch=[1, 2, 4],
        image_size=[64, 128],
    )
    chosen = [(p.model[-3:], p.batch, p.size) for p in bench_model.points(args)]
    assert chosen == [("s12", 1, 64), ("s12", 2, 64), ("s12", 4, 64), ("s12", 1, 128), ("s24", 4, 64)]
    results = Results()
    for point in bench_model.points(args):
        seconds = point.batch**0.9 * point.size**2.2 * (1 if point.model == "poolformer_s12" else 9)
        fields = {"model": point.model, "shape": f"3x{point.size}x{point.size}", "batch": point.batch}
        results.groups.append([row(seconds, **fields)])
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


def assert_benchmarks_come_from(folder: Path, packages: Path, sandbox: Sandbox) -> None:
    """The help of a benchmark, which loads no other module of this folder; ``packages`` holds the package."""
    # so wide that the help does not break the path of the results
    out = sandbox.python("-c", FROM_A_FOLDER, str(folder), PYTHONPATH=str(packages), COLUMNS="999")
    text, _, modules = out.rstrip().rpartition("\n")
    assert "default: results/<device>/<name>.csv" in " ".join(text.split())
    name = "poolformer_kernels.benchmarks"
    assert {name, f"{name}.bench_block", f"{name}.harness"} <= set(modules.split())
    assert all(module.startswith(name) for module in modules.split())


def test_a_source_tree_has_the_benchmarks(sandbox) -> None:
    assert_benchmarks_come_from(ROOT / "benchmarks", ROOT, sandbox)


def test_a_wheel_holds_the_benchmarks(sandbox) -> None:
    command = ["setup.py", "--quiet", "egg_info", "--egg-base", str(sandbox.folder)]
    command += ["build_py", "--build-lib", str(sandbox.folder / "lib")]
    replace(sandbox, folder=ROOT).python(*command, POOLFORMER_KERNELS_SKIP_EXT="1")
    package = sandbox.folder / "lib" / "poolformer_kernels"
    held = {path.name for path in (package / "benchmarks").glob("*.py")}
    assert held == {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert (package / "backends" / "triton" / "mlp" / "tile.py").is_file()
    assert_benchmarks_come_from(package / "benchmarks", package.parent, sandbox)
