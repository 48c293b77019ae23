"""Where a detector's or segmenter's parameters, multiply-accumulates and time go: part by part."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..dense import MaskRCNN, RetinaNet, SemanticFPN
from ..models import PoolFormer
from ..nn import PoolFormerStage
from ..ops.dispatch import select_backend
from .macs import EagerCost, eager_cost, written_out
from .profile import checked_device, checked_options, without_hooks
from .states import rate_probe
from .throughput import Timing, sample_interleaved

__all__ = ["DETECTIONS", "DETECTOR_SIZE", "PROPOSALS", "SEGMENTER_SIZE", "DensePart", "DenseProfile"]
__all__ += ["profile_dense"]

DETECTOR_SIZE, SEGMENTER_SIZE = (800, 1280), (512, 512)  # height and width, as the papers count
PROPOSALS, DETECTIONS = 1000, 100  # of an image, through Mask R-CNN's box head and its mask head
_DIVISOR = 32  # the models are given images whose sides are multiples of it
_BUDGET_S = 30.0
_Dense = RetinaNet | MaskRCNN | SemanticFPN


@dataclass(frozen=True)
class DensePart:
    """A stage of the backbone, the norms of its maps, the neck, a head, or the whole; see `profile_dense`."""

    name: str
    params: int
    macs_fvcore: int
    macs_flop_counter: int
    time: Timing | None = None


@dataclass(frozen=True)
class DenseProfile:
    """The result of `profile_dense`. The parts' counts sum to the total's.

    ``regions`` is how many proposals and detections of an image the heads of Mask R-CNN were given, by the
    name of the head; empty for other models.
    """

    model: str
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    backend: str | None
    regions: dict[str, int]
    parts: tuple[DensePart, ...]
    total: DensePart

    def to_dict(self) -> dict:
        """Everything as numbers, text and lists, for JSON."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}


def profile_dense(
    model: _Dense,
    size: int | tuple[int, int] | None = None,
    *,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    measure: bool = True,
    rounds: int = 10,
) -> DenseProfile:
    """Count and time a detector or segmenter in inference: each part and the whole.

    The parts are the backbone's stages (each with its patch embedding), the norms of its maps, the neck (the
    feature pyramid with its coarser levels) and the heads. For each of them, for one batch:

    - parameters. torchvision's Mask R-CNN has 4,357 more than the official code's: its heads also have a box
      and a mask of the background;
    - multiply-accumulates in the two conventions of `poolformer_kernels.profiling.profile`: ``macs_fvcore``
      counts normalisations and upsampling, too, ``macs_flop_counter`` convolutions and matrix products alone;
    - ``time``: the median of a call, on channels_last maps that the part before it returned, all parts and
      the whole interleaved.

    The whole goes from normalised images to the heads' results. Resizing, anchors, the choice of boxes
    (NMS) and pasting of masks are not in it: what they take depends on what is found. Mask R-CNN's box head
    is given 1000 proposals of each image, its mask head 100, cut from the pyramid by RoIAlign, which is
    timed with the head and counts no multiply-accumulates. Without weights to find any, the regions are
    random boxes.

    The model is not touched: the work is done on a copy, in eval mode and without hooks.

    Args:
        model: of `poolformer_kernels.dense`.
        size: height and width of the images in pixels, multiples of 32; an int for square ones. When None,
            800 x 1280 for detectors and 512 x 512 for segmenters, the sizes that their papers count for.
        batch: images at a time.
        dtype: floating; the model's own when None.
        device: CPU or CUDA; the model's own when None.
        measure: False counts only; then a model on the meta device will do.
        rounds: samples of each time, fewer where a call is slow.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, a CUDA device where there is none, a
            model on the meta device that is to be timed.
        RuntimeError: an explicitly chosen backend cannot run the model.

    Example::

        with torch.device("meta"):
            model = create_detector("retinanet", "poolformer_s12")
        profile_dense(model, measure=False).total.params  # 21653044

    Source: MetaFormer (arXiv 2111.11418), Tables 3 and 4.
    """
    if not isinstance(model, _Dense):
        raise TypeError(f"model must be a detector or segmenter of .dense, got {type(model).__name__}")
    if size is None:
        size = SEGMENTER_SIZE if isinstance(model, SemanticFPN) else DETECTOR_SIZE
    sides = checked_options(size, batch, dtype, measure, rounds)
    if any(side % _DIVISOR for side in sides):
        raise ValueError(f"size must be of multiples of {_DIVISOR} pixels, got {size}")
    body = model.backbone.body
    own = body.patch_embed.proj.weight
    dtype = dtype or own.dtype
    if measure and own.is_meta:
        raise ValueError("model is on the meta device and has no weights to time (measure=False only counts)")
    device = checked_device(own.device if device is None else device)
    backend = select_backend(device, dtype) if measure else None
    shape = (batch, body.in_chans, *sides)
    work = without_hooks(model)
    times: dict[str, Timing] = {}
    if measure:
        work.to(device=device, dtype=dtype, memory_format=torch.channels_last)
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=rng).to(device, dtype)
        with torch.inference_mode():
            times = _time(work, x.contiguous(memory_format=torch.channels_last), rounds)
    parts = tuple(_count(work.to("meta", dtype), torch.empty(shape, dtype=dtype, device="meta"), times))
    name = f"{type(model).__name__} on {body.config.name}"
    sums = {
        count: sum(getattr(part, count) for part in parts)
        for count in ("params", "macs_fvcore", "macs_flop_counter")
    }
    return DenseProfile(
        model=name,
        input_shape=shape,
        dtype=dtype,
        device=str(device),
        backend=backend,
        regions={"box head": PROPOSALS, "mask head": DETECTIONS} if isinstance(model, MaskRCNN) else {},
        parts=parts,
        total=DensePart("total", **sums, time=times.get("total")),
    )


@dataclass(frozen=True)
class _Call:
    """A part: the modules whose parameters it has, and a call of it on the maps of the parts before it."""

    name: str
    modules: tuple[nn.Module, ...]
    run: Callable[[], object]


def _count(model: _Dense, x: Tensor, times: dict[str, Timing]) -> Iterator[DensePart]:
    with written_out(model), torch.no_grad():
        for part in _parts(model, x):
            cost: EagerCost = eager_cost(part.run)[0]
            params = sum(p.numel() for module in part.modules for p in module.parameters())
            figures = (params, cost.macs_fvcore, cost.macs_flop_counter)
            yield DensePart(part.name, *figures, time=times.get(part.name))


def _time(model: _Dense, x: Tensor, rounds: int) -> dict[str, Timing]:
    """Of every part and of the whole, in the state of the machine that `profiling.states` chooses."""
    calls = {part.name: part.run for part in _parts(model, x)}

    def whole() -> None:
        for part in _heads(model, model.backbone(x), x.shape):
            part.run()

    calls["total"] = whole
    probe = rate_probe(x.device, x.dtype)
    samples = sample_interleaved(
        calls, device=x.device, rounds=rounds, budget_s=_BUDGET_S, probe=probe, warmup=1
    )
    taken = samples if probe is None else next(iter(probe.split(samples).values()))
    return {name: Timing.of([sample.seconds for sample in values]) for name, values in taken.items()}


def _parts(model: _Dense, x: Tensor) -> Iterator[_Call]:
    """In the order in which they run."""
    body, size, maps = model.backbone.body, x.shape, []
    for i, modules in enumerate(_stages(body), start=1):
        part = _Call(f"stage {i}", modules, partial(_in_a_row, modules, x))
        yield part
        x = part.run()
        maps.append(x)
    norms = tuple(body.get_submodule(f"norm{2 * i}") for i in range(len(maps)))
    part = _Call("norms of the maps", norms, lambda: [norm(y) for norm, y in zip(norms, maps, strict=True)])
    yield part
    levels = part.run()[-model.backbone.levels :]
    fpn = model.backbone.fpn
    part = _Call("neck", (fpn,), lambda: fpn(OrderedDict((str(i), y) for i, y in enumerate(levels))))
    yield part
    yield from _heads(model, part.run(), size)


def _in_a_row(modules: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _stages(body: PoolFormer) -> Iterator[tuple[nn.Module, ...]]:
    """A patch embedding and the blocks after it, four times."""
    stage: list[nn.Module] = [body.patch_embed]
    for module in body.network:
        stage.append(module)
        if isinstance(module, PoolFormerStage):
            yield tuple(stage)
            stage = []


def _heads(model: _Dense, pyramid: "OrderedDict[str, Tensor]", shape: torch.Size) -> Iterator[_Call]:
    maps = list(pyramid.values())
    if isinstance(model, SemanticFPN):
        modules = (model.scale_heads, model.classifier)
        yield _Call("head", modules, lambda: model.decode(maps, shape[2:]))
    elif isinstance(model, RetinaNet):
        for name, head in (
            ("classification head", model.head.classification_head),
            ("box head", model.head.regression_head),
        ):
            yield _Call(name, (head,), partial(head, maps))
    else:
        yield _Call("RPN head", (model.rpn.head,), partial(model.rpn.head, maps))
        heads = model.roi_heads
        for name, pool, count, modules in (
            ("box head", heads.box_roi_pool, PROPOSALS, (heads.box_head, heads.box_predictor)),
            ("mask head", heads.mask_roi_pool, DETECTIONS, (heads.mask_head, heads.mask_predictor)),
        ):
            cut = partial(_regions, pool, pyramid, shape, count)
            yield _Call(name, modules, lambda cut=cut, modules=modules: _after(cut(), modules))


def _after(regions: Tensor, modules: tuple[nn.Module, nn.Module]) -> object:
    head, predictor = modules
    return predictor(head(regions))


def _regions(pool: nn.Module, pyramid: dict[str, Tensor], shape: torch.Size, count: int) -> Tensor:
    """So many random regions of every image, as a head is given them; on the meta device only their shape."""
    batch, _, *sides = shape
    finest = next(iter(pyramid.values()))
    if finest.is_meta:
        return finest.new_empty(batch * count, finest.shape[1], *pool.output_size)
    boxes = _random_boxes(count, *sides).to(finest.device)
    return pool(pyramid, [boxes] * batch, [tuple(sides)] * batch).to(finest.dtype)


def _random_boxes(count: int, height: int, width: int) -> Tensor:
    """Boxes ``[count, 4]`` in the image, as often small as large: sides are distributed on a log scale."""
    rng = torch.Generator().manual_seed(0)
    extent = torch.tensor([width, height], dtype=torch.float32)
    sides = 8 * (extent / 8) ** torch.rand(count, 2, generator=rng)
    corner = torch.rand(count, 2, generator=rng) * (extent - sides)
    return torch.cat([corner, corner + sides], 1)
