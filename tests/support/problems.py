"""Random numbers, dtypes, and statistics as another kernel hands them on."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

BACKENDS = ("reference", "cpp")
HALVES = (torch.bfloat16, torch.float16)
Tensors = dict[str, Tensor | None]


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, sigma: float = 1.0, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)
    return (mean + sigma * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def seeded(function: Callable, *args, seed: int = 0):
    """The function's result, with the random numbers that come after this seed."""
    torch.manual_seed(seed)
    return function(*args)


def tiled_stats(x: Tensor, tiles: int) -> Tensor:
    """Partials of x's samples over ``tiles`` uneven pieces, from fp64, as another kernel hands them on."""
    flat = x.detach().double().flatten(1)
    size = flat.shape[1]
    edges = [0, *sorted({max(1, size * i * i // tiles**2) for i in range(1, tiles)} - {size}), size]
    pieces = [flat[:, a:b] for a, b in itertools.pairwise(edges)]
    partials = [
        torch.stack([torch.full_like(p[:, 0], p.shape[1]), p.mean(1), p.var(1, correction=0) * p.shape[1]], 1)
        for p in pieces
    ]
    return torch.stack(partials, 1).to(torch.promote_types(x.dtype, torch.float32))
