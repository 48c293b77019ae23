"""A PoolFormer block of two operator calls, and a stage of such blocks, wherever the blocks come from.

The package's own block and those of other packages that `poolformer_kernels.accelerate` recognises differ in
the names of their modules and in a few rules. A `BlockParts` answers for one kind of block. How a sub-block
is called, how statistics travel and what a chain takes is written here, once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..ops.chain import Chain
from ..ops.dispatch import select_backend
from ..ops.mlp import mlp_with_stats
from ..ops.pool_mixer import pool_mixer_with_stats

__all__ = ["MIXER", "MLP", "BlockParts", "FusedBlock", "MlpOperands", "Operators", "run_stage"]

MIXER, MLP = range(2)  # the values of ``which``: the two sub-blocks of a block


class MlpOperands(NamedTuple):
    """What the MLP operator takes of a block's MLP; see `poolformer_kernels.ops.mlp`."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str


class Operators:
    """The operators as blocks call them, on the backend that is in force."""

    def pool_mixer(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `poolformer_kernels.ops.pool_mixer.pool_mixer_with_stats`."""
        return pool_mixer_with_stats(x, weight, bias, **options)

    def mlp(
        self, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `poolformer_kernels.ops.mlp.mlp_with_stats`."""
        return mlp_with_stats(x, w1, b1, w2, b2, **options)

    def stats_are_free(self, x: Tensor) -> bool:
        """Whether statistics cost nothing: the reference would compute them in another pass over y."""
        return select_backend(x.device, x.dtype) != "reference"


class BlockParts(ABC):
    """One kind of block: where it keeps what the operators take, and the rules that it has of its own."""

    widens = False  # whether a LayerScale or ResScale of a wider dtype widens the residual stream
    operators = Operators()

    @abstractmethod
    def norm(self, block: nn.Module, which: int) -> nn.GroupNorm:
        """The norm before a sub-block."""

    @abstractmethod
    def layer_scale(self, block: nn.Module, which: int) -> Tensor | None:
        """The LayerScale vector ``[C]`` of a sub-block."""

    @abstractmethod
    def shortcut(self, block: nn.Module, which: int) -> Tensor | bool:
        """What x is multiplied by before the branch is added (ResScale, ``[C]``); True: 1, False: 0."""

    @abstractmethod
    def pool_size(self, block: nn.Module) -> int:
        """The size of the token mixer's pool."""

    @abstractmethod
    def mlp_operands(self, block: nn.Module, activation: str | None) -> MlpOperands:
        """The weights of the MLP, with StarReLU's scalars folded into the second layer's.

        ``activation`` is the operator's name for the MLP's activation, where it was found earlier.
        """

    @abstractmethod
    def folds_star_relu(self, block: nn.Module) -> bool:
        """Whether `mlp_operands` computes weights anew in each call."""

    def save_hidden(self, block: nn.Module) -> bool | None:
        """``save_hidden`` of `poolformer_kernels.ops.mlp`."""
        return None

    @abstractmethod
    def drops(self, block: nn.Module) -> bool:
        """Whether a call drops samples' branches now (stochastic depth in training)."""

    @abstractmethod
    def drop_scale(self, block: nn.Module, which: int, x: Tensor) -> Tensor | None:
        """A draw of what stochastic depth multiplies each sample of a sub-block by, ``[B]``."""

    def mlp_drop_scale(
        self, block: nn.Module, x: Tensor, b2: Tensor | None, layer_scale: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        """(`drop_scale` of the MLP, its ``b2``, two factors of what is to be added to the result, or None).

        They differ from the block's own where paths are dropped inside the MLP, before the bias is added.
        """
        return self.drop_scale(block, MLP, x), b2, None

    @abstractmethod
    def run_modules(self, block: nn.Module, which: int, x: Tensor, shortcut: Tensor | bool) -> Tensor:
        """A sub-block as its modules compute it, operation by operation."""

    def run(
        self,
        block: nn.Module,
        x: Tensor,
        fused: tuple[bool, bool],
        stats: Tensor | None = None,
        return_stats: bool = False,
        activation: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The block's result and, where they are asked for and cost nothing, its statistics.

        Args:
            fused: whether the token mixer and the MLP are operator calls; otherwise modules are called.
            stats: x's statistics, partials ``[B, T, 3]``, where the caller has them.
            activation: see `mlp_operands`.
        """
        x, stats = self.run_sub_block(block, MIXER, x, fused[MIXER], stats, fused[MLP])
        return self.run_sub_block(block, MLP, x, fused[MLP], stats, return_stats, activation)

    def run_sub_block(
        self,
        block: nn.Module,
        which: int,
        x: Tensor,
        fused: bool,
        stats: Tensor | None,
        return_stats: bool,
        activation: str | None = None,
        residual: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """One sub-block, as `run` says; without ``residual`` what it adds to x."""
        shortcut = self.shortcut(block, which) if residual else False
        if not fused:
            return self.run_modules(block, which, x, shortcut), None
        if which == MIXER:
            return self._mixer(block, x, stats, return_stats, shortcut)
        return self._mlp(block, x, stats, return_stats, shortcut, activation)

    def _mixer(
        self, block: nn.Module, x: Tensor, stats: Tensor | None, return_stats: bool, shortcut: Tensor | bool
    ) -> tuple[Tensor, Tensor | None]:
        norm, scale = self.norm(block, MIXER), self.layer_scale(block, MIXER)
        x = self._widened(x, scale)
        y, stats = self.operators.pool_mixer(
            x,
            norm.weight,
            norm.bias,
            pool_size=self.pool_size(block),
            eps=norm.eps,
            layer_scale=scale,
            drop_scale=self.drop_scale(block, MIXER, x),
            residual=shortcut is True,
            stats=stats,
            return_stats=return_stats and isinstance(shortcut, bool) and self.operators.stats_are_free(x),
        )
        return self.add_shortcut(y, x, shortcut), stats

    def _mlp(
        self,
        block: nn.Module,
        x: Tensor,
        stats: Tensor | None,
        return_stats: bool,
        shortcut: Tensor | bool,
        activation: str | None,
    ) -> tuple[Tensor, Tensor | None]:
        norm, scale = self.norm(block, MLP), self.layer_scale(block, MLP)
        x = self._widened(x, scale)
        w1, b1, w2, b2, activation = self.mlp_operands(block, activation)
        drop_scale, b2, constant = self.mlp_drop_scale(block, x, b2, scale)
        final = isinstance(shortcut, bool) and constant is None  # nothing follows the operator
        y, stats = self.operators.mlp(
            x,
            w1,
            b1,
            w2,
            b2,
            activation=activation,
            norm=True,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            layer_scale=scale,
            drop_scale=drop_scale,
            residual=shortcut is True,
            save_hidden=self.save_hidden(block),
            stats=stats,
            return_stats=return_stats and final and self.operators.stats_are_free(x),
        )
        if constant is not None:
            y = torch.addcmul(y, *(t.to(y.dtype) for t in constant))
        return self.add_shortcut(y, x, shortcut), stats

    def _widened(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None or not self.widens:
            return x
        return x.to(torch.promote_types(x.dtype, scale.dtype))

    def add_shortcut(self, branch: Tensor, x: Tensor, shortcut: Tensor | bool) -> Tensor:
        """Adds x times ResScale to a branch that was computed without the residual."""
        if isinstance(shortcut, bool):
            return branch
        y = torch.addcmul(branch, x, shortcut.view(-1, 1, 1))
        return y if self.widens else y.to(torch.promote_types(x.dtype, branch.dtype))

    def add_to(self, block: nn.Module, chain: Chain, activation: str | None = None) -> bool:
        """Adds a block of two operator calls to a chain; False where a chain computes something else."""
        if (
            self.shortcut(block, MIXER) is not True
            or self.shortcut(block, MLP) is not True
            or self.drops(block)
            or self.folds_star_relu(block)
        ):
            return False
        norm1, norm2 = self.norm(block, MIXER), self.norm(block, MLP)
        scale1, scale2 = self.layer_scale(block, MIXER), self.layer_scale(block, MLP)
        w1, b1, w2, b2, activation = self.mlp_operands(block, activation)
        if self.widens and any(scale is not None and scale.dtype != w1.dtype for scale in (scale1, scale2)):
            return False
        chain.mixer(norm1.weight, norm1.bias, scale1, self.pool_size(block), float(norm1.eps))
        chain.mlp(w1, w2, (b1, b2, norm2.weight, norm2.bias, scale2), activation, float(norm2.eps))
        return True


class FusedBlock(Protocol):
    """How a stage runs a block without calling it."""

    def fused(self, block: nn.Module) -> tuple[bool, bool]:
        """Whether the token mixer and the MLP are operator calls now."""

    def run(
        self, block: nn.Module, x: Tensor, fused: tuple[bool, bool], stats: Tensor | None, return_stats: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `BlockParts.run`; where neither is an operator call, the block itself may be called."""


def run_stage(
    blocks: Iterable[nn.Module], x: Tensor, fusion_of: Callable[[nn.Module], FusedBlock | None]
) -> Tensor:
    """Blocks in a row that hand each other the statistics of what they write.

    ``fusion_of`` gives None for a block that must be called as a module; statistics start anew behind it.
    """
    blocks = [*blocks]
    fusions = [fusion_of(block) for block in blocks]
    fused = [
        (False, False) if fusion is None else fusion.fused(block)
        for fusion, block in zip(fusions, blocks, strict=True)
    ]
    stats: Tensor | None = None
    for i, (block, fusion) in enumerate(zip(blocks, fusions, strict=True)):
        if fusion is None:
            x, stats = block(x), None
        else:
            wanted = i + 1 < len(blocks) and fused[i + 1][MIXER]
            x, stats = fusion.run(block, x, fused[i], stats, wanted)
    return x
