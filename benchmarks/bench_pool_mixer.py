"""How fast is the token mixer sub-block, forward and backward, against eager, torch.compile and a copy?

    poolformer-kernels bench pool-mixer [--device cuda] [--dtype bfloat16] [--layout channels_last]

Every provider computes ``x + layer_scale * (avg_pool(n) - n)``, ``n = GroupNorm(x)``, on the same random
data. "ours given" has x's statistics handed to it, as a block in a chain does; "ours" computes them. "ours
cuda" is the C++ backend. On the CPU the time of one call on a tensor too small to matter is printed too.
"""

import itertools
from collections.abc import Callable

import torch
import torch._functorch.config
import torch.nn.functional as F
from harness import (
    BATCH,
    LAYOUTS,
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
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats
from poolformer_kernels.profiling import time_interleaved

# Per element of x, README, "Algebra". Forward: separable sums (4), their mean, the centre off, scaled, added.
# Backward: the pool's adjoint (6), the reduction q (4), dx (4).
TRAFFIC = {"forward": 2, "backward": 5}
FLOPS = {"forward": 8, "backward": 14}


def eager(x: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor) -> Tensor:
    """The sub-block as the official model writes it."""
    n = F.group_norm(x, 1, weight, bias)
    return x + layer_scale.view(-1, 1, 1) * (F.avg_pool2d(n, 3, 1, 1, count_include_pad=False) - n)


def ours(x: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor) -> Tensor:
    return pk.ops.pool_mixer(x, weight, bias, layer_scale=layer_scale, residual=True)


def calls(x: Tensor, direction: str) -> dict[str, Callable[[], object]]:
    """The providers on x; the backward's own graphs are built here, outside of what is timed."""
    params = [torch.randn(x.shape[1], device=x.device).to(x.dtype) for _ in range(3)]
    torch.compiler.reset()
    functions = {"ours": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    both = x.is_cuda and pk.available_backends()["cuda"] is None
    if both:
        functions["ours cuda"] = on_backend("cuda", ours)
    if direction == "forward":
        stats = pk.reference.sample_stats(x)
        options = {"layer_scale": params[2], "residual": True, "stats": stats, "return_stats": False}
        made = {name: (lambda f=f: f(x, *params)) for name, f in functions.items()}
        made["ours given"] = given = lambda: pool_mixer_with_stats(x, *params[:2], **options)
        return made | ({"ours cuda given": on_backend("cuda", given)} if both else {})
    grad, made = torch.randn_like(x), {}
    for name, f in functions.items():
        inputs = [t.detach().clone().requires_grad_() for t in (x, *params)]
        y = f(*inputs)
        made[name] = lambda y=y, i=inputs: torch.autograd.grad(y, i, grad, retain_graph=True)
    return made


def call_overhead(rounds: int) -> dict[str, float]:
    """Microseconds of one inference call on a tensor too small to matter, by backend."""
    x, w = torch.randn(1, 64, 7, 7), torch.rand(64)
    medians = {}
    for backend in ("cpp", "reference"):
        if pk.available_backends()[backend] is None:
            with torch.inference_mode(), pk.use_backend(backend):
                timed = time_interleaved({backend: lambda: ours(x, w, w, w)}, rounds=rounds)
            medians[backend] = timed[backend].median * 1e6
    return medians


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = arguments(__doc__, prog, models=["poolformer_s12"], dtypes=["bfloat16", "float32"], rounds=30)
    parser.add_argument(
        "--layout", action=Names, allowed=LAYOUTS, default=list(LAYOUTS), help="default: both"
    )
    parser.add_argument(
        "--directions", action=Names, allowed=TRAFFIC, default=list(TRAFFIC), help="default: both"
    )
    args = start(parser, argv)
    # A graph is differentiated more than once here, so its buffers must not be donated to the first backward.
    torch._functorch.config.donated_buffer = False
    axes = (args.directions, args.dtype, args.layout, args.batch or BATCH[args.device], stages(args.models))
    cases = []
    for direction, dtype, layout, batch, (model, stage, shape) in itertools.product(*axes):
        elements = batch * shape[0] * shape[1] * shape[2]
        moved = TRAFFIC[direction] * elements * getattr(torch, dtype).itemsize
        least = (moved, FLOPS[direction] * elements)
        cases.append(Case("pool_mixer", shape, dtype, batch, least, direction, model, stage, layout))
    results = Results()
    for case in steps(cases):
        x = image(case.batch, case.shape, args.device, getattr(torch, case.dtype), case.layout)
        with torch.inference_mode(case.direction == "forward"):
            results.groups.append(measure(case, calls(x, case.direction), x, rounds=args.rounds))
    code = finish("pool_mixer", "Token mixer sub-block", results, args)
    if args.device == "cpu":
        overhead = ", ".join(f"{name} {us:.1f} us" for name, us in call_overhead(args.rounds).items())
        print(f"one call on 1x64x7x7: {overhead}")
    return code


if __name__ == "__main__":
    run(main)
