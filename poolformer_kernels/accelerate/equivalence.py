"""Whether a block is what its names say: its own forward is compared with ours on random parameters."""

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType

import torch
from torch import Tensor, nn

from ..nn.chain_cache import PLACE
from ..nn.fusion import MLP
from ..ops.dispatch import use_backend
from ..ops.torch_private import HOOKS, outside_transforms_and_modes
from .blocks import Recipe, accelerated_class
from .layouts import ACT, BlockLayout, activation_of, layout_of

__all__ = ["check_equivalence"]

_NOT_SETTINGS = {*vars(nn.Module()), "forward", PLACE}
_SETTINGS = (bool, int, float, str, type(None), torch.dtype, FunctionType, BuiltinFunctionType)
_DROP_PROB = 0.4
_LOCK = threading.RLock()  # a comparison chooses a backend, which holds for all threads
_compared: dict[tuple, str | None] = {}
Reasons = tuple[str | None, str | None]  # of the token mixer and of the MLP


def check_equivalence(block: nn.Module, original: type[nn.Module]) -> tuple[Recipe, Reasons]:
    """What a block that has a layout becomes, and of both sub-blocks why no operator computes them.

    ``original`` is the block's class without acceleration.
    """
    with _LOCK, outside_transforms_and_modes(), torch.inference_mode(False):
        return _check_equivalence(block, original)


def _check_equivalence(block: nn.Module, original: type[nn.Module]) -> tuple[Recipe, Reasons]:
    layout = layout_of(block)
    reasons = (_forward_reason(original),) * 2
    if reasons[0] is None:
        reasons = tuple(layout.unsupported_reason(block, which) for which in (0, 1))
    types: list[tuple[type, ...] | None] = [None, None]
    for which, reason in enumerate(reasons):
        if reason is None:
            types[which] = tuple(type(part) for part in layout.parts(block, which))
    activation = activation_of(layout.parts(block, MLP)[ACT]) if types[MLP] is not None else None
    recipe = Recipe(original, layout.name, tuple(types), activation)
    if any(types):
        settings = _key(block, original)
        key = None if settings is None else (recipe, settings)
        if key in _compared:
            wrong = _compared[key]
        else:
            wrong = _compare(block, recipe, layout)
            if key is not None:
                _compared[key] = wrong
        if wrong is not None:
            reasons = tuple(reason or wrong for reason in reasons)
            recipe = Recipe(original, layout.name, (None, None), activation)
    return recipe, reasons


def _forward_reason(original: type[nn.Module]) -> str | None:
    owners = [c for c in original.__mro__ if "forward" in vars(c) and c is not nn.Module]
    if len(owners) > 1:
        return f"{owners[0].__name__} overrides the forward of {owners[1].__name__}"
    parameters = [*inspect.signature(original.forward).parameters.values()]
    if len(parameters) != 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return f"the forward of {original.__name__} does not take one tensor"
    return None


def _key(block: nn.Module, original: type[nn.Module]) -> tuple | None:
    """All that the block's forward may depend on besides numbers; None where it has values of other kinds."""
    key = []
    for path, module in block.named_modules(remove_duplicate=False):
        settings = _settings(module)
        if settings is None or any(b is not None for b in module._buffers.values()):
            return None
        parameters = tuple(
            (name, None if p is None else (tuple(p.shape), p.dtype)) for name, p in module._parameters.items()
        )
        made = type(module) if path else original
        key.append((path, made, made.forward, settings, parameters))
    return tuple(key)


def _settings(module: nn.Module) -> tuple | None:
    """A module's own attributes, where all of them are plain values."""
    settings = []
    for name, value in vars(module).items():
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
    theirs, name = recipe.original.forward, recipe.original.__name__
    generator = torch.Generator().manual_seed(0)  # no two parameters get the same values
    try:
        block = _replica(block, generator)
        for which, types in enumerate(recipe.types):
            if types is None:  # both forwards run these modules: any module will do for the comparison
                for part in (layout.norms[which], layout.bodies[which]):
                    block._modules[part] = nn.Identity()
        norm = next(
            block._modules[n] for n, t in zip(layout.norms, recipe.types, strict=True) if t is not None
        )
        x = _random((3, norm.num_channels, 4, 5), generator)
        for training, recording in ((False, False), (False, True), (True, True)):
            block.train(training)
            ys, grads = [], []
            for forward in (theirs, accelerated_class(recipe).forward):
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
    except Exception as error:  # it is somebody else's forward
        return f"the forward of {name} could not be compared with ours: {error}"
    return None


class _TupleOfOneError(Exception):
    pass


def _run(
    forward: Callable, block: nn.Module, x: Tensor, layout: BlockLayout, recording: bool
) -> tuple[Tensor, list[Tensor]]:
    """The result and, where recording, the gradients of x and every parameter; draws are always the same."""
    tensors = [x.detach().requires_grad_(recording), *block.parameters()]
    with (
        use_backend("reference"),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        torch.set_grad_enabled(recording),
    ):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed every device's
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


def _replica(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy without hooks, with random parameters on the CPU, whose DropPaths drop 40 % of the samples."""
    replica = object.__new__(type(module))
    replica.__dict__ = {k: _copied(v) for k, v in vars(module).items() if k != "forward"}
    replica.__dict__ |= {name: OrderedDict() for name in HOOKS}
    if isinstance(module, nn.Dropout):
        replica.p = 0.0
    elif "drop_prob" in vars(module):  # also where it is 0 now: schedules change it
        replica.drop_prob = _DROP_PROB
    replica._parameters = {
        name: p if p is None else nn.Parameter(_random(p.shape, generator))
        for name, p in module._parameters.items()
    }
    replica._buffers = {name: _copied(b) for name, b in module._buffers.items()}
    replica._modules = {
        name: m if m is None else _replica(m, generator) for name, m in module._modules.items()
    }
    return replica


def _copied(value: object) -> object:
    """A float64 copy of a tensor on the CPU; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype, copy=True)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
