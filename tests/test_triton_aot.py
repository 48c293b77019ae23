"""Every configuration of the Triton launchers, compiled without a GPU: registers, spills, memory, loads."""

import pytest
import torch
from support.ttgir import aot, check_accesses, compiled, parameters, threads_of

from poolformer_kernels.backends.triton import config

# At least so many warps on an SM: 16 leave a thread 128 registers, 12 leave 168 and 8 leave all 255. The
# reduction has blocks of four warps: with 169 to 255 registers (242 with Triton 3.8) two of them fit.
WARPS = {"sample_stats": 16, "merge_stats": 32, "pool_mixer_bwd_sample": 20, "pool_mixer_bwd_reduce": 8}
DTYPES = (torch.bfloat16, torch.float32)
TILED = ("pool_mixer_fwd", "pool_mixer_bwd_reduce", "pool_mixer_bwd_dx")

S_FAMILY = [aot.Case(torch.bfloat16, True, *shape) for shape in aot.SHAPES[:4]]
FEW = [  # on every architecture
    aot.Case(torch.bfloat16, True, 64, 56, given_stats=False, return_stats=False),
    S_FAMILY[3],
    aot.Case(torch.bfloat16, True, 64, 56, offset=1),  # as slices of larger tensors start
]
USUAL = [  # on one: the S family, the head of a chain, the plain form, an image that strips do not divide
    *FEW,
    *S_FAMILY,
    aot.Case(torch.float32, True, 64, 56, residual=False, given_stats=False),
    aot.Case(torch.float32, True, 320, 14),
    aot.Case(torch.bfloat16, False, 64, 56),
    aot.Case(torch.bfloat16, True, 64, 96, given_stats=False),
    aot.Case(torch.bfloat16, True, 320, 14, pool_size=5),
    aot.Case(torch.float32, False, 64, 56, pool_size=7),
    # the caller's tensors start at 2 bytes, as slices of larger ones do
    aot.Case(torch.bfloat16, True, 64, 56, offset=1),
    aot.Case(torch.bfloat16, False, 64, 56, offset=1),
]
REST = [
    *(aot.Case(dtype, True, *shape) for dtype in DTYPES for shape in aot.SHAPES),
    # tiles of nchw follow the image, not C: the M family's are the S family's
    *(aot.Case(dtype, False, *shape) for dtype in DTYPES for shape in aot.SHAPES[:4]),
    *(aot.Case(torch.float16, last, *shape) for last in (True, False) for shape in ((64, 56), (768, 7))),
    *(aot.Case(torch.float32, last, 320, 14, offset=1) for last in (True, False)),
]
SMALL = ("pool_mixer_bwd_sample",)  # a sum over partials: one architecture tells
# so many partials that they are merged first
LARGE = aot.Case(torch.bfloat16, True, 64, 1024, given_stats=False)


COMPILED = [
    item
    for arch in aot.ARCHS
    for item in parameters(USUAL if arch == 90 else FEW, REST if arch in (80, 90, 100) else S_FAMILY, arch)
    if arch == 90 or item.values[0].kernel not in SMALL
]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("launch", "arch"), COMPILED)
def test_resources(launch, arch) -> None:
    used, constants = compiled(launch, arch), dict(launch.constants)
    if constants.get("CHANNELS_LAST", True):
        check_accesses(used, launch, arch)
    pool = constants.get("POOL", 3)
    warps = WARPS.get(launch.kernel, 16 if constants.get("EVEN") else 12)
    assert used.warps >= (warps if pool == 3 else 8)
    aligned = 0 in launch.divisible  # the first argument: x or its gradient
    if launch.kernel in TILED and constants["CHANNELS_LAST"] and pool == 3 and aligned:
        lanes = constants["COLUMNS"] * constants["CHANNELS"] // threads_of(launch)
        itemsize = 4 if dict(launch.signature)["x_ptr"] == "*fp32" else 2
        pixels = 3 * (config.ROWS + 2)  # three taps a row, x or grad
        if launch.kernel != "pool_mixer_fwd":
            pixels += config.ROWS
        assert used.ldg128 >= pixels * lanes * itemsize // 16
        # Nothing of the images is read in smaller pieces. The rest are parameters, and what the programs for
        # the parameters' gradients read.
        assert used.ldg <= pixels + (36 if launch.kernel == "pool_mixer_bwd_dx" else 8)


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_statistics_of_a_large_image(arch) -> None:
    found = {launch.kernel: compiled(launch, arch) for launch in aot.launches(LARGE)[:2]}
    assert found.keys() == {"sample_stats", "merge_stats"}
    for used in found.values():
        assert used.warps >= WARPS[used.kernel]
    assert found["sample_stats"].ldg128 == 8  # 64 halves a thread


def test_launches_are_recorded_from_the_launchers() -> None:
    names = [launch.kernel for launch in aot.launches(USUAL[0])]
    parts = ("fwd", "bwd_reduce", "bwd_sample", "bwd_dx")
    assert names == ["sample_stats", *(f"pool_mixer_{part}" for part in parts)]


@pytest.mark.long
def test_table() -> None:
    cases = [aot.Case(torch.bfloat16, True, 64, 7)]
    rows = aot.resource_table(cases, archs=(90,), processes=2)
    assert [row["kernel"] for row in rows] == [launch.kernel for launch in aot.distinct(cases)]
    for row in rows:
        assert row["arch"] == 90
        assert row["spills"] == 0
        assert row["registers"] > 0
        assert row["warps"] >= WARPS.get(row["kernel"], 16)
        assert row["instructions"] > row["ldg"] > 0


@pytest.mark.parametrize(
    "shape", [(64, 56, 56), (96, 56, 56), (320, 14, 14), (768, 7, 7), (17, 13, 29), (3, 1, 1)]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_tiles_cover_a_sample(shape, channels_last) -> None:
    p = config.mixer_launch(*shape, channels_last, 3, 2)
    channels, height, width = shape
    columns = -(-height // config.ROWS) * width
    channel_tiles = -(-channels // p.channels)
    column_tiles = p.tiles // channel_tiles
    assert p.tiles == column_tiles * channel_tiles == config.stats_tiles((2, *shape), channels_last, 3)
    for tiles, size in ((column_tiles, p.columns), (p.reduce_column_tiles, p.reduce_columns)):
        assert (tiles - 1) * size < columns <= tiles * size
