"""The command line: `poolformer-kernels demo | info | …`, the same as `python -m poolformer_kernels …`."""

import argparse
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from ..ops.dispatch import BACKENDS
from .errors import CommandError, report_errors
from .options import DTYPES, Parser, dtypes, image_size, positive

__all__ = ["load_benchmarks", "main"]

_BENCHMARKS = ("model", "block", "mlp", "pool-mixer", "training", "host")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="poolformer-kernels", description="Fused kernels for PoolFormer: see, inspect, verify."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="demo | info | verify | bench | profile"
    )

    demo = commands.add_parser(
        "demo",
        help="run a PoolFormer on photos: equal to timm's, and how much faster",
        description="Runs timm's PoolFormer and ours with the same weights on photos, compares both with "
        "float64, times both, and writes an HTML report. Exit code 1 if our error is above the allowed one.",
    )
    demo.add_argument(
        "--image", nargs="+", metavar="FILE", help="photos (default: two that scikit-learn bundles)"
    )
    demo.add_argument("--model", default="poolformer_s12", metavar="NAME", help="default: %(default)s")
    demo.add_argument(
        "--checkpoint", metavar="FILE", help="weights (default: random, the same in both models)"
    )
    demo.add_argument(
        "--dtype", type=dtypes, default="float32,bfloat16", metavar="A,B", help="default: %(default)s"
    )
    demo.add_argument("--batch-size", type=positive, metavar="N", help="for timing (default: 8, 64 on CUDA)")
    demo.add_argument(
        "--rounds", type=positive, default=50, metavar="N", help="timing rounds (default: %(default)s)"
    )
    demo.add_argument(
        "--image-size", type=image_size, metavar="N", help="pixels (default: the model's own, 224)"
    )
    demo.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu")
    demo.add_argument(
        "--backend", choices=("auto", *BACKENDS), help="default: POOLFORMER_KERNELS_BACKEND, else auto"
    )
    demo.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the timing")
    demo.add_argument(
        "--json", metavar="FILE", help="write every figure (schema: see poolformer_kernels.cli.demo)"
    )
    demo.add_argument(
        "--report", default="report", metavar="DIR", help="where index.html goes (default: %(default)s)"
    )

    info = commands.add_parser("info", help="devices, backends and why one is unavailable, ISA, versions")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument(
        "--kernels",
        action="store_true",
        help="the CUDA kernels instead: registers, spills, shared memory, threads, occupancy",
    )

    verify = commands.add_parser(
        "verify",
        help="errors of every operator against float64, beside eager PyTorch's",
        description="Compares every operator, forward and gradients, with float64, beside eager PyTorch in "
        "the same dtype. Exit code 1 if an error is above 1.5 times eager's plus rounding, 2 if the backend "
        "cannot run.",
    )
    verify.add_argument(
        "--backend", choices=BACKENDS, help="default: every backend that can run on the device"
    )
    verify.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    verify.add_argument(
        "--dtype", type=dtypes, default=",".join(DTYPES), metavar="A,B", help="default: %(default)s"
    )
    verify.add_argument("--json", metavar="FILE", help="write every error")

    layers = commands.add_parser(
        "profile",
        help="parameters, MACs, bytes and time of every layer, and the limit it could reach",
        description="Counts and times every layer, stage and the whole model in inference, beside the limits "
        "that a copy and a matrix product set, measured in the same run.",
    )
    layers.add_argument("--model", default="poolformer_s12", metavar="NAME", help="default: %(default)s")
    layers.add_argument(
        "--image-size", type=image_size, metavar="N", help="pixels (default: the model's own, 224)"
    )
    layers.add_argument("--batch-size", type=positive, default=1, metavar="N", help="default: %(default)s")
    layers.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    layers.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu")
    layers.add_argument("--no-time", action="store_true", help="count only")
    layers.add_argument(
        "--paper",
        action="store_true",
        help="print the paper's Table 1 and the costs in its Table 2 instead, counted from the modules",
    )
    layers.add_argument("--json", metavar="FILE", help="write every figure, the times in seconds")

    bench = commands.add_parser(
        "bench",
        help="times of whole models, blocks and operators beside eager, torch.compile, OpenVINO and others",
        description="Measures ours beside what else could run the same model, interleaved in one run, and "
        "writes CSV. `bench model --help` shows a benchmark's own options.",
    )
    bench.add_argument("benchmark", choices=_BENCHMARKS)
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="the benchmark's options")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0, 1 where a verification failed, 2 where the request cannot be met."""
    parser = _parser()

    def command() -> int:
        args = parser.parse_args(argv)
        # imported here: only some need extras
        if args.command == "demo":
            from .demo import run
        elif args.command == "info":
            from .info import run
        elif args.command == "profile":
            from .profile import run
        elif args.command == "bench":
            run = _bench
        else:
            from .verify import run
        return run(args)

    return report_errors(parser.prog, command)


def _bench(args: argparse.Namespace) -> int:
    package = load_benchmarks()
    benchmark = import_module(f".bench_{args.benchmark.replace('-', '_')}", package.__name__)
    return benchmark.main(args.arguments, prog=f"poolformer-kernels bench {args.benchmark}")


def load_benchmarks() -> ModuleType:
    """The package ``poolformer_kernels.benchmarks``, which can be imported by this name afterwards.

    Its folder lies inside an installed package, but beside the package in a source tree. There the import
    system would not find it, or it would find the folder of another tree that is installed.

    Raises:
        CommandError: there is no such folder.
    """
    parent = __package__.partition(".")[0]
    name = f"{parent}.benchmarks"
    if name not in sys.modules:
        folder = _benchmarks_folder()
        spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[name] = package = module_from_spec(spec)
        spec.loader.exec_module(package)
        sys.modules[parent].benchmarks = package
    return sys.modules[name]


def _benchmarks_folder() -> Path:
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "benchmarks", package.parent / "benchmarks"):
        if (folder / "harness.py").is_file():
            return folder
    raise CommandError(f"the benchmarks are missing: neither in {package} nor beside it")
