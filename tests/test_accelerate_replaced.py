"""Modules that are replaced and put back, wrapped and unwrapped: right meanwhile, fast again afterwards."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.accelerate import (
    CALLS,
    DEPTHS,
    DIFFERENT,
    SOURCES,
    PoolFormerBlock,
    assert_equal,
    blocks_of,
    features,
    image,
    logits,
    make_block,
    make_model,
    results,
)
from support.chain import Calls
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import poolformer_kernels as pk
from poolformer_kernels.accelerate import accelerate, blocks, equivalence, restore, unfused_reasons


class LoraConv2d(nn.Module):
    """A 1x1 convolution and a product of two narrow matrices beside it, as PEFT wraps one."""

    def __init__(self, base: nn.Conv2d, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        generator = torch.Generator().manual_seed(base.out_channels)
        for name, shape in (("a", (rank, base.in_channels)), ("b", (base.out_channels, rank))):
            values = torch.randn((*shape, 1, 1), generator=generator).mul_(0.2)
            self.register_parameter(name, nn.Parameter(values.to(base.weight)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + nn.functional.conv2d(nn.functional.conv2d(x, self.a), self.b)

    def merged(self) -> nn.Conv2d:
        """The convolution, which has learned."""
        with torch.no_grad():
            self.base_layer.weight += (self.b.flatten(1) @ self.a.flatten(1))[:, :, None, None]
        return self.base_layer.requires_grad_()


class Saved(nn.Module):
    """A module that is trained whole beside a LoRA, and the one that it was made of."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original, self.trained = original, copy.deepcopy(original)

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(x)

    def merged(self) -> nn.Module:
        return self.trained


class Outer(nn.Module):
    """What counts, logs or checkpoints the calls of a module of any kind."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Tensor:
        return 1.0 * self.wrapped(x)

    def merged(self) -> nn.Module:
        return self.wrapped


def parts_of(source: str) -> dict[str, tuple[type[nn.Module], list[str]]]:
    """By what is wrapped: the wrapper and the paths in a block."""
    norms, mixer, body, layers = ["norm1", "norm2"], "token_mixer", "mlp", ("fc1", "fc2")
    if source == "transformers":
        norms, mixer = ["before_norm", "after_norm"], "pooling"
        body, layers = "output", ("conv1", "conv2")
    return {
        "layers": (LoraConv2d, [f"{body}.{name}" for name in layers]),
        "norms": (Saved, norms),
        "second norm and mixer": (Saved, [norms[1], mixer]),
        "bodies": (Outer, [mixer, body]),
    }


def wrap(model: nn.Module, source: str, what: str) -> nn.Module:
    wrapper, paths = parts_of(source)[what]
    for block in blocks_of(model):
        for path in paths:
            block.set_submodule(path, wrapper(block.get_submodule(path)))
    return model


def unwrap(model: nn.Module) -> nn.Module:
    for path, module in [*model.named_modules()]:
        if isinstance(module, (LoraConv2d, Saved, Outer)):
            model.set_submodule(path, module.merged())
    return model


def backends(model: nn.Module) -> list[str]:
    return [call.backend for call in pk.explain(model).calls]


def assert_fast(model: nn.Module, source: str) -> None:
    """Every block is operators in training and of a chain in inference; the numbers are the modules'."""
    plain, x = restore(copy.deepcopy(model)), image()
    assert backends(model) == ["cpp"] * len(CALLS)
    assert "modules" not in str(pk.explain(model))
    with Calls() as calls:
        given = results(model, x)
    assert_equal(given, results(plain, x), 1e-4)
    each = {f"{name}_cpp": sum(DEPTHS) for name in CALLS}
    assert calls.ours() == each
    with torch.inference_mode():
        logits(model, x)
        with Calls() as calls:
            y = logits(model, x)
        torch.testing.assert_close(y, logits(plain, x), atol=1e-4, rtol=1e-4)
    chains = {"transformers": sum(DEPTHS)}.get(source, len(DEPTHS))
    # poolformerv2's stages have StarReLU, which no chain computes
    assert calls.ours() == (each if source == "timm v2" else {"chain_cpp": chains})


@pytest.mark.parametrize("order", ["accelerated first", "wrapped first"])
@pytest.mark.parametrize("what", ["layers", "norms", "second norm and mixer", "bodies"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:accelerate made nothing faster")
def test_wrapped_and_unwrapped(source, what, order, kernels):
    model, x = make_model(source), image()
    if order == "accelerated first":
        logits(accelerate(model), x)
        wrap(model, source, what)
    else:
        wrap(model, source, what)
        if what != "layers":  # of one block something must fit
            unwrap(blocks_of(model)[0])
        accelerate(model)
    wrapper, paths = parts_of(source)[what]
    reasons = [call.reason for call in pk.explain(model).calls if call.backend == "modules"]
    assert reasons
    kind = f"{wrapper.__module__}.{wrapper.__name__}"
    assert all(any(reason.startswith(f"{path} is {kind}, ") for path in paths) for reason in reasons)
    expected = logits(restore(copy.deepcopy(model)), x)
    torch.testing.assert_close(logits(model, x), expected, atol=1e-4, rtol=1e-4)
    unwrap(model)
    assert_fast(model, source)


@pytest.mark.parametrize("order", ["accelerated first", "parametrized first"])
def test_parametrized_and_no_longer(order, kernels):
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, x = make_model("timm"), image()
    before = logits(model, x)
    layers = [getattr(block.mlp, name) for block in blocks_of(model) for name in ("fc1", "fc2")]
    steps: list[Callable[[], object]] = [
        lambda: accelerate(model),
        lambda: [parametrize.register_parametrization(layer, "weight", Doubled()) for layer in layers],
    ]
    for step in steps if order == "accelerated first" else reversed(steps):
        step()
    assert backends(model) == ["cpp", "modules"] * sum(DEPTHS)
    kind = "torch.nn.utils.parametrize.ParametrizedConv2d"
    assert pk.explain(model).calls[1].reason == f"mlp.fc1 is {kind}, not Conv2d"
    doubled = logits(model, x)
    assert (doubled - before).abs().max() > 1e-2
    torch.testing.assert_close(doubled, logits(restore(copy.deepcopy(model)), x), atol=1e-4, rtol=1e-4)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    assert_fast(model, "timm")
    torch.testing.assert_close(logits(model, x), doubled, atol=1e-4, rtol=1e-4)


def test_put_back_the_same_module_and_another_activation(kernels):
    model, x = accelerate(make_model("timm")), image()
    expected = results(model, x)
    block = blocks_of(model)[2]
    fc1, act = block.mlp.fc1, block.mlp.act
    block.mlp.fc1 = nn.Identity()
    assert unfused_reasons(block) == (None, "mlp.fc1 is torch.nn.Identity, not Conv2d")
    block.mlp.fc1 = fc1
    assert_equal(results(model, x), expected)
    block.mlp.act = nn.ReLU()  # another that an operator computes
    assert_fast(model, "timm")
    assert (results(model, x)["logits"] - expected["logits"]).abs().max() > 1e-3
    block.mlp.act = act
    assert_fast(model, "timm")
    assert_equal(results(model, x), expected)


class Shifted(nn.GroupNorm):
    """Looks like a GroupNorm and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x


@pytest.mark.parametrize(("name", "which"), [("norm1", 0), ("norm2", 1)])
def test_what_is_put_in_is_compared_once(name, which, monkeypatch, kernels):
    compare, seen = equivalence._compare, []
    monkeypatch.setattr(equivalence, "_compared", {})
    monkeypatch.setattr(equivalence, "_compare", lambda *args: seen.append(args) or compare(*args))
    block, x = accelerate(make_block()), features()
    norm = getattr(block, name)
    seen.clear()
    setattr(block, name, Shifted(1, 16))
    block.mark = object()  # what cannot be compared with what was seen before is not remembered for others
    expected = restore(copy.deepcopy(block))(x)
    for _ in range(3):
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)
    assert len(seen) == 1
    assert unfused_reasons(block)[which] == f"the forward of support.accelerate.PoolFormerBlock {DIFFERENT}"
    setattr(block, name, norm)
    for _ in range(3):
        assert (block(x) - expected).abs().max() > 1e-2
    assert len(seen) == 2
    assert unfused_reasons(block) == (None, None)


def test_copies_and_the_choice_of_parts_last(kernels):
    """A copy made while wrapped is fast once it is unwrapped, and what was not asked for stays modules."""
    model = accelerate(wrap(make_model("timm"), "timm", "layers"), save_hidden=True)
    other = unwrap(copy.deepcopy(model))
    assert backends(other) == ["cpp"] * 10
    logits(other, image())
    assert {blocks.recipe_of(block).save_hidden for block in blocks_of(other)} == {True}
    model = unwrap(accelerate(wrap(make_model("timm"), "timm", "layers"), mlp=False))
    assert backends(model) == ["cpp", "modules"] * 5
    assert {call.reason for call in pk.explain(model).calls[1::2]} == {"accelerate was called with mlp=False"}


def test_a_checkpointed_call_computes_the_same_twice(kernels):
    """Also the one that finds other modules: what it saves is what its repetition saves."""
    block, x = accelerate(PoolFormerBlock(), mlp=True), features().requires_grad_()
    block.mlp.act = nn.SiLU()
    (given,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
    (expected,) = torch.autograd.grad(restore(copy.deepcopy(block))(x).sum(), x)
    torch.testing.assert_close(given, expected)
    assert unfused_reasons(block) == (None, None)


def test_a_class_derived_further_cannot_be_renewed(kernels):
    block, x = accelerate(make_block()), features()
    block.__class__ = type("Sharded", (type(block),), {})
    block.mlp.act = nn.ReLU()
    mixer, mlp = unfused_reasons(block)
    assert mixer is None
    assert mlp.startswith("a module in it was replaced after accelerate, and the block's class was derived")
    torch.testing.assert_close(block(x), PoolFormerBlock.forward(block, x), atol=1e-5, rtol=1e-4)
    assert type(block).__name__ == "Sharded"


def test_compiled_while_wrapped_and_after(fresh_dynamo, kernels):
    block, x = accelerate(make_block()), features()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    plain = restore(copy.deepcopy(block))
    for _ in range(2):
        torch.testing.assert_close(compiled(x), plain(x), atol=1e-5, rtol=1e-4)
        for each in (block, plain):
            each.mlp.fc1 = LoraConv2d(each.mlp.fc1)
        torch.testing.assert_close(compiled(x), plain(x), atol=1e-5, rtol=1e-4)
        for each in (block, plain):
            unwrap(each)
    torch.testing.assert_close(compiled(x), plain(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("renew", [pk.explain, accelerate, lambda block: block(features())])
def test_compiled_after_it_was_unwrapped(renew, fresh_dynamo, kernels):
    """The compiler does not compare anew: explain, accelerate or a call does, and explain says what is so."""
    block = make_block()
    block.mlp.fc1 = LoraConv2d(block.mlp.fc1)
    unwrap(accelerate(block))
    renew(block)
    backend = EagerAndRecordGraphs()
    with torch.no_grad():
        torch.compile(block, backend=backend, fullgraph=True)(features())
    assert backend.graphs
    for graph in (*backend.graphs, torch.export.export(block, (features(),))):
        nodes = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert not any("conv" in node for node in nodes)
        assert any("poolformer" in node for node in nodes)
    assert backends(block) == ["cpp", "cpp"]
