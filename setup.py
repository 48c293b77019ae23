"""Builds the extension `poolformer_kernels._C`; everything else about the package is in pyproject.toml.

No GPU is needed to build; nvcc is optional; without a C++ compiler there is no extension. It reads MAX_JOBS,
POOLFORMER_KERNELS_{SKIP_EXT=1, SKIP_CUDA=1, CXXFLAGS, CUDART=shared}, TORCH_CUDA_ARCH_LIST="8.0;9.0a", CXX,
CUDA_HOME, and POOLFORMER_KERNELS_LOCAL_VERSION=cu13 for a wheel of version X.Y.Z+cu13. An editable build
keeps its objects in build/objects and compiles what has changed.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
ARCHS = "8.0;9.0a;10.0+PTX;12.0"  # 8.x, 9.0, 10.x and 12.x run such an image; others from 10.0 on, the PTX
DEFINES = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # 2.10 and, without a rebuild, newer ones
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
CXX_FLAGS += ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
PTXAS_LINE = re.compile(r"^(?:ptxas info|    \d+ bytes stack frame).*\n", re.MULTILINE)


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
    source = "#include <Python.h>\n#include <concepts>\n#if defined(__x86_64__)\n"
    source += '__attribute__((target("avx512f,avx512bf16"))) void level() { asm("tilerelease"); }\n#endif\n'
    for name in names:
        if shutil.which(shlex.split(name)[0]):
            probe = run([*shlex.split(name), *options], input=source)
            if probe.returncode == 0:
                return name
            say(f"{name} cannot build the extension: {probe.stderr.strip().partition(chr(10))[0]}")
    return None


def nvcc() -> str | None:
    """The CUDA compiler, or None if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")


def cuda_toolkit(nvcc_path: str) -> tuple[str, list[str]]:
    """The version, and how to link CUDA's runtime and torch's stream function, which libtorch.so brings.

    The static runtime lets the extension be imported without CUDA. Torch's function is a weak name, for torch
    without CUDA; for that alone the linker would drop libtorch.so, and the name would always be null.
    """
    runtime = os.environ.get("POOLFORMER_KERNELS_CUDART") or "static"
    if runtime not in ("static", "shared"):
        raise ValueError(f"POOLFORMER_KERNELS_CUDART is {runtime!r}; allowed: static, shared")
    library = "libcudart_static.a" if runtime == "static" else "libcudart.so"
    version = re.search(r"release (\d+\.\d+)", run([nvcc_path, "--version"], check=True).stdout)[1]
    dry = run([nvcc_path, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]).stderr
    top = Path(re.search(r"TOP=(.+)", dry)[1].strip()).resolve()
    found = [path for lib in ("lib64", "lib", "targets/*/lib") for path in top.glob(f"{lib}/{library}")]
    if not found:
        raise FileNotFoundError(f"{library} is not under {top}; set POOLFORMER_KERNELS_SKIP_CUDA=1")
    torch = ["-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"]
    return version, [*torch, str(found[0]), "-lrt", "-ldl"]


def arch_flags(archs: str) -> list[str]:
    """nvcc flags of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a;10.0+PTX"."""
    flags = ["-DPK_HAS_SM90A=1"] if "9.0a" in archs else []  # cuda/mlp/forward_sm90.cu asks
    for arch in re.split(r"[;\s]+", archs.strip()):
        if not (match := re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {arch!r}; allowed are 8.0, 9.0a, 10.0+PTX and such")
        number, codes = match[1] + match[2], ("sm", "compute") if match[3] else ("sm",)
        flags += [f"-gencode=arch=compute_{number},code={code}_{number}" for code in codes]
    return flags


def csrc(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").glob(pattern))


def cuda_digest() -> str:
    """Of what the kernels are made from: by it the tests know a build of these very sources."""
    files = ["setup.py", *csrc("common/**/*.*"), *csrc("cuda/**/*.*")]
    return hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in files)).hexdigest()[:16]


def without(reason: str) -> dict:
    """What `extension` returns where there is nothing to build, with one line that says why."""
    say(f"installing without the C++ extension: {reason}")
    return {}


def extension() -> dict:
    """ext_modules and cmdclass; empty where the extension cannot be built."""
    if flag("POOLFORMER_KERNELS_SKIP_EXT"):
        return without("POOLFORMER_KERNELS_SKIP_EXT is set")
    if (cxx := compiler()) is None:
        return without("no C++ compiler can build it")
    os.environ["CXX"] = cxx
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError:  # building an sdist needs no extension
        return without("torch cannot be imported; install torch, then this with --no-build-isolation")
    cuda_compiler = None if flag("POOLFORMER_KERNELS_SKIP_CUDA") else nvcc()
    cuda, cuda_link_args = cuda_toolkit(cuda_compiler) if cuda_compiler else ("", [])
    archs = (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHS) if cuda_compiler else ""
    facts = {"TORCH_VERSION": torch.__version__, "CUDA_VERSION": cuda, "CUDA_ARCHS": archs.replace(";", " ")}
    user_flags = shlex.split(os.environ.get("POOLFORMER_KERNELS_CXXFLAGS", ""))
    # torch's headers put their own paths into error messages; a wheel says nothing of where it was built
    paths = [f"-ffile-prefix-map={ROOT}=.", f"-ffile-prefix-map={Path(torch.__file__).parent}=torch"]

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.inplace or self.editable_mode:  # setuptools would use a folder that it then deletes
                self.build_temp = str(ROOT / "build" / "objects")
            self.force |= not self.use_ninja  # ninja compares commands, setuptools only times

        def build_extensions(self) -> None:
            if cuda_compiler:
                digest, sources = cuda_digest(), csrc("cuda/**/*.cu")
                with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                    made = pool.map(lambda source: self.compile_cuda(source, digest), sources)
                    objects, reports = zip(*made, strict=True)
                report = Path(self.build_temp, "ptxas_report.inc").resolve()  # bindings.cpp includes it
                text = 'R"ptxas(' + "\n".join([digest, *reports]) + ')ptxas"\n'
                if not report.exists() or report.read_text() != text:
                    report.write_text(text)
                module.define_macros.append(("PK_PTXAS_REPORT", f'"{report}"'))
                module.depends, module.extra_objects = [*module.depends, str(report)], list(objects)
            super().build_extensions()

        def compile_cuda(self, source: Path, digest: str) -> tuple[str, str]:
            """The object and what ptxas said of it, as kept if this command made them of these sources."""
            target = Path(self.build_temp, source).with_suffix(".cuda.o").resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [cuda_compiler, "-c", str(source), "-o", str(target), *NVCC_FLAGS]
            command += ["-ccbin", shlex.split(cxx)[-1], *(f"-Xcompiler={path}" for path in paths)]
            command += [f"-I{folder}" for folder in include_paths()]
            command += arch_flags(archs) + [f"-D{name}={value}" for name, value in DEFINES]
            flags = [os.environ.get(f"NVCC_{place}_FLAGS", "") for place in ("PREPEND", "APPEND")]
            key = " ".join([digest, torch.__version__, cuda, *flags, shlex.join(command)]) + "\n"
            report = target.with_suffix(".ptxas")
            if not (target.exists() and report.exists() and report.read_text().startswith(key)):
                report.unlink(missing_ok=True)
                done = run(command, cwd=ROOT)
                sys.stderr.write(PTXAS_LINE.sub("", done.stderr))
                done.check_returncode()
                lines = [line for line in PTXAS_LINE.findall(done.stderr) if "Compile time" not in line]
                report.write_text(key + "".join(lines))
            return str(target), report.read_text().removeprefix(key)

    module = Extension(
        "poolformer_kernels._C",
        sources=[str(path) for path in csrc("**/*.cpp")],
        depends=[str(path) for path in csrc("**/*.*")],
        include_dirs=include_paths(),  # torch brings pybind11's headers
        define_macros=DEFINES + [(f"PK_{name}", f'"{value}"') for name, value in facts.items()],
        library_dirs=library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args=[*CXX_FLAGS, *paths, *user_flags],
        extra_link_args=user_flags + cuda_link_args,
    )
    build = Build.with_options(use_ninja=shutil.which("ninja") is not None)
    return {"ext_modules": [module], "cmdclass": {"build_ext": build}}


if __name__ == "__main__":  # a test reads the flags
    packages = [*find_namespace_packages(include=["poolformer_kernels*"]), "poolformer_kernels.benchmarks"]
    local = os.environ.get("POOLFORMER_KERNELS_LOCAL_VERSION")

    class EggInfo(egg_info):
        def finalize_options(self) -> None:
            if local:  # given as an option it would lose against the setup.cfg that an sdist holds
                self.tag_build = f"+{local}"
            super().finalize_options()

    built = extension()
    commands = built.pop("cmdclass", {}) | {"egg_info": EggInfo}
    setup(packages=packages, cmdclass=commands, **built)
