"""`poolformer-kernels profile`: a `Profile`, or the paper's tables, as tables on the terminal and as JSON.

The JSON file (``--json``) of a profile is ``{"schema": 1, "environment": {name: text}, "profile": ...}``
with `Profile.to_dict` (`DenseProfile.to_dict` of a detector or segmenter), times in seconds; with ``--paper``
it is ``{"schema": 1, "paper": ...}`` with `paper_figures`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import rich.box
import torch
from rich.console import Console
from rich.table import Table

from .. import __version__, create_model
from ..models import model_config
from ..ops.dispatch import explain_selection
from ..profiling.paper import paper_figures
from ..profiling.profile import Profile, Row, profile
from .errors import CommandError
from .files import check_writable, write_whole
from .info import device_name
from .options import HEADS

if TYPE_CHECKING:
    from ..profiling.dense import DenseProfile

__all__ = ["print_paper", "print_profile"]

_WIDE = 120


def run(args: argparse.Namespace) -> int:
    """The command; 0."""
    check_writable(args.json)
    if args.paper:
        figures = paper_figures()
        print_paper(figures)
        result = {"schema": 1, "paper": figures}
    else:
        measured, show = _profile(args)
        environment = _environment(measured.device, measured.backend)
        show(measured, environment)
        result = {"schema": 1, "environment": environment, "profile": measured.to_dict()}
    if args.json:
        write_whole(args.json, json.dumps(result, indent=1) + "\n")
    return 0


def _profile(args: argparse.Namespace) -> "tuple[Profile | DenseProfile, Callable[..., None]]":
    """(the profile, the function that prints it)."""
    dense = args.model.startswith(HEADS)
    size = _sides(args.image_size)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not args.no_time and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device; allowed here: cpu")
    dtype = getattr(torch, args.dtype)
    backend, reason = explain_selection(device, dtype)
    if backend == "none" and not args.no_time:
        raise CommandError(reason)
    if dense:
        from .profile_dense import print_dense, run_dense  # needs torchvision

        return run_dense(args, size, device, dtype), partial(print_dense, console=_console())
    with torch.device("meta" if args.no_time else "cpu"):
        model = create_model(args.model)
    measured = profile(
        model,
        size or model_config(args.model).input_size,
        batch=args.batch_size,
        dtype=dtype,
        device=None if args.no_time else device,
        measure=not args.no_time,
    )
    return measured, print_profile


def _sides(sizes: list[int] | None) -> int | tuple[int, int] | None:
    if sizes is not None and len(sizes) > 2:
        raise CommandError(f"--image-size: {len(sizes)} numbers; allowed: a side, or height and width")
    return sizes and (sizes[0] if len(sizes) == 1 else tuple(sizes))


def _environment(device: str, backend: str | None) -> dict[str, str]:
    facts = {"poolformer-kernels": __version__, "torch": torch.__version__}
    if backend is None:  # nothing was timed
        return facts
    return facts | {"device": device_name(torch.device(device).type), "backend": backend}


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def print_profile(measured: Profile, environment: dict[str, str]) -> None:
    """Print a table of every layer, stage and the model; ``environment`` is printed above it."""
    console = _console()
    total, timed = measured.total, measured.limits is not None
    shape = "x".join(map(str, measured.input_shape))
    console.print(f"\n[bold]{measured.model}[/], {shape}, {str(measured.dtype).removeprefix('torch.')}")
    for key, value in environment.items():
        console.print(f"  {key}: {value}", markup=False, soft_wrap=True)
    if timed:
        limits = measured.limits
        console.print(
            f"  limits, measured in the same rounds: copy {_digits(limits.copy / 1e9)} GB/s, "
            f"products up to {_digits(limits.matmul / 1e9)} GFLOP/s"
        )
    console.print(
        f"  {total.params:,} parameters\n"
        f"  {total.macs_fvcore:,} MACs in fvcore's convention (5 per element of a normalisation)\n"
        f"  {total.macs_flop_counter:,} MACs by torch's FlopCounterMode (FLOPs / 2)\n"
    )
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    heads = ["input", "params", "MMACs\nfvcore", "MMACs\ntorch", "MB\neager", "MB\nfused"]
    for head in heads + (["ms", "of limit"] if timed else []):
        table.add_column(head, justify="right", no_wrap=True)
    for stage in measured.stages:
        _add_row(table, stage, timed, "bold")
        for row in measured.layers:
            if row.stage == stage.stage:
                _add_row(table, row, timed)
        table.add_section()
    for row in measured.layers:
        if row.stage is None:
            _add_row(table, row, timed)
    table.add_section()
    _add_row(table, total, timed, "bold")
    console.print(table)
    console.print(
        "MB: 10⁶ bytes read and written; eager: by PyTorch's operators, fused: with one kernel a layer."
    )
    if timed:
        console.print(
            "of limit: max(fused bytes / copy, FLOPs / rate of products beside it) over the time; "
            "a stage's limit is its layers' sum."
        )
        if any(row.time.noisy for row in (*measured.layers, *measured.stages, total)):
            console.print(
                "~ : the machine was busy (20th and 80th percentile differ twofold), measure again."
            )


def _add_row(table: Table, row: Row, timed: bool, style: str = "") -> None:
    summed = row.kind in ("stage", "model")
    cells = [
        row.name if summed else f"  {row.name}",
        "x".join(map(str, row.input_shape[1:])),
        f"{row.params:,}",
        *map(_millions, (row.macs_fvcore, row.macs_flop_counter, row.bytes_eager, row.bytes_fused)),
    ]
    if timed:
        noisy = "~" if row.time.noisy else ""
        cells += [f"{noisy}{_digits(row.time.median * 1e3)}", f"{row.fraction:.0%}"]
    table.add_row(*cells, style=style)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.{2 if count < 1e10 else 0}f}"


def _digits(value: float) -> str:
    """Three significant digits, all of those before the point."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 4
    return f"{value:,.{decimals}f}"


def print_paper(figures: dict[str, dict]) -> None:
    """Print the result of `paper_figures` as the paper's Table 1 and the costs in its Table 2."""
    console = _console()
    names = [name.removeprefix("poolformer_").upper() for name in figures]
    models = list(figures.values())
    table = Table(
        title="Table 1: configurations of the models",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        title_style="bold",
    )
    for head in ("stage", "tokens", "layer", "specification"):
        table.add_column(head, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for i, stages in enumerate(zip(*(model["stages"] for model in models), strict=True), start=1):
        for j, (layer, specification, cells) in enumerate(_specifications(stages)):
            stride = stages[0]["stride"]
            first = (str(i), f"H/{stride} x W/{stride}") if j == 0 else ("", "")
            table.add_row(*first, layer if j in (0, 2) else "", specification, *cells)
        table.add_section()
    table.add_row("parameters (M)", "", "", "", *(f"{model['params'] / 1e6:.1f}" for model in models))
    table.add_row("MACs (G)", "", "", "", *(f"{model['macs'] / 1e9:.1f}" for model in models))
    console.print(table)
    cost = Table(
        title="Table 2: cost, and what is rounded there",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        title_style="bold",
    )
    cost.add_column("PoolFormer", no_wrap=True)
    for head in ("image size", "params (M)", "MACs (G)", "params", "MACs"):
        cost.add_column(head, justify="right", no_wrap=True)
    for name, model in zip(names, models, strict=True):
        rounded = f"{model['params'] / 1e6:.0f}", f"{model['macs'] / 1e9:.1f}"
        cost.add_row(name, str(model["size"]), *rounded, f"{model['params']:,}", f"{model['macs']:,}")
    console.print(cost)
    console.print("Counted from the modules; MACs in fvcore's convention.")


def _specifications(stages: tuple[dict, ...]) -> list[tuple[str, str, list[str]]]:
    """(layer, what is specified, one cell a model) of one stage; ``stages`` holds it for each model."""

    def cells(text: str) -> list[str]:
        return [text.format(**stage) for stage in stages]

    return [
        ("patch embedding", "patch size, stride", cells("{patch_size}x{patch_size}, {patch_stride}")),
        ("", "embedding dim", cells("{dim}")),
        ("PoolFormer block", "pool size, stride", cells("{pool_size}x{pool_size}, 1")),
        ("", "MLP ratio", cells("{mlp_ratio:g}")),
        ("", "blocks", cells("{blocks}")),
    ]
