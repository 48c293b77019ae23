"""Memory formats."""

import torch
from torch import Tensor

__all__ = ["memory_format_of"]


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format of an operator's output: channels_last if x's channels are innermost."""
    if x.is_contiguous() or x.stride(1) != 1:
        return torch.contiguous_format
    return torch.channels_last
