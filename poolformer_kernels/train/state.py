"""Checkpoints of a run: complete or absent, the last few kept, a damaged one named and passed over.

One is a folder ``checkpoints/step_00000123`` with ``state.safetensors`` (parameters, moments, moving
averages) and ``state.json`` (everything else, and checksums). It is written under another name, synced and
renamed.
torch.distributed.checkpoint is not used: it unpickles its metadata, and moments would lose their memory
format.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .processes import Processes, StateError, whole

__all__ = [
    "Checkpoints",
    "StateError",
    "gather",
    "group_numbers",
    "restore",
    "restore_groups",
    "write_weights",
]

_TENSORS, _FACTS = "state.safetensors", "state.json"
_NAME = re.compile(r"step_(\d{8,})")


class Checkpoints:
    """The checkpoints in a folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps of those that are there, in order."""
        if not self.folder.is_dir():
            return []
        for old in self.folder.glob(".step_*.old"):  # a process ended between the two renames of `save`
            target = self.folder / old.name[1:].removesuffix(".old")
            if not target.exists():
                os.replace(old, target)
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _old(self, step: int) -> Path:
        return self.folder / f".step_{step:08d}.old"

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> Path:
        """Writes one and removes the oldest.

        Raises:
            StateError: it cannot be written, as on a full disk; the others are as they were.
        """
        target = self.folder / f"step_{step:08d}"
        part = self.folder / f".{target.name}.part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            save_file(dict(tensors), part / _TENSORS)
            text = json.dumps(facts)
            sums = {_TENSORS: _checksum(part / _TENSORS), "facts": _of_text(text)}
            (part / _FACTS).write_text(json.dumps({"facts": text, "sha256": sums}))
            for path in (part / _TENSORS, part / _FACTS, part):
                _sync(path)
            if target.exists():  # an earlier one of this step: `steps` takes it back if a kill comes now
                shutil.rmtree(self._old(step), ignore_errors=True)
                os.replace(target, self._old(step))
            os.replace(part, target)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
            left = self.steps()
            last = f"; the last one is of step {left[-1]}" if left else "; there is none before it"
            raise StateError(f"cannot write checkpoint {target}: {_reason(error)}{last}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for path in self.folder.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)
        others = [other for other in self.steps() if other != step]
        for other in others[: max(0, len(others) + 1 - self.keep)]:
            shutil.rmtree(self.folder / f"step_{other:08d}", ignore_errors=True)
        return target

    def newest(self) -> tuple[dict[str, Tensor] | None, dict | None, list[str]]:
        """(tensors, facts, one message for each damaged one that is newer), or None twice if there is none.

        Damaged ones are renamed, to damaged_step_….

        Raises:
            StateError: all of them are damaged.
        """
        damaged, aside = [], []
        steps = self.steps()
        for step in reversed(steps):
            path = self.folder / f"step_{step:08d}"
            try:
                tensors, facts = _read(path)
            except StateError as error:
                damaged.append(str(error))
                aside.append(path)
                continue
            for bad in aside:  # they must not count among those that are kept
                name = bad.with_name(f"damaged_{bad.name}")
                shutil.rmtree(name, ignore_errors=True)
                os.replace(bad, name)
            return tensors, facts, damaged
        if steps:
            raise StateError(f"no checkpoint in {self.folder} can be read: {damaged[0]}")
        return None, None, damaged


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        stored = json.loads((path / _FACTS).read_text())
        text, sums = stored["facts"], stored["sha256"]
        if _of_text(text) != sums["facts"] or _checksum(path / _TENSORS) != sums[_TENSORS]:
            raise StateError(f"checkpoint {path} is damaged: its checksum is another")
        return load_file(path / _TENSORS), json.loads(text)
    except StateError:
        raise
    except Exception as error:  # of the file system, json and safetensors
        raise StateError(f"checkpoint {path} is damaged: {_reason(error)}") from None


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A .safetensors file, complete or as it was.

    Raises:
        StateError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata=dict(metadata))
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read
        _sync(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise StateError(f"cannot write {path}: {_reason(error)}") from None
    finally:
        part.unlink(missing_ok=True)


# ---- what is in one ----------------------------------------------------------------------------------------


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(the tensors of a run, numbers that the optimiser keeps beside them); every process must call it."""
    tensors = {f"model/{name}": whole(value) for name, value in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema/{name}": whole(value) for name, value in ema.state_dict().items()}
    numbers = {}
    for name, p in model.named_parameters():
        for what, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{what}"] = whole(value)
            else:
                numbers[f"{name}/{what}"] = value
    return tensors, numbers


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    """What an optimiser keeps in its groups, where some of timm's count steps: numbers, or tensors of one."""
    found = []
    for group in optimizer.param_groups:
        numbers = {name: value for name, value in group.items() if type(value) in (int, float, bool)}
        for name, value in group.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                numbers[name] = {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
        found.append(numbers)
    return found


def restore_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, object]]) -> None:
    """Puts what `group_numbers` returned into the same optimiser's groups."""
    for group, numbers in zip(optimizer.param_groups, groups, strict=True):
        for name, value in numbers.items():
            if isinstance(value, dict):
                value = torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]))
            group[name] = value


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    tensors: Mapping[str, Tensor] | None,
    numbers: Mapping[str, object],
    processes: Processes,
) -> None:
    """Puts what `gather` returned into the same objects; only the first process needs ``tensors``.

    Moments get the memory format and the sharding of their parameters, which fused optimisers rely on.

    Raises:
        StateError: tensors of another model.
    """
    shapes = processes.same(tensors and {name: (t.shape, t.dtype) for name, t in tensors.items()})
    wanted = {f"model/{name}": t for name, t in model.state_dict().items()}
    if ema is not None:
        wanted |= {f"ema/{name}": t for name, t in ema.state_dict().items()}
    parameters = dict(model.named_parameters())
    on_device = any(optimizer.defaults.get(how) for how in ("fused", "capturable"))
    for name, t in wanted.items():
        if name not in shapes or shapes[name][0] != t.shape:
            raise StateError(f"the checkpoint is of another model: {name} is {_shape(shapes, name)}")
    with torch.no_grad():
        for name, t in wanted.items():
            processes.fill(t, tensors and tensors[name])
        for name, (shape, dtype) in shapes.items():
            kind, _, rest = name.partition("/")
            if kind != "optimizer":
                continue
            p, what = rest.rsplit("/", 1)
            if p not in parameters:
                raise StateError(f"the checkpoint is of another model: it has {p}")
            like = parameters[p]
            if like.shape == shape:
                moment = torch.empty_like(like, dtype=dtype)
            else:  # a step count, on the GPU only where the optimiser is fused
                device = like.device if what != "step" or on_device else "cpu"
                moment = torch.empty(shape, dtype=dtype, device=device)
            processes.fill(moment, tensors and tensors[name])
            optimizer.state[like][what] = moment
        for name, value in numbers.items():
            p, what = name.rsplit("/", 1)
            optimizer.state[parameters[p]][what] = value


def _shape(shapes: Mapping, name: str) -> str:
    return f"of shape {list(shapes[name][0])} there" if name in shapes else "not there"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file) -> str:
    """`hashlib.file_digest` of Python 3.10."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
    return text or type(error).__name__
