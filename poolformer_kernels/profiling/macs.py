"""Multiply-accumulates of a model, in the convention of fvcore's FlopCountAnalysis."""

from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import register_flop_formula

from ..nn import Mlp
from ..ops.backend import use_backend

__all__ = ["count_macs"]

_aten = torch.ops.aten
_ours = torch.ops.poolformer_kernels


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


# For FlopCounterMode, which counts what is executed, at two flops a multiply-accumulate.


@register_flop_formula([_ours.mlp_cpp, _ours.mlp_triton])
def _mlp_flops(x, w1, b1, w2, *_, out_shape, **__) -> int:
    return 2 * _tokens(x) * w1[0] * (w1[1] + w2[0])


@register_flop_formula([_ours.mlp_cpp_backward, _ours.mlp_triton_backward])
def _mlp_backward_flops(
    grad, x, mean_rstd, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, hidden,
    activation, norm, residual, parameter_grads, drop_grad, *, out_shape,
) -> int:  # fmt: skip
    """fc1 again unless its output was saved, the gradients of both inputs and, where asked, both weights."""
    recomputed = w1[1] if hidden is None else 0
    return 2 * _tokens(x) * w1[0] * ((w1[1] + w2[0]) * (1 + parameter_grads) + recomputed)


def _tokens(shape) -> int:
    return shape[0] * shape[2] * shape[3]


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
    additions nothing. A fused operator counts as the operations it stands for, in the forward pass alone
    (PyTorch's ``FlopCounterMode``, where this module registers the operators, counts what a kernel executes).

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
    # a hook makes an Mlp call the layers that its operator stands for
    hooks = [m.fc1.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, Mlp)]
    try:
        # no_grad, not inference_mode: there composite operators would reach the counter undecomposed
        with torch.no_grad(), use_backend("reference"), counter:
            torch.func.functional_call(model, state, (x,))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return counter.macs
