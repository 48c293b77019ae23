"""A training step of timm's model as it is, compiled and accelerated, beside our own model.

    poolformer-kernels bench training [--models s12] [--dtype bfloat16 float32] [--batch 8]

A step is forward, cross entropy, backward and a fused AdamW: float32 parameters, autocast for bfloat16. All
providers start from the same weights and see the same batch. The losses before and after each of {steps}
steps and the gradients of the first are compared with those of timm's model in float64, the gradients with
eager's errors as the measure; only then are steps timed, with a learning rate of 0, so that each does the
same work.

The CSV has three columns more: loss_error, the largest error of a loss relative to how much the loss
changes; saved_bytes, what autograd keeps between forward and backward (each storage once, parameters
excluded); and saved_fraction, its fraction of eager's. The least bytes of a step are those of the forward,
one and a half times as many for the backward, which reads each layer's input and the gradient of its output
and writes the gradient of its input, and 7 floats per parameter for AdamW, 4 read and 3 written. Its FLOPs
are three times the forward's.

Providers: {providers}
"""

import argparse
import copy
import gc
import itertools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import poolformer_kernels as pk
from poolformer_kernels.accelerate import accelerate
from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.cli.options import image_size

from .harness import Names, arguments, finish, image, measure, record, start, steps
from .parts import cost
from .providers import make_pair, quiet
from .rows import Case, Point, Results, Row

BUDGET_S = 30.0  # of one case's rounds
STEPS = 3
LR = 1e-4
# A provider is wrong if the error of a loss, relative to how much the loss changes, is above this: ten times
# the error of correct providers. Losses hardly show a wrong gradient, since AdamW's steps have the same size
# with it.
WRONG_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}
# It is wrong, too, if a gradient's relative L2 error is above twice eager's plus this. The first number is
# for one parameter's gradients in all blocks together; correct providers stay below 1.7 times eager's and
# below 0.025. The second is for the gradient of a single parameter, which in bfloat16 may be small beside the
# rounding errors of the terms that it sums; correct providers come to 0.11 above twice eager's.
WRONG_GRADIENT = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 0.2)}
# float32 on CUDA is TF32 by default: its products have more digits than bfloat16's, but not float32's.

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # the index of a module in a list: 3 in blocks.3.mlp


def _compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()  # earlier graphs must not count as recompilations of this
    return torch.compile(model, dynamic=False)


# (timm's model, ours) -> what is trained; each is given copies
PROVIDERS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "ours": lambda peer, ours: ours,
    "accelerate": lambda peer, ours: accelerate(peer),
    "accelerate compile": lambda peer, ours: _compiled(accelerate(peer)),
    "eager": lambda peer, ours: peer,
    "compile": lambda peer, ours: _compiled(peer),
}


@dataclass(frozen=True)
class TrainingRow(Row):
    """A row with what only training has; None in the rows of the limits."""

    loss_error: float | None = None
    saved_bytes: int | None = None
    saved_fraction: float | None = None


@dataclass
class Training:
    """A model, its optimiser and one batch."""

    model: nn.Module
    x: Tensor
    target: Tensor
    dtype: torch.dtype
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)

    def loss(self) -> Tensor:
        autocast = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.x.device.type, self.dtype if autocast else torch.bfloat16, enabled=autocast):
            return F.cross_entropy(self.model(self.x), self.target)

    @torch.enable_grad()
    def step(self) -> Tensor:
        """One step; the loss before it."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """The last step's, in float64, under the names that an uncompiled model has."""
        named = self.model.named_parameters()
        return {name.removeprefix("_orig_mod."): p.grad.double() for name, p in named}

    def trajectory(self) -> tuple[list[float], dict[str, Tensor]]:
        """(the losses before the first step and after each of `STEPS`, the first step's gradients).

        From then on steps change nothing.
        """
        losses, gradients = [], {}
        for i in range(STEPS):
            losses.append(self.step().item())
            if i == 0:
                gradients = self.gradients()
        with torch.no_grad():
            losses.append(self.loss().item())
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        return losses, gradients


def saved_bytes(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward of ``loss()``, but for the parameters'."""
    excluded = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}  # alive: the address of a freed one could come again

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage
        return t

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda t: t):
        value = loss()
    total = sum(storage.nbytes() for storage in kept.values())
    del value
    return total


def loss_error(losses: list[float], exact: list[float]) -> float:
    """The largest error of a loss, relative to the range of the exact ones; of NaN, infinity."""
    worst = max(abs(a - b) if math.isfinite(a) else math.inf for a, b in zip(losses, exact, strict=True))
    return worst / (max(exact) - min(exact))


def gradient_errors(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 errors by name: of each parameter, and of each in all blocks together, its indices ``*``.

    Parameters without a gradient, as the bias of a mixer's norm, are left out; of NaN the error is infinite.
    """
    if gradients.keys() != exact.keys():
        raise ValueError("gradients must be of the parameters that exact has")
    squares: dict[str, tuple[float, float]] = {}  # sums over the error and over the exact gradient
    for name, value in exact.items():
        for key in {name, _INDEX.sub("*", name)}:
            error, size = squares.get(key, (0.0, 0.0))
            error += (gradients[name] - value).square().sum().item()
            squares[key] = error, size + value.square().sum().item()
    least = 1e-18 * max(size for _, size in squares.values())
    relative = {key: math.sqrt(error / size) for key, (error, size) in squares.items() if size > least}
    return {key: error if math.isfinite(error) else math.inf for key, error in relative.items()}


def wrong_gradient(errors: dict[str, float], eager: dict[str, float], dtype: str) -> str | None:
    """The largest error that rounding does not explain, in words; None where it explains all."""
    joined, single = WRONG_GRADIENT[dtype]
    limits = {key: 2 * error + (single if _INDEX.search(key) else joined) for key, error in eager.items()}
    wrong = [(error, key) for key, error in errors.items() if error > limits[key]]
    if not wrong:
        return None
    error, key = max(wrong)
    return f"error {error:.2g} of the gradient of {key} against float64, more than {limits[key]:.2g}"


def measure_point(point: Point, args: argparse.Namespace, results: Results) -> None:
    """Check and time the providers on one case."""
    name_of_case = f"training of {point}"
    dtype = getattr(torch, point.dtype)
    rule = "bfloat16" if args.device == "cuda" else point.dtype
    peer, ours = make_pair(point.model, torch.float32, args.device)
    shape = (ours.in_chans, point.size, point.size)
    x = image(point.batch, shape, args.device, torch.float32, "channels_last")
    target = torch.randint(ours.num_classes, (point.batch,), device=args.device)

    exact = copy.deepcopy(peer).to(torch.float64, memory_format=torch.contiguous_format).train()
    right, gradients = Training(exact, x.double().contiguous(), target, torch.float64).trajectory()
    del exact
    # Contiguous: CUDA's channels_last avg_pool2d backward ignores the padding (pytorch#188344)
    plain = copy.deepcopy(peer).to(memory_format=torch.contiguous_format).train()
    eager = Training(plain, x.contiguous(), target, dtype)
    eager.step()
    rounded = eager.gradients()
    del plain, eager
    calls, errors, saved = {}, {}, {}
    for name in args.providers:
        try:
            with quiet():
                model = PROVIDERS[name](*(copy.deepcopy(model).train() for model in (peer, ours)))
                training = Training(model, x, target, dtype)
                losses, found = training.trajectory()
        except Exception as failure:  # the others go on
            results.miss(name, failure, name_of_case)
            results.require_device(args.device, name)
            continue
        named = pk.convert_state_dict if name == "ours" else dict
        exact, error = named(gradients), loss_error(losses, right)
        wrong = wrong_gradient(gradient_errors(found, exact), gradient_errors(named(rounded), exact), rule)
        if error > WRONG_LOSS[rule]:
            results.reject(name, f"error {error:.2g} of the losses against float64", name_of_case)
            continue
        if wrong is not None:
            results.reject(name, wrong, name_of_case)
            continue
        calls[name], errors[name] = training.step, error
        saved[name] = saved_bytes(training.loss, model.parameters())
    if not calls:
        return
    moved, flops = cost(peer, ours, point.size, point.batch, dtype.itemsize)
    weights = sum(p.numel() for p in peer.parameters())
    case = Case(
        benchmark="training",
        direction="step",
        shape=shape,
        dtype=point.dtype,
        batch=point.batch,
        least=(5 * moved // 2 + 7 * 4 * weights, 3 * flops),
        model=point.model,
    )
    with torch.inference_mode():
        largest = ours.patch_embed(x).to(dtype).clone()
    for rows in measure(case, calls, largest, rounds=args.rounds, budget_s=BUDGET_S):
        results.add([_training_row(row, errors, saved) for row in rows])
    del calls, training, model
    gc.collect()


def _training_row(row: Row, errors: dict[str, float], saved: dict[str, int]) -> TrainingRow:
    kept, eager = saved.get(row.provider), saved.get("eager")
    return TrainingRow(
        **asdict(row),
        loss_error=errors.get(row.provider),
        saved_bytes=kept,
        saved_fraction=kept / eager if kept is not None and eager is not None else None,
    )


def memory_lines(groups: list[list[TrainingRow]]) -> list[str]:
    """What each provider keeps for the backward, and how far its losses are from float64's."""
    lines = []
    for group in groups:
        for row in (row for row in group if row.saved_bytes is not None):
            share = "" if row.saved_fraction is None else f", {row.saved_fraction:.1%} of eager's"
            lines.append(
                f"{row.provider}, {row.model}, {row.dtype}, batch {row.batch}: {row.saved_bytes / 1e6:.1f} MB"
                f" kept for the backward{share}; loss error {row.loss_error:.1e}"
            )
    return list(dict.fromkeys(lines))  # a case in two states has them twice


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The options."""
    doc = __doc__.format(providers=", ".join(PROVIDERS), steps=STEPS)
    found = arguments(doc, prog, models=["poolformer_s12"], dtypes=["bfloat16"], rounds=10)
    found.add_argument("--providers", action=Names, allowed=PROVIDERS, help="what is timed (default: all)")
    found.add_argument(
        "--image-size",
        type=image_size,
        nargs="+",
        metavar="N",
        help="side of the images, pixels (default: 224)",
    )
    return found


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = start(parser(prog), argv)
    if rejected := [dtype for dtype in args.dtype if dtype not in WRONG_LOSS]:
        raise CommandError(f"--dtype {rejected[0]}: without loss scaling; allowed: {', '.join(WRONG_LOSS)}")
    args.providers = args.providers or list(PROVIDERS)
    batches = args.batch or ([64] if args.device == "cuda" else [8])
    with record("training", args) as results:
        points = itertools.product(args.models, args.dtype, batches, args.image_size or [224])
        for point in steps(itertools.starmap(Point, points), "training of {}".format):
            measure_point(point, args, results)
    code = finish("Training step", results, args)
    for line in memory_lines(results.groups):
        print(line)
    return code
