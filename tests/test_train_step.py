"""What a run computes: rates, gradients, draws, precisions, and the models that it begins with."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.train import ONE, SMALL, in_processes, losses, require_train, train, validate_words

require_train()

import timm
from safetensors.torch import load_file
from torch.nn.utils import get_total_norm

from poolformer_kernels.accelerate import unfused_reasons
from poolformer_kernels.cli.main import main
from poolformer_kernels.nn import DropPath
from poolformer_kernels.train import loop
from poolformer_kernels.train.data import open_data
from poolformer_kernels.train.networks import StochasticDepth, build
from poolformer_kernels.train.processes import Processes
from poolformer_kernels.train.recipe import RecipeError, resolve


def trainer(run, **changes):
    """A run of the digits that has not begun."""
    recipe = resolve("paper", {"model": "poolformer_digits", "batch_size": 128, "workers": 0, **changes})
    data, processes = open_data("sample:digits"), Processes(0, 1, torch.device("cpu"))
    recipe = loop.check(recipe, data, run, False, processes)
    made = loop._Trainer(recipe, data, run, processes, loop._Signals(torchrun=False), show=False)
    made.open()
    return made


def test_learning_rates_of_the_papers_schedule(run) -> None:
    """Warm-up over 5 epochs from 1e-6, cosine per epoch to 1e-5 at 300, then 10 epochs there."""
    made, top = trainer(run), 1e-3 * 128 / 1024
    assert made.steps == 11 * 310
    for epoch in (0, 1, 4, 5, 6, 150, 299, 300, 309):
        expected = 1e-5
        if epoch < 5:
            expected = 1e-6 + (top - 1e-6) * epoch / 5
        elif epoch < 300:
            expected = 1e-5 + (top - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2
        for step in (11 * epoch, 11 * epoch + 10):
            made.set_rate(step)
            assert {group["lr"] for group in made.optimizer.param_groups} == {made.rate}
            assert made.rate == pytest.approx(expected, rel=1e-9), epoch


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_has_the_gradient_of_the_mean_loss_clipped(tmp_path, accumulate) -> None:
    """Against the same batch at once, written by hand."""
    same = {"precision": "float32", "drop_path": 0.3}
    made = trainer(tmp_path / "run", accumulate=accumulate, clip_grad=0.01, **same)
    batches = list(itertools.islice(made.task.loader(0), accumulate))
    weights = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.optimizer.param_groups[0]["lr"] = made.optimizer.param_groups[1]["lr"] = 0.0
    made._one_step(batches)
    clipped = {name: p.grad.clone() for name, p in made.model.named_parameters()}
    norm = get_total_norm(clipped.values()).item()
    assert norm == pytest.approx(0.01, rel=1e-4)
    assert all(p.equal(weights[name]) for name, p in made.model.named_parameters())

    whole = trainer(tmp_path / "whole", **same)
    images, targets = (torch.cat([getattr(b, what) for b in batches]) for what in ("images", "targets"))
    whole.depth.set(0, list(range(128)))
    logits = whole.model(images.contiguous(memory_format=torch.channels_last))
    torch.nn.functional.cross_entropy(logits, targets).backward()
    exact = {name: p.grad for name, p in whole.model.named_parameters()}
    size = get_total_norm(exact.values()).item()
    for name, g in exact.items():
        difference = (clipped[name] * (size / norm) - g).norm().item()
        assert difference <= 1e-5 * size, name


# ---- precision, eager, other models ------------------------------------------------------------------------


def distance(some: list[float], others: list[float]) -> float:
    """The mean of the losses' distances."""
    return np.abs(np.subtract(some, others)).mean()


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_our_layers_follow_eagers_losses(tmp_path, precision) -> None:
    more = [*ONE, "--precision", precision, "--head", "timm", "--drop-path", "0.3"]
    assert train(tmp_path / "ours", *more) == 0
    assert train(tmp_path / "eager", *more, "--eager") == 0
    ours, eager = losses(tmp_path / "ours"), losses(tmp_path / "eager")
    assert ours[0] == pytest.approx(eager[0], rel=1e-5 if precision == "float32" else 1e-2)
    assert distance(ours, eager) < (2e-3 if precision == "float32" else 2e-2)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_hundred_steps_are_as_far_from_eagers_as_eagers_on_other_threads(tmp_path, precision) -> None:
    """Threads change how eager rounds, and nothing else."""
    more = [*SMALL, "--batch-size", "64", "--epochs", "5", "--cooldown-epochs", "0", "--head", "timm"]
    more += ["--precision", precision]
    found = {}
    for name, threads in (("ours", 1), ("eager", 1), ("rounding", 2)):
        in_processes(tmp_path / name, *more, *["--eager"] * (name != "ours"), threads=threads)
        found[name] = losses(tmp_path / name)[:100]
    assert len(found["ours"]) == 100
    assert found["ours"] != found["eager"]
    assert distance(found["ours"], found["eager"]) <= 2 * distance(found["rounding"], found["eager"]) + 1e-3


def test_timms_models_are_accelerated(folder, run) -> None:
    best, name = run / "best.safetensors", "timm:poolformerv2_s12"
    options = [*ONE, "--batch-size", "8", "--image-size", "32", "--model", name]
    assert train(run, *options, data=folder) == 0
    assert len(losses(run)) == 2
    assert "patch_embed.proj.weight" in load_file(best)  # official names
    assert main(validate_words(best, folder)) == 0
    model = build(resolve("paper", {"model": name, "drop_path": 0.2}), 2)
    assert type(model.stages[0].blocks[1].drop_path1) is DropPath
    assert all(unfused_reasons(block) == (None, None) for stage in model.stages for block in stage.blocks)


def test_a_checkpoint_of_another_number_of_classes_keeps_its_body(tmp_path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("poolformer_s12", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    recipe = resolve("finetune", {"checkpoint": str(tmp_path / "timm.pth")})
    model = build(recipe, 3)
    assert model.head.weight.shape == (3, 512)
    assert model.num_classes == 3
    assert model.head_mode == "timm"  # that of the file
    assert build(replace(recipe, head="official"), 3).head_mode == "official"
    with pytest.raises(RecipeError, match="has 7 classes, the data 3"):
        build(recipe, 3, new_classifier=False)
    assert model.patch_embed.proj.weight.equal(source.stem.conv.weight)
    assert model.network[6][1].mlp.fc2.weight.equal(source.stages[3].blocks[1].mlp.fc2.weight)
    plain = build(resolve("finetune", {"checkpoint": str(tmp_path / "timm.pth"), "eager": True}), 7)
    assert plain.head.fc.weight.equal(source.head.fc.weight)


def test_draws_of_stochastic_depth_are_of_step_and_position() -> None:
    recipe = resolve("small", {"drop_path": 0.4, "batch_size": 64})
    model = build(recipe, 10)
    paths = [m for m in model.modules() if isinstance(m, DropPath)]
    assert [round(m.drop_prob, 2) for m in paths] == [0.1, 0.2, 0.3, 0.4]

    def scales(step: int, positions: list[int]) -> torch.Tensor:
        depth = StochasticDepth(model, recipe, len(positions), torch.device("cpu"))
        depth.set(step, positions)
        x = torch.ones(len(positions), 1, 1, 1)
        return torch.stack([m(x).flatten() for m in paths for _ in range(2)])

    model.train()
    whole = scales(3, list(range(64)))
    assert whole[:, 10:20].equal(scales(3, list(range(10, 20))))
    assert not whole.equal(scales(4, list(range(64))))
    assert not whole[0].equal(whole[1])  # the two sub-blocks of a block
    kept = torch.cat([scales(step, list(range(64))) for step in range(200)], 1)
    expected = torch.tensor([m.drop_prob for m in paths for _ in range(2)])
    assert ((kept == 0).float().mean(1) - expected).abs().max() < 0.02
    assert (kept.mean(1) - 1).abs().max() < 0.04
