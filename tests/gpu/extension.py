"""The extension for this machine's GPU: built for its own architecture, and looked at.

    python tests/gpu/extension.py build [--dry]
    python tests/gpu/extension.py check [--out DIR] [--dry]
    python tests/gpu/extension.py show

``build`` leaves an extension alone that was made of these CUDA sources for this architecture. ``check`` fails
where a CUDA backend cannot run, and writes the device's name to DIR/device.txt.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

from part_runner import ROOT, parser_of


def own_architecture(capability: tuple[int, int]) -> str:
    """As TORCH_CUDA_ARCH_LIST has it: Hopper's own instructions need the a."""
    return "9.0a" if capability == (9, 0) else "{}.{}".format(*capability)


def is_current(arch: str) -> bool:
    """Whether the extension that is here was built for this architecture from these CUDA sources."""
    command = [sys.executable, "-W", "ignore", __file__, "show"]  # a process: a build replaces what is loaded
    found = subprocess.run(command, capture_output=True, text=True)
    digest, *archs = found.stdout.split() or [""]
    wanted = runpy.run_path(str(ROOT / "setup.py"))["cuda_digest"]()
    return found.returncode == 0 and digest == wanted and arch in archs


def show() -> int:
    """Print the digest of the CUDA sources and the architectures of the extension that is here."""
    from poolformer_kernels import _C

    print(_C.ptxas_report().partition("\n")[0], *_C.build_info()["cuda_archs"])
    return 0


def device_capability() -> tuple[int, int]:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device")
    return torch.cuda.get_device_capability()


def build(dry: bool) -> int:
    arch = own_architecture(device_capability())
    if is_current(arch):
        print(f"the extension that is here was built for {arch} from these sources")
        return 0
    if dry:
        print(f"dry run: no build for {arch}")
        return 0
    env = os.environ | {"TORCH_CUDA_ARCH_LIST": arch}
    for name in ("POOLFORMER_KERNELS_SKIP_CUDA", "POOLFORMER_KERNELS_SKIP_EXT"):
        env.pop(name, None)
    print(f"building for {arch}", flush=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    if code == 0 and not is_current(arch):
        print(f"the build went through, but the extension has no code for {arch}: is nvcc there?")
        return 1
    return code


def check(out: Path | None, dry: bool) -> int:
    capability = device_capability()
    import torch

    import poolformer_kernels as pk
    from poolformer_kernels.backends.cpp import build_info

    name, arch = torch.cuda.get_device_name(), own_architecture(capability)
    if out is not None:
        (out / "device.txt").write_text(f"{name}\n")
    print(f"{name}, {arch}; torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"package: {Path(pk.__file__).parent}")
    archs, reasons, problems = build_info().get("cuda_archs", []), pk.backend_reasons(), []
    for backend in ("triton", "cuda"):
        print(f"backend {backend}: {reasons.get(backend, 'available')}")
        if backend in reasons:
            problems.append(f"backend {backend} cannot run: {reasons[backend]}")
    if arch not in archs and not dry:
        problems.append(f"the extension was built for {', '.join(archs) or 'no GPU'}, not for {arch}")
    if "cuda" not in reasons:  # a missing symbol shows in the first launch, not in the import
        torch.ops.poolformer_kernels.norm_stats_cuda(torch.ones(1, 64, 4, 4, device="cuda"))
        torch.cuda.synchronize()
        print("a kernel of the extension was launched")
    print(*problems, sep="\n")
    return 1 if problems else 0


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=("build", "check", "show"))
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--dry", action="store_true", help="build nothing, take any architecture")
    args = parser.parse_args()
    if args.what == "show":
        return show()
    return build(args.dry) if args.what == "build" else check(args.out, args.dry)


if __name__ == "__main__":
    sys.exit(main())
