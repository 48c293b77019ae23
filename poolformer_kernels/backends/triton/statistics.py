"""Statistics of a sample in Triton: partials of a tensor that comes without any, and their merging.

A partial is (count, mean, M2) of some elements of a sample, in fp32; M2 is the sum of the squared deviations
from the mean. Partials are merged by Chan's formula: docs/algebra.md, "Statistics".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import MAX_PARTIALS, OPTIONS, ceil_div, stats_block
from .launch import kernel

__all__ = ["limit_partials", "merge_partials", "merge_stats", "sample_stats", "tensor_partials"]


@triton.jit
def merge_partials(stats_ptr, b, T, MERGE: tl.constexpr):
    """(mean, variance) of sample b from its T partials; MERGE is a power of two, at least T.

    Means are taken relative to the first partial's, so that a large one costs no digits.
    """
    t = tl.arange(0, MERGE)
    ptrs = stats_ptr + b * T * 3 + t * 3
    count = tl.load(ptrs, mask=t < T, other=0.0)
    origin = tl.load(stats_ptr + b * T * 3 + 1)
    mean = tl.load(ptrs + 1, mask=t < T, other=0.0) - origin
    m2 = tl.load(ptrs + 2, mask=t < T, other=0.0)
    total = tl.sum(count)
    offset = tl.sum(count * mean) / total
    return origin + offset, tl.sum(m2 + count * (mean - offset) * (mean - offset)) / total


@kernel(do_not_specialize=["tiles"])
def sample_stats(x_ptr, stats_ptr, N, tiles, BLOCK: tl.constexpr):
    """The partial of BLOCK elements of a sample, which is one contiguous run in either layout.

    x_ptr: x [B, N]
    stats_ptr: output partials [B, tiles, 3], fp32
    N: elements of a sample
    tiles: partials of a sample
    BLOCK: elements of a partial, a power of two; a sample's last may have fewer
    """
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    start = (pid % tiles).to(tl.int64) * BLOCK
    ptr = x_ptr + b * N + start
    rest = N - start
    lane = tl.arange(0, BLOCK)
    origin = tl.load(ptr).to(tl.float32)
    value = tl.load(ptr + lane, mask=lane < rest, other=0.0).to(tl.float32)
    value = tl.where(lane < rest, value - origin, 0.0)
    count = tl.minimum(rest, BLOCK).to(tl.float32)
    mean = tl.sum(value) / count
    m2 = tl.sum(tl.where(lane < rest, (value - mean) * (value - mean), 0.0))
    out = stats_ptr + pid.to(tl.int64) * 3
    tl.store(out, count)
    tl.store(out + 1, origin + mean)
    tl.store(out + 2, m2)


@kernel(do_not_specialize=["T"])
def merge_stats(stats_ptr, merged_ptr, T, BLOCK: tl.constexpr):
    """Merges all partials of a sample into one: each lane merges its own, then the lanes are merged.

    stats_ptr: partials [B, T, 3], fp32
    merged_ptr: output partials [B, 1, 3], fp32
    T: partials of a sample
    BLOCK: lanes, a power of two
    """
    b = tl.program_id(0).to(tl.int64)
    base = stats_ptr + b * T * 3
    origin = tl.load(base + 1)
    count = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < T:
        t = start + tl.arange(0, BLOCK)
        ptrs = base + t * 3
        n = tl.load(ptrs, mask=t < T, other=0.0)
        delta = tl.where(t < T, tl.load(ptrs + 1, mask=t < T, other=0.0) - origin - mean, 0.0)
        share = tl.where(n > 0, n / tl.maximum(count + n, 1.0), 0.0)
        m2 += tl.load(ptrs + 2, mask=t < T, other=0.0) + delta * delta * count * share
        mean += delta * share
        count += n
        start += BLOCK
    total = tl.sum(count)
    offset = tl.sum(count * mean) / total
    out = merged_ptr + b * 3
    tl.store(out, total)
    tl.store(out + 1, origin + offset)
    tl.store(out + 2, tl.sum(m2 + count * (mean - offset) * (mean - offset)))


def tensor_partials(x: Tensor) -> Tensor:
    """Partials ``[B, T, 3]`` of x, whose samples are contiguous."""
    batch = x.shape[0]
    elements = x.shape[1] * x.shape[2] * x.shape[3]
    block, warps = stats_block(elements)
    tiles = ceil_div(elements, block)
    stats = torch.empty((batch, tiles, 3), dtype=torch.float32, device=x.device)
    sample_stats[(batch * tiles,)](x, stats, elements, tiles, block, num_warps=warps, **OPTIONS)
    return stats


def limit_partials(stats: Tensor) -> Tensor:
    """The partials as they are, or merged into one a sample where there are more than MAX_PARTIALS."""
    batch, partials, _ = stats.shape
    if partials <= MAX_PARTIALS:
        return stats
    one = torch.empty((batch, 1, 3), dtype=torch.float32, device=stats.device)
    merge_stats[(batch,)](stats, one, partials, MAX_PARTIALS, **OPTIONS)
    return one
