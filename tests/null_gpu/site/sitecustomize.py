"""Python imports this at its start where the folder is on PYTHONPATH: the package then has another extension.

NULL_GPU_EXTENSION is a folder with a ``poolformer_kernels/_C*.so`` (see `null_gpu.build.environment`).
"""

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path


class Extension(importlib.abc.MetaPathFinder):
    """Finds that file for the package's extension."""

    def __init__(self, folder: Path) -> None:
        files = sorted((folder / "poolformer_kernels").glob("_C*.so"))
        if len(files) != 1:
            sys.exit(f"NULL_GPU_EXTENSION={folder} has {len(files)} poolformer_kernels/_C*.so, needs one")
        self.file = files[0]

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "poolformer_kernels._C":
            return None
        return importlib.util.spec_from_file_location(name, self.file)


if "NULL_GPU_EXTENSION" in os.environ:
    sys.meta_path.insert(0, Extension(Path(os.environ["NULL_GPU_EXTENSION"])))
