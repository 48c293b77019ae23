"""accelerate: other packages' models compute the same, from the same modules and parameters, and faster."""

import copy
from functools import partial

import pytest
import torch
from support.accelerate import (
    CALLS,
    DEPTHS,
    SOURCES,
    PoolFormerBlock,
    assert_equal,
    assert_right,
    blocks_of,
    classes_and_attributes,
    image,
    logits,
    make_model,
    results,
)
from support.chain import Calls
from support.layouts import FORMATS
from support.nn import COPIES
from support.problems import seeded
from torch import nn
from torch.func import functional_call

from poolformer_kernels.accelerate import accelerate, restore

SIZES = (64, 64), (45, 71)
source = pytest.mark.parametrize("source", SOURCES)


def images_for(source: str) -> list[torch.Tensor]:
    """More for v2: StarReLU's parameters are single numbers, too few in two images to compare errors by."""
    seeds = range(6 if source == "timm v2" else 2)
    return [image(size, seed) for size in SIZES for seed in seeds]


# ---- numbers -----------------------------------------------------------------------------------------------


@source
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", FORMATS)
def test_logits_and_gradients(source, dtype, layout, kernels):
    model = make_model(source).to(dtype).to(memory_format=FORMATS[layout])
    assert_right(model, [x.to(dtype).to(memory_format=FORMATS[layout]) for x in images_for(source)])


@source
def test_autocast(source, kernels):
    model = make_model(source)
    assert_right(model, images_for(source), autocast=True)
    streams = []
    for each in (model, accelerate(model, inplace=False)):
        seen = []
        for block in blocks_of(each):
            block.register_forward_hook(lambda module, given, y, seen=seen: seen.append(y))
        with torch.autocast("cpu", torch.bfloat16):
            logits(each, image())
        streams.append([(y[0] if isinstance(y, tuple) else y).dtype for y in seen])
    assert streams[0] == streams[1]
    assert torch.float32 in streams[0]


@source
@pytest.mark.filterwarnings("ignore:accelerate made nothing faster")  # no kernel computes float64
def test_drop_path_draws_what_it_drew(source):
    model, x = make_model(source, drop_path=0.6).double().train(), image().double()
    expected, state = results(model, x), torch.get_rng_state()
    assert_equal(results(accelerate(model), x), expected, 1e-11)
    assert torch.equal(torch.get_rng_state(), state)
    assert (logits(model, x) - expected["logits"]).abs().max() > 1e-3
    model, x = make_model(source, drop_path=0.6).train(), image()
    expected = results(model, x)["logits"]
    torch.testing.assert_close(results(accelerate(model), x)["logits"], expected, atol=1e-5, rtol=1e-4)


def test_dropped_samples_are_left_as_they_are(kernels):
    block = accelerate(PoolFormerBlock(drop_path=0.5)).train()
    nn.init.ones_(block.layer_scale_1)
    nn.init.zeros_(block.layer_scale_2)
    torch.manual_seed(0)
    x = torch.randn(400, 16, 3, 3)
    with torch.no_grad():
        branch = block(x) - x
        whole = block.token_mixer(block.norm1(x))
    dropped = branch.flatten(1).abs().amax(1) == 0
    assert 140 < dropped.sum() < 260
    torch.testing.assert_close(branch[~dropped], 2 * whole[~dropped], atol=1e-5, rtol=1e-4)


# ---- what runs ---------------------------------------------------------------------------------------------


@source
def test_two_operator_calls_a_block_and_statistics_between(source, operator_calls, kernels):
    model = accelerate(make_model(source))
    operator_calls.clear()  # of the comparison by which it sees what a block computes
    logits(model, image())
    assert [call.name for call in operator_calls] == CALLS
    given = [call.options["stats"] is not None for call in operator_calls]
    if source == "timm v2":  # stages 3 and 4 scale the shortcut outside of the operators
        assert given == [False, True, True, True, False, True, False, False, False, False]
    else:
        first = [i == 0 for depth in DEPTHS for i in range(depth)]
        between = source != "transformers"  # whose blocks are called one by one
        assert given[::2] == [between and not first_of_stage for first_of_stage in first]
        assert all(given[1::2])


@pytest.mark.parametrize(
    ("source", "count"), [("timm", 4), ("official", 4), ("mmpretrain", 4), ("transformers", 5)]
)
def test_inference_is_one_call_a_stage_or_block(source, count, kernels):
    model = make_model(source)
    expected = logits(model, image())
    accelerate(model)
    with torch.inference_mode(), Calls() as calls:
        y = logits(model, image())
    torch.testing.assert_close(y, expected.detach())
    assert calls.ours() == {"chain_cpp": count}


@source
@torch.no_grad()
def test_inference_reads_parameters_and_modes_in_every_call(source, kernels):
    model, x = make_model(source, drop_path=0.9), image()
    plain = copy.deepcopy(model)
    accelerate(model)
    for training, factor in ((False, 1.0), (False, 1.5), (True, 1.0)):
        for each in (model, plain):
            each.train(training)
            for parameter in each.parameters():
                parameter.mul_(factor)
        drawn = (seeded(logits, each, x) for each in (model, plain))
        torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-3)


def test_parts_that_are_not_asked_for_stay_modules(operator_calls, kernels):
    model, x = make_model("timm"), image()
    expected = results(model, x)
    for options, ran in (({"mlp": False}, "pool_mixer"), ({"mixer": False}, "mlp")):
        assert accelerate(model, **options) is model  # the last call counts
        operator_calls.clear()
        assert_equal(results(model, x), expected, 1e-4)
        assert {call.name for call in operator_calls} == {ran}


# ---- the same modules --------------------------------------------------------------------------------------


@source
def test_everything_about_the_model_stays(source):
    model = make_model(source)
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    looks, attributes = repr(model), [[*vars(module)] for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    copied = accelerate(model, inplace=False)
    assert copied is not model
    assert classes == [type(module) for module in model.modules()]
    assert accelerate(accelerate(model)) is model
    for each in (model, copied):
        assert classes != [type(module) for module in each.modules()]
    assert all(isinstance(module, c) for module, c in zip(model.modules(), classes, strict=True))
    assert [(k, id(v)) for k, v in model.named_modules()] == [(k, id(v)) for k, v in modules.items()]
    now = model.state_dict(keep_vars=True)
    assert [(k, id(v)) for k, v in now.items()] == [(k, id(v)) for k, v in state.items()]
    assert repr(model) == looks
    assert [[*vars(module)] for module in model.modules()] == attributes


@source
def test_restore_undoes_it(source):
    model, x = make_model(source), image()
    before, expected = classes_and_attributes(model), results(model, x)
    accelerate(model)
    with torch.no_grad():
        logits(model, x)  # which keeps a chain in the blocks
    assert restore(model) is model
    assert classes_and_attributes(model) == before
    assert_equal(results(model, x), expected)
    assert restore(model) is model


def test_optimiser_and_checkpoints_from_before_go_on_working():
    model, x = make_model("timm").train(), image()
    twin = copy.deepcopy(model)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    accelerate(model)
    for _ in range(2):
        for each, optimiser in zip((model, twin), optimisers, strict=True):
            optimiser.zero_grad()
            logits(each, x).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(logits(model, x), logits(twin, x), atol=1e-4, rtol=1e-3)
    model.load_state_dict(make_model("timm").state_dict())
    with torch.no_grad():
        torch.testing.assert_close(logits(model, x), logits(make_model("timm"), x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("source", ["timm", "transformers", "official"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_accelerated_and_independent(source, copied, kernels):
    model, x = accelerate(make_model(source)), image()
    with torch.no_grad():
        logits(model, x)
    other, expected = copied(model), results(model, x)
    assert [*map(type, other.modules())] == [*map(type, model.modules())]
    assert_equal(results(other, x), expected)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert_equal(results(other, x), expected)
    assert restore(other) is other


def replica_of(model):
    """As torch.nn.parallel.replicate makes one: what was a parameter is an attribute, computed from it."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas.get(child)
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.view_as(parameter))
    return replicas[model]


@source
def test_replicas_are_operators_and_compute_with_their_own_parameters(source, operator_calls, kernels):
    model, x = make_model(source), image()
    expected = logits(model, x)
    replica = replica_of(accelerate(model))
    assert not [*replica.parameters()]
    operator_calls.clear()
    torch.testing.assert_close(logits(replica, x), expected, atol=1e-5, rtol=1e-4)
    assert [call.name for call in operator_calls] == CALLS
    with torch.no_grad():
        torch.testing.assert_close(logits(replica, x), expected, atol=1e-5, rtol=1e-4)
        for module in replica.modules():
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    vars(module)[name] = torch.zeros_like(value)
        assert torch.equal(logits(replica, x), torch.zeros(2, 7))
        torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-4)


# ---- transforms --------------------------------------------------------------------------------------------


@source
def test_functional_call(source):
    model, x = make_model(source), image()
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    call = partial(functional_call, model, doubled)
    expected = logits(call, x)
    accelerate(model)
    torch.testing.assert_close(logits(call, x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source", ["timm", "transformers"])
def test_transforms_and_tracers_see_the_modules(source):
    model, x = make_model(source), image()
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return logits(partial(functional_call, model, parameters), x).square().sum()

    def transformed():
        grads = torch.func.grad(loss)(parameters, x)
        _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
        each = torch.vmap(lambda x: logits(model, x))(x[:, None])
        traced = [torch.jit.trace(model, x, strict=False)(x)]
        if source == "timm":
            traced += [torch.jit.script(model)(x), torch.fx.symbolic_trace(model)(x)]
        traced = [y if isinstance(y, torch.Tensor) else y["logits"] for y in traced]
        return [*grads.values(), tangent, each, *traced]

    expected = transformed()
    accelerate(model)
    assert all(map(torch.equal, transformed(), expected))
