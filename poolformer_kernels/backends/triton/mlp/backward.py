"""The MLP's backward in Triton: prepares a call, chooses one of two forms, finishes its reductions."""

import torch
from torch import Tensor

from ....layout import memory_format_of
from ..device import device_of, on_another_device
from . import backward_fused, backward_gemm
from .backward_shared import Problem, prepare_weights, sum_rows, weight_gradient
from .config import FusedBackward, backward_launch

__all__ = ["backward"]

_HALVES = (torch.bfloat16, torch.float16)


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
) -> tuple[Tensor, ...]:
    """The op ``mlp_triton_backward``: the gradients of x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale
    and drop_scale.

    dx has the shape, dtype and memory format of x. dw1 and dw2 are dense, with the weights' dtype and shape;
    the vectors are float32. A gradient that is not asked for is empty.
    """
    if on_another_device(x):
        with torch.cuda.device_of(x):
            return backward(
                *(grad, x, mean_rstd, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale),
                *(hidden, activation, norm, residual, parameter_grads, drop_grad),
            )
    fmt = memory_format_of(x)
    dx = torch.empty_like(x, memory_format=fmt)
    channels, width, out = x.shape[1], w1.shape[0], w2.shape[0]
    vectors = {"dtype": torch.float32, "device": x.device}
    none = torch.empty(0, **vectors)
    if x.shape[0] == 0:
        if not parameter_grads:
            return (dx, w1.new_empty(0), none, w2.new_empty(0), none, none, none, none, none)
        dw1, dw2 = (torch.zeros(w.shape, dtype=w.dtype, device=w.device) for w in (w1, w2))
        db1, db2, dgamma, dbeta, dscale = (
            torch.zeros(size, **vectors) for size in (width, out, channels, channels, out)
        )
        return dx, dw1, db1, dw2, db2, dgamma, dbeta, dscale, none

    operand = x.dtype if x.dtype in _HALVES else w1.dtype
    dense = [None if p is None else p.contiguous() for p in (w1, w2, b1, b2, norm_weight, norm_bias)]
    w1, w2, b1, b2, norm_weight, norm_bias = dense
    layer_scale, drop_scale, hidden = (
        None if p is None else p.contiguous() for p in (layer_scale, drop_scale, hidden)
    )
    operands, w2t, table, scaled = prepare_weights(w1, b1, w2, norm_weight, norm_bias, layer_scale, operand)
    problem = Problem(
        grad.contiguous(memory_format=fmt),
        x.contiguous(memory_format=fmt),
        dx,
        mean_rstd.contiguous(),
        norm_weight,
        norm_bias,
        layer_scale,
        drop_scale,
        b2,
        hidden,
        operands,
        w2t,
        table,
        activation,
        fmt is torch.channels_last,
        norm,
        residual,
        parameter_grads,
        drop_grad,
        scaled,
    )
    launch = backward_launch(channels, out, width, operand.itemsize, device_of(x))
    form = backward_fused if isinstance(launch, FusedBackward) else backward_gemm
    sums = form.compute_partials(problem, launch)
    ddrop = sums.ddrop if drop_grad else none
    if not parameter_grads:
        return dx, w1.new_empty(0), none, w2.new_empty(0), none, none, none, none, ddrop
    dw1, _, _ = weight_gradient(sums.dw1, w1)
    dw2, dscale, db2 = weight_gradient(sums.dw2, w2, layer_scale, w2, b2, sum_rows(sums.grad))
    dnorm = sum_rows(sums.dnorm) if norm else torch.zeros(2 * channels, **vectors)
    dgamma, dbeta = dnorm[:channels], dnorm[channels:]
    return dx, dw1, sum_rows(sums.db1), dw2, db2, dgamma, dbeta, dscale, ddrop
