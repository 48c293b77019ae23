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
from ..nn.fusion import MIXER, MLP, run_stage
from ..ops.chain import Chain
from ..ops.torch_private import forward_mode, has_global_hooks, in_transform
from .layouts import ACT, LAYOUTS, PLAIN, STAR_RELU, BlockLayout, activation_of

__all__ = ["Recipe", "Sequential", "accelerated_class", "recipe_of"]

_RECIPE = "_poolformer_kernels_recipe"


@dataclass(frozen=True)
class Recipe:
    """What the class of an accelerated block is made from; equal recipes make the same class."""

    original: type[nn.Module]
    name: str  # of its BlockLayout
    # The types of the parts of each sub-block; None where it runs its modules.
    types: tuple[tuple[type, ...] | None, tuple[type, ...] | None]
    activation: str | None

    @property
    def layout(self) -> BlockLayout:
        return LAYOUTS[self.name]

    def unfused_reason(self, block: nn.Module, which: int) -> str | None:
        """Why a call of the block now runs a sub-block's modules, or None where it is an operator call."""
        layout = self.layout
        reason = layout.unsupported_reason(block, which, self.activation)
        if reason is not None:
            return reason
        if self.types[which] is None:
            return f"accelerate was called with {('mixer', 'mlp')[which]}=False"
        parts = layout.parts(block, which)
        replaced = tuple([type(part) for part in parts]) != self.types[which]
        if which == MLP and (type(parts[ACT]) is nn.GELU or self.activation == STAR_RELU):
            replaced |= activation_of(parts[ACT]) != self.activation
        if replaced:
            return f"a module of {layout.bodies[which]} or around it was replaced after accelerate"
        return layout.temporary_reason(block, which)

    def fused(self, block: nn.Module) -> tuple[bool, bool]:
        """Whether the mixer and the MLP are operator calls now."""
        return self.unfused_reason(block, MIXER) is None, self.unfused_reason(block, MLP) is None

    def run(
        self,
        block: nn.Module,
        x: Tensor,
        fused: tuple[bool, bool],
        stats: Tensor | None = None,
        return_stats: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `poolformer_kernels.nn.fusion.BlockParts.run`."""
        if not any(fused):
            return block(x), None
        return self.layout.run(block, x, fused, stats, return_stats, self.activation)


def recipe_of(block: nn.Module) -> Recipe | None:
    """The recipe of an accelerated block, also where its class was derived further, as by fully_shard."""
    return getattr(type(block), _RECIPE, None)


@lru_cache(None)
def accelerated_class(recipe: Recipe) -> type[nn.Module]:
    """The original class with our forward; one for each recipe."""
    original, layout = recipe.original, recipe.layout

    @wraps(original.forward)  # torch.jit.script compiles the original, which it finds as __wrapped__
    def forward(self, *given, **named):
        x = given[0] if len(given) == 1 and not named else None
        if not _takes(x):
            return original.forward(self, *given, **named)
        fused = recipe.fused(self)
        if not any(fused):
            return original.forward(self, x)
        y = run_chain(self, x, _channels_last(x)) if all(fused) else None
        if y is None:
            y, _ = recipe.run(self, x, fused)
        return (y,) if layout.returns_tuple else y

    def add_to(self, chain: Chain) -> bool:
        """Adds the block to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        return all(recipe.fused(self)) and layout.add_to(self, chain, recipe.activation)

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
        if not _takes(x):
            return nn.Sequential.forward(self, *given, **named)
        y = run_chain(self, x, _channels_last(x))
        if y is not None:
            return y
        return run_stage(self, x, _fusion_of)

    def add_to(self, chain: Chain) -> bool:
        """Adds the blocks to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        return len(self) > 0 and all(_fusion_of(block) and block.add_to(chain) for block in self)


def _fusion_of(block: nn.Module) -> Recipe | None:
    """The recipe of a block whose forward may be computed without calling it."""
    recipe = vars(type(block)).get(_RECIPE)
    return None if recipe is None or recipe.layout.returns_tuple or calls_more(block) else recipe


def _channels_last(x: Tensor) -> bool:
    return memory_format_of(x) == torch.channels_last


def _takes(x: object) -> bool:
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
