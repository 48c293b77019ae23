"""Links the extension once more, with the shared CUDA runtime: the static one needs NVIDIA's driver."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .build import BUILT

ROOT = BUILT.parents[1]


def extension_file() -> Path | None:
    """The package's own extension, if it was built with CUDA."""
    from poolformer_kernels.backends import cpp

    if not cpp.build_info().get("cuda_archs"):
        return None
    from poolformer_kernels import _C

    return Path(_C.__file__)


def link_extension() -> Path:
    """The folder with a ``poolformer_kernels/_C*.so`` for the null GPU, of the objects of the package's."""
    from poolformer_kernels.backends import cpp

    file = extension_file()
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    made_from = [file, ROOT / "setup.py", *sources]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in made_from)).hexdigest()[:16]
    target = BUILT / f"extension-{digest}"
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "extension.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        work = BUILT / "extension-building"
        shutil.rmtree(work, ignore_errors=True)
        archs = ";".join(cpp.build_info()["cuda_archs"])
        env = os.environ | {"POOLFORMER_KERNELS_CUDART": "shared", "TORCH_CUDA_ARCH_LIST": archs}
        # the ninja that made the objects: another one would not read its log, and compile them again
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(work)]
        command += ["--build-temp", str(ROOT / "build" / "objects")]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        work.rename(target)
    return target
