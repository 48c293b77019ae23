"""How fast is the token mixer sub-block, forward and backward, against eager, torch.compile and a copy?

    poolformer-kernels bench pool-mixer [--device cuda] [--dtype bfloat16] [--layout channels_last]

Every provider computes ``x + layer_scale * (avg_pool(n) - n)``, ``n = GroupNorm(x)``, on the same random
data. "ours given" has x's statistics handed to it, as a block in a chain does; "ours" computes them. "ours
cuda" is the C++ backend, "ours triton" only runs when asked for. On the CPU the time of one call on a tensor
too small to matter is printed too.

Providers: {providers}
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats
from poolformer_kernels.ops.torch_private import allow_repeated_backward
from poolformer_kernels.profiling import time_interleaved

from .harness import (
    BATCH,
    LAYOUTS,
    PLAIN,
    Names,
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
from .rows import Case

# Elements that move and FLOPs, for each element of x. FLOPs of the forward: 4 for the sums of rows and
# columns, and one each to divide by their number, to subtract the centre, to scale and to add. FLOPs of the
# backward: 6 for the pool's adjoint, 4 for the sum q and 4 for x's gradient (docs/algebra.md, "Token mixer").
TRAFFIC = {"forward": 2, "backward": 5}
FLOPS = {"forward": 8, "backward": 14}
PROVIDERS = ("ours", "eager", "compile", "ours cuda", "ours triton", "ours given", "ours cuda given")


def eager(x: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor) -> Tensor:
    """The sub-block as the official model writes it."""
    n = F.group_norm(x, 1, weight, bias)
    return x + layer_scale.view(-1, 1, 1) * (F.avg_pool2d(n, 3, 1, 1, count_include_pad=False) - n)


def ours(x: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor) -> Tensor:
    return pk.ops.pool_mixer(x, weight, bias, layer_scale=layer_scale, residual=True)


def builders(x: Tensor, direction: str, names: list[str]) -> dict[str, Callable[[], Callable]]:
    """The providers named that have this direction; a backward's graph is built outside of what is timed."""
    params = [torch.randn(x.shape[1], device=x.device).to(x.dtype) for _ in range(3)]
    torch.compiler.reset()
    functions = {
        "ours": ours,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        "ours cuda": on_backend("cuda", ours),
        "ours triton": on_backend("triton", ours),
    }
    if direction == "forward":
        stats = pk.reference.sample_stats(x)
        options = {"layer_scale": params[2], "residual": True, "stats": stats, "return_stats": False}
        functions["ours given"] = given = lambda x, *w: pool_mixer_with_stats(x, *w[:2], **options)
        functions["ours cuda given"] = on_backend("cuda", given)

    def build(name: str) -> Callable[[], object]:
        require_backend(name)
        f = functions[name]
        if direction == "forward":
            return lambda: f(x, *params)
        inputs = [t.detach().clone().requires_grad_() for t in (x, *params)]
        y, grad = f(*inputs), torch.randn_like(x)
        return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)

    return {name: partial(build, name) for name in names if name in functions}


def call_overhead(rounds: int) -> dict[str, float]:
    """Microseconds of one inference call on a tensor too small to matter, by backend."""
    x, w = torch.randn(1, 64, 7, 7), torch.rand(64)
    medians = {}
    for backend in ("cpp", "reference"):
        if backend in pk.available_backends():
            with torch.inference_mode(), pk.use_backend(backend):
                timed = time_interleaved({backend: lambda: ours(x, w, w, w)}, rounds=rounds)
            medians[backend] = timed[backend].median * 1e6
    return medians


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The options."""
    doc = __doc__.format(providers=", ".join(PROVIDERS))
    found = arguments(
        doc, prog, models=["poolformer_s12"], dtypes=["bfloat16", "float32"], rounds=30, parse_model=PLAIN
    )
    found.add_argument(
        "--layout", action=Names, allowed=LAYOUTS, default=list(LAYOUTS), help="which (default: both)"
    )
    add_operator_options(found, TRAFFIC, PROVIDERS)
    return found


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = start(parser(prog), argv)
    args.providers = args.providers or default_providers(PROVIDERS, args.device)
    # A graph is differentiated more than once here, so its buffers must not be donated to the first backward.
    allow_repeated_backward()
    axes = (args.directions, args.dtype, args.layout, args.batch or BATCH[args.device], stages(args.models))
    cases = []
    for direction, dtype, layout, batch, (model, stage, shape) in itertools.product(*axes):
        elements = batch * shape[0] * shape[1] * shape[2]
        moved = TRAFFIC[direction] * elements * getattr(torch, dtype).itemsize
        least = (moved, FLOPS[direction] * elements)
        cases.append(Case("pool_mixer", shape, dtype, batch, least, direction, model, stage, layout))
    with record("pool_mixer", args) as results:
        for case in steps(cases):
            x = image(case.batch, case.shape, args.device, getattr(torch, case.dtype), case.layout)
            with torch.inference_mode(case.direction == "forward"):
                built = builders(x, case.direction, args.providers)
                if calls := working(built, results, case, args.device):
                    results.extend(measure(case, calls, x, rounds=args.rounds))
    code = finish("Token mixer sub-block", results, args)
    if args.device == "cpu":
        overhead = ", ".join(f"{name} {us:.1f} us" for name, us in call_overhead(args.rounds).items())
        print(f"one call on 1x64x7x7: {overhead}")
    return code
