"""The Triton MLP's backward: workspaces, chunks of samples, splits of the tokens."""

import pytest
import torch
from contract.check import check_of, laid
from contract.targets import TARGETS
from support.mlp import NAMES, backward_arguments, make_grad, make_inputs
from support.mlp_operator import exact_hidden, statistics
from support.operators import MLP
from support.problems import randn
from support.rule import assert_close_to_fp64, assert_same

from poolformer_kernels.backends.triton.mlp import backward, backward_finish, backward_gemm, chunks, config

pytestmark = pytest.mark.sampled(4)

KINDS = ((torch.float32, "nchw"), (torch.bfloat16, "channels_last"), (torch.float16, "nchw"))


def check(inputs, layout="nchw", **options) -> None:
    check_of(MLP, TARGETS["interpreter"], inputs, layout=layout, residual=True, **options)


def gradients(inputs, grad, save_hidden=False):
    """By the backward alone."""
    x = inputs["x"]
    saved = exact_hidden(inputs)[0].flatten().to(x.dtype) if save_hidden else None
    arguments = backward_arguments(grad, inputs, statistics(x), saved)
    return dict(zip(NAMES, backward.backward(*arguments, x.dtype, False), strict=True))


def blocks_of_eight(monkeypatch, dtype, layout="channels_last"):
    """A call with five blocks of 8 samples, the last of 4, and what sets the workspace, in blocks."""
    inputs = laid(make_inputs((36, 136, 4, 4), 24, dtype), layout)
    monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", 9 * 16 * 24)
    assert chunks.divide((36, 16, 136, 136, 24), dtype.itemsize, 1) == (8, 8)
    token = dtype.itemsize * (2 * 136 + 2 * 24) + 12

    def set_workspace(blocks: float) -> None:
        memory = int(config.WORKSPACE_SHARE * blocks * 8 * 16 * token)
        monkeypatch.setattr(backward_gemm, "memory_of", lambda x: memory)

    return inputs, set_workspace


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "layout"), KINDS)
def test_the_workspace_does_not_change_a_bit(dtype, layout, monkeypatch) -> None:
    inputs, set_workspace = blocks_of_eight(monkeypatch, dtype, layout)
    grad, results, calls = make_grad(inputs), [], []
    hidden = backward_gemm.mlp_bwd_hidden

    class Counted:
        def __getitem__(self, grid):
            calls[-1] += 1
            return hidden[grid]

    monkeypatch.setattr(backward_gemm, "mlp_bwd_hidden", Counted())
    for blocks in (0, 1, 2.5, 4, 5):
        set_workspace(blocks)
        calls.append(0)
        results.append(gradients(inputs, grad, save_hidden=layout == "nchw"))
    assert calls == [5, 5, 3, 2, 1]
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize(("save_hidden", "layout"), [(False, "channels_last"), (True, "nchw")])
def test_chunks_of_samples(save_hidden, layout, monkeypatch) -> None:
    inputs, set_workspace = blocks_of_eight(monkeypatch, torch.bfloat16)
    set_workspace(2)
    check(inputs, layout, save_hidden=save_hidden)


@pytest.mark.parametrize("shape", [(5, 132, 2, 3), (5, 136, 3, 3)], ids=str)
def test_blocks_that_start_anywhere(shape, monkeypatch) -> None:
    """Each is a chunk: its rows start at no multiple of 16 bytes, or inside a tile of tokens."""
    monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", 2 * shape[2] * shape[3] * 20)
    assert chunks.divide((5, shape[2] * shape[3], shape[1], shape[1], 20), 2, 2**40) == (2, 2)
    check(make_inputs(shape, 20, torch.bfloat16))


def test_a_workspace_that_cannot_be_allocated(monkeypatch) -> None:
    """It is halved until it can, to one block; no bit of the result changes."""
    inputs, set_workspace = blocks_of_eight(monkeypatch, torch.bfloat16)
    set_workspace(5)
    grad = make_grad(inputs)
    expected = gradients(inputs, grad)
    allocate, asked = backward_gemm.allocate_buffers, []

    def limited(problem, launch, tokens):
        asked.append(tokens // 16)
        if tokens > free * 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(problem, launch, tokens)

    monkeypatch.setattr(backward_gemm, "allocate_buffers", limited)
    free = 8
    assert_same(gradients(inputs, grad), expected)
    assert asked == [36, 24, 16, 8]
    free = 7
    with pytest.raises(torch.OutOfMemoryError):
        gradients(inputs, grad)


def test_several_splits_of_the_tokens(monkeypatch) -> None:
    backward_launch = backward.backward_launch
    monkeypatch.setattr(
        backward, "backward_launch", lambda *args: backward_launch(*args)._replace(programs=12)
    )
    for dtype in (torch.float32, torch.bfloat16):
        check(make_inputs((2, 17, 11, 13), 40, dtype))
    for save_hidden in (False, True):  # float32: two splits of three tiles of 64 tokens
        check(make_inputs((2, 132, 8, 9), 20), save_hidden=save_hidden)


@pytest.mark.parametrize("rows", [1, 256, 1025, 270000])
def test_sums_of_partials(rows) -> None:
    """Of up to three matrices, two of which are here."""
    partials = [randn(rows, 3, mean=1.0), None, randn(1024, 40, mean=1.0)]
    sums = backward_finish.group_rows(*partials)
    assert sums[1] is None
    assert sums[2] is partials[2]
    assert len(sums[0]) <= 1024
    assert_close_to_fp64(sums[0].sum(0), None, partials[0].double().sum(0), ulps=2)


def test_power_of_2_parts_cover() -> None:
    for size in range(1, 520):
        first, second = config.power_of_2_parts(size)
        assert first + second >= size
        assert first >= 16
        assert second == 0 or (16 <= second <= first < size)
        assert all(p & (p - 1) == 0 for p in (first, second))


def test_chunks_of_models_at_224() -> None:
    h200, small = 141 * 10**9 // config.WORKSPACE_SHARE, 24 * 10**9 // config.WORKSPACE_SHARE
    for pixels, channels in ((14 * 14, 320), (7 * 7, 512)):  # S12: one block, and so one chunk
        shape = (256, pixels, channels, channels, 4 * channels)
        assert chunks.divide(shape, 2, 0) == chunks.divide(shape, 2, h200) == (256, 256)
    shape = (256, 28 * 28, 192, 192, 768)  # M48's second stage
    assert chunks.divide(shape, 2, 0) == (88, 88)
    assert chunks.divide(shape, 2, small) == (88, 176)
    assert chunks.divide(shape, 2, h200) == (88, 256)
    assert chunks.divide((5, 2**20, 320, 320, 1280), 2, 2**50) == (1, 1)
    assert chunks.divide((3, 14 * 14, 320, 320, 1280), 2, 0) == (3, 3)


def test_blocks_start_with_a_tile() -> None:
    for pixels in (1, 7, 49, 100, 196, 3136):
        for hidden in (512, 1280, 4096):
            samples = 2**27 // (pixels * hidden)
            block, chunk = chunks.divide((samples, pixels, 512, 512, hidden), 2, 2**40)
            assert block * pixels * hidden <= config.BLOCK_ELEMENTS
            assert chunk == block or (block * pixels % 128 == block % 8 == 0 and chunk == samples)
