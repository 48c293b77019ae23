"""The classes of what is accelerated: a block's is its own class with another forward.

The class of an instance changes and not the instance. A forward set on the instance would be a reference of
the module to itself, which replicas of DataParallel and other shallow copies take along and then compute with
the original's parameters; pickle would find a method by its name, which is the class's own forward; and our
own checks, like other packages', take such a forward for a hook. The class has the original's name, because
some look for it (``_no_split_modules``), and so cannot be found by it: `__reduce_ex__` names its recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps

import torch
from torch import Tensor, nn

from ..layout import memory_format_of
from ..nn.chain_cache import calls_more, run_chain
from ..ops.chain import Chain
from .layouts import ACT, MIXER, MLP, STAR_RELU, STRUCTURES, Structure, activation_of
from .run import add_to_chain, run, takes

__all__ = ["Recipe", "Sequential", "accelerated_class", "recipe_of"]

_RECIPE = "_poolformer_kernels_recipe"


@dataclass(frozen=True)
class Recipe:
    """What the class of an accelerated block is made from; equal recipes make the same class."""

    original: type[nn.Module]
    name: str  # of the structure
    types: tuple[tuple[type, ...] | None, tuple[type, ...] | None]  # of a sub-block's parts, None: modules
    activation: str | None

    @property
    def structure(self) -> Structure:
        return STRUCTURES[self.name]

    def unfused_reason(self, block: nn.Module, which: int) -> str | None:
        """Why a call of the block now runs a sub-block's modules, or None where it is an operator call."""
        structure = self.structure
        reason = structure.foreign_reason(block, which, self.activation)
        if reason is not None:
            return reason
        if self.types[which] is None:
            return f"accelerate was called with {('mixer', 'mlp')[which]}=False"
        parts = structure.parts(block, which)
        replaced = tuple([type(part) for part in parts]) != self.types[which]
        if which == MLP and (type(parts[ACT]) is nn.GELU or self.activation == STAR_RELU):
            replaced |= activation_of(parts[ACT]) != self.activation
        if replaced:
            return f"a module of {structure.bodies[which]} or around it was replaced after accelerate"
        return structure.passing_reason(block, which)

    def fused(self, block: nn.Module) -> tuple[bool, bool]:
        """Whether the mixer and the MLP are operator calls now."""
        return self.unfused_reason(block, MIXER) is None, self.unfused_reason(block, MLP) is None


def recipe_of(block: nn.Module) -> Recipe | None:
    """The recipe of an accelerated block, also where its class was derived further, as by fully_shard."""
    return getattr(type(block), _RECIPE, None)


@lru_cache(None)
def accelerated_class(recipe: Recipe) -> type[nn.Module]:
    """The original class with our forward; one for each recipe."""
    original, structure = recipe.original, recipe.structure

    @wraps(original.forward)  # TorchScript compiles the source that it finds behind this
    def forward(self, *given, **named):
        x = given[0] if len(given) == 1 and not named else None
        if not takes(x):
            return original.forward(self, *given, **named)
        fused = recipe.fused(self)
        if not any(fused):
            return original.forward(self, x)
        y = run_chain(self, x, _channels_last(x)) if all(fused) else None
        if y is None:
            y, _ = run(structure, self, x, fused, recipe.activation)
        return (y,) if structure.returns_tuple else y

    def add_to(self, chain: Chain) -> bool:
        """Adds the block to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        return all(recipe.fused(self)) and add_to_chain(structure, self, recipe.activation, chain)

    def reduce(self, protocol):
        reduced = original.__reduce_ex__(self, protocol)
        if isinstance(reduced, tuple) and reduced[1] and reduced[1][0] is made:
            make, (_, *arguments), *rest = reduced
            return (_rebuild, (recipe, make, *arguments), *rest)
        return reduced

    own = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"forward": forward, "add_to": add_to, "__reduce_ex__": reduce, _RECIPE: recipe}
    made = type(original)(original.__name__, (original,), own)
    return made


def _rebuild(recipe: Recipe, make: Callable[..., nn.Module], *arguments) -> nn.Module:
    return make(accelerated_class(recipe), *arguments)


class Sequential(nn.Sequential):
    """A stage of accelerated blocks; see `poolformer_kernels.nn.PoolFormerStage`."""

    @wraps(nn.Sequential.forward)
    def forward(self, *given, **named):
        x = given[0] if len(given) == 1 and not named else None
        if not takes(x):
            return nn.Sequential.forward(self, *given, **named)
        y = run_chain(self, x, _channels_last(x))
        if y is not None:
            return y
        recipes = [_callable(block) for block in self]
        fused = [
            recipe is not None and recipe.fused(block) for recipe, block in zip(recipes, self, strict=True)
        ]
        stats = None
        for i, block in enumerate(self):
            recipe, both = recipes[i], fused[i]
            if not both or not any(both):
                x, stats = block(x), None
                continue
            following = fused[i + 1] if i + 1 < len(fused) else False
            wanted = bool(following) and following[MIXER]
            x, stats = run(recipe.structure, block, x, both, recipe.activation, stats, wanted)
        return x

    def add_to(self, chain: Chain) -> bool:
        """Adds the blocks to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        return len(self) > 0 and all(_callable(block) and block.add_to(chain) for block in self)


def _callable(block: nn.Module) -> Recipe | None:
    """The recipe of a block whose forward may be computed without calling it."""
    recipe = vars(type(block)).get(_RECIPE)
    return None if recipe is None or recipe.structure.returns_tuple or calls_more(block) else recipe


def _channels_last(x: Tensor) -> bool:
    return memory_format_of(x) == torch.channels_last
