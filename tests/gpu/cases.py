"""What the tests on a device share: each backend's problems, models, tensors that are late or too large."""

from collections.abc import Callable, Iterable
from itertools import product

import pytest
import torch
from contract.common import BF16, F32
from support.operators import MLP, POOL_MIXER, Operator
from support.peers import randomise
from support.problems import Tensors
from torch import Tensor

import poolformer_kernels as pk

LAST = torch.channels_last

# Problems: (shape of x, hidden), of the token mixer (shape, None)
MIXER = ((2, 64, 14, 14), None)
FUSED, PAIR = ((4, 96, 14, 14), 384), ((4, 320, 14, 14), 640)  # Triton's kernels of narrow and of wide MLPs
SMALL = (  # of the CUDA C++ MLP: samples that share tiles; three tiles and more
    ((3, 64, 9, 6), 128),
    ((4, 96, 14, 14), 384),
    ((3, 128, 14, 13), 512),
)


def over(names: str, triton: Iterable[tuple] = (), cuda: Iterable[tuple] = ()) -> pytest.MarkDecorator:
    """Runs a test on each backend's own cases, tuples of the arguments ``names``.

    Triton compiles for every shape, dtype and option, seconds each: there every value appears, but not every
    combination. The CUDA C++ kernels are compiled beforehand and have more cases.
    """
    rows = [("triton", *case) for case in triton] + [("cuda", *case) for case in cuda]
    arguments = ("backend", *names.split(", "))
    return pytest.mark.parametrize(arguments, rows, indirect=["backend"], ids=str)


def each(problems: Iterable[tuple], *axes: Iterable) -> list[tuple]:
    """(shape, hidden, ...) for every problem and combination of the axes."""
    return [(*problem, *rest) for problem, *rest in product(problems, *axes)]


def operator_of(hidden: int | None) -> Operator:
    return POOL_MIXER if hidden is None else MLP


def make_inputs(shape: tuple[int, ...], hidden: int | None, dtype: torch.dtype = F32, **options) -> Tensors:
    return operator_of(hidden).inputs(shape, hidden, dtype, **options)


def s12(dtype: torch.dtype = BF16, memory_format: torch.memory_format = LAST, device="cuda", **options):
    """With numbers that every dtype has."""
    torch.manual_seed(0)
    model = randomise(pk.create_model("poolformer_s12", **options)).to(BF16)
    return model.to(device, dtype, memory_format=memory_format)


def images(batch: int, size=64, dtype=BF16, memory_format=LAST, seed=0, device="cuda") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = -0.3 + torch.randn(batch, 3, size, size, generator=generator)
    return x.bfloat16().to(device, dtype).contiguous(memory_format=memory_format)


def computed_late(call: Callable, *tensors: Tensor):
    """``call`` on a stream that is not the default, of tensors that are written on it just before."""
    late = [torch.zeros_like(t) for t in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # kernels on another stream would read zeros
        for t, value in zip(late, tensors, strict=True):
            t.copy_(value)
        result = call(*late)
    stream.synchronize()
    return result


def huge(shape: tuple[int, ...], layout: str, gib: int) -> Tensor:
    """Random bfloat16 numbers; the test is skipped where the device has less memory."""
    if torch.cuda.get_device_properties(0).total_memory < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of device memory")
    fmt = LAST if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=BF16, device="cuda", memory_format=fmt)
    return x.normal_(-2.3, 0.5, generator=torch.Generator("cuda").manual_seed(0))
