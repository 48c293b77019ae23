"""How messages name classes, and what a module's call does."""

import sys

import torch
from torch import nn

__all__ = ["class_path", "more_than_forward"]

_SHORT = ("torch.nn", "poolformer_kernels.nn")  # packages that offer at their top what lies deeper


def class_path(value: object) -> str:
    """A class, or that of a value, with its package: ``timm.models.metaformer.Stem``, ``torch.nn.Conv2d``."""
    kind = value if isinstance(value, type) else type(value)
    if torch.compiler.is_compiling():  # nobody reads what the compiler traces
        return kind.__name__
    module = kind.__module__
    for package in _SHORT:
        if getattr(sys.modules.get(package), kind.__name__, None) is kind:
            module = package
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def more_than_forward(path: str, module: nn.Module) -> str:
    """Why a call of a module is more than its class's forward; see `poolformer_kernels.nn.checks.hooked`."""
    return f"forward was set on {path} itself" if "forward" in vars(module) else f"{path} has hooks"
