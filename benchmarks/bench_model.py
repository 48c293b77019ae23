"""How many images a second: whole PoolFormers, ours beside timm's: as it is, accelerated, in other runtimes.

    poolformer-kernels bench model [--models s12] [--dtype bfloat16 float32] [--batch 8 1]
    poolformer-kernels bench model --scaling

timm's model and ours hold the same random weights; each provider's logits are compared with float64 before it
is timed. "accelerate" is timm's model after `poolformer_kernels.accelerate`. The peers' weights are frozen
(torch.compile) or part of the graph (OpenVINO, ONNX Runtime).
The default run takes 10 minutes on 2 cores, most of it in torch.compile and OpenVINO's conversion: with
--providers ours accelerate eager it takes 2. max-autotune, only when asked for, adds minutes per case.
--scaling takes a quarter of an hour: time over batch, image size and depth, with the exponents fitted.

Providers: {providers}
"""

import argparse
import itertools
from collections import Counter

import torch

from poolformer_kernels.cli.options import image_size
from poolformer_kernels.models import list_models, model_config

from .harness import Names, arguments, finish, image, record, start, steps
from .parts import cost
from .providers import PROVIDERS, compare, default_providers, make_pair
from .rows import STATES, Case, Point, Results

BUDGET_S = 10.0  # of one case's rounds
BATCH = {"cpu": (8, 1), "cuda": (256, 1)}
SCALING_BATCH = {"cpu": [1, 2, 4, 8, 16, 32], "cuda": [1, 4, 16, 64, 256]}
SCALING_SIZES = [224, 288, 384, 512, 768, 1024]
SCALING_PROVIDERS = {"cpu": ["ours", "compile", "openvino"], "cuda": ["ours", "compile"]}


def points(args: argparse.Namespace) -> list[Point]:
    """Every combination; for --scaling batches, image sizes and depths apart, of the first model's width."""
    first = args.models[0]
    if not args.scaling:
        large, small = BATCH[args.device]
        batches = {name: args.batch or [large] for name in args.models}
        batches[first] = args.batch or [large, small]
        return [
            Point(*values)
            for name in args.models
            for values in itertools.product([name], args.dtype, batches[name], args.image_size)
        ]
    dtype, batch, size = args.dtype[0], args.batch[0], args.image_size[0]
    deeper = [name for name in args.models if model_config(name).dims == model_config(first).dims]
    chosen = [Point(first, dtype, n, size) for n in args.batch]
    chosen += [Point(first, dtype, batch, n) for n in args.image_size]
    chosen += [Point(name, dtype, 8 if 8 in args.batch else args.batch[-1], size) for name in deeper]
    return list(dict.fromkeys(chosen))


def measure_all(args: argparse.Namespace, results: Results) -> None:
    """Rows of every point."""
    for point in steps(points(args)):
        dtype = getattr(torch, point.dtype)
        peer, ours = make_pair(point.model, dtype, args.device)
        shape = (ours.in_chans, point.size, point.size)
        x = image(point.batch, shape, args.device, dtype, "channels_last")
        case = Case(
            benchmark="scaling" if args.scaling else "model",
            shape=shape,
            dtype=point.dtype,
            batch=point.batch,
            least=cost(peer, ours, point.size, point.batch, x.itemsize),
            model=point.model,
        )
        with torch.inference_mode():
            largest = ours.patch_embed(x)
        compare(results, case, peer, ours, x, args, BUDGET_S, largest)


def exponents(results: Results, args: argparse.Namespace) -> list[str]:
    """Lines that say with which power of the batch and of the pixels our time grows (a log-log fit).

    The times are those of one state of the machine, the one of most cases.
    """
    import numpy as np

    lines = []
    for what, fixed in (("batch", args.image_size[0]), ("pixels", args.batch[0])):
        values, times = [], []
        states = Counter(row.state for group in results.groups for row in group[:1])
        state = max(states, key=lambda name: (states[name], -STATES.index(name)), default="")
        for row in (row for group in results.groups for row in group if row.state == state):
            side = int(row.shape.split("x")[1])
            value, other = (row.batch, side) if what == "batch" else (side**2, row.batch)
            if row.provider == "ours" and row.model == args.models[0] and other == fixed:
                values.append(value)
                times.append(row.median_s)
        if len(set(values)) > 1:
            power = np.polyfit(np.log(values), np.log(times), 1)[0]
            lines.append(f"ours, {args.models[0]}: time ~ {what}^{power:.2f}, {len(values)} points")
    return lines


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The options."""
    doc = __doc__.format(providers=", ".join(PROVIDERS))
    default = "8 (256 on CUDA), and 1 for the first model; 1 to 32 (256) for --scaling"
    models = list_models("poolformer_*")
    found = arguments(doc, prog, models=models, dtypes=["bfloat16"], rounds=20, batch=default)
    add = found.add_argument
    add(
        "--providers", action=Names, allowed=PROVIDERS,
        help=f"what is timed (default: {', '.join(default_providers('cpu'))}; on CUDA "
        f"{', '.join(default_providers('cuda'))})",
    )  # fmt: skip
    add(
        "--image-size",
        type=image_size,
        nargs="+",
        metavar="N",
        help="side of the images, pixels (default: 224, and up to 1024 for --scaling)",
    )
    add("--scaling", action="store_true", help="time over batch, image size and depth, of one dtype")
    return found


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = start(parser(prog), argv)
    if args.scaling:
        args.batch = args.batch or SCALING_BATCH[args.device]
    args.image_size = args.image_size or (SCALING_SIZES if args.scaling else [224])
    if args.providers is None:
        args.providers = SCALING_PROVIDERS[args.device] if args.scaling else default_providers(args.device)
    name, title = ("scaling", "Scaling") if args.scaling else ("model", "Whole model")
    with record(name, args) as results:
        measure_all(args, results)
    code = finish(title, results, args)
    for line in exponents(results, args) if args.scaling else []:
        print(line)
    return code
