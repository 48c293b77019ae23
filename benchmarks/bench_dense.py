"""PoolFormer as a backbone: its maps, a step of its training, and whole detectors and segmenters.

    poolformer-kernels bench dense [--only features training whole] [--sizes 512 800x1344] [--dtype float32]

features  the backbone's four maps in inference, each through its norm. The peers are timm's model with
          features_only=True and four GroupNorms behind it, in channels_last, eager and compiled. Weights are
          in the dtype.
training  a step: forward, a fixed random gradient of every map, backward; float32 parameters, autocast for
          bfloat16. Beside the time there is the peak of memory above what the process has with the model,
          the gradients of its parameters and its batch, in a process of its own.
whole     RetinaNet, Mask R-CNN and Semantic FPN in inference, from images to detections or logits, on our
          backbone and the same on timm's; float32 weights, autocast for bfloat16. The classifiers' weights
          are random and scaled so that there are detections to choose from.

Every map, or for whole models every level of the pyramid (the logits of a segmenter), is compared with
float64 before anything is timed. So are the gradients of a step, with eager's errors as the measure, on a
crop of {crop} x {crop} pixels: in float64 a step on the whole would take too much memory.

The CSV has two columns more: peak_bytes and peak_fraction, its fraction of eager's, both of training steps.
The least bytes of a whole model are those of its backbone and its other parameters once; of a training step
two and a half times the backbone's maps and its gradients once.

Providers: {providers}; compile is not timed for whole models unless it is named.
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from poolformer_kernels.accelerate import accelerate
from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.models import PoolFormer
from poolformer_kernels.numerics import errors
from poolformer_kernels.ops.torch_private import frozen_weights
from poolformer_kernels.profiling import profile

from .bench_training import gradient_errors, wrong_gradient
from .dense_pairs import WHOLE, make_bodies, make_whole, our_names
from .harness import PLAIN, WARM_HEAP, Names, arguments, finish, image, measure, record, start, steps
from .providers import WRONG, quiet
from .rows import Case, Results, Row

KINDS = ("features", "training", "whole")
PROVIDERS = ("ours", "accelerate", "eager", "compile")
SIZES = {"features": ((512, 512), (800, 1344)), "training": ((512, 512), (800, 1344))}
WHOLE_SIZES = {"retinanet": ((800, 1333),), "mask_rcnn": ((800, 1333),), "semantic_fpn": ((512, 512),)}
BATCH = {"features": (1, 2), "training": (2,), "whole": (1,)}
BUDGET_S = 20.0  # of one case's rounds
CROP = 256
_IMPORT = "from poolformer_kernels.cli.main import load_benchmarks; load_benchmarks()\n"
MEMORY = """
import sys
from poolformer_kernels.benchmarks import bench_dense
print(bench_dense.peak_of_a_step(*sys.argv[1:4], *map(int, sys.argv[4:])))
"""


@dataclass(frozen=True)
class DenseRow(Row):
    """A row with what only training has; None elsewhere."""

    peak_bytes: int | None = None
    peak_fraction: float | None = None


@dataclass(frozen=True)
class Point:
    """A case: ``name`` is a backbone's, ``head`` that of a whole model or empty."""

    kind: str
    head: str
    name: str
    dtype: str
    batch: int
    size: tuple[int, int]

    @property
    def model(self) -> str:
        return f"{self.head}_{self.name}" if self.head else self.name

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.kind} of {self.model}, {self.dtype}, batch {self.batch}, {height} x {width}"


def points(args: argparse.Namespace) -> list[Point]:
    """Every combination of the options."""
    found = []
    for kind in args.only:
        for head in WHOLE if kind == "whole" else ("",):
            sizes = args.sizes or (WHOLE_SIZES[head] if head else SIZES[kind])
            axes = (args.models, args.dtype, args.batch or BATCH[kind], sizes)
            found += [Point(kind, head, *values) for values in itertools.product(*axes)]
    return found


# ---- providers ---------------------------------------------------------------------------------------------


def make_provider(name: str, peer: nn.Module, ours: nn.Module, *, inference: bool) -> nn.Module:
    """What a provider runs; of a whole model the backbone and the pyramid alone are compiled."""
    if name in ("ours", "eager"):
        return ours if name == "ours" else peer
    if name == "accelerate":
        return accelerate(peer, inplace=False)
    torch.compiler.reset()  # earlier graphs must not count as recompilations of this
    if hasattr(peer, "backbone"):
        peer = copy.deepcopy(peer)
        peer.backbone = torch.compile(peer.backbone, dynamic=False)
        return peer
    return torch.compile(peer if inference else copy.deepcopy(peer), dynamic=False)


def checked(
    point: Point,
    args: argparse.Namespace,
    results: Results,
    pair: tuple[nn.Module, nn.Module],
    maps: Callable[[nn.Module, Tensor], list[Tensor]],
    x: Tensor,
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """(the providers' models whose maps are right, their errors: the largest relative L2 error of a map)."""
    peer, ours = pair
    with torch.inference_mode():
        exact = copy.deepcopy(peer).to(torch.float64, memory_format=torch.contiguous_format)
        right = maps(exact, x[-1:].double().contiguous())
        del exact
        models, found = {}, {}
        for name in _names(point, args):
            try:
                with quiet(), frozen_weights() if name == "compile" else contextlib.nullcontext():
                    model = make_provider(name, peer, ours, inference=True)
                    with _autocast(point, x.device.type):
                        given = [y[-1:] for y in maps(model, x)]
                error = max(errors(y, e).relative_l2(e) for y, e in zip(given, right, strict=True))
            except Exception as failure:  # the others go on
                results.miss(name, failure, point)
                results.require_device(args.device, name)
                continue
            if error <= WRONG[getattr(torch, point.dtype)]:
                models[name], found[name] = model, error
            else:  # or NaN
                results.reject(name, f"relative error {error:.2g} against float64", point)
    return models, found


def _names(point: Point, args: argparse.Namespace) -> list[str]:
    if args.providers is not None:
        return args.providers
    return [name for name in PROVIDERS if name != "compile" or point.kind != "whole"]


def _autocast(point: Point, device: str) -> torch.autocast:
    half = point.kind != "features" and point.dtype != "float32"
    return torch.autocast(device, getattr(torch, point.dtype) if half else torch.bfloat16, enabled=half)


def least(body: PoolFormer, point: Point) -> tuple[int, int]:
    """(bytes, FLOPs) of the backbone's maps."""
    height, width = (-(-side // 32) * 32 for side in point.size)  # detectors pad
    dtype = getattr(torch, point.dtype)
    total = profile(body, (height, width), batch=point.batch, dtype=dtype, measure=False).total
    return total.bytes_fused, 2 * total.macs_flop_counter


def _timed(
    point: Point,
    args: argparse.Namespace,
    calls: dict[str, Callable[[], object]],
    cost: tuple[int, int],
    channels: tuple[int, int],
    found: dict[str, float],
) -> list[list[Row]]:
    """Rows of the calls; ``channels``: of the images and of the largest map, which the stem returns."""
    shape = (channels[0], *point.size)
    direction = "step" if point.kind == "training" else "forward"
    case = Case("dense", shape, point.dtype, point.batch, cost, direction=direction, model=point.model)
    dtype = getattr(torch, point.dtype)
    largest = image(
        point.batch, (channels[1], *(side // 4 for side in point.size)), args.device, dtype, "channels_last"
    )
    return measure(case, calls, largest, rounds=args.rounds, budget_s=BUDGET_S, errors=found)


# ---- cases -------------------------------------------------------------------------------------------------


def measure_features(point: Point, args: argparse.Namespace, results: Results) -> None:
    dtype = getattr(torch, point.dtype)
    options = {"device": args.device, "dtype": dtype, "memory_format": torch.channels_last}
    pair = tuple(copy.deepcopy(body).to(**options) for body in make_bodies(point.name))
    body = pair[1]
    x = image(point.batch, (body.in_chans, *point.size), args.device, dtype, "channels_last")
    models, found = checked(point, args, results, pair, lambda model, x: model(x), x)
    if models:
        calls = {name: partial(model, x) for name, model in models.items()}
        channels = (body.in_chans, body.config.dims[0])
        with torch.inference_mode():
            groups = _timed(point, args, calls, least(body, point), channels, found)
        _add(results, groups)


def _levels(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The pyramid's maps."""
    return list(model.backbone(x).values())


def measure_whole(point: Point, args: argparse.Namespace, results: Results) -> None:
    x = image(point.batch, (3, *point.size), args.device, torch.float32, "channels_last")
    if point.head == "semantic_fpn":
        given, padded, maps = x, x, lambda model, x: [model(x)]
    else:
        x = x.sigmoid()
        given = [picture.contiguous() for picture in x]
        height, width = (-(-side // 32) * 32 for side in point.size)
        padded = nn.functional.pad(x, (0, width - point.size[1], 0, height - point.size[0]))
        maps = _levels
    pair = tuple(m.to(args.device) for m in make_whole(point.head, point.name, x[0].cpu().contiguous()))
    models, found = checked(point, args, results, pair, maps, padded)
    if not models:
        return

    def call(model: nn.Module) -> object:
        with _autocast(point, args.device):
            return model(given)

    body = pair[1].backbone.body
    moved, flops = least(body, point)
    others = set(pair[1].parameters()) - set(body.parameters())
    cost = moved + sum(p.nbytes for p in others), flops
    calls = {name: partial(call, model) for name, model in models.items()}
    with torch.inference_mode():
        groups = _timed(point, args, calls, cost, (3, body.config.dims[0]), found)
    _add(results, groups)


class Step:
    """Forward and backward of a backbone on one batch, with fixed random gradients of its maps."""

    def __init__(self, model: nn.Module, x: Tensor, point: Point) -> None:
        self.model, self.x, self.point = model, x, point
        self.grads: list[Tensor] = []

    def maps(self) -> list[Tensor]:
        with _autocast(self.point, self.x.device.type):
            return self.model(self.x)

    @torch.enable_grad()
    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        maps = self.maps()
        if not self.grads:
            rng = torch.Generator().manual_seed(3)
            draws = [torch.randn(y.shape, generator=rng).to(y.device, y.dtype) for y in maps]
            self.grads = [d.contiguous(memory_format=_format(self.x)) for d in draws]
        torch.autograd.backward(maps, self.grads)

    def gradients(self) -> dict[str, Tensor]:
        """The last step's, in float64, under the names that an uncompiled model has."""
        named = self.model.named_parameters()
        return {name.removeprefix("_orig_mod."): p.grad.double() for name, p in named}


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def measure_training(point: Point, args: argparse.Namespace, results: Results) -> None:
    pair = tuple(copy.deepcopy(body).to(args.device).train() for body in make_bodies(point.name))
    peer, body = pair
    x = image(point.batch, (body.in_chans, *point.size), args.device, torch.float32, "channels_last")
    crop = x[..., :CROP, :CROP].contiguous(memory_format=torch.channels_last)

    def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        step = Step(model, x, point)
        step()
        return step.gradients()

    plain = copy.deepcopy(peer).to(memory_format=torch.contiguous_format)
    eager = our_names(gradients(plain, crop.contiguous()))
    exact_point = Point(point.kind, "", point.name, "float32", point.batch, point.size)  # without autocast
    step = Step(plain.double(), crop.double().contiguous(), exact_point)
    step()
    exact = our_names(step.gradients())
    del plain, step
    allowed, calls = gradient_errors(eager, exact), {}
    for name in _names(point, args):
        try:
            with quiet():
                model = make_provider(name, *map(copy.deepcopy, pair), inference=False).train()
                given = gradients(model, crop)
                call = Step(model, x, point)
                call()
        except Exception as failure:  # the others go on
            results.miss(name, failure, point)
            results.require_device(args.device, name)
            continue
        found = given if name == "ours" else our_names(given)
        wrong = wrong_gradient(gradient_errors(found, exact), allowed, point.dtype)
        if wrong is not None:
            results.reject(name, wrong, point)
            continue
        calls[name] = call
    if not calls:
        return
    moved, flops = least(body, point)
    weights = sum(p.nbytes for p in body.parameters())
    cost = 5 * moved // 2 + weights, 3 * flops
    groups = _timed(point, args, calls, cost, (body.in_chans, body.config.dims[0]), {})
    names = [*calls]
    del calls, call, model
    gc.collect()
    _add(results, groups, measure_peaks(point, names, args))


# ---- memory ------------------------------------------------------------------------------------------------


def measure_peaks(point: Point, names: list[str], args: argparse.Namespace) -> dict[str, int]:
    """Bytes of every provider's peak, a process each, with the heap of a usual process; on the CPU."""
    if args.device != "cpu":
        return {}
    environment = {key: value for key, value in os.environ.items() if key not in WARM_HEAP}
    peaks = {}
    for name in names:
        words = [name, point.name, point.dtype, *map(str, (point.batch, *point.size, args.threads))]
        command = [sys.executable, "-c", f"{_IMPORT}{MEMORY}", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
            raise CommandError(f"a process of the benchmark failed: {last}")
        peaks[name] = int(done.stdout.split()[-1])
    return peaks


def peak_of_a_step(
    provider: str, name: str, dtype: str, batch: int, height: int, width: int, threads: int
) -> int:
    """Bytes of this process's peak in a step above what it has before it and its parameters' gradients."""
    from poolformer_kernels.train.processes import peak_memory

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    point = Point("training", "", name, dtype, batch, (height, width))
    model = make_provider(provider, *make_bodies(name), inference=False).train()
    x = image(batch, (3, height, width), "cpu", torch.float32, "channels_last")
    step = Step(model, x, point)
    Step(
        model, x[..., :64, :64].contiguous(memory_format=torch.channels_last), point
    )()  # what the first makes
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # a step must not live on memory that the making of the model has left
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    for _ in range(2):
        step()
    return peak_memory(torch.device("cpu")) - before


# ---- rows --------------------------------------------------------------------------------------------------


def _add(results: Results, groups: list[list[Row]], peaks: dict[str, int] | None = None) -> None:
    peaks = peaks or {}
    eager = peaks.get("eager")
    for rows in groups:
        made = []
        for row in rows:
            peak = peaks.get(row.provider)
            fraction = peak / eager if peak is not None and eager is not None else None
            made.append(DenseRow(**asdict(row), peak_bytes=peak, peak_fraction=fraction))
        results.add(made)
    gc.collect()


def peak_lines(groups: list[list[DenseRow]]) -> list[str]:
    """What a training step takes at its peak."""
    lines = []
    for row in (row for group in groups for row in group if row.peak_bytes is not None):
        share = "" if row.peak_fraction is None else f", {row.peak_fraction:.1%} of eager's"
        lines.append(
            f"{row.provider}, {row.model}, {row.dtype}, batch {row.batch}, {row.shape}: "
            f"peak of a step {row.peak_bytes / 1e6:,.0f} MB{share}"
        )
    return list(dict.fromkeys(lines))  # a case in two states has them twice


def _size(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 32 for side in sides):
        raise argparse.ArgumentTypeError(f"must be N or HxW with sides of at least 32, got {text!r}")
    return int(sides[0]), int(sides[-1])


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The options."""
    doc = __doc__.format(providers=", ".join(PROVIDERS), crop=CROP)
    defaults = {"models": ["poolformer_s12"], "dtypes": ["float32", "bfloat16"], "rounds": 10}
    batch = "features 1 and 2, training 2, whole 1"
    found = arguments(doc, prog, **defaults, batch=batch, parse_model=PLAIN)
    add = found.add_argument
    text = f"what is measured (default: {', '.join(KINDS)})"
    add("--only", action=Names, allowed=KINDS, default=list(KINDS), help=text)
    add(
        "--sizes",
        type=_size,
        nargs="+",
        metavar="HxW",
        help="of the images, pixels (default: 512 and 800x1344; of whole models 800x1333 and 512)",
    )
    add(
        "--providers",
        action=Names,
        allowed=PROVIDERS,
        help="what is timed (default: all, but compile for whole models)",
    )
    return found


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = start(parser(prog), argv)
    if rejected := [dtype for dtype in args.dtype if dtype not in ("float32", "bfloat16")]:
        raise CommandError(f"--dtype {rejected[0]}: not measured; allowed: float32, bfloat16")
    with record("dense", args) as results:
        functions = {"features": measure_features, "training": measure_training, "whole": measure_whole}
        for point in steps(points(args)):
            functions[point.kind](point, args, results)
    code = finish("Dense prediction", results, args)
    for line in peak_lines(results.groups):
        print(line)
    return code
