"""The cases of `launches`: problems that reach every kernel of a backend, in both memory formats."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from contract.check import check
from contract.targets import TARGETS
from null_gpu import null_gpu
from support import mlp as mlp_problems
from support import pool_mixer as mixer_problems
from support.devices import like_on, on
from support.layouts import as_layout
from support.rule import run

from poolformer_kernels.ops import mlp, pool_mixer

FORMATS = ("nchw", "channels_last")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ALL = (F32, BF16, F16)
# (shape, pool size, dtypes). Kernels of the C++ mixer: one element at a time; 8 or 4 channels; along rows 8
# or 4 at a time; other pools; partials of statistics that are merged beforehand
MIXERS = {
    "cuda": (
        *(((2, 17, 13, 29), 3, ALL), ((2, 64, 8, 8), 3, ALL), ((2, 16, 6, 4), 3, ALL)),
        *(((2, 16, 7, 9), 5, ALL), ((1, 64, 96, 96), 3, (BF16,))),
    ),
    "triton": (((2, 64, 14, 14), 3, ALL), ((2, 17, 13, 29), 3, (BF16,)), ((2, 16, 7, 9), 5, (F32,))),
}
# (x, hidden, activation, whether fc1's output is saved, whether the parameters are float32, dtypes). C++ has
# halves alone; Triton's kernels are one for narrow streams, a pair for wide ones
FORMS = (("gelu", False, False), ("gelu", True, False), ("relu", False, True), ("gelu", False, True))
MLPS = {
    "cuda": tuple(
        ((3, channels, 9, 7), 4 * channels, *form, (BF16, F16))
        for channels in (64, 96, 128, 192)
        for form in FORMS
    ),
    "triton": (
        ((4, 96, 14, 14), 384, "gelu", False, False, (BF16, F32)),
        ((4, 320, 14, 14), 640, "gelu", False, False, (BF16,)),
        ((4, 320, 14, 14), 640, "gelu", True, False, (BF16,)),
        ((3, 17, 13, 29), 70, "relu", False, True, (F16,)),
    ),
}


def cases(backend: str, values: bool) -> Iterator[tuple[str, Callable[[], set[str] | None]]]:
    """(name, call) of each; without ``values`` nothing is compared."""
    call = compare if values else launch_only
    for shape, pool_size, dtypes in MIXERS[backend]:
        for dtype in dtypes:
            inputs = mixer_problems.make_inputs(shape, dtype)
            name = f"mixer, pool {pool_size}, {_text(shape, dtype)}"
            yield name, partial(call, mixer_problems, pool_mixer, inputs, {}, pool_size=pool_size)
    for shape, hidden, activation, save_hidden, mixed, dtypes in MLPS[backend]:
        for dtype in dtypes:
            kind = F32 if mixed else dtype
            inputs = mlp_problems.make_inputs(shape, hidden, dtype, weight_dtype=kind, vector_dtype=kind)
            what = f"{activation}{', fc1 saved' * save_hidden}{', float32 parameters' * mixed}"
            name = f"mlp, hidden {hidden}, {what}, {_text(shape, dtype)}"
            given = {"save_hidden": save_hidden}
            yield name, partial(call, mlp_problems, mlp, inputs, given, activation=activation)


def compare(problems, function: Callable, inputs: dict, given: dict, **options) -> None:
    """The contract's check; of "triton", for it has each gradient, also those that "cuda" leaves to it."""
    for layout in FORMATS:
        settings = {"layout": layout, "given": given, "residual": True}
        check(TARGETS["triton"], problems, function, inputs, **settings, **options)


def launch_only(problems, function: Callable, inputs: dict, given: dict, **options) -> set[str] | None:
    """The operator and its gradients; on the null GPU, the kernels that it recorded."""
    if null_gpu.ACTIVE:
        null_gpu.take()
    grad = problems.make_grad(inputs)
    for layout in FORMATS:
        tensors = on("cuda", {**inputs, "x": as_layout(inputs["x"], layout)})
        run(function, tensors, like_on("cuda", as_layout(grad, layout)), residual=True, **given, **options)
    return {launch.name for launch in null_gpu.take() if launch.ours} if null_gpu.ACTIVE else None


def _text(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
