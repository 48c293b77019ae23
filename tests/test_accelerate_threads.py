"""accelerate, restore, explain and the chains' cache, while other threads call the model."""

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from support.accelerate import (
    ALL,
    CALLS,
    PoolFormerBlock,
    blocks_of,
    classes_and_attributes,
    image,
    logits,
    make_model,
    results,
)
from support.nn import COPIES
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.accelerate import accelerate, blocks, equivalence, restore, unfused_reasons
from poolformer_kernels.nn.chain_cache import PLACE, forget_chain
from poolformer_kernels.ops.dispatch import select_backend

SECONDS = 1.5


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads take turns every few instructions, so that each order of events comes up."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(*works: Callable[[], object], seconds: float = SECONDS) -> list[int]:
    """Each work again and again in its own thread; how often each ran. An error of one is raised here."""
    end, failed, start = time.monotonic() + seconds, threading.Event(), threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> int:
        count = 0
        start.wait()
        try:
            while time.monotonic() < end and not failed.is_set():
                work()
                count += 1
        except BaseException:
            failed.set()
            raise
        return count

    with ThreadPoolExecutor(len(works)) as pool:
        return [*pool.map(run, works)]


def inference(model: nn.Module) -> Callable[[], None]:
    x = image((32, 32))
    with torch.no_grad():
        expected = logits(copy.deepcopy(model), x)

    def call() -> None:
        with torch.inference_mode():
            torch.testing.assert_close(logits(model, x), expected, atol=1e-4, rtol=1e-4)

    return call


def training(model: nn.Module) -> Callable[[], None]:
    x = image((32, 32))
    expected = results(copy.deepcopy(model), x)

    def call() -> None:
        with torch.enable_grad():
            given = results(model, x)
        for name, value in expected.items():
            tolerance = 1e-4 * max(1.0, value.abs().max().item())
            assert (given[name] - value).abs().max() <= tolerance, name

    return call


def changing(model: nn.Module, **options) -> Callable[[], None]:
    """Accelerates and restores."""
    seen = 0

    def change() -> None:
        nonlocal seen
        accelerate(model, **options) if seen % 2 == 0 else restore(model)
        seen += 1

    return change


def forgetting(model: nn.Module) -> Callable[[], None]:
    """Takes the chains away that calls keep in the model."""

    def forget() -> None:
        for module in model.modules():
            forget_chain(module)

    return forget


@pytest.mark.parametrize("source", ["timm", "timm v2", "transformers", "official"])
def test_calls_while_a_model_is_accelerated_and_restored(source, kernels):
    model = make_model(source)
    before = classes_and_attributes(model)
    works = [inference(model), inference(model), training(model), changing(model)]
    counts = together(*works)
    assert min(counts) > 2
    restore(model)
    assert classes_and_attributes(model) == before  # no chain came after restore


@pytest.mark.parametrize("source", ["timm", "transformers"])
def test_copies_and_explanations_meanwhile(source, kernels):
    """What reads all of a model, while calls keep chains in it and another thread takes them away."""
    model = accelerate(make_model(source))
    call = inference(model)

    def explain() -> None:
        assert pk.explain(model).summary in (ALL, "10 of 10 as modules")

    def copies() -> None:
        for copied in (COPIES["deepcopy"], COPIES["pickle"], partial(accelerate, inplace=False)):
            other = copied(model)
            assert not any(PLACE in vars(module) for module in other.modules())
            assert len(blocks_of(other)) == 5

    assert min(together(call, call, forgetting(model), explain, copies)) > 1


def test_own_models(kernels):
    """Their chains are found by many threads at once, and by copies while others look for them."""
    torch.manual_seed(0)
    model = pk.create_model("poolformer_s12", num_classes=3)
    del model.network[1:]
    model = nn.Sequential(model.patch_embed, model.network[0]).eval()
    call, copies = inference(model), partial(accelerate, model, inplace=False)

    def parts() -> None:
        with torch.inference_mode():
            model[1](torch.zeros(1, 64, 5, 6))

    def explain() -> None:
        assert pk.explain(model).summary == "4 of 4 on cpp"

    assert min(together(call, call, parts, forgetting(model), copies, explain)) > 1


def test_modules_that_come_and_go_meanwhile(kernels):
    """accelerate, restore and explain walk through a model in which another thread puts and takes modules."""
    model = make_model("official")
    extra = [f"extra_{i}" for i in range(40)]

    def change() -> None:
        for block in blocks_of(model):
            for name in extra:
                block.mlp.add_module(name, nn.Identity())
            for name in extra:
                delattr(block.mlp, name)

    def explain() -> None:
        assert len(pk.explain(model).calls) == len(CALLS)

    assert min(together(change, changing(model), explain, inference(model))) > 1


@pytest.mark.parametrize("ask", [partial(accelerate, strict=True), unfused_reasons])
def test_a_class_is_read_once(ask, monkeypatch, kernels):
    """A block that another thread has just accelerated is not taken for one of another class of its own."""
    block, read = PoolFormerBlock(), blocks.recipe_in

    def changed_after(kind: type[nn.Module]) -> blocks.Recipe | None:
        recipe = read(kind)
        monkeypatch.undo()
        accelerate(block)
        return recipe

    monkeypatch.setattr(sys.modules[accelerate.__module__], "recipe_in", changed_after)
    assert ask(block) in (block, ("not accelerated: see poolformer_kernels.accelerate",) * 2)
    assert unfused_reasons(block) == (None, None)


def test_one_class_for_a_recipe(kernels):
    """However many threads ask for it at once: a second one would look like a class derived further."""
    pool = ThreadPoolExecutor(4)

    def fresh() -> None:
        made = type("Fresh", (PoolFormerBlock,), {})
        recipe = equivalence.check_equivalence(made(), made)
        start = threading.Barrier(4)

        def ask(_: int) -> type:
            start.wait()
            return blocks.accelerated_class(recipe)

        assert len({*pool.map(ask, range(4))}) == 1

    with pool:
        together(fresh, inference(make_model("official")))


def test_a_comparison_chooses_no_backend_for_others(kernels):
    """The choice of a backend holds for all threads: none may see, or undo, one that accelerate makes."""

    def compare() -> None:
        made = type("Fresh", (PoolFormerBlock,), {})
        assert type(accelerate(made())) is not made

    def select() -> None:
        assert select_backend("cpu", torch.float32) == "cpp"
        assert pk.explain(torch.zeros(1, 1, 1, 1)).summary == "2 of 2 on cpp"

    counts = together(compare, compare, select)
    assert min(counts) > 2
    assert select_backend("cpu", torch.float32) == "cpp"


def test_a_comparison_draws_no_numbers_of_others(monkeypatch, kernels):
    """Neither changes the other's random numbers."""
    busy, plain = make_model("timm", drop_path=0.3).train(), make_model("timm", drop_path=0.1)
    compared, masks = {}, []
    monkeypatch.setattr(equivalence, "_compared", compared)

    def train() -> None:
        logits(busy, image()).sum().backward()
        masks.append(tuple(torch.rand(4).tolist()))

    def compare() -> None:
        compared.clear()
        assert pk.explain(accelerate(plain, inplace=False)).summary == ALL

    assert min(together(train, compare)) > 2
    assert len(masks) == len({*masks})
