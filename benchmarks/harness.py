"""What the benchmarks share: options, a settled process, limits, tables and files.

A case is one operation on one input. Its providers, a copy and a large matrix product are timed in the same
interleaved rounds, so every figure has its limits beside it. On the CPU the rate of the multipliers is taken
beside each timed call, and rows are of calls in one state of the machine.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.cli.files import check_writable, write_whole
from poolformer_kernels.cli.options import Parser, model, models_like_timms, positive
from poolformer_kernels.models import list_models, model_config
from poolformer_kernels.profiling import LimitProbes, Timing
from poolformer_kernels.profiling.states import median_rate
from poolformer_kernels.profiling.throughput import Samples

from .facts import DEFAULT_FOLDER, csv_path, facts_of, processor_name
from .rows import LIMITS, Case, Results, Row, UnavailableError

__all__ = [
    "BATCH",
    "DTYPES",
    "LAYOUTS",
    "PLAIN",
    "TIMMS",
    "WARM_HEAP",
    "Names",
    "add_operator_options",
    "arguments",
    "default_providers",
    "finish",
    "image",
    "measure",
    "on_backend",
    "record",
    "require_backend",
    "settle",
    "stages",
    "start",
    "steps",
    "working",
    "write_json",
]

DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
BATCH = {"cpu": [8], "cuda": [256]}
# types of a model's name: of those that timm has, too, and of those made of PoolFormer's parts
TIMMS = model(models_like_timms(), why="timm has none to compare it with")
PLAIN = model(list_models("poolformer_*"), why="its parts are not PoolFormer's")
_OWN_THREADS = torch.get_num_threads()  # before --threads sets it

# glibc returns large freed blocks to the system at once, and the next output has to be paged in again. That
# can be half the time of these operators, for every provider that allocates. The heap of a long-running
# process keeps such blocks; with these settings that of a benchmark does, too.
WARM_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}


def settle(threads: int) -> None:
    """Restart the process with a warm heap, then set the number of threads."""
    if any(os.environ.get(name) != value for name, value in WARM_HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **WARM_HEAP})
    torch.set_num_threads(threads)


# ---- options -----------------------------------------------------------------------------------------------


class Names(argparse.Action):
    """An option of names, spaces or commas between them: of a fixed list, or what ``parse`` takes."""

    def __init__(
        self, *args, allowed: Iterable[str] = (), parse: Callable[[str], str] | None = None, **options
    ) -> None:
        super().__init__(*args, nargs="+", metavar="NAME", **options)
        self.allowed, self.parse = list(allowed), parse

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        names = []
        for name in (part.strip() for value in values for part in value.split(",")):
            try:
                names.append(self._one(name))
            except argparse.ArgumentTypeError as error:
                parser.error(f"argument {option_string}: {error}")
        setattr(namespace, self.dest, list(dict.fromkeys(names)))

    def _one(self, name: str) -> str:
        if self.parse is not None:
            return self.parse(name)
        if name not in self.allowed:
            raise argparse.ArgumentTypeError(f"{name!r}; allowed: {', '.join(self.allowed)}")
        return name


def arguments(
    doc: str,
    prog: str | None,
    *,
    models: list[str],
    dtypes: list[str],
    rounds: int,
    batch: str = "8; 256 on CUDA",
    parse_model: Callable[[str], str] | None = None,
) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
        models, dtypes, rounds: defaults.
        batch: the default of that option, in words.
        parse_model: the type of a model's name; None takes those that timm has, too.
    """
    parser = Parser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--models", action=Names, parse=parse_model or TIMMS, default=models,
        help=f"which models (default: {', '.join(models)})",
    )  # fmt: skip
    add(
        "--dtype",
        action=Names,
        allowed=DTYPES,
        default=dtypes,
        help=f"which dtypes (default: {', '.join(dtypes)})",
    )
    add("--batch", type=positive, nargs="+", metavar="N", help=f"images of a call (default: {batch})")
    add("--device", choices=("cpu", "cuda"), help="where it runs (default: cuda if there is one, else cpu)")
    add(
        "--threads", type=positive, default=torch.get_num_threads(), metavar="N",
        help="threads of the CPU (default: torch's own number); another number has a CSV file of its own",
    )  # fmt: skip
    add(
        "--rounds", type=positive, default=rounds, metavar="N",
        help="rounds at the most, thrice as many where the machine's state changes (default: %(default)s)",
    )  # fmt: skip
    add("--csv", metavar="FILE", help=f"where the rows go (default: {DEFAULT_FOLDER}/<device>/<name>.csv)")
    add("--json", metavar="FILE", help="write the same rows there, and why a provider is not timed")
    return parser


def add_operator_options(
    parser: argparse.ArgumentParser, directions: Iterable[str], providers: Iterable[str]
) -> None:
    """The options of an operator's benchmark: its directions, and its providers."""
    add = parser.add_argument
    add("--directions", action=Names, allowed=directions, default=[*directions], help="which (default: both)")
    add(
        "--providers",
        action=Names,
        allowed=providers,
        help="what is timed (default: all but ours triton; C++ on CUDA only)",
    )


def start(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The parsed options, in a settled process."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device; allowed here: cpu")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for file in (args.csv, args.json):
        check_writable(file)
    if args.csv and args.json and os.path.realpath(args.csv) == os.path.realpath(args.json):
        raise CommandError(f"--csv and --json are the same file, {args.json}")
    settle(args.threads)
    torch.manual_seed(0)
    return args


def record(name: str, args: argparse.Namespace) -> Results:
    """Results whose rows go to the file of this benchmark (and number of threads, if given) as they come."""
    if args.csv is None and args.device == "cpu" and args.threads != _OWN_THREADS:
        name = f"{name}_threads_{args.threads}"
    return Results(csv_path(name, args.device, args.csv), facts_of(args.device))


def stages(models: Iterable[str]) -> list[tuple[str, str, tuple[int, int, int]]]:
    """(model, stage, shape of its input at 224 x 224), once for models that are equally wide."""
    first = {}
    for name in models:
        first.setdefault(model_config(name).dims, name)
    return [
        (name, str(i + 1), (dim, 56 >> i, 56 >> i))
        for dims, name in first.items()
        for i, dim in enumerate(dims)
    ]


# ---- measuring ---------------------------------------------------------------------------------------------


def image(batch: int, shape: tuple[int, ...], device: str, dtype: torch.dtype, layout: str) -> Tensor:
    """Random activations ``[batch, C, H, W]``, shifted: with mean 0 a wrong mean would not show."""
    x = torch.randn(batch, *shape, device=device).mul_(0.7).add_(0.4)
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def measure(
    case: Case,
    calls: dict[str, Callable[[], object]],
    largest: Tensor,
    *,
    rounds: int,
    budget_s: float = float("inf"),
    errors: dict[str, float] | None = None,
    layouts: dict[str, str] | None = None,
) -> list[list[Row]]:
    """Time the providers and the limits (see `LimitProbes`) of the same dtype, interleaved.

    Args:
        calls: provider -> call.
        largest: the input, or the largest activation: the limits are taken for its size, dtype and device.
        errors: provider -> relative error of its result.
        layouts: provider -> its layout, where that is not the case's.

    Returns:
        A group of rows, one for each provider and limit, for each state (`profiling.states`) in which all of
        them were timed often enough; on CUDA one group.
    """
    with torch.no_grad():  # a backward's calls differentiate graphs that exist
        probes = LimitProbes(largest.device, largest.dtype, largest.nbytes)
        states = probes.sample(calls, rounds=rounds, budget_s=budget_s)
    return [_rows(case, state, taken, probes, errors or {}, layouts or {}) for state, taken in states.items()]


def _rows(
    case: Case,
    state: str,
    samples: Samples,
    probes: LimitProbes,
    errors: dict[str, float],
    layouts: dict[str, str],
) -> list[Row]:
    """A row for each provider, of samples of one state; the limits come last."""
    rows = []
    for provider, taken in samples.items():
        t, rate = Timing.of([sample.seconds for sample in taken]), median_rate(taken)
        limits = probes.limits(samples, provider)
        moved = {"copy": probes.copied, "matmul": None}.get(provider, case.least[0])
        done = {"copy": None, "matmul": probes.flops}.get(provider, case.least[1])
        rows.append(
            Row(
                benchmark=case.benchmark,
                direction=case.direction,
                model=case.model,
                shape="x".join(map(str, case.shape)),
                stage=case.stage,
                dtype=case.dtype,
                layout=layouts.get(provider, case.layout),
                batch=case.batch,
                provider=provider,
                median_s=t.median,
                p20_s=t.p20,
                p80_s=t.p80,
                img_per_s=None if provider in LIMITS else case.batch / t.median,
                gb_per_s=moved and moved / t.median / 1e9,
                tflop_per_s=done and done / t.median / 1e12,
                fraction=limits.seconds(moved or 0, done or 0) / t.median,
                error_l2=errors.get(provider),
                rate_tflops=rate and rate / 1e12,
                state=state,
            )
        )
    return rows


def default_providers(providers: Iterable[str], device: str) -> list[str]:
    """All providers of an operator but Triton's, which "ours" is on CUDA, and C++'s where it cannot run."""
    here = device == "cuda" and "cuda" in pk.available_backends()
    return [
        name for name in providers if name != "ours triton" and (here or not name.startswith("ours cuda"))
    ]


def require_backend(provider: str) -> None:
    """Raise `UnavailableError` where "ours cuda …" and "ours triton" name a backend that cannot run here."""
    backend = provider.removeprefix("ours ").partition(" ")[0]
    if reason := pk.backend_reasons().get(backend):
        raise UnavailableError(reason)


def working(
    builders: dict[str, Callable[[], Callable[[], object]]], results: Results, case: Case, device: str
) -> dict[str, Callable[[], object]]:
    """The providers that run: each is built and called once. What fails is recorded, and the others go on."""
    calls = {}
    for name, build in builders.items():
        try:
            call = build()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            calls[name] = call
        except Exception as error:
            results.miss(name, error, case)
            results.require_device(device, name)
    return calls


def on_backend(backend: str, function: Callable) -> Callable:
    """The function with one backend chosen while it runs."""

    def call(*args):
        with pk.use_backend(backend):
            return function(*args)

    return call


def steps(cases: Iterable, describe: Callable[[object], str] = str) -> Iterator:
    """The cases, with a progress bar on a terminal and elsewhere a line on stderr for each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    cases, console = list(cases), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    options = {"refresh_per_second": 2, "transient": True, "disable": not console.is_terminal}
    with Progress(*columns, console=console, **options) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=describe(case), refresh=True)
            if not console.is_terminal:
                print(describe(case), file=sys.stderr, flush=True)
            yield case
            progress.advance(task)


def finish(title: str, results: Results, args: argparse.Namespace) -> int:
    """Print the cases and what is missing. 1 where a result was wrong or one of ours failed, else 0."""
    from .summary import print_summary

    machine = f"{processor_name(args.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print_summary(results.groups, title, machine, results.missing)
    rows = [row for group in results.groups for row in group]
    if not rows:
        raise CommandError("nothing was measured: no provider can run, see above")
    if args.json:
        write_json(results, args.json)
    print(f"written to {results.path}" + (f" and {args.json}" if args.json else ""))
    return 1 if results.wrong or results.failed else 0


def write_json(results: Results, file: str, **more: object) -> None:
    """The rows, why a provider is not among them, and what else a benchmark has."""
    content = {"rows": [asdict(row) | results.facts for group in results.groups for row in group]}
    content |= {kind: getattr(results, kind) for kind in ("unavailable", "wrong", "failed")} | more
    write_whole(file, json.dumps(content, indent=1) + "\n")
