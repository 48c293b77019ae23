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
    "mlp_prepare": {"mean_rstd_ptr", "folded_ptr", "u_ptr", "v_ptr", "operand1_ptr", "operand2_ptr"},
    "mlp_fc1": {"p_ptr", "hidden_ptr"},
    "mlp_fc2": {"y_ptr", "y_stats_ptr"},
    "pool_mixer_bwd_reduce": {"partial_ptr"},
    "pool_mixer_bwd_sample": {"q_ptr", "k_ptr", "ddrop_ptr"},
    "pool_mixer_bwd_dx": {"dx_ptr", "dweight_ptr", "dscale_ptr", "dbias_ptr"},
    "mlp_bwd_prepare": {"operand_ptr", "w2t_ptr", "table_ptr", "n_ptr", "g_ptr", "sums_ptr"},
    "mlp_bwd_hidden": {"p_ptr", "dh_ptr", "token_sums_ptr", "db1_ptr"},
    "mlp_bwd_outer": {"partial_ptr"},
    "mlp_bwd_dn": {"dx_ptr", "sums_ptr"},
    "mlp_bwd_wgrad": {"token_sums_ptr", "dw1_ptr", "dw2_ptr", "db1_ptr"},
    "mlp_bwd_dx": {"dx_ptr", "norm_sums_ptr", "grad_sums_ptr"},
    "mlp_bwd_sample": {"k_ptr", "ddrop_ptr"},
    "mlp_bwd_columns": {"a_sums_ptr", "b_sums_ptr", "c_sums_ptr"},
    "mlp_bwd_finish": {
        "dw1_ptr", "db1_ptr", "dw2_ptr", "db2_ptr", "dgamma_ptr", "dbeta_ptr", "dscale_ptr",
    },
}  # fmt: skip
_IN_PLACE = {("bias_stats", "x_ptr")}
# Of the libraries' calls, as tests/null_gpu/csrc/libraries notes them
_LIBRARIES = {
    "cudnnBackendExecute": ("x", "y", "w"),
    "cublasLtMatmul": ("w", "x", "y"),
    "cublasGemmEx": ("a", "b", "y"),
    "cublasSgemm_v2": (),
}


def _kernels() -> dict[str, Kernel]:
    modules = [
        m for name, m in sys.modules.items() if name.startswith("poolformer_kernels.") and m is not None
    ]
    return {k.__name__: k for m in modules for k in vars(m).values() if isinstance(k, Kernel)}


def _argument_names(launch: Launch, kernel: Kernel) -> tuple[list[str], list[str]]:
    """(names, types) of a launch's arguments: those that are no constants, by what Triton compiled."""
    compiled = (c for cache in kernel.device_caches.values() for c in cache[0].values())
    (signature,) = (c.src.signature for c in compiled if c.function == launch.function)
    given = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    return [name for name, _ in given], [kind for _, kind in given]


def dataflow(
    launches: Iterable[Launch], tensors: dict[str, torch.Tensor], results: Iterable[torch.Tensor] = ()
) -> list[tuple]:
    """Each launch: kernel, grid and registers, and of each argument its value or its source; then results.

    A source is one of ``tensors`` and an offset, or (which launch wrote it, its argument's name). Arguments
    of C++ kernels cannot be told apart, so that what is not a tensor's after one may be its.
    """
    kernels, writers, flow = _kernels(), {}, []
    ranges = [(name, t.data_ptr(), t.untyped_storage().nbytes()) for name, t in tensors.items()]
    cpp = False  # whether a C++ kernel has been launched

    def source(address: int, default: str):
        if address == 0:
            return "no memory"  # of a tensor without elements
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
                arguments.append((name, value if kind == "i64" else value & 0xFFFFFFFF))
                continue
            if name in written:
                new[value] = (number, name)
            if name not in written or (launch.name, name) in _IN_PLACE:
                arguments.append((name, source(value, "a C++ kernel" if cpp else "nowhere")))
        writers |= new
        flow.append((launch.name, launch.grid, launch.block, launch.registers, tuple(arguments)))
    for t in results:
        place = source(t.data_ptr(), "nowhere") if t.numel() else "empty"
        flow.append(("result", t.shape, t.stride(), t.dtype, t.device, place))
    return flow
