"""graphed without a GPU: its refusals, and its buffers on a stand-in for CUDA graphs (recorded operators)."""

import pytest
import torch
from support.graphs import SaysCuda, eager, tiny_poolformer
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels import graphs
from poolformer_kernels.graphs import GraphedModel, graphed


class Net(nn.Module):
    """Two outputs; counts its calls."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.conv(x)
        return [y, y.relu().mean((2, 3))]


def test_replays_on_a_copy_of_each_input_into_the_same_memory(stand_in):
    torch.manual_seed(0)
    model, example = Net().eval(), torch.randn(2, 3, 8, 8)
    kept = example.clone()
    g = GraphedModel(model, example)
    assert model.calls == 4  # three to warm up, one captured
    inputs = [
        torch.randn(2, 3, 8, 8),
        torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 3, 8, 16)[..., ::2],
        torch.randn(2, 3, 8, 8).requires_grad_(),
    ]
    first = g(inputs[0])
    addresses = [t.data_ptr() for t in first]
    for x in inputs:
        got = g(x)
        assert [t.data_ptr() for t in got] == addresses
        for ours, expected in zip(got, eager(model, x.contiguous()), strict=True):
            assert torch.equal(ours, expected)
        assert not any(t.requires_grad for t in got)
    assert model.calls == 4 + len(inputs)  # those of eager: a replay runs no Python of the model
    assert torch.equal(first[0], got[0])  # overwritten, as documented
    assert torch.equal(example, kept)


def test_keeps_the_strides_of_the_example_and_sees_parameters_updated_in_place(stand_in):
    model = Net().eval()
    x = torch.randn(2, 3, 8, 8)
    g = GraphedModel(model, x.contiguous(memory_format=torch.channels_last))
    assert g._input.is_contiguous(memory_format=torch.channels_last)
    before = g(x)[1].clone()
    with torch.no_grad():
        model.conv.bias.add_(1)
    after = g(x)[1]
    assert torch.equal(after, eager(model, x.contiguous(memory_format=torch.channels_last))[1])
    assert not torch.equal(before, after)
    assert repr(g) == "GraphedModel(Net, 2x3x8x8, float32, cpu)"


def test_a_poolformer(stand_in):
    model = tiny_poolformer(num_classes=10).eval()
    inputs = torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    with pk.use_backend("reference"):
        g = GraphedModel(model, inputs[0])
        captured = g(inputs[0]).clone()
        for x in inputs[1:]:
            y = g(x)
            torch.testing.assert_close(y, eager(model, x), rtol=0, atol=1e-12)
            assert (y - captured).abs().max() > 1e-3


ZEROS = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1], TypeError, "x must be a tensor, got list"),
        (ZEROS.double(), TypeError, "captured dtype torch.float32, got torch.float64"),
        (ZEROS[:1], ValueError, r"captured shape \[2, 3, 8, 8\], got \[1, 3, 8, 8\]; graphed\("),
        (torch.zeros(2, 3, 8, 9), ValueError, r"captured shape \[2, 3, 8, 8\], got \[2, 3, 8, 9\]"),
        (ZEROS.to("meta"), ValueError, "x must be on the captured device cpu, got meta"),
    ],
)
def test_another_input_is_refused_and_changes_nothing(stand_in, x, error, message):
    g = GraphedModel(Net().eval(), torch.ones_like(ZEROS))
    before = g._input.clone()
    with pytest.raises(error, match=message):
        g(x)
    assert torch.equal(g._input, before)


# ---- refusals before anything runs -------------------------------------------------------------------------


class NeverCalled(nn.Sequential):
    def forward(self, x):
        raise AssertionError("the model ran")


def never(**parts):
    model = NeverCalled().eval()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (print, torch.zeros(1), TypeError, "model must be an nn.Module, got builtin_function_or_method"),
        (never(), [0.0], TypeError, "example must be a tensor, got list"),
        (NeverCalled(), torch.zeros(1), ValueError, r"call model.eval\(\): it is training"),
        (never(drop=nn.Dropout()), torch.zeros(1), ValueError, r"call model.eval\(\): drop is training"),
    ],
)
def test_arguments_that_no_device_would_take(model, example, error, message):
    with pytest.raises(error, match=message):
        graphed(model, example)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_without_a_cuda_device():
    with pytest.raises(RuntimeError, match="CUDA graph, and torch sees no CUDA device"):
        graphed(never(), torch.zeros(1))


ON_META = {
    "fc": nn.Linear(2, 2, device="meta").eval(),
    "bn": nn.BatchNorm2d(2, affine=False, device="meta").eval(),
}


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (never(), torch.zeros(1), "example must be a CUDA tensor, got one on cpu"),
        (never(), torch.zeros(0, 3), r"example must not be empty, got shape \[0, 3\]"),
        (never(fc=ON_META["fc"]), torch.zeros(1), "example's device cpu, but fc.weight is on m"),
        (never(bn=ON_META["bn"]), torch.zeros(1), "bn.running_mean is on"),
    ],
)
def test_tensors_on_the_wrong_device(monkeypatch, model, example, message):
    monkeypatch.setattr(graphs.torch.cuda, "is_available", lambda: True)
    if "CUDA tensor" not in message:  # a CPU tensor that says it is on CUDA
        example = example.as_subclass(SaysCuda)
    with pytest.raises(ValueError, match=message):
        graphed(model, example)
