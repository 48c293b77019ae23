"""Builds csrc/cuda for the host: the kernels' own source, with the executor in place of the CUDA runtime."""

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wno-unknown-pragmas"]
ALIGNMENT = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]  # this processor would let it pass
DEFINES = ["-DPK_EXECUTOR", "-DPK_DISPATCH_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def build(
    target: Path,
    sources: list[Path] | None = None,
    jobs: int = 2,
    with_torch: bool = True,
    flags: Sequence[str] = (),
) -> Path:
    """Compiles the kernels (all of them by default) into the library ``target``, with more ``flags``."""
    headers = [f"-I{FOLDER / 'include'}", *(f"-I{path}" for path in include_paths())]

    def compiled(source: Path) -> str:
        out = target.parent / source.relative_to(ROOT).with_suffix(".o")
        out.parent.mkdir(parents=True, exist_ok=True)
        command = ["g++", *FLAGS, *ALIGNMENT, *DEFINES, *flags, "-include", "cuda_runtime.h", *headers]
        done = subprocess.run(
            [*command, "-x", "c++", "-c", str(source), "-o", str(out)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return str(out)

    with ThreadPoolExecutor(jobs) as pool:
        kernels = sources or sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
        objects = list(pool.map(compiled, [*kernels, *sorted(FOLDER.glob("*.cpp"))]))
    folders = [f"-L{path}" for path in library_paths()]
    libraries = [*folders, "-lc10", "-ltorch_cpu", "-ltorch"] if with_torch else []
    subprocess.run(["g++", "-shared", *ALIGNMENT, "-o", str(target), *objects, *libraries], check=True)
    return target
