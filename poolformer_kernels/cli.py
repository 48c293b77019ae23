"""The command line: `poolformer-kernels demo | info | verify`, the same as `python -m poolformer_kernels`."""

import argparse
import os
import sys
from pathlib import Path

import torch

from .ops.backend import BACKENDS

__all__ = ["CommandError", "check_writable", "main"]

_DTYPES = ("float32", "bfloat16", "float16")


class CommandError(Exception):
    """What the user can mend: `main` prints it as one line and returns 2."""


def check_writable(file: str | None, folder: str | None = None) -> None:
    """Fail before the work, not after it: both are made where they do not exist."""
    for path, parent in ((file, file and Path(file).parent), (folder, folder)):
        try:
            if parent is not None:
                Path(parent).mkdir(parents=True, exist_ok=True)
            if path is not None and path == file:
                Path(path).open("a").close()
        except OSError as error:
            raise CommandError(f"cannot write to {path}: {error.strerror}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


def _size(text: str) -> int:
    value = _positive(text)
    if value < 32:
        raise argparse.ArgumentTypeError(f"must be at least 32, the model's stride, got {value}")
    return value


def _dtypes(text: str) -> tuple[torch.dtype, ...]:
    names = text.split(",")
    for name in names:
        if name not in _DTYPES:
            raise argparse.ArgumentTypeError(f"{name!r} is not a dtype; allowed: {', '.join(_DTYPES)}")
    return tuple(getattr(torch, name) for name in dict.fromkeys(names))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="poolformer-kernels", description="Fused kernels for PoolFormer: see, inspect, verify."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | info | verify")

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
        "--dtype", type=_dtypes, default="float32,bfloat16", metavar="A,B", help="default: %(default)s"
    )
    demo.add_argument("--batch-size", type=_positive, metavar="N", help="for timing (default: 8, 64 on CUDA)")
    demo.add_argument(
        "--rounds", type=_positive, default=50, metavar="N", help="timing rounds (default: %(default)s)"
    )
    demo.add_argument("--image-size", type=_size, metavar="N", help="pixels (default: the model's own, 224)")
    demo.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu")
    demo.add_argument(
        "--backend", choices=("auto", *BACKENDS), help="default: POOLFORMER_KERNELS_BACKEND, else auto"
    )
    demo.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the timing")
    demo.add_argument(
        "--json", metavar="FILE", help="write every figure (schema: see poolformer_kernels.demo)"
    )
    demo.add_argument(
        "--report", default="report", metavar="DIR", help="where index.html goes (default: %(default)s)"
    )

    info = commands.add_parser("info", help="devices, backends and why one is unavailable, ISA, versions")
    info.add_argument("--json", action="store_true", help="print JSON")

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
        "--dtype", type=_dtypes, default=",".join(_DTYPES), metavar="A,B", help="default: %(default)s"
    )
    verify.add_argument("--json", metavar="FILE", help="write every error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0, 1 where a verification failed, 2 where the request cannot be met."""
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        # imported here: only the demo needs the extras
        if args.command == "demo":
            from .demo import run
        elif args.command == "info":
            from .info import run
        else:
            from .verify import run
        return run(args)
    except CommandError as error:
        message = " ".join(str(error).split())
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"{parser.prog}: error: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (`| head`) has left; nothing may be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
