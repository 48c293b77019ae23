"""Calls of Triton's operators that were made before, on tensors like these, run again from C++.

What the launchers in Python decide (tiles, memory, the order of launches) depends on the other arguments and
on the tensors' shapes, dtypes, layouts and alignment alone. So it is decided once, written down and replayed.
"""

import logging
from collections import defaultdict
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from ...layout import memory_format_of
from ...ops.torch_private import below_autograd
from .launch import hooks_set, launching_unavailable
from .recorder import Recorder, fact

__all__ = ["Replayed"]

_log = logging.getLogger("poolformer_kernels")
_numbers = count()
_EXACT = {Tensor, torch.nn.Parameter}
_replay = torch.ops.poolformer_kernels.replay.default


class Replayed:
    """An operator's calls: ``replayed(args)`` returns its results, or None where it must be called otherwise.

    Args:
        function: the launcher in Python.
        tensors: how many of its first arguments are tensors or None; the others are hashable.
        backward: whether the first two are the gradient of y and x.
    """

    def __init__(self, function: Callable, tensors: int, backward: bool) -> None:
        self._function, self._tensors, self._backward = function, tensors, backward
        self._settings: dict[tuple, int] = {}  # numbers of what the arguments but for the tensors say
        self._refused: dict[int, set[tuple]] = defaultdict(set)  # by settings, shapes that have no plan

    def __call__(self, args: tuple) -> tuple[Tensor, ...] | None:
        if self._backward:  # autograd's gradients may be expanded; a copy is no kernel's launch
            args = (args[0].contiguous(memory_format=memory_format_of(args[1])), *args[1:])
        tensors = args[: self._tensors]
        given = [t for t in tensors if t is not None]
        if (
            not tensors[0].is_cuda
            or not set(map(type, given)) <= _EXACT
            or launching_unavailable() is not None
            or hooks_set()
        ):
            return None
        key = (args[self._tensors :], tuple([t is None for t in tensors]))
        settings = self._settings.get(key)
        if settings is None:
            settings = self._settings[key] = next(_numbers)
        elif settings in self._refused and tuple(t.shape for t in given) in self._refused[settings]:
            return None
        with below_autograd():
            results = _replay(given, settings)
        return tuple(results) if results else self._record(args, given, settings)

    def _record(self, args: tuple, given: list[Tensor], settings: int) -> tuple[Tensor, ...]:
        from ..._C import Tape

        tape = Tape()
        with below_autograd(), Recorder(tape):
            results = self._function(*args)
        try:
            tape.finish_call(settings, [*map(fact, given)], [*map(fact, results)], given[0].get_device())
        except RuntimeError as error:
            _log.info(
                "calls of %s on %s are not replayed: %s", self._function.__module__, given[0].shape, error
            )
            self._refused[settings].add(tuple(t.shape for t in given))
        return results
