"""Tensors on another device, with their strides, and the fp64 truth computed there."""

from collections.abc import Callable

import torch
from torch import Tensor

from support.problems import Tensors
from support.rule import Truth


def like_on(device: str, t: Tensor) -> Tensor:
    """The tensor with its strides on the device: an expanded or sliced one stays so."""
    size = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    flat = t.as_strided((size + t.storage_offset(),), (1,), 0).to(device)
    return flat.as_strided(t.shape, t.stride(), t.storage_offset())


def on(device: str, tensors: Tensors) -> Tensors:
    return {name: t if t is None else like_on(device, t) for name, t in tensors.items()}


def truth_on(device: str, truth: Callable[..., Truth], inputs: Tensors, grad: Tensor, **options) -> Truth:
    """``truth`` in the device's float64, which is as good as the CPU's and much faster."""
    with torch.device(device):
        return truth(on(device, inputs), like_on(device, grad), **options)


def assert_same_truth(truth: Callable[..., Truth], inputs: Tensors, grad: Tensor, **options) -> None:
    """The device's truth is the CPU's."""
    ours, right = truth_on("cuda", truth, inputs, grad, **options), truth(inputs, grad, **options)
    for name, value in right.values.items():
        scale = right.scales[name].abs().max().item() if name in right.scales else 1.0
        torch.testing.assert_close(ours.values[name].cpu(), value, rtol=1e-9, atol=1e-12 * scale)
    for name, value in right.scales.items():
        torch.testing.assert_close(ours.scales[name].cpu(), value, rtol=1e-9, atol=0)
