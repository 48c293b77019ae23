"""Operators of both backends: which kernels a call launches, on which device and stream."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels.ops import mlp, pool_mixer

from .null_gpu import Launch, recorded

pytestmark = pytest.mark.host

BF16, F32 = torch.bfloat16, torch.float32
CASES = [(BF16, torch.channels_last), (F32, torch.contiguous_format)]
IDS = ["bfloat16-channels_last", "float32-nchw"]

# The kernels of forward and backward, in their order, by backend and dtype. The MLP's wide form, and all that
# CUDA C++ has no kernel for, is Triton's.
MIXER = {
    ("triton", BF16): (
        ["sample_stats", "pool_mixer_fwd"],
        ["pool_mixer_bwd_reduce", "pool_mixer_bwd_sample", "pool_mixer_bwd_dx"],
    ),
    ("cuda", BF16): (
        ["norm_stats<bf16, true>", "pool_mixer_fwd<bf16, 8, false>"],
        [
            "pool_mixer_bwd_reduce<bf16, 8, false>",
            *("pool_mixer_bwd_q", "pool_mixer_bwd_finish"),
            "pool_mixer_bwd_apply<bf16, 8, false>",
        ],
    ),
    ("cuda", F32): (
        ["norm_stats<float, true>", "pool_mixer_fwd<float, 4, true>"],
        [
            "pool_mixer_bwd_reduce<float, 4, true>",
            *("pool_mixer_bwd_q", "pool_mixer_bwd_finish"),
            "pool_mixer_bwd_apply<float, 4, true>",
        ],
    ),
}
MIXER["triton", F32] = MIXER["triton", BF16]
NARROW = {
    ("triton", BF16): (
        ["sample_stats", "mlp_fwd"],
        ["mlp_bwd_prepare", "mlp_bwd_wgrad", "mlp_bwd_sample", "mlp_bwd_dx", "mlp_bwd_finish"],
    ),
    ("cuda", BF16): (
        ["norm_stats<bf16, true>", "mlp_pack<bf16, 64>", "mlp_fwd_sm90<bf16, 64>"],
        [
            *("mlp_bwd_prepare<bf16, bf16>", "mlp_bwd_tokens<bf16>", "mlp_bwd_wgrad<bf16, 64>"),
            *("mlp_bwd_sample<bf16>", "mlp_bwd_dgrad<bf16, 64>", "mlp_bwd_columns", "mlp_bwd_weights<bf16>"),
            "mlp_bwd_finish<bf16>",
        ],
    ),
}
NARROW["triton", F32] = NARROW["cuda", F32] = NARROW["triton", BF16]
WIDE = (
    ["sample_stats", "mlp_prepare", "mlp_fc1", "mlp_fc2"],
    ["mlp_bwd_prepare", "mlp_bwd_hidden", "mlp_bwd_sample", "mlp_bwd_dn", "mlp_bwd_finish"],
)


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest):
    with pk.use_backend(request.param):
        yield request.param


def image(dtype: torch.dtype, memory_format: torch.memory_format, channels: int, device="cuda:0") -> Tensor:
    size = {64: 56, 320: 14}[channels]  # as in S12, whose kernels are compiled in any case
    x = torch.empty((2, channels, size, size), dtype=dtype, device=device, memory_format=memory_format)
    return x.requires_grad_()


def vectors(x: Tensor, count: int) -> list[Tensor]:
    return [x.new_empty(x.shape[1]).requires_grad_() for _ in range(count)]


def mixer_call(x: Tensor) -> Tensor:
    weight, bias, scale = vectors(x, 3)
    return pool_mixer(x, weight, bias, layer_scale=scale, residual=True)


def mlp_call(x: Tensor) -> Tensor:
    channels = x.shape[1]
    w1, w2 = (
        x.new_empty(size).requires_grad_() for size in ((4 * channels, channels), (channels, 4 * channels))
    )
    b1 = x.new_empty(4 * channels).requires_grad_()
    b2, weight, bias, scale = vectors(x, 4)
    return mlp(x, w1, b1, w2, b2, norm_weight=weight, norm_bias=bias, layer_scale=scale, residual=True)


def ours(launches: list[Launch]) -> list[str]:
    """Names of the package's kernels; every one's binary was read, so that its launch was checked."""
    found = [launch for launch in launches if launch.ours]
    assert all(launch.known for launch in found)
    return [launch.name for launch in found]


def kernels_of(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[str], list[str]]:
    """Of the call and of its backward."""
    with recorded() as forward:
        y = call(x)
    with recorded() as backward:
        y.backward(torch.empty_like(y))
    return ours(forward), ours(backward)


@pytest.mark.parametrize(("dtype", "memory_format"), CASES, ids=IDS)
def test_pool_mixer(backend, dtype, memory_format) -> None:
    assert kernels_of(mixer_call, image(dtype, memory_format, 64)) == MIXER[backend, dtype]


@pytest.mark.parametrize(("dtype", "memory_format"), CASES, ids=IDS)
def test_narrow_mlp(backend, dtype, memory_format) -> None:
    assert kernels_of(mlp_call, image(dtype, memory_format, 64)) == NARROW[backend, dtype]


def test_wide_mlp(backend) -> None:
    """Besides these there are two products of cuBLAS's; for float32 two of ours."""
    assert kernels_of(mlp_call, image(BF16, torch.channels_last, 320)) == WIDE
    x = image(BF16, torch.channels_last, 320)
    y = mlp_call(x)
    with recorded() as launches:
        y.backward(torch.empty_like(y))
    assert [launch.name for launch in launches if not launch.ours] == ["cublasGemmEx"] * 2


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_another_device_than_the_current_one(backend, side) -> None:
    """Every kernel runs where x is, on that device's current stream; the current device stays."""
    assert torch.cuda.current_device() == 0
    x = image(BF16, torch.channels_last, 64, "cuda:1")
    stream = torch.cuda.Stream("cuda:1") if side else torch.cuda.default_stream("cuda:1")
    with recorded() as launches, torch.cuda.stream(stream), torch.cuda.device(0):
        y = mlp_call(mixer_call(x))
        y.backward(torch.empty_like(y))
    assert len(ours(launches)) >= 12
    assert {(launch.device, launch.stream) for launch in launches} == {(1, stream.cuda_stream)}


def test_misaligned_tensors(backend) -> None:
    """x begins 2 bytes behind a multiple of 16: C++ copies it, Triton compiles narrower loads."""
    x = torch.empty(2 * 8 * 8 * 64 + 1, dtype=BF16, device="cuda")[1:].view(2, 8, 8, 64).permute(0, 3, 1, 2)
    x.requires_grad_()
    assert x.data_ptr() % 16 == 2
    with recorded() as launches:
        y = mixer_call(x)
        y.backward(torch.empty_like(y))
    assert len(ours(launches)) == (5 if backend == "triton" else 6)


def test_backends_are_available_on_both_devices() -> None:
    assert torch.cuda.device_count() == 2
    assert pk.available_backends() == ["reference", "cpp", "triton", "cuda"]
    assert pk.backend_reasons() == {}
    x = image(BF16, torch.channels_last, 64, "cuda:1")
    call = pk.explain(x).calls[0]
    assert (call.operator, call.backend, call.reason) == ("pool_mixer", "triton", "the fastest on cuda")
