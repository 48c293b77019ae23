"""Multiply-accumulates of a model, in the convention of fvcore's FlopCountAnalysis."""

from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.backend import use_backend

__all__ = ["count_macs"]

_aten = torch.ops.aten


def _convolution(x, weight, bias, stride, padding, dilation, transposed, *_, out) -> int:
    pixels = x.shape[2:] if transposed else out.shape[2:]
    return x.shape[0] * weight.numel() * pixels.numel()


def _product(a, b, *_, out) -> int:
    return out.numel() * a.shape[-1]


def _norm(x, affine: bool) -> int:
    return x.numel() * (5 if affine else 4)


# aten operator -> (what it is counted as, multiply-accumulates of one call)
_COUNTED = {
    _aten.convolution.default: ("convolution", _convolution),
    _aten.linear.default: ("linear", _product),
    _aten.addmm.default: ("linear", lambda bias, a, b, **kw: _product(a, b, **kw)),
    _aten.mm.default: ("linear", _product),
    _aten.bmm.default: ("linear", _product),
    _aten.native_group_norm.default: ("group_norm", lambda x, w, *_, out: _norm(x, w is not None)),
    _aten.native_layer_norm.default: ("layer_norm", lambda x, shape, w, *_, out: _norm(x, w is not None)),
}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _COUNTED:
            kind, count = _COUNTED[func]
            self.macs[kind] += count(*args, out=out)
        return out


def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> Counter[str]:
    """Multiply-accumulates of one forward pass by kind of operator; ``.total()`` is the model's figure.

    fvcore's convention, the one of the published PoolFormer figures: a convolution or matrix product counts
    its multiplications, a normalisation 5 per element (4 without affine parameters), pooling, activations and
    additions nothing. A fused operator counts as the operations it stands for.

    Args:
        model: any module; it runs on meta tensors in eval mode, so nothing is computed and no weight copied.
        input_shape: the input's ``(B, C, H, W)``.

    Source: fvcore.nn.jit_handles; PoolFormer (arXiv 2111.11418), table 2.
    """
    state = {name: t.to("meta") for name, t in [*model.named_parameters(), *model.named_buffers()]}
    dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())
    x = torch.empty(input_shape, device="meta", dtype=dtype)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    counter = _Counter()
    try:
        # no_grad, not inference_mode: there composite operators would reach the counter undecomposed
        with torch.no_grad(), use_backend("reference"), counter:
            torch.func.functional_call(model, state, (x,))
    finally:
        for module, training in modes:
            module.training = training
    return counter.macs
