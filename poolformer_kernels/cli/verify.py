"""Errors of the operators against float64, beside those of eager PyTorch: `poolformer-kernels verify`.

The rule is that of `poolformer_kernels.numerics`. Inputs are random and shifted: with mean 0 a wrong mean
would not show.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..numerics import errors, tolerance, without_tf32
from ..ops.dispatch import BACKENDS, explain_selection, use_backend
from .errors import CommandError
from .files import check_writable, write_whole

__all__ = ["OPERATORS", "Check", "Operator", "verify"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Operator:
    """One operator's cases. ``ours`` and ``eager`` take ``(tensors by argument name, form)``."""

    forms: tuple[str, ...]
    shapes: tuple[tuple[int, int, int, int], ...]
    inputs: Callable[[tuple[int, int, int, int], str, torch.Generator], dict[str, Tensor]]
    ours: Callable[[dict[str, Tensor], str], Tensor]
    eager: Callable[[dict[str, Tensor], str], Tensor]
    zero_gradients: dict[
        str, str
    ]  # argument whose gradient is exactly zero -> the one its error is relative to
    terms: int = 0  # how many products each element of y and dx sums at the least


@dataclass(frozen=True)
class Check:
    """One quantity (``y`` or the gradient ``d<argument>``) of one case."""

    operator: str
    form: str
    backend: str
    device: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    quantity: str
    error_l2: float
    eager_l2: float
    allowed_l2: float
    error_max: float
    eager_max: float
    allowed_max: float

    @property
    def passed(self) -> bool:
        """Both errors are allowed; a NaN is not."""
        return self.error_l2 <= self.allowed_l2 and self.error_max <= self.allowed_max


def _normal(rng: torch.Generator, size: tuple[int, ...], mean: float, std: float) -> Tensor:
    return mean + std * torch.randn(size, generator=rng, dtype=torch.float64)


def _residual_inputs(shape: tuple[int, int, int, int], rng: torch.Generator) -> dict[str, Tensor]:
    """LayerScale, and stochastic depth: dropped, kept at 1/0.8, ..."""
    drop_scale = torch.arange(shape[0], dtype=torch.float64) % 2 * 1.25
    return {"layer_scale": _normal(rng, shape[1:2], 0.5, 0.2), "drop_scale": drop_scale}


def _pool_mixer_inputs(
    shape: tuple[int, int, int, int], form: str, rng: torch.Generator
) -> dict[str, Tensor]:
    tensors = {
        "x": _normal(rng, shape, -2.3, 0.5),
        "weight": _normal(rng, shape[1:2], 1.0, 0.2),
        "bias": _normal(rng, shape[1:2], 0.3, 0.2),
    }
    return tensors | (_residual_inputs(shape, rng) if form == "residual" else {})


def _pool_mixer_ours(tensors: dict[str, Tensor], form: str) -> Tensor:
    pool_size = 5 if form == "pool 5" else 3
    return ops.pool_mixer(**tensors, pool_size=pool_size, residual=form == "residual")


def _pool_mixer_eager(tensors: dict[str, Tensor], form: str) -> Tensor:
    size = 5 if form == "pool 5" else 3
    x = tensors["x"]
    n = F.group_norm(x, 1, tensors["weight"], tensors["bias"], 1e-5)
    m = F.avg_pool2d(n, size, 1, size // 2, count_include_pad=False) - n
    if form != "residual":
        return m
    return x + tensors["drop_scale"].view(-1, 1, 1, 1) * (tensors["layer_scale"].view(-1, 1, 1) * m)


def _mlp_inputs(shape: tuple[int, int, int, int], form: str, rng: torch.Generator) -> dict[str, Tensor]:
    channels = shape[1]
    hidden = 4 * channels
    tensors = {
        "x": _normal(rng, shape, -2.3, 0.5),
        "w1": _normal(rng, (hidden, channels, 1, 1), 0.0, channels**-0.5),
        "w2": _normal(rng, (channels, hidden, 1, 1), 0.0, hidden**-0.5),
    }
    if form != "no bias":
        tensors |= {"b1": _normal(rng, (hidden,), 0.1, 0.3), "b2": _normal(rng, (channels,), 0.1, 0.3)}
    if form == "residual":
        tensors["norm_weight"] = _normal(rng, (channels,), 1.0, 0.2)
        tensors["norm_bias"] = _normal(rng, (channels,), 0.3, 0.2)
        tensors |= _residual_inputs(shape, rng)
    return tensors


def _mlp_ours(tensors: dict[str, Tensor], form: str) -> Tensor:
    return ops.mlp(**{"b1": None, "b2": None, **tensors}, residual=form == "residual")


def _mlp_eager(tensors: dict[str, Tensor], form: str) -> Tensor:
    x = n = tensors["x"]
    if form == "residual":
        n = F.group_norm(x, 1, tensors["norm_weight"], tensors["norm_bias"], 1e-5)
    h = F.gelu(F.conv2d(n, tensors["w1"], tensors.get("b1")))
    m = F.conv2d(h, tensors["w2"], tensors.get("b2"))
    if form != "residual":
        return m
    return x + tensors["drop_scale"].view(-1, 1, 1, 1) * (tensors["layer_scale"].view(-1, 1, 1) * m)


OPERATORS = {
    "pool_mixer": Operator(
        forms=("plain", "pool 5", "residual"),
        shapes=(
            (2, 64, 56, 56),
            (2, 128, 28, 28),
            (2, 320, 14, 14),
            (3, 512, 7, 7),
            (3, 17, 13, 29),
            (2, 96, 1, 7),
        ),
        inputs=_pool_mixer_inputs,
        ours=_pool_mixer_ours,
        eager=_pool_mixer_eager,
        zero_gradients={"bias": "weight"},
    ),
    "mlp": Operator(
        forms=("plain", "no bias", "residual"),
        shapes=(
            (2, 64, 20, 20),
            (2, 320, 7, 7),
            (2, 512, 7, 7),
            (2, 96, 14, 14),
            (2, 192, 7, 7),
            (3, 17, 5, 13),
            (4, 32, 1, 7),
        ),
        inputs=_mlp_inputs,
        ours=_mlp_ours,
        eager=_mlp_eager,
        zero_gradients={},
        terms=17,
    ),
}


def verify(
    backend: str,
    device: str,
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    operators: dict[str, Operator] = OPERATORS,
) -> Iterator[list[Check]]:
    """Run every case of every operator on one backend; yields the checks of one case (y, then the gradients).

    Raises:
        RuntimeError: the backend cannot run a case.
    """
    for name, operator in operators.items():
        for form in operator.forms:
            for dtype in dtypes:
                for layout in LAYOUTS:
                    for shape in operator.shapes:
                        yield _case(name, operator, form, backend, device, dtype, layout, shape)


@without_tf32()
def _case(name, operator, form, backend, device, dtype, layout, shape) -> list[Check]:
    rng = torch.Generator().manual_seed(0)
    inputs = {key: t.to(dtype) for key, t in operator.inputs(shape, form, rng).items()}

    def run(call, where: str, kind: torch.dtype, memory_format: torch.memory_format) -> dict[str, Tensor]:
        tensors = {key: t.to(where, kind).requires_grad_() for key, t in inputs.items()}
        tensors["x"] = tensors["x"].detach().contiguous(memory_format=memory_format).requires_grad_()
        y = call(tensors, form)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
        grad = grad.to(dtype).to(where, kind).contiguous(memory_format=memory_format)
        gradients = torch.autograd.grad(y, list(tensors.values()), grad)
        return {"y": y, **{f"d{key}": g for key, g in zip(tensors, gradients, strict=True)}}

    # eager and fp64 on contiguous data: eager's channels_last is wrong on both devices (see `reference`)
    exact = run(operator.eager, "cpu", torch.float64, torch.contiguous_format)
    eager = run(operator.eager, device, dtype, torch.contiguous_format)
    with use_backend(backend):
        ours = run(operator.ours, device, dtype, LAYOUTS[layout])

    tokens = shape[0] * shape[2] * shape[3]
    checks = []
    for quantity, value in ours.items():
        argument = quantity[1:]
        scale = truth = exact[quantity].detach()
        if argument in operator.zero_gradients:
            truth, scale = torch.zeros_like(truth), exact[f"d{operator.zero_gradients[argument]}"]
        error, base = errors(value, truth), errors(eager[quantity], truth)
        terms = operator.terms if quantity in ("y", "dx") else tokens
        allowed = tolerance(base, scale, dtype, ulps=terms**0.5)
        of_three = error, base, allowed
        figures = [*(e.relative_l2(scale) for e in of_three), *(e.largest for e in of_three)]
        name_of_dtype = str(dtype).removeprefix("torch.")
        checks.append(Check(name, form, backend, device, name_of_dtype, layout, shape, quantity, *figures))
    return checks


def _backends(asked: str | None, device: str) -> list[str]:
    """The backends to verify on this device: the one asked for, or all that can run."""
    usable = []
    for name in BACKENDS if asked is None else (asked,):
        with use_backend(name):
            chosen, reason = explain_selection(device, torch.float32)
        if chosen != "none":
            usable.append(name)
        elif asked is not None:
            raise CommandError(reason)
        else:
            print(f"skipped {name}: {reason.partition(': ')[2]}", file=sys.stderr)
    return usable


def run(args: argparse.Namespace) -> int:
    """The command: one table per backend, operator form, dtype and layout. 0, or 1 where a check failed."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device; allowed here: cpu")
    check_writable(args.json)
    checks: list[Check] = []
    heading = ""
    for backend in _backends(args.backend, args.device):
        for case in verify(backend, args.device, dtypes=args.dtype):
            c = case[0]
            title = f"{c.operator} ({c.form}), {c.dtype}, {c.layout}: {backend} on {args.device}"
            if title != heading:
                heading = title
                print(f"\n{title}; relative L2 errors, ours|eager")
                print(" " * 14 + "".join(f"{c.quantity:^17s}" for c in case))
            cells = "".join(f"{c.error_l2:7.1e}|{c.eager_l2:7.1e}{' ' if c.passed else '!'} " for c in case)
            print(f"  {'x'.join(map(str, c.shape)):12s}{cells}", flush=True)
            checks += case
    failed = [c for c in checks if not c.passed]
    if args.json:
        rows = [{**asdict(c), "passed": c.passed} for c in checks]
        document = {"schema": 1, "passed": not failed, "checks": rows}
        write_whole(args.json, json.dumps(document, indent=1) + "\n")
    passed = f"{len(checks) - len(failed)} of {len(checks)} values within 1.5 x eager's error + rounding"
    print(
        f"\n{passed} (relative L2 and maximum)" + (f"; {len(failed)} FAILED, marked with !" if failed else "")
    )
    return 1 if failed else 0
