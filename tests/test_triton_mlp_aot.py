"""The MLP's Triton launches, compiled without a GPU: registers, spills, memory, matrix instructions, gelu."""

import dataclasses

import pytest
import torch
from support.ttgir import DEVICES, aot, check_accesses, check_products, compiled, parameters, threads_of

from poolformer_kernels.backends.triton.mlp import config, forward

# At least so many warps on an SM. Blocks of eight with 129 to 255 registers come one to an SM, with 128 two.
WARPS = {"mlp_prepare": 20, "mlp_fc1": 8, "mlp_fc2": 8}


def case(dtype: torch.dtype, channels: int, size: int, **options) -> aot.MlpCase:
    return aot.MlpCase(dtype, channels, size, backward=False, **options)


TF32 = [case(torch.float32, *shape, allow_tf32=True) for shape in aot.SHAPES]
BF16 = {shape[0]: case(torch.bfloat16, *shape) for shape in aot.SHAPES}
# on every architecture
FEW = [*(BF16[channels] for channels in (64, 128, 320)), *TF32[:3], BF16[64]._replace(offset=1)]
USUAL = [  # on one; 384 and 512 have the tiles of 768
    *(BF16[channels] for channels in (64, 96, 128, 192, 320, 768)),
    case(torch.float32, 96, 56),
    case(torch.float32, 192, 28),
    *TF32[:4],
    case(torch.float32, 64, 56, weight_dtype=torch.bfloat16),
    case(torch.float32, 320, 14, weight_dtype=torch.bfloat16),
    case(torch.float32, 64, 56, autocast=True),
    case(torch.float32, 320, 14, autocast=True, save_hidden=True),
    case(torch.bfloat16, 96, 56, save_hidden=True),
    case(torch.bfloat16, 192, 28, activation="gelu_tanh"),
    case(torch.float16, 96, 56, activation="relu_squared", save_hidden=True),
    # the caller's tensors start at 2 bytes, as slices of larger ones do
    case(torch.bfloat16, 64, 56, offset=1),
    case(torch.bfloat16, 320, 14, offset=1),
]
REST = [
    *BF16.values(),
    *(case(torch.float16, *shape) for shape in ((64, 56), (320, 14))),
    *(case(torch.float32, *shape) for shape in aot.SHAPES),
    *TF32,
    *(item._replace(save_hidden=True) for item in TF32),
    *(item._replace(offset=1) for item in TF32),
    *(case(torch.float32, *shape, weight_dtype=torch.bfloat16) for shape in ((128, 28), (192, 28), (768, 7))),
    *(case(torch.bfloat16, *shape, save_hidden=True) for shape in aot.SHAPES),
    *(case(torch.bfloat16, *shape, offset=1) for shape in ((128, 28), (192, 28), (512, 7))),
    case(torch.float32, 64, 56, offset=1),
]
MORE = [
    *BF16.values(),
    *TF32,
    *(item._replace(offset=1) for item in (BF16[128], BF16[320], TF32[0], TF32[2])),
]
COMPILED = [
    item
    for arch in aot.ARCHS
    for item in parameters(*((USUAL, REST) if arch == 90 else (FEW, MORE)), arch)
    if arch == 90 or item.values[0].kernel != "mlp_prepare"  # no matrix product, next to no work
]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("launch", "arch"), COMPILED)
def test_resources(launch, arch) -> None:
    used = compiled(launch, arch)
    constants, signature = dict(launch.constants), dict(launch.signature)
    check_accesses(used, launch, arch)
    narrow = launch.kernel == "mlp_fwd" and constants["C"] <= 96 and signature["w1_ptr"] != "*fp32"
    alone = not narrow or signature["hidden_ptr"] != "constexpr"  # else two blocks share an SM
    warps = WARPS.get(launch.kernel, 8 if alone else 16)
    folded = launch.kernel == "mlp_fc1" and signature["u_ptr"] != "constexpr"
    if folded and 0 in launch.divisible and not DEVICES[arch].register_operands:
        warps = 16  # two blocks here too
    assert used.warps >= warps
    if launch.kernel == "mlp_prepare":
        return

    check_products(used, launch, arch)
    if launch.kernel == "mlp_fc2" or constants["ACTIVATION"] == "relu_squared":
        assert used.activations == 0  # neither a clamp nor an exponential
    else:  # each element of a chunk once: no thread computes what another has
        assert used.activations == constants["BM"] * constants["BN"] // threads_of(launch)


def test_launches_are_recorded_from_the_launchers() -> None:
    pair = ["mlp_prepare", "mlp_fc1", "mlp_fc2"]
    for found, kernels in (
        (BF16[192], ["mlp_fwd"]),
        (BF16[320], pair),
        (case(torch.float32, 96, 56), ["mlp_fwd"]),
        (case(torch.float32, 96, 56, autocast=True), ["mlp_prepare", "mlp_fwd"]),
        (case(torch.float32, 320, 14, autocast=True), pair),
        (case(torch.float32, 128, 28), pair),
    ):
        assert [launch.kernel for launch in aot.launches(found)] == kernels


def test_launches_are_those_of_the_device() -> None:
    expected = {80: (3, 4), 86: (3, 2), 89: (3, 2), 90: (3, 4), 100: (3, 4), 120: (3, 2)}
    for item in (BF16[320], TF32[2]):
        for arch in aot.ARCHS:
            _, *pair = aot.launches(item, DEVICES[arch])
            stages = tuple(dict(launch.options)["num_stages"] for launch in pair)
            assert stages == expected[arch], (item, arch)


@pytest.mark.parametrize("arch", [80, 90])
def test_narrower_code_is_noticed(arch) -> None:
    """The same kernel, compiled without knowing that x is aligned."""
    launch = aot.launches(BF16[64], DEVICES[arch])[0]
    assert launch.signature[0][0] == "x_ptr"
    unaware = dataclasses.replace(launch, divisible=tuple(index for index in launch.divisible if index))
    wide, narrow = (aot.compile_launch(each, arch) for each in (launch, unaware))
    check_accesses(wide, launch, arch)
    check_accesses(narrow, unaware, arch)
    with pytest.raises(AssertionError, match="x_ptr is narrow"):
        check_accesses(narrow, launch, arch)
    with pytest.raises(AssertionError, match="x_ptr is not aligned"):
        check_accesses(wide, unaware, arch)
    halved = dataclasses.replace(wide, shared_loads={4: 100, 16: 36})
    if arch == 80:
        with pytest.raises(AssertionError, match="shared memory is read in"):
            check_accesses(halved, launch, arch)


def test_only_the_callers_vectors_are_misaligned() -> None:
    launch = aot.launches(BF16[64]._replace(offset=1))[0]
    divisible = {launch.signature[index][0] for index in launch.divisible}
    assert divisible >= {"x_ptr", "w1_ptr", "w2_ptr", "y_ptr", "mean_rstd_ptr", "y_stats_ptr"}
    assert not divisible & {"b1_ptr", "b2_ptr", "gamma_ptr", "drop_ptr"}


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("out", [1, 64, 100, 192, 320, 768])
def test_statistics_have_room_for_every_tile(out, rows) -> None:
    """Sample b is in the row tiles from its first token's to its last one's, wherever in a tile it starts."""
    columns = sum(config.output_columns(out))
    for pixels in (32, 33, 49, 63, 64, 65, 127, 128, 129, 196, 784, 3136):
        first, last = ([(b * pixels + at) // rows for b in range(rows)] for at in (0, pixels - 1))
        needed = max(z - a + 1 for a, z in zip(first, last, strict=True))
        tiles = config.mlp_stats_tiles((rows, out, 1, pixels), True, 4 * out)
        assert tiles % -(-out // columns) == 0
        assert needed <= tiles // -(-out // columns) <= needed * rows // config.STATS_ROWS + 2
        touched = [{at // pixels for at in range(i * rows, (i + 1) * rows)} for i in range(pixels)]
        assert forward._samples_per_tile(pixels, rows) == max(len(samples) for samples in touched)


@pytest.mark.parametrize(("itemsize", "precision"), [(2, "ieee"), (4, "ieee"), (4, "tf32")])
def test_tiles_have_the_rows_that_statistics_count_on(itemsize, precision) -> None:
    matrix = itemsize == 2 or precision == "tf32"
    for channels in range(1, config.FUSED_FORWARD_CHANNELS * 2 // itemsize + 1):
        for device in DEVICES.values():
            tiles = config.fused_forward_tiles(channels, itemsize, device, precision)
            assert tiles.rows >= config.STATS_ROWS
            assert not matrix or tiles.rows >= 16 * tiles.warps  # or a chained product computes gelu twice
    for arch in (80, 90, 100):
        first = config.fc1_tiles(itemsize, itemsize, DEVICES[arch], precision)
        second = config.fc2_tiles(320, itemsize, DEVICES[arch], precision)
        assert second.rows >= config.STATS_ROWS
        assert (first.stages, second.stages) == ((3, 4) if matrix else (2, 2))


@pytest.mark.parametrize("arch", [86, 89, 120])
def test_blocks_of_less_shared_memory_get_fewer_stages(arch) -> None:
    small = DEVICES[arch].shared
    assert small == 99 * 1024
    for x_itemsize, itemsize, precision in ((2, 2, "ieee"), (4, 2, "ieee"), (4, 4, "tf32")):
        tiles = config.fc1_tiles(x_itemsize, itemsize, DEVICES[arch], precision)
        step = tiles.depth * (tiles.rows * x_itemsize + itemsize * tiles.columns[0])
        assert tiles.stages * step <= small < 4 * step
    for out in (100, 192, 320, 512, 576):
        for itemsize, precision in ((2, "ieee"), (4, "tf32")):
            tiles = config.fc2_tiles(out, itemsize, DEVICES[arch], precision)
            assert 2 <= tiles.stages <= 3
            assert tiles.stages * tiles.depth * itemsize * (tiles.rows + sum(tiles.columns)) <= small
