"""``device=`` and ``dtype=`` of a module that is made of modules which others make."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["Device", "placed"]

Device = torch.device | str | int | None


@contextlib.contextmanager
def placed(module: nn.Module, device: Device, dtype: torch.dtype | None) -> Iterator[None]:
    """What is made inside is made on the device, and at the end the module is of the dtype.

    So a callable that a user gives for a norm, an activation or a token mixer need take neither. None leaves
    either as PyTorch has it.
    """
    with contextlib.nullcontext() if device is None else torch.device(device):
        yield
    if dtype is not None:
        module.to(dtype)
