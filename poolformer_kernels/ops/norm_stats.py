"""The statistics operator of the CUDA C++ backend: partials of a sample, for the head of a chain.

Defined where the extension has CUDA kernels; no public function calls it yet.
"""

import torch
from torch import Tensor

from .library import LIBRARY, NAMESPACE

__all__ = ["CHUNK"]

CHUNK = 2048  # elements of one partial, kChunkElements in csrc/cuda/core/norm_stats.cu

# x [B, C, H, W], contiguous or channels_last -> partials [B, ceil(CHW / CHUNK), 3] of (count, mean, M2),
# float32
LIBRARY.define("norm_stats_cuda(Tensor x) -> Tensor")


def _fake(x: Tensor) -> Tensor:
    sample = x.shape[1] * x.shape[2] * x.shape[3]
    return x.new_empty((x.shape[0], (sample + CHUNK - 1) // CHUNK, 3), dtype=torch.float32)


torch.library.register_fake(f"{NAMESPACE}::norm_stats_cuda", _fake, lib=LIBRARY)
