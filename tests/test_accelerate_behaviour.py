"""What timm's and transformers' own tests ask of a PoolFormer, of accelerated models and in numbers.

The plugin support.accelerate_plugin runs their test files on accelerated models; here is what they look at.
"""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from support.accelerate import CALLS, blocks_of, image, logits, make_model
from support.peers import assert_as_accurate, randomise, relative_error, require
from torch import Tensor, nn

from poolformer_kernels.accelerate import accelerate, unfused_reasons

TIMM = ("timm", "timm v2")
timm_source = pytest.mark.parametrize("source", TIMM)


def accelerated(plain: nn.Module) -> nn.Module:
    """A copy whose blocks all run as operators."""
    model = accelerate(copy.deepcopy(plain))
    assert {unfused_reasons(block) for block in blocks_of(model)} == {(None, None)}
    return model


def assert_right(plain: nn.Module, x: Tensor, function: Callable[..., list[Tensor]]) -> list[Tensor]:
    """Each of the function's results by the error rule in the L2 norm; returns the accelerated model's.

    The function may change the model that it is given.
    """
    ours, eager = (function(model, x) for model in (accelerated(plain), copy.deepcopy(plain)))
    exact = function(copy.deepcopy(plain).double(), x.double())
    for i, (given, other, right) in enumerate(zip(ours, eager, exact, strict=True)):
        assert (given.dtype, given.is_contiguous()) == (other.dtype, other.is_contiguous()), i
        assert_as_accurate(given, other, right, what=f"result {i}")
    return ours


def same(given: list[Tensor], expected: list[Tensor]) -> bool:
    return len(given) == len(expected) and all(map(torch.equal, given, expected))


def gradients(model: nn.Module) -> Tensor:
    """Of all parameters, after a backward pass that reached each."""
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def weighted_sum(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()


def backward(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = logits(model, x)
    weighted_sum(y).backward()
    return [y.detach(), gradients(model)]


# ---- timm: forward, head, classifier -----------------------------------------------------------------------


@timm_source
@pytest.mark.parametrize("size", [(32, 32), (45, 71), (96, 64)], ids=str)
@torch.no_grad()
def test_features_and_head(source, size, kernels):
    def parts(model, x):
        features = model.forward_features(x)
        pre_logits = model.forward_head(features, pre_logits=True)
        return [features, pre_logits, model.forward_head(features), model(x)]

    *_, after_features, y = assert_right(make_model(source), image(size), parts)
    assert torch.equal(after_features, y)


@timm_source
@torch.no_grad()
def test_classifier_replaced_and_removed_and_pooling_removed(source, kernels):
    def changed(model, x):
        model.reset_classifier(5)
        for p in model.get_classifier().parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
        replaced = model.to(x.dtype)(x)
        pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0)
        pooled = model(x)
        assert torch.equal(pooled, pre_logits)
        model.reset_classifier(0, "")
        return [replaced, pooled, model(x)]

    replaced, pooled, unpooled = assert_right(make_model(source), image((45, 71)), changed)
    assert (replaced.shape[1], pooled.dim(), unpooled.dim()) == (5, 2, 4)


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformerv2_s12"])
@torch.no_grad()
def test_created_without_classifier_and_pooling(name, kernels):
    plain = randomise(require("timm").create_model(name, num_classes=0, global_pool="")).eval()
    for stage in plain.stages:
        del stage.blocks[1:]
    (features,) = assert_right(plain, image((45, 71)), lambda model, x: [model(x)])
    assert features.shape == (2, 512, 2, 3)


# ---- timm: features ----------------------------------------------------------------------------------------


@timm_source
@pytest.mark.parametrize(
    ("kind", "first"),  # in a graph are no blocks to accelerate
    [*product(("List", "Dict", "Hook", "Getter"), ("accelerated", "extractor")), ("Graph", "accelerated")],
)
@torch.no_grad()
def test_features_of_every_kind(source, kind, first, kernels):
    """Extractors that timm makes; they take its modules out of a model."""
    models = require("timm", "models._features_fx").models
    options = {"flatten_sequential": True} if kind in ("List", "Dict", "Hook") else {}
    place = models._features_fx if kind == "Graph" else models._features
    make = partial(getattr(place, f"Feature{kind}Net"), out_indices=(1, 2), **options)
    plain = make_model(source) if first == "accelerated" else make(make_model(source))

    def extract(model, x):
        y = (make(model) if first == "accelerated" else model)(x)
        return [*y.values()] if isinstance(y, dict) else [*y]

    given = assert_right(plain, image((45, 71)), extract)
    assert [y.shape[1:] for y in given] == [(24, 6, 9), (32, 3, 5)]


@timm_source
@torch.no_grad()
def test_intermediates(source, kernels):
    def intermediates(model, x):
        last, all_four = model.forward_intermediates(x)
        assert torch.equal(last, all_four[-1])
        stopped, two = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
        assert torch.equal(stopped, two[-1])
        only = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert same(two, all_four[::2])
        assert same(only, all_four[2:])
        assert torch.equal(last, model.forward_features(x))
        model.prune_intermediate_layers([0, 1])
        assert torch.equal(model(x), all_four[1])
        return all_four

    assert len(assert_right(make_model(source), image((45, 71)), intermediates)) == 4


# ---- timm: backward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [*TIMM, "transformers"])
def test_gradients_add_up(source, kernels):
    def twice(model, x):
        y, once = backward(model.train(), x)
        _, both = backward(model, x)
        assert torch.equal(both, 2 * once)
        return [y, once]

    assert_right(make_model(source), image((45, 71)), twice)


@timm_source
def test_frozen_stages_get_no_gradient(source, kernels):
    freeze = require("timm").utils.freeze

    def frozen(model, x):
        freeze(model.train(), ["stem", "stages.0", "stages.1.blocks.0.norm1", "stages.2.blocks.0.mlp"])
        y = model(x)
        weighted_sum(y).backward()
        names = {name for name, p in model.named_parameters() if p.grad is None}
        left_out = ("stem.", "stages.0.", "stages.1.blocks.0.norm1.", "stages.2.blocks.0.mlp.")
        assert names == {name for name, _ in model.named_parameters() if name.startswith(left_out)}
        return [y.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]

    assert_right(make_model(source), image(), frozen)


@timm_source
def test_checkpointed_stages(source, operator_calls, kernels):
    """Drop paths are drawn as before. Blocks called one by one hand on no statistics: rounding differs."""

    def run(model, checkpointed):
        torch.manual_seed(0)
        model.train().set_grad_checkpointing(checkpointed)
        last, features = model.forward_intermediates(image())
        weighted_sum(model.forward_head(last)).backward()
        return [*(y.detach() for y in features), gradients(model)]

    plain = make_model(source, drop_path=0.5)
    expected = run(copy.deepcopy(plain), False)
    for checkpointed in (False, True):
        model = accelerated(plain)
        operator_calls.clear()
        assert max(map(relative_error, run(model, checkpointed), expected)) < 5e-6
        assert (len(operator_calls) > len(CALLS)) == checkpointed  # some ran again


# ---- timm: TorchScript and torch.fx ------------------------------------------------------------------------


@timm_source
def test_torchscript(source, tmp_path):
    """The modules' code is what gets compiled, so the numbers are the plain model's bit by bit."""
    timm, plain, x = require("timm"), make_model(source), image((45, 71))
    expected = backward(copy.deepcopy(plain), x)
    with timm.layers.set_scriptable(True):
        scripted = torch.jit.script(accelerated(plain))
    torch.jit.save(scripted, tmp_path / "model.pt")
    for model in (scripted, torch.jit.load(tmp_path / "model.pt")):
        assert same(backward(model, x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.freeze(scripted)(x), expected[0])


@timm_source
def test_traced_and_scripted_graph(source):
    """torchvision's feature extractor, trained and compiled by TorchScript: the plain model's, bit by bit."""
    extraction = require("torchvision", "models.feature_extraction").models.feature_extraction
    timm, x = require("timm"), image((45, 71))
    options = {"leaf_modules": timm.models.get_notrace_modules(), "param_shapes_constant": True}
    options["autowrap_functions"] = timm.models.get_notrace_functions()
    nodes = {"stages.1": "features", "head.fc": "logits"}

    def results(model):
        graph = extraction.create_feature_extractor(model, nodes, tracer_kwargs=options)
        found = []
        for mode in (True, False):
            y = graph.train(mode)(x)
            graph.zero_grad()
            weighted_sum(y["logits"]).backward()
            found += [*y.values(), gradients(graph)]
        with torch.inference_mode():
            y = torch.jit.script(graph)(x)
        assert same([*y.values()], found[3:5])
        return found

    plain = make_model(source)
    assert same(results(accelerated(plain)), results(plain))


@timm_source
@torch.no_grad()
def test_blocks_as_leaves_of_a_graph(source, kernels):
    """A tracer that does not look into blocks keeps them, and they run as operators."""
    extraction = require("torchvision", "models.feature_extraction").models.feature_extraction
    leaves = [require("timm").models.metaformer.MetaFormerBlock]

    def extract(model, x):
        graph = extraction.create_feature_extractor(
            model, ["stages.2", "head.fc"], tracer_kwargs={"leaf_modules": leaves}
        )
        return [*graph(x).values()]

    given = assert_right(make_model(source), image((45, 71)), extract)
    assert not same(given, extract(make_model(source), image((45, 71))))


# ---- transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"use_layer_scale": False, "drop_path": 0.3},
        {"hidden_act": "relu", "pool_size": 5},
        {"hidden_act": "gelu_new", "mlp_ratio": 2.5},
        {"hidden_act": "silu", "num_channels": 1, "num_labels": 1},
    ],
    ids=str,
)
def test_configurations(options, kernels):
    def both(model, x):
        with torch.no_grad():
            y = model(x).logits
        return [y, *backward(model, x)]

    x = image((45, 71))[:, : options.get("num_channels", 3)]
    assert_right(make_model("transformers", **options), x, both)


@pytest.mark.parametrize("kind", ["model", "classifier"])
@pytest.mark.parametrize("size", [(64, 64), (33, 47)], ids=str)
@torch.no_grad()
def test_hidden_states(kind, size, kernels):
    """By argument as by configuration, in a dictionary as in a tuple."""

    def states(model, x):
        y = model(x, output_hidden_states=True)
        assert len(y.hidden_states) == 4
        fields = [y[0], *y.hidden_states]
        if kind == "model":
            assert torch.equal(y.last_hidden_state, y.hidden_states[-1])
        given = model(x, output_hidden_states=True, return_dict=False)
        assert same([given[0], *given[-1]], fields)
        assert len(given) == (3 if kind == "model" else 2)
        assert model(x).hidden_states is None
        model.config.output_hidden_states = True
        model.config.return_dict = False
        given = model(x)
        assert same([given[0], *given[-1]], fields)
        return fields

    plain = make_model("transformers")
    if kind == "model":
        plain = plain.poolformer
    assert_right(plain, image(size), states)


def test_gradients_of_hidden_states(kernels):
    def retained(model, x):
        y = model(x, output_hidden_states=True)
        for state in y.hidden_states:
            state.retain_grad()
        weighted_sum(y.logits).backward()
        return [state.grad for state in y.hidden_states]

    assert_right(make_model("transformers"), image(), retained)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.tensor([3, 6])),
        ("multi_label_classification", torch.eye(7)[[3, 6]]),
        ("regression", torch.linspace(-1, 1, 14).view(2, 7)),
        (None, torch.tensor([0, 1])),
    ],
)
def test_losses(problem, labels, kernels):
    def train(model, x):
        model.config.problem_type = problem
        given = labels.to(x.dtype) if labels.is_floating_point() else labels
        y = model.train()(x, labels=given)
        y.loss.backward()
        loss, y = model(x, labels=given, return_dict=False)
        return [loss.detach()[None], y.detach(), gradients(model)]

    assert_right(make_model("transformers"), image((45, 71)), train)


@pytest.mark.parametrize("source", [*TIMM, "transformers"])
@torch.no_grad()
def test_deterministic_and_no_sample_knows_another(source, kernels):
    model = accelerated(make_model(source))
    x = torch.cat([image(seed=seed) for seed in range(2)])
    y = logits(model, x)
    assert torch.equal(logits(model, x), y)
    each = torch.cat([logits(model, sample[None]) for sample in x])
    torch.testing.assert_close(each, y, rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        assert torch.equal(logits(model, x), logits(model, x))


@torch.no_grad()
def test_saved_and_loaded(kernels, tmp_path):
    """In shards, as the classifier and as the model inside it, in another dtype."""
    transformers = require("transformers", "models.poolformer.modeling_poolformer")
    model, x = accelerated(make_model("transformers")), image((45, 71))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    loaded = accelerate(transformers.PoolFormerForImageClassification.from_pretrained(tmp_path))
    inside = accelerate(transformers.PoolFormerModel.from_pretrained(tmp_path))
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert torch.equal(inside(x).last_hidden_state, model.poolformer(x).last_hidden_state)
    half = accelerate(transformers.PoolFormerModel.from_pretrained(tmp_path, dtype=torch.bfloat16))
    expected = model.to(torch.bfloat16).poolformer(x.bfloat16()).last_hidden_state
    assert torch.equal(half(x.bfloat16()).last_hidden_state, expected)


def test_names_that_transformers_and_timm_look_for():
    """Blocks that no device map splits, the weights' initialisation by class, signatures of forwards."""
    plain = make_model("transformers")
    model = accelerated(plain)
    assert {type(block).__name__ for block in blocks_of(model)} == set(plain._no_split_modules)
    initialised = []
    for each in (model, plain):
        torch.manual_seed(1)
        for module in each.modules():
            each._init_weights(module)
        initialised.append([*each.state_dict().values()])
    assert same(*initialised)
    assert (blocks_of(model)[0].layer_scale_1 == plain.config.layer_scale_init_value).all()
    for source in ("transformers", *TIMM):
        plain = make_model(source)
        for ours, theirs in zip(accelerated(plain).modules(), plain.modules(), strict=True):
            assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
