"""`bench dense`: both sides compute the same, a wrong one is not timed, and what its CSV holds."""

import argparse
import copy

import numpy as np
import pytest
import torch
from support.accelerate import blocks_of
from support.bench import assert_measured, require_bench
from support.peers import relative_error, require
from support.sandbox import Ran, Sandbox
from torch import nn

require("torchvision", "models.detection")
require_bench()

from poolformer_kernels.benchmarks import bench_dense, dense_pairs

from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.profiling import count_macs


def bench(sandbox: Sandbox, only: str, *providers: str, code: int = 0, batch: str = "2") -> Ran:
    options = ["--sizes", "32x64", "--batch", batch, "--dtype", "float32", "--only", *only.split()]
    return sandbox.bench("dense", *options, "--providers", *providers, code=code)


# ---- the pairs ---------------------------------------------------------------------------------------------


def test_both_backbones_are_the_same_function() -> None:
    peer, ours = dense_pairs.make_bodies("poolformer_s12")
    x = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        given, expected = ours(x), copy.deepcopy(peer).double()(x.double().contiguous())
    assert [y.shape[1] for y in given] == [64, 128, 320, 512]
    for y, right in zip(given, expected, strict=True):
        assert relative_error(y, right) < 3e-6
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
    torch.testing.assert_close(theirs, dict(ours.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("head", dense_pairs.WHOLE)
def test_whole_models_differ_in_the_backbone_alone(head, monkeypatch) -> None:
    picture = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(0))
    peer, ours = dense_pairs.make_whole(head, "poolformer_s12", picture)
    x = picture[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.backbone(x), peer.backbone(x), rtol=1e-3, atol=1e-4)
    heads = [
        {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.body.")}
        for model in (ours, peer)
    ]
    torch.testing.assert_close(*heads, rtol=0, atol=0)
    assert type(peer.backbone.body) is dense_pairs.TimmBody
    if head == "retinanet":
        assert type(peer.backbone.body.norm0) is nn.Identity
    if head != "semantic_fpn":
        with torch.no_grad():
            assert len(ours([picture])[0]["boxes"]) > 30  # there is something to choose from


# ---- what is counted and refused ---------------------------------------------------------------------------


def test_rows_of_features(sandbox) -> None:
    providers = ("ours", "accelerate", "eager")
    ran = bench(sandbox, "features", *providers)
    fields = {"benchmark": "dense", "direction": "forward", "model": "poolformer_s12", "shape": "3x32x64"}
    fields |= {"batch": "2", "layout": "channels_last", "peak_bytes": "", "peak_fraction": ""}
    assert_measured(ran.by_provider, providers, **fields)
    peer, _ = dense_pairs.make_bodies("poolformer_s12")
    macs = count_macs(peer, (2, 3, 32, 64))
    flops = 2 * (macs["convolution"] + macs["linear"])
    for row in (ran.by_provider[provider] for provider in providers):
        rate = flops / float(row["median_s"]) / 1e12
        assert float(row["tflop_per_s"]) == pytest.approx(rate, rel=1e-4)
        assert 1e-8 < float(row["error_l2"]) < 1e-5
    assert str(ran.file) in ran.out


def test_a_training_step_and_its_peak(sandbox, monkeypatch) -> None:
    peaks = {"ours": 30, "eager": 120}
    monkeypatch.setattr(bench_dense, "measure_peaks", lambda point, names, args: {n: peaks[n] for n in names})
    ran = bench(sandbox, "training", "ours", "eager")
    found = ran.by_provider
    assert_measured(found, ("ours", "eager"), direction="step")
    assert (found["ours"]["peak_bytes"], found["ours"]["peak_fraction"]) == ("30", "0.25")
    assert found["copy"]["peak_bytes"] == ""
    assert "peak of a step 0 MB, 25.0% of eager's" in ran.out


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


def test_wrong_maps_and_wrong_gradients_are_not_timed(sandbox, monkeypatch) -> None:
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
    ran = bench(sandbox, "features training", "ours", "eager", code=1)
    assert {row["provider"] for row in ran.rows} == {"ours", "copy", "matmul"}
    assert "eager: wrong: " in ran.words
    text = "\n".join(ran.missing)
    assert "eager: wrong: relative error 0.0" in text
    assert "of the gradient of network.4.3.mlp.fc1.weight against float64" in text


@pytest.mark.parametrize(
    "heads", [("retinanet", "semantic_fpn"), pytest.param(("mask_rcnn",), marks=pytest.mark.long)]
)
def test_rows_of_whole_models(heads, sandbox, monkeypatch) -> None:
    monkeypatch.setattr(bench_dense, "WHOLE", heads)
    ran = bench(sandbox, "whole", "ours", "eager", batch="1")
    found = [row for row in ran.rows if row["provider"] == "ours"]
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


# ---- memory ------------------------------------------------------------------------------------------------


def test_a_failing_process_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(bench_dense, "MEMORY", "raise ValueError('no memory today')")
    point = bench_dense.Point("training", "", "poolformer_s12", "float32", 1, (32, 32))
    args = argparse.Namespace(device="cpu", threads=1)
    with pytest.raises(CommandError, match="a process of the benchmark failed: ValueError: no memory today"):
        bench_dense.measure_peaks(point, ["ours"], args)


@pytest.mark.long
def test_peaks_are_those_of_a_step_alone(sandbox) -> None:
    np.ones(1 << 27)  # 1 GiB, more than a step takes: the processes of the benchmark must not count it
    options = ["--only", "training", "--dtype", "float32", "--providers", "ours,eager", "--sizes", "256"]
    found = sandbox.bench("dense", *options, "--batch", "2").by_provider
    maps = 14 * 4 * 2 * (2 * 64 * 4096 + 2 * 128 * 1024 + 6 * 320 * 256 + 2 * 512 * 64)  # that eager keeps
    assert maps < float(found["eager"]["peak_bytes"]) < 3 * maps
    assert 0 < float(found["ours"]["peak_fraction"]) < 0.8
