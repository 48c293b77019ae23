"""From photos to a verified, timed PoolFormer: `poolformer-kernels demo`.

timm's model and ours run on the same photos with the same weights. Both are compared with timm's in float64
(from the dtype-rounded weights and pixels, NCHW), and ours must satisfy the rule of
`poolformer_kernels.numerics` against timm's in the same dtype and layout (convolutions round differently in
each). Then timm's modules (eager and through torch.compile) and ours are timed in the same run, all in
channels_last, the fast layout: both sub-blocks of each stage's first block, on the photos' own activations,
the mixer ``x + layer_scale * (pool(norm(x)) - norm(x))`` and the MLP ``x + layer_scale * mlp(norm(x))``; and
the whole model.

The JSON file (``--json``), all times in milliseconds per call::

    schema        1
    passed        the verification as a whole
    environment   {name: text}: device, versions, the backend that ran
    model         {name, weights, head, params, macs, macs_official_head, input_size}; macs in fvcore's count
    images        [{name, top5: [{class, label, probability}]}], by ours in the first dtype
    verification  [{dtype, layout, implementation: "eager" | "ours", error_l2, error_max, allowed_l2,
                    allowed_max, top1_agreement, top5_agreement, passed}]; error_l2 is relative, error_max
                    absolute, agreement the share of float64's top-k classes; allowed_* and passed are null
                    for eager
    timing        [{dtype, what: "mixer" | "mlp" | "model", stage, shape: [B, C, H, W], providers: {"eager" |
                    "compile" | "ours": {median, p20, p80, rounds, noisy} or {unavailable: reason}}}]; stage
                    is null for the model; noisy: p80 > 2 p20
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from .. import __version__, create_model
from ..models import export_state_dict, model_config
from ..numerics import errors, tolerance, without_tf32
from ..ops.dispatch import explain_selection, use_backend
from ..profiling import count_macs, time_interleaved
from .errors import CommandError
from .files import check_readable, check_writable, make_folder, write_whole
from .info import device_name
from .photos import crop, default_photos, load_photo, preprocess
from .report import PROVIDERS, print_tables, write_report

__all__ = ["make_models", "time_all", "verify_logits"]

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
_SUB_BLOCK_S, _MODEL_S = 2.0, 10.0  # time limits of one interleaved measurement


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Steps:
    """A progress bar on a terminal; elsewhere one line on stderr per step."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._tty = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._bar = Progress(
            *columns,
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._tty,
            refresh_per_second=2,  # it must not disturb what is being timed
        )
        self._task = self._bar.add_task("", total=total)
        self._started = False

    def __enter__(self) -> "_Steps":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def __call__(self, description: str) -> None:
        """Begin the next step."""
        if not self._tty:
            print(description, file=sys.stderr, flush=True)
        self._bar.update(self._task, description=description, advance=1 if self._started else 0, refresh=True)
        self._started = True


def make_models(name: str, checkpoint: str | None) -> tuple[nn.Module, nn.Module]:
    """(timm's model, ours) in eval mode with the same weights, ours with timm's head.

    Without a checkpoint the weights are random and none is at a value that would hide a branch: LayerScale is
    of order 0.1, and norms and biases differ from 1 and 0.

    Raises:
        CommandError: a checkpoint that does not fit.
    """
    try:
        loaded = create_model(name, head="timm", checkpoint=checkpoint)
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise CommandError(str(error)) from None  # it names the checkpoint itself
    if checkpoint is None:
        _randomise(loaded)
    ours = create_model(name, head="timm")
    ours.load_state_dict(loaded.state_dict())
    ours.head_mode = "timm"  # timm's way of evaluating the head, whatever the checkpoint's
    peer = timm.create_model(name)
    peer.load_state_dict(export_state_dict(loaded.state_dict(), "timm"))
    return peer.eval(), ours.eval()


def _randomise(model: nn.Module) -> None:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            if "layer_scale" in name:
                p.copy_(0.1 + 0.03 * noise)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            elif "res_scale" in name or "act." in name:  # StarReLU's two numbers
                p.mul_(1 + 0.1 * noise)
            elif p.dim() == 1:
                p.copy_(0.1 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)


def _agreement(logits: Tensor, exact: Tensor, k: int) -> float:
    chosen, wanted = logits.double().cpu().topk(k).indices, exact.topk(k).indices
    return (chosen[:, :, None] == wanted[:, None]).any(2).double().mean().item()


@without_tf32()
def verify_logits(
    peer: nn.Module, ours: nn.Module, x: Tensor, dtype: torch.dtype
) -> tuple[list[dict], Tensor]:
    """(rows of the JSON's ``verification`` for one dtype, our logits in channels_last).

    Args:
        peer, ours: timm's model and ours, in ``dtype``, on the device of x.
        x: ``[B, 3, H, W]`` in ``dtype``.
    """
    with torch.inference_mode():
        exact = copy.deepcopy(peer).to("cpu", torch.float64)(x.to("cpu", torch.float64))
        rows = []
        for layout, memory_format in LAYOUTS.items():
            x = x.contiguous(memory_format=memory_format)
            eager, logits = (model.to(memory_format=memory_format)(x) for model in (peer, ours))
            allowed = tolerance(errors(eager, exact), exact, dtype)
            rows.append(_verification_row(dtype, layout, "eager", eager, exact, None))
            rows.append(_verification_row(dtype, layout, "ours", logits, exact, allowed))
    return rows, logits


def _verification_row(dtype, layout, implementation, logits, exact, allowed) -> dict:
    error = errors(logits, exact)
    return {
        "dtype": _short(dtype),
        "layout": layout,
        "implementation": implementation,
        "error_l2": error.relative_l2(exact),
        "error_max": error.largest,
        "allowed_l2": allowed and allowed.relative_l2(exact),
        "allowed_max": allowed and allowed.largest,
        "top1_agreement": _agreement(logits, exact, 1),
        "top5_agreement": _agreement(logits, exact, 5),
        "passed": allowed and error.within(allowed),
    }


class _TimmSubBlock(nn.Module):
    """A sub-block of timm's modules: norm, branch, LayerScale, and the residual with its ResScale."""

    def __init__(
        self, norm: nn.Module, branch: nn.Module, layer_scale: nn.Module, res_scale: nn.Module
    ) -> None:
        super().__init__()
        self.norm, self.branch, self.layer_scale, self.res_scale = norm, branch, layer_scale, res_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.res_scale(x) + self.layer_scale(self.branch(self.norm(x)))


def _timm_sub_blocks(block: nn.Module) -> dict[str, _TimmSubBlock]:
    return {
        "mixer": _TimmSubBlock(block.norm1, block.token_mixer, block.layer_scale1, block.res_scale1),
        "mlp": _TimmSubBlock(block.norm2, block.mlp, block.layer_scale2, block.res_scale2),
    }


def _our_sub_blocks(block: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "mixer": lambda x: block.mixer_with_stats(x, None, False)[0],
        "mlp": lambda x: block.mlp_with_stats(x, None, False)[0],
    }


def _compiled(module: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """(the compiled module, "") or (None, why not): Inductor needs a C++ compiler, this package does not."""
    try:
        compiled = torch.compile(module, dynamic=False)
        compiled(x)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
    return compiled, ""


def _time(eager: nn.Module, ours: Callable, x: Tensor, args: argparse.Namespace, budget_s: float) -> dict:
    providers = {"eager": lambda: eager(x), "ours": lambda: ours(x)}
    results = {}
    if args.no_compile:
        results["compile"] = {"unavailable": "left out (--no-compile)"}
    else:
        compiled, reason = _compiled(eager, x)
        if compiled is None:
            results["compile"] = {"unavailable": reason}
        else:
            providers["compile"] = lambda: compiled(x)
    timings = time_interleaved(providers, device=x.device, rounds=args.rounds, budget_s=budget_s)
    for name, t in timings.items():
        ms = {"median": t.median * 1e3, "p20": t.p20 * 1e3, "p80": t.p80 * 1e3}
        results[name] = {**ms, "rounds": t.rounds, "noisy": t.noisy}
    return {name: results[name] for name in PROVIDERS}


def _stage_inputs(peer: nn.Module, x: Tensor) -> list[Tensor]:
    """What the first block of each stage of timm's model receives."""
    inputs: list[Tensor] = []
    hooks = [
        s.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for s in peer.stages
    ]
    peer(x)
    for hook in hooks:
        hook.remove()
    return inputs


def time_all(
    peer: nn.Module, ours: nn.Module, x: Tensor, args: argparse.Namespace, steps: _Steps
) -> list[dict]:
    """Rows of the JSON's ``timing`` for one dtype: mixers, MLPs, then the model, all in channels_last."""
    dtype = _short(x.dtype)
    peer, ours, x = (v.to(memory_format=torch.channels_last) for v in (peer, ours, x))
    rows = []
    with torch.inference_mode():
        theirs = [_timm_sub_blocks(stage.blocks[0]) for stage in peer.stages]
        own = [_our_sub_blocks(module[0]) for module in ours.network if isinstance(module, nn.Sequential)]
        inputs = _stage_inputs(peer, x)
        for what in ("mixer", "mlp"):
            for i, h in enumerate(inputs):
                h = h.contiguous(memory_format=torch.channels_last)
                steps(f"timing {dtype}, {what} of stage {i + 1} ({'x'.join(map(str, h.shape[1:]))})")
                eager = theirs[i][what]
                providers = _time(eager, own[i][what], h, args, _SUB_BLOCK_S)
                rows.append(_timing_row(dtype, what, i + 1, h, providers))
                inputs[i] = eager(h)  # what the MLP receives
        steps(f"timing {dtype}, whole model")
        rows.append(_timing_row(dtype, "model", None, x, _time(peer, ours, x, args, _MODEL_S)))
    torch.compiler.reset()  # the next dtype's graphs must not count as recompilations of this one's
    return rows


def _timing_row(dtype: str, what: str, stage: int | None, x: Tensor, providers: dict) -> dict:
    return {"dtype": dtype, "what": what, "stage": stage, "shape": list(x.shape), "providers": providers}


def _top5(logits: Tensor, checkpoint: str | None) -> list[list[dict]]:
    labels = None
    if checkpoint is not None and logits.shape[1] == 1000:
        labels = timm.data.ImageNetInfo().label_descriptions()
    best = logits.float().softmax(1).topk(5)
    return [
        [
            {"class": c, "label": labels[c] if labels else f"class {c}", "probability": p}
            for p, c in zip(probabilities, classes, strict=True)
        ]
        for probabilities, classes in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def run(args: argparse.Namespace) -> int:
    """The command. 0, or 1 where the verification failed."""
    with use_backend(args.backend) if args.backend else contextlib.nullcontext():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device; allowed here: cpu")
    batch_size = args.batch_size or (64 if device == "cuda" else 8)
    chosen = {_short(dtype): explain_selection(device, dtype) for dtype in args.dtype}
    for backend, reason in chosen.values():
        if backend == "none":
            raise CommandError(reason)
    check_writable(args.json, args.report)
    check_readable("--checkpoint", args.checkpoint)

    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs (from 1 a CPU on, times are unreliable)"
    with _Steps(2 + 10 * len(args.dtype)) as steps:
        steps("reading the photos")
        paths = args.image or default_photos()
        photos = [load_photo(path) for path in paths]
        steps(f"building {args.model}")
        peer, ours = make_models(args.model, args.checkpoint)
        config = model_config(args.model)
        size = args.image_size or config.input_size
        pixels = torch.stack([preprocess(photo, config, size) for photo in photos]).to(device)
        shape = (1, 3, size, size)
        model = {
            "name": args.model,
            "weights": args.checkpoint or "random (seed 0, LayerScale of order 0.1)",
            "head": "timm",
            "params": sum(p.numel() for p in ours.parameters()),
            "macs": count_macs(ours, shape).total(),
            "macs_official_head": count_macs(create_model(args.model), shape).total(),
            "input_size": size,
        }
        verification, timing, top5 = [], [], None
        for dtype in args.dtype:
            steps(f"verifying {_short(dtype)} against float64")
            pair = [copy.deepcopy(m).to(device, dtype) for m in (peer, ours)]
            rows, logits = verify_logits(*pair, pixels.to(dtype), dtype)
            verification += rows
            top5 = top5 or _top5(logits, args.checkpoint)
            batch = pixels.to(dtype).repeat(-(-batch_size // len(photos)), 1, 1, 1)[:batch_size]
            timing += time_all(*pair, batch, args, steps)

    result = {
        "schema": 1,
        "passed": all(row["passed"] is not False for row in verification),
        "environment": {
            "device": device_name(device),
            "backend": "; ".join(f"{dtype}: {b} ({why})" for dtype, (b, why) in chosen.items()),
            "layout in the timing": "channels_last, all providers",
            "batch size in the timing": str(batch_size),
            "load before the start": load,
            "poolformer-kernels": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "model": model,
        "images": [{"name": Path(p).name, "top5": best} for p, best in zip(paths, top5, strict=True)],
        "verification": verification,
        "timing": timing,
    }
    print_tables(result)
    if args.json:
        write_whole(args.json, json.dumps(result, indent=1) + "\n")
    page = write_report(result, [crop(photo, config, size) for photo in photos], make_folder(args.report))
    print(f"report: {page}")
    return 0 if result["passed"] else 1
