"""The classes of what is accelerated: a block's is its own class with another forward.

The class of an instance changes and not the instance. A forward set on the instance would be a reference of
the module to itself, which replicas of DataParallel and other shallow copies take along and then compute with
the original's parameters; pickle would find a method by its name, which is the class's own forward; and our
own checks, like other packages', take such a forward for a hook. The class has the original's name, because
some look for it (``_no_split_modules``), and so cannot be found by it: `__reduce_ex__` names its recipe.

A call goes on with the recipe that it began with, so that another thread may change the class meanwhile.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..layout import memory_format_of
from ..nn.chain_cache import CHANGES, PLACE, calls_more, run_chain
from ..nn.fusion import MIXER, MLP, run_stage
from ..ops.chain import Chain
from ..ops.torch_private import forward_mode, has_global_hooks, in_transform
from .equivalence import check_equivalence
from .layouts import PLAIN
from .recipe import OUTDATED, Recipe

__all__ = ["Recipe", "Sequential", "accelerated_class", "recipe_in", "recipe_of", "renewed"]

_RECIPE = "_poolformer_kernels_recipe"


def recipe_of(block: nn.Module) -> Recipe | None:
    """The recipe of an accelerated block, also where its class was derived further, as by fully_shard."""
    return recipe_in(type(block))


def recipe_in(kind: type[nn.Module]) -> Recipe | None:
    """The recipe of a class that a block has, or had a moment ago: another thread may give it another."""
    recipe: Recipe | None = getattr(kind, _RECIPE, None)
    return recipe


def renewed(block: nn.Module, recipe: Recipe) -> Recipe:
    """The recipe of a block whose modules were replaced after `accelerate`, compared now.

    A class that was derived from ours cannot be exchanged: then it is the recipe given.
    """
    kind, made = type(block), accelerated_class(recipe)
    if issubclass(kind, made) and kind is not made:
        return recipe
    with saved_tensors_hooks(_itself, _itself):  # a checkpoint must not count what the comparison saves
        current = check_equivalence(block, recipe.original, recipe.wanted, recipe.save_hidden)
    with CHANGES:
        if type(block) is made:  # else another thread has restored the block
            block.__class__ = accelerated_class(current)
    return current


def _itself(x: Tensor) -> Tensor:
    return x


_classes: dict[Recipe, type[nn.Module]] = {}


def accelerated_class(recipe: Recipe) -> type[nn.Module]:
    """The original class with our forward; one for each recipe."""
    with CHANGES:
        if recipe not in _classes:
            _classes[recipe] = _make_class(recipe)
        return _classes[recipe]


def _make_class(recipe: Recipe) -> type[nn.Module]:
    original, layout = recipe.original, recipe.layout

    @wraps(original.forward)  # torch.jit.script compiles the original, which it finds as __wrapped__
    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        x = given[0] if len(given) == 1 and not named else None
        if not _takes(x):
            return original.forward(self, *given, **named)
        current, reasons = recipe, recipe.reasons(self)
        if OUTDATED in reasons and not torch.compiler.is_compiling():
            current = renewed(self, recipe)
            reasons = current.reasons(self)
        fused = reasons[MIXER] is None, reasons[MLP] is None
        if not any(fused):
            return original.forward(self, x)
        y = run_chain(self, x, _channels_last(x)) if all(fused) else None
        if y is None:
            y, _ = current.run(self, x, fused)
        return (y,) if layout.returns_tuple else y

    def add_to(self: nn.Module, chain: Chain) -> bool:
        """Adds the block to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        return recipe.add_to(self, chain)

    def reduce(self: nn.Module, protocol: int) -> Any:
        reduced = original.__reduce_ex__(self, protocol)
        if isinstance(reduced, tuple) and reduced[1] and reduced[1][0] is made:
            make, (_, *arguments), *rest = reduced
            return (_rebuild, (recipe, make, *arguments), *map(_without_chain, rest))
        return reduced

    own = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"forward": forward, "add_to": add_to, "__reduce_ex__": reduce, _RECIPE: recipe}
    made: type[nn.Module] = type(original)(original.__name__, (original,), own)
    return made


def _rebuild(recipe: Recipe, make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    return make(accelerated_class(recipe), *arguments)


def _without_chain(state: Any) -> Any:
    """A module's attributes, as they are now, without the chain that a call may put among them."""
    if not isinstance(state, dict):
        return state
    return {name: value for name, value in state.copy().items() if name != PLACE}


class Sequential(nn.Sequential):
    """A stage of accelerated blocks; see `poolformer_kernels.nn.PoolFormerStage`."""

    @wraps(nn.Sequential.forward)
    def forward(self, *given: Any, **named: Any) -> Any:
        x = given[0] if len(given) == 1 and not named else None
        if not _takes(x):
            return nn.Sequential.forward(self, *given, **named)
        y = run_chain(self, x, _channels_last(x))
        if y is not None:
            return y
        return run_stage(self, x, _fusion_of)

    def add_to(self, chain: Chain) -> bool:
        """Adds the blocks to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        blocks = [*self]
        recipes = [_fusion_of(block) for block in blocks]
        return len(blocks) > 0 and all(
            recipe is not None and recipe.add_to(block, chain)
            for recipe, block in zip(recipes, blocks, strict=True)
        )

    def __reduce_ex__(self, protocol: int) -> Any:  # type: ignore[override]
        make, arguments, *rest = super().__reduce_ex__(protocol)
        return (make, arguments, *map(_without_chain, rest))


def _fusion_of(block: nn.Module) -> Recipe | None:
    """The recipe of a block whose forward may be computed without calling it."""
    recipe: Recipe | None = vars(type(block)).get(_RECIPE)
    return None if recipe is None or recipe.layout.returns_tuple or calls_more(block) else recipe


def _channels_last(x: Tensor) -> bool:
    return memory_format_of(x) == torch.channels_last


def _takes(x: Any) -> bool:
    """Whether operators compute on x what modules do: a plain image, outside of transforms and tracers."""
    if torch.compiler.is_compiling():
        plain = isinstance(x, Tensor) and x.dim() == 4 and not has_global_hooks()
        return plain and not torch.onnx.is_in_onnx_export()  # ONNX has none of our operators
    return (
        type(x) in PLAIN
        and x.dim() == 4
        and x.layout == torch.strided
        and x.is_floating_point()
        and not has_global_hooks()
        and not torch.jit.is_tracing()  # a trace must run without this package, with and without gradients
        and not in_transform()
        and not forward_mode()
    )
