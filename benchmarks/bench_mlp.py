"""How fast is the MLP sub-block, forward and backward, against fc1, GELU and fc2 alone in PyTorch?

    python benchmarks/bench_mlp.py [--device cuda] [--dtype bfloat16 float32] [--models s12 m36] [--rounds 20]

Ours computes ``x + layer_scale * mlp(GroupNorm(x))`` from x's statistics; the others only
``linear(gelu(linear(x)))`` on the same tokens: eager, and torch.compile with frozen weights (forward) or
over the training graph (backward). "block" providers run the whole sub-block as the official model writes it:
eager, and in the forward torch.compile. All on the same random data, in channels_last; samples are
interleaved, figures are medians. FLOPs are those of the gradients: ours computes fc1 once more. The matrix
product that the fraction refers to is ``torch.mm`` of 1024 x 1024 matrices a thread.
"""

import argparse

import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from harness import Row, device_name, settle, write_rows
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.ops.mlp import mlp_with_stats
from poolformer_kernels.profiling import time_interleaved

STAGES = {
    "s12": ((64, 56), (128, 28), (320, 14), (512, 7)),
    "m36": ((96, 56), (192, 28), (384, 14), (768, 7)),
}
PRODUCTS = {"forward": 2, "backward": 4}  # of fc1's size, at the least


class Tokens(nn.Module):
    """linear, GELU, linear: what the arithmetic asks for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """The sub-block as the official model writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.fc1, self.fc2 = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)
        self.layer_scale = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x + self.layer_scale.view(-1, 1, 1) * self.fc2(F.gelu(self.fc1(self.norm(x))))


def ours(block: Block, x, stats, save_hidden=False):
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


def measure(direction, dtype, stage, batch, device, rounds):
    """Timings by provider of one direction, dtype and stage."""
    channels, size = stage
    tensor = {"device": device, "dtype": dtype}

    def image():
        x = torch.randn(batch, channels, size, size, **tensor)
        return x.contiguous(memory_format=torch.channels_last)

    def flat(t):
        return t.permute(0, 2, 3, 1).reshape(-1, channels)

    x, grad = image(), image()
    tokens, block = Tokens(channels).to(**tensor), Block(channels).to(**tensor)
    side = 1024 * torch.get_num_threads() if device == "cpu" else 8192
    a, b = torch.randn(side, 1024, **tensor), torch.randn(1024, 1024, **tensor)
    calls = {"matmul": lambda: a @ b}
    stats = pk.reference.sample_stats(x)
    torch._dynamo.reset()
    if direction == "forward":
        with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
            tokens, block = tokens.eval(), block.eval()
            mode = "max-autotune" if device == "cuda" else None
            compiled = torch.compile(tokens, dynamic=False, mode=mode)
            compiled_block = torch.compile(block, dynamic=False, mode=mode)
            y = flat(x)
            calls |= {
                "eager": lambda: tokens(y),
                "compile": lambda: compiled(y),
                "eager block": lambda: block(x),
                "compile block": lambda: compiled_block(x),
                "ours": lambda: ours(block, x, stats),
            }
            return side, time_interleaved(calls, device=device, rounds=rounds)
    functions = {
        "eager": (tokens, flat(x), flat(grad)),
        "compile": (torch.compile(tokens, dynamic=False), flat(x), flat(grad)),
        "eager block": (block, x, grad),
        "ours": (lambda t: ours(block, t, stats), x, grad),
        "ours, hidden saved": (lambda t: ours(block, t, stats, True), x, grad),
    }
    for name, (f, data, g) in functions.items():
        leaf = data.detach().clone().requires_grad_()
        parameters = list((tokens if f in (tokens, functions["compile"][0]) else block).parameters())
        y = f(leaf)
        calls[name] = lambda y=y, i=(leaf, *parameters), g=g: torch.autograd.grad(y, i, g, retain_graph=True)
    return side, time_interleaved(calls, device=device, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--models", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--directions", nargs="+", default=list(PRODUCTS), choices=list(PRODUCTS))
    parser.add_argument("--batch", type=int, help="default: 8 on the CPU, 256 on CUDA")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    settle(args.threads)
    batch = args.batch or (256 if args.device == "cuda" else 8)
    torch.manual_seed(0)
    # A graph is differentiated more than once here, so its buffers must not be donated to the first backward.
    torch._functorch.config.donated_buffer = False
    cases = [
        (direction, dtype, stage)
        for direction in args.directions
        for dtype in args.dtype
        for model in args.models
        for stage in STAGES[model]
    ]
    console = Console(width=160)
    table = Table(title=f"MLP, batch {batch}, {device_name(args.device)}, {torch.get_num_threads()} threads")
    names = ("ours", "ours, hidden saved", "compile", "eager", "compile block", "eager block")
    for heading in ("", "dtype", "C, H", *names, "matmul, TFLOP/s", "ours / matmul"):
        table.add_column(heading, justify="right")
    for heading in ("compile / ours", "eager / ours"):
        table.add_column(heading, justify="right", style="bold")
    rows = []
    with Progress(console=console, transient=True) as progress:
        for direction, dtype_name, stage in progress.track(cases, description="measuring"):
            dtype = getattr(torch, dtype_name)
            side, times = measure(direction, dtype, stage, batch, args.device, args.rounds)
            channels, size = stage
            flops = PRODUCTS[direction] * 8 * batch * size**2 * channels**2
            limit = 2 * side * 1024**2 / times["matmul"].median
            for provider, t in times.items():
                rate = limit if provider == "matmul" else flops / t.median
                rows.append(
                    Row(
                        benchmark="mlp",
                        direction=direction,
                        shape=f"{channels}x{size}x{size}",
                        batch=batch,
                        dtype=dtype_name,
                        layout="channels_last",
                        provider=provider,
                        median_s=t.median,
                        p20_s=t.p20,
                        p80_s=t.p80,
                        rate=rate / 1e9,
                        unit="GFLOP/s",
                        fraction=rate / limit,
                    )
                )
            m = {name: t.median for name, t in times.items()}
            table.add_row(
                direction,
                dtype_name,
                f"{channels}, {size}",
                *(f"{m[k] * 1e6:.0f}" if k in m else "" for k in names),
                f"{limit / 1e12:.2f}",
                f"{flops / m['ours'] / limit:.2f}",
                *(f"{m[k] / m['ours']:.2f}" if k in m else "" for k in ("compile", "eager")),
            )
    console.print(table, "times in microseconds")
    console.print("written to", str(write_rows(rows, "mlp", args.device)))


if __name__ == "__main__":
    main()
