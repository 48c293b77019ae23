"""Statistics of a sample in Triton: partials of a tensor nobody has read yet, and merging partials (Chan)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import MERGED, OPTIONS, flat_block

__all__ = ["few", "flat_stats", "merge_stats", "merged", "sample_stats"]


@triton.jit
def merged(stats_ptr, b, T, MERGE: tl.constexpr):
    """(mean, variance) of a sample from its partials (Chan), relative to the first partial's mean."""
    t = tl.arange(0, MERGE)
    at = stats_ptr + b * T * 3 + t * 3
    count = tl.load(at, mask=t < T, other=0.0)
    first = tl.load(stats_ptr + b * T * 3 + 1)
    mean = tl.load(at + 1, mask=t < T, other=0.0) - first
    m2 = tl.load(at + 2, mask=t < T, other=0.0)
    total = tl.sum(count)
    mean_off = tl.sum(count * mean) / total
    return first + mean_off, tl.sum(m2 + count * (mean - mean_off) * (mean - mean_off)) / total


@triton.jit(do_not_specialize=["tiles"])
def sample_stats(x_ptr, stats_ptr, N, tiles, BLOCK: tl.constexpr):
    """Partial (count, mean, M2) of BLOCK elements of a sample, one contiguous run in both layouts."""
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    start = (pid % tiles).to(tl.int64) * BLOCK
    ptr = x_ptr + b * N + start
    left = N - start
    lane = tl.arange(0, BLOCK)
    first = tl.load(ptr).to(tl.float32)
    value = tl.load(ptr + lane, mask=lane < left, other=0.0).to(tl.float32)
    value = tl.where(lane < left, value - first, 0.0)
    count = tl.minimum(left, BLOCK).to(tl.float32)
    mean = tl.sum(value) / count
    m2 = tl.sum(tl.where(lane < left, (value - mean) * (value - mean), 0.0))
    out = stats_ptr + pid.to(tl.int64) * 3
    tl.store(out, count)
    tl.store(out + 1, first + mean)
    tl.store(out + 2, m2)


@triton.jit(do_not_specialize=["T"])
def merge_stats(stats_ptr, merged_ptr, T, BLOCK: tl.constexpr):
    """Any number of partials of a sample into one: Chan's update lane by lane, then across the lanes."""
    b = tl.program_id(0).to(tl.int64)
    base = stats_ptr + b * T * 3
    first = tl.load(base + 1)
    count = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < T:
        t = start + tl.arange(0, BLOCK)
        at = base + t * 3
        n = tl.load(at, mask=t < T, other=0.0)
        delta = tl.where(t < T, tl.load(at + 1, mask=t < T, other=0.0) - first - mean, 0.0)
        share = tl.where(n > 0, n / tl.maximum(count + n, 1.0), 0.0)
        m2 += tl.load(at + 2, mask=t < T, other=0.0) + delta * delta * count * share
        mean += delta * share
        count += n
        start += BLOCK
    total = tl.sum(count)
    mean_off = tl.sum(count * mean) / total
    out = merged_ptr + b * 3
    tl.store(out, total)
    tl.store(out + 1, first + mean_off)
    tl.store(out + 2, tl.sum(m2 + count * (mean - mean_off) * (mean - mean_off)))


def flat_stats(x: Tensor) -> Tensor:
    """Partials of x, which is one contiguous run per sample."""
    batch = x.shape[0]
    elements = x.shape[1] * x.shape[2] * x.shape[3]
    block, warps = flat_block(elements)
    tiles = triton.cdiv(elements, block)
    stats = torch.empty((batch, tiles, 3), dtype=torch.float32, device=x.device)
    sample_stats[(batch * tiles,)](x, stats, elements, tiles, block, num_warps=warps, **OPTIONS)
    return stats


def few(stats: Tensor) -> Tensor:
    """At most MERGED partials a sample: what a kernel merges on the way."""
    batch, partials, _ = stats.shape
    if partials <= MERGED:
        return stats
    one = torch.empty((batch, 1, 3), dtype=torch.float32, device=stats.device)
    merge_stats[(batch,)](stats, one, partials, MERGED, **OPTIONS)
    return one
