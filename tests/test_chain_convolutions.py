"""Single convolutions of the chain: their numbers against fp64 beside eager PyTorch, and the same bits.

The tests named ``core`` are also run by test_isa.py, once for each instruction set level of this machine.
"""

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from support.chain import DTYPES, FIRST, LAST, convolve, problem
from support.layouts import as_layout
from support.problems import randn
from support.rule import assert_close_to_fp64, bits, threads

from poolformer_kernels.ops.chain import Chain

pytestmark = pytest.mark.usefixtures("kernels")
STEM, DOWN = (7, 4, 2), (3, 2, 1)  # kernel, stride, padding


def assert_convolution_right(x, weight, bias, stride, padding, what="convolution"):
    wide = [t if t is None else t.double() for t in (x, weight, bias)]
    exact = F.conv2d(*wide, stride, padding)
    terms = F.conv2d(wide[0] ** 2, wide[1] ** 2, None, stride, padding).sqrt()
    before = x.clone()
    y = convolve(x, weight, bias, stride, padding)
    eager = F.conv2d(x, weight, bias, stride, padding)
    assert_close_to_fp64(y, eager, exact, scale=torch.maximum(exact.abs(), terms), what=what)
    assert torch.equal(bits(x), bits(before))


def assert_all_right(cases, dtype):
    """Of each: batch, channels, out, height, width, step, and what else `problem` is given."""
    for case in cases:
        *sizes, (kernel, stride, padding) = case[:6]
        given = problem(*sizes, kernel, dtype, *case[6:])
        assert_convolution_right(*given, stride, padding, what=str(case))


# Samples of many tokens are rows of the products from AVX-512 on. Here are widths around whole tiles of every
# level, in rows of one and of several runs, and odd numbers of tiles.
TOKENS_ROWS_BATCH = [
    *((4, 9, 1), (5, 7, 3), (7, 7, 2), (8, 8, 5), (14, 3, 1), (15, 5, 3)),
    *((17, 2, 3), (33, 1, 2), (57, 3, 1)),
]
CORE = {
    "of any step": [
        (2, 3, 7, 11, 14, step) for step in product((1, 3, 5, 7, (3, 5), (4, 2)), (1, 2, 3, 4), (0, 1, 2, 3))
    ],
    "of any width": [
        (2, channels, out, 9, 10, DOWN, bias)
        for channels, out, bias in product((1, 3, 16, 17, 32, 33, 64), (1, 7, 64, 100), (True, False))
    ],
    "of any number of rows": [
        (batch, channels, 33, step[1] * rows - (rows + batch) % 2, step[1] * tokens - tokens % 2, step)
        for channels, step in ((3, STEM), (32, DOWN))
        for tokens, rows, batch in TOKENS_ROWS_BATCH
    ],
    "of many tokens and any width": [
        (2, channels, out, 9 * step[1], 7 * step[1], step)
        for channels, step in ((3, STEM), (17, DOWN), (64, DOWN))
        for out in (1, 15, 16, 17, 31, 32, 65, 100)
    ],
}
OTHERS = {
    "of any number of tokens": [
        (1, 32, 33, 1, width, (3, 1, 1))
        for width in (1, 2, 15, 16, 17, 31, 33, 47, 48, 49, 65, 207, 208, 209, 417)
    ],
    "whose kernel reaches beyond the image": [
        (3, channels, 5, height, width, (7, 4, padding))
        for height, width, padding in ((1, 1, 3), (2, 1, 3), (1, 9, 3), (3, 3, 2), (5, 2, 3), (6, 6, 6))
        for channels in (3, 32)
    ],
    "of shifted data": [
        (2, 32, 33, 30, 28, step, True, mean, sigma)
        for mean, sigma in ((-2.3, 0.5), (100, 1), (0, 1e-3))
        for step in (STEM, DOWN)
    ],
    # more weights than stay in the cache, and more samples than are copied at a time
    "whose weights are packed in parts": [(17, 320, 330, 14, 13, DOWN)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cases", CORE.values(), ids=CORE)
def test_core_cpp_convolutions(cases, dtype):
    assert_all_right(cases, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cases", OTHERS.values(), ids=OTHERS)
def test_convolutions(cases, dtype):
    assert_all_right(cases, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_cpp_convolutions_in_a_row(dtype):
    """Larger and smaller activations from one to the next: the bits of convolutions one by one."""
    widths = (5, 3, 40, 7, 33, 2, 64)
    for batch, number in product((1, 3, 8), (1, 2)):
        x, chain = randn(batch, 5, 19, 17, dtype=dtype, seed=1), Chain()
        y = x
        for i, (channels, out) in enumerate(pairwise(widths)):
            weight = randn(out, channels, 3, 3, dtype=dtype, sigma=(9 * channels) ** -0.5, seed=i)
            bias = randn(out, dtype=dtype, seed=i + 1)
            chain.conv(weight, bias, 1, i % 3)
            y = convolve(y, weight, bias, 1, i % 3)
        with threads(number), torch.no_grad():
            assert torch.equal(bits(chain.run(x, True)), bits(y))


@pytest.mark.parametrize("layout", ["nchw", "sliced_c", "sliced_hw_last", "expanded", "offset_last"])
def test_convolutions_of_strided_tensors(layout):
    x, weight, bias = problem(2, 17, 33, 12, 13, 3, torch.float32)
    wide = as_layout(weight, "sliced_c_last")
    strided = torch.full((33, 2), float("nan"))[:, 1].copy_(bias)
    assert_convolution_right(as_layout(x, layout), wide, strided, 2, 1)


def test_one_channel_of_a_larger_weight():
    """In channels_last, but for a stride that says nothing."""
    x, weight, bias = problem(2, 17, 2, 18, 14, 3, torch.float32)
    assert_convolution_right(x, weight.to(memory_format=LAST)[::2], bias[:1], 2, 1)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 32])
def test_core_cpp_convolutions_are_not_finite_where_eager_is_not(dtype, bad, channels):
    for where in ("x", "weight", "bias"):
        x, weight, bias = problem(2, channels, 7, 13, 11, 3, dtype)
        {"x": x[0, 1, 4], "weight": weight[3, 2, 1], "bias": bias}[where][2] = bad
        expected = F.conv2d(x, weight, bias, 2, 1)
        y = convolve(x, weight, bias, 2, 1)
        odd = ~expected.isfinite()
        assert odd.any()
        assert not odd.all()
        if where == "weight":  # beyond the border its taps are multiplied by zeros, or left out
            inside = (..., slice(1, -1), slice(1, -1))
            y, expected, odd = y[inside], expected[inside], odd[inside]
        assert torch.equal(y.isfinite(), ~odd)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[odd].nan_to_num(), expected[odd].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_cpp_contiguous_weights_give_the_same_bits(dtype):
    cases = [(3, *STEM), (5, (4, 2), 2, 1), (1, 5, 2, 2), (32, *DOWN), (33, (3, 5), 1, 1), (64, 1, 1, 0)]
    cases.append((6, 2, 3, 0))
    for channels, kernel, stride, padding in cases:
        for out, size in product((7, 64), ((9, 8), (33, 37))):
            x, weight, bias = problem(2, channels, out, *size, kernel, dtype)
            y = convolve(x, weight.contiguous(memory_format=LAST), bias, stride, padding)
            contiguous = weight.contiguous(memory_format=FIRST)
            assert torch.equal(bits(convolve(x, contiguous, bias, stride, padding)), bits(y))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [STEM, (5, 3, 2), DOWN], ids=["stem", "other", "down"])
def test_core_cpp_only_windows_with_an_infinite_pixel_are_not_finite(dtype, bad, step):
    """The others have the bits that they have without it: neighbours are not multiplied by zeros.

    Which they are is said in float64: eager's convolutions in bfloat16 spread it on some processors.
    """
    kernel, stride, padding = step
    for pixel in [(0, 0), (8, 13), (13, 0), (23, 25), (11, 25)]:
        x, weight, bias = problem(2, 3, 40, 24, 26, kernel, dtype)
        before = convolve(x, weight, bias, stride, padding)
        x[(1, 2, *pixel)] = bad
        expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding).to(dtype)
        odd = ~expected.isfinite()
        y = convolve(x, weight, bias, stride, padding)
        assert torch.equal(y.isfinite(), ~odd)
        assert torch.equal(y[odd].nan_to_num(), expected[odd].nan_to_num())
        assert torch.equal(bits(y[~odd]), bits(before[~odd]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "out", "size", "step"),
    [(3, 64, (75, 61), STEM), (64, 128, (19, 31), DOWN), (96, 330, (14, 14), DOWN)],
    ids=["stem", "down", "wide"],
)
def test_core_cpp_a_convolution_has_the_same_bits_in_any_batch(dtype, channels, out, size, step):
    """And however its rows and channels are shared out."""
    kernel, stride, padding = step
    x, weight, bias = problem(5, channels, out, *size, kernel, dtype)
    with threads(1):
        alone = torch.cat([convolve(x[i : i + 1], weight, bias, stride, padding) for i in range(5)])
    for number, batch in product((1, 2, 3, 4, 7), (1, 2, 5)):
        with threads(number):
            y = convolve(x[-batch:], weight, bias, stride, padding)
            assert torch.equal(bits(y), bits(alone[-batch:])), f"{number} threads, a batch of {batch}"
