"""Kernels to launch by hand, and what a refused call leaves."""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from triton.backends import nvidia

from .null_gpu import take_complaints

CUDA = ctypes.CDLL("libcuda.so.1")
RUNTIME = ctypes.CDLL("libcudart.so.13")
PROGRAMS = Path(nvidia.__file__).parent / "bin"  # Triton's ptxas and cuobjdump


def ptx(arch: str) -> str:
    """Kernels of one pointer: without anything, with launch bounds, in clusters, with many registers."""
    clusters = ".explicitcluster .reqnctapercluster 2, 1, 1" if arch == "sm_90" else ""
    loads = [f"ld.volatile.global.u32 %r{i}, [%p + {4 * i}];" for i in range(200)]
    stores = [f"st.volatile.global.u32 [%p + {4 * i}], %r{i};" for i in range(200)]
    return f"""
.version 8.0
.target {arch}
.address_size 64
.visible .entry bare(.param .u64 pointer) {{ ret; }}
.visible .entry bounded(.param .u64 pointer) .maxntid 64, 1, 1 {{ ret; }}
.visible .entry clustered(.param .u64 pointer) {clusters} {{ ret; }}
.visible .entry wide(.param .u64 pointer) {{
  .reg .b32 %r<200>;
  .reg .b64 %p;
  ld.param.u64 %p, [pointer];
  {" ".join(loads + stores)}
  ret;
}}
"""


def cubin(folder: Path, arch: str = "sm_90") -> bytes:
    """These kernels, by Triton's ptxas."""
    source, target = folder / "kernels.ptx", folder / "kernels.cubin"
    source.write_text(ptx(arch))
    subprocess.run([str(PROGRAMS / "ptxas"), f"-arch={arch}", str(source), "-o", str(target)], check=True)
    return target.read_bytes()


def launch(kernel, pointer: int, grid=(1, 1, 1), block=(32, 1, 1), shared=0, stream=0) -> int:
    """cuLaunchKernel's error."""
    argument = ctypes.c_uint64(pointer)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    return CUDA.cuLaunchKernel(kernel, *grid, *block, shared, ctypes.c_void_p(stream), arguments, None)


@contextmanager
def complaint(text: str) -> Iterator[None]:
    """The block leaves one complaint, with this in it."""
    assert not take_complaints()
    yield
    found = take_complaints()
    assert len(found) == 1, found
    assert text in found[0]
