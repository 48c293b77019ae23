"""The command line: `poolformer-kernels demo | info | …`, the same as `python -m poolformer_kernels …`."""

import argparse
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from .errors import CommandError, report_errors
from .extras import require
from .parser import parser, subparsers
from .startup import end_of_import

__all__ = ["load_benchmark", "load_benchmarks", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0, 1 where a verification failed, 2 where the request cannot be met."""
    end_of_import()
    top = parser()

    def command() -> int:
        words = sys.argv[1:] if argv is None else argv
        _check_text(words)
        if words[:1] == ["train"]:
            require("train")
            from .train import add_options

            add_options(subparsers(top)["train"], words)
        args = top.parse_args(words)
        args.words = words
        require(args.command)
        # imported here: only some need extras
        if args.command == "demo":
            from .demo import run
        elif args.command == "info":
            from .info import run
        elif args.command == "profile":
            from .profile import run
        elif args.command == "export":
            from .export import run
        elif args.command == "bench":
            run = _bench
        elif args.command == "train":
            from .train import run
        elif args.command == "validate":
            from .train import validate as run
        elif args.command == "cam":
            from .cam import run
        elif args.command == "predict":
            from .predict import run
        else:
            from .verify import run
        return run(args)

    return report_errors(top.prog, command)


def _check_text(words: list[str]) -> None:
    """Pages and JSON repeat what was asked for, and neither can hold a file name that is no text."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise CommandError(f"argument {word!a} is no UTF-8; allowed: files of other names") from None


def _bench(args: argparse.Namespace) -> int:
    require(f"bench {args.benchmark}")
    return load_benchmark(args.benchmark).main(
        args.arguments, prog=f"poolformer-kernels bench {args.benchmark}"
    )


def load_benchmark(name: str) -> ModuleType:
    """The module of a benchmark by the name that the command line has for it."""
    return import_module(f".bench_{name.replace('-', '_')}", load_benchmarks().__name__)


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
