"""The channel MLP as a module: `poolformer_kernels.ops.mlp` where that computes the same."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .checks import boolean, hooked, makes_module, positive_int, probability, tracing
from .factory import Device, placed
from .layers import StarReLU
from .names import class_path, more_than_forward

__all__ = ["TRACED", "Mlp", "activation_name", "pointwise_reason"]

TRACED = "a trace is being made, which must run without this package"


class Mlp(nn.Module):
    """Two 1x1 convolutions (or linear layers) with an activation between: the official ``Mlp``.

    Equivalent PyTorch::

        y = drop(fc2(drop(act(fc1(x)))))

    This is one call of `poolformer_kernels.ops.mlp` as long as `unfused_reason` is None; otherwise the
    modules are called one by one.

    Args:
        in_features: channels C of x.
        hidden_features: channels between; ``in_features`` when None.
        out_features: channels of the result; ``in_features`` when None.
        act_layer: called without arguments. The operator computes ``nn.GELU`` (both forms), ``nn.ReLU``,
            ``nn.SiLU`` and `StarReLU`.
        drop: dropout probability after the activation and after fc2.
        bias: fc1 and fc2 have biases.
        use_conv: fc1 and fc2 are ``nn.Conv2d`` and x is ``[B, C, H, W]`` (or ``[C, H, W]``); else they are
            ``nn.Linear`` and x is ``[..., C]``.
        save_hidden: see `poolformer_kernels.ops.mlp`.
        device, dtype: of the parameters, as in torch.nn.

    A state dict with weights ``[out, in]`` or ``[out, in, 1, 1]`` loads into either kind of layer.

    timm's ``Mlp`` computes the same from the same parameters, with these differences: its default is
    ``use_conv=False``; it has a ``norm_layer`` before fc2, its fifth argument, and ``bias`` is its sixth;
    ``bias`` and ``drop`` may be pairs, one for each layer; its dropouts are two modules, ``drop1`` and
    ``drop2``; and its weights start as PyTorch's, while here they start as the official code's, normal with
    a standard deviation of 0.02, and biases as 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Source: MetaFormer (arXiv 2111.11418), equation 3.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        *,
        bias: bool = True,
        use_conv: bool = True,
        save_hidden: bool | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = positive_int("in_features", in_features)
        hidden = channels if hidden_features is None else positive_int("hidden_features", hidden_features)
        out = channels if out_features is None else positive_int("out_features", out_features)
        makes_module("act_layer", act_layer, "torch.nn.GELU")
        boolean("bias", bias)
        make: Callable[..., nn.Conv2d | nn.Linear] = nn.Linear
        if boolean("use_conv", use_conv):
            make = partial(nn.Conv2d, kernel_size=1)
        self.save_hidden = boolean("save_hidden", save_hidden, optional=True)
        with placed(self, device, dtype):
            self.fc1 = make(channels, hidden, bias=bias)
            self.act = act_layer()
            self.fc2 = make(hidden, out, bias=bias)
            self.drop = nn.Dropout(probability("drop", drop))
        for fc in (self.fc1, self.fc2):
            nn.init.trunc_normal_(fc.weight, std=0.02)
            if bias:
                nn.init.zeros_(fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        linear = type(self._modules["fc1"]) is nn.Linear
        if self.unfused_reason() is not None or (linear and x.numel() == 0):  # an image needs a pixel
            x = self.drop(self.act(self.fc1(x)))
            return self.drop(self.fc2(x))
        if not linear:
            return self._operator(x[None])[0] if x.dim() == 3 else self._operator(x)
        if x.dim() == 0:
            raise ValueError("x must have shape [..., C], got []")
        # a view of x: all tokens as one channels_last image that is one pixel high
        tokens = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
        return self._operator(tokens).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)

    def _operator(self, x: Tensor) -> Tensor:
        return ops.mlp(x, *self.operator_weights(), activation=self.activation, save_hidden=self.save_hidden)

    def operator_weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(w1, b1, w2, b2) of the operator: the layers' own, or with StarReLU's scalars folded into fc2's."""
        modules = self._modules
        fc1, act, fc2 = modules["fc1"], modules["act"], modules["fc2"]
        if type(act) is StarReLU:
            return fc1.weight, fc1.bias, *act.fold(fc2.weight, fc2.bias)
        return fc1.weight, fc1.bias, fc2.weight, fc2.bias

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The old name of `operator_weights`, until 0.3.0."""
        message = "Mlp.operands is now Mlp.operator_weights; the old name goes in 0.3.0"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self.operator_weights()

    @property
    def activation(self) -> str | None:
        """The operator's name for ``act``, or None where it has none."""
        act = self._modules["act"]
        return "relu_squared" if type(act) is StarReLU else activation_name(act)

    def unfused_reason(self) -> str | None:
        """Why a call is not one operator call, or None where it is."""
        modules = self._modules  # an attribute of a module costs nearly 1 us, and this is asked in every call
        fc1, act, fc2, drop = modules["fc1"], modules["act"], modules["fc2"], modules["drop"]
        if tracing():
            return TRACED
        if self.activation is None:
            return f"act is {class_path(act)}, not GELU, ReLU, SiLU or StarReLU"
        if type(drop) is nn.Dropout:
            if drop.p > 0 and drop.training:
                return f"drop is active (p = {drop.p})"
        elif type(drop) is not nn.Identity:
            return f"drop is {class_path(drop)}, not Dropout or Identity"
        if type(fc1) is nn.Conv2d and type(fc2) is nn.Conv2d:
            for name, fc in (("fc1", fc1), ("fc2", fc2)):
                reason = pointwise_reason(name, fc)
                if reason is not None:
                    return reason
        elif type(fc1) is not nn.Linear or type(fc2) is not nn.Linear:
            return f"fc1 and fc2 are {class_path(fc1)} and {class_path(fc2)}, not Conv2d or Linear"
        for name, module in (("fc1", fc1), ("act", act), ("fc2", fc2), ("drop", drop)):
            if hooked(module):
                return more_than_forward(name, module)
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, fc in (("fc1", self.fc1), ("fc2", self.fc2)):
            key = f"{prefix}{name}.weight"
            given, own = state_dict.get(key), getattr(fc, "weight", None)
            if isinstance(given, Tensor) and isinstance(own, Tensor):
                sizes = [(*t.shape, 1, 1)[:4] for t in (given, own)]
                if given.dim() != own.dim() and sizes[0] == sizes[1]:
                    state_dict[key] = given.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def activation_name(act: nn.Module) -> str | None:
    """The operator's name for an activation of PyTorch's, or None where it has none."""
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    return _ACTIVATIONS.get(type(act))


def pointwise_reason(name: str, fc: nn.Conv2d) -> str | None:
    """Why a convolution is not a linear layer of each pixel, or None where it is one."""
    if fc.kernel_size == fc.stride == (1, 1) and fc.padding == (0, 0) and fc.groups == 1:
        return None
    return f"{name} is not a 1x1 convolution of stride 1, without padding and groups"


_ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu"}
