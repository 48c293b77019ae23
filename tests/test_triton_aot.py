"""Every configuration of the Triton launchers, compiled without a GPU: registers, spills, memory, loads."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    if os.environ.get("CI"):
        raise ModuleNotFoundError("the ahead-of-time tests need triton")
    pytest.skip("triton is not installed", allow_module_level=True)

from poolformer_kernels.backends.triton import aot, config

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may use
REGISTERS = {
    "sample_stats": 128,
    "merge_stats": 64,
    "pool_mixer_bwd_sample": 96,
    "pool_mixer_bwd_params": 96,
    "pool_mixer_bwd_reduce": 240,
}
DTYPES = (torch.bfloat16, torch.float32)
TILED = ("pool_mixer_fwd", "pool_mixer_bwd_reduce", "pool_mixer_bwd_dx")

SHIPPED = [
    *(aot.Case(dtype, True, *shape) for dtype in DTYPES for shape in aot.SHAPES),
    # tiles of nchw follow the image, not C: the M family's are the S family's
    *(aot.Case(dtype, False, *shape) for dtype in DTYPES for shape in aot.SHAPES[:4]),
    *(aot.Case(torch.float16, last, *shape) for last in (True, False) for shape in ((64, 56), (768, 7))),
    # the head of a chain, the plain form, an image that strips do not divide, the other pools
    aot.Case(torch.bfloat16, True, 64, 56, given_stats=False, return_stats=False),
    aot.Case(torch.float32, True, 64, 56, residual=False, given_stats=False),
    aot.Case(torch.bfloat16, True, 64, 96, given_stats=False),
    aot.Case(torch.bfloat16, True, 320, 14, pool_size=5),
    aot.Case(torch.float32, False, 64, 56, pool_size=7),
]
LAUNCHES = aot.distinct(SHIPPED)
SMALL = ("pool_mixer_bwd_sample", "pool_mixer_bwd_params")  # sums over partials: one architecture tells
LARGE = aot.Case(
    torch.bfloat16, True, 64, 1024, given_stats=False
)  # so many partials that they are merged first


def warps(launch: aot.Launch) -> int:
    return dict(launch.options).get("num_warps", 4)


COMPILED = [(n, arch) for n in LAUNCHES for arch in aot.ARCHS if arch == 90 or n.kernel not in SMALL]


@pytest.mark.parametrize(("launch", "arch"), COMPILED, ids=lambda p: getattr(p, "name", p))
def test_resources(launch, arch) -> None:
    used = aot.compile_launch(launch, arch)
    constants = dict(launch.constants)
    assert used.spills == 0
    assert used.shared <= SHARED[arch]
    pool = constants.get("POOL", 3)
    limit = REGISTERS.get(launch.kernel, 128 if constants.get("EVEN") else 168)
    assert used.registers <= (limit if pool == 3 else 255)
    assert used.registers * 32 * warps(launch) <= 65536  # what an SM has
    if launch.kernel in TILED and constants["CHANNELS_LAST"] and pool == 3:
        lanes = constants["COLUMNS"] * constants["CHANNELS"] // (32 * warps(launch))
        itemsize = 4 if dict(launch.signature)["x_ptr"] == "*fp32" else 2
        rows = config.ROWS
        pixels = 3 * (rows + 2) + (
            0 if launch.kernel == "pool_mixer_fwd" else rows
        )  # three taps a row, x or grad
        assert used.ldg128 >= pixels * lanes * itemsize // 16
        assert (
            used.ldg <= pixels + 8
        )  # nothing of the images is read in smaller pieces; the rest are parameters


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_statistics_of_a_large_image(arch) -> None:
    found = {launch.kernel: aot.compile_launch(launch, arch) for launch in aot.launches(LARGE)[:2]}
    assert found.keys() == {"sample_stats", "merge_stats"}
    for used in found.values():
        assert used.spills == 0
        assert used.registers <= REGISTERS[used.kernel]
    assert found["sample_stats"].ldg128 == 8  # 64 halves a thread


def test_launches_are_recorded_from_the_launchers() -> None:
    names = [launch.kernel for launch in aot.launches(SHIPPED[0]._replace(given_stats=False))]
    assert names == [
        *("sample_stats", "pool_mixer_fwd", "pool_mixer_bwd_reduce"),
        *("pool_mixer_bwd_sample", "pool_mixer_bwd_params", "pool_mixer_bwd_dx"),
    ]


def test_table() -> None:
    cases = [aot.Case(torch.bfloat16, True, 64, 7)]
    rows = aot.resource_table(cases, archs=(90,), processes=2)
    assert [row["kernel"] for row in rows] == [launch.kernel for launch in aot.distinct(cases)]
    for row in rows:
        assert row["arch"] == 90
        assert row["spills"] == 0
        assert 0 < row["registers"] <= REGISTERS.get(row["kernel"], 128)
        assert row["instructions"] > row["ldg"] > 0


@pytest.mark.parametrize(
    "shape", [(64, 56, 56), (96, 56, 56), (320, 14, 14), (768, 7, 7), (17, 13, 29), (3, 1, 1)]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_tiles_cover_a_sample(shape, channels_last) -> None:
    p = config.plan(*shape, channels_last, 3, 2)
    channels, height, width = shape
    columns = -(-height // config.ROWS) * width
    channel_tiles = -(-channels // p.channels)
    column_tiles = p.tiles // channel_tiles
    assert p.tiles == column_tiles * channel_tiles == config.stats_tiles((2, *shape), channels_last, 3)
    for tiles, size in ((column_tiles, p.columns), (p.reduce_column_tiles, p.reduce_columns)):
        assert (tiles - 1) * size < columns <= tiles * size
