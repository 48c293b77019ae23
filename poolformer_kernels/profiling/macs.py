"""Multiply-accumulates in two conventions, fvcore's and torch's, and the bytes that eager PyTorch moves."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..nn import Mlp
from ..ops.dispatch import use_backend
from ..ops.torch_private import TorchDispatchMode, tree_leaves

__all__ = ["EagerCost", "count_macs", "eager_cost", "written_out"]

Result = TypeVar("Result")
_aten = torch.ops.aten


def _convolution(x, weight, bias, stride, padding, dilation, transposed, *_, out) -> int:
    pixels = x.shape[2:] if transposed else out.shape[2:]
    return x.shape[0] * weight.numel() * pixels.numel()


def _product(a, b, *_, out) -> int:
    return out.numel() * a.shape[-1]


def _norm(x, affine: bool) -> int:
    return x.numel() * (5 if affine else 4)


# aten operator -> (the kind that it is counted as, a function that returns one call's multiply-accumulates)
_COUNTED = {
    _aten.convolution.default: ("convolution", _convolution),
    _aten.linear.default: ("linear", _product),
    _aten.addmm.default: ("linear", lambda bias, a, b, **kw: _product(a, b, **kw)),
    _aten.mm.default: ("linear", _product),
    _aten.bmm.default: ("linear", _product),
    _aten.native_group_norm.default: ("group_norm", lambda x, w, *_, out: _norm(x, w is not None)),
    _aten.native_batch_norm.default: ("batch_norm", lambda x, w, *_, out: x.numel() * (1 + (w is not None))),
    _aten.native_layer_norm.default: ("layer_norm", lambda x, shape, w, *_, out: _norm(x, w is not None)),
    _aten.upsample_nearest2d.default: ("upsampling", lambda x, *_, out: out.numel()),
    _aten.upsample_bilinear2d.default: ("upsampling", lambda x, *_, out: 4 * out.numel()),
}


# These need a statistic of the whole sample before they can write the first element: they read their input
# twice.
_READ_TWICE = {_aten.native_group_norm.default, _aten.native_layer_norm.default}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _COUNTED:
            kind, count = _COUNTED[func]
            self.macs[kind] += count(*args, out=out)
        if not func.is_view:
            read = (args, kwargs, args[0]) if func in _READ_TWICE else (args, kwargs)
            self.moved += sum(t.nbytes for t in tree_leaves((read, out)) if isinstance(t, Tensor))
        return out


def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> Counter[str]:
    """Multiply-accumulates of one forward pass by kind of operator; ``.total()`` is the model's figure.

    fvcore's convention, the one of the published PoolFormer figures: a convolution or matrix product counts
    its multiplications, a normalisation 5 per element (4 without affine parameters; a batch norm 2 and 1),
    upsampling 1 per element of its result (bilinear 4), pooling, activations and additions nothing. A fused
    operator counts as the operations it stands for.

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
        # no_grad, because in inference_mode composite operators would reach the counter undecomposed
        with torch.no_grad(), written_out(model), counter:
            torch.func.functional_call(model, state, (x,))
    finally:
        for module, training in modes:
            module.training = training
    return counter.macs


@contextmanager
def written_out(model: nn.Module) -> Iterator[None]:
    """Within it the model's calls consist of PyTorch's own operators."""
    # with a hook on fc1 an Mlp calls its layers one by one instead of its fused operator
    hooks = [m.fc1.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, Mlp)]
    try:
        with use_backend("reference"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class EagerCost:
    """Multiply-accumulates by fvcore's convention and by ``FlopCounterMode`` (FLOPs / 2); bytes moved."""

    macs_fvcore: int
    macs_flop_counter: int
    moved: int


def eager_cost(call: Callable[..., Result], *args: object) -> tuple[EagerCost, Result]:
    """What ``call(*args)`` costs as it is written, operator by operator; and its result.

    Every ATen operator reads its tensors and writes its results, a normalisation reading its input twice,
    for the statistics and for the result; views move nothing. Caches are not modelled. What the numbers
    stand for is in `count_macs`.

    Args:
        call: a function of plain PyTorch operators; on meta tensors nothing is computed.
        args: its arguments.
    """
    counter, flops = _Counter(), FlopCounterMode(display=False)
    with torch.no_grad(), flops, counter:  # `flops` takes some operators apart, so it is behind the counter
        y = call(*args)
    return EagerCost(counter.macs.total(), flops.get_total_flops() // 2, counter.moved), y
