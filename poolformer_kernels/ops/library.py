"""The torch.library namespace that every operator is defined in, and how operators are called."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..layout import memory_format_of
from .batching import register_batching
from .torch_private import (
    OpOverload,
    any_requires_grad,
    below_autograd,
    differentiating_transform,
    dispatch_modes,
    forward_mode,
    in_transform,
)

__all__ = [
    "LIBRARY",
    "NAMESPACE",
    "call",
    "empty_output",
    "refuse_forward_derivatives",
    "register",
    "register_replay",
]

NAMESPACE = "poolformer_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_FUNCTIONS: dict[OpOverload, type[torch.autograd.Function]] = {}  # for each op that has a backward
_REPLAYS: dict[OpOverload, Callable[[tuple[Any, ...]], tuple[Tensor, ...] | None]] = {}


def register_replay(name: str, replay: Callable[[tuple[Any, ...]], tuple[Tensor, ...] | None]) -> None:
    """``replay(arguments)`` returns what the op of this name would, or None; it is tried first.

    It calls no operator that a dispatch mode could see, so under one the op is called.
    """
    _REPLAYS[getattr(torch.ops.poolformer_kernels, name).default] = replay


def _run(op: OpOverload, args: tuple):
    """The op's results, where nothing is to be recorded for autograd."""
    replay = _REPLAYS.get(op)
    if replay is not None and not dispatch_modes():
        results = replay(args)
        if results is not None:
            return results
    with below_autograd():
        return op(*args)


def refuse_forward_derivatives(operator: str, backend: str, tensors: tuple[Tensor | None, ...]) -> None:
    """Raise where forward-mode derivatives are asked for: kernels have none, and would give zero."""
    if torch.compiler.is_compiling():
        if forward_mode():
            raise RuntimeError(f"{operator} on the {backend!r} backend has no forward-mode derivative")
        return
    dual = forward_mode()
    if not dual and not in_transform():
        return
    dual = dual and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors if t is not None)
    if dual or differentiating_transform():
        raise RuntimeError(
            f"{operator} on the {backend!r} backend has no forward-mode derivative and no torch.func"
            " gradient; use poolformer_kernels.use_backend('reference')"
        )


def call(op: OpOverload, *args: Any) -> Any:
    """The op on these arguments, by the shortest way through the dispatcher.

    `torch.library.register_autograd` walks through the schema in each call that autograd records, which takes
    0.1 ms. `_FUNCTIONS` do the same without it.
    """
    if (
        torch.compiler.is_compiling()
        or in_transform()  # inside one, tensors do not say that they require gradients
        or torch.jit.is_tracing()  # a trace records operators, but no autograd.Function
    ):
        return op(*args)
    if torch.is_grad_enabled() and any_requires_grad(*args):
        return _FUNCTIONS[op].apply(*args) if op in _FUNCTIONS else op(*args)
    return _run(op, args)


def empty_output(x: Tensor) -> Tensor:
    """An output for x: its shape and dtype, the memory format of an operator's result."""
    return torch.empty_like(x, memory_format=memory_format_of(x))


def register(
    operator: str,
    backend: str,
    schemas: tuple[str, str],
    fakes: tuple[Callable[..., object], Callable[..., object]],
    setup_context: Callable[..., None],
    backward: Callable[..., object],
    per_sample: tuple[int, ...],
) -> tuple[OpOverload, OpOverload]:
    """Defines one backend's (forward, backward) ops, differentiable once; kernels register themselves.

    Args:
        per_sample: the positions of the forward's arguments whose first dimension is the batch, x first.
    """

    def double_backward(ctx, *_):
        raise RuntimeError(
            f"{operator} on the {backend!r} backend has no second derivative;"
            " use poolformer_kernels.use_backend('reference') for double backward"
        )

    names = (f"{operator}_{backend}", f"{operator}_{backend}_backward")
    for name, schema, fake in zip(names, schemas, fakes, strict=True):
        LIBRARY.define(schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    forward, derivative = (f"{NAMESPACE}::{name}" for name in names)
    torch.library.register_autograd(forward, backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(derivative, double_backward, lib=LIBRARY)
    ops = tuple(getattr(torch.ops.poolformer_kernels, name).default for name in names)
    register_batching(ops[0], LIBRARY, per_sample)
    register_batching(ops[1], LIBRARY, ())

    def function_forward(ctx, *args):
        output = _run(ops[0], args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(function_forward), "backward": staticmethod(backward)}
    _FUNCTIONS[ops[0]] = type(names[0], (torch.autograd.Function,), methods)
    return ops
