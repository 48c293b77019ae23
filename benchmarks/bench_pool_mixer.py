"""How fast is the token mixer sub-block, forward and backward, against eager, torch.compile and a copy?

    python benchmarks/bench_pool_mixer.py [--device cuda] [--dtype bfloat16 float32] [--rounds 30]

Every provider computes ``x + layer_scale * (avg_pool(n) - n)``, ``n = GroupNorm(x)``, on the same random
data; samples are interleaved, figures are medians. The copy is ``out.copy_(x)`` into memory that exists.
"ours, given" has x's statistics handed to it, as a block in a chain does; "ours" computes them.
"""

import argparse

import torch
import torch._functorch.config
import torch.nn.functional as F
from harness import Row, device_name, settle, write_rows
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import poolformer_kernels as pk
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats
from poolformer_kernels.profiling import time_interleaved

STAGES = ((64, 56), (128, 28), (320, 14), (512, 7))  # poolformer_s12 at 224 x 224
FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
# Elements of x moved per element at the least (README, "Algebra").
TRAFFIC = {"forward": 2, "backward": 5}


def eager(x, weight, bias, layer_scale):
    """The sub-block as the official model writes it."""
    n = F.group_norm(x, 1, weight, bias)
    return x + layer_scale.view(-1, 1, 1) * (F.avg_pool2d(n, 3, 1, 1, count_include_pad=False) - n)


def ours(x, weight, bias, layer_scale):
    return pk.ops.pool_mixer(x, weight, bias, layer_scale=layer_scale, residual=True)


def measure(direction, dtype, layout, stage, batch, device, rounds, compiled):
    """Timings by provider of one direction, dtype, layout and stage."""
    channels, size = stage
    tensor = {"device": device, "dtype": dtype}

    def image():
        return torch.randn(batch, channels, size, size, **tensor).contiguous(memory_format=FORMATS[layout])

    x, grad, out = image(), image(), image()
    params = [torch.randn(channels, **tensor) for _ in range(3)]
    functions = {"eager": eager, "torch.compile": compiled, "ours": ours}
    if direction == "forward":
        stats = pk.reference.sample_stats(x)

        def given():
            return pool_mixer_with_stats(
                x, *params[:2], layer_scale=params[2], residual=True, stats=stats, return_stats=False
            )

        calls = {name: (lambda f=f: f(x, *params)) for name, f in functions.items()}
        calls["ours, given"] = given
        calls["copy"] = lambda: out.copy_(x)
        with torch.inference_mode():
            return time_interleaved(calls, device=device, rounds=rounds)
    calls = {"copy": lambda: out.copy_(x)}
    for name, f in functions.items():
        inputs = [t.detach().clone().requires_grad_() for t in (x, *params)]
        y = f(*inputs)
        calls[name] = lambda y=y, i=inputs: torch.autograd.grad(y, i, grad, retain_graph=True)
    return time_interleaved(calls, device=device, rounds=rounds)


def call_overhead(rounds):
    """Microseconds of one inference call on a tensor too small to matter, by backend."""
    x, w = torch.randn(1, 64, 7, 7), torch.rand(64)
    medians = {}
    with torch.inference_mode():
        calls = {}
        for backend in ("cpp", "reference"):

            def call(backend=backend):
                return ours(x, w, w, w)

            calls[backend] = call
        for backend, f in calls.items():
            with pk.use_backend(backend):
                medians[backend] = time_interleaved({backend: f}, rounds=rounds)[backend].median * 1e6
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layout", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--batch", type=int, help="default: 8 on the CPU, 256 on CUDA")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    settle(args.threads)
    batch = args.batch or (256 if args.device == "cuda" else 8)
    torch.manual_seed(0)
    # A graph is differentiated more than once here, so its buffers must not be donated to the first backward.
    torch._functorch.config.donated_buffer = False
    cases = [
        (direction, dtype, layout, stage)
        for direction in ("forward", "backward")
        for dtype in args.dtype
        for layout in args.layout
        for stage in STAGES
    ]
    console = Console(width=160)
    table = Table(
        title=f"Token mixer, batch {batch}, {device_name(args.device)}, {torch.get_num_threads()} threads"
    )
    for heading in ("", "dtype", "layout", "C, H", "copy", "ours", "ours, given", "compile", "eager"):
        table.add_column(heading, justify="right")
    for heading in ("copy / ours", "copy / given", "compile / ours", "eager / ours"):
        table.add_column(heading, justify="right", style="bold")
    rows = []
    with Progress(console=console, transient=True) as progress:
        for direction, dtype_name, layout, stage in progress.track(cases, description="measuring"):
            dtype = getattr(torch, dtype_name)
            torch._dynamo.reset()
            compiled = torch.compile(eager, dynamic=False)
            times = measure(direction, dtype, layout, stage, batch, args.device, args.rounds, compiled)
            elements = batch * stage[0] * stage[1] ** 2
            for provider, t in times.items():
                traffic = 2 if provider == "copy" else TRAFFIC[direction]
                rate = traffic * elements * dtype.itemsize / t.median / 1e9
                rows.append(
                    Row(
                        benchmark="pool_mixer",
                        direction=direction,
                        shape=f"{stage[0]}x{stage[1]}x{stage[1]}",
                        batch=batch,
                        dtype=dtype_name,
                        layout=layout,
                        provider=provider,
                        median_s=t.median,
                        p20_s=t.p20,
                        p80_s=t.p80,
                        rate=rate,
                        unit="GB/s",
                        fraction=times["copy"].median / t.median,
                    )
                )
            m = {name: t.median for name, t in times.items()}
            given = m.get("ours, given")
            table.add_row(
                direction,
                dtype_name,
                layout,
                f"{stage[0]}, {stage[1]}",
                *(f"{m[k] * 1e6:.1f}" if k in m else "" for k in ("copy", "ours", "ours, given")),
                *(f"{m[k] * 1e6:.1f}" for k in ("torch.compile", "eager")),
                f"{m['copy'] / m['ours']:.2f}",
                f"{m['copy'] / given:.2f}" if given else "",
                f"{m['torch.compile'] / m['ours']:.1f}",
                f"{m['eager'] / m['ours']:.1f}",
            )
    console.print(table, "times in microseconds")
    if args.device == "cpu":
        overhead = call_overhead(args.rounds)
        console.print(
            f"one call on 1x64x7x7: cpp {overhead['cpp']:.1f} us, reference {overhead['reference']:.1f} us"
        )
    console.print("written to", str(write_rows(rows, "pool_mixer", args.device)))


if __name__ == "__main__":
    main()
