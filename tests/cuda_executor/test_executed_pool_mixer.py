"""The CUDA C++ token mixer's tiles, loads and memory, in the executor; its numbers are in the contract."""

import pytest
import torch
from contract import executor
from contract.check import laid
from support.layouts import as_layout
from support.pool_mixer import assert_right, make_grad, make_inputs, mixer_with_stats
from support.problems import randn, tiled_stats
from support.rule import assert_same, run
from torch._subclasses.fake_tensor import FakeTensorMode

from poolformer_kernels.backends import cuda
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

pytestmark = pytest.mark.sampled(3)

FORWARD = torch.ops.poolformer_kernels.pool_mixer_cuda.default
FORMATS = ("nchw", "channels_last")
# H != W, one pixel, row or column, narrower than the pool; strips of 7 rows, more and fewer; rows and
# channels of whole vectors and not; several tiles along columns and channels
SHAPES = (
    *((2, 64, 14, 14), (3, 17, 9, 13), (1, 96, 7, 7), (2, 3, 13, 29), (1, 320, 3, 7), (1, 1040, 2, 2)),
    *((2, 1, 6, 4), (2, 24, 1, 1), (1, 16, 1, 9), (2, 5, 8, 1), (1, 12, 8, 12), (2, 8, 15, 16)),
    *((1, 8, 29, 8), (1, 3, 37, 70), (0, 5, 8, 6)),
)


@pytest.mark.parametrize("pool_size", [3, 5])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fake_has_the_kernels_tiles(shape, layout, pool_size) -> None:
    with FakeTensorMode():
        x = as_layout(torch.empty(shape), layout)
        fake = [t.shape for t in FORWARD(x, None, None, None, None, None, pool_size, 1e-5, True, True)]
    x = as_layout(randn(*shape), layout)
    real = FORWARD(x, None, None, None, None, None, pool_size, 1e-5, True, True)
    assert fake == [t.shape for t in real]
    assert real[2].shape[1] == cuda.stats_tiles(x.shape, memory_format_of(x) == torch.channels_last, 3)


@pytest.mark.parametrize("layout", FORMATS)
def test_loads_of_every_width_agree(layout) -> None:
    """An unaligned start makes single loads of what vectors load elsewhere: the same sums, the same order."""
    for dtype, width in ((torch.bfloat16, 8), (torch.bfloat16, 12), (torch.float32, 8)):
        inputs = make_inputs((2, 16, 9, width), dtype)
        grad = as_layout(make_grad(inputs), layout)
        options = {"residual": True, "stats": tiled_stats(inputs["x"], 3)}
        aligned = run(mixer_with_stats, inputs | {"x": as_layout(inputs["x"], layout)}, grad, **options)
        offset = as_layout(inputs["x"], "offset" if layout == "nchw" else "offset_last")
        assert offset.data_ptr() % 16 != 0
        unaligned = run(mixer_with_stats, inputs | {"x": offset}, grad, **options)
        assert_same({"y": unaligned["y"]}, {"y": aligned["y"]})


def test_small_shared_memory() -> None:
    """Rows too wide for what a block may have of it stay in registers."""
    inputs = laid(make_inputs((2, 512, 4, 3)), "channels_last")
    try:
        for kilobytes in (227, 99, 16):
            executor.library().executor_shared(kilobytes * 1024)
            grad = make_grad(inputs)
            assert_right(run(pool_mixer, inputs, grad, residual=True), inputs, grad, residual=True)
    finally:
        executor.library().executor_shared(227 * 1024)


def test_batches_choose_their_strips() -> None:
    """Small batches get more and smaller tiles; the partials nobody has count nothing."""
    for batch in (1, 7):
        inputs = make_inputs((batch, 64, 20, 20), torch.bfloat16, parameters=("weight", "layer_scale"))
        inputs = laid(inputs, "channels_last")
        y, stats = pool_mixer_with_stats(**inputs, residual=True)
        assert stats.shape == (batch, cuda.stats_tiles(y.shape, True, 3), 3)
        assert (stats[..., 0] > 0).sum(1).tolist() == [{1: 5, 7: 2}[batch]] * batch
        assert torch.equal(stats[..., 0].sum(1), torch.full((batch,), float(y[0].numel())))


@pytest.mark.parametrize(("pool_size", "eps"), [(4, 1e-5), (-1, 1e-5), (3, -1.0)])
def test_options_that_are_refused(pool_size, eps) -> None:
    with pytest.raises(RuntimeError, match="pool_mixer_cuda"):
        FORWARD(randn(1, 2, 3, 4), None, None, None, None, None, pool_size, eps, True, True)
