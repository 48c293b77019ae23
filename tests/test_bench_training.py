"""bench training: what it counts as kept for the backward, what it refuses to time, and its CSV."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from support.accelerate import PoolFormerBlock
from support.bench import assert_measured, require_bench
from torch import nn

require_bench()

from poolformer_kernels.benchmarks import bench_training

from poolformer_kernels.accelerate import accelerate

TINY = ["--models", "s12", "--dtype", "float32", "--batch", "2", "--image-size", "32"]


def test_saved_bytes_of_a_case_counted_by_hand() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)), torch.randn(2, 3)
    target = torch.tensor([1, 4])
    saved = bench_training.saved_bytes(lambda: F.cross_entropy(model(x), target), model.parameters())
    # x, ReLU's result once for itself and the layer after it, log-probabilities, targets, the sum of weights
    assert saved == 4 * (6 + 8 + 10) + 8 * 2 + 4


def test_saved_fraction_of_a_block_counted_by_hand(kernels) -> None:
    block = PoolFormerBlock(16)
    x = torch.randn(4, 16, 7, 7).contiguous(memory_format=torch.channels_last)
    eager, accelerated = (
        bench_training.saved_bytes(lambda model=model: model(x), model.parameters())
        for model in (block, accelerate(copy.deepcopy(block)))
    )
    # maps: both norms' inputs and results, both branches before their LayerScale, 4 + 4 around GELU;
    # ours: both sub-blocks' inputs. Means and deviations of either norm
    assert eager == 14 * x.nbytes + 2 * 2 * 4 * 4
    assert accelerated == 2 * x.nbytes + 2 * 2 * 4 * 4


def test_rows(sandbox) -> None:
    providers = ("ours", "accelerate", "eager")
    ran = sandbox.bench("training", *TINY, "--providers", *providers)
    rows = ran.by_provider
    fields = {"benchmark": "training", "direction": "step", "dtype": "float32", "model": "poolformer_s12"}
    assert_measured(rows, providers, **fields, shape="3x32x32", batch="2")
    for row in (rows[provider] for provider in providers):
        assert 1e-10 < float(row["loss_error"]) < 1e-4
        fraction = float(row["saved_bytes"]) / float(rows["eager"]["saved_bytes"])
        assert float(row["saved_fraction"]) == pytest.approx(fraction, rel=1e-4)
        assert f"{float(row['saved_bytes']) / 1e6:.1f} MB kept for the backward, {fraction:.1%} of" in ran.out
    assert float(rows["accelerate"]["saved_fraction"]) < 0.4  # 2 maps of 14 in blocks, more around them
    assert rows["copy"]["saved_bytes"] == rows["copy"]["loss_error"] == ""
    assert rows["copy"]["commit"]


def other_logits(model: nn.Module) -> nn.Module:
    model.register_forward_hook(lambda module, given, y: 1.01 * y)
    return model


def wrong_gradient(model: nn.Module) -> nn.Module:
    model.stages[2].blocks[3].mlp.fc1.weight.register_hook(torch.zeros_like)
    return model


@pytest.mark.parametrize(
    ("broken", "other_rule", "words"),
    [
        (other_logits, "WRONG_GRADIENT", "of the losses against float64"),
        (wrong_gradient, "WRONG_LOSS", "error 1 of the gradient of stages.2.blocks.3.mlp.fc1.weight"),
    ],
)
def test_a_wrong_provider_is_not_timed(broken, other_rule, words, sandbox, monkeypatch) -> None:
    lax = 2.0 if other_rule == "WRONG_LOSS" else (2.0, 2.0)
    monkeypatch.setitem(getattr(bench_training, other_rule), "float32", lax)  # each rule alone finds it
    monkeypatch.setitem(bench_training.PROVIDERS, "eager", lambda peer, ours: broken(peer))
    ran = sandbox.bench("training", *TINY, "--providers", "accelerate,eager", code=1)
    assert "eager: wrong: error" in ran.words
    assert words in ran.words
    assert list(ran.by_provider) == ["accelerate", "copy", "matmul"]
    assert ran.by_provider["accelerate"]["saved_fraction"] == ""


def test_bfloat16_gradients_off_by_a_factor_are_wrong(sandbox, monkeypatch) -> None:
    def scaled(model: nn.Module, factor: float) -> nn.Module:
        for name, p in model.named_parameters():
            if name.endswith("fc1.weight"):
                p.register_hook(lambda grad: factor * grad)
        return model

    monkeypatch.setitem(bench_training.PROVIDERS, "ours", lambda peer, ours: scaled(ours, 0.6))
    monkeypatch.setitem(bench_training.PROVIDERS, "eager", lambda peer, ours: scaled(peer, 1.4))
    options = [*TINY, "--dtype", "bfloat16", "--providers", "ours,accelerate,eager"]
    ran = sandbox.bench("training", *options, code=1)
    for provider, path in (("ours", "network"), ("eager", "stages")):
        words = rf"{provider}: wrong: error 0\.4\d? of the gradient of {path}\.\S+\.mlp\.fc1\.weight"
        assert re.search(words, ran.words)
    assert list(ran.by_provider) == ["accelerate", "copy", "matmul"]


def test_gradient_errors_by_hand() -> None:
    exact = {"a.0.w": torch.tensor([3.0]), "a.1.w": torch.tensor([4.0]), "a.1.b": torch.tensor([1e-10])}
    found = {"a.0.w": torch.tensor([3.0]), "a.1.w": torch.tensor([4.5]), "a.1.b": torch.tensor([1.0])}
    errors = bench_training.gradient_errors(found, exact)
    assert errors == {"a.0.w": 0.0, "a.1.w": 0.125, "a.*.w": 0.1}
    eager = {"a.0.w": 0.0, "a.1.w": 0.01, "a.*.w": 0.0475}
    words = bench_training.wrong_gradient(errors, eager, "float32")
    assert words == "error 0.12 of the gradient of a.1.w against float64, more than 0.02"
    assert bench_training.wrong_gradient(errors, eager, "bfloat16") is None  # 0.105 and 0.22 are the limits
    eager["a.*.w"] = 0.0425
    words = bench_training.wrong_gradient(errors, eager, "bfloat16")
    assert words == "error 0.1 of the gradient of a.*.w against float64, more than 0.095"
    found["a.0.w"] = torch.tensor([math.nan])
    assert bench_training.gradient_errors(found, exact)["a.*.w"] == math.inf
