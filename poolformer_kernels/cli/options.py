"""What the commands and the benchmarks parse alike: the parser, and the types of options."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable

import torch

from ..models import list_models
from .errors import CommandError

__all__ = [
    "DIGITS",
    "DTYPES",
    "HEADS",
    "Parser",
    "dtypes",
    "image_size",
    "model",
    "models_like_timms",
    "natural",
    "positive",
    "short_names",
]

DTYPES = ("float32", "bfloat16", "float16")
DIGITS = "poolformer_digits"  # of training's own sizes
HEADS = ("retinanet", "mask_rcnn", "semantic_fpn")  # of detectors and segmenters, before a backbone's name


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


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer from 0, got {text!r}")
    return int(text)


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


# ---- names of models ---------------------------------------------------------------------------------------


def short_names(names: Iterable[str] | None = None) -> dict[str, str]:
    """The names of models by what is left of them without ``poolformer_`` or ``metaformer_``: s12, v2_s12.

    What two models could be called belongs to the first, a PoolFormer: ``s12`` is not ``metaformer_s12``.
    """
    found: dict[str, str] = {}
    for name in list_models() if names is None else names:
        found.setdefault(re.sub("^(poolformer|metaformer)_?", "", name), name)
    return found


def model(
    allowed: Iterable[str] | None = None,
    *,
    more: tuple[str, ...] = (),
    heads: bool = False,
    timm: bool = False,
    why: str = "",
) -> Callable[[str], str]:
    """The type of an option that names a model: its whole name, of a short one, too (`short_names`).

    Args:
        allowed: those of `list_models` that the command can take; None for all.
        more: names beside those.
        heads: also detectors and segmenters, ``retinanet_s12`` say; whether there is such a one is not asked.
        timm: also ``timm:NAME``, which is left as it is.
        why: what the command lacks for other models, in words.
    """
    known = [*list_models(), *more]
    taken = known if allowed is None else [*allowed, *more]
    short = short_names(known)

    def parse(text: str) -> str:
        if timm and text.startswith("timm:"):
            return text
        head = next((f"{h}_" for h in HEADS if heads and text.startswith(f"{h}_")), "")
        own = text.removeprefix(head)
        name = short.get(own, own)
        if name in taken:
            return head + name
        if name in known:
            raise argparse.ArgumentTypeError(f"{name} cannot be taken: {why}; allowed: {', '.join(taken)}")
        close = difflib.get_close_matches(own, [*taken, *(s for s in short if short[s] in taken)], n=3)
        hint = f" (did you mean {' or '.join(head + name for name in close)}?)" if close else ""
        raise argparse.ArgumentTypeError(
            f"{text!r} is no model{hint}; all of them: poolformer-kernels info --models"
        )

    return parse


def models_like_timms() -> list[str]:
    """The models that timm has, too."""
    return [name for name in list_models() if name.startswith("poolformer")]
