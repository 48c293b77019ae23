"""What the ahead-of-time tests share: parameters, and what an architecture's machine code must contain."""

import math

import pytest

MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}  # mma.sync, wgmma, tcgen05


def check_products(used, launch, arch: int) -> None:
    """Halves and TF32 are multiplied by matrix instructions alone, IEEE float32 by multiply-adds alone.

    A thread's share of one step of a product is unrolled. The activations of a step take fewer multiply-adds.
    """
    constants, signature = dict(launch.constants), dict(launch.signature)
    operand = next(signature[name] for name in ("w1_ptr", "w2_ptr", "a_ptr") if name in signature)
    shape = {
        "mlp_fwd": ("BM", "BN", "C0"),
        "mlp_fc1": ("BM", "BN", "BK"),
        "mlp_fc2": ("BM", "N0", "BK"),
        "mlp_bwd_wgrad": ("TOKENS", "HIDDEN", "P0"),
        "mlp_bwd_dx": ("TOKENS", "HIDDEN", "P0"),
        "mlp_bwd_hidden": ("TOKENS", "HIDDEN", "DEPTH"),
        "mlp_bwd_outer": ("ROWS", "COLUMNS", "DEPTH"),
        "mlp_bwd_dn": ("TOKENS", "CHANNELS", "DEPTH"),
    }[launch.kernel]
    step = math.prod(constants[name] for name in shape) // (32 * dict(launch.options)["num_warps"])
    if operand != "*fp32":
        assert set(used.matrix) == {MATRIX[arch]}
    elif constants["PRECISION"] == "tf32":
        assert set(used.matrix) == {MATRIX[arch] + ".TF32"}
        assert used.ffma < step
    else:
        assert used.matrix == {}
        assert used.ffma >= step


def parameters(usual: list, rest: list, arch: int) -> list:
    """(launch, architecture) for each launch of both lists of cases; what only the rest launches is long."""
    from poolformer_kernels.backends.triton import aot, device

    short = aot.distinct(usual, device.DEVICES[arch])
    return [
        pytest.param(
            *(launch, arch), id=f"{launch.name}-{arch}", marks=[] if launch in short else [pytest.mark.long]
        )
        for launch in aot.distinct([*usual, *rest], device.DEVICES[arch])
    ]
