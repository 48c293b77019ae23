"""The PoolFormer block, two operator calls; the stage, where statistics travel with the activations."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layout import memory_format_of
from ..ops.chain import Chain
from .chain_cache import calls_more, run_chain
from .checks import boolean, finite, hooked, makes_module, positive_int, probability, tracing
from .factory import Device, placed
from .fusion import MIXER, MLP, BlockParts, FusedBlock, MlpOperands, run_stage
from .layers import DropPath, GroupNorm, Pooling, StarReLU
from .mlp import TRACED, Mlp
from .names import class_path, more_than_forward

__all__ = ["PoolFormerBlock", "PoolFormerStage"]


class PoolFormerBlock(nn.Module):
    """One PoolFormer block, with the official constructor and parameter names.

    Equivalent PyTorch::

        x = x + drop_path(layer_scale_1[:, None, None] * token_mixer(norm1(x)))
        x = x + drop_path(layer_scale_2[:, None, None] * mlp(norm2(x)))

    Each line is one operator call, `poolformer_kernels.ops.pool_mixer` and `poolformer_kernels.ops.mlp`, as
    long as its norm is a GroupNorm of one group, ``token_mixer`` a `Pooling`, ``mlp`` an `Mlp` of
    convolutions that is one call itself and ``drop_path`` a `DropPath` or Identity, none of them hooked or
    subclassed; otherwise the modules of that line are called one by one.

    Args:
        dim: channels C of x, ``[B, C, H, W]``.
        pool_size: odd and positive.
        mlp_ratio: hidden channels of the MLP per channel.
        act_layer: the MLP's activation, called without arguments.
        norm_layer: called with ``dim``.
        drop: dropout probability in the MLP.
        drop_path: probability that training skips a branch for a sample.
        use_layer_scale: scale each branch by a learned vector ``[C]``.
        layer_scale_init_value: its initial value.
        save_hidden: see `poolformer_kernels.ops.mlp`.
        token_mixer: called with ``dim``; ``Pooling(pool_size)`` when None.
        device, dtype: of the parameters, as in torch.nn; what the three callables make gets them, too.

    Returns:
        y, of x's shape and memory format. Under autocast on the CPU a bfloat16 x stays bfloat16, while the
        plain PyTorch lines would widen it to float32 at the float32 LayerScale; on CUDA it becomes float32,
        as there.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Source: MetaFormer (arXiv 2111.11418), equations 2 to 4.
    """

    def __init__(
        self,
        dim: int,
        pool_size: int = 3,
        mlp_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = GroupNorm,
        drop: float = 0.0,
        drop_path: float = 0.0,
        use_layer_scale: bool = True,
        layer_scale_init_value: float = 1e-5,
        *,
        save_hidden: bool | None = None,
        token_mixer: Callable[[int], nn.Module] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim = positive_int("dim", dim)
        hidden = int(dim * finite("mlp_ratio", mlp_ratio))
        if hidden < 1:
            raise ValueError(f"mlp_ratio must leave at least one channel, got {mlp_ratio!r}")
        makes_module("norm_layer", norm_layer, "poolformer_kernels.nn.GroupNorm")
        if token_mixer is not None:
            makes_module("token_mixer", token_mixer, "poolformer_kernels.nn.Pooling")
        initial = finite("layer_scale_init_value", layer_scale_init_value)
        with placed(self, device, dtype):
            self.norm1 = norm_layer(dim)
            self.token_mixer = Pooling(pool_size) if token_mixer is None else token_mixer(dim)
            self.norm2 = norm_layer(dim)
            self.mlp = Mlp(dim, hidden, act_layer=act_layer, drop=drop, save_hidden=save_hidden)
            drops = probability("drop_path", drop_path) > 0
            self.drop_path = DropPath(drop_path) if drops else nn.Identity()
            self.use_layer_scale = boolean("use_layer_scale", use_layer_scale)
            for name in ("layer_scale_1", "layer_scale_2"):
                scale = nn.Parameter(torch.full((dim,), initial)) if use_layer_scale else None
                self.register_parameter(name, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_stats(x)[0]

    def forward_with_stats(
        self, x: Tensor, stats: Tensor | None = None, return_stats: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` that takes x's statistics where the caller has them and hands on y's where asked.

        Returns:
            (y, partials of y ``[B, T, 3]``); None for the partials where no kernel that could save them
            computed y. See `poolformer_kernels.ops.pool_mixer.pool_mixer_with_stats`.
        """
        x, stats = self.mixer_with_stats(x, stats, self.mlp_unfused_reason() is None)
        return self.mlp_with_stats(x, stats, return_stats)

    def mixer_with_stats(
        self, x: Tensor, stats: Tensor | None, return_stats: bool, residual: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The token mixer's line of `forward_with_stats`; without ``residual`` what it adds to x."""
        fused = self.mixer_unfused_reason() is None
        return PARTS.run_sub_block(self, MIXER, x, fused, stats, return_stats, residual=residual)

    def mlp_with_stats(
        self, x: Tensor, stats: Tensor | None, return_stats: bool, residual: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The MLP's line of `forward_with_stats`; without ``residual`` what it adds to x."""
        fused = self.mlp_unfused_reason() is None
        return PARTS.run_sub_block(self, MLP, x, fused, stats, return_stats, residual=residual)

    def add_to(self, chain: Chain) -> bool:
        """Adds the block to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        if calls_more(self) or not all(PARTS.fused(self)):
            return False
        if vars(self).keys() & _LINES:
            return False
        modules = self._modules
        layers = modules["mlp"]._modules
        read = (modules["norm1"], modules["norm2"], layers["fc1"], layers["fc2"])
        own = {"layer_scale_1", "layer_scale_2"} <= self._parameters.keys()
        if not own or not all({"weight", "bias"} <= module._parameters.keys() for module in read):
            return False  # in replicas of DataParallel, say, parameters are other attributes
        return PARTS.add_to(self, chain)

    def _shortcut(self, which: int) -> Tensor | bool:
        """See `poolformer_kernels.nn.fusion.BlockParts.shortcut`."""
        return True

    def mixer_unfused_reason(self) -> str | None:
        """Why the token mixer sub-block is not one operator call, or None where it is."""
        mixer = self._modules["token_mixer"]
        if tracing():
            return TRACED
        if type(mixer) is not Pooling:
            return f"token_mixer is {class_path(mixer)}, not Pooling"
        if hooked(mixer):
            return more_than_forward("token_mixer", mixer)
        return self._around_unfused_reason("norm1")

    def mlp_unfused_reason(self) -> str | None:
        """Why the MLP sub-block is not one operator call, or None where it is."""
        mlp = self._modules["mlp"]
        if type(mlp) is not Mlp:
            return f"mlp is {class_path(mlp)}, not Mlp"
        reason = mlp.unfused_reason()
        if reason is not None:
            return reason
        if type(mlp._modules["fc1"]) is not nn.Conv2d:
            return "mlp has linear layers, not convolutions"
        if hooked(mlp):
            return more_than_forward("mlp", mlp)
        return self._around_unfused_reason("norm2")

    def _around_unfused_reason(self, name: str) -> str | None:
        norm, drop_path = self._modules[name], self._modules["drop_path"]
        if type(norm) not in _GROUP_NORMS or norm.num_groups != 1:
            return f"{name} is {class_path(norm)}, not a GroupNorm of one group"
        if type(drop_path) not in _DROP_PATHS:
            return f"drop_path is {class_path(drop_path)}, not DropPath or Identity"
        if hooked(norm):
            return more_than_forward(name, norm)
        if hooked(drop_path):
            return more_than_forward("drop_path", drop_path)
        return None


class _Parts(BlockParts):
    """The parts of a `PoolFormerBlock`."""

    def fused(self, block: PoolFormerBlock) -> tuple[bool, bool]:
        return block.mixer_unfused_reason() is None, block.mlp_unfused_reason() is None

    def norm(self, block: PoolFormerBlock, which: int) -> nn.GroupNorm:
        return block._modules[_NORMS[which]]  # an attribute of a module costs nearly 1 us

    def layer_scale(self, block: PoolFormerBlock, which: int) -> Tensor | None:
        return getattr(block, _SCALES[which])

    def shortcut(self, block: PoolFormerBlock, which: int) -> Tensor | bool:
        return block._shortcut(which)

    def pool_size(self, block: PoolFormerBlock) -> int:
        return block._modules["token_mixer"].pool_size

    def mlp_operands(self, block: PoolFormerBlock, activation: str | None) -> MlpOperands:
        mlp = block._modules["mlp"]
        return MlpOperands(*mlp.operator_weights(), mlp.activation)

    def folds_star_relu(self, block: PoolFormerBlock) -> bool:
        return type(block._modules["mlp"]._modules["act"]) is StarReLU

    def save_hidden(self, block: PoolFormerBlock) -> bool | None:
        return block._modules["mlp"].save_hidden

    def drops(self, block: PoolFormerBlock) -> bool:
        drop_path = block._modules["drop_path"]
        return type(drop_path) is DropPath and drop_path.training and drop_path.drop_prob > 0

    def drop_scale(self, block: PoolFormerBlock, which: int, x: Tensor) -> Tensor | None:
        drop_path = block._modules["drop_path"]
        return drop_path.sample(x) if type(drop_path) is DropPath else None

    def run_modules(self, block: PoolFormerBlock, which: int, x: Tensor, shortcut: Tensor | bool) -> Tensor:
        modules = block._modules
        branch = modules[_BODIES[which]](self.norm(block, which)(x))
        scale = self.layer_scale(block, which)
        dtype = torch.promote_types(x.dtype, branch.dtype)  # float32 parameters do not widen a half stream
        if scale is not None:
            branch = branch * scale.view(-1, 1, 1)
        branch = modules["drop_path"](branch)
        if shortcut is True:
            return (x + branch).to(dtype)
        return self.add_shortcut(branch.to(dtype), x, shortcut)

    def run(
        self,
        block: PoolFormerBlock,
        x: Tensor,
        fused: tuple[bool, bool],
        stats: Tensor | None = None,
        return_stats: bool = False,
        activation: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if type(block) is PoolFormerBlock and not vars(block).keys() & _LINES:
            return super().run(block, x, fused, stats, return_stats)  # without asking a second time
        return block.forward_with_stats(x, stats, return_stats)


PARTS = _Parts()


class PoolFormerStage(nn.Sequential):
    """Blocks in a row, as ``nn.Sequential(*blocks)``, handing each other the statistics of what they write.

    So each block is two kernels, and only the first kernel of the stage reads its input to normalise it. A
    block that is hooked, compiled on its own or has another forward is called as a module, as all of them are
    while PyTorch's global module hooks are set; statistics then start anew behind it.

    Inference is one operator call where no block has hooks, on CUDA in channels_last only.

    With ``grad_checkpointing = True`` each block keeps its input alone for the backward, which computes the
    block again: training needs less memory and a third more time, with the same gradients.

    x and the result are ``[B, C, H, W]``; dtypes and layouts are the blocks'.

    Raises:
        TypeError: a block that is not a module; in a call, the blocks' errors.

    Source: MetaFormer (arXiv 2111.11418), Figure 2 and section 3.2.
    """

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        y = run_chain(self, x, channels_last=isinstance(x, Tensor) and memory_format_of(x) == _LAST)
        if y is not None:
            return y
        again = self.grad_checkpointing and torch.is_grad_enabled() and not tracing()
        return run_stage(self, x, _Checkpointed if again else _fusion_of)

    def add_to(self, chain: Chain) -> bool:
        """Adds the blocks to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        return len(self) > 0 and all(type(b) is PoolFormerBlock and b.add_to(chain) for b in self)


def _fusion_of(block: nn.Module) -> FusedBlock | None:
    """How a stage runs a block without calling it; None: it must be called."""
    own_forward = getattr(type(block), "forward", None) is PoolFormerBlock.forward
    return PARTS if own_forward and not calls_more(block) else None


class _Checkpointed:
    """Runs a block that keeps its input alone for the backward, which runs it again."""

    def __init__(self, block: nn.Module) -> None:
        self.fusion = _fusion_of(block)

    def fused(self, block: nn.Module) -> tuple[bool, bool]:
        return (False, False) if self.fusion is None else self.fusion.fused(block)

    def run(
        self, block: nn.Module, x: Tensor, fused: tuple[bool, bool], stats: Tensor | None, return_stats: bool
    ) -> tuple[Tensor, Tensor | None]:
        paths = [m for m in block.modules() if isinstance(m, DropPath) and m.draws is not None]
        calls = [path.calls for path in paths]

        def compute(x: Tensor, stats: Tensor | None) -> tuple[Tensor, Tensor | None]:
            for path, count in zip(paths, calls, strict=True):
                path.calls = count  # the second time the same samples are dropped
            if self.fusion is None:
                return block(x), None
            return self.fusion.run(block, x, fused, stats, return_stats)

        return checkpoint(compute, x, stats, use_reentrant=False)


_NORMS, _BODIES, _SCALES = ("norm1", "norm2"), ("token_mixer", "mlp"), ("layer_scale_1", "layer_scale_2")
_LINES = {"forward_with_stats", "mixer_with_stats", "mlp_with_stats"}  # which may be replaced
_GROUP_NORMS = (GroupNorm, nn.GroupNorm)
_DROP_PATHS = (nn.Identity, DropPath)
_LAST = torch.channels_last
