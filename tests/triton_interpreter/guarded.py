"""Memory between sentinels: whether kernels write all of their outputs, and nothing beside them."""

from collections.abc import Callable

import pytest
import torch

EDGE, SENTINEL = 4096, 123.0


def check_writes(call: Callable[[], object]) -> int:
    """Of what ``call`` allocates each element is written, and none beside it; how many tensors that are."""
    empty, blocks = torch.empty, []

    def guarded(size, *, dtype=None, device=None, memory_format=torch.contiguous_format):
        size = torch.Size([size] if isinstance(size, int) else size)
        block = empty(size.numel() + 2 * EDGE, dtype=dtype, device=device).fill_(SENTINEL)
        blocks.append(block)
        inner = block[EDGE : EDGE + size.numel()]
        if memory_format is torch.channels_last:
            batch, channels, height, width = size
            return inner.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return inner.view(size)

    def guarded_like(t, *, memory_format):
        return guarded(t.shape, dtype=t.dtype, device=t.device, memory_format=memory_format)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        patch.setattr(torch, "empty_like", guarded_like)
        call()
    for block in blocks:
        assert (block[:EDGE] == SENTINEL).all()
        assert (block[-EDGE:] == SENTINEL).all()
        assert not (block[EDGE:-EDGE] == SENTINEL).any()
    return len(blocks)
