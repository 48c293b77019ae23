"""accelerate, restore, explain and the chains' cache, while other threads call the model."""

import copy
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from support.accelerate import PoolFormerBlock, blocks_of, image, logits, make_model, results
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
    end, counts, errors = time.monotonic() + seconds, [0] * len(works), []
    start = threading.Barrier(len(works))

    def run(i: int, work: Callable[[], object]) -> None:
        start.wait()
        try:
            while time.monotonic() < end and not errors:
                work()
                counts[i] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=given) for given in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return counts


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


@pytest.mark.parametrize("source", ["timm", "timm v2", "transformers", "official"])
def test_calls_while_a_model_is_accelerated_and_restored(source, kernels):
    model = make_model(source)
    classes, attributes = [[*map(f, model.modules())] for f in (type, lambda m: [*vars(m)])]
    works = [inference(model), inference(model), training(model), changing(model)]
    counts = together(*works)
    assert min(counts) > 2
    restore(model)
    assert [*map(type, model.modules())] == classes
    assert [[*vars(module)] for module in model.modules()] == attributes  # no chain came after restore


@pytest.mark.parametrize("source", ["timm", "transformers"])
def test_copies_and_explanations_meanwhile(source, kernels):
    """What reads all of a model, while calls keep chains in it and another thread takes them away."""
    model = accelerate(make_model(source))
    call = inference(model)

    def forget() -> None:
        for module in model.modules():
            forget_chain(module)

    def explain() -> None:
        assert pk.explain(model).summary in ("10 of 10 on cpp", "10 of 10 as modules")

    def copies() -> None:
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            accelerate(model, inplace=False),
        ):
            assert not any(PLACE in vars(module) for module in other.modules())
            assert len(blocks_of(other)) == 5

    assert min(together(call, call, forget, explain, copies)) > 1


def test_own_models(kernels):
    """Their chains are found by many threads at once, and by copies while others look for them."""
    torch.manual_seed(0)
    model = pk.create_model("poolformer_s12", num_classes=3)
    del model.network[1:]
    model = nn.Sequential(model.patch_embed, model.network[0]).eval()
    call = inference(model)

    def forget() -> None:
        for module in model.modules():
            forget_chain(module)

    def copies() -> None:
        accelerate(model, inplace=False)

    def parts() -> None:
        with torch.inference_mode():
            model[1](torch.zeros(1, 64, 5, 6))

    def explain() -> None:
        assert pk.explain(model).summary == "4 of 4 on cpp"

    assert min(together(call, call, parts, forget, copies, explain)) > 1


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
        assert len(pk.explain(model).calls) == 10

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
    model = make_model("official")
    found: list[type] = []

    def fresh() -> None:
        made = type("Fresh", (PoolFormerBlock,), {})
        recipe = equivalence.check_equivalence(made(), made)
        start = threading.Barrier(4)

        def ask() -> None:
            start.wait()
            found.append(blocks.accelerated_class(recipe))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({*found}) == 1
        found.clear()

    together(fresh, inference(model), seconds=SECONDS)


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
