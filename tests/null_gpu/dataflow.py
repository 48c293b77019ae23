"""Who reads what of whom: launches with their addresses replaced by where the data came from.

Two runs compute the same if their launches and these sources are the same, wherever the memory was.
"""

import sys
from collections.abc import Iterable

import torch

from poolformer_kernels.backends.triton.launch import Kernel

from .null_gpu import Launch

# Of Triton's kernels, the arguments that point to what is written; a part of it may be read before, as by the
# kernel that adds a bias.
WRITTEN = {
    "bias_stats": {"x_ptr", "stats_ptr"},
    "pool_head": {"y_ptr"},
    "sample_stats": {"stats_ptr"},
    "merge_stats": {"merged_ptr"},
    "pool_mixer_fwd": {"y_ptr", "mean_rstd_ptr", "y_stats_ptr"},
    "mlp_fwd": {"mean_rstd_ptr", "y_ptr", "y_stats_ptr", "hidden_ptr"},
    "mlp_prepare": {"mean_rstd_ptr", "folded_ptr", "u_ptr", "v_ptr"},
    "mlp_fc1": {"p_ptr", "hidden_ptr"},
    "mlp_fc2": {"y_ptr", "y_stats_ptr"},
}
_IN_PLACE = {("bias_stats", "x_ptr")}
# Of the libraries' calls, as tests/null_gpu/csrc/libraries notes them
_LIBRARIES = {"cudnnBackendExecute": ("x", "y", "w"), "cublasLtMatmul": ("w", "x", "y")}


def _kernels() -> dict[str, Kernel]:
    modules = [
        m for name, m in sys.modules.items() if name.startswith("poolformer_kernels.") and m is not None
    ]
    return {k.__name__: k for m in modules for k in vars(m).values() if isinstance(k, Kernel)}


def _argument_names(launch: Launch, kernel: Kernel) -> tuple[list[str], list[str]]:
    """(names, types) of a launch's arguments: those that are no constants, by what Triton compiled."""
    signatures = set()
    for cache in kernel.device_caches.values():
        for compiled in cache[0].values():
            given = tuple((n, t) for n, t in compiled.src.signature.items() if t != "constexpr")
            if len(given) + 2 == len(launch.arguments):  # Triton adds two addresses of scratch memory
                signatures.add(given)
    (only,) = {tuple(n for n, _ in given) for given in signatures}  # otherwise the arguments have no names
    return [*only], [t for _, t in next(iter(signatures))]


def dataflow(launches: Iterable[Launch], tensors: dict[str, torch.Tensor]) -> list[tuple]:
    """Each launch: its kernel, grid and registers, and of each argument its value or its source.

    A source is one of ``tensors`` and an offset, or (which launch wrote it, its argument's name). Arguments
    of C++ kernels cannot be told apart, so that what is not a tensor's after one may be its.
    """
    kernels, writers, flow = _kernels(), {}, []
    ranges = [(name, t.data_ptr(), t.untyped_storage().nbytes()) for name, t in tensors.items()]
    cpp = False  # whether a C++ kernel has been launched

    def source(address: int, default: str):
        if address in writers:
            return writers[address]
        inside = ((name, address - start) for name, start, size in ranges if 0 <= address - start < size)
        return next(inside, default)

    for number, launch in enumerate(launches):
        arguments = []
        if launch.library:
            names, types = _LIBRARIES[launch.name], ["*"] * len(launch.arguments)
            written = {"y"}
        elif not launch.mangled.startswith("_Z"):
            names, types = _argument_names(launch, kernels[launch.name])
            written = WRITTEN[launch.name]
        else:
            names, types, written = [], [], set()
            writers, cpp = {}, True
        new = {}
        for name, kind, value in zip(names, types, launch.arguments, strict=False):
            if not kind.startswith("*"):
                arguments.append((name, value & 0xFFFFFFFF))
                continue
            if name in written:
                new[value] = (number, name)
            if name not in written or (launch.name, name) in _IN_PLACE:
                arguments.append((name, source(value, "a C++ kernel" if cpp else "nowhere")))
        writers |= new
        flow.append((launch.name, launch.grid, launch.block, launch.registers, tuple(arguments)))
    return flow
