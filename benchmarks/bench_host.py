"""How much does the host spend on the CUDA path: launches and its own CPU time, of operators and models?

    poolformer-kernels bench host [--models s12 m48] [--batch 1 8 256] [--device null]

Where a GPU is fast enough, what remains is the host: Python, dispatch, launches. This counts the launches of
a call and takes the CPU time of the process that makes it (all threads, without waiting for the device), in
interleaved rounds of random order. Models, in inference (bfloat16, channels_last, inference mode) and in a
training step (autocast to bfloat16, float32 parameters, fused AdamW), are beside timm's own modules in eager
mode, on the same weights; operators (bfloat16; inference, and forward with backward) beside one `torch.add_`,
with "eager" for their plain PyTorch.

Without a CUDA device, or with ``--device null``, it runs on the null GPU of a source tree (tests/null_gpu),
in a process of its own. That has a driver's interface and computes nothing: values are not compared, a
library's call is one launch that costs next to nothing, and only ratios of the host's times mean something. A
device counts the kernels that libraries launch.

The CSV's times are CPU seconds of a call. It has three columns more: ratio, to eager's time or that of
`torch.add_`; launches; and kernels, how many of them are this package's.

Providers: {providers}
"""

import argparse
import contextlib
import copy
import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.cli.files import check_writable
from poolformer_kernels.cli.options import Parser, positive
from poolformer_kernels.profiling import Timing

from .bench_training import Training
from .facts import DEFAULT_FOLDER
from .harness import (
    TIMMS,
    WARM_HEAP,
    Names,
    image,
    record,
    require_backend,
    settle,
    steps,
    write_json,
)
from .host_device import Launches, count_launches, forget_launches, is_null_gpu, null_gpu_environment
from .host_table import HostRow, print_tables
from .providers import make_pair
from .rows import Case, Results

CAPABILITY = "9.0"  # of the null GPU
# name: the backend that runs it; "eager" is timm's model, and of an operator the reference
PROVIDERS = {"ours": "auto", "ours triton": "triton", "ours cuda": "cuda", "eager": "reference"}
BATCH = {"forward": [1, 8, 256], "step": [1, 256]}
OPERATORS = ("pool_mixer", "mlp")
SHAPES = ((64, 56, 56), (512, 7, 7))  # S12's first and last stage
WARM_UP = 3
SAMPLE_S = 5e-3  # CPU seconds that the calls of one sample come to
QUEUE = 500  # launches that are submitted at once: a device's queue holds more, so that the host never waits


@dataclass(frozen=True)
class Side:
    """One of the calls that are compared."""

    call: Callable[[], object]
    backend: str
    inference: bool

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with torch.inference_mode(self.inference), pk.use_backend(self.backend):
            yield


# ---- what is called ----------------------------------------------------------------------------------------


def operator(name: str, x: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """(the function of x and the parameters, the parameters)"""
    channels = x.shape[1]

    def parameter(*shape: int) -> Tensor:
        return torch.randn(shape, device=x.device).mul_(shape[-1] ** -0.5).to(x.dtype)

    norm = [parameter(channels) for _ in range(3)]
    if name == "pool_mixer":

        def mixer(x, weight, bias, scale):
            return pk.ops.pool_mixer(x, weight, bias, layer_scale=scale, residual=True)

        return mixer, norm

    def mlp(x, weight, bias, scale, *fcs):
        return pk.ops.mlp(x, *fcs, norm_weight=weight, norm_bias=bias, layer_scale=scale, residual=True)

    fc1, fc2 = (parameter(4 * channels, channels), parameter(channels, 4 * channels))
    return mlp, [*norm, fc1, parameter(4 * channels), fc2, parameter(channels)]


def operator_builders(case: Case) -> dict[str, Callable[[], Callable]]:
    """By provider, and ``torch.add_``."""
    x = image(case.batch, case.shape, "cuda", torch.bfloat16, case.layout)
    function, parameters = operator(case.benchmark.removeprefix("host_"), x)
    if case.direction == "forward":
        call = lambda: function(x, *parameters)  # noqa: E731
    else:
        inputs = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
        grad = torch.randn_like(x)

        def call() -> object:
            return torch.autograd.grad(function(*inputs), inputs, grad, allow_unused=True)

    total = torch.zeros_like(x)
    return {"torch.add_": lambda: lambda: total.add_(x)} | {name: lambda: call for name in PROVIDERS}


def model_builders(case: Case) -> dict[str, Callable[[], Callable]]:
    """By provider. Each has a model of its own."""
    training = case.direction == "step"
    pair = make_pair(case.model, torch.float32 if training else torch.bfloat16, "cuda")
    x = image(case.batch, case.shape, "cuda", torch.float32, case.layout)
    target = torch.randint(pair[1].num_classes, (case.batch,), device="cuda")

    def build(name: str) -> Callable[[], object]:
        model = copy.deepcopy(pair[0] if name == "eager" else pair[1])
        if training:
            return Training(model.train(), x, target, torch.bfloat16).step
        images = x.bfloat16()
        return lambda: model(images)

    return {name: partial(build, name) for name in PROVIDERS}


def cases(models: list[str], batches: list[int] | None) -> list[Case]:
    found = []

    def add(benchmark: str, shape: tuple[int, ...], batch: int, direction: str, model: str = "") -> None:
        found.append(Case(benchmark, shape, "bfloat16", batch, (0, 0), direction, model))

    for name in OPERATORS:
        for shape in SHAPES:
            for direction in ("forward", "both"):
                add(f"host_{name}", shape, max(batches or BATCH["step"]), direction)
    for model in models:
        for direction, default in BATCH.items():
            for batch in batches or default:
                add("host", (3, 224, 224), batch, direction, model)
    return found


# ---- measuring ---------------------------------------------------------------------------------------------


def sides(case: Case, names: list[str], results: Results) -> dict[str, tuple[Side, Launches]]:
    """The providers that run, warm, and what a call launches. What fails is recorded; the others go on."""
    builders = operator_builders(case) if case.benchmark != "host" else model_builders(case)
    ready = {}
    for name in [name for name in builders if name in names or name not in PROVIDERS]:
        try:
            require_backend(name)
            # timm's model has nothing to do with our backends
            backend = "auto" if case.benchmark == "host" and name == "eager" else PROVIDERS.get(name, "auto")
            side = Side(builders[name](), backend, case.direction == "forward")
            with side.running():
                for _ in range(WARM_UP):
                    side.call()
                launches = count_launches(side.call)
        except Exception as error:
            results.miss(name, error, case)
            results.require_device("cuda", name)
        else:
            ready[name] = side, launches
    return ready


def host_seconds(side: Side, repeats: int) -> float:
    """CPU seconds of this process for a call, submitted to an idle device and not waited for."""
    torch.cuda.synchronize()
    with side.running():
        start = time.process_time()
        for _ in range(repeats):
            side.call()
        used = time.process_time() - start
    torch.cuda.synchronize()
    forget_launches()
    return used / repeats


def measure(case: Case, ready: dict[str, tuple[Side, Launches]], rounds: int) -> list[HostRow]:
    """A row for each provider."""
    order, names, repeats = random.Random(0), list(ready), {}
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would fall on one of the sides
    try:
        for name, (side, launches) in ready.items():
            fastest = min(host_seconds(side, 1) for _ in range(3))
            most = max(1, QUEUE // max(1, launches.total))
            repeats[name] = max(1, min(most, round(SAMPLE_S / max(fastest, 1e-6))))
        samples: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                samples[name].append(host_seconds(ready[name][0], repeats[name]))
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    times = {name: Timing.of(samples[name]) for name in ready}
    base = times.get("eager" if case.benchmark == "host" else "torch.add_")
    return [
        HostRow(
            benchmark=case.benchmark,
            direction=case.direction,
            model=case.model,
            shape="x".join(map(str, case.shape)),
            stage=case.stage,
            dtype=case.dtype,
            layout=case.layout,
            batch=case.batch,
            provider=name,
            median_s=t.median,
            p20_s=t.p20,
            p80_s=t.p80,
            img_per_s=None,
            gb_per_s=None,
            tflop_per_s=None,
            fraction=None,
            error_l2=None,
            ratio=base and t.median / base.median,
            launches=ready[name][1].total,
            kernels=sum(ready[name][1].ours.values()),
        )
        for name, t in times.items()
    ]


# ---- the command -------------------------------------------------------------------------------------------


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The options."""
    doc = __doc__.format(providers=", ".join(PROVIDERS))
    found = Parser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, models = found.add_argument, ["poolformer_s12", "poolformer_m48"]
    add(
        "--models", action=Names, parse=TIMMS, default=models,
        help=f"which models (default: {', '.join(models)})",
    )  # fmt: skip
    add(
        "--batch",
        type=positive,
        nargs="+",
        metavar="N",
        help="images of a call (default: 1, 8, 256; training: 1, 256)",
    )
    add(
        "--providers",
        action=Names,
        allowed=PROVIDERS,
        default=list(PROVIDERS),
        help="what is timed (default: all)",
    )
    add(
        "--device",
        choices=("cuda", "null"),
        help="where it runs (default: cuda if there is one, else the null GPU)",
    )
    add(
        "--threads",
        type=positive,
        default=torch.get_num_threads(),
        metavar="N",
        help="threads of the CPU (default: torch's own number)",
    )
    add(
        "--rounds", type=positive, default=20, metavar="N", help="rounds of the timing (default: %(default)s)"
    )
    add("--csv", metavar="FILE", help=f"where the rows go (default: {DEFAULT_FOLDER}/<device>/host.csv)")
    add(
        "--json",
        metavar="FILE",
        help="write the same rows there, our kernels by name, and why a provider is missing",
    )
    return found


def parse(argv: list[str], prog: str | None) -> argparse.Namespace:
    """The parsed and checked options."""
    args = parser(prog).parse_args(argv)
    if args.device == "cuda" and (is_null_gpu() or not torch.cuda.is_available()):
        raise CommandError("--device cuda: torch sees no CUDA device; allowed here: null")
    for file in (args.csv, args.json):
        check_writable(file)
    return args


def run_apart(command: list[str], env: dict[str, str]) -> int:
    """The exit code of a process on this terminal, which sends Ctrl-C to both: that process says so."""
    with subprocess.Popen(command, env=env) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; the exit code: 1 where one of ours failed, 2 where there is nothing to run it on."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv, prog)
    if not is_null_gpu() and (args.device == "null" or not torch.cuda.is_available()):
        env = os.environ | WARM_HEAP | null_gpu_environment(CAPABILITY)
        return run_apart([sys.executable, "-m", pk.__name__, "bench", "host", *argv], env)
    settle(args.threads)
    torch.manual_seed(0)
    args.device = "cuda"
    kernels = {}
    with record("host", args) as results:
        for case in steps(cases(args.models, args.batch)):
            ready = sides(case, args.providers, results)
            if ready:
                results.add(measure(case, ready, args.rounds))
                kernels[str(case)] = {name: launches.ours for name, (_, launches) in ready.items()}
            del ready
            gc.collect()
    if not results.groups:
        raise CommandError("nothing was measured: no provider can run")
    print_tables(results, CAPABILITY if is_null_gpu() else None, args.rounds)
    if args.json:
        write_json(results, args.json, kernels=kernels)
    print(f"written to {results.path}" + (f" and {args.json}" if args.json else ""))
    return 1 if results.failed else 0
