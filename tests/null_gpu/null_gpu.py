"""What the null GPU recorded, for a process that runs with `build.environment`: launches and complaints.

``with recorded() as launches: model(x)`` gives the launches of the block, and raises if the block did
anything that a GPU would not have done.
"""

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ACTIVE = os.environ.get("NULL_GPU") == "1"


@dataclass(frozen=True)
class Launch:
    """A kernel's launch. In a capture it is recorded once as captured, then at every replay of its graph."""

    name: str  # norm_stats<bf16>, demangled and short as in `info --kernels`; Triton's are as written
    mangled: str
    known: bool  # the kernel's figures were read from its binary: its arguments and sizes were checked
    library: bool  # a call of cuBLAS or cuDNN, of that name: how many kernels it would launch is not known
    captured: bool  # kept for a graph, not run
    replayed: bool  # run by a graph
    device: int
    function: int  # the driver's handle of the kernel
    stream: int  # torch's ``Stream.cuda_stream``; 0 is the default stream
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_shared: int  # bytes, as are the next and local
    static_shared: int
    registers: int  # of a thread
    local: int  # of a thread: its stack and what was spilled
    arguments: tuple[int, ...]  # the first 8 bytes of each

    @property
    def ours(self) -> bool:
        """It is of this package: its extension's, or a Triton kernel that torch.compile did not make."""
        if self.library or self.mangled.startswith("triton_"):
            return False
        return self.mangled.startswith("_ZN2pk") or not self.mangled.startswith("_Z")


class ComplaintError(AssertionError):
    """The null GPU was asked for what a GPU refuses, or for what it does not have."""


def _driver() -> ctypes.CDLL:
    if not ACTIVE:
        raise RuntimeError(
            "NULL_GPU is not set: this process does not run on the null GPU (build.environment)"
        )
    driver = ctypes.CDLL("libcuda.so.1")
    driver.null_gpu_launches.restype = driver.null_gpu_complaints.restype = ctypes.c_char_p
    driver.null_gpu_graph_launches.restype = ctypes.c_long
    return driver


def _launches(clear: bool) -> list[Launch]:
    rows = map(json.loads, _driver().null_gpu_launches(int(clear)).decode().splitlines())
    return [_launch(**row) for row in rows]


def _launch(kernel: str, **row) -> Launch:
    from poolformer_kernels.cli.kernels import short_name  # without the package where there are no records

    values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Launch(name=short_name(kernel), **values)


def launches() -> list[Launch]:
    """All since `take` was last called."""
    return _launches(clear=False)


def take() -> list[Launch]:
    """All since this was last called."""
    return _launches(clear=True)


def graph_launches() -> int:
    """Replays of graphs since the process began."""
    return _driver().null_gpu_graph_launches()


def complaints() -> list[str]:
    """All since `take_complaints` was last called."""
    return _driver().null_gpu_complaints(0).decode().splitlines()


def take_complaints() -> list[str]:
    """All since this was last called: for a test that wants them."""
    return _driver().null_gpu_complaints(1).decode().splitlines()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The block's launches, in a list that is filled when it ends.

    Raises:
        ComplaintError: the block, or what came before it, did what a GPU refuses.
    """
    take()
    found: list[Launch] = []
    yield found
    found += take()
    if said := take_complaints():
        raise ComplaintError("\n".join(said))
