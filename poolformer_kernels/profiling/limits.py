"""The two limits of a layer's time: how fast this device copies, and how fast it multiplies matrices.

`poolformer_kernels.profiling.profile` and the benchmarks both measure them here, so that their fractions of
the limit compare. They are timed in the same rounds as the calls that they limit. The copy, and on CUDA the
product, are rates that PyTorch reaches on this device, not its peaks. On the CPU the second limit is the rate
at which the processor multiplies beside the limited call (`poolformer_kernels.profiling.states`): PyTorch's
product, which no library computes at quite that rate, is timed for comparison. Without the extension there is
no such rate, and the product is the limit as on CUDA.

The copy is ``out.copy_(x)``; its bytes are those read and those written. Its x is as large as the tensor that
the limited calls read: a call that reads a tensor and writes another of that size can at best do what this
copy does, as both find their data in the same cache or memory. A copy of one fixed size would not do: on a
CPU one of 2 MiB may be three times as fast as one of 8 MiB. There is a least size: 2 MiB on the CPU, where a
smaller copy would show what a call costs, and 256 MiB on CUDA, where a smaller one might stay in the L2.

The product is `torch.mm` of random matrices. On CUDA they are square, of side 8192. On the CPU each thread
has a product of side 1024: one such product for all of them would be too small for many threads. The side is
less where that is slow, since a longer product shows no higher rate and is disturbed more often. On the CPU
the product is computed as a 1x1 convolution where that is faster: the two come from different libraries whose
rates may differ twofold. It is in float32 where the CPU emulates the dtype (float16, mostly), because our
kernels compute in float32, too; a dtype counts as emulated below a fourth of float32's rate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from .states import ENOUGH, median_rate, rate_probe
from .throughput import Samples, Timing, sample_interleaved, time_interleaved

__all__ = ["LimitProbes", "Limits", "measure_limits"]

_LEAST_COPY_BYTES = {"cpu": 2**21, "cuda": 2**28}
_SMALLEST_SIDE = 256
_LARGEST_SIDE = {"cpu": 1024, "cuda": 8192}
# A product that lasts this long shows the rate. One of twice the side lasts up to 8 times as long.
_LONG_S = 2.5e-3


@dataclass(frozen=True)
class Limits:
    """Rates of one device in one dtype: bytes per second of a copy, FLOPs per second of products."""

    copy: float
    matmul: float

    def seconds(self, moved: int, flops: int) -> float:
        """The least time in which so many bytes move and so many FLOPs are done, one hiding the other."""
        return max(moved / self.copy, flops / self.matmul)


class LimitProbes:
    """The copy and the product of one device and dtype, to be timed beside the calls that they limit.

    Args:
        device: a CPU or CUDA device.
        dtype: a floating dtype.
        tensor_bytes: the size of the tensor that the limited calls read; the copy has its least size without.

    Attributes:
        calls: the two calls, ``"copy"`` and ``"matmul"``.
        copied: bytes that a copy reads and writes.
        flops: FLOPs of a product.
        rate: the probe of the processor's own rate; None where there is none.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, tensor_bytes: int = 0) -> None:
        self.device = device = torch.device(device)
        self.rate = rate_probe(device, dtype)
        elements = max(tensor_bytes, _LEAST_COPY_BYTES[device.type]) // dtype.itemsize
        x = torch.randn(elements, device=device, dtype=dtype)
        out = torch.empty_like(x)
        product = _choose_product(device, dtype)
        rows, side = product.args[0].shape
        self.copied = 2 * x.nbytes
        self.flops = 2 * rows * side**2
        self.calls: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(x), "matmul": product}
        if device.type == "cpu":
            convolution = _as_convolution(product)
            self.calls["matmul"] = min(product, convolution, key=lambda call: _seconds(call, device))

    def sample(
        self, limited: dict[str, Callable[[], object]], *, rounds: int, budget_s: float = float("inf")
    ) -> dict[str, Samples]:
        """Samples of the limited calls and of `calls`, interleaved; by state, the faster first."""
        options = {"device": self.device, "rounds": rounds, "budget_s": budget_s}
        every_call = {**limited, **self.calls}
        if self.rate is None:
            return {"": sample_interleaved(every_call, **options)}
        enough = self.rate.enough if rounds > ENOUGH else None  # a few rounds are asked for to be quick
        samples = sample_interleaved(every_call, probe=self.rate, enough=enough, **options)
        return self.rate.split(samples)

    def limits(self, samples: Samples, call: str = "matmul") -> Limits:
        """The limits of a call, from the samples of one state."""
        copy, product = (Timing.of([s.seconds for s in samples[name]]).median for name in ("copy", "matmul"))
        return Limits(self.copied / copy, median_rate(samples[call]) or self.flops / product)


def _choose_product(device: torch.device, dtype: torch.dtype) -> partial[torch.Tensor]:
    side = _SMALLEST_SIDE
    product = _product(side, device, dtype)
    seconds = _seconds(product, device)
    if device.type == "cpu" and dtype.itemsize < 4:
        single = _product(side, device, torch.float32)
        single_seconds = _seconds(single, device)
        if 4 * single_seconds < seconds:  # noise alone does not make such a factor
            seconds, product, dtype = single_seconds, single, torch.float32
    while seconds < _LONG_S and side < _LARGEST_SIDE[device.type]:
        side *= 2
        product = _product(side, device, dtype)
        seconds = _seconds(product, device)
    return product


def _product(side: int, device: torch.device, dtype: torch.dtype) -> partial[torch.Tensor]:
    """A square matrix of this side, or one such for each thread of a CPU, times another one."""
    rows = side * torch.get_num_threads() if device.type == "cpu" else side
    a, b = (torch.randn(n, side, device=device, dtype=dtype) for n in (rows, side))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _as_convolution(product: partial[torch.Tensor]) -> partial[torch.Tensor]:
    """The product as a 1x1 convolution, of an image for each thread."""
    a, b = product.args
    side = len(b)
    return partial(F.conv2d, a.view(-1, side // 32, 32, side).permute(0, 3, 1, 2), b[:, :, None, None])


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    return time_interleaved({"": call}, device=device, rounds=4, warmup=1)[""].p20


def measure_limits(device: torch.device | str, dtype: torch.dtype, *, rounds: int = 20) -> Limits:
    """Measure both rates of `LimitProbes`, interleaved, as medians of so many rounds."""
    with torch.inference_mode():
        probes = LimitProbes(device, dtype)
        return probes.limits(next(iter(probes.sample({}, rounds=rounds).values())))
