"""Builds the extension `poolformer_kernels._C`; everything else about the package is in pyproject.toml.

No GPU is needed to build, nvcc is optional, and without a C++ compiler the package installs without the extension.

Environment: POOLFORMER_KERNELS_SKIP_EXT=1, POOLFORMER_KERNELS_SKIP_CUDA=1, TORCH_CUDA_ARCH_LIST ("8.0;9.0a"), MAX_JOBS,
CXX, CUDA_HOME, POOLFORMER_KERNELS_CXXFLAGS (appended: sanitizers, for one).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;9.0a;10.0+PTX"
# 2.10: the oldest torch the stable ABI of this build runs under; a newer one needs no rebuild.
DEFINES = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
CXX_FLAGS = "-std=c++20 -O3 -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wno-psabi -Wno-maybe-uninitialized"


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("1", "true", "yes", "on")


def say(message: str) -> None:
    print(f"poolformer_kernels: {message}", file=sys.stderr, flush=True)


def compiler() -> str | None:
    """The C++ compiler, or None if there is none."""
    names = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def nvcc() -> str | None:
    if flag("POOLFORMER_KERNELS_SKIP_CUDA"):
        return None
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return next((found for found in map(shutil.which, [*candidates[:2], "nvcc", *candidates[2:]]) if found), None)


def cuda_version(compiler_path: str) -> str:
    text = subprocess.run([compiler_path, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def arch_flags(archs: str) -> list[str]:
    """nvcc flags of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a;10.0+PTX"."""
    flags = []
    for arch in re.split(r"[;\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {arch!r}; allowed are entries such as 8.0, 9.0a, 10.0+PTX")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def extension() -> tuple[list, dict]:
    """(ext_modules, cmdclass); empty where the extension cannot be built."""
    if flag("POOLFORMER_KERNELS_SKIP_EXT"):
        say("POOLFORMER_KERNELS_SKIP_EXT is set: installing without the C++ extension")
        return [], {}
    if compiler() is None:
        say("no C++ compiler found (CXX, g++, c++, clang++): installing without the C++ extension")
        return [], {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError:  # building an sdist in an isolated environment needs no extension
        say("torch is not importable: installing without the C++ extension (use --no-build-isolation)")
        return [], {}
    import pybind11

    cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    cuda_compiler = nvcc() if cuda_sources else None
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    include = [*include_paths(), pybind11.get_include()]
    defines = [
        *DEFINES,
        ("PK_TORCH_VERSION", f'"{torch.__version__}"'),
        ("PK_CUDA_VERSION", f'"{cuda_version(cuda_compiler)}"' if cuda_compiler else '""'),
        ("PK_CUDA_ARCHS", f'"{archs.replace(";", " ")}"' if cuda_compiler else '""'),
    ]

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
            command = [cuda_compiler, "-c", str(source), "-o", str(target), "-std=c++20", "-O3", *arch_flags(archs)]
            command += ["-ccbin", compiler(), "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
            command += [f"-I{path}" for path in include] + [f"-D{name}={value}" for name, value in DEFINES]
            say(" ".join(command))
            subprocess.run(command, check=True)
            return str(target)

    module = Extension(
        "poolformer_kernels._C",
        sources=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))],
        include_dirs=include,
        define_macros=defines,
        library_dirs=library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args=shlex.split(CXX_FLAGS) + shlex.split(os.environ.get("POOLFORMER_KERNELS_CXXFLAGS", "")),
        extra_link_args=shlex.split(os.environ.get("POOLFORMER_KERNELS_CXXFLAGS", "")),
    )
    if cuda_compiler:
        module.extra_link_args += [f"-L{Path(cuda_compiler).resolve().parents[1] / 'lib64'}", "-lcudart_static", "-lrt", "-ldl"]
    return [module], {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


modules, commands = extension()
setup(ext_modules=modules, cmdclass=commands)
