"""The operators: schema, checks, fakes, autograd and autocast. The kernels are in `..backends`."""

from . import flops, norm_stats
from .dispatch import available_backends, backend_reasons, get_backend, use_backend
from .mlp import mlp
from .pool_mixer import pool_mixer

__all__ = [
    "available_backends",
    "backend_reasons",
    "flops",
    "get_backend",
    "mlp",
    "norm_stats",
    "pool_mixer",
    "use_backend",
]
