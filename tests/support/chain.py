"""What the tests of the inference chain share: models, their fp64 truth, calls counted."""

import copy
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import poolformer_kernels as pk
from poolformer_kernels.models import PoolFormer, model_config
from poolformer_kernels.ops.chain import Chain
from support.peers import randomise_all
from support.problems import HALVES, randn
from support.rule import assert_close_to_fp64

DTYPES = (torch.float32, *HALVES)
LAST, FIRST = torch.channels_last, torch.contiguous_format
ONE = {"chain_cpp": 1}
RIGHT = 3e-6  # of fp32 logits to those of fp64
# a width that is no multiple of a vector, and one of more than one group of output channels
SMALL = replace(model_config("poolformer_s12"), layers=(1, 2, 1, 1), dims=(16, 33, 40, 96))


def make_model(config=SMALL, seed=0, dtype=torch.float32, fmt=LAST, **options) -> PoolFormer:
    with torch.device("meta"):
        model = PoolFormer(config, **({"num_classes": 7} | options))
    return randomise_all(model.to_empty(device="cpu"), seed).to(dtype=dtype, memory_format=fmt)


def images(*shape: int, dtype=torch.float32, fmt=LAST, seed=7) -> Tensor:
    return randn(*shape, dtype=dtype, mean=0.1, seed=seed).to(memory_format=fmt)


def infer(model: nn.Module, x: Tensor):
    with torch.no_grad():
        return model(x)


def by_reference(model: nn.Module, x: Tensor, dtype=torch.float64):
    """The modules' result, one by one in this dtype and in NCHW."""
    twin = copy.deepcopy(model).to(dtype=dtype, memory_format=FIRST)
    with pk.use_backend("reference"):
        return infer(twin, x.to(dtype).contiguous())


def assert_logits_right(logits: Tensor, model: nn.Module, x: Tensor) -> None:
    exact, eager = by_reference(model, x), by_reference(model, x, x.dtype)
    assert logits.dtype == x.dtype
    assert exact.abs().max() > 0.1
    assert_close_to_fp64(logits, eager, exact, what="logits")


class Calls(TorchDispatchMode):
    """Counts the operators called within: this package's, and every other by its ATen name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._schema.name.partition("::")[2]] += 1
        return function(*args, **(kwargs or {}))

    def ours(self) -> dict[str, int]:
        return {name: n for name, n in self.counts.items() if name.endswith("_cpp")}

    def kernels(self) -> dict[str, int]:
        return {name: n for name, n in self.counts.items() if name == "convolution"} | self.ours()


def calls(model: nn.Module, x: Tensor) -> dict[str, int]:
    with Calls() as counted:
        infer(model, x)
    return counted.kernels()


def operators_of(graph: torch.fx.Graph) -> list[str]:
    """Our operators that a graph calls, in order."""
    names = [str(node.target).split(".") for node in graph.nodes]
    return [name[1] for name in names if name[0] == "poolformer_kernels"]


def convolve(x, weight, bias=None, stride=1, padding=0):
    chain = Chain()
    chain.conv(weight, bias, stride, padding)
    with torch.no_grad():
        y = chain.run(x, True)
    assert y.is_contiguous(memory_format=LAST) or y.numel() == 0
    return y


def problem(batch, channels, out, height, width, kernel, dtype, bias=True, mean=0.0, sigma=1.0):
    x = randn(batch, channels, height, width, dtype=dtype, mean=mean, sigma=sigma, seed=1)
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    fan = channels * kernel[0] * kernel[1]
    weight = randn(out, channels, *kernel, dtype=dtype, sigma=fan**-0.5, seed=2)
    return x, weight, randn(out, dtype=dtype, mean=0.2, seed=3) if bias else None
