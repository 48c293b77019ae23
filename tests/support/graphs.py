"""A stand-in for CUDA graphs on the CPU: operators are recorded and replayed; a model that makes steps."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poolformer_kernels import graphs
from poolformer_kernels.models.poolformer import ModelConfig, PoolFormer
from support.peers import randomise


class RecordedGraph:
    """Replays as a CUDA graph does: the recorded operators again, on the same memory, without Python."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(kept, torch.Tensor) and kept is not new:
                    kept.copy_(new)


class Recorder(TorchDispatchMode):
    """A capture. It runs nothing: what was written in place is written back when it ends."""

    def __init__(self, graph, stream):
        super().__init__()
        self.graph, self.overwritten, self.random = graph, [], torch.get_rng_state()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in written(func, args, kwargs):
            self.overwritten.append((tensor, tensor.clone()))
        out = func(*args, **kwargs)
        if not func.is_view:
            self.graph.calls.append((func, args, kwargs, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, value in reversed(self.overwritten):
                tensor.copy_(value)
        torch.set_rng_state(self.random)


def written(func, args, kwargs):
    """The tensors among the arguments that the operator writes to."""
    if func is torch.ops.aten.native_batch_norm.default:  # whose schema does not say so
        return [t for t in args[3:5] if t is not None]
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    marked = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return [t for name in marked for t in tree_leaves(named.get(name)) if isinstance(t, torch.Tensor)]


class Stream:
    def wait_stream(self, other):
        pass


def install(monkeypatch):
    """What `poolformer_kernels.graphs` uses of CUDA, replaced."""
    cuda = graphs.torch.cuda
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "current_stream", Stream)
    monkeypatch.setattr(cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(cuda, "graph", Recorder)
    monkeypatch.setattr(cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(cuda, "set_rng_state", lambda state, device: None)


class SaysCuda(torch.Tensor):
    """A CPU tensor that says it is on CUDA."""

    is_cuda = True


class Net(nn.Module):
    """With a buffer that steps change, and random numbers. No sum depends on where its operands lie."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(4, 1, 1) + 0.5), nn.Parameter(torch.rand(4, 1, 1))
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.unused = nn.Parameter(torch.ones(2))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.drop(F.gelu(self.norm(x * self.scale + self.shift))).mean((2, 3))


def tiny_poolformer(num_classes, **options):
    """In float64, where stale memory shows and the order of a sum does not.

    The bits of a matrix product depend on where its operands lie: MKL's float32 sums of 32 numbers change by
    1e-6 when a matrix moves from a multiple of 16 bytes, and replays have buffers of their own.
    """
    torch.manual_seed(0)
    config = ModelConfig("tiny", (1, 2, 1, 1), (8, 16, 24, 32), 1e-5, 0.0, 0, 0.9)
    return randomise(PoolFormer(config, num_classes=num_classes, **options)).double()


def eager(model, x):
    with torch.inference_mode():
        return model(x)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "capturable": True, "fused": True, **options})
