"""What the benchmarks share: a settled process, the facts of the machine, and one row format."""

import csv
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

__all__ = ["Row", "device_name", "settle", "write_rows"]

RESULTS = Path(__file__).parent / "results"

# glibc returns large blocks to the system at once, so that every output would be paged in anew: up to half
# the time of these operators, for every provider that allocates. A long-running process has a warm heap; so
# have these benchmarks.
_WARM_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}


def settle(threads: int) -> None:
    """Restart the process with a warm heap, then set the number of threads."""
    if any(os.environ.get(name) != value for name, value in _WARM_HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **_WARM_HEAP})
    torch.set_num_threads(threads)


@dataclass
class Row:
    """One measurement: seconds per call, and what it makes of the limit that was measured beside it."""

    benchmark: str
    direction: str
    shape: str
    batch: int
    dtype: str
    layout: str
    provider: str
    median_s: float
    p20_s: float
    p80_s: float
    rate: float  # in `unit`: useful bytes of the minimal traffic, or FLOPs, per second
    unit: str
    fraction: float  # of the copy's or the large matrix product's rate


def device_name(device: str) -> str:
    """The processor's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        return platform.machine()


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def write_rows(rows: list[Row], name: str, device: str) -> Path:
    """Write ``results/<device>/<name>.csv``, each row with the machine, the threads, torch and the commit."""
    machine = device_name(device)
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *facts])
        writer.writeheader()
        for row in rows:
            values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({**values, **facts})
    return path
