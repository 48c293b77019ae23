"""What `torch.vmap` does with our operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .torch_private import OpOverload, tree_leaves, tree_map

__all__ = ["register_batching"]

Results = Tensor | tuple[Tensor, ...]


def register_batching(op: OpOverload, library: torch.library.Library, per_sample: tuple[int, ...]) -> None:
    """Makes ``torch.vmap`` of the op right for all ``in_dims``, with any of its tensors mapped over.

    Where only ``per_sample``, and x first of all, are mapped over, that is one call on a batch as many times
    larger; otherwise (an ensemble whose members have parameters of their own, or a backward, which sums the
    parameters' gradients over the batch) one call after the other.

    Args:
        per_sample: the positions of the arguments whose first dimension is x's batch, x first; where empty,
            it is always one call after the other.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Results, int | tuple[int, ...]]:
        size = info.batch_size
        if size == 0:
            raise ValueError(f"{op.name()} cannot be mapped over a dimension of size 0")
        dims = dict(enumerate(in_dims))
        first = [dims.pop(i) for i in per_sample]
        if first[:1] not in ([], [None]) and all(dim is None for dim in tree_leaves(list(dims.values()))):
            results = _at_once(op, size, dict(zip(per_sample, first, strict=True)), args)
        else:
            results = _one_by_one(op, size, in_dims, args)
        return results, 0 if isinstance(results, Tensor) else (0,) * len(results)

    torch.library.register_vmap(op.name(), rule, lib=library)


def _at_once(op: OpOverload, size: int, dims: dict[int, int | None], args: tuple[Any, ...]) -> Results:
    folded = list(args)
    for i, dim in dims.items():
        if args[i] is not None:
            each = args[i].expand(size, *args[i].shape) if dim is None else args[i].movedim(dim, 0)
            folded[i] = each.flatten(0, 1)
    return _mapped(lambda t: t.reshape(size, t.shape[0] // size, *t.shape[1:]), op(*folded))


def _one_by_one(op: OpOverload, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Results:
    def member(i: int) -> Any:
        return op(*tree_map(lambda arg, dim: arg if dim is None else arg.select(dim, i), args, in_dims))

    members = [member(i) for i in range(size)]
    if isinstance(members[0], Tensor):
        return torch.stack(members)
    return tuple(map(torch.stack, zip(*members, strict=True)))


def _mapped(function: Callable[[Tensor], Tensor], results: Results) -> Results:
    return function(results) if isinstance(results, Tensor) else tuple(map(function, results))
