"""The run itself: steps, validation, checkpoints, signals, and what is written on the way."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..models.checkpoints import FILE_NOTES
from ..version import __version__
from .data import Data, key
from .dense_tasks import Detection, Instance, Segmentation
from .evaluation import StoppedError
from .networks import StochasticDepth
from .processes import Processes, peak_memory, whole
from .recipe import RecipeError, RecipeFields, read_yaml, resolve, write_yaml
from .report import Metrics, Progress, TensorBoard, columns_of, draw_curves, write_page
from .state import Checkpoints, StateError, gather, group_numbers, restore, restore_groups, write_weights
from .tasks import Classification, Scores, Task

__all__ = ["TASKS", "RunError", "check", "check_new", "train"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "detection": Detection,
    "instance": Instance,
    "segmentation": Segmentation,
}

_MAY_CHANGE = ("workers", "save_every", "keep", "log_every", "compile", "bad_images")  # when a run is resumed
_GIVE_UP = 100  # steps in a row that a scaler may skip: it halves its scale each time
_DRAW_S = 60.0  # between drawings of the curves


class RunError(Exception):
    """Why a run ended before its last step; the message says what was saved."""


def check(recipe: RecipeFields, data: Data, run: Path, resume: bool, processes: Processes) -> RecipeFields:
    """The complete recipe, after everything that can be known before the work; nothing is written.

    Raises:
        RecipeError: RUN exists and is not resumed, or is resumed and is none or of another recipe; a batch
            that the images, processes or micro-batches do not divide; a precision that the device lacks.
    """
    recipe = TASKS[recipe.task].completed(recipe)
    processes.do_first(lambda: _check_run(recipe, data, run, resume))
    parts = processes.world * recipe.accumulate
    if recipe.batch_size % parts:
        raise RecipeError(
            f"batch_size is {recipe.batch_size}; allowed: a multiple of processes x accumulate, {parts}"
        )
    if recipe.mixes and recipe.batch_size // parts % 2:
        raise RecipeError(
            f"batch_size is {recipe.batch_size}, {recipe.batch_size // parts} in a micro-batch; allowed with"
            " mixup or cutmix: an even number, since pairs are mixed"
        )
    if len(data.train) < recipe.batch_size:
        raise RecipeError(f"DATA {data.name} has {len(data.train)} images; batch_size is {recipe.batch_size}")
    if recipe.fsdp and processes.world == 1:
        raise RecipeError("fsdp is true; allowed with several processes: torchrun --nproc-per-node N -m …")
    device = processes.device
    if device.type == "cuda" and recipe.precision == "bfloat16" and not torch.cuda.is_bf16_supported(False):
        raise RecipeError(f"precision is bfloat16, which {torch.cuda.get_device_name(device)} lacks")
    return recipe


def check_new(run: Path) -> None:
    """Raises RecipeError unless RUN can be the folder of a new run; its parent must exist."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise RecipeError(f"--out {run} exists; allowed: a new folder, or --resume to go on with its run")
    if not run.parent.is_dir():
        raise RecipeError(
            f"--out {run}: there is no folder {run.parent}; only the last folder of a path is made"
        )


def _check_run(recipe: RecipeFields, data: Data, run: Path, resume: bool) -> None:
    """Raises RecipeError unless RUN is new or, to resume, a run of this recipe on this data."""
    if not resume:
        check_new(run)
        return
    config = run / "config.yaml"
    if not config.is_file():
        raise RecipeError(f"--resume: {run} has no config.yaml, so there is no run to go on with")
    stored = read_yaml(config)
    source = stored.pop("data", data.name)
    if os.path.realpath(source) != os.path.realpath(data.name):
        raise RecipeError(f"--resume: the run in {run} is of DATA {source}, not {data.name}")
    task = stored.pop("task", "classification")
    if task != recipe.task:
        raise RecipeError(f"--resume: the task is {recipe.task}, but the run in {run} has {task}")
    before = resolve("paper", stored, kind=type(recipe))
    for f in fields(recipe):
        old, new = getattr(before, f.name), getattr(recipe, f.name)
        if old != new and f.name not in _MAY_CHANGE:
            raise RecipeError(f"--resume: {f.name} is {new}, but the run in {run} has {old}")


@dataclass
class Totals:
    """What is summed up since the last row of metrics.csv; part of a checkpoint."""

    loss: float = 0.0
    finite: int = 0  # steps whose losses are summed up
    steps: int = 0
    not_finite: int = 0  # steps in a row
    bad: int = 0  # training images
    bad_val: int = 0  # of the last validation
    seconds: float = 0.0
    last_loss: float = math.nan
    best: float = -1.0
    best_step: int = 0
    evaluated: int = -1  # the last step with a validation
    run_seconds: float = 0.0  # of the whole run, validation and all


class _Signals:
    """SIGTERM and SIGINT: the first lets the step end, the second ends the process at once.

    torchrun sends its processes the Ctrl-C that the terminal has sent them already: there a second signal
    within a second counts as the first.
    """

    def __init__(self, torchrun: bool) -> None:
        self.number, self._until = 0, 1.0 if torchrun else 0.0

    def __enter__(self) -> "_Signals":
        self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._until = number, now + self._until
        elif now > self._until:
            os._exit(128 + number)


def train(
    recipe: RecipeFields,
    data: Data,
    run: Path,
    processes: Processes,
    *,
    resume: bool = False,
    show: bool = True,
) -> int:
    """Trains until the last step or a signal.

    Args:
        recipe: from `poolformer_kernels.train.recipe.resolve`.
        data: of the recipe's task, from its `Task.open`.
        run: the folder RUN.
        resume: go on from RUN's newest checkpoint, from the start if there is none.
        show: progress on stderr.

    Returns:
        0, or 128 plus the number of the signal that ended it after its state was saved.

    Raises:
        RecipeError: the request cannot be met; nothing was done.
        StateError: a checkpoint cannot be written or read.
        RunError: the loss is not finite.
        BadImageError: an image cannot be read.
    """
    recipe = check(recipe, data, run, resume, processes)
    with _Signals(processes.world > 1) as signals:
        trainer = _Trainer(recipe, data, run, processes, signals, show)
        trainer.open()
        if resume:
            trainer.load()
        return trainer.run_steps()


class _Trainer:
    def __init__(
        self,
        recipe: RecipeFields,
        data: Data,
        run: Path,
        processes: Processes,
        signals: _Signals,
        show: bool,
    ) -> None:
        self.recipe, self.data, self.run, self.processes, self.signals = recipe, data, run, processes, signals
        self.device = processes.device
        self.task = TASKS[recipe.task](recipe, data, processes)
        self.model = self.task.build()
        if recipe.fsdp:  # shards have no memory format
            self.model.to(memory_format=torch.contiguous_format)
        self.model.to(self.device).train()
        self.ema = None if recipe.ema is None else ModelEmaV3(self.model, decay=recipe.ema)
        if recipe.fsdp:
            mesh = init_device_mesh(self.device.type, (processes.world,))
            for model in (self.model, self.ema and self.ema.module):
                if model is not None:
                    _shard(model, mesh)
        micro = recipe.batch_size // processes.world // recipe.accumulate
        self.depth = StochasticDepth(self.model, recipe, micro, self.device)
        self.optimizer = _optimizer(self.model, recipe)
        self.steps_per_epoch = len(data.train) // recipe.batch_size
        self.steps = recipe.steps(self.steps_per_epoch)
        self.validates_every = recipe.validates_every(self.steps_per_epoch)
        self.set_rate = self.task.schedule(self.optimizer, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")
        self.called = torch.compile(self.model) if recipe.compile else self.model
        if processes.world > 1 and not recipe.fsdp:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.called = DistributedDataParallel(self.called, device_ids=ids, gradient_as_bucket_view=True)
        self.totals = Totals()
        self.step = 0
        self.show = show and processes.first
        self.progress: Progress | None = None
        self._began = 0.0  # since when the steps of the next row take time
        self._counted = time.perf_counter()  # until when `Totals.run_seconds` is counted
        self.checkpoints = Checkpoints(run / "checkpoints", recipe.keep)
        self.metrics: Metrics | None = None
        self.board: TensorBoard | None = None
        self.pending: list[Tensor] = []  # losses of steps that no row has counted yet, on the device
        self._drawn = time.monotonic()

    # ---- state

    def open(self) -> None:
        """Makes RUN with its config.yaml and metrics.csv."""
        self.processes.do_first(self._open)

    def _open(self) -> None:
        try:
            self.run.mkdir(exist_ok=True)
            self._lock = (self.run / ".lock").open("w")
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with this process
            except BlockingIOError:
                raise StateError(f"another process trains in {self.run}") from None
            write_yaml(self.run / "config.yaml", self._settings())
            self.metrics = Metrics(self.run, columns_of(self.recipe.task))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StateError(f"cannot write to {self.run}: {reason}") from None

    def _settings(self) -> dict[str, object]:
        """config.yaml; a task of its own where it is not the usual one."""
        task = {} if self.recipe.task == "classification" else {"task": self.recipe.task}
        return {"data": self.data.name, **task, **self.recipe.as_dict()}

    def load(self) -> None:
        """Everything from the newest checkpoint that can be read; nothing where there is none."""
        tensors = None

        def newest() -> tuple[dict | None, list[str]]:
            nonlocal tensors  # of the first process only
            tensors, facts, damaged = self.checkpoints.newest()
            return facts, damaged

        facts, damaged = self.processes.do_first(newest)
        if facts is not None and facts["data"] != self._fingerprint():
            raise StateError(
                f"the data has changed since the checkpoint of step {facts['step']}: it was"
                f" {facts['data']}, it is {self._fingerprint()}"
            )
        for message in damaged:
            self._say(f"{message}; the one before it is taken")
        if facts is not None:
            module = self.ema and self.ema.module
            restore(self.model, self.optimizer, module, tensors, facts["optimizer"], self.processes)
            restore_groups(self.optimizer, facts["groups"])
            self.step, self.totals = facts["step"], Totals(**facts["totals"])
            if not self.processes.first:
                self.totals.bad = 0  # the first has those of all
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(facts["scaler"])
        last = self.step - self._lacks_validation()  # a validation that comes again has its row again
        self.processes.do_first(lambda: self._writing(lambda: self.metrics.truncate(last)))
        self._say(f"goes on from step {self.step} of {self.steps}")

    def _lacks_validation(self) -> bool:
        """Whether an epoch ended with the last step, and a signal came before its validation was over."""
        ended = self.step > 0 and self._validates()
        return ended and self.totals.evaluated != self.step

    def _validates(self) -> bool:
        """Whether a validation follows the last step."""
        return self.step % self.validates_every == 0 or self.step == self.steps

    def _fingerprint(self) -> str:
        names = hashlib.sha256("\n".join(self.data.classes).encode()).hexdigest()[:8]
        sizes = f"{len(self.data.train)} and {len(self.data.val)} images"
        return f"{sizes} of {len(self.data.classes)} classes ({names})"

    def save(self) -> None:
        """Writes a checkpoint of the last step."""
        tensors, numbers = gather(self.model, self.optimizer, self.ema and self.ema.module)
        self._count_run()
        (bad,) = self.processes.sum(self.totals.bad)
        facts = {
            "step": self.step,
            "totals": {**vars(self.totals), "bad": int(bad)},
            "scaler": self.scaler.state_dict(),
            "optimizer": numbers,
            "groups": group_numbers(self.optimizer),
            "data": self._fingerprint(),
            "version": __version__,
        }
        self.processes.do_first(lambda: self.checkpoints.save(self.step, tensors, facts) and None)

    # ---- steps

    def run_steps(self) -> int:
        recipe, every = self.recipe, self.recipe.save_every or self.steps_per_epoch
        if self.processes.first:
            self.board = TensorBoard(self.run, self.step or None)
        self._began = time.perf_counter()
        with Progress(self.steps, self.step, self.show) as self.progress:
            if self._lacks_validation():
                stopped = self._end_of_epoch()  # a signal had come before it was over
                if stopped:
                    return 128 + stopped
                self.save()
            batches = iter(self.task.loader(self.step))
            self._began = time.perf_counter()
            while self.step < self.steps:
                self.set_rate(self.step)
                self._one_step([next(batches) for _ in range(recipe.accumulate)])
                validates = self._validates()
                if self.step % recipe.log_every == 0 or validates:
                    self._settle()
                    if not validates:
                        self._row({})
                stopped = self._agreed_signal()
                if validates and not stopped:
                    stopped = self._end_of_epoch()
                    self._began = time.perf_counter()
                if stopped or self.step % every == 0 or self.step == self.steps:
                    self._settle()
                    self._count_time()
                    self.save()
                    self._began = time.perf_counter()
                if stopped:
                    self._page()
                    self._say(f"stopped by a signal after step {self.step}; --resume goes on from there")
                    return 128 + stopped
            self._page()
        return 0

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _one_step(self, batches: list) -> None:
        recipe = self.recipe
        torch.manual_seed(key(recipe.seed, "dropout", self.step, self.processes.rank))
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            self.totals.bad += len(batch.bad)
            self.depth.set(self.step, batch.positions)
            with self._synchronised(i + 1 == len(batches)):
                part = self.task.loss(self.called, batch) / len(batches)
                self.scaler.scale(part).backward()
            loss += part.detach()
        self.pending.append(loss)
        if self.device.type == "cpu":
            self._settle()  # before the weights are touched
        if recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are exchanged after the last micro-batch only."""
        if self.recipe.fsdp:
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self.called, DistributedDataParallel) and not last:
            return self.called.no_sync()
        return contextlib.nullcontext()

    def _settle(self) -> None:
        """Counts the losses that are still on the device.

        Raises:
            RunError: one is not finite, and no scaler skips its step.
        """
        if not self.pending:
            return
        first = self.step - len(self.pending) + (self.device.type == "cpu")  # there the step is not over
        losses = torch.stack(self.pending).double().tolist()
        self.pending = []
        for i, loss in enumerate(self.processes.sum(*losses)):
            loss /= self.processes.world
            self.totals.steps += 1
            self.totals.not_finite = 0 if math.isfinite(loss) else self.totals.not_finite + 1
            if math.isfinite(loss):
                self.totals.loss += loss
                self.totals.finite += 1
                self.totals.last_loss = loss
            elif not self.scaler.is_enabled() or self.totals.not_finite == _GIVE_UP:
                self._give_up(first + i, loss)

    def _give_up(self, step: int, loss: float) -> None:
        finite = all(p.isfinite().all().item() for p in self.model.parameters())
        (finite,) = self.processes.sum(float(not finite))
        if finite == 0:
            self.save()
            saved = f"the state of step {self.step} is saved"
        else:
            saved = "the weights are no longer finite and not saved; checkpoints are of earlier steps"
        raise RunError(
            f"the loss of step {step + 1} is {loss}, learning rate {self.rate:.3g}, last finite loss"
            f" {self.totals.last_loss:.6g}; {saved}"
        )

    def _agreed_signal(self) -> int:
        """The number of a signal that any process got, 0 for none."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        got = self.processes.sum(*(float(self.signals.number == number) for number in numbers))
        return next((int(number) for number, count in zip(numbers, got, strict=True) if count), 0)

    def _skipped(self) -> int | None:
        """Steps that the scaler skipped: those that the optimiser has not counted; None if it counts none."""
        if not self.scaler.is_enabled():
            return 0
        states = [self.optimizer.state.get(p, {}) for p in self.model.parameters()]
        if not any(states):
            return self.step
        counts = [int(state["step"]) for state in states if "step" in state]
        return self.step - max(counts) if counts else None

    # ---- what is written

    def _count_run(self) -> None:
        now = time.perf_counter()
        self.totals.run_seconds += now - self._counted
        self._counted = now

    def _count_time(self) -> None:
        self.totals.seconds += time.perf_counter() - self._began
        self._began = time.perf_counter()

    def _row(self, more: dict[str, object]) -> None:
        """A row of metrics.csv about the steps since the last one."""
        self._count_time()
        totals = self.totals
        (bad,) = self.processes.sum(totals.bad)
        row = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "lr": self.rate,
            "train_loss": totals.loss / totals.finite if totals.finite else None,
            "images_per_second": totals.steps * self.recipe.batch_size / max(totals.seconds, 1e-9),
            "memory_mb": peak_memory(self.device) / 1e6,
            "skipped_steps": self._skipped(),
            "bad_images": int(bad) + totals.bad_val,
            **more,
        }
        totals.loss, totals.finite, totals.steps, totals.seconds = 0.0, 0, 0, 0.0
        self.processes.do_first(lambda: self._writing(lambda: self._write_row(row)))
        loss = f"loss {row['train_loss']:.4f}" if row["train_loss"] is not None else "no loss"
        text = f"epoch {row['epoch']:.2f}, {loss}, {row['images_per_second']:.0f} images/s"
        if self.task.score in more:
            text += f", validation {more[self.task.score]:.2f} %"
        self.progress.update(self.step, text)

    def _write_row(self, row: dict[str, object]) -> None:
        self.metrics.append(row)
        self.board.add(row)

    def _writing(self, action: Callable[[], object]) -> None:
        """What the first process writes; its errors as StateError."""
        try:
            action()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
            raise StateError(f"cannot write to {self.run}: {reason}; --resume takes up the run") from None

    def _end_of_epoch(self) -> int:
        """Validates; the number of a signal that came meanwhile, whose validation is made up for later."""
        self._count_time()
        try:
            found, ema = self._evaluate(self.model), None
            if self.ema is not None:
                ema = self._evaluate(self.ema.module)
        except StoppedError:
            return self._agreed_signal()
        self._began = time.perf_counter()
        name = self.task.score
        score = (found if ema is None else ema).values[name]
        self.totals.evaluated, self.totals.bad_val = self.step, found.bad
        better = score > self.totals.best
        if better:
            self.totals.best, self.totals.best_step = score, self.step
        more = {} if ema is None else {name.replace("val_", "ema_"): ema.values[name]}
        self._row({**found.values, **more})
        if better:
            self._write_best(score)
        self.processes.do_first(lambda: self._writing(self._draw_sometimes))
        return 0

    def _draw_sometimes(self) -> None:
        if time.monotonic() - self._drawn > _DRAW_S:
            draw_curves(self.run)
            self._drawn = time.monotonic()

    def _evaluate(self, model: nn.Module) -> Scores:
        self.processes.share_buffers(model)
        return self.task.evaluate(model, stop=lambda: bool(self._agreed_signal()))

    def _result(self) -> nn.Module:
        """The model whose weights the run is for."""
        return self.model if self.ema is None else self.ema.module

    def _write_best(self, score: float) -> None:
        model = self._result()
        weights = self.task.weights({name: whole(t) for name, t in model.state_dict().items()})
        notes = self._metadata(model, score)
        self.processes.do_first(lambda: write_weights(self.run / "best.safetensors", weights, notes))

    def _metadata(self, model: nn.Module, score: float) -> dict[str, str]:
        notes = {
            "model": self.recipe.model,
            **self.task.notes(model),
            "classes": self.data.classes,
            "step": self.step,
            self.task.score.removeprefix("val_"): score,
            "version": __version__,
        }
        return {"format": "pt", FILE_NOTES: json.dumps(notes)}

    def _page(self) -> None:
        """curves.png and index.html."""
        samples = self.task.samples(self._result())
        self.processes.do_first(lambda: self._writing(lambda: self._write_page(samples)))

    def _write_page(self, samples: list) -> None:
        draw_curves(self.run)
        write_page(self.run, self._settings(), self._facts(), samples)

    def _facts(self) -> dict[str, str]:
        gradients = sum(p.numel() for p in self.model.parameters() if p.requires_grad) * 4
        return {
            "time": str(datetime.timedelta(seconds=round(self.totals.run_seconds))),
            "device": str(self.device),
            "processes": str(self.processes.world),
            "torch threads": str(torch.get_num_threads()),
            "bytes of gradients a step": f"{gradients:,}" if self.processes.world > 1 else "0, one process",
            "torch": torch.__version__,
            "poolformer_kernels": __version__,
        }

    def _say(self, text: str) -> None:
        if not self.show:
            return
        if self.progress is not None:
            self.progress.line(text)
        else:
            print(text, file=sys.stderr, flush=True)


def _optimizer(model: nn.Module, recipe: RecipeFields) -> torch.optim.Optimizer:
    if recipe.optimizer.startswith("lookahead"):
        raise RecipeError(f"optimizer {recipe.optimizer}: its slow weights could not be resumed exactly")
    on_cuda = next(model.parameters()).is_cuda
    options = {"fused": True} if recipe.optimizer == "adamw" and (on_cuda or not recipe.fsdp) else {}
    try:
        return create_optimizer_v2(
            model,
            opt=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            filter_bias_and_bn=not recipe.decays_all,
            **options,
        )
    except (AssertionError, KeyError, ValueError, RuntimeError) as error:
        raise RecipeError(f"optimizer {recipe.optimizer}: {error}") from None


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Block by block, then the rest."""
    for module in list(model.modules()):
        if type(module).__name__.endswith("Block"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
