"""The peak of a process's resident memory, from Linux's /proc.

It counts tensors, the libraries' workspaces and the kernels' own buffers alike, as no allocator's counters
do.
"""

import os
from collections.abc import Callable
from pathlib import Path

RESET = Path("/proc/self/clear_refs")
# malloc gives blocks of 64 KiB and more back at once: what is freed is not counted, and nothing that was
# counted before is used again
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}


def require_peaks() -> None:
    """A skip where peaks cannot be read or say nothing."""
    import pytest  # the processes that are measured do without it

    if not RESET.exists():
        pytest.skip("peaks are read from Linux's /proc")
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer keeps freed memory")


def peak_of(step: Callable[[], object]) -> int:
    """Bytes at the peak of the step less those before it, in a process with the variables `MALLOC`."""
    before = _resident("VmRSS")
    RESET.write_text("5")  # the peak starts again from here
    step()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) << 10
