"""The processes of a run, as torchrun starts them; a run without torchrun is one process."""

import datetime
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .recipe import RecipeError

__all__ = ["Processes", "StateError", "peak_memory", "start", "whole"]


class StateError(Exception):
    """A file of a run cannot be written or read; the message names it."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. Tensors of the CPU travel through gloo, so agreeing on a number
    never waits for a GPU."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether it is the first on its machine."""
        return self.world == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes, in float64."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def same(self, value: object) -> object:
        """The first process's value."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: object) -> list:
        """Every process's value, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def do_first(self, action: Callable[[], object]) -> object:
        """What the first process does alone: its result, or its error of ours, in all of them."""
        result = problem = None
        if self.first:
            try:
                result = action()
            except (RecipeError, StateError) as error:
                problem = error
        result, problem = self.same((result, problem))
        if problem is not None:
            raise problem
        return result

    def fill(self, tensor: Tensor, value: Tensor | None) -> None:
        """Writes the first process's value into a tensor, sharded or not, of every process."""
        if isinstance(tensor, DTensor):
            full = torch.empty(tensor.shape, dtype=tensor.dtype) if value is None else value
            full = full.to(tensor.device)
            tensor.copy_(distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=0))
            return
        if self.world > 1:
            value = torch.empty(tensor.shape, dtype=tensor.dtype) if value is None else value.contiguous()
            dist.broadcast(value, src=0)
        tensor.copy_(value)

    def share_buffers(self, model: nn.Module) -> None:
        """Gives every process the first one's buffers: BatchNorm's statistics of its own images."""
        if self.world > 1:
            for buffer in model.buffers():
                self.fill(buffer, buffer.detach().clone())

    def end(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A tensor, sharded or not, as a contiguous one of the CPU; every process must call it."""
    tensor = tensor.detach()
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.to("cpu", memory_format=torch.contiguous_format).contiguous()


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has had, in bytes: what torch allocated on a GPU, else resident.

    Resident memory is this program's own where the kernel says it (VmHWM). Some sandboxes' kernels do not;
    there it is getrusage's, which counts what the process that started this one had, too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    own = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    kilobytes = next(own, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return kilobytes * 1024


def start(device: str | None, timeout_s: float) -> Processes:
    """Joins the processes that torchrun started.

    A process that waits for another longer than ``timeout_s`` seconds ends with an error.

    Raises:
        RecipeError: a device that is not there.
    """
    if device not in (None, "cpu", "cuda"):
        raise RecipeError(f"device is {device!r}; allowed: cpu, cuda")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        if not torch.cuda.is_available() or local >= torch.cuda.device_count():
            raise RecipeError(f"device is cuda; process {local} of this machine has no GPU")
        torch.cuda.set_device(local)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    place = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    return Processes(int(os.environ.get("RANK", 0)) if world > 1 else 0, world, place)
