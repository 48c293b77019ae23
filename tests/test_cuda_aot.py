"""The CUDA sources compile for every shipped architecture, within limits. No GPU is needed; nvcc is."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peers import require
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
REGISTERS = {"norm_stats": 96}  # 256 threads: at least two blocks an SM
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def test_there_are_sources():
    assert [path.stem for path in SOURCES] == list(REGISTERS)


@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_resources(source, arch, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    command = [
        NVCC,
        "-cubin",
        "-std=c++20",
        "-O3",
        f"-arch=sm_{arch}",
        "-Xptxas=-v",
        str(source),
        "-o",
        str(cubin),
    ]
    command += [f"-I{path}" for path in include_paths()] + ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(kernels) == len(registers) == len(spills) == 6  # three dtypes, aligned and not
    assert set(spills) == {("0", "0")}
    assert max(registers) <= REGISTERS[source.stem]
    sass = _sass(cubin)
    for kernel, text in sass.items():
        vector = "Lb1E" in kernel
        assert ("LDG.E.128" in text) == vector, kernel
    assert sum("Lb1E" in kernel for kernel in sass) == 3


def _sass(cubin):
    cuobjdump = Path(NVCC).resolve().parent / "cuobjdump"
    tool = str(cuobjdump) if cuobjdump.exists() else _triton_cuobjdump()
    text = subprocess.run(
        [tool, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"Function : (\w+)", text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _triton_cuobjdump():
    triton = require("triton")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def test_fake_has_the_kernels_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from poolformer_kernels.ops.norm_stats import CHUNK

    text = (ROOT / "csrc" / "cuda" / "norm_stats.cu").read_text()
    threads, each = (int(re.search(rf"{name} = (\d+);", text)[1]) for name in ("kThreads", "kPerThread"))
    assert threads * each == CHUNK
    with FakeTensorMode():
        stats = torch.ops.poolformer_kernels.norm_stats_cuda(torch.empty(3, 64, 57, 57, dtype=torch.half))
    assert stats.shape == (3, -(-64 * 57 * 57 // CHUNK), 3)
    assert stats.dtype == torch.float32
