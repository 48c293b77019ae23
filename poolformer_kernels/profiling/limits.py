"""The two limits of a layer's time: how fast this device copies, and how fast it multiplies matrices."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from .throughput import Timing, time_interleaved

__all__ = ["LimitProbes", "Limits", "measure_limits"]

# On the CPU a layer's activations stay in the caches, so the copy's do too; on CUDA the copy exceeds the L2.
_COPY_BYTES = {"cpu": 2**21, "cuda": 2**29}
_LARGEST_SIDE = {"cpu": 1024, "cuda": 8192}
_LONG_S = (
    2.5e-3  # a product that lasts this long shows the rate; one of twice the side may last 8 times as long
)


@dataclass(frozen=True)
class Limits:
    """Rates of one device in one dtype: bytes per second of a copy, FLOPs per second of a matrix product."""

    copy: float
    matmul: float

    def seconds(self, moved: int, flops: int) -> float:
        """The least time in which so many bytes move and so many FLOPs are done, one hiding the other."""
        return max(moved / self.copy, flops / self.matmul)


class LimitProbes:
    """A copy and a matrix product, to be timed in the same rounds as what they are the limits of.

    The copy is ``out.copy_(x)``, whose bytes are those read and those written: of 2 MiB on the CPU, which
    stay in the caches, of 512 MiB on CUDA, which do not. The product is ``torch.mm`` of two square matrices
    of random numbers, of a side up to 1024 on the CPU and 8192 on CUDA, less where that is slow. On the CPU
    it is a 1x1 convolution of the same size where that is faster: the two come from different libraries;
    and in float32 where dtype is emulated (float16, mostly), which shows in a fourth of the rate. Both are
    rates that PyTorch reaches, not the device's peaks.

    Args:
        device: a CPU or CUDA device.
        dtype: a floating dtype.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        device = torch.device(device)
        x = torch.randn(_COPY_BYTES[device.type] // dtype.itemsize, device=device).to(dtype)
        out = torch.empty_like(x)
        self._copied = 2 * x.nbytes
        self._side = 256
        product = _product(self._side, device, dtype)
        seconds = _seconds(product, device)
        if device.type == "cpu" and dtype.itemsize < 4:
            single = _product(self._side, device, torch.float32)
            single_seconds = _seconds(single, device)
            if 4 * single_seconds < seconds:  # an emulated dtype, not a noisy machine
                seconds, product = single_seconds, single
        while seconds < _LONG_S and self._side < _LARGEST_SIDE[device.type]:
            self._side *= 2
            product = _product(self._side, device, product.args[0].dtype)
            seconds = _seconds(product, device)
        if device.type == "cpu":
            convolution = _convolution(self._side, product.args[0].dtype)
            product = min(product, convolution, key=lambda call: _seconds(call, device))
        self.calls: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(x), "matmul": product}

    def limits(self, times: dict[str, Timing]) -> Limits:
        """The rates, from the times of `calls`."""
        return Limits(self._copied / times["copy"].median, 2 * self._side**3 / times["matmul"].median)


def _product(side: int, device: torch.device, dtype: torch.dtype) -> partial[torch.Tensor]:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _convolution(side: int, dtype: torch.dtype) -> partial[torch.Tensor]:
    """The same product, as a 1x1 convolution."""
    x = torch.randn(1, side, 1, side).to(dtype, memory_format=torch.channels_last)
    return partial(F.conv2d, x, torch.randn(side, side, 1, 1).to(dtype))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    return time_interleaved({"": call}, device=device, rounds=4, warmup=1)[""].p20


def measure_limits(device: torch.device | str, dtype: torch.dtype, *, rounds: int = 20) -> Limits:
    """Measure both rates of `LimitProbes`, interleaved, as medians of so many rounds."""
    with torch.inference_mode():
        probes = LimitProbes(device, dtype)
        return probes.limits(time_interleaved(probes.calls, device=device, rounds=rounds))
