"""The cases of `launches`: problems that reach every kernel of a backend, in both memory formats."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from contract.check import check_of, laid
from contract.common import BF16, DTYPES, F16, F32, FORMATS
from contract.targets import TARGETS
from null_gpu import null_gpu
from support.devices import like_on, on
from support.layouts import as_layout
from support.operators import MLP, POOL_MIXER, Operator
from support.problems import Tensors
from support.rule import run

# (shape, pool size, dtypes). Kernels of the C++ mixer: one element at a time; 8 or 4 channels; along rows 8
# or 4 at a time; other pools; partials of statistics that are merged beforehand
MIXERS = {
    "cuda": (
        *(((2, 17, 13, 29), 3, DTYPES), ((2, 64, 8, 8), 3, DTYPES), ((2, 16, 6, 4), 3, DTYPES)),
        *(((2, 16, 7, 9), 5, DTYPES), ((1, 64, 96, 96), 3, (BF16,))),
    ),
    "triton": (((2, 64, 14, 14), 3, DTYPES), ((2, 17, 13, 29), 3, (BF16,)), ((2, 16, 7, 9), 5, (F32,))),
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
            inputs = POOL_MIXER.inputs(shape, dtype=dtype)
            name = f"mixer, pool {pool_size}, {_text(shape, dtype)}"
            yield name, partial(call, POOL_MIXER, inputs, pool_size=pool_size)
    for shape, hidden, activation, save_hidden, mixed, dtypes in MLPS[backend]:
        for dtype in dtypes:
            kind = F32 if mixed else dtype
            inputs = MLP.inputs(shape, hidden, dtype, weight_dtype=kind, vector_dtype=kind)
            what = f"{activation}{', fc1 saved' * save_hidden}{', float32 parameters' * mixed}"
            name = f"mlp, hidden {hidden}, {what}, {_text(shape, dtype)}"
            yield name, partial(call, MLP, inputs, activation=activation, save_hidden=save_hidden)


def compare(operator: Operator, inputs: Tensors, **options) -> None:
    """The contract's check; of "triton", for it has each gradient, also those that "cuda" leaves to it."""
    for layout in FORMATS:
        check_of(operator, TARGETS["triton"], inputs, layout=layout, residual=True, **options)


def launch_only(operator: Operator, inputs: Tensors, **options) -> set[str] | None:
    """The operator and its gradients; on the null GPU, the kernels that it recorded."""
    if null_gpu.ACTIVE:
        null_gpu.take()
    for layout in FORMATS:
        grad = like_on("cuda", as_layout(operator.grad(inputs), layout))
        run(operator.call, on("cuda", laid(inputs, layout)), grad, residual=True, **options)
    return {launch.name for launch in null_gpu.take() if launch.ours} if null_gpu.ACTIVE else None


def _text(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
