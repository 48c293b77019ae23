"""Two gloo processes: gradients of an accelerated model on halves of a batch, by DDP and by FSDP2.

Called with a file that the processes meet in, one with model and batch, and one for what the first finds.
"""

import copy
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from poolformer_kernels import explain, use_backend
from poolformer_kernels.accelerate import accelerate
from poolformer_kernels.nn import fusion
from support.accelerate import PoolFormerBlock


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(accelerate(model))


def fsdp_later(model: nn.Module) -> nn.Module:
    return sharded(accelerate(model))


def fsdp_first(model: nn.Module) -> nn.Module:
    return accelerate(sharded(model))


def sharded(model: nn.Module) -> nn.Module:
    """Each block is a group of its own, and so is the rest."""
    mesh = init_device_mesh("cpu", (2,))
    for block in [module for module in model.modules() if isinstance(module, PoolFormerBlock)]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of the mean loss, whole where they are sharded; how often operators were called; what explain says."""
    calls.clear()
    nn.functional.cross_entropy(model(x), labels).backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    grads = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}
    return grads | {"calls": len(calls), "explained": explain(model).summary}


def main(rank: int, meeting: str, given: str, found: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model, x, labels = torch.load(given, weights_only=False)
    half = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
    with use_backend("cpp"):
        values = {
            wrap.__name__: gradients(wrap(copy.deepcopy(model)), x[half], labels[half])
            for wrap in (ddp, fsdp_later, fsdp_first)
        }
    if rank == 0:
        torch.save(values, found)
    dist.destroy_process_group()


calls: list[str] = []


def counted(name: str) -> Callable:
    operator = getattr(fusion, name)

    def call(*args, **options):
        calls.append(name)
        return operator(*args, **options)

    return call


if __name__ == "__main__":
    for operator in ("pool_mixer_with_stats", "mlp_with_stats"):
        setattr(fusion, operator, counted(operator))
    # forked before anything runs, with everything imported: that is most of the time
    torch.multiprocessing.start_processes(main, tuple(sys.argv[1:]), nprocs=2, start_method="fork")
