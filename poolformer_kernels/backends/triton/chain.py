"""An inference chain on CUDA: the first call of its kind runs layer by layer and is written down.

The next calls are one operator call, which launches the same kernels (csrc/launch). What is written down
belongs to a shape, layout and dtype of x; the parameters' are compared in each call. Both CUDA backends have
it: layers of C++ kernels are calls of their operators, the others launches of Triton's kernels.
"""

import logging
import threading

import torch
import triton.language as tl
from torch import Tensor

from ... import reference
from ...ops.chain import CONV, MIXER, MLP, POOLS, Chain, Layer
from ...ops.checks import check_eps, check_vectors
from ...ops.dispatch import mlp_backend, select_backend
from ...ops.mlp import allows_tf32
from ...ops.mlp import check_arguments as check_mlp
from ...ops.pool_mixer import check_arguments as check_mixer
from ...ops.torch_private import tf32_allowed
from . import pool_mixer
from .config import OPTIONS, ceil_div, next_power_of_2
from .device import on_another_device
from .launch import hooks_set, kernel, launching_unavailable
from .mlp import forward as mlp
from .recorder import Recorder, fact
from .statistics import limit_partials, merge_partials, tensor_partials
from .tile import load_or_one, load_or_zero, round_to

__all__ = ["add_bias", "pool_head", "run", "run_layers"]

PLANS = 64  # that a chain keeps, the latest
BIAS_BLOCK = 4096  # elements that a program of `bias_stats` adds a bias to
HEAD_ROWS = 4  # pixels that `pool_head` adds at a time
_log = logging.getLogger("poolformer_kernels")
_lock = threading.Lock()  # while plans of a chain are added
_aten, _ours = torch.ops.aten, torch.ops.poolformer_kernels


@kernel(do_not_specialize=("tiles",))
def bias_stats(x_ptr, bias_ptr, stats_ptr, N, tiles, C: tl.constexpr, BLOCK: tl.constexpr):
    """Adds a bias to BLOCK elements of a sample, in place, and computes the partial of the result.

    x_ptr: x [B, N], channels innermost; changed
    bias_ptr: [C], or None
    stats_ptr: output partials [B, tiles, 3], fp32, or None
    N: elements of a sample
    tiles: partials of a sample
    C: channels
    BLOCK: elements of a partial, a power of two; a sample's last may have fewer
    """
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    start = (pid % tiles).to(tl.int64) * BLOCK
    ptr = x_ptr + b * N + start
    rest = N - start
    lane = tl.arange(0, BLOCK)
    ok = lane < rest
    value = tl.load(ptr + lane, mask=ok, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        c = ((start % C).to(tl.int32) + lane) % C
        if C % 8 == 0:  # each eight lanes have eight neighbours, so the bias is loaded as x is
            c = tl.max_contiguous(tl.multiple_of(c, 8), 8)
        rounded = round_to(value + load_or_zero(bias_ptr, c, ok), x_ptr.dtype.element_ty)
        tl.store(ptr + lane, rounded, mask=ok)
        value = rounded.to(tl.float32)
    if stats_ptr is not None:
        origin = tl.sum(tl.where(lane == 0, value, 0.0))  # so that a large mean costs no digits
        value = tl.where(ok, value - origin, 0.0)
        count = tl.minimum(rest, BLOCK).to(tl.float32)
        mean = tl.sum(value) / count
        m2 = tl.sum(tl.where(ok, (value - mean) * (value - mean), 0.0))
        out = stats_ptr + pid.to(tl.int64) * 3
        tl.store(out, count)
        tl.store(out + 1, origin + mean)
        tl.store(out + 2, m2)


@kernel(do_not_specialize=("HW", "T"))
def pool_head(
    x_ptr, weight_ptr, bias_ptr, stats_ptr, y_ptr, HW, T, eps, C: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """The features of one sample: norm and mean over pixels.

    x_ptr: x [B, HW, C], channels_last
    weight_ptr, bias_ptr: the norm's weight and bias [C], or None
    stats_ptr: partials of x [B, T, 3], fp32: GroupNorm, then the mean; None: the mean, then LayerNorm
    y_ptr: output [B, C]
    HW, T: pixels and partials of a sample
    eps: the norm's epsilon
    C: channels
    CHANNELS: a power of two, at least C
    ROWS: pixels that are added at a time
    MERGE: a power of two, at least T
    """
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    c_ok = c < C
    row = tl.arange(0, ROWS)
    x_ptr += b * HW * C
    origin = tl.load(x_ptr + c, mask=c_ok, other=0.0).to(tl.float32)  # so that a large mean costs no digits
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    start = 0
    while start < HW:
        ok = (start + row < HW)[:, None] & c_ok[None, :]
        value = tl.load(x_ptr + (start + row)[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        total += tl.where(ok, value - origin[None, :], 0.0)
        start += ROWS
    pooled = origin + tl.sum(total, 0) / HW
    if stats_ptr is not None:
        mean, variance = merge_partials(stats_ptr, b, T, MERGE)
        centred = pooled - mean
    else:
        pooled -= tl.sum(tl.where(c == 0, pooled, 0.0))
        centred = tl.where(c_ok, pooled - tl.sum(tl.where(c_ok, pooled, 0.0)) / C, 0.0)
        variance = tl.sum(centred * centred) / C
    y = centred / tl.sqrt_rn(variance + eps) * load_or_one(weight_ptr, c, c_ok) + load_or_zero(
        bias_ptr, c, c_ok
    )
    tl.store(y_ptr + b * C + c, round_to(y, y_ptr.dtype.element_ty), mask=c_ok)


def add_bias(x: Tensor, bias: Tensor | None, return_stats: bool) -> Tensor | None:
    """Adds ``bias`` [C] to a channels_last x in place; partials of the result ``[B, T, 3]``, or None."""
    batch, channels = x.shape[:2]
    elements = channels * x.shape[2] * x.shape[3]
    tiles = ceil_div(elements, BIAS_BLOCK)
    stats = None
    if return_stats:
        stats = torch.empty((batch, tiles, 3), dtype=torch.float32, device=x.device)
    bias_stats[(batch * tiles,)](
        x, bias, stats, elements, tiles, channels, BIAS_BLOCK, num_warps=8,
        maxnreg=128,  # ptxas by itself takes fewer in places, and spills
        **OPTIONS,
    )  # fmt: skip
    return stats


def head(x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor | None, eps: float) -> Tensor:
    """A head's norm and mean over pixels ``[B, C]``: GroupNorm first, by x's ``stats``, or LayerNorm last."""
    batch, channels, height, width = x.shape
    y = torch.empty((batch, channels), dtype=x.dtype, device=x.device)
    if stats is not None:
        stats = limit_partials(stats)
    partials = 1 if stats is None else stats.shape[1]
    pool_head[(batch,)](
        x, weight, bias, stats, y, height * width, partials, eps, channels, next_power_of_2(channels),
        HEAD_ROWS, next_power_of_2(partials), num_warps=8, **OPTIONS,
    )  # fmt: skip
    return y


def run(chain: Chain, x: Tensor) -> Tensor | None:
    """The chain's result for a channels_last x, or None where there is no plan for it."""
    if launching_unavailable() is not None or hooks_set():
        return None
    backend = select_backend(x.device, x.dtype)
    key = (backend, x.device, x.dtype, x.shape, x.stride(), x.data_ptr() % 16)
    if x.dtype == torch.float32:
        key = (*key, tf32_allowed.convolutions, tf32_allowed.matrix_products)
    plan = chain.plans.get(key, False)
    if plan is None:
        return None
    if plan and (result := _ours.chain_cuda.default(x, chain.distinct_parameters, plan.number)):
        return result[0]
    # The call is new, or the parameters have other shapes or dtypes now, or memory is exhausted.
    return _record(chain, x, backend, key)


def run_layers(layers: list[Layer], x: Tensor, backend: str, call) -> Tensor:
    """The layers on a channels_last x. ``call(op, *args)`` calls an operator that is no Triton kernel's."""
    stats, pooled = None, False
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        wanted = following is not None and following.kind in (MIXER, MLP, POOLS["official"])
        if layer.kind == CONV:
            (weight,), (bias,), (stride, padding) = layer[1:4]
            if pooled:
                x = call(_aten.linear.default, x, weight, bias)
                continue
            x = call(_aten.convolution.default, x, weight, None, *_same(stride, padding), False, [0, 0], 1)
            x = x.contiguous(
                memory_format=torch.channels_last
            )  # without cuDNN it is not, and there is no plan
            if bias is not None or wanted:
                stats = add_bias(x, bias, wanted)
        elif layer.kind == MIXER:
            x, stats = _mixer(layer, x, stats, wanted, backend, call)
        elif layer.kind == MLP:
            x, stats = _mlp(layer, x, stats, wanted, backend, call)
        else:
            names = zip(("weight", "bias"), layer.vectors, strict=True)
            check_vectors(x, tuple((name, v, "C", x.shape[1]) for name, v in names))
            check_eps(layer.eps)
            official = layer.kind == POOLS["official"]
            if official and stats is None:
                stats = tensor_partials(x)
            x = head(x, *layer.vectors, stats if official else None, layer.eps)
            pooled, stats = True, None
    return x


def _same(stride: int, padding: int) -> tuple[list[int], list[int], list[int]]:
    """(stride, padding, dilation) of a convolution, the same in both directions."""
    return [stride, stride], [padding, padding], [1, 1]


def _mixer(
    layer: Layer, x: Tensor, stats: Tensor | None, wanted: bool, backend: str, call
) -> tuple[Tensor, Tensor | None]:
    weight, bias, scale = layer.vectors
    check_mixer(x, weight, bias, scale, None, stats, layer.numbers[0], layer.eps, True)
    arguments = (x, weight, bias, scale, None, stats, layer.numbers[0], layer.eps, True, wanted)
    if backend == "cuda":
        y, _, y_stats = call(_ours.pool_mixer_cuda.default, *arguments)
    else:
        y, _, y_stats = pool_mixer.forward(*arguments)
    return y, y_stats if wanted else None


def _mlp(
    layer: Layer, x: Tensor, stats: Tensor | None, wanted: bool, backend: str, call
) -> tuple[Tensor, Tensor | None]:
    w1, w2 = layer.weights
    b1, b2, norm_weight, norm_bias, scale = layer.vectors
    activation = [*reference.ACTIVATIONS][layer.numbers[0]]
    check_mlp(
        x, w1, b1, w2, b2, activation, True, norm_weight, norm_bias, layer.eps, scale, None, True, False,
        stats, None,
    )  # fmt: skip
    arguments = (
        x, w1, b1, w2, b2, norm_weight, norm_bias, scale, None, stats, activation, layer.eps, True, True,
        wanted, False,
    )  # fmt: skip
    sizes = x.shape[1], w1.shape[0], w2.shape[0]
    if backend == "cuda" and mlp_backend(backend, x.device, sizes, x.dtype)[0] == "cuda":
        y, _, y_stats, _ = call(_ours.mlp_cuda.default, *arguments)
    else:
        y, _, y_stats, _ = mlp.forward(*arguments, x.dtype, allows_tf32(x, w1, w2))
    return y, y_stats if wanted else None


class _Plan:
    """A plan of the extension, which is forgotten with this object."""

    def __init__(self, number: int) -> None:
        from ..._C import free_plan

        self.number, self._free = number, free_plan

    def __del__(self) -> None:
        self._free(self.number)


def _record(chain: Chain, x: Tensor, backend: str, key: tuple) -> Tensor | None:
    """Runs the layers on x; keeps a plan, or None where there can be none."""
    from ..._C import Tape

    if not _takes(chain, x):
        return None
    if on_another_device(x):
        with torch.cuda.device_of(x):
            return _record(chain, x, backend, key)
    tape = Tape()
    with Recorder(tape) as recorder:
        y = run_layers(chain.layers, x, backend, recorder.call)
    try:
        inputs = [fact(t) for t in (x, *chain.distinct_parameters)]
        plan = _Plan(tape.finish_chain(inputs, fact(y), x.get_device()))
    except RuntimeError as error:
        _log.info("no plan of the inference on %s of %s: %s", backend, list(x.shape), error)
        plan = y = None
    with _lock:
        while len(chain.plans) >= PLANS:
            chain.plans.pop(next(iter(chain.plans)))
        chain.plans[key] = plan
    return y


def _takes(chain: Chain, x: Tensor) -> bool:
    """Whether the parameters are plain tensors, of x's dtype and device where the kernels want that.

    What else is wrong the operators' own checks find, and of a convolution's bias its module.
    """
    if any(type(p) not in (Tensor, torch.nn.Parameter) or p.device != x.device for p in chain.parameters):
        return False
    for kind, weights, vectors, *_ in chain.layers:
        if any(w.dtype != x.dtype for w in weights):
            return False
        given = [v for v in vectors if v is not None]
        if kind == CONV and any(v.dtype != x.dtype or v.shape != weights[0].shape[:1] for v in given):
            return False
    return True
