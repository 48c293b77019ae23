"""`poolformer-kernels profile` of a detector or segmenter: a `DenseProfile` as a table on the terminal."""

import argparse

import rich.box
import torch
from rich.console import Console
from rich.table import Table

from .errors import CommandError

try:
    from ..dense import create_detector, create_segmenter, list_detectors
    from ..dense.registry import split_name
    from ..profiling.dense import DensePart, DenseProfile, profile_dense
except ImportError as error:
    raise CommandError(str(error)) from None

__all__ = ["print_dense", "run_dense"]


def run_dense(
    args: argparse.Namespace, size: int | tuple[int, int] | None, device: str, dtype: torch.dtype
) -> DenseProfile:
    """The profile that the command's options ask for.

    Raises:
        CommandError: an unknown name, a size that is no multiple of 32.
    """
    try:
        head, backbone = split_name(args.model)
    except ValueError as error:
        raise CommandError(f"--model: {error}") from None
    create = create_detector if head in list_detectors() else create_segmenter
    with torch.device("meta" if args.no_time else "cpu"):
        model = create(head, backbone)
    options = {"batch": args.batch_size, "dtype": dtype, "device": None if args.no_time else device}
    try:
        return profile_dense(model, size, measure=not args.no_time, **options)
    except ValueError as error:
        raise CommandError(f"--image-size: {error}") from None


def print_dense(measured: DenseProfile, environment: dict[str, str], console: Console) -> None:
    """Print a table of every part and of the whole; ``environment`` is printed above it."""
    total = measured.total
    shape = "x".join(map(str, measured.input_shape))
    console.print(f"\n[bold]{measured.model}[/], {shape}, {str(measured.dtype).removeprefix('torch.')}")
    for key, value in environment.items():
        console.print(f"  {key}: {value}", markup=False, soft_wrap=True)
    console.print(
        f"  {total.params:,} parameters\n"
        f"  {total.macs_fvcore:,} MACs in fvcore's convention (with normalisations and upsampling)\n"
        f"  {total.macs_flop_counter:,} MACs by torch's FlopCounterMode (FLOPs / 2)\n"
    )
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part", no_wrap=True)
    for head in (
        "params",
        "GMACs\nfvcore",
        "GMACs\ntorch",
        *["ms", "of the\nwhole"] * (total.time is not None),
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for part in measured.parts:
        table.add_row(*_cells(part, total))
    table.add_section()
    table.add_row(*_cells(total, total), style="bold")
    console.print(table)
    for line in _notes(measured):
        console.print(line, soft_wrap=True)


def _cells(part: DensePart, total: DensePart) -> list[str]:
    cells = [part.name, f"{part.params:,}"]
    cells += [f"{count / 1e9:,.2f}" for count in (part.macs_fvcore, part.macs_flop_counter)]
    if part.time is not None:
        noisy = "~" if part.time.noisy else ""
        cells += [f"{noisy}{part.time.median * 1e3:,.1f}", f"{part.time.median / total.time.median:.0%}"]
    return cells


def _notes(measured: DenseProfile) -> list[str]:
    notes = []
    if measured.regions:
        counts = " and ".join(f"{count} regions in the {head}" for head, count in measured.regions.items())
        notes.append(f"Counted for {counts} of each image; RoIAlign is timed, but has no MACs.")
        notes.append(
            "4,357 parameters are torchvision's box and mask of the background, which mmdetection lacks."
        )
    if measured.total.time is not None:
        notes.append("The whole: normalised images to the heads' results, without resizing, anchors and NMS.")
        if any(part.time.noisy for part in (*measured.parts, measured.total)):
            notes.append("~ : the machine was busy (20th and 80th percentile differ twofold), measure again.")
    return notes
