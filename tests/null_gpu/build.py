"""Builds the null GPU, once for its sources, the compiler and torch: build/null_gpu/<digest>/.

Its libraries take the places of the CUDA driver's, the CUDA runtime's and of NVIDIA's for products and
convolutions; the headers are those of torch's own packages.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "csrc"
BUILT = FOLDER.parents[1] / "build" / "null_gpu"
CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0")
CUDA = "13"  # the major version whose runtime csrc/runtime is
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden"]
LIBRARIES = {  # in the order in which they are linked: each may call those before it
    "driver": "libcuda.so.1",
    "runtime": f"libcudart.so.{CUDA}",
    "libraries": "libnullmath.so",
}


def packages() -> Path:
    """The folder of installed packages that has torch."""
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0]).parent


def includes() -> list[Path]:
    """Folders of CUDA's and cuDNN's headers: pip's packages' own, else a toolkit's."""
    nvidia = packages() / "nvidia"
    found = [nvidia / f"cu{CUDA}" / "include", nvidia / "cudnn" / "include"]
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDNN_HOME"), "/usr/local/cuda"):
        found += [Path(home) / "include"] if home else []
    return [folder for folder in found if folder.is_dir()]


def unavailable() -> str | None:
    """Why there is no null GPU for this torch and this machine; None: there is one."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        return f"the null GPU is for Linux on x86_64, not {sys.platform} on {os.uname().machine}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    version = _cuda_version()
    if version is None:
        return "this torch has no CUDA"
    if version.split(".")[0] != CUDA:
        return (
            f"the null GPU's runtime is CUDA {CUDA}'s; this torch has CUDA {version}, which is not supported"
        )
    if shutil.which("g++") is None:
        return "g++ is not installed"
    for header in ("cuda.h", "cuda_runtime_api.h", "cublasLt.h", "cudnn.h"):
        if not any((folder / header).exists() for folder in includes()):
            return f"{header} is in none of {', '.join(map(str, includes()))}"
    return None


def _cuda_version() -> str | None:
    """What torch was built for, without the import of torch."""
    spec = importlib.util.spec_from_file_location("torch_version", packages() / "torch" / "version.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda


def build() -> Path:
    """The folder with the libraries. A second process waits for the first, and has nothing left to do."""
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build()


def _build() -> Path:
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{version} {importlib.metadata.version('torch')} {FLAGS}".encode())
    sources = sorted(path for path in SOURCES.rglob("*") if path.is_file())
    for path in sources:
        digest.update(path.relative_to(SOURCES).as_posix().encode() + path.read_bytes())
    target = BUILT / digest.hexdigest()[:16]
    if target.exists():
        return target
    work = Path(tempfile.mkdtemp(dir=BUILT, prefix="building-"))
    try:
        objects = [path for path in sources if path.suffix == ".cpp"]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda path: _compile(path, work), objects))
        for name, library in LIBRARIES.items():
            _link(work, name, library)
        for path in work.glob("*.o"):
            path.unlink()
        work.rename(target)  # whole or not at all
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _compile(source: Path, work: Path) -> None:
    # CUDA's headers as the system's: no warnings of theirs.
    headers = [f"-isystem{folder}" for folder in [*includes(), SOURCES / "include"]]
    out = work / f"{source.parent.name}-{source.stem}.o"
    _run(["g++", *FLAGS, *headers, "-c", str(source), "-o", str(out)])


def _link(work: Path, name: str, library: str) -> None:
    """The runtime's symbols have its version, as torch asks for them."""
    versions = work / "versions"
    versions.write_text(f"{library} {{ global: *; }};\n")
    version = [f"-Wl,--version-script={versions}"] if name == "runtime" else []
    before = [str(work / other) for other in list(LIBRARIES.values())[: list(LIBRARIES).index(name)]]
    objects = sorted(str(path) for path in work.glob(f"{name}-*.o"))
    out = ["-o", str(work / library), f"-Wl,-soname,{library}", "-Wl,-z,defs", "-Wl,-rpath,$ORIGIN"]
    _run(["g++", "-shared", *out, *version, *objects, *before, "-ldl", "-pthread"])


def environment(
    folder: Path,
    capability: str = "9.0",
    count: int = 1,
    memory_gib: int | None = None,
    extension: Path | None = None,
    data: bool = True,
) -> dict[str, str]:
    """Variables for a process with the null GPU: ``env=os.environ | environment(build())``.

    Args:
        capability: of `CAPABILITIES`; it also gives the device's other attributes.
        count: of devices.
        memory_gib: of a device, if not its model's.
        extension: a folder with a ``poolformer_kernels/_C*.so`` that takes the place of the package's own.
        data: whether copies and fills inside a device move bytes, which a GPU's host would not have to.

    Raises:
        ValueError: for a capability or a count that is none of the null GPU's.
    """
    if capability not in CAPABILITIES:
        raise ValueError(f"capability is {capability!r}; allowed are {', '.join(CAPABILITIES)}")
    if not 1 <= count <= 8:
        raise ValueError(f"count is {count}; allowed are 1 to 8")
    preloaded = [str(folder / name) for name in LIBRARIES.values()]
    variables = {
        "LD_PRELOAD": " ".join(preloaded),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "NULL_GPU": "1",
        "NULL_GPU_CAPABILITY": capability,
        "NULL_GPU_COUNT": str(count),
    }
    if not data:
        variables["NULL_GPU_DATA"] = "0"
    if memory_gib is not None:
        variables["NULL_GPU_MEMORY_GIB"] = str(memory_gib)
    if extension is not None:
        variables["NULL_GPU_EXTENSION"] = str(extension)
        paths = [str(FOLDER / "site"), os.environ.get("PYTHONPATH")]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return variables


if __name__ == "__main__":
    print(unavailable() or build())
