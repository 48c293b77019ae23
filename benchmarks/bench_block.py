"""Where a PoolFormer's time goes: single blocks, whole stages, stem, downsamples and head, forward.

    poolformer-kernels bench block [--models s12 m36] [--providers ours eager compile openvino]

timm's modules and ours hold the same random weights; each provider's result is compared with float64 before
it is timed. Inputs have the shapes of the model at --image-size. Rows with an empty stage are the first block
of a stage. The default run takes minutes on 2 cores, most of it torch.compile.

Providers: {providers}
"""

import argparse
import itertools

import torch

from poolformer_kernels.cli.options import image_size

from .harness import BATCH, Names, arguments, finish, image, record, start, steps
from .parts import NAMES, parts
from .providers import PROVIDERS, compare, make_pair
from .rows import Case, Results

BUDGET_S = 3.0  # of one case's rounds


def measure_all(args: argparse.Namespace, results: Results) -> None:
    """Rows of every part of every model."""
    axes = (args.models, args.dtype, args.batch, range(len(NAMES)))
    for name, dtype_name, batch, i in steps(
        itertools.product(*axes), lambda v: f"{v[0]}, {v[1]}, batch {v[2]}, {NAMES[v[3]]}"
    ):
        dtype = getattr(torch, dtype_name)
        part = parts(*make_pair(name, dtype, args.device), args.image_size)[i]
        x = image(batch, part.shape, args.device, dtype, "channels_last")
        least = part.cost(batch, x.itemsize)
        case = Case("block", part.shape, dtype_name, batch, least, model=name, stage=part.stage)
        compare(results, case, part.peer, part.ours, x, args, BUDGET_S)


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The options."""
    doc = __doc__.format(providers=", ".join(PROVIDERS))
    models, providers = ["poolformer_s12", "poolformer_m36"], ["ours", "eager", "compile"]
    found = arguments(doc, prog, models=models, dtypes=["bfloat16"], rounds=20)
    add = found.add_argument
    add(
        "--providers", action=Names, allowed=PROVIDERS, default=providers,
        help=f"what is timed (default: {', '.join(providers)})",
    )  # fmt: skip
    add(
        "--image-size",
        type=image_size,
        default=224,
        metavar="N",
        help="side of the images, pixels (default: %(default)s)",
    )
    return found


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = start(parser(prog), argv)
    args.batch = args.batch or BATCH[args.device]
    with record("block", args) as results:
        measure_all(args, results)
    return finish("Blocks, stages and what is between them", results, args)
