"""`bench dense`: both sides compute the same, a wrong one is not timed, and what its CSV holds."""

import argparse
import copy
import csv

import numpy as np
import pytest
import torch
from support.accelerate import blocks_of
from support.peers import require
from torch import nn

require("torchvision", "models.detection")
require("timm")

from poolformer_kernels.cli import main as cli

cli.load_benchmarks()

from poolformer_kernels.benchmarks import bench_dense, dense_pairs

from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.profiling import count_macs

pytestmark = pytest.mark.usefixtures("benchmark_process")
TINY = ["--device", "cpu", "--threads", "1", "--rounds", "2", "--sizes", "32x64", "--batch", "2"]


def bench(*arguments: str) -> int:
    return cli.main(["bench", "dense", *TINY, *arguments])


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- the pairs ---------------------------------------------------------------------------------------------


def test_both_backbones_are_the_same_function() -> None:
    peer, ours = dense_pairs.make_bodies("poolformer_s12")
    x = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        given, expected = ours(x), copy.deepcopy(peer).double()(x.double().contiguous())
    assert [y.shape[1] for y in given] == [64, 128, 320, 512]
    for y, right in zip(given, expected, strict=True):
        assert ((y - right).norm() / right.norm()).item() < 3e-6
        assert abs(y.std().item() - 1) < 0.3  # they are normed
    assert len(blocks_of(peer)) == 12
    assert {type(module).__module__.split(".")[0] for module in peer.features.modules()} <= {"timm", "torch"}
    assert {type(peer.get_submodule(f"norm{i}")) for i in (0, 2, 4, 6)} == {nn.GroupNorm}


def test_the_peers_features_are_those_of_timm() -> None:
    timm = require("timm")
    peer, _ = dense_pairs.make_bodies("poolformer_s12")
    plain = timm.create_model("poolformer_s12", features_only=True).eval()
    plain.load_state_dict(peer.features.state_dict())
    plain, x = plain.to(memory_format=torch.channels_last), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, plain(x), peer.features(x)))


def test_every_gradient_has_its_name() -> None:
    peer, ours = dense_pairs.make_bodies("poolformer_s12")
    theirs = dense_pairs.our_names({name: p.detach() for name, p in peer.named_parameters()})
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(theirs[name], p) for name, p in ours.named_parameters())


@pytest.mark.parametrize("head", dense_pairs.WHOLE)
def test_whole_models_differ_in_the_backbone_alone(head, monkeypatch) -> None:
    picture = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(0))
    peer, ours = dense_pairs.make_whole(head, "poolformer_s12", picture)
    x = picture[None]
    with torch.no_grad():
        given, expected = ours.backbone(x), peer.backbone(x)
    for name, y in given.items():
        torch.testing.assert_close(y, expected[name], rtol=1e-3, atol=1e-4)
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("backbone.body.")}
    assert all(torch.equal(peer.state_dict()[name], value) for name, value in state.items())
    assert type(peer.backbone.body) is dense_pairs.TimmBody
    if head == "retinanet":
        assert type(peer.backbone.body.norm0) is nn.Identity
    if head != "semantic_fpn":
        with torch.no_grad():
            assert len(ours([picture])[0]["boxes"]) > 30  # there is something to choose from


# ---- what is counted and refused ---------------------------------------------------------------------------


def test_rows_of_features(tmp_path, capsys) -> None:
    path = tmp_path / "d.csv"
    options = ["--only", "features", "--dtype", "float32", "--providers", "ours,accelerate,eager"]
    assert bench(*options, "--csv", str(path)) == 0
    found = {row["provider"]: row for row in rows(path)}
    assert list(found) == ["ours", "accelerate", "eager", "copy", "matmul"]
    peer, _ = dense_pairs.make_bodies("poolformer_s12")
    macs = count_macs(peer, (2, 3, 32, 64))
    flops = 2 * (macs["convolution"] + macs["linear"])
    for name in ("ours", "accelerate", "eager"):
        row = found[name]
        seconds = float(row["median_s"])
        assert (row["benchmark"], row["direction"], row["model"]) == ("dense", "forward", "poolformer_s12")
        assert (row["shape"], row["batch"], row["layout"]) == ("3x32x64", "2", "channels_last")
        assert float(row["img_per_s"]) == pytest.approx(2 / seconds, rel=1e-4)
        assert float(row["tflop_per_s"]) == pytest.approx(flops / seconds / 1e12, rel=1e-4)
        assert 1e-8 < float(row["error_l2"]) < 1e-5
        assert row["peak_bytes"] == row["peak_fraction"] == ""
    assert str(path) in capsys.readouterr().out


def test_a_training_step_and_its_peak(tmp_path, capsys, monkeypatch) -> None:
    peaks = {"ours": 30, "eager": 120}
    monkeypatch.setattr(bench_dense, "measure_peaks", lambda point, names, args: {n: peaks[n] for n in names})
    path = tmp_path / "d.csv"
    options = ["--only", "training", "--dtype", "float32", "--providers", "ours", "eager", "--csv", str(path)]
    assert bench(*options) == 0
    found = {row["provider"]: row for row in rows(path)}
    assert list(found) == ["ours", "eager", "copy", "matmul"]
    assert found["ours"]["direction"] == "step"
    assert (found["ours"]["peak_bytes"], found["ours"]["peak_fraction"]) == ("30", "0.25")
    assert found["copy"]["peak_bytes"] == ""
    assert "peak of a step 0 MB, 25.0% of eager's" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_steps_gradients_are_those_of_its_maps(dtype) -> None:
    """The step's are what autograd gives for the sum of the maps times the fixed gradients."""
    _, ours = (copy.deepcopy(body).train() for body in dense_pairs.make_bodies("poolformer_s12"))
    x = torch.randn(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    step = bench_dense.Step(ours, x, bench_dense.Point("training", "", "poolformer_s12", dtype, 1, (32, 32)))
    step()
    maps = step.maps()
    total = sum((y * grad).sum() for y, grad in zip(maps, step.grads, strict=True))
    names, parameters = zip(*ours.named_parameters(), strict=True)
    expected = torch.autograd.grad(total, parameters)
    given = step.gradients()
    assert [*given] == list(names)
    for name, grad in zip(names, expected, strict=True):
        torch.testing.assert_close(given[name], grad.double(), rtol=1e-2, atol=1e-3 * grad.abs().max().item())
    assert all(g.abs().max() > 1 for g in step.grads)


def test_wrong_maps_and_wrong_gradients_are_not_timed(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_dense, "measure_peaks", lambda *_: {})
    make = bench_dense.make_provider

    def broken(name, peer, ours, *, inference):
        if name == "eager" and inference:
            peer = copy.deepcopy(peer)
            peer.norm6.bias.data += 0.05  # a small part of all maps together
        if name == "eager" and not inference:
            peer.features.stages_2.blocks[3].mlp.fc1.weight.register_hook(torch.zeros_like)
        return make(name, peer, ours, inference=inference)

    monkeypatch.setattr(bench_dense, "make_provider", broken)
    path = tmp_path / "d.csv"
    options = ["--only", "features", "training", "--dtype", "float32", "--csv", str(path)]
    assert bench(*options, "--providers", "ours", "eager") == 1
    assert {row["provider"] for row in rows(path)} == {"ours", "copy", "matmul"}
    out = " ".join(capsys.readouterr().out.split())
    assert "eager: wrong: " in out
    text = path.with_suffix(".missing.txt").read_text()
    assert "eager: wrong: relative error 0.0" in text
    assert "of the gradient of network.4.3.mlp.fc1.weight against float64" in text


@pytest.mark.parametrize(
    "heads", [("retinanet", "semantic_fpn"), pytest.param(("mask_rcnn",), marks=pytest.mark.long)]
)
def test_rows_of_whole_models(heads, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench_dense, "WHOLE", heads)
    path = tmp_path / "d.csv"
    options = ["--only", "whole", "--dtype", "float32", "--batch", "1", "--csv", str(path)]
    assert bench(*options, "--providers", "ours", "eager") == 0
    found = [row for row in rows(path) if row["provider"] == "ours"]
    assert [row["model"] for row in found] == [f"{head}_poolformer_s12" for head in heads]
    assert all(1e-8 < float(row["error_l2"]) < 1e-5 for row in found)
    assert all(row["benchmark"] == "dense" for row in found)


def test_default_cases() -> None:
    args = argparse.Namespace(
        only=list(bench_dense.KINDS), models=["poolformer_s12"], dtype=["float32"], batch=None, sizes=None
    )
    chosen = [(p.kind, p.model, p.batch, p.size) for p in bench_dense.points(args)]
    sizes = [(512, 512), (800, 1344)]
    assert chosen == [
        *(("features", "poolformer_s12", n, size) for n in (1, 2) for size in sizes),
        *(("training", "poolformer_s12", 2, size) for size in sizes),
        ("whole", "retinanet_poolformer_s12", 1, (800, 1333)),
        ("whole", "mask_rcnn_poolformer_s12", 1, (800, 1333)),
        ("whole", "semantic_fpn_poolformer_s12", 1, (512, 512)),
    ]
    args.providers = None
    compiled = {p.kind: "compile" in bench_dense._names(p, args) for p in bench_dense.points(args)}
    assert compiled == {"features": True, "training": True, "whole": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "512x"], "argument --sizes: must be N or HxW with sides of at least 32, got '512x'"),
        (["--sizes", "31"], "argument --sizes: must be N or HxW with sides of at least 32, got '31'"),
        (["--only", "speed"], "argument --only: 'speed'; allowed: features, training, whole"),
        (["--providers", "tvm"], "argument --providers: 'tvm'; allowed: ours, accelerate, eager, compile"),
        (["--dtype", "float16"], "--dtype float16: not measured; allowed: float32, bfloat16"),
    ],
)
def test_requests_that_cannot_be_met(arguments, message, capsys) -> None:
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"poolformer-kernels: error: {message}")
    assert captured.err.count("\n") == 1


# ---- memory ------------------------------------------------------------------------------------------------


def test_a_failing_process_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(bench_dense, "MEMORY", "raise ValueError('no memory today')")
    point = bench_dense.Point("training", "", "poolformer_s12", "float32", 1, (32, 32))
    args = argparse.Namespace(device="cpu", threads=1)
    with pytest.raises(CommandError, match="a process of the benchmark failed: ValueError: no memory today"):
        bench_dense.measure_peaks(point, ["ours"], args)


@pytest.mark.long
def test_peaks_are_those_of_a_step_alone(tmp_path) -> None:
    np.ones(1 << 27)  # 1 GiB, more than a step takes: the processes of the benchmark must not count it
    path = tmp_path / "d.csv"
    options = ["--only", "training", "--dtype", "float32", "--providers", "ours,eager", "--sizes", "256"]
    assert bench(*options, "--csv", str(path)) == 0
    found = {row["provider"]: row for row in rows(path)}
    maps = 14 * 4 * 2 * (2 * 64 * 4096 + 2 * 128 * 1024 + 6 * 320 * 256 + 2 * 512 * 64)  # that eager keeps
    assert maps < float(found["eager"]["peak_bytes"]) < 3 * maps
    assert 0 < float(found["ours"]["peak_fraction"]) < 0.8
