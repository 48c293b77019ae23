"""How fast is the MLP sub-block, forward and backward, against PyTorch's, and against fc1, GELU, fc2 alone?

    poolformer-kernels bench mlp [--device cuda] [--dtype bfloat16 float32] [--models s12 m36]

"ours", "eager" and "compile" compute ``x + layer_scale * mlp(GroupNorm(x))``, ours from x's statistics, the
others as the official model writes it. "eager linear" and "compile linear" compute only
``linear(gelu(linear(x)))`` on the same tokens: what the arithmetic asks for. In the forward compiled weights
are frozen (on CUDA by max-autotune); "ours saved" keeps fc1's output for the backward, "ours cuda" is the C++
backend where it has a kernel. FLOPs are those of the gradients: ours computes fc1 once more.
"""

import itertools
from collections.abc import Callable

import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from harness import (
    BATCH,
    Case,
    Names,
    Results,
    arguments,
    finish,
    image,
    measure,
    on_backend,
    run,
    stages,
    start,
    steps,
)
from torch import Tensor, nn

import poolformer_kernels as pk
from poolformer_kernels.ops.backend import mlp_backend
from poolformer_kernels.ops.mlp import mlp_with_stats

PRODUCTS = {"forward": 2, "backward": 4}  # of fc1's size, at the least
TRAFFIC = {"forward": 2, "backward": 3}  # of x's size: x in, y out; x and the gradients of both
WEIGHTS = {"forward": 1, "backward": 2}  # read; read, and their gradients written


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


def has_cuda_kernel(x: Tensor, backward: bool = False) -> bool:
    """Whether the C++ backend computes this case itself and does not leave it to Triton."""
    channels = x.shape[1]
    sizes = channels, 4 * channels, channels
    here = x.is_cuda and pk.available_backends()["cuda"] is None
    return here and mlp_backend("cuda", x.device, sizes, x.dtype, backward)[0] == "cuda"


def calls(x: Tensor, direction: str) -> dict[str, Callable[[], object]]:
    """The providers on x; the backward's own graphs are built here, outside of what is timed."""
    channels = x.shape[1]
    options = {"device": x.device, "dtype": x.dtype}
    tokens, block = Tokens(channels).to(**options), Block(channels).to(**options)
    block = block.to(memory_format=torch.channels_last)
    stats = pk.reference.sample_stats(x)
    torch.compiler.reset()

    def flat(t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).reshape(-1, channels)

    if direction == "forward":
        y = flat(x)
        with torch._inductor.config.patch(freezing=True):
            mode = "max-autotune" if x.is_cuda else None
            compiled, compiled_tokens = (
                torch.compile(module.eval(), dynamic=False, mode=mode) for module in (block, tokens)
            )
            compiled(x), compiled_tokens(y)
        made = {
            "ours": lambda: ours(block, x, stats),
            "eager": lambda: block(x),
            "compile": lambda: compiled(x),
            "eager linear": lambda: tokens(y),
            "compile linear": lambda: compiled_tokens(y),
        }
        return made | ({"ours cuda": on_backend("cuda", made["ours"])} if has_cuda_kernel(x) else {})
    grad = torch.randn_like(x)
    functions = {
        "ours": (lambda t: ours(block, t, stats), block, x, grad),
        "ours saved": (lambda t: ours(block, t, stats, True), block, x, grad),
        "eager": (block, block, x, grad),
        "eager linear": (tokens, tokens, flat(x), flat(grad)),
        "compile linear": (torch.compile(tokens, dynamic=False), tokens, flat(x), flat(grad)),
    }
    if has_cuda_kernel(x, backward=True):
        functions["ours cuda"] = (on_backend("cuda", functions["ours"][0]), block, x, grad)
    made = {}
    for name, (f, module, data, g) in functions.items():
        leaf = data.detach().clone().requires_grad_()
        y, inputs = f(leaf), (leaf, *module.parameters())
        made[name] = lambda y=y, i=inputs, g=g: torch.autograd.grad(y, i, g, retain_graph=True)
    return made


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; the exit code."""
    models, dtypes = ["poolformer_s12", "poolformer_m36"], ["bfloat16", "float32"]
    parser = arguments(__doc__, prog, models=models, dtypes=dtypes, rounds=20)
    parser.add_argument(
        "--directions", action=Names, allowed=PRODUCTS, default=list(PRODUCTS), help="default: both"
    )
    args = start(parser, argv)
    # A graph is differentiated more than once here, so its buffers must not be donated to the first backward.
    torch._functorch.config.donated_buffer = False
    axes = (args.directions, args.dtype, args.batch or BATCH[args.device], stages(args.models))
    cases = []
    for direction, dtype, batch, (model, stage, (channels, height, width)) in itertools.product(*axes):
        elements, weights = batch * channels * height * width, 8 * channels**2 + 8 * channels
        moved = TRAFFIC[direction] * elements + WEIGHTS[direction] * weights
        least = (moved * getattr(torch, dtype).itemsize, PRODUCTS[direction] * 8 * elements * channels)
        cases.append(Case("mlp", (channels, height, width), dtype, batch, least, direction, model, stage))
    results = Results()
    for case in steps(cases):
        x = image(case.batch, case.shape, args.device, getattr(torch, case.dtype), case.layout)
        with torch.inference_mode(case.direction == "forward"):
            results.groups.append(measure(case, calls(x, case.direction), x, rounds=args.rounds))
    return finish("mlp", "MLP sub-block", results, args)


if __name__ == "__main__":
    run(main)
