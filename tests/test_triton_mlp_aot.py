"""The MLP's Triton launches, compiled without a GPU: registers, spills, memory, matrix instructions, gelu."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    if os.environ.get("CI"):
        raise ModuleNotFoundError("the ahead-of-time tests need triton")
    pytest.skip("triton is not installed", allow_module_level=True)

import triton

from poolformer_kernels.backends.triton import aot, mlp, mlp_config

OLD = triton.__version__.startswith("3.6.")
SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may use
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
REGISTERS = {"mlp_prepare": 96, "mlp_fc1": 192, "mlp_fc2": 248}


def case(dtype: torch.dtype, channels: int, size: int, **options) -> aot.MlpCase:
    return aot.MlpCase(dtype, channels, size, backward=False, **options)


BF16 = {shape[0]: case(torch.bfloat16, *shape) for shape in aot.SHAPES}
# every row of the tables on every architecture; 384 and 512 have the tiles of 768
SHIPPED = [
    *(BF16[channels] for channels in (64, 96, 128, 192, 320, 768)),
    case(torch.float16, 64, 56),
    case(torch.float32, 96, 56),
]
OTHERS = [  # one architecture tells
    BF16[384],
    BF16[512],
    case(torch.float16, 320, 14),
    case(torch.float32, 192, 28),
    case(torch.float32, 384, 14),
    case(torch.float32, 64, 56, weight_dtype=torch.bfloat16),
    case(torch.float32, 320, 14, weight_dtype=torch.bfloat16),
    case(torch.bfloat16, 96, 56, save_hidden=True),
    case(torch.bfloat16, 192, 28, activation="gelu_tanh"),
    case(torch.float16, 96, 56, activation="relu_squared", save_hidden=True),
]
COMPILED = [
    (launch, arch)
    for launch in aot.distinct(SHIPPED)
    for arch in aot.ARCHS
    if arch == 90 or launch.kernel != "mlp_prepare"  # no matrix product, next to no work
] + [(launch, 90) for launch in aot.distinct(OTHERS) if launch.kernel != "mlp_prepare"]


@pytest.mark.parametrize(("launch", "arch"), COMPILED, ids=lambda p: getattr(p, "name", p))
def test_resources(launch, arch) -> None:
    used = aot.compile_launch(launch, arch)
    constants, signature = dict(launch.constants), dict(launch.signature)
    threads = 32 * dict(launch.options).get("num_warps", 4)
    # Triton 3.6 leaves two registers of C = 64 on the stack of sm_80, written before the loop and read after
    assert used.spills <= (8 if OLD and arch == 80 else 0)
    assert used.shared <= SHARED[arch]
    assert used.registers * threads <= 65536  # what an SM has
    narrow = launch.kernel == "mlp_fwd" and constants["C"] <= 96 and signature["w1_ptr"] != "*fp32"
    alone = not narrow or signature["hidden_ptr"] != "constexpr"  # else two blocks share an SM
    limit = REGISTERS.get(launch.kernel, 255 if alone else 128)
    if launch.kernel == "mlp_fc1" and arch >= 90 and signature["u_ptr"] != "constexpr":
        limit = 128  # two blocks here too
    assert used.registers <= limit
    if launch.kernel == "mlp_prepare":
        return

    half = signature["w2_ptr" if launch.kernel == "mlp_fc2" else "w1_ptr"] != "*fp32"
    assert used.matrix.keys() == ({MATRIX[arch]} if half else set())  # float32 stays float32
    if launch.kernel == "mlp_fc2" or constants["ACTIVATION"] == "relu_squared":
        assert used.activations == 0  # neither a clamp nor an exponential
    else:  # each element of a chunk once: no thread computes what another has
        assert used.activations == constants["BM"] * constants["BN"] // threads
    if launch.kernel == "mlp_fwd":  # x, and x again for the residual, in the widest pieces
        itemsize = 4 if signature["x_ptr"] == "*fp32" else 2
        assert used.ldg128 >= 2 * constants["BM"] * constants["C"] * itemsize // 16 // threads


def test_launches_are_recorded_from_the_launchers() -> None:
    kernels = [[launch.kernel for launch in aot.launches(c)] for c in (BF16[192], BF16[320])]
    assert kernels == [["mlp_fwd"], ["mlp_prepare", "mlp_fc1", "mlp_fc2"]]


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("out", [1, 64, 100, 192, 320, 768])
def test_statistics_have_room_for_every_tile(out, rows) -> None:
    """Sample b is in the row tiles from its first token's to its last one's, wherever in a tile it starts."""
    columns = sum(mlp_config.out_tile(out))
    for pixels in (32, 33, 49, 63, 64, 65, 127, 128, 129, 196, 784, 3136):
        first, last = ([(b * pixels + at) // rows for b in range(rows)] for at in (0, pixels - 1))
        needed = max(z - a + 1 for a, z in zip(first, last, strict=True))
        tiles = mlp_config.mlp_stats_tiles((rows, out, 1, pixels), True, 4 * out)
        assert tiles % -(-out // columns) == 0
        assert needed <= tiles // -(-out // columns) <= needed * rows // mlp_config.STATS_ROWS + 2
        touched = [{at // pixels for at in range(i * rows, (i + 1) * rows)} for i in range(pixels)]
        assert mlp._segments(pixels, rows) == max(len(samples) for samples in touched)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_have_the_rows_that_statistics_count_on(itemsize) -> None:
    for channels in range(1, mlp_config.FUSED_CHANNELS + 1):
        tiles = mlp_config.fused(channels, itemsize)
        assert tiles.rows >= mlp_config.STATS_ROWS
        assert itemsize == 4 or tiles.rows >= 16 * tiles.warps  # or a chained product computes gelu twice
    for shared in SHARED.values():
        first, second = (
            mlp_config.fc1(itemsize, itemsize, shared),
            mlp_config.fc2(320, itemsize, shared),
        )
        assert second.rows >= mlp_config.STATS_ROWS
        assert (first.stages, second.stages) == ((2, 2) if itemsize == 4 else (3, 4))


def test_blocks_of_less_shared_memory_get_fewer_stages() -> None:
    small = 101376  # sm_86, sm_89, sm_120
    for x_itemsize in (2, 4):
        tiles = mlp_config.fc1(x_itemsize, 2, small)
        assert tiles.stages * tiles.depth * (tiles.rows * x_itemsize + 2 * tiles.columns[0]) <= small
    for out in (100, 192, 320, 512, 576):
        tiles = mlp_config.fc2(out, 2, small)
        assert 2 <= tiles.stages <= 3
        assert tiles.stages * tiles.depth * 2 * (tiles.rows + sum(tiles.columns)) <= small
