"""What the launchers choose their tiles by: a device's architecture and shared memory, tensors' alignment.

No triton import here, like `config`.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DEVICES", "Device", "aligned", "assumed", "device_of"]


class Device(NamedTuple):
    """A GPU as the launchers see it."""

    architecture: int  # ten times the compute capability: 80, 90, 120
    shared: int  # bytes of shared memory that a block may use

    @property
    def register_operands(self) -> bool:
        """Whether its best products, mma.sync, read both operands from registers.

        wgmma (9.x) and tcgen05 (10.x, 11.x) read them from shared memory; 12.x has neither.
        """
        return self.architecture // 10 not in (9, 10, 11)


_SMALL, _AMPERE, _LARGE = 99 * 1024, 163 * 1024, 227 * 1024
_SHARED = {
    80: _AMPERE,
    86: _SMALL,
    87: _AMPERE,
    89: _SMALL,
    90: _LARGE,
    100: _LARGE,
    103: _LARGE,
    110: _LARGE,
    120: _SMALL,
    121: _SMALL,
}
#: by architecture, for code that is compiled without the GPU
DEVICES = {architecture: Device(architecture, shared) for architecture, shared in _SHARED.items()}
_assumed = DEVICES[90]


def device_of(x: Tensor) -> Device:
    """The GPU that x is on; for any other tensor the one `assumed`, Hopper unless told otherwise."""
    return _gpu(x.get_device()) if x.is_cuda else _assumed


@cache
def _gpu(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(10 * found.major + found.minor, found.shared_memory_per_block_optin)


def aligned(*tensors: Tensor) -> bool:
    """Whether tensors start at 16 bytes of their memory; other loads are narrow and take registers."""
    return all(t.storage_offset() * t.element_size() % 16 == 0 for t in tensors)


@contextlib.contextmanager
def assumed(device: Device) -> Iterator[None]:
    """The launchers configure tensors that are on no GPU for this device."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before
