"""Files of weights, and folders that have them, read as tensors and plain values only."""

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FILE_NOTES", "IN_FOLDER", "import_safetensors", "read_checkpoint"]

FILE_NOTES = "poolformer_kernels"  # the entry of a .safetensors file's metadata with our notes, as JSON
# What transformers' save_pretrained writes, in the order in which its from_pretrained looks for them. An
# index says which of several files each tensor is in.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
IN_FOLDER = tuple(name + suffix for name in _WHOLE for suffix in ("", _INDEX))


def import_safetensors() -> Callable[..., dict[str, Tensor]]:
    """Its function that reads a file, or an error that says how to install it."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            "a .safetensors file needs the package safetensors: pip install safetensors"
        ) from error
    return load_file


def read_checkpoint(path: Path) -> object:
    """What a file, or a folder with one of `IN_FOLDER`, holds, on the CPU, of tensors and plain values only.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `load_checkpoint`.
    """
    if not path.is_dir():
        return _read_file(path)
    name = next((name for name in IN_FOLDER if (path / name).is_file()), None)
    if name is None:
        found = sorted(entry.name for entry in path.iterdir())
        has = f"{', '.join(found[:5])}{', ...' * (len(found) > 5)}" if found else "nothing"
        raise FileNotFoundError(
            f"checkpoint {path} is a folder that has {has}; allowed: a file, or a folder with one of"
            f" {', '.join(IN_FOLDER)}"
        )
    return _read_parts(path, name) if name.endswith(_INDEX) else _read_file(path / name, f"{name} ")


def _read_parts(folder: Path, index: str) -> dict[str, Tensor]:
    """The tensors of all the files that an index names."""
    try:
        places = json.loads((folder / index).read_text())["weight_map"]
        parts = sorted(set(places.values()))
        plain = all(Path(part).name == part for part in parts)
    except (ValueError, TypeError, KeyError, AttributeError):
        plain = False
    if not plain:
        raise ValueError(f"{index} must have a weight_map of tensors' names to names of files beside it")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if not (folder / part).is_file():
            raise FileNotFoundError(f"checkpoint {folder} has no {part}, which its {index} names")
        content = _read_file(folder / part, f"{part} ")
        if not isinstance(content, dict):
            raise TypeError(f"{part} must hold a mapping of names to tensors, got {type(content).__name__}")
        tensors.update(content)
    return tensors


def _read_file(path: Path, name: str = "") -> object:
    """What a file holds; an error begins with this name of it."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist or is not a file")
    try:
        if path.suffix == ".safetensors":
            tensors = OrderedDict(import_safetensors()(path, device="cpu"))
            vars(tensors)["_metadata"] = {"": _notes_of_file(path)}  # where a module's state dict has its own
            return tensors
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # zip, pickle, header and value errors alike: the file is at fault
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name}cannot be read as tensors only ({first_line})") from error


def _plain_types() -> list[Any]:
    """What `torch.load(weights_only=True)` may make beside tensors and Python's own values.

    They are the arguments that timm's train.py saves and numpy's numbers, as mmcv's best score is one; the
    function that reads these has one name in numpy 1, another in numpy 2. Without numpy there are none.
    """
    try:
        import numpy as np
    except ImportError:
        return [argparse.Namespace]
    number = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    dtypes = {type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64")}
    return [argparse.Namespace, np.dtype, *dtypes, *((number, name) for name in names)]


def _notes_of_file(path: Path) -> dict[str, Any]:
    """What `poolformer-kernels train` noted in a .safetensors file, as a state dict's metadata has it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        notes = json.loads((file.metadata() or {}).get(FILE_NOTES, "{}"))
    return notes if isinstance(notes, dict) else {}
