"""Builds the extension `poolformer_kernels._C`; everything else about the package is in pyproject.toml.

No GPU is needed to build; nvcc is optional; without a C++ compiler there is no extension.
Environment: POOLFORMER_KERNELS_SKIP_EXT=1, POOLFORMER_KERNELS_SKIP_CUDA=1, TORCH_CUDA_ARCH_LIST ("8.0;9.0a"),
MAX_JOBS, CXX, CUDA_HOME, POOLFORMER_KERNELS_CXXFLAGS (appended: sanitizers, for one).
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup

ROOT, CUDART = Path(__file__).resolve().parent, "libcudart_static.a"
# 2.10: the oldest torch the stable ABI of this build runs under; a newer one needs no rebuild.
DEFINES = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
CXX_FLAGS += ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("1", "true", "yes", "on")


def say(message: str) -> None:
    print(f"poolformer_kernels: {message}", file=sys.stderr, flush=True)


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **options)


def compiler() -> str | None:
    """A compiler that can build the extension (C++20, Python's headers, AVX-512, AMX), or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    options = ["-std=c++20", f"-I{sysconfig.get_paths()['include']}", "-xc++", "-c", "-", "-o", os.devnull]
    source = "#include <Python.h>\n#include <concepts>\n"
    if platform.machine() == "x86_64":
        source += '__attribute__((target("avx512f,avx512bf16"))) void level() { asm("tilerelease"); }\n'
    for name in names:
        if shutil.which(shlex.split(name)[0]):
            probe = run([*shlex.split(name), *options], input=source)
            if probe.returncode == 0:
                return name
            say(f"{name} cannot build the extension: {probe.stderr.strip().partition(chr(10))[0]}")
    return None


def nvcc() -> str | None:
    """The CUDA compiler, or None if there is none or it is not wanted."""
    if flag("POOLFORMER_KERNELS_SKIP_CUDA"):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")


def cuda_toolkit(nvcc_path: str) -> tuple[str, Path]:
    """The version, and the folder of the static runtime: importing the extension then needs no CUDA."""
    version = re.search(r"release (\d+\.\d+)", run([nvcc_path, "--version"], check=True).stdout)[1]
    dry = run([nvcc_path, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]).stderr
    top = Path(re.search(r"TOP=(.+)", dry)[1].strip()).resolve()
    found = [path for lib in ("lib64", "lib", "targets/*/lib") for path in top.glob(f"{lib}/{CUDART}")]
    if found:
        return version, found[0].parent
    raise FileNotFoundError(f"{CUDART} is not under {top}; set POOLFORMER_KERNELS_SKIP_CUDA=1")


def arch_flags(archs: str) -> list[str]:
    """nvcc flags of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a;10.0+PTX"."""
    flags = []
    for arch in re.split(r"[;\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {arch!r}; allowed are 8.0, 9.0a, 10.0+PTX and such")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def extension() -> tuple[list, dict]:
    """(ext_modules, cmdclass), empty where the extension cannot be built."""
    cxx = None if flag("POOLFORMER_KERNELS_SKIP_EXT") else compiler()
    if cxx is None:
        say("installing without the C++ extension: no compiler, or POOLFORMER_KERNELS_SKIP_EXT is set")
        return [], {}
    os.environ["CXX"] = cxx
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError:  # building an sdist in an isolated environment needs no extension
        say("torch is not importable: installing without the C++ extension (use --no-build-isolation)")
        return [], {}
    cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    cuda_compiler = nvcc() if cuda_sources else None
    cuda, cuda_libraries = cuda_toolkit(cuda_compiler) if cuda_compiler else ("", None)
    cuda_link_args = [f"-L{cuda_libraries}", "-lcudart_static", "-lrt", "-ldl"] if cuda_compiler else []
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0a;10.0+PTX"
    include = include_paths()  # torch brings pybind11's headers
    defines = [
        *DEFINES,
        ("PK_TORCH_VERSION", f'"{torch.__version__}"'),
        ("PK_CUDA_VERSION", f'"{cuda}"'),
        ("PK_CUDA_ARCHS", f'"{archs.replace(";", " ")}"' if cuda_compiler else '""'),
    ]
    user_flags = shlex.split(os.environ.get("POOLFORMER_KERNELS_CXXFLAGS", ""))

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            if cuda_compiler:
                jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
                with ThreadPoolExecutor(jobs) as pool:
                    self.extensions[0].extra_objects += pool.map(self.compile_cuda, cuda_sources)
            super().build_extensions()

        def compile_cuda(self, source: Path) -> str:
            target = Path(self.build_temp) / f"{source.stem}.cuda.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [cuda_compiler, "-c", str(source), "-o", str(target), "-std=c++20", "-O3"]
            command += ["-ccbin", shlex.split(cxx)[-1], "-Xcompiler=-fPIC,-fvisibility=hidden"]
            command += arch_flags(archs)
            command += [f"-I{path}" for path in include] + [f"-D{name}={value}" for name, value in DEFINES]
            subprocess.run(command, check=True)
            return str(target)

    module = Extension(
        "poolformer_kernels._C",
        sources=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))],
        depends=[str(path) for path in (ROOT / "csrc").rglob("*.*")],
        include_dirs=include,
        define_macros=defines,
        library_dirs=library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args=[*CXX_FLAGS, f"-ffile-prefix-map={ROOT}=.", *user_flags],
        extra_link_args=user_flags + cuda_link_args,
    )
    return [module], {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


modules, commands = extension()
packages = [*find_namespace_packages(include=["poolformer_kernels*"]), "poolformer_kernels.benchmarks"]
setup(ext_modules=modules, cmdclass=commands, packages=packages)
