"""What this installation can run, and why not the rest: `poolformer-kernels info`."""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..backends import cpp, cuda
from ..models import list_models, model_config
from ..ops.dispatch import BACKENDS, backend_reasons, explain_selection
from .errors import CommandError
from .kernels import LEGEND, kernels, table
from .options import short_names

__all__ = ["collect", "cpu_name", "device_name", "installation", "version_line"]

PACKAGE = "poolformer_kernels"
_PACKAGES = ("triton", "timm", "torchvision", "transformers")  # that it works with, by their versions


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's own name."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The name of a device that torch calls ``"cpu"`` or ``"cuda"``."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, torch threads: {torch.get_num_threads()}"


def version_line() -> str:
    """What `poolformer-kernels --version` prints: the versions, and what the extension was built with."""
    build = cpp.build_info()
    extension = "no extension"
    if build:
        archs = ", ".join(build["cuda_archs"])
        cuda = f"CUDA {build['cuda_built_with']} for {archs}" if archs else "no CUDA kernels"
        extension = f"extension: C++ for {build['isa_chosen']}, {cuda}"
    return f"poolformer-kernels {__version__}, torch {torch.__version__}, {extension}"


def installation() -> dict[str, str]:
    """How the package was installed, and where it and its Python are."""
    place = Path(__file__).resolve().parent.parent
    facts = {"package": str(place), "python": sys.executable}
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return {"how": "not installed: a source tree on the path", **facts}
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    source = origin.get("url", "").removeprefix("file://")
    if origin.get("dir_info", {}).get("editable"):
        how = f"editable, from {source}" if place.parent == Path(source).resolve() else None
    else:
        how = f"a wheel made from {source}" if source else "a wheel"
        how = how if Path(distribution.locate_file(PACKAGE)).resolve() == place else None
    return {"how": how or "a source tree on the path, before the installed package", **facts}


def collect() -> dict[str, dict[str, str]]:
    """Versions, installation, devices, backends, what ``auto`` picks and the extension: text, by section."""
    devices = {"cpu": f"{device_name('cpu')}, torch uses {torch.backends.cpu.get_cpu_capability()}"}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
    if not torch.cuda.is_available():
        devices["cuda"] = "none" if torch.version.cuda else "this torch is built without CUDA"
    build = {key: _text(value) for key, value in cpp.build_info().items()}
    archs = cpp.build_info().get("cuda_archs", [])
    reasons = backend_reasons()
    return {
        "versions": {
            "poolformer-kernels": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            **{package: _version(package) for package in ("numpy", *_PACKAGES)},
        },
        "installation": installation(),
        "devices": devices,
        "backends": {name: reasons.get(name, "available") for name in BACKENDS},
        "selection": {
            f"{device}, {str(dtype).removeprefix('torch.')}": " — ".join(explain_selection(device, dtype))
            for device in ("cpu", *_cuda_devices())
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("POOLFORMER_KERNELS_")},
        "extension": build or {"poolformer_kernels._C": reasons.get("cpp", "no build information")},
        "CUDA kernels by compute capability": {
            ".".join(map(str, capability)): _code(archs, capability) for capability in _CAPABILITIES if archs
        },
    }


def _cuda_devices() -> list[str]:
    count = torch.cuda.device_count()
    return ["cuda"] if count == 1 else [f"cuda:{i}" for i in range(count)]


_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1))


def _code(archs: list[str], capability: tuple[int, int]) -> str:
    code = cuda.code_for(archs, capability)
    if code is None:
        return "none of the extension's: see TORCH_CUDA_ARCH_LIST"
    return code if code.startswith("sm_") else f"{code}, compiled by the driver before the first launch"


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value) or "none"


def run(args: argparse.Namespace) -> int:
    """The command: aligned text, or JSON of the same sections; or the kernels, or the models, alone."""
    if args.models:
        return _run_models(args)
    if args.kernels:
        return _run_kernels(args)
    sections = collect()
    if args.json:
        json.dump(sections, sys.stdout, indent=1, ensure_ascii=False)
        print()
        return 0
    width = max(len(key) for rows in sections.values() for key in rows)
    for title, rows in sections.items():
        print(title if rows else f"{title}: none")
        for key, value in rows.items():
            print(f"  {key:{width}s}  {value}")
    return 0


def _run_models(args: argparse.Namespace) -> int:
    short = {name: text for text, name in short_names().items()}
    rows = [
        {"name": name, "short": short.get(name, ""), "params": model_config(name).params}
        for name in list_models()
    ]
    if args.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return 0
    for row in rows:
        params = "" if row["params"] is None else f"{row['params'] / 1e6:5.1f} M parameters"
        print(f"{row['name']:26}{row['short']:15}{params}".rstrip())
    return 0


def _run_kernels(args: argparse.Namespace) -> int:
    try:
        found = kernels()
    except RuntimeError as error:
        raise CommandError(f"--kernels: {error}") from None
    if args.json:
        json.dump([asdict(kernel) | {"warps": kernel.warps} for kernel in found], sys.stdout, indent=1)
        print()
    elif found:
        device = f"on {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "as ptxas built them"
        print(f"The CUDA kernels {device}. {LEGEND}\n", *table(found), sep="\n")
    else:
        print(f"no CUDA kernels: {cuda.UNAVAILABLE}")
    return 0
