"""What an accelerated block is made from, and which of its sub-blocks are operator calls now."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..nn.fusion import MIXER, MLP
from ..ops.chain import Chain
from .layouts import ACT, STAR_RELU, BlockLayout, activation_of, layout_with

__all__ = ["OUTDATED", "Reasons", "Recipe"]

OUTDATED = (
    "a module in it was replaced after accelerate, and the block's class was derived further, as by"
    " fully_shard, so that the block cannot be compared anew"
)
Reasons = tuple[str | None, str | None]  # of the token mixer and of the MLP; None: it is an operator call


@dataclass(frozen=True)
class Recipe:
    """What the class of an accelerated block is made from; equal recipes make the same class."""

    original: type[nn.Module]
    name: str  # of its BlockLayout
    # The types of the parts of each sub-block that were compared; None where no operator computed them then.
    types: tuple[tuple[type, ...] | None, tuple[type, ...] | None]
    activation: str | None
    wrong: str | None = None  # why these parts run as modules, where the comparison failed
    wanted: tuple[bool, bool] = (True, True)
    save_hidden: bool | None = None

    @property
    def layout(self) -> BlockLayout:
        return layout_with(self.name, self.save_hidden)

    def reasons(self, block: nn.Module, gathered: bool = False) -> Reasons:
        """Why a call of the block now runs a sub-block's modules, or None where it is an operator call.

        `OUTDATED` where an operator computes modules that were not compared. ``gathered``: see
        `BlockLayout.temporary_reason`.
        """
        return self._reason(block, MIXER, gathered), self._reason(block, MLP, gathered)

    def _reason(self, block: nn.Module, which: int, gathered: bool) -> str | None:
        if not self.wanted[which]:
            return f"accelerate was called with {('mixer', 'mlp')[which]}=False"
        layout, types = self.layout, self.types[which]
        activation = None
        if which == MLP and types is not None:
            act = block._modules[layout.bodies[MLP]]._modules.get(layout.layers[1])
            activation = self.activation if type(act) is types[ACT] else None
        reason = layout.unsupported_reason(block, which, activation)
        if reason is not None:
            return reason
        parts = layout.parts(block, which)
        if tuple([type(part) for part in parts]) != types:
            return OUTDATED
        if which == MLP and (types[ACT] is nn.GELU or activation == STAR_RELU):  # of more than one kind
            current = activation_of(parts[ACT])
            if current is None:
                return layout.unsupported_reason(block, which)
            if current != activation:
                return OUTDATED
        return self.wrong or layout.temporary_reason(block, which, gathered)

    def fused(self, block: nn.Module) -> tuple[bool, bool]:
        """Whether the mixer and the MLP are operator calls now; neither where the block must be compared."""
        mixer, mlp = self.reasons(block)
        if OUTDATED in (mixer, mlp):
            return False, False
        return mixer is None, mlp is None

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

    def add_to(self, block: nn.Module, chain: Chain) -> bool:
        """Adds the block to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        return all(self.fused(block)) and self.layout.add_to(block, chain, self.activation)
