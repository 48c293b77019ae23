"""Whether a block is what its names say: its own forward is compared with ours on random parameters."""

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Set
from dataclasses import fields, replace
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..nn.chain_cache import PLACE, modules_of
from ..nn.fusion import MIXER, MLP, Operators
from ..nn.names import class_path
from ..ops.torch_private import CALLED_INSTEAD, HOOKS, OwnRandomNumbers, outside_transforms_and_modes
from .layouts import ACT, BlockLayout, activation_of, layout_of
from .recipe import Recipe

__all__ = ["check_equivalence"]

_NOT_SETTINGS = {*vars(nn.Module()), *CALLED_INSTEAD, PLACE}
_SETTINGS = (bool, int, float, str, type(None), torch.dtype, FunctionType, BuiltinFunctionType)
_DROP_PROB = 0.4
_LOCK = threading.RLock()  # threads that ask for equal blocks wait for one comparison
_compared: dict[tuple[Any, ...], str | None] = {}


class _ReferenceOperators(Operators):
    """The operators' equations on any backend: to choose the reference would choose it for all threads."""

    def pool_mixer(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        del options["return_stats"]
        return reference.pool_mixer(x, weight, bias, **options), None

    def mlp(
        self, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        del options["return_stats"], options["save_hidden"]
        return reference.mlp(x, w1, b1, w2, b2, **options), None

    def stats_are_free(self, x: Tensor) -> bool:
        return False


class _InReference(BlockLayout):
    operators = _ReferenceOperators()


def check_equivalence(
    block: nn.Module,
    original: type[nn.Module],
    wanted: tuple[bool, bool] = (True, True),
    save_hidden: bool | None = None,
) -> Recipe:
    """What a block that has a layout becomes.

    Args:
        original: the block's class without acceleration.
        wanted: whether the mixer and the MLP shall be operator calls where that computes the same.
        save_hidden: see `poolformer_kernels.ops.mlp`.
    """
    with _LOCK, outside_transforms_and_modes(), torch.inference_mode(False):
        recipe = _check_equivalence(block, original)
    return replace(recipe, wanted=wanted, save_hidden=save_hidden)


def _check_equivalence(block: nn.Module, original: type[nn.Module]) -> Recipe:
    layout = layout_of(block)
    types: list[tuple[type, ...] | None] = [None, None]
    for which in (MIXER, MLP):
        if layout.unsupported_reason(block, which) is None:
            types[which] = tuple(type(part) for part in layout.parts(block, which))
    activation = activation_of(layout.parts(block, MLP)[ACT]) if types[MLP] is not None else None
    recipe = Recipe(original, layout.name, tuple(types), activation, _forward_reason(original))
    if recipe.wrong is not None or not any(types):
        return recipe
    settings = _key(block, original)
    key = None if settings is None else (recipe, settings)
    if key in _compared:
        wrong = _compared[key]
    else:
        try:
            wrong = _compare(block, recipe, layout)
        except Exception as error:  # it is somebody else's forward, or the memory is full for the moment
            wrong = f"the forward of {class_path(original)} could not be compared with ours: {error}"
        else:
            if key is not None:
                _compared[key] = wrong
    return replace(recipe, wrong=wrong)


def _forward_reason(original: type[nn.Module]) -> str | None:
    owners = [c for c in original.__mro__ if "forward" in vars(c) and c is not nn.Module]
    if len(owners) > 1:
        return f"{class_path(owners[0])} overrides the forward of {class_path(owners[1])}"
    parameters = [*inspect.signature(original.forward).parameters.values()]
    if len(parameters) != 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return f"the forward of {class_path(original)} does not take one tensor"
    return None


def _key(block: nn.Module, original: type[nn.Module]) -> tuple[Any, ...] | None:
    """All that the block's forward may depend on besides numbers; None where it has values of other kinds."""
    key = []
    for path, module in modules_of(block, again=True):
        settings = _settings(module)
        if settings is None or any(b is not None for b in [*module._buffers.values()]):
            return None
        parameters = tuple(
            (name, None if p is None else (tuple(p.shape), p.dtype))
            for name, p in module._parameters.copy().items()
        )
        made = type(module) if path else original
        key.append((path, made, made.forward, settings, parameters))
    return tuple(key)


def _settings(module: nn.Module) -> tuple[Any, ...] | None:
    """A module's own attributes, where all of them are plain values."""
    settings = []
    for name, value in vars(module).copy().items():  # a call in another thread may add some
        if name in _NOT_SETTINGS or (name == "p" and isinstance(module, nn.Dropout)):
            continue
        if name == "drop_prob":
            value = bool(value)
        if not all(isinstance(v, _SETTINGS) for v in (value if isinstance(value, tuple) else (value,))):
            return None
        settings.append((name, type(value), value))
    return tuple(settings)


def _compare(block: nn.Module, recipe: Recipe, layout: BlockLayout) -> str | None:
    """What differs between our forward and the original in results and gradients, in words; None: nothing."""
    theirs, name = recipe.original.forward, class_path(recipe.original)
    in_reference = _InReference(**{field.name: getattr(layout, field.name) for field in fields(layout)})

    def ours(block: nn.Module, x: Tensor) -> Tensor | tuple[Tensor]:
        y, _ = in_reference.run(block, x, recipe.fused(block), activation=recipe.activation)
        return (y,) if layout.returns_tuple else y

    generator = torch.Generator().manual_seed(0)  # no two parameters get the same values
    try:
        # Both forwards run the modules that no operator computes: any module will do for the comparison.
        missing = [which for which, types in enumerate(recipe.types) if types is None]
        left_out = {name for which in missing for name in (layout.norms[which], layout.bodies[which])}
        block = _replica(block, generator, left_out)
        norm = next(
            block._modules[n] for n, t in zip(layout.norms, recipe.types, strict=True) if t is not None
        )
        x = _random((3, norm.num_channels, 4, 5), generator)
        for training, recording in ((False, False), (False, True), (True, True)):
            block.train(training)
            ys, grads = [], []
            for forward in (theirs, ours):
                y, given = _run(forward, block, x, layout, recording)
                ys.append(y)
                grads.append(given)
            # The largest of all gradients, because some are zero but for rounding.
            size = max([0.0, *(g.abs().max().item() for g in grads[0])])
            same = _close(*ys, ys[0].abs().max().item())
            if not same or not all(_close(*pair, size) for pair in zip(*grads, strict=True)):
                return f"the forward of {name} computes something else than its modules' names say"
    except _TupleOfOneError:
        return f"the forward of {name} does not return a tuple of one"
    return None


class _TupleOfOneError(Exception):
    pass


def _run(
    forward: Callable[..., Any], block: nn.Module, x: Tensor, layout: BlockLayout, recording: bool
) -> tuple[Tensor, list[Tensor]]:
    """The result and, where recording, the gradients of x and every parameter; draws are always the same."""
    tensors = [x.detach().requires_grad_(recording), *block.parameters()]
    with OwnRandomNumbers(), torch.autocast("cpu", enabled=False), torch.set_grad_enabled(recording):
        y = forward(block, tensors[0])
        if layout.returns_tuple:
            if not isinstance(y, tuple) or len(y) != 1:
                raise _TupleOfOneError
            (y,) = y
        if not recording:
            return y, []
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device="cpu").view(y.shape)
        return y.detach(), [*torch.autograd.grad(y, tensors, weights, materialize_grads=True)]


def _close(expected: Tensor, given: Tensor, size: float) -> bool:
    return expected.shape == given.shape and bool((expected - given).abs().max() <= 1e-9 * size)


def _replica(module: nn.Module, generator: torch.Generator, left_out: Set[str] = frozenset()) -> nn.Module:
    """A copy without hooks, with random parameters on the CPU, whose DropPaths drop 40 % of the samples.

    Instead of the modules of the names ``left_out`` it has Identities.
    """
    attributes = vars(module).copy()  # a call in another thread may add some
    values = {name: _copied(value) for name, value in attributes.items() if name not in CALLED_INSTEAD}
    values |= {name: OrderedDict() for name in HOOKS}
    if isinstance(module, nn.Dropout):
        values["p"] = 0.0
    elif "drop_prob" in values:  # also where it is 0 now: schedules change it
        values["drop_prob"] = _DROP_PROB
    values["_parameters"] = {
        name: p if p is None else nn.Parameter(_random(p.shape, generator))
        for name, p in module._parameters.copy().items()
    }
    values["_buffers"] = {name: _copied(b) for name, b in module._buffers.copy().items()}
    values["_modules"] = {
        name: m if m is None else nn.Identity() if name in left_out else _replica(m, generator)
        for name, m in module._modules.copy().items()
    }
    replica = object.__new__(type(module))
    vars(replica).update(values)  # to set an attribute of a module may set one of what it wraps
    return replica


def _copied(value: object) -> object:
    """A float64 copy of a tensor on the CPU; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype, copy=True)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
