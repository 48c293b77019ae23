"""What the ahead-of-time tests share: parameters, and what an architecture's machine code must contain."""

import math
import zlib

import pytest

from support.peers import require

aot = require("poolformer_kernels.backends.triton.aot")  # without triton the tests are skipped
from poolformer_kernels.backends.triton.device import DEVICES  # noqa: E402

# mma.sync, wgmma, tcgen05
MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
SHAPES = {  # of one step of a kernel's product
    "mlp_fwd": ("BM", "BN", "C0"),
    "mlp_fc1": ("BM", "BN", "BK"),
    "mlp_fc2": ("BM", "N0", "BK"),
    "mlp_bwd_wgrad": ("TOKENS", "HIDDEN", "P0"),
    "mlp_bwd_dx": ("TOKENS", "HIDDEN", "P0"),
    "mlp_bwd_hidden": ("TOKENS", "HIDDEN", "DEPTH"),
    "mlp_bwd_outer": ("ROWS", "COLUMNS", "DEPTH"),
    "mlp_bwd_dn": ("TOKENS", "CHANNELS", "DEPTH"),
}


def threads_of(launch) -> int:
    return 32 * dict(launch.options).get("num_warps", 4)


def compiled(launch, arch: int, spills: int = 0):
    """What the machine code uses: at most so many spills, and no more shared memory than a block may have."""
    used = aot.compile_launch(launch, arch)
    assert used.spills <= spills
    assert used.shared <= DEVICES[arch].shared
    return used


def check_products(used, launch, arch: int) -> None:
    """Halves and TF32 are multiplied by matrix instructions alone, IEEE float32 by multiply-adds alone.

    A thread's share of one step of a product is unrolled. The activations of a step take fewer multiply-adds.
    """
    constants, signature = dict(launch.constants), dict(launch.signature)
    operand = next(signature[name] for name in ("w1_ptr", "w2_ptr", "a_ptr") if name in signature)
    step = math.prod(constants[name] for name in SHAPES[launch.kernel]) // threads_of(launch)
    if operand != "*fp32":
        assert set(used.matrix) == {MATRIX[arch]}
    elif constants["PRECISION"] == "tf32":
        assert set(used.matrix) == {MATRIX[arch] + ".TF32"}
        assert used.ffma < step
    else:
        assert used.matrix == {}
        assert used.ffma >= step


# Arguments that are as large as the images, the hidden activations or the weights
LARGE = {
    f"{name}_ptr"
    for name in (
        *("x", "y", "grad", "dx", "tokens", "n", "g", "p", "dh", "a", "b"),
        *("w1", "w2", "w2t", "operand", "folded", "dw1", "dw2"),
    )
}
# Their elements that are multiplied lie in different rows. Halves are transposed on the way to the matrix
# instruction, but TF32 only by copying each element to its place; the last two are used once more, as they
# are, where fc1's output was not saved.
TRANSPOSED = {
    *(("mlp_bwd_outer", "a_ptr"), ("mlp_bwd_outer", "b_ptr"), ("mlp_bwd_dn", "w1_ptr")),
    *(("mlp_bwd_wgrad", "n_ptr"), ("mlp_bwd_dx", "w1_ptr")),
}


# Of the bytes that products read from shared memory, the share in pieces of 16 bytes, at least. Not where
# wgmma and tcgen05 read the operands themselves: what is left there are results that change threads.
SHARED_SHARE = 0.6
# It adds few partials of each element: a warp reads 64 or 128 bytes of a row, one element a thread.
ELEMENTWISE = {"mlp_bwd_finish"}


def share(widths: dict[int, int], least: int = 16) -> float:
    """The share of the bytes that accesses of so many bytes or more move; 1 where there are none."""
    total = sum(size * n for size, n in widths.items())
    return sum(size * n for size, n in widths.items() if size >= least) / total if total else 1.0


# Of a large argument's bytes, the share that moves 16 at a time, at least: the rest is a single element that
# shifts sums. Where channels come in two parts, the smaller may have only 8 bytes for each thread.
LARGE_SHARE, PART_SHARE = 0.9, 0.6


def check_accesses(used, launch, arch: int) -> None:
    """Memory is accessed 16 bytes at a time; an argument that is not so aligned by single elements."""
    signature, constants = dict(launch.signature), dict(launch.constants)
    names = list(signature)
    misaligned = {name for name in used.accesses if names.index(name) not in launch.divisible}
    for name in misaligned:
        itemsize = 4 if signature[name] == "*fp32" else 2
        assert max(used.accesses[name]) <= itemsize, f"{name} is not aligned: {used.accesses[name]}"
    precision = constants.get("PRECISION")
    if precision and (DEVICES[arch].register_operands or not used.matrix):
        loads = dict(used.shared_loads)
        if precision == "tf32" and launch.kernel in {kernel for kernel, _ in TRANSPOSED}:
            loads.pop(4, None)  # the elements that are copied to their places one by one
            assert loads
        assert share(loads) >= SHARED_SHARE, f"shared memory is read in {used.shared_loads}"
    if misaligned & LARGE or constants.get("POOL", 3) != 3 or launch.kernel in ELEMENTWISE:
        return  # smaller tiles, whose threads have fewer elements
    for name in LARGE & used.accesses.keys():
        if precision == "tf32" and (launch.kernel, name) in TRANSPOSED:
            continue
        part = any(constants.get(second) for second in ("C1", "P1", "Q1", "N1"))
        widths, least = used.accesses[name], 16
        if launch.kernel == "mlp_fwd" and name[:2] in ("w1", "w2"):  # a tile may have less for each thread
            itemsize = 4 if signature[name] == "*fp32" else 2
            least = min(least, constants["BN"] * constants["C0"] * itemsize // threads_of(launch))
        assert share(widths, least) >= (PART_SHARE if part else LARGE_SHARE), f"{name} is narrow: {widths}"


def parameters(usual: list, rest: list, arch: int) -> list:
    """(launch, architecture) for each launch of both lists of cases; what only the rest launches is long.

    Of these Hopper has all, and every other architecture a sixth of its own.
    """
    short = aot.distinct(usual, DEVICES[arch])
    found = []
    for launch in aot.distinct([*usual, *rest], DEVICES[arch]):
        name = f"{launch.name}-{arch}"
        if launch in short or arch == 90 or zlib.crc32(name.encode()) % 6 == 0:
            marks = [] if launch in short else [pytest.mark.long]
            found.append(pytest.param(launch, arch, id=name, marks=marks))
    return found
