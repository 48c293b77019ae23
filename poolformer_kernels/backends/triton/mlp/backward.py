"""The MLP's backward in Triton: prepares a call, chooses one of two forms, finishes its reductions."""

import torch
from torch import Tensor

from ....layout import memory_format_of
from ..device import as_aligned, device_of, on_another_device
from . import backward_fused, backward_gemm
from .backward_finish import Gradients, finish
from .backward_shared import Problem
from .config import FusedBackward, backward_launch, product_precision

__all__ = ["backward"]


def backward(
    grad: Tensor,
    x: Tensor,
    mean_rstd: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    hidden: Tensor | None,
    activation: str,
    norm: bool,
    residual: bool,
    parameter_grads: bool,
    drop_grad: bool,
    operand: torch.dtype,
    allow_tf32: bool,
) -> tuple[Tensor, ...]:
    """The op ``mlp_triton_backward``: the gradients of x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale
    and drop_scale.

    Each has the shape and dtype of what it belongs to, and is float32 where that is None. dx has the memory
    format of x, the others are dense. A gradient that is not asked for is empty.
    """
    if on_another_device(x):
        with torch.cuda.device_of(x):
            return backward(
                *(grad, x, mean_rstd, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale),
                *(hidden, activation, norm, residual, parameter_grads, drop_grad, operand, allow_tf32),
            )
    fmt = memory_format_of(x)
    dx = torch.empty_like(x, memory_format=fmt)
    channels, width, out = x.shape[1], w1.shape[0], w2.shape[0]
    empty_batch = x.shape[0] == 0
    create = torch.zeros if empty_batch else torch.empty
    shapes = (w1.shape, (width,), w2.shape, (out,), (channels,), (channels,), (out,))
    gradients = Gradients(
        *(
            create(shape if parameter_grads else (0,), dtype=_dtype(p), device=x.device)
            for p, shape in zip((w1, b1, w2, b2, norm_weight, norm_bias, layer_scale), shapes, strict=True)
        )
    )
    if empty_batch:
        return dx, *gradients, torch.empty(0, dtype=_dtype(drop_scale), device=x.device)
    dense = (w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, hidden)
    w1, b1, w2, b2, gamma, beta, scale, drop, hidden = (None if p is None else p.contiguous() for p in dense)
    w1 = as_aligned(w1)
    weights = {"dtype": operand, "device": x.device}
    precision = product_precision(operand, allow_tf32)
    problem = Problem(
        grad=as_aligned(grad.contiguous(memory_format=fmt)),
        x=as_aligned(x.contiguous(memory_format=fmt)),
        dx=dx,
        mean_rstd=mean_rstd.contiguous(),
        gamma=gamma,
        beta=beta,
        scale=scale,
        drop=drop,
        given_w1=w1,
        b1=b1,
        given_w2=w2,
        b2=b2,
        hidden=hidden,
        w1=w1 if w1.dtype == operand else torch.empty((width, channels), **weights),
        w2t=torch.empty((width, out), **weights),
        table=torch.empty((4, width), dtype=torch.float32, device=x.device),
        activation=activation,
        channels_last=fmt is torch.channels_last,
        norm=norm,
        residual=residual,
        parameter_grads=parameter_grads,
        drop_grad=drop_grad,
        scaled=operand == torch.float16 and scale is not None,
        precision=precision,
    )
    launch = backward_launch(channels, out, width, operand.itemsize, device_of(x), precision)
    form = backward_fused if isinstance(launch, FusedBackward) else backward_gemm
    sums = form.compute_partials(problem, launch)
    if parameter_grads:
        finish(problem, sums, gradients)
    ddrop = sums.ddrop
    if ddrop is None:
        ddrop = torch.empty(0, dtype=_dtype(drop_scale), device=x.device)
    return dx, *gradients, ddrop


def _dtype(p: Tensor | None) -> torch.dtype:
    """That of a parameter's gradient."""
    return torch.float32 if p is None else p.dtype
