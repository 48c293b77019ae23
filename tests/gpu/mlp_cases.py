"""The MLP's problems on the device, those that each backend computes itself, and the error rule on them."""

from itertools import product

import torch
from support.devices import like_on, on, truth_on
from support.layouts import as_layout
from support.mlp import PLAIN, VECTORS, eager, make_grad, truth, ulps_of, y_of_mlp_with_stats
from support.problems import HALVES
from support.rule import assert_close_to_fp64, assert_same, run

from poolformer_kernels.backends.cuda import mlp_unsupported
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import mlp

FORMS = {  # parameters, residual
    "plain": (PLAIN, False),
    "norm": (("b1", "b2", "norm_weight", "norm_bias"), False),
    "residual": (VECTORS, True),
}

# ---- Triton: (x, hidden)

STAGES = (
    ((8, 64, 56, 56), 256),
    ((4, 128, 28, 28), 512),
    ((3, 320, 14, 14), 1280),
    ((3, 512, 7, 7), 2048),
    ((2, 96, 56, 56), 384),
    ((2, 192, 28, 28), 768),
)
ODD = (  # cut chunks and tiles, C in two parts, few pixels, one channel, many samples
    ((3, 17, 13, 29), 70),
    ((513, 24, 1, 1), 33),
    ((2, 1, 5, 31), 1),
    ((1, 160, 6, 11), 257),
    ((2, 200, 6, 6), 50),
    ((1, 513, 2, 16), 31),
)
FUSED, PAIR = ((4, 96, 14, 14), 384), ((4, 320, 14, 14), 640)
EACH = (FUSED, PAIR)

# ---- CUDA C++: halves in 64, 96, 128 or 192 channels. Other MLPs stay with Triton and are tested there.
#
# Hopper has a kernel of its own for gelu where fc1's output is not saved. Its blocks stay, 132 on an H200,
# and take 3 (2 from 128 channels on) tiles of 64 tokens a round: ROUNDS has a second round that lacks a tile.
# Weights stay in shared memory where they fit, else go round: in the second problem and the last two.

ROUNDS = (
    ((9, 64, 56, 57), 256),
    ((9, 64, 56, 57), 320),
    ((9, 96, 56, 57), 384),
    ((21, 128, 29, 28), 512),
    ((21, 192, 29, 28), 768),
)
SMALL = (  # samples that share tiles; three tiles and more
    ((3, 64, 9, 6), 128),
    ((4, 96, 14, 14), 384),
    ((3, 128, 14, 13), 512),
)
NARROW = (  # one token, few pixels, many samples, the widest hidden
    *SMALL,
    ((3, 192, 9, 6), 128),
    ((1, 64, 1, 1), 64),
    ((5, 128, 1, 3), 192),
    ((513, 64, 7, 7), 64),
    ((2, 96, 8, 16), 448),
    ((2, 64, 5, 13), 4096),
    ((1, 192, 5, 13), 4096),
)
KERNELS = {
    "triton": ("gelu",),
    "cuda": ("gelu", "relu"),
}  # activations that reach every kernel of the forward
DTYPE = {"triton": torch.float32, "cuda": torch.bfloat16}  # where a test has one

assert not any(mlp_unsupported(x[1], hidden, x[1], torch.float16) for x, hidden in (*ROUNDS, *NARROW))


def each(problems, *axes) -> list[tuple]:
    """(x, hidden, ...) for every problem and combination of the axes."""
    return [(*problem, *rest) for problem in problems for rest in product(*axes)]


def assert_rule(ours, theirs, right, inputs, y_dtype, operand, what="") -> None:
    for name, value in ours.items():
        dtype = y_dtype if name == "y" else inputs[name[1:]].dtype
        assert value.dtype == dtype, f"{what}{name}: {value.dtype}, not {dtype}"
        assert_close_to_fp64(
            value, theirs[name], right.values[name], scale=right.scales[name],
            ulps=ulps_of(value.dtype, operand, 8), what=what + name,
        )  # fmt: skip


def check(
    inputs, grad=None, *, layouts=("nchw",), device="cuda", stats=None, save_hidden=False, **options
) -> None:
    """The error rule with x in these layouts; nothing given is written to, y and dx are dense."""
    grad = make_grad(inputs) if grad is None else grad
    plain = {name: t if t is None else t.contiguous() for name, t in on(device, inputs).items()}
    theirs = run(eager, plain, like_on(device, grad).contiguous(), **options)
    right = truth_on(device, truth, inputs, grad, **options)
    operand = inputs["x" if inputs["x"].dtype in HALVES else "w1"].dtype
    given = {} if stats is None else {"stats": stats.to(device)}
    for layout in layouts:
        laid = {**inputs, "x": as_layout(inputs["x"], layout)}
        cuda, cuda_grad = on(device, laid), like_on(device, grad)
        before = {name: t.clone() for name, t in cuda.items() if t is not None}
        function = mlp if stats is None else y_of_mlp_with_stats
        ours = run(function, cuda, cuda_grad, save_hidden=save_hidden, **given, **options)
        assert_same({name: cuda[name] for name in before}, before)
        assert torch.equal(cuda_grad.cpu(), grad)
        assert_rule(ours, theirs, right, inputs, inputs["x"].dtype, operand, f"{layout} ")
        assert {value.device for value in ours.values()} == {cuda["x"].device}
        fmt = memory_format_of(laid["x"])
        assert ours["y"].is_contiguous(memory_format=fmt)
        assert ours["dx"].is_contiguous(memory_format=fmt)
