"""What a result is of (processor, threads, torch, commit), and in which file it goes."""

import re
from pathlib import Path

import torch

import poolformer_kernels as pk
from poolformer_kernels.cli.files import make_folder
from poolformer_kernels.cli.info import cpu_name

from .commit import commit_of

__all__ = [
    "DEFAULT_FOLDER",
    "commit",
    "csv_path",
    "device_folder",
    "facts_of",
    "processor_name",
    "results_folder",
]

DEFAULT_FOLDER = "results"
_HERE = Path(__file__).resolve().parent
_SOURCE_TREE = (_HERE.parent / "pyproject.toml").is_file()  # an installed copy is inside the package


def csv_path(name: str, device: str, file: str | None = None) -> Path:
    """``file``, by default ``results/<device>/<name>.csv``, of which ``results`` is made."""
    if file:
        return Path(file)
    make_folder(results_folder())
    return results_folder() / device_folder(device) / f"{name}.csv"


def results_folder() -> Path:
    """Where results go by default: below the current folder, wherever the package is installed."""
    return Path(DEFAULT_FOLDER)


def device_folder(device: str) -> str:
    """The processor's name as that of a folder: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", processor_name(device).lower()).strip("-")


def processor_name(device: str) -> str:
    """The processor's own name."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def facts_of(device: str) -> dict[str, str | int]:
    """The last columns of every row."""
    return {
        "device": processor_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the source tree, or the version of an installed copy."""
    return commit_of(_HERE) if _SOURCE_TREE else pk.__version__
