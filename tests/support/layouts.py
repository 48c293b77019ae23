"""The same values behind other strides, between NaN that a wrong stride would read."""

import torch
from torch import Tensor

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CHANNELS_LAST = ("channels_last", "sliced_c_last", "sliced_hw_last", "offset_last")
LAYOUTS = ("nchw", "sliced_c", "sliced_hw", "transposed", "expanded", "offset", *CHANNELS_LAST)
GRAD_LAYOUTS = (*LAYOUTS, "expanded_hw", "expanded_all")
VECTOR_LAYOUTS = ("strided", "expanded", "offset", "column")
WEIGHT_LAYOUTS = ("channels_last", "transposed", "strided", "padded", "offset", "expanded")


def as_layout(t: Tensor, layout: str) -> Tensor:
    """t's values behind other strides, between NaN that a wrong stride would read; expanded ones repeat."""
    batch, channels, height, width = t.shape
    if layout.endswith("_last") and layout != "channels_last":
        inner = as_layout(
            t.permute(0, 2, 3, 1), {"sliced_c": "inner", "sliced_hw": "middle"}.get(layout[:-5], "offset")
        )
        return inner.permute(0, 3, 1, 2)
    if layout == "nchw":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return t[:1].clone().expand(t.shape)
    if layout == "expanded_hw":  # what global average pooling hands back
        return t[:, :, :1, :1].clone().expand(t.shape)
    if layout == "expanded_all":  # what y.sum() hands back
        return t[:1, :1, :1, :1].clone().expand(t.shape)
    if layout == "offset":
        return t.new_full((t.numel() + 1,), float("nan"))[1:].view(t.shape).copy_(t)
    sizes, region = {
        "sliced_c": ((batch, channels + 3, height, width), (..., slice(1, -2), slice(None), slice(None))),
        "sliced_hw": ((batch, channels, height + 2, width + 3), (..., slice(1, -1), slice(2, -1))),
        "inner": ((batch, channels, height, width + 3), (..., slice(1, -2))),
        "middle": ((batch, channels + 2, height + 3, width), (slice(None), slice(1, -1), slice(2, -1))),
    }[layout]
    return t.new_full(sizes, float("nan"))[region].copy_(t)


def as_vector_layout(t: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return t.new_full((2 * len(t),), float("nan"))[::2].copy_(t)
    if layout == "expanded":
        return t[:1].clone().expand(len(t))
    if layout == "offset":
        return t.new_full((len(t) + 1,), float("nan"))[1:].copy_(t)
    return t.new_full((len(t), 3), float("nan"))[:, 1].copy_(t)


def as_weight_layout(w: Tensor, layout: str) -> Tensor:
    """w's values behind other strides, between NaN that a wrong stride would read; expanded ones repeat."""
    rows, columns = w.shape[:2]
    if layout == "channels_last":
        return w.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return w.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return w[:1].clone().expand(w.shape)
    if layout == "offset":
        return w.new_full((w.numel() + 1,), float("nan"))[1:].view(w.shape).copy_(w)
    if layout == "strided":
        return w.new_full((2 * rows, *w.shape[1:]), float("nan"))[::2].copy_(w)
    return w.new_full((rows, columns + 3, *w.shape[2:]), float("nan"))[:, 1:-2].copy_(w)
