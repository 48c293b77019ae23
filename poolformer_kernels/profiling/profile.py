"""Where a PoolFormer's parameters, multiply-accumulates, bytes and time go: layer by layer."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..models import MetaFormer, PoolFormer, PoolFormerV2
from ..ops.dispatch import select_backend, use_backend
from .layers import Layer
from .layers import layers as model_layers
from .limits import LimitProbes, Limits
from .macs import EagerCost, eager_cost
from .throughput import Timing

__all__ = ["Profile", "Row", "profile"]

Model = TypeVar("Model", bound=nn.Module)
_LAYER_S, _MODEL_S = 1.0, 4.0  # seconds after which a measurement ends, but not before 3 rounds
_FORMATS = (torch.channels_last, torch.contiguous_format)


@dataclass(frozen=True)
class Row:
    """One layer, one stage (its patch embedding and its blocks) or the whole model.

    ``name`` is the state-dict path; ``kind`` is ``"stem"``, ``"downsample"``, ``"mixer"``, ``"mlp"``,
    ``"norm"``, ``"pooling"``, ``"classifier"``, ``"stage"`` or ``"model"``; ``stage`` counts from 1 and is
    None outside the stages. What the figures stand for is in `profile`; ``rate`` is the FLOPs per second of
    products that ``limit_s`` is of.
    """

    name: str
    kind: str
    stage: int | None
    input_shape: tuple[int, ...]
    params: int
    macs_fvcore: int
    macs_flop_counter: int
    bytes_eager: int
    bytes_fused: int
    limit_s: float | None = None
    time: Timing | None = None
    rate: float | None = None

    @property
    def fraction(self) -> float | None:
        """The limit's share of the measured time: 1 is as fast as the limits allow; None where not timed."""
        return None if self.time is None else self.limit_s / self.time.median


@dataclass(frozen=True)
class Profile:
    """The result of `profile`. The layers' counts sum to the model's."""

    model: str
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    backend: str | None
    limits: Limits | None
    layers: tuple[Row, ...]
    stages: tuple[Row, ...]
    total: Row

    def to_dict(self) -> dict:
        """Everything as numbers, text and lists, for JSON; ``fraction`` is added to each row."""
        result = asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}
        for group in ("layers", "stages"):
            result[group] = [_row_dict(row) for row in getattr(self, group)]
        return result | {"total": _row_dict(self.total)}


def _row_dict(row: Row) -> dict:
    return asdict(row) | {"fraction": row.fraction}


def profile(
    model: PoolFormer,
    size: int | tuple[int, int] = 224,
    *,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    device: torch.device | str | None = None,
    measure: bool = True,
    rounds: int = 10,
) -> Profile:
    """Count and time a PoolFormer in inference: each layer, each stage and the model.

    For each of them, for one batch:

    - parameters;
    - multiply-accumulates in two conventions. ``macs_fvcore`` is the published one, with 5 per element of a
      normalisation (see `count_macs`); ``macs_flop_counter`` is half of torch's ``FlopCounterMode``:
      convolutions and matrix products alone;
    - ``bytes_eager``: what PyTorch's operators read and write where the model is written out in them, each
      its inputs and its outputs, a normalisation reading its input twice, views nothing;
    - ``bytes_fused``: each layer (the sub-block of a mixer or MLP with its norm, LayerScale and residual is
      one layer) reads its input and its parameters once and writes its output once. Statistics that
      travel between layers, 12 bytes a tile, are left out;
    - ``time``: the median of a call of ours, on what the layer before it returned. Inside a stage a layer
      gets the statistics of its input and leaves those of its output. Stages and the model are timed as
      such, not summed;
    - ``limit_s``: ``max(bytes_fused / copy, 2 * macs_flop_counter / rate)``, the rates measured in the same
      rounds, for the largest activation, which the stem returns; for a stage or the model the sum of this
      over its layers. ``copy``, and on CUDA ``rate``, are the best of the medians beside every layer, as in
      `Limits`. On the CPU ``rate`` is that of the processor beside the very layer, stage or model: it may be
      throttled for a while. Times are those of the fast state if there are enough of them
      (`poolformer_kernels.profiling.states`). ``fraction`` is the limit's share of the time. It exceeds 1
      where a layer's data lie nearer than the copy's, or on CUDA where its product is faster than PyTorch's.

    The model is not touched: the work is done on a copy, in eval mode and without hooks.

    Args:
        model: a `poolformer_kernels.models.PoolFormer`.
        size: height and width of the images in pixels, an int for square ones; at least 3.
        batch: images at a time.
        dtype: floating; the model's own when None.
        memory_format: of images and weights, while timed.
        device: CPU or CUDA; the model's own when None.
        measure: False counts only; then a model on the meta device will do.
        rounds: samples of each time, fewer where a call is slow.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, a CUDA device where there is none, a
            model on the meta device that is to be timed.
        RuntimeError: an explicitly chosen backend cannot run the model.

    Source: MetaFormer (arXiv 2111.11418), Tables 1 and 2.
    """
    height, width = _checked(model, size, batch, dtype, memory_format, measure, rounds)
    own = model.patch_embed.proj.weight
    dtype = dtype or own.dtype
    if measure and own.is_meta:
        raise ValueError("model is on the meta device and has no weights to time (measure=False only counts)")
    device = checked_device(own.device if device is None else device)
    backend = select_backend(device, dtype) if measure else None
    shape = (batch, model.in_chans, height, width)
    work = without_hooks(model)
    timings = None
    if measure:
        work.to(device=device, dtype=dtype, memory_format=memory_format)
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=rng).to(device, dtype).contiguous(memory_format=memory_format)
        with torch.inference_mode():
            timings = _time(work, x, rounds)
    layers = _count(work.to("meta", dtype), torch.empty(shape, dtype=dtype, device="meta"), timings)
    return Profile(
        model=model.config.name,
        input_shape=shape,
        dtype=dtype,
        device=str(device),
        backend=backend,
        limits=timings and timings.best,
        layers=layers,
        stages=tuple(_stages(layers, timings)),
        total=_sum(layers, model.config.name, "model", None, timings),
    )


def _checked(model, size, batch, dtype, memory_format, measure, rounds) -> tuple[int, int]:
    if not isinstance(model, PoolFormer):
        raise TypeError(f"model must be a poolformer_kernels.models.PoolFormer, got {type(model).__name__}")
    if isinstance(model, (MetaFormer, PoolFormerV2)):
        raise TypeError(f"model must be a plain PoolFormer, got {type(model).__name__}; count_macs takes any")
    if memory_format not in _FORMATS:
        allowed = " or ".join(map(str, _FORMATS))
        raise ValueError(f"memory_format must be {allowed}, got {memory_format!r}")
    return checked_options(size, batch, dtype, measure, rounds)


def checked_options(size, batch, dtype, measure, rounds) -> tuple[int, int]:
    """(height, width); raises TypeError or ValueError for an option of the wrong type or range."""
    sides = (size, size) if type(size) is int else size
    if not isinstance(sides, tuple) or len(sides) != 2 or any(type(side) is not int for side in sides):
        raise TypeError(f"size must be an int or a tuple of two ints, got {size!r}")
    if min(sides) < 3:
        raise ValueError(f"size must be at least 3 pixels, got {size}")
    for name, value in (("batch", batch), ("rounds", rounds)):
        if type(value) is not int:
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    if type(measure) is not bool:
        raise TypeError(f"measure must be a bool, got {type(measure).__name__}")
    return sides


def checked_device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a CPU or CUDA device, got {device!r}") from None
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"device must be a CPU or CUDA device, got {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch sees no CUDA device; allowed here: cpu")
    return device


def without_hooks(model: Model) -> Model:
    """A copy in eval mode whose modules are called without the model's hooks, which are not copied either."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = (getattr(module, name) for module in model.modules() for name in names)
    return copy.deepcopy(model, {id(registered): type(registered)() for registered in hooks}).eval()


@dataclass(frozen=True)
class _Timings:
    """By layer, stage and model the time, and the limits beside it."""

    times: dict[str, Timing]
    limits: dict[str, Limits]
    throttles: bool  # the limit of products is that of the moment, as the processor may be throttled

    @property
    def best(self) -> Limits:
        """The highest medians are the device's rates; the others were disturbed."""
        measured = self.limits.values()
        return Limits(max(m.copy for m in measured), max(m.matmul for m in measured))

    def limit(self, name: str) -> Limits:
        return Limits(self.best.copy, (self.limits[name] if self.throttles else self.best).matmul)


def _count(model: PoolFormer, x: Tensor, timings: _Timings | None) -> tuple[Row, ...]:
    """The layers' rows: a walk through the model on meta tensors."""
    rows = []
    with use_backend("reference"):
        for layer in model_layers(model):
            cost, y = eager_cost(layer.eager, x)
            rows.append(_row(layer, cost, x, y, timings))
            x = x if layer.side else y
    return tuple(rows)


def _row(layer: Layer, cost: EagerCost, x: Tensor, y: Tensor, timings: _Timings | None) -> Row:
    fused = x.nbytes + y.nbytes + sum(p.nbytes for p in layer.parameters)
    limits = timings and timings.limit(layer.name)
    return Row(
        name=layer.name,
        kind=layer.kind,
        stage=layer.stage,
        input_shape=tuple(x.shape),
        params=sum(p.numel() for p in layer.parameters),
        macs_fvcore=cost.macs_fvcore,
        macs_flop_counter=cost.macs_flop_counter,
        bytes_eager=cost.moved,
        bytes_fused=fused,
        limit_s=limits and limits.seconds(fused, 2 * cost.macs_flop_counter),
        time=timings and timings.times[layer.name],
        rate=limits and limits.matmul,
    )


def _time(model: PoolFormer, x: Tensor, rounds: int) -> _Timings:
    """The times of layers, stages and the model: a walk on their own activations."""
    largest = model.patch_embed(x)
    probes = LimitProbes(x.device, x.dtype, largest.nbytes)
    timings = _Timings({}, {}, throttles=probes.rate is not None)

    def take(name: str, call: Callable[[], object], budget_s: float) -> None:
        samples = next(iter(probes.sample({"ours": call}, rounds=rounds, budget_s=budget_s).values()))
        timings.limits[name] = probes.limits(samples, "ours")
        timings.times[name] = Timing.of([sample.seconds for sample in samples["ours"]])

    take(model.config.name, lambda: model(x), _MODEL_S)
    y, stats, stage = x, None, 0
    for layer in model_layers(model):
        if layer.kind in ("stem", "downsample"):
            stage += 1
            embedding, blocks = model.get_submodule(layer.name), model.network[2 * stage - 2]
            take(f"stage {stage}", lambda e=embedding, b=blocks, y=y: b(e(y)), _MODEL_S)
        take(layer.name, lambda f=layer.ours, y=y, s=stats: f(y, s), _LAYER_S)
        if not layer.side:
            y, stats = layer.ours(y, stats)
    return timings


def _stages(layers: tuple[Row, ...], timings: _Timings | None) -> Iterator[Row]:
    for stage in range(1, 1 + max(row.stage or 0 for row in layers)):
        yield _sum([row for row in layers if row.stage == stage], f"stage {stage}", "stage", stage, timings)


def _sum(rows: Sequence[Row], name: str, kind: str, stage: int | None, timings: _Timings | None) -> Row:
    counts = ("params", "macs_fvcore", "macs_flop_counter", "bytes_eager", "bytes_fused")
    limits = timings and timings.limit(name)
    return Row(
        name=name,
        kind=kind,
        stage=stage,
        input_shape=rows[0].input_shape,
        **{count: sum(getattr(row, count) for row in rows) for count in counts},
        limit_s=limits and sum(limits.seconds(row.bytes_fused, 2 * row.macs_flop_counter) for row in rows),
        time=timings and timings.times[name],
        rate=limits and limits.matmul,
    )
