"""Whether a block is what its names say: its own forward is compared with ours on random parameters."""

import inspect
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.backend import use_backend
from .blocks import Recipe, accelerated_class
from .structures import ACT, MLP, Structure, activation_of, structure_of

__all__ = ["examine"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DROP_PROB = 0.4
_compared: dict[tuple, str | None] = {}


def examine(block: nn.Module, original: type[nn.Module]) -> tuple[Recipe, tuple[str | None, str | None]]:
    """What a block that has a structure becomes, and of both sub-blocks why no operator computes them.

    ``original`` is the block's class without acceleration.
    """
    structure = structure_of(block)
    reasons = (_forward_reason(original),) * 2
    if reasons[0] is None:
        reasons = tuple(structure.foreign_reason(block, which) for which in (0, 1))
    types: list[tuple[type, ...] | None] = [None, None]
    for which, reason in enumerate(reasons):
        if reason is None:
            types[which] = tuple(type(part) for part in structure.parts(block, which))
    activation = activation_of(structure.parts(block, MLP)[ACT]) if types[MLP] is not None else None
    recipe = Recipe(original, structure.name, tuple(types), activation)
    if any(types):
        bodies = (block._modules[name] for name in structure.bodies)
        key = (recipe, *(_settings(module) for module in (block, *bodies)))
        if key not in _compared:
            _compared[key] = _compare(block, recipe, structure)
        if _compared[key] is not None:
            reasons = tuple(reason or _compared[key] for reason in reasons)
            recipe = Recipe(original, structure.name, (None, None), activation)
    return recipe, reasons


def _forward_reason(original: type[nn.Module]) -> str | None:
    owners = [c for c in original.__mro__ if "forward" in vars(c) and c is not nn.Module]
    if len(owners) > 1:
        return f"{owners[0].__name__} overrides the forward of {owners[1].__name__}"
    parameters = [*inspect.signature(original.forward).parameters.values()]
    if len(parameters) != 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return f"the forward of {original.__name__} does not take one tensor"
    return None


def _settings(module: nn.Module) -> tuple:
    """The plain values that a module's forward may depend on."""
    plain = (bool, int, float, str, type(None))
    return tuple((k, v) for k, v in vars(module).items() if isinstance(v, plain) and k != "training")


def _compare(block: nn.Module, recipe: Recipe, structure: Structure) -> str | None:
    """What is wrong with our forward in place of the original, in eval mode and with drop paths drawn."""
    theirs, name = recipe.original.forward, recipe.original.__name__
    block = _replica(block)
    for which, types in enumerate(recipe.types):
        if types is None:  # modules in both: whatever they are, they need not run here
            for part in (structure.norms[which], structure.bodies[which]):
                block._modules[part] = nn.Identity()
    norm = next(
        block._modules[n] for n, t in zip(structure.norms, recipe.types, strict=True) if t is not None
    )
    x = _random(3, norm.num_channels, 4, 5)
    for training in (False, True):
        block.train(training)
        try:
            expected, given = (_run(f, block, x) for f in (theirs, accelerated_class(recipe).forward))
        except Exception as error:  # a forward that is not ours may raise anything
            return f"the forward of {name} could not be compared with ours: {error}"
        if structure.returns_tuple:
            if not isinstance(expected, tuple) or len(expected) != 1:
                return f"the forward of {name} does not return a tuple of one"
            expected, given = expected[0], given[0]
        same = isinstance(expected, Tensor) and expected.shape == given.shape
        if not same or not torch.allclose(expected, given, 1e-9, 1e-9):
            return f"the forward of {name} computes something else than its modules' names say"
    return None


@torch.no_grad()
def _run(forward: Callable, block: nn.Module, x: Tensor) -> Tensor | tuple[Tensor, ...]:
    with use_backend("reference"), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        return forward(block, x)


def _replica(module: nn.Module) -> nn.Module:
    """The module without hooks, with random parameters on the CPU; what is dropped at random, mostly is."""
    replica = object.__new__(type(module))
    replica.__dict__ = {k: v for k, v in vars(module).items() if k != "forward"}
    replica.__dict__ |= {name: OrderedDict() for name in _HOOKS}
    if isinstance(module, nn.Dropout):
        replica.p = 0.0
    elif "drop_prob" in vars(module):
        replica.drop_prob = _DROP_PROB
    replica._parameters = {
        name: p if p is None else nn.Parameter(_random(*p.shape)) for name, p in module._parameters.items()
    }
    replica._modules = {name: m if m is None else _replica(m) for name, m in module._modules.items()}
    return replica


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
