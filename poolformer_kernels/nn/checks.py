"""Checks of the layers' constructor arguments, and of what may be skipped around a module.

A check returns the value as Python's own type: numpy's integers and floats are taken, too.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, overload

import torch
from torch import nn

from ..ops.torch_private import has_hooks

__all__ = [
    "boolean",
    "epsilon",
    "finite",
    "hooked",
    "integer",
    "is_number",
    "makes_module",
    "not_negative",
    "number",
    "odd",
    "only_from_timm",
    "positive_int",
    "probability",
    "tracing",
]


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: it has hooks or a forward of its own."""
    return has_hooks(module) or "forward" in module.__dict__


def tracing() -> bool:
    """Whether `torch.jit.trace` records what is called, also for the legacy ONNX exporter or OpenVINO."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@overload
def boolean(name: str, value: bool) -> bool: ...
@overload
def boolean(name: str, value: bool | None, optional: bool) -> bool | None: ...
def boolean(name: str, value: bool | None, optional: bool = False) -> bool | None:
    if type(value) is not bool and not (optional and value is None):
        raise TypeError(f"{name} must be a bool{' or None' * optional}, got {type(value).__name__}")
    return value


def number(name: str, value: float) -> float:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def finite(name: str, value: float) -> float:
    if not math.isfinite(number(name, value)):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return float(value)


def integer(name: str, value: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return int(value)


def positive_int(name: str, value: int) -> int:
    if integer(name, value) < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return int(value)


def odd(name: str, value: int) -> int:
    if positive_int(name, value) % 2 == 0:
        raise ValueError(f"{name} must be odd and positive, got {value}")
    return int(value)


def not_negative(name: str, value: float) -> float:
    if not number(name, value) >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return float(value)


def epsilon(name: str, value: float) -> float:
    """What is added to a variance: finite and not negative."""
    return not_negative(name, finite(name, value))


def probability(name: str, value: float) -> float:
    if not number(name, value) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return not_negative(name, value)


def makes_module(name: str, value: Callable[..., nn.Module], example: str) -> Callable[..., nn.Module]:
    """What makes a module: a class of modules or a function."""
    if isinstance(value, nn.Module) or not callable(value):
        got = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
        raise TypeError(f"{name} must be a callable that makes a module, as {example}, got {got}")
    return value


def only_from_timm(
    kind: type[nn.Module], proj_drop: float | None, others: Mapping[str, Any], allowed: str
) -> float:
    """``proj_drop`` as a probability; an error for keywords that a token mixer does not have.

    timm's MetaFormer gives each of its mixers ``proj_drop``, and all keywords that any of them takes. So
    where ``proj_drop`` is given, other keywords may belong to other mixers; else they are mistakes.
    """
    if others and proj_drop is None:
        raise TypeError(f"{kind.__name__} has no argument {next(iter(others))!r}; allowed: {allowed}")
    return 0.0 if proj_drop is None else probability("proj_drop", proj_drop)
