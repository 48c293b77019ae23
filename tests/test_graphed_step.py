"""graphed_step without a GPU: steps against those without one, on a stand-in for CUDA graphs; failures."""

import copy
import importlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Net, SaysCuda, adamw, tiny_poolformer
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels import graphs
from poolformer_kernels.graphs import GraphedStep, graphed_step

OPTIMIZERS = {
    "AdamW": {"amsgrad": True},
    "Adam": {"weight_decay": 0.1},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adadelta": {"lr": 0.5},
    "RMSprop": {"momentum": 0.9, "centered": True},
}


@pytest.fixture(autouse=True)
def capturable_on_the_cpu(monkeypatch):
    """The optimizers refuse capturable=True where there can be no graph; here is the stand-in for one."""
    for name in [*OPTIMIZERS, "Rprop"]:
        module = importlib.import_module(f"torch.optim.{name.lower()}")
        if hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"])


def net_and_adamw(**options):
    torch.manual_seed(0)
    model = Net()
    return model, adamw(model, **options)


def batches(count, shape=(3, 4, 5, 5)):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(shape, generator=generator), torch.randint(4, shape[:1], generator=generator)


def eager_step(model, optimizer, x, target):
    value = F.cross_entropy(model(x), target)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.detach()


def state_of(model, optimizer):
    """Every tensor that steps change, in order."""
    state = [t for s in optimizer.state.values() for t in s.values()]
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers(), *state)]


def capture(model, optimizer):
    return GraphedStep(model, optimizer, F.cross_entropy, *next(batches(1)))


def losses_of(step, scheduler=None):
    losses = []
    for x, y in batches(4):
        losses.append(step(x, y).clone())
        if scheduler:
            scheduler.step()
    return losses


def assert_steps_equal(model, optimizer, schedule=lambda optimizer: None):
    """The captured model's losses, weights, buffers, state and random numbers against those of a copy."""
    other, other_optimizer = copy.deepcopy((model, optimizer))
    scheduler, other_scheduler = schedule(optimizer), schedule(other_optimizer)
    step = capture(model, optimizer)
    random = torch.get_rng_state()
    losses = losses_of(step, scheduler)
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    expected = losses_of(partial(eager_step, other, other_optimizer), other_scheduler)
    assert torch.equal(after, torch.get_rng_state())
    ours, theirs = [*losses, *state_of(model, optimizer)], [*expected, *state_of(other, other_optimizer)]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert len({loss.item() for loss in losses}) == 4
    return step


# ---- steps -------------------------------------------------------------------------------------------------


def test_steps_are_those_without_a_graph(stand_in):
    """From a new optimizer on, with dropout and BatchNorm, bit for bit."""
    model, optimizer = net_and_adamw()
    step = assert_steps_equal(model, optimizer)
    assert model.calls == 4  # three to warm up, one captured
    assert optimizer.state[model.scale]["step"] == 4
    assert all(p.grad is None for p in model.parameters())
    assert repr(step) == "GraphedStep(Net, AdamW, 3x4x5x5, float32, cpu)"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_new_state_begins_as_the_optimizers(stand_in, name):
    torch.manual_seed(0)
    model = Net()
    options = {"lr": 1e-2, "capturable": True, **OPTIMIZERS[name]}
    assert_steps_equal(model, getattr(torch.optim, name)(model.parameters(), **options))


def test_an_optimizer_that_has_made_steps(stand_in):
    model, optimizer = net_and_adamw()
    for x, y in batches(2):
        eager_step(model, optimizer, x, y)
    assert_steps_equal(model, optimizer)
    assert optimizer.state[model.scale]["step"] == 6


def test_a_poolformer_with_stochastic_depth(stand_in):
    model = tiny_poolformer(num_classes=4, drop_path_rate=0.5).train()
    with pk.use_backend("reference"):
        shape = (4, 3, 32, 32)
        other, optimizer = copy.deepcopy(model), adamw(model)
        other_optimizer = adamw(other)
        inputs = [(x.double(), y) for x, y in batches(4, shape)]
        step = GraphedStep(model, optimizer, F.cross_entropy, *inputs[0])
        random = torch.get_rng_state()
        losses = [step(x, y).clone() for x, y in inputs]
        torch.set_rng_state(random)
        expected = [eager_step(other, other_optimizer, x, y) for x, y in inputs]
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-9)
    ours, theirs = list(model.parameters()), list(other.parameters())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # Adam divides by small numbers
    assert len({loss.item() for loss in losses}) == 4


def test_the_capture_changes_nothing(stand_in):
    model, optimizer = net_and_adamw()
    x, y = next(batches(1))
    eager_step(model, optimizer, x, y)
    model.scale.grad = torch.ones_like(model.scale)
    tensors = [*model.parameters(), *model.buffers(), *optimizer.state[model.scale].values()]
    values, random = state_of(model, optimizer), torch.get_rng_state()
    step = capture(model, optimizer)
    now = [*model.parameters(), *model.buffers(), *optimizer.state[model.scale].values()]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert all(map(torch.equal, values, state_of(model, optimizer)))
    assert torch.equal(random, torch.get_rng_state())
    assert model.scale.grad is None  # as documented
    first = step(x, y)
    assert first is step(x, y)
    assert not first.requires_grad
    assert all(map(torch.equal, (x, y), next(batches(1))))


def test_a_new_state_is_there_at_its_initial_values(stand_in):
    model, optimizer = net_and_adamw()
    capture(model, optimizer)
    state = optimizer.state[model.scale]
    assert sorted(state) == ["exp_avg", "exp_avg_sq", "step"]
    assert not any(t.any() for t in state.values())
    assert model.unused not in optimizer.state


def test_a_learning_rate_on_the_device_reaches_the_graph(stand_in):
    model, optimizer = net_and_adamw(lr=torch.tensor(1e-2))
    halve = 0.5
    assert_steps_equal(model, optimizer, schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, halve))
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(1e-2 * halve**4)


@pytest.mark.parametrize(
    ("lr", "name", "value", "words"),
    [
        (0.01, "lr", 1e-3, r"lr of .* param group 0 was 0.01 when .* now 0.001, .*: make lr a tensor"),
        (0.01, "lr", torch.tensor(0.01), "lr of the optimizer's param group 0 was 0.01"),
        (torch.tensor(0.01), "lr", torch.tensor(0.01), "lr of the optimizer's param group 0"),
        (0.01, "weight_decay", 0.5, "weight_decay of .* param group 0 .* graphed_step captures another"),
        (0.01, "betas", (0.5, 0.9), "betas of the optimizer's param group 0"),
    ],
)
def test_a_number_that_has_changed_is_no_silent_error(stand_in, lr, name, value, words):
    model, optimizer = net_and_adamw(lr=lr)
    step, (x, y) = capture(model, optimizer), next(batches(1))
    step(x, y)
    before = state_of(model, optimizer)
    group = optimizer.param_groups[0]
    kept, group[name] = group[name], value
    with pytest.raises(RuntimeError, match=words):
        step(x, y)
    assert all(map(torch.equal, before, state_of(model, optimizer)))
    group[name] = kept
    step(x, y)


def test_a_replaced_state_is_no_silent_error(stand_in):
    model, optimizer = net_and_adamw()
    step, (x, y) = capture(model, optimizer), next(batches(1))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"param groups were replaced .* load_state_dict"):
        step(x, y)
    step = capture(model, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(RuntimeError, match="add_param_group"):
        step(x, y)


# ---- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda y, target: 1.0, TypeError, "loss must return a tensor, got float"),
        (lambda y, target: y, ValueError, r"loss must return one element, got shape \[3, 4\]"),
        (lambda y, target: y.detach().sum(), ValueError, "needs a gradient"),
    ],
)
def test_a_failure_leaves_everything_as_it_was(stand_in, loss, error, words):
    model, optimizer = net_and_adamw()
    before, random, calls = state_of(model, optimizer), torch.get_rng_state(), []

    def fails_late(y, target):
        calls.append(y)
        return F.cross_entropy(y, target) if len(calls) < 3 else loss(y, target)

    with pytest.raises(error, match=words):
        GraphedStep(model, optimizer, fails_late, *next(batches(1)))
    assert all(map(torch.equal, before, state_of(model, optimizer)))
    assert not optimizer.state
    assert torch.equal(random, torch.get_rng_state())


def test_an_initial_state_that_is_not_known(stand_in):
    model = Net()
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.1, capturable=True)
    before = state_of(model, optimizer)
    with pytest.raises(ValueError, match=r"must have made a step: the initial values of prev, .*Rprop"):
        capture(model, optimizer)
    assert not optimizer.state
    assert all(map(torch.equal, before, state_of(model, optimizer)))
    eager_step(model, optimizer, *next(batches(1)))
    assert_steps_equal(model, optimizer)


X, TARGET = torch.zeros(3, 4, 5, 5), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("x", "target", "error", "words"),
    [
        ([1], TARGET, TypeError, "x must be a tensor, got list"),
        (X, 3, TypeError, "target must be a tensor, got int"),
        (X, TARGET.float(), TypeError, "target must be of the captured dtype torch.int64"),
        (X, TARGET[:2], ValueError, r"target must have the captured shape \[3\]"),
        (X[:1], TARGET, ValueError, "x must have the captured shape"),
    ],
)
def test_another_input_is_refused_and_changes_nothing(stand_in, x, target, error, words):
    model, optimizer = net_and_adamw()
    step = capture(model, optimizer)
    before = state_of(model, optimizer)
    with pytest.raises(error, match=words):
        step(x, target)
    assert all(map(torch.equal, before, state_of(model, optimizer)))


# ---- refusals before anything runs -------------------------------------------------------------------------


def never(y, target):
    raise AssertionError("the loss was asked for")


def hooked(register):
    model = Net()
    getattr(model.norm, register)(lambda *_: None)
    return model


def with_tensor_hook():
    model = Net()
    model.scale.register_hook(lambda g: g)
    return model


def with_optimizer_hook(model):
    optimizer = adamw(model)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def sgd(model):
    return torch.optim.SGD(model.parameters())


def two_groups(model, **second):
    groups = [{"params": [model.scale]}, {"params": [model.shift], **second}]
    return torch.optim.AdamW(groups, capturable=True)


def with_norm_on_meta():
    model = Net()
    model.norm.to("meta")
    return model


EXAMPLE, META = X.as_subclass(SaysCuda), torch.tensor(0.1, device="meta")
GOOD = {"model": Net(), "optimizer": adamw, "loss": never, "example": EXAMPLE, "target": TARGET}


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("model", SimpleNamespace(parameters=Net().parameters), TypeError, "model must be an nn.Module"),
        ("model", nn.DataParallel(Net()), TypeError, "on one device by itself, got a DataParallel"),
        ("model", Net().eval(), ValueError, r"training mode, call model.train\(\)"),
        ("model", hooked("register_forward_hook"), ValueError, "model's module 'norm' has hooks"),
        ("model", hooked("register_full_backward_hook"), ValueError, "model's module 'norm' has hooks"),
        ("model", with_tensor_hook(), ValueError, "model's parameter scale has hooks"),
        ("model", Net().requires_grad_(False), ValueError, "a parameter that needs a gradient, got none"),
        ("model", with_norm_on_meta(), ValueError, "example's device cpu, but norm.weight is on meta"),
        ("optimizer", lambda m: "AdamW", TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        ("optimizer", with_optimizer_hook, ValueError, "optimizer has hooks"),
        ("optimizer", lambda m: adamw(Net()), ValueError, "group 0 .* parameters that are not the model's"),
        ("optimizer", partial(two_groups, capturable=False), ValueError, "1 .* must have capturable=True"),
        (
            *("optimizer", partial(two_groups, lr=META), ValueError),
            "group 1 of optimizer has its lr on meta; allowed: a number, or a tensor on cpu",
        ),
        ("optimizer", sgd, ValueError, "group 0 of optimizer is SGD's, which has no capturable=True"),
        ("loss", "mse", TypeError, "loss must be a function of the result and the target, got str"),
        ("example", [0.0], TypeError, "example must be a tensor, got list"),
        ("example", torch.zeros(3), ValueError, "example must be a CUDA tensor, got one on cpu"),
        ("example", EXAMPLE[:0], ValueError, "example must not be empty"),
        ("target", 1, TypeError, "target must be a tensor, got int"),
        ("target", META, ValueError, "target must be on example's device cpu, got meta"),
    ],
)
def test_what_is_refused(monkeypatch, name, value, error, words):
    monkeypatch.setattr(graphs.torch.cuda, "is_available", lambda: True)
    given = GOOD | {name: value}
    given["optimizer"] = given["optimizer"](given["model"])
    with pytest.raises(error, match=words):
        graphed_step(**given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_without_a_cuda_device():
    model, words = Net(), "graphed_step captures a CUDA graph, and torch sees no CUDA device"
    with pytest.raises(RuntimeError, match=words):
        graphed_step(model, adamw(model), never, torch.zeros(3), torch.zeros(3))
