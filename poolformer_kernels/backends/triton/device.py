"""What the launchers choose their tiles by: a device's architecture and its shared memory.

No triton import here, like `config`.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DEVICES", "Device", "assumed", "device_of"]


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


#: by architecture
DEVICES = {
    architecture: Device(architecture, shared)
    for shared, architectures in {
        166912: (80, 87),
        101376: (86, 89, 120, 121),
        232448: (90, 100, 103, 110),
    }.items()
    for architecture in architectures
}
_assumed = DEVICES[90]


def device_of(x: Tensor) -> Device:
    """The GPU that x is on; for any other tensor the one `assumed`, Hopper unless told otherwise."""
    return _gpu(x.get_device()) if x.is_cuda else _assumed


@cache
def _gpu(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(10 * found.major + found.minor, found.shared_memory_per_block_optin)


@contextlib.contextmanager
def assumed(device: Device) -> Iterator[None]:
    """The launchers configure tensors that are on no GPU for this device."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before
