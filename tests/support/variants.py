"""Variants of the package for tests: a copy in a folder of its own, with other kernels.

A process finds the variant there first, see `environment`. The extension of a variant is linked from the
objects that the editable build keeps in build/objects. Only the sources that differ are compiled, in seconds.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build" / "objects"
PACKAGE = "poolformer_kernels"
# csrc/cpu/product/amx.h; without -O3 the emulated products take four times as long
TILES = {f"csrc/cpu/isa/{name}.cpp": ("-DPK_EMULATE_TILES",) for name in ("amx", "isa")}


class VariantError(Exception):
    """A variant cannot be built here, or its source does not compile."""


def copy_package(folder: Path) -> Path:
    """The Python package in ``folder``, with a link to the extension that is installed."""
    package = folder / PACKAGE
    shutil.copytree(ROOT / PACKAGE, package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    for library in (ROOT / PACKAGE).glob("_C*.so"):
        (package / library.name).symlink_to(library)
    return package


def copy_sources(folder: Path) -> Path:
    """The C++ and CUDA sources in ``folder``, to be edited."""
    return Path(shutil.copytree(ROOT / "csrc", folder / "csrc"))


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a process in which the variant in ``folder`` is the package.

    Such a process should have ``folder`` as its current directory: `python -m` looks there first.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ours = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return inherited | ours | more


def setup_script() -> ModuleType:
    """setup.py as a module, without a build."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def user_flags() -> list[str]:
    return shlex.split(os.environ.get("POOLFORMER_KERNELS_CXXFLAGS", ""))


def compiler() -> tuple[list[str], list[str]]:
    """The extension's compiler; its flags and those that the environment adds."""
    setup = setup_script()
    return shlex.split(setup.compiler() or "g++"), [*setup.CXX_FLAGS, *user_flags()]


def build_extension(
    folder: Path,
    changed: Mapping[str, Sequence[str]],
    *,
    sources: Path = ROOT,
    added: Sequence[Path] = (),
    flags: Sequence[str] = (),
    jobs: int = 2,
) -> Path:
    """Links an extension into the copy of the package in ``folder``.

    Args:
        folder: holds what `copy_package` made.
        changed: the sources that are compiled, as "csrc/cpu/isa/avx2.cpp", each with flags of its own. They
            take the place of the objects of the editable build.
        sources: the folder that these names belong to.
        added: more sources of the extension.
        flags: of all that is compiled, behind those of setup.py.
        jobs: how many compilers run at a time.

    Raises:
        VariantError: there is no editable build, or the compiler or the linker fails.
    """
    objects = {str(path.relative_to(OBJECTS)): path for path in sorted((OBJECTS / "csrc").rglob("*.o"))}
    missing = [name for name in changed if _object_of(name) not in objects]
    if not objects or missing:
        raise VariantError(f"{OBJECTS} has no objects of {', '.join(missing or ['csrc'])}: run `make setup`")
    setup, (cxx, own_flags) = setup_script(), compiler()
    headers = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    defines = [f"-D{name}={value}" for name, value in setup.DEFINES]
    common = [*cxx, "-fPIC", "-DNDEBUG", "-fwrapv", *own_flags, *defines, *headers, *flags]

    def compiled(source: Path, target: Path, own: Sequence[str]) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*common, *own, "-c", str(source), "-o", str(target)])
        return target

    work = [(sources / name, folder / "objects" / _object_of(name), own) for name, own in changed.items()]
    work += [(path, folder / "objects" / f"{path.stem}.o", ()) for path in added]
    with ThreadPoolExecutor(jobs) as pool:
        ours = list(pool.map(lambda each: compiled(*each), work))
    kept = [path for name, path in objects.items() if name not in map(_object_of, changed)]
    cuda = setup.cuda_toolkit(setup.nvcc())[1] if any(".cuda.o" in name for name in objects) else []
    target = folder / PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.unlink(missing_ok=True)  # a link to the installed one
    libraries = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
    run([*cxx, "-shared", *user_flags(), *map(str, [*kept, *ours]), *libraries, *cuda, "-o", str(target)])
    return target


def build_emulated_tiles(folder: Path, jobs: int = 2) -> Path:
    """A package whose level ``amx`` multiplies on emulated tiles, on any processor that has avx512_bf16.

    ``POOLFORMER_KERNELS_ISA=amx`` runs it where there is no AMX, too.
    """
    copy_package(folder)
    return build_extension(folder, TILES, jobs=jobs)


def _object_of(source: str) -> str:
    return str(Path(source).with_suffix(".o"))


def run(command: list[str], **options) -> str:
    """What the command prints; ``options`` are those of a process."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise VariantError(f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return done.stdout
