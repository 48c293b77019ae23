"""Where `bench host` runs, and how it counts launches: a CUDA device, or the null GPU of a source tree."""

import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.cli.kernels import short_name

__all__ = ["Launches", "count_launches", "forget_launches", "is_null_gpu", "null_gpu_environment"]

_TESTS = Path(__file__).resolve().parent.parent / "tests"
# The kernels of this package as a profiler names them; those of Triton have no namespace
_OURS = re.compile(r"\bpk::|^((sample|bias|merge)_stats|pool_mixer_\w+|pool_head|mlp_\w+)$")


@dataclass(frozen=True)
class Launches:
    """What one call launches: the package's own kernels by name, and how many others."""

    ours: dict[str, int]
    others: int

    @property
    def total(self) -> int:
        return sum(self.ours.values()) + self.others


def is_null_gpu() -> bool:
    """Whether this process's CUDA device is the null GPU."""
    return os.environ.get("NULL_GPU") == "1"


def null_gpu_environment(capability: str) -> dict[str, str]:
    """Variables for a process on a null GPU that moves no data.

    Raises:
        CommandError: there is none here, and why.
    """
    needs = "bench host needs a CUDA device, or in a source tree the null GPU: torch sees no CUDA device, and"
    if not (_TESTS / "null_gpu" / "build.py").is_file():
        raise CommandError(f"{needs} there is no {_TESTS / 'null_gpu'}")
    try:
        build, extension = _null_gpu("build"), _null_gpu("extension")
        if reason := build.unavailable():
            raise CommandError(f"{needs} {reason}")
        folder = build.build()
        linked = None if extension.extension_file() is None else extension.link_extension()
        variables = build.environment(folder, capability, extension=linked, data=False)
    except RuntimeError as error:  # a compiler's: the command and what it said
        raise CommandError(f"{needs} it cannot be built: {str(error).strip().splitlines()[-1]}") from None
    paths = [variables.get("PYTHONPATH", os.environ.get("PYTHONPATH")), str(_TESTS.parent)]
    return variables | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _null_gpu(module: str):
    """A module of tests/null_gpu."""
    if str(_TESTS) not in sys.path:
        sys.path.append(str(_TESTS))
    return importlib.import_module(f"null_gpu.{module}")


def count_launches(call: Callable[[], object]) -> Launches:
    """What the call launches. The null GPU counts a call of a library as one, a device its kernels.

    Raises:
        AssertionError: the null GPU was asked for what a GPU refuses.
    """
    if is_null_gpu():
        with _null_gpu("null_gpu").recorded() as launches:
            call()
        names = [(launch.name, launch.ours) for launch in launches]
    else:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [name for name in device if not name.startswith(("Memcpy", "Memset"))]
        names = [(short_name(name), bool(_OURS.search(name))) for name in kernels]
    ours = Counter(name.split("<")[0] for name, is_ours in names if is_ours)
    return Launches(dict(sorted(ours.items())), len(names) - ours.total())


def forget_launches() -> None:
    """The null GPU keeps a record of each until it is asked for."""
    if is_null_gpu():
        _null_gpu("null_gpu").take()
