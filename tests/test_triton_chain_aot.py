"""The kernels of the CUDA chain, compiled for every architecture without a GPU: no spills, wide accesses."""

import itertools
from typing import NamedTuple

import pytest
import torch
from contract.cases import covering
from support.ttgir import DEVICES, aot, compiled

from poolformer_kernels.backends.triton import chain

LAST = torch.channels_last
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ChainCase(NamedTuple):
    """What follows a convolution, and a head, of one width."""

    dtype: torch.dtype
    channels: int
    size: int
    offset: int = 0  # elements before each of the caller's tensors in its memory

    def call(self) -> None:
        x = aot.meta(self.dtype, 2, self.channels, self.size, self.size, offset=self.offset, fmt=LAST)
        weight, bias = (aot.meta(self.dtype, self.channels, offset=self.offset) for _ in range(2))
        stats = chain.add_bias(x, bias, True)
        chain.add_bias(x, None, True)
        chain.add_bias(x, bias, False)
        chain.head(x, weight, bias, stats, 1e-5)
        chain.head(x, weight, bias, None, 1e-6)


SHAPES = ((64, 56), (320, 14), (512, 7), (768, 7), (33, 9))
CASES = [*itertools.product(DTYPES, (0, 1), SHAPES, aot.ARCHS)]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("dtype", "offset", "shape", "arch"), [CASES[i] for i in sorted(covering(CASES, 2))], ids=str
)
def test_resources(dtype, offset, shape, arch) -> None:
    """Half operands of aligned images are loaded and stored by 16 bytes a thread, where C is even."""
    launches = aot.distinct([ChainCase(DTYPES[dtype], *shape, offset)], DEVICES[arch])
    assert {launch.kernel for launch in launches} == {"bias_stats", "pool_head"}
    for launch in launches:
        used = compiled(launch, arch)
        assert used.registers <= 128, launch
        assert used.shared <= 48 << 10, launch
        if launch.kernel == "bias_stats" and offset == 0 and shape[0] % 8 == 0:
            assert used.ldg128 > 0, launch
