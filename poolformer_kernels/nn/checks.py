"""Checks of the layers' constructor arguments, and of what may be skipped around a module."""

from torch import nn

from ..ops.torch_private import has_hooks

__all__ = ["boolean", "hooked", "is_number", "not_negative", "number", "odd", "positive_int", "probability"]


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: it has hooks or a forward of its own."""
    return has_hooks(module) or "forward" in module.__dict__


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def boolean(name: str, value: bool | None, optional: bool = False) -> bool | None:
    if type(value) is not bool and not (optional and value is None):
        raise TypeError(f"{name} must be a bool{' or None' * optional}, got {type(value).__name__}")
    return value


def number(name: str, value: float) -> float:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value


def positive_int(name: str, value: int) -> int:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def odd(name: str, value: int) -> int:
    if positive_int(name, value) % 2 == 0:
        raise ValueError(f"{name} must be odd and positive, got {value}")
    return value


def not_negative(name: str, value: float) -> float:
    if not number(name, value) >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def probability(name: str, value: float) -> float:
    if not 0 <= not_negative(name, value) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return value
