"""How fast is the MLP sub-block, forward and backward, against PyTorch's, and against fc1, GELU, fc2 alone?

    poolformer-kernels bench mlp [--device cuda] [--dtype bfloat16 float32] [--models s12 m36]

"ours", "eager" and "compile" compute ``x + layer_scale * mlp(GroupNorm(x))``, ours from x's statistics, the
others as the official model writes it. "eager linear" and "compile linear" compute only
``linear(gelu(linear(x)))`` on the same tokens: what the arithmetic asks for. In the forward compiled weights
are frozen (on CUDA by max-autotune); "ours saved" keeps fc1's output for the backward, "ours cuda" is the C++
backend where it has a kernel, "ours triton" only runs when asked for. FLOPs are those of the gradients: ours
computes fc1 once more.

Providers: {providers}
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import poolformer_kernels as pk
from poolformer_kernels.ops.dispatch import mlp_backend
from poolformer_kernels.ops.mlp import mlp_with_stats
from poolformer_kernels.ops.torch_private import allow_repeated_backward, frozen_weights

from .harness import (
    BATCH,
    PLAIN,
    add_operator_options,
    arguments,
    default_providers,
    finish,
    image,
    measure,
    on_backend,
    record,
    require_backend,
    stages,
    start,
    steps,
    working,
)
from .rows import Case, UnavailableError

# The least that each direction takes. Matrix products as large as fc1's:
PRODUCTS = {"forward": 2, "backward": 4}
# Tensors as large as x that are read or written: x and y; x, y's gradient and x's gradient.
TRAFFIC = {"forward": 2, "backward": 3}
# How often a tensor as large as the weights moves: they are read; they are read, and their gradients written.
WEIGHTS = {"forward": 1, "backward": 2}
PROVIDERS = (
    *("ours", "ours saved", "eager", "compile", "eager linear", "compile linear"),
    *("ours cuda", "ours triton"),
)


class Tokens(nn.Module):
    """linear, GELU, linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """The sub-block as the official model writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.fc1, self.fc2 = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)
        self.layer_scale = nn.Parameter(0.1 + 0.03 * torch.randn(channels))
        nn.init.normal_(self.norm.weight, 1, 0.1)
        nn.init.normal_(self.norm.bias, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale.view(-1, 1, 1) * self.fc2(F.gelu(self.fc1(self.norm(x))))


def ours(block: Block, x: Tensor, stats: Tensor, save_hidden: bool = False) -> Tensor:
    return mlp_with_stats(
        *(x, block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias),
        norm_weight=block.norm.weight,
        norm_bias=block.norm.bias,
        layer_scale=block.layer_scale,
        residual=True,
        save_hidden=save_hidden,
        stats=stats,
        return_stats=not torch.is_grad_enabled(),
    )[0]


def require_cuda_kernel(x: Tensor, direction: str) -> None:
    """Raise where the C++ backend leaves this case to Triton."""
    channels = x.shape[1]
    sizes = channels, 4 * channels, channels
    backend, reason = mlp_backend("cuda", x.device, sizes, x.dtype, direction == "backward")
    if backend != "cuda":
        raise UnavailableError(f"the {direction} has no kernel for {reason}")


def builders(x: Tensor, direction: str, names: list[str]) -> dict[str, Callable[[], Callable]]:
    """The providers named that have this direction; a backward's graph is built outside of what is timed."""
    channels = x.shape[1]
    options = {"device": x.device, "dtype": x.dtype}
    tokens, block = Tokens(channels).to(**options), Block(channels).to(**options)
    block = block.to(memory_format=torch.channels_last)
    stats = pk.reference.sample_stats(x)
    torch.compiler.reset()

    def flat(t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).reshape(-1, channels)

    def compiled(module: nn.Module) -> Callable:
        if direction == "backward":
            return torch.compile(module, dynamic=False)
        mode = "max-autotune" if x.is_cuda else None
        fast = torch.compile(module.eval(), dynamic=False, mode=mode)
        with frozen_weights():
            fast(flat(x) if module is tokens else x)
        return fast

    functions: dict[str, Callable[[], Callable]] = {
        "ours": lambda: lambda t: ours(block, t, stats),
        "ours cuda": lambda: on_backend("cuda", lambda t: ours(block, t, stats)),
        "ours triton": lambda: on_backend("triton", lambda t: ours(block, t, stats)),
        "eager": lambda: block,
        "eager linear": lambda: tokens,
        "compile linear": lambda: compiled(tokens),
    }
    if direction == "forward":
        functions["compile"] = lambda: compiled(block)
    else:
        functions["ours saved"] = lambda: lambda t: ours(block, t, stats, True)

    def build(name: str) -> Callable[[], object]:
        require_backend(name)
        if name == "ours cuda":
            require_cuda_kernel(x, direction)
        f = functions[name]()
        data, module = (flat(x), tokens) if name.endswith("linear") else (x, block)
        if direction == "forward":
            return lambda: f(data)
        leaf = data.detach().clone().requires_grad_()
        y, inputs, grad = f(leaf), (leaf, *module.parameters()), torch.randn_like(data)
        return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)

    return {name: partial(build, name) for name in names if name in functions}


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The options."""
    models, dtypes = ["poolformer_s12", "poolformer_m36"], ["bfloat16", "float32"]
    doc = __doc__.format(providers=", ".join(PROVIDERS))
    found = arguments(doc, prog, models=models, dtypes=dtypes, rounds=20, parse_model=PLAIN)
    add_operator_options(found, PRODUCTS, PROVIDERS)
    return found


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = start(parser(prog), argv)
    args.providers = args.providers or default_providers(PROVIDERS, args.device)
    # A graph is differentiated more than once here, so its buffers must not be donated to the first backward.
    allow_repeated_backward()
    axes = (args.directions, args.dtype, args.batch or BATCH[args.device], stages(args.models))
    cases = []
    for direction, dtype, batch, (model, stage, (channels, height, width)) in itertools.product(*axes):
        elements, weights = batch * channels * height * width, 8 * channels**2 + 8 * channels
        moved = TRAFFIC[direction] * elements + WEIGHTS[direction] * weights
        least = (moved * getattr(torch, dtype).itemsize, PRODUCTS[direction] * 8 * elements * channels)
        cases.append(Case("mlp", (channels, height, width), dtype, batch, least, direction, model, stage))
    with record("mlp", args) as results:
        for case in steps(cases):
            x = image(case.batch, case.shape, args.device, getattr(torch, case.dtype), case.layout)
            with torch.inference_mode(case.direction == "forward"):
                built = builders(x, case.direction, args.providers)
                if calls := working(built, results, case, args.device):
                    results.extend(measure(case, calls, x, rounds=args.rounds))
    return finish("MLP sub-block", results, args)
