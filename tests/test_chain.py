"""Inference as one operator: its numbers against fp64 beside eager PyTorch, and that they are the same bits.

The tests named ``core`` are also run by test_isa.py, once for each instruction set level of this machine.
"""

import itertools

import pytest
import torch
from support.chain import (
    DTYPES,
    FIRST,
    LAST,
    ONE,
    SMALL,
    assert_logits_right,
    by_reference,
    calls,
    convolve,
    images,
    infer,
    make_model,
    problem,
)
from support.layouts import as_layout
from support.peers import randomise_all, relative_error
from support.rule import assert_close_to_fp64, bits, threads

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.models import HEADS, model_config
from poolformer_kernels.nn import PoolFormerBlock, PoolFormerStage
from poolformer_kernels.ops.chain import Chain

pytestmark = pytest.mark.usefixtures("kernels")


# ---- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [(3, 97, 65), (2, 7, 9), (1, 32, 32), (5, 40, 33)], ids=str)
def test_core_cpp_logits(dtype, head, shape):
    model = make_model(dtype=dtype, head=head)
    batch, *size = shape
    x = images(batch, 3, *size, dtype=dtype)
    assert calls(model, x) == ONE
    assert_logits_right(infer(model, x), model, x)


@pytest.mark.parametrize(
    ("x_format", "format"), [(LAST, FIRST), (FIRST, LAST)], ids=["x last", "weights last"]
)
@pytest.mark.parametrize("in_chans", [1, 5])
@pytest.mark.parametrize("num_classes", [0, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_other_forms(dtype, num_classes, in_chans, x_format, format):
    model = make_model(dtype=dtype, fmt=format, in_chans=in_chans, num_classes=num_classes)
    x = images(2, in_chans, 35, 41, dtype=dtype, fmt=x_format)
    if in_chans > 1:
        assert calls(model, x) == ONE
    else:  # one channel is dense in both formats, and NCHW to this package; the stages remain
        assert calls(model, x)["chain_cpp"] >= 4
    assert_logits_right(infer(model, x), model, x)


@pytest.mark.parametrize("layout", ["sliced_c", "sliced_hw_last", "transposed", "expanded", "offset_last"])
def test_logits_of_strided_images(layout):
    model = make_model()
    x = as_layout(images(3, 3, 33, 29), layout)
    before = x.clone()
    assert calls(model, x) == ONE
    assert_logits_right(infer(model, x), model, x)
    assert torch.equal(bits(x), bits(before))


def test_logits_at_224():
    model = make_model(model_config("poolformer_s12"), num_classes=1000)
    x = images(1, 3, 224, 224)
    assert_logits_right(infer(model, x), model, x)


def test_logits_of_m36():
    """Of eight images: the errors of one image's seven logits differ by a factor of two either way."""
    model = make_model(model_config("poolformer_m36"), dtype=torch.bfloat16, head="timm")
    x = images(8, 3, 33, 40, dtype=torch.bfloat16)
    assert calls(model, x) == ONE
    assert_logits_right(infer(model, x), model, x)


def test_logits_of_a_half_model_with_float_vectors():
    """Norms, biases and LayerScales may stay float32: the chain reads them as they are."""
    model = make_model(dtype=torch.bfloat16)
    for p, given in zip(model.parameters(), make_model().parameters(), strict=True):
        if p.dim() == 1:
            p.data = given.data
    x = images(2, 3, 33, 40, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    assert calls(model, x) == ONE
    logits = infer(model, x)
    assert not torch.equal(logits, infer(make_model(dtype=torch.bfloat16), x))
    assert_logits_right(logits, model, x)


# ---- statistics that a convolution hands on ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", [7, 64, 100])
@pytest.mark.parametrize(("mean", "ulps"), [(0, 16), (100, 4), (1000, 4)])
def test_core_cpp_statistics_of_a_convolution(dtype, out, mean, ulps):
    """The chain of all against fp64 on what the convolution alone writes, of sigma 1."""
    x, weight, bias = problem(3, 17, out, 21, 18, 3, dtype)
    bias = (bias / 4 + mean).to(dtype)
    block = randomise_all(PoolFormerBlock(out, mlp_ratio=2.0)).to(dtype)
    for scale in (block.layer_scale_1, block.layer_scale_2):
        scale.data *= 2  # so that bfloat16 does not round it away beside 1000
    written = convolve(x, weight, bias, 2, 1)
    assert abs(written.double().mean() - mean) < 1
    assert 0.5 < written.double().std() < 2
    chain = Chain()
    chain.conv(weight, bias, 2, 1)
    assert block.add_to(chain)
    separate = block(written).detach()  # by two operators, as in training
    with torch.no_grad():
        y = chain.run(x, True)
    exact, eager = by_reference(block, written), by_reference(block, written, dtype)
    assert relative_error(written, y) > 0.1 / max(1, mean)
    assert_close_to_fp64(y, eager, exact, ulps=ulps, what="chain")
    assert_close_to_fp64(y, separate, exact, ulps=ulps, what="chain beside separate operators")


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_core_cpp_activations(activation):
    """The chain knows them by their place in the reference's table."""
    x, block, chain = images(2, 20, 5, 6), randomise_all(PoolFormerBlock(20, mlp_ratio=2.5)), Chain()
    (w1, b1, w2, b2), norm, scale = block.mlp.parameters(), block.norm2, block.layer_scale_2
    chain.mlp(w1, w2, (b1, b2, norm.weight, norm.bias, scale), activation, 1e-5)
    vectors = {"norm_weight": norm.weight, "norm_bias": norm.bias, "layer_scale": scale}
    with torch.no_grad():
        expected = pk.ops.mlp(x, w1, b1, w2, b2, activation=activation, residual=True, **vectors)
        assert torch.equal(chain.run(x, True), expected)


# ---- the same bits -----------------------------------------------------------------------------------------


def assert_same_bits_with_threads(numbers, model, x):
    results = []
    for number in numbers:
        with threads(number):
            results.append(bits(infer(model, x)))
        assert torch.equal(results[-1], results[0]), f"{number} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_runs_are_bitwise_equal(dtype):
    model, x = make_model(dtype=dtype), images(3, 3, 65, 49, dtype=dtype)
    for number in (1, 2):
        with threads(number):
            first = infer(model, x)
            for _ in range(9):
                assert torch.equal(bits(infer(model, x)), bits(first))


@pytest.mark.parametrize("config", [SMALL, model_config("poolformer_s12")], ids=["small", "s12"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_cpp_a_sample_has_the_same_bits_in_any_batch(dtype, config):
    """And with any number of threads: a part of the samples each, or all of them in every layer.

    As long as no batch has more tokens in a wide stage than a tile and another one fewer: few tokens are
    summed in parts, which threads share (not so in bfloat16 on AMX).
    """
    model = make_model(config, dtype=dtype)
    x = images(9, 3, 40, 57, dtype=dtype)
    with threads(1):
        alone = torch.cat([infer(model, x[i : i + 1]) for i in range(9)])
    assert_logits_right(alone, model, x)
    assert len({tuple(row.tolist()) for row in alone}) == 9
    for number, batch in itertools.product((1, 2), (1, 2, 3, 8, 9)):
        with threads(number):
            logits = infer(model, x[-batch:])
            assert torch.equal(bits(logits), bits(alone[-batch:])), f"{number} threads, a batch of {batch}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_cpp_few_tokens_of_a_wide_mlp_have_the_same_bits(dtype):
    """The call has so few tokens that hidden channels are summed in parts; a thread may have fewer yet."""
    stage = randomise_all(PoolFormerStage(PoolFormerBlock(32, mlp_ratio=32.0))).to(dtype)
    for seed in range(8):
        x = images(4, 32, 7, 7, dtype=dtype, seed=seed)
        assert calls(stage, x) == ONE
        assert_same_bits_with_threads((1, 2, 4), stage, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_image_has_the_same_bits_with_two_threads(dtype):
    """Large enough that threads share its convolutions, by tokens and by groups of output channels."""
    model, x = make_model(model_config("poolformer_s12"), dtype=dtype), images(1, 3, 129, 97, dtype=dtype)
    assert_same_bits_with_threads((1, 2, 3), model, x)
