"""What graphed_step refuses before anything runs, without a GPU."""

import pytest
import torch
from support.graphs import Net, SaysCuda, adamw
from torch import nn

from poolformer_kernels import graphs
from poolformer_kernels.graphs import graphed_step


def never(y, target):
    raise AssertionError("the loss was asked for")


def hooked(register, *arguments):
    model = Net()
    getattr(model.norm, register)(lambda *_: None, *arguments)
    return model


def with_tensor_hook():
    model = Net()
    model.scale.register_hook(lambda g: g)
    return model


def with_optimizer_hook(model):
    optimizer = adamw(model)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def two_groups(model, **second):
    groups = [{"params": [model.scale]}, {"params": [model.shift], **second}]
    return torch.optim.AdamW(groups, capturable=True)


@pytest.mark.parametrize(
    ("model", "optimizer", "error", "words"),
    [
        (print, lambda m: adamw(Net()), TypeError, "model must be an nn.Module, got builtin"),
        (Net(), lambda m: "AdamW", TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        (nn.DataParallel(Net()), adamw, TypeError, "on one device by itself, got a DataParallel"),
        (Net().eval(), adamw, ValueError, r"training mode, call model.train\(\)"),
        (hooked("register_forward_hook"), adamw, ValueError, "model's module 'norm' has hooks"),
        (hooked("register_full_backward_hook"), adamw, ValueError, "model's module 'norm' has hooks"),
        (with_tensor_hook(), adamw, ValueError, "model's parameter scale has hooks"),
        (Net(), with_optimizer_hook, ValueError, "optimizer has hooks"),
        (Net(), lambda m: adamw(Net()), ValueError, "param group 0 .* parameters that are not the model's"),
        (Net(), lambda m: two_groups(m, capturable=False), ValueError, "1 .* must have capturable=True"),
        (
            Net(), lambda m: torch.optim.SGD(m.parameters()), ValueError,
            "group 0 of optimizer is SGD's, which has no capturable=True",
        ),
        (Net().requires_grad_(False), adamw, ValueError, "a parameter that needs a gradient, got none"),
        (
            Net(), lambda m: two_groups(m, lr=torch.tensor(0.1, device="meta")), ValueError,
            "group 1 of optimizer has its lr on meta; allowed: a number, or a tensor on cpu",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(monkeypatch, model, optimizer, error, words):
    monkeypatch.setattr(graphs.torch.cuda, "is_available", lambda: True)
    x = torch.zeros(3, 4, 5, 5).as_subclass(SaysCuda)
    with pytest.raises(error, match=words):
        graphed_step(model, optimizer(model), never, x, torch.zeros(3).long())


@pytest.mark.parametrize(
    ("example", "target", "error", "words"),
    [
        ([0.0], torch.zeros(3), TypeError, "example must be a tensor, got list"),
        (torch.zeros(3), 1, TypeError, "target must be a tensor, got int"),
        (torch.zeros(3), torch.zeros(3), ValueError, "example must be a CUDA tensor, got one on cpu"),
        (torch.zeros(0).as_subclass(SaysCuda), torch.zeros(3), ValueError, "example must not be empty"),
        (
            torch.zeros(3).as_subclass(SaysCuda), torch.zeros(3, device="meta"), ValueError,
            "target must be on example's device cpu, got meta",
        ),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(monkeypatch, example, target, error, words):
    monkeypatch.setattr(graphs.torch.cuda, "is_available", lambda: True)
    model = Net()
    with pytest.raises(error, match=words):
        graphed_step(model, adamw(model), never, example, target)


def test_a_model_on_another_device_and_a_loss_that_is_none(monkeypatch):
    monkeypatch.setattr(graphs.torch.cuda, "is_available", lambda: True)
    model, x = Net(), torch.zeros(3).as_subclass(SaysCuda)
    with pytest.raises(TypeError, match="loss must be a function of the result and the target, got str"):
        graphed_step(model, adamw(model), "mse", x, torch.zeros(3))
    model.norm.to("meta")
    with pytest.raises(ValueError, match=r"example's device cpu, but norm.weight is on meta"):
        graphed_step(model, adamw(model), never, x, torch.zeros(3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_without_a_cuda_device():
    model = Net()
    with pytest.raises(
        RuntimeError, match="graphed_step captures a CUDA graph, and torch sees no CUDA device"
    ):
        graphed_step(model, adamw(model), never, torch.zeros(3), torch.zeros(3))
