"""The block of MetaFormers that leave something of PoolFormer's out, or scale the shortcut."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.chain import Chain
from .block import PoolFormerBlock
from .checks import boolean, finite
from .factory import Device
from .fusion import MIXER
from .layers import GroupNorm

__all__ = ["MetaFormerBlock"]


class MetaFormerBlock(PoolFormerBlock):
    """A `PoolFormerBlock` that may have no residual connections, no MLP, or scaled shortcuts (ResScale).

    Equivalent PyTorch, ``s`` being ``[:, None, None]``::

        x = res_scale_1[s] * x + drop_path(layer_scale_1[s] * token_mixer(norm1(x)))
        x = res_scale_2[s] * x + drop_path(layer_scale_2[s] * mlp(norm2(x)))

    without the first term for ``residual=False``, without the second line for ``mlp=False``, and each vector
    1 where it is absent. Each line is one operator call where it is one in `PoolFormerBlock`; with ResScale
    one for the branch and a ``torch.addcmul``.

    Args:
        dim, pool_size, mlp_ratio, act_layer, norm_layer, drop, drop_path, use_layer_scale,
            layer_scale_init_value, save_hidden, token_mixer, device, dtype: see `PoolFormerBlock`.
        residual: add x to each branch.
        mlp: have the second line.
        mlp_bias: whether the MLP's layers have biases.
        res_scale_init_value: initial value of ``res_scale_1`` and ``res_scale_2``, learned vectors ``[C]``;
            None for none.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, or ResScale without a residual.

    Source: MetaFormer (arXiv 2111.11418), Table 5; ResScale: NormFormer (arXiv 2110.09456).
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
        residual: bool = True,
        mlp: bool = True,
        mlp_bias: bool = True,
        res_scale_init_value: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            pool_size,
            mlp_ratio,
            act_layer,
            norm_layer,
            drop,
            drop_path,
            use_layer_scale,
            layer_scale_init_value,
            save_hidden=save_hidden,
            token_mixer=token_mixer,
            device=device,
            dtype=dtype,
        )
        self.residual = boolean("residual", residual)
        if res_scale_init_value is not None:
            finite("res_scale_init_value", res_scale_init_value)
            if not residual:
                raise ValueError(
                    f"res_scale_init_value must be None where residual is False, got {res_scale_init_value}"
                )
        lines = (1, 2) if boolean("mlp", mlp) else (1,)
        for i in lines:
            scale = None
            if res_scale_init_value is not None:
                initial = torch.full((int(dim),), float(res_scale_init_value), device=device, dtype=dtype)
                scale = nn.Parameter(initial)
            self.register_parameter(f"res_scale_{i}", scale)
        if not mlp:
            self.register_module("norm2", None)
            self.register_module("mlp", None)
            self.register_parameter("layer_scale_2", None)
        elif not boolean("mlp_bias", mlp_bias):
            self.mlp.fc1.register_parameter("bias", None)
            self.mlp.fc2.register_parameter("bias", None)

    def _shortcut(self, which: int) -> Tensor | bool:
        # a block without an MLP has no res_scale_2
        scale = getattr(self, "res_scale_1" if which == MIXER else "res_scale_2", None)
        return self.residual if scale is None else scale

    def mlp_with_stats(
        self, x: Tensor, stats: Tensor | None, return_stats: bool, residual: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        if self._modules["mlp"] is None:
            return x, stats
        return super().mlp_with_stats(x, stats, return_stats, residual)

    def mlp_unfused_reason(self) -> str | None:
        """Why the MLP sub-block is not one operator call, or None where it is."""
        return "the block has no MLP" if self._modules["mlp"] is None else super().mlp_unfused_reason()

    def add_to(self, chain: Chain) -> bool:
        """No chain has layers without a residual or with ResScale."""
        return False
