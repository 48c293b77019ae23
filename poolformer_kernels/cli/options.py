"""What the commands and the benchmarks parse alike: the parser, and the types of options."""

import argparse

import torch

from .errors import CommandError

__all__ = ["DTYPES", "Parser", "dtypes", "image_size", "positive"]

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise CommandError(f"{message} (see {self.prog} --help)")


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


def image_size(text: str) -> int:
    value = positive(text)
    if value < 32:
        raise argparse.ArgumentTypeError(f"must be at least 32, the model's stride, got {value}")
    return value


def dtypes(text: str) -> tuple[torch.dtype, ...]:
    names = text.split(",")
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"{name!r} is not a dtype; allowed: {', '.join(DTYPES)}")
    return tuple(getattr(torch, name) for name in dict.fromkeys(names))
