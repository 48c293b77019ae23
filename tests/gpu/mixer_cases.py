"""The error rule for the token mixer on the device: truth is its fp64, eager NCHW there (pytorch#188344)."""

import torch
from support.devices import like_on, on, truth_on
from support.layouts import as_layout
from support.pool_mixer import eager, make_grad, truth
from support.rule import assert_close_to_fp64, assert_same, run

from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import pool_mixer


def check(inputs, grad=None, *, layouts=("nchw",), device="cuda", **options) -> None:
    """The error rule with x in these layouts, on the device; nothing given is written to."""
    grad = make_grad(inputs) if grad is None else grad
    plain = {name: t if t is None else t.contiguous() for name, t in on(device, inputs).items()}
    theirs = run(eager, plain, like_on(device, grad).contiguous(), **options)
    right = truth_on(device, truth, inputs, grad, **options)
    for layout in layouts:
        laid = {**inputs, "x": as_layout(inputs["x"], layout)}
        cuda, cuda_grad = on(device, laid), like_on(device, grad)
        before = {name: t.clone() for name, t in cuda.items() if t is not None}
        ours = run(pool_mixer, cuda, cuda_grad, **options)
        assert_same({name: cuda[name] for name in before}, before)
        assert torch.equal(cuda_grad.cpu(), grad)
        for name, value in ours.items():
            assert value.dtype == inputs["x" if name == "y" else name[1:]].dtype
            assert value.device == cuda["x"].device
            assert_close_to_fp64(
                value,
                theirs[name],
                right.values[name],
                scale=right.scales[name],
                ulps=8,
                what=f"{layout} {name}",
            )
        assert ours["y"].is_contiguous(memory_format=memory_format_of(laid["x"]))
