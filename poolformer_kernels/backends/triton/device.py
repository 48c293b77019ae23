"""What the launchers choose their tiles by: a device's architecture and shared memory, tensors' alignment.

Triton is not imported here, as in `config`.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DEVICES",
    "Device",
    "aligned",
    "as_aligned",
    "assumed",
    "device_of",
    "memory_of",
    "on_another_device",
]


class Device(NamedTuple):
    """A GPU as the launchers see it."""

    architecture: int  # ten times the compute capability: 80, 90, 120
    shared: int  # bytes of shared memory that a block may use

    @property
    def register_operands(self) -> bool:
        """Whether its fastest matrix instruction is mma.sync, which reads both operands from registers.

        wgmma (9.x) and tcgen05 (10.x, 11.x) read them from shared memory; 12.x has neither of these.
        """
        return self.architecture // 10 not in (9, 10, 11)


# bytes of shared memory that a block may use, by architecture (CUDA C++ Programming Guide)
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
#: the devices by architecture, for code that is compiled without a GPU
DEVICES = {architecture: Device(architecture, shared) for architecture, shared in _SHARED.items()}
_assumed = DEVICES[90]


def device_of(x: Tensor) -> Device:
    """The GPU that x is on; for a tensor on no GPU the device given to `assumed`, or else Hopper."""
    return _gpu(x.get_device()) if x.is_cuda else _assumed


@cache
def _gpu(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(10 * found.major + found.minor, found.shared_memory_per_block_optin)


def memory_of(x: Tensor) -> int:
    """Bytes of memory of the GPU that x is on, used and free; for a tensor on no GPU an H100's 80 GB."""
    return _memory(x.get_device()) if x.is_cuda else 80 * 10**9


@cache
def _memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).total_memory


def on_another_device(x: Tensor) -> bool:
    """Whether x is on a GPU that is not the current one, which Triton would launch on."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def aligned(*tensors: Tensor) -> bool:
    """Whether each tensor starts at a multiple of 16 bytes in its memory.

    Tensors that do not are loaded in narrow pieces, which takes more registers.
    """
    return all(t.storage_offset() * t.element_size() % 16 == 0 for t in tensors)


def as_aligned(t: Tensor) -> Tensor:
    """The tensor, or a copy where it does not start at a multiple of 16 bytes.

    The MLP reads its operands many times, and its tiles have no registers left for narrow pieces.
    """
    return t if aligned(t) else t.clone()


@contextlib.contextmanager
def assumed(device: Device) -> Iterator[None]:
    """Inside, the launchers configure tensors that are on no GPU for this device."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before
